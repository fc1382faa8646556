/* tap.c - how to read keys and values where a runtime has them, without a copy: f16, keys as
   [token][kv_head][dim] (ExecuTorch, MNN before it packs, llama.cpp), values transposed as
   [kv_head][dim][token] (llama.cpp without flash attention). The strides of bkv_tensor say so; the
   result is, bit for bit, that of dense arrays.
   Build and run: cc -std=c99 -O2 -I. examples/tap.c -o tap && ./tap */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { Q_HEADS = 6, KV_HEADS = 2, DIM = 64, CHUNK = 32, CHUNKS = 60, BUDGET = 512 };

/* The runtime's buffers, for one chunk of tokens. */
typedef struct runtime {
    uint16_t q[CHUNK][Q_HEADS][DIM], k[CHUNK][KV_HEADS][DIM];
    uint16_t v[KV_HEADS][DIM][CHUNK];
} runtime;

static void compute(runtime *rt) { /* stands in for the model: f16 of +-[0.125, 2) */
    static uint32_t state = 1;
    uint16_t *x = (uint16_t *)rt;
    for (size_t n = sizeof *rt / sizeof *x; n--; state = state * 1664525u + 1013904223u)
        *x++ = (uint16_t)((0x3000u + (state >> 20)) | (state >> 4 & 0x8000u));
}

/* ---- the tap: where element (token, head, i) lies, in bytes --------------------------------- */
static bkv_tensor keys(const runtime *rt) {
    bkv_tensor t = {rt->k, BKV_F16, sizeof rt->k[0], sizeof rt->k[0][0], sizeof rt->k[0][0][0]};
    return t;
}

static bkv_tensor values(const runtime *rt) {
    bkv_tensor t = {rt->v, BKV_F16, sizeof rt->v[0][0][0], sizeof rt->v[0], sizeof rt->v[0][0]};
    return t;
}

/* What the tap saves: the values as rows, made for comparison only. */
static void transpose(uint16_t rows[CHUNK][KV_HEADS][DIM], const runtime *rt) {
    for (int t = 0; t < CHUNK; t++)
        for (int h = 0; h < KV_HEADS; h++)
            for (int i = 0; i < DIM; i++) rows[t][h][i] = rt->v[h][i][t];
}

static bkv_cache make(void) {
    bkv_config cfg = bkv_config_default(Q_HEADS, KV_HEADS, DIM, BUDGET);
    size_t bytes = bkv_size(&cfg);
    bkv_cache cache;
    bkv_result r = bkv_init(&cache, &cfg, malloc(bytes), bytes);
    if (r != BKV_OK) {
        fprintf(stderr, "tap: %s\n", bkv_result_string(r));
        exit(1);
    }
    return cache;
}

static float out[CHUNK][Q_HEADS][DIM], dense_out[CHUNK][Q_HEADS][DIM];
static uint16_t rows[CHUNK][KV_HEADS][DIM];

int main(void) {
    static runtime rt;
    bkv_cache tapped = make(), dense = make();
    int same = 1;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        compute(&rt);
        transpose(rows, &rt);
        bkv_tensor q = bkv_dense(rt.q, BKV_F16), v = bkv_dense(rows, BKV_F16);
        bkv_tensor k = bkv_dense(rt.k, BKV_F16);
        bkv_result r = bkv_prefill(&tapped, keys(&rt), values(&rt), q, out[0][0], CHUNK, 0, 0, 1);
        if (!r) r = bkv_prefill(&dense, k, v, q, dense_out[0][0], CHUNK, 0, 0, 1);
        if (r) {
            fprintf(stderr, "tap: %s\n", bkv_result_string(r));
            return 1;
        }
        same = same && !memcmp(out, dense_out, sizeof out);
    }
    bkv_stats_info s;
    bkv_stats(&tapped, &s);
    printf("%u tokens seen, %u held: the tap and dense arrays give %s\n", (unsigned)s.tokens_seen,
           (unsigned)s.tokens_held, same ? "the same bits" : "DIFFERENT results");
    free(tapped.mem);
    free(dense.mem);
    return !same;
}
