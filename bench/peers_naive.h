/* peers_naive.h - plain C, a peer itself and the glue of others. */
#ifndef BENCH_PEERS_NAIVE_H
#define BENCH_PEERS_NAIVE_H

#include <stddef.h>

enum { BLOCK = 128, PAGE = 64, MAX_DIM = 512 };

/* A halving: 128 tokens of weight 1, of a cache that saw no queries. Left out, as they cannot
   happen then: weights beyond the tokens seen, values too large to be stored. */
typedef struct naive_block {
    const float *k, *v;                               /* [128][d] */
    const float *u;                                   /* random numbers */
    size_t d, n;                                      /* n: how many values move */
    int moves;                                        /* values do, and importance looks at keys */
    float mean[MAX_DIM], norm[BLOCK], factor[BLOCK];  /* of keys; of values; in the kernel */
    float chance[BLOCK], inverse[BLOCK], lack[BLOCK]; /* to stay; 1 / that; y of the rules */
    unsigned char keep[BLOCK], moving[PAGE];
    float kk[BLOCK * BLOCK], vv[BLOCK * BLOCK]; /* Gram matrices, lower triangles; E, and K */
    float k_centred[BLOCK * MAX_DIM], v_centred[BLOCK * MAX_DIM];
    float c[PAGE * BLOCK], among[PAGE * PAGE]; /* H_ij (y_j - r_i); 1/2 H_ik */
    float step[PAGE * MAX_DIM];                /* d_i */
    float kept_k[PAGE * MAX_DIM], kept_v[PAGE * MAX_DIM], weight[PAGE];
} naive_block;

void naive_centre(const float *x, float *mean, float *centred, size_t d);
void naive_gram(const float *x, float *gram, size_t d);
void naive_choose(naive_block *b);
void naive_coefficients(naive_block *b);
void naive_product(naive_block *b);
void naive_solve(naive_block *b);
void naive_keep(naive_block *b);

void naive_attend(const float *k, const float *v, const float *q, float *out, float *s, size_t n,
                  size_t d);
void naive_softmax(float *s, size_t n, size_t d);
void naive_values(const float *v, const float *s, float *out, size_t n, size_t d);
void naive_exp(const float *x, float *y, size_t n);

#endif
