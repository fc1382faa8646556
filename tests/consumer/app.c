/* app.c - the program of somebody who uses balancekv.h, built here along every way of getting it.
   Prints the version that it was compiled with and linked to, and what 1000 tokens weigh in it. */
#define BALANCEKV_IMPLEMENTATION
#include <balancekv.h>
#include <stdio.h>

static unsigned char block[1 << 18];

int main(void) {
    enum { DIM = 16, TOKENS = 1000 };
    bkv_config cfg = bkv_config_default(1, 1, DIM, 256);
    bkv_cache cache;
    float x[DIM], out[DIM], max, sum;
    bkv_result r = bkv_init(&cache, &cfg, block, sizeof block);
    for (int t = 0; t < TOKENS && r == BKV_OK; t++) {
        for (int i = 0; i < DIM; i++) x[i] = (float)((t * 7 + i * 5) % 31) / 31.0f;
        r = bkv_append(&cache, bkv_dense(x, BKV_F32), bkv_dense(x, BKV_F32), 1, 0, 0, 1);
    }
    /* A query of zeros looks at all tokens alike: the sum of the weights. */
    for (int i = 0; i < DIM; i++) x[i] = 0;
    if (r == BKV_OK)
        r = bkv_attend_partial(&cache, bkv_dense(x, BKV_F32), out, &max, &sum, 0, 1);
    printf("balancekv %s %s: %d tokens, %s, weight %.0f\n", BKV_VERSION, bkv_version(), TOKENS,
           bkv_result_string(r), sum);
    return r != BKV_OK;
}
