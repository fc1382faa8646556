/* baselines.h - what balancekv.h is compared with, each method written from its paper.

   A streaming cache (bl_new, bl_append, bl_attend, bl_free) holds at most `budget` tokens per KV
   head; bl_select() compresses a whole prompt once. No globals, no threads inside; a cache may be
   used by one thread at a time. */
#ifndef BASELINES_H
#define BASELINES_H

#include "exact.h"
#include <stdint.h>

enum { BL_STREAM = 1, BL_ONESHOT = 2 }; /* protocols */

typedef struct bl_cache bl_cache;
typedef struct bl_config bl_config;
typedef struct bl_prompt bl_prompt;
typedef struct pool pool; /* theory.c */

/* A token that bl_select() keeps: its weights in the two sums of softmax attention. */
typedef struct bl_token {
    uint32_t position;
    float numerator, denominator;
} bl_token;

typedef struct bl_method {
    const char *name;
    const char *needs; /* what a runtime must hand over beside k and v */
    const char *text;  /* what it does and where it is from */
    int protocols, random;
    double window_share; /* of the budget, that the newest tokens get by default (stream) */
    /* Streaming: how much each token in use deserves to stay, called when there is no free slot. */
    void (*score)(const bl_cache *c, size_t head, float *score);
    /* Streaming: what the method learns from the attention p[group][slots] of one head. */
    void (*observe)(bl_cache *c, size_t head, const float *q, const float *p, const float *sum);
    uint32_t words, batch; /* 4-byte words per slot; slots that are freed at once */
    /* Oneshot. */
    size_t (*select)(const bl_prompt *t, size_t keep, bl_token *out);
    /* Streaming, instead of score: one KV head of a system of another kind. */
    pool *(*make)(const bl_config *cfg, size_t kv_head);
} bl_method;

extern const bl_method bl_methods[];
extern const size_t bl_n_methods;

/* 0 means the method's default, BL_NONE none. */
#define BL_NONE 0xFFFFFFFFu
struct bl_config {
    uint32_t n_q_heads, n_kv_heads, head_dim, value_dim; /* required */
    uint32_t budget;  /* slots per KV head, everything included; required */
    uint32_t sinks;   /* first tokens that always stay; default 4 (stream only) */
    uint32_t window;  /* newest tokens that always stay; default: window_share, oneshot none */
    uint32_t queries; /* newest queries that snapkv and its kin look at; default 64 */
    uint32_t pool;    /* neighbouring tokens over which they average; default 5 */
    uint32_t block;   /* published, algorithm1: tokens of a walk; default 128; see bl_fit() */
    uint32_t tokens;  /* algorithm1: of the whole stream; default 2^20 */
    uint32_t layer, layers; /* pyramidkv: of this cache (from 0), of the model; default 0, 30 */
    float share;            /* kvcrush: of the budget, for representatives; default 0.25 */
    float gamma, temp;      /* walk, pair: pages.c; published: oneshot.c; default 4, 1 */
    float scale;            /* factor on <q, k>; default 1 / sqrt(head_dim) */
    uint64_t seed;
};

const bl_method *bl_find(const char *name); /* NULL: there is none */

/* Fills in the defaults; returns the least budget that works. */
uint32_t bl_resolve(const bl_method *m, bl_config *cfg);

/* One transformer layer. NULL: no memory, or a budget below the least. */
bl_cache *bl_new(const bl_method *m, const bl_config *cfg);
void bl_free(bl_cache *c);

/* One token for all KV heads: k [n_kv_heads][head_dim], v [n_kv_heads][value_dim]. */
void bl_append(bl_cache *c, const float *k, const float *v);

/* q [n_q_heads][head_dim], out [n_q_heads][value_dim]. To be called after each bl_append(), as some
   methods learn from it; out may be NULL if only that is wanted. */
void bl_attend(bl_cache *c, const float *q, float *out);

/* algorithm1 takes its block, not its budget, for granted: sets cfg->block to the largest even one
   that never holds more than the budget on the n tokens of a stream, k [n][n_kv_heads][head_dim];
   returns 0 if there is none. Does nothing for other methods. */
int bl_fit(const bl_method *m, bl_config *cfg, const float *k, const float *v, size_t n);

/* Slots in use, of the KV head that uses most. */
uint32_t bl_held(const bl_cache *c);

/* algorithm1: steps at which the walk left its bound; hybrid: attention with a sum below 0. */
size_t bl_failures(const bl_cache *c);

/* Bytes of the state. Per slot: 2 for each element of K and V (f16), 4 for the position, 4 for each
   further word of the method; then 4 for each number that a method keeps per head. */
size_t bl_bytes(const bl_cache *c);

/* How many tokens a method keeps in this layer if a layer keeps `keep` on average. */
size_t bl_keep(const bl_method *m, const bl_config *cfg, size_t keep);

/* Chooses at most bl_keep() of the tokens begin..end-1 of one KV head. Tokens 0..end-1 and their
   queries are the prompt; cfg->queries <= end. Returns how many it wrote to out; 0: no memory. */
size_t bl_select(const bl_method *m, const bl_config *cfg, const exact_input *prompt,
                 size_t kv_head, size_t begin, size_t end, size_t keep, bl_token *out);

#endif /* BASELINES_H */
