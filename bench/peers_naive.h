/* peers_naive.h - plain C, a peer itself and the glue of others. */
#ifndef BENCH_PEERS_NAIVE_H
#define BENCH_PEERS_NAIVE_H

#include <stddef.h>

enum { BLOCK = 128, MAX_DIM = 512 };
#define CONSTANT 0.025f /* the constant channel of the walk's kernel */

void naive_attend(const float *k, const float *v, const float *q, float *out, float *s, size_t n,
                  size_t d);
void naive_softmax(float *s, size_t n, size_t d);
void naive_values(const float *v, const float *s, float *out, size_t n, size_t d);
void naive_kernel(const float *k, const float *v, float *w, size_t d);
void naive_kernel_of(const float *kk, const float *vv, float *w, size_t d);
void naive_kernel_of_double(const double *kk, const double *vv, float *w, size_t d);
void naive_centre(const float *k, float *centred, size_t d);
void naive_walk(const float *w, const float *bound, float *sign);
void naive_exp(const float *x, float *y, size_t n);

#endif
