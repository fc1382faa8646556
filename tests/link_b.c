/* link_b.c - see link_a.c. */
#include "balancekv.h"

bkv_result step_b(void *mem, size_t bytes, const float *token, float *out);

/* Attached anew each time: the backend in use may differ between the files. */
bkv_result step_b(void *mem, size_t bytes, const float *token, float *out) {
    bkv_cache c;
    bkv_tensor x = bkv_dense(token, BKV_F32);
    bkv_result r = bkv_attach(&c, mem, bytes, BKV_BACKEND_AUTO);
    r = r ? r : bkv_append(&c, x, x, 1, 0, 0, 1);
    return r ? r : bkv_attend(&c, x, out, 0, 1);
}
