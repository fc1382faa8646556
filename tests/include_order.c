/* include_order.c - the header may be included any number of times, in any order; the functions
   come once. */
#include "balancekv.h"
#include "balancekv.h" /* declarations again: nothing new */

static uint32_t used_before_the_implementation(void) { return bkv_backends(); }

#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h" /* the functions, although the declarations were read before */
#include "balancekv.h" /* not a second time */
#undef BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <string.h> /* after the header: nothing it left behind may disturb */

int main(void) {
    bkv_config cfg = bkv_config_default(1, 1, 64, 512);
    return !(used_before_the_implementation() != 0 && bkv_check(&cfg) == BKV_OK &&
             strlen(bkv_version()) >= 5);
}
