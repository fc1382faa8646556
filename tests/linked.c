/* The implementation, compiled once for all programs that Meson builds with -DLINKED: they see the
   public part of the header alone, as the files of a user do. */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
