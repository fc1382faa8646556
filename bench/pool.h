/* pool.h - weighted tokens of one KV head that are kept, reweighted and dropped by groups: the
   common ground of the streaming baselines with weights (theory.c, pages.c). */
#ifndef POOL_H
#define POOL_H

#include "baselines.h"
#include "slots.h"

enum { POOL_GROUPS = 65, POOL_LEVELS = 32, POOL_PARTS = 32, POOL_PAGES = 4096 };

/* Moments of degree 0 and 1 around a centre, in float. */
typedef struct part {
    float *centre, *k, *v, *kv; /* c [d], sums of k - c [d], v [dv], (k - c) v^T [d][dv] */
    float n;
} part;

/* Tokens in no order; each is in a group and has gone through `level` halvings. */
struct pool {
    bl_config cfg;
    uint64_t head;
    int full; /* more than the budget was needed: nothing more is taken */
    uint32_t seen;
    size_t query_heads, batch, failures;
    void (*append)(pool *p, const float *k, const float *v);
    slots *s;
    int *group, *level; /* [capacity]; group -1: kept exactly */
    float *p, *logit;   /* [query_heads][capacity]: scratch, as the next ones */
    uint32_t *list;     /* [capacity] */
    double *gram;       /* [batch][batch] */
    float *key, *keys;  /* [d], [batch][d] */
    signed char *sign;  /* [batch] */
    uint64_t draws;     /* halvings so far, or single random numbers */
    /* theory.c */
    part parts[POOL_PARTS];
    size_t n_parts, wanted_parts;
    int waiting[POOL_GROUPS][POOL_LEVELS]; /* tokens at level 0, batches above */
    /* pages.c */
    uint32_t n_pages, used, fill, window_pages;
    int page[POOL_PAGES], page_level[POOL_PAGES]; /* oldest first: group and level of each */
};

/* A batch is the most tokens that one halving takes. NULL: no memory. */
pool *pool_new(const bl_config *cfg, size_t kv_head, size_t batch);

/* Puts an exact token of weight 1 behind the last one and returns its slot. */
size_t pool_put(pool *p, const float *k, const float *v, uint32_t position);
void pool_drop(pool *p, size_t i);

/* The oldest tokens of a group and level, at most a batch, in order, to p->list. */
size_t pool_gather(pool *p, int group, int level);

/* p->keys: the keys of p->list; p->gram: scale * <k_i, k_j>, lower triangle. With a centre keys are
   taken from there. */
void pool_products(pool *p, size_t n, const float *centre);

double pool_dot(const float *a, const float *b, size_t n);
const float *pool_value(const pool *p, size_t i);

#endif /* POOL_H */
