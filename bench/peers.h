/* peers.h - what bench/speed asks of other implementations. They live in a shared object that
   bench/peers.sh builds from bench/peers.c outside the tree; bench/speed needs none of them. */
#ifndef BENCH_PEERS_H
#define BENCH_PEERS_H

#include <stddef.h>

/* One problem. All arrays are f32 and dense. */
typedef struct peer_task {
    const char *work; /* "halve", "attend", "prefill" or "exp" */
    const char *type; /* in which the peer holds K and V: "f32", "f16"; halve: or "f32 unmoved" */
    size_t n_q_heads, n_kv_heads, dim;
    size_t n, n_queries; /* tokens; queries: of the last tokens, causal */
    size_t copies;       /* of K and V, used in turn: more than the caches hold, or 1 */
    const float *k, *v;  /* [n][n_kv_heads][dim]; halve: as many blocks as copies */
    const float *q;      /* [n_queries][n_q_heads][dim]; exp: [n] */
    const float *u;      /* halve: the random numbers of the draw, [128], in [0, 1) */
} peer_task;

typedef struct peer {
    const char *name, *work, *types;
    double tolerance; /* of its relative error against the same in double; halve: against ours */
    void *(*open)(const struct peer *self, const peer_task *task);
    void (*run)(void *state, size_t copy);
    /* Of the last run. attend, prefill: [n_queries][n_q_heads][dim]; exp: [n]; halve: [128] weights
       and [128][dim] values, 0 of tokens that went. */
    const float *(*result)(void *state);
    void (*close)(void *state);
} peer;

/* Exported by the shared object. */
typedef struct peer_list {
    const char *about; /* versions */
    const peer *peers;
    size_t count;
} peer_list;
#define PEERS_SYMBOL balancekv_bench_peers

#endif
