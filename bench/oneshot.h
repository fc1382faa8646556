/* oneshot.h - the selecting halves of the methods in baselines.c. */
#ifndef ONESHOT_H
#define ONESHOT_H

#include "baselines.h"

enum { QUERY_MEMORY = 128 }; /* queries over which `expected` averages */

typedef size_t select_function(const bl_prompt *t, size_t keep, bl_token *out);

select_function select_newest, select_knorm, select_keydiff, select_expected, select_h2o,
    select_tova, select_uniform, select_published, select_published_both, select_snapkv,
    select_snapkv_ahead, select_pyramidkv, select_kvcrush_random, select_kvcrush_mean,
    select_kvcrush_alternate, select_pages;

#endif /* ONESHOT_H */
