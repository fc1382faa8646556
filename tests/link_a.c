/* link_a.c - two translation units in one program: this one holds the implementation, link_b.c
   only uses it, or has a private copy (BALANCEKV_STATIC), perhaps built with other switches. All
   must work on the same state bytes and give the same results. */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
#include <string.h>

enum { DIM = 16, TOKENS = 700, BLOCK = 1 << 18 };

bkv_result step_b(void *mem, size_t bytes, const float *token, float *out);

static unsigned char block_a[BLOCK], block_b[BLOCK];

static bkv_result step_a(bkv_cache *c, const float *token, float *out) {
    bkv_tensor x = bkv_dense(token, BKV_F32);
    bkv_result r = bkv_append(c, x, x, 1, 0, 0, 1);
    return r ? r : bkv_attend(c, x, out, 0, 1);
}

int main(void) {
    bkv_config cfg = bkv_config_default(1, 1, DIM, 256);
    bkv_cache a, b;
    bkv_stats_info stats;
    float token[DIM], out_a[DIM], out_b[DIM];
    uint32_t bits = 1;
    bkv_result r = bkv_init(&a, &cfg, block_a, sizeof block_a);
    r = r ? r : bkv_init(&b, &cfg, block_b, sizeof block_b);
    for (int t = 0; t < TOKENS && !r; t++) {
        for (int i = 0; i < DIM; i++) {
            bits = bits * 1664525u + 1013904223u;
            token[i] = (float)(bits >> 24) / 64.0f - 2.0f;
        }
        r = step_a(&a, token, out_a);
        r = r ? r : step_b(block_b, sizeof block_b, token, out_b);
        if (memcmp(out_a, out_b, sizeof out_a)) {
            printf("token %d: the two files give different results\n", t);
            return 1;
        }
    }
    r = r ? r : bkv_stats(&a, &stats);
    if (r) {
        printf("%s\n", bkv_result_string(r));
        return 1;
    }
    if (!stats.halvings || memcmp(block_a, block_b, stats.state_bytes)) {
        printf("the two states differ, or nothing was halved\n");
        return 1;
    }
    return 0;
}
