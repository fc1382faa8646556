/* peers.h - what bench/speed asks of other implementations. They live in a shared object of their own
   that bench/peers.sh builds outside the tree from bench/peers.c, so that bench/speed needs none of
   them. */
#ifndef BENCH_PEERS_H
#define BENCH_PEERS_H

#include <stddef.h>
#include <stdint.h>

/* One problem. All arrays are f32 and dense. */
typedef struct peer_task {
    const char *work; /* "halve", "attend", "prefill" or "exp" */
    const char *type; /* in which the peer is to hold K and V: "f32" or "f16" */
    size_t n_q_heads, n_kv_heads, dim;
    size_t n, n_queries;    /* tokens; queries, which are those of the last tokens (prefill) */
    size_t copies;          /* of K and V, to be used in turn: more than the caches hold, or 1 */
    const float *k, *v;     /* [n][n_kv_heads][dim] */
    const float *q;         /* [n_queries][n_q_heads][dim]; exp: [n] */
    const float *threshold; /* halve: token i gets +1 if its signed sum is below threshold[i] */
} peer_task;

typedef struct peer {
    const char *name, *work, *types;
    double tolerance; /* of its relative error against the same in double */
    void *(*open)(const struct peer *self, const peer_task *task);
    void (*run)(void *state, size_t copy);
    /* attend, prefill: [n_queries][n_q_heads][dim]; exp: [n]; halve: the kernel below the diagonal,
       [128][128], and behind it the 128 signs. Of the last run. */
    const float *(*result)(void *state);
    void (*close)(void *state);
} peer;

#define PEERS_SYMBOL "balancekv_bench_peers"
typedef const peer *(*peers_function)(size_t *count);

#endif
