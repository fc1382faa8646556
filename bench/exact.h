/* exact.h - softmax attention in double: what every method is compared with. */
#ifndef EXACT_H
#define EXACT_H

#include <stddef.h>

/* Keys [n][n_kv_heads][head_dim], values [n][n_kv_heads][value_dim], queries [n][n_q_heads]
   [head_dim], all dense. Query head h reads KV head h / (n_q_heads / n_kv_heads). */
typedef struct exact_input {
    const float *q, *k, *v;
    size_t n_q_heads, n_kv_heads, head_dim, value_dim;
    double scale; /* factor on <q, k> */
} exact_input;

/* Positions of a job: all heads of one KV head, a few queries that share every tile of keys. */
enum { EXACT_QUERIES = 16 };

/* Bytes of scratch that one call of exact_attend() needs. */
size_t exact_scratch_bytes(const exact_input *in);

/* Causal attention of the queries at positions first + i * step, i < n_queries <= EXACT_QUERIES,
   of the query heads of one KV head: out[i][n_q_heads][value_dim], only those heads are written. */
void exact_attend(const exact_input *in, size_t kv_head, size_t first, size_t step,
                  size_t n_queries, double *out, void *scratch);

#endif /* EXACT_H */
