/* minimal.c - one transformer layer with grouped queries over a cache that never grows.
   Build and run: cc -std=c99 -O2 -I. examples/minimal.c -o minimal && ./minimal */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
#include <stdlib.h>

enum { Q_HEADS = 6, KV_HEADS = 2, DIM = 64, BUDGET = 512, TOKENS = 5000 };

static void model(float *x, size_t n) { /* stands in for yours: noise in [-1, 1) */
    static uint32_t state = 1;
    for (; n--; state = state * 1664525u + 1013904223u) *x++ = (float)(state >> 9) / 4194304 - 1;
}

int main(void) {
    float k[KV_HEADS * DIM], v[KV_HEADS * DIM], q[Q_HEADS * DIM], out[Q_HEADS * DIM] = {0};
    bkv_config cfg = bkv_config_default(Q_HEADS, KV_HEADS, DIM, BUDGET);
    size_t bytes = bkv_size(&cfg); /* known now, and never more */
    bkv_cache cache;
    bkv_result r = bkv_init(&cache, &cfg, malloc(bytes), bytes);
    for (int t = 0; t < TOKENS && r == BKV_OK; t++) {
        model(k, KV_HEADS * DIM), model(v, KV_HEADS * DIM), model(q, Q_HEADS * DIM);
        /* A token's keys (after RoPE) and values go in, attention over everything comes out. */
        r = bkv_append(&cache, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), 1, 0, 0, 1);
        if (r == BKV_OK) r = bkv_attend(&cache, bkv_dense(q, BKV_F32), out, 0, 1);
    }
    printf("%zu bytes: %d tokens, %s\n", bytes, TOKENS, bkv_result_string(r));
    printf("out[0..2] = %+.6f %+.6f %+.6f\n", out[0], out[1], out[2]);
    return r != BKV_OK;
}
