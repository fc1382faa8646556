/* theory.h - the two systems with proofs, streaming; see theory.c. A pool is one KV head. */
#ifndef THEORY_H
#define THEORY_H

#include "baselines.h"

pool *algorithm1_new(const bl_config *cfg, size_t kv_head);
pool *hybrid_new(const bl_config *cfg, size_t kv_head);
void pool_free(pool *p);

void pool_append(pool *p, const float *k, const float *v);
void pool_attend(pool *p, const float *q, float *out); /* the query heads of one KV head */
size_t pool_held(const pool *p); /* slots in use, or taken by moments; above the budget: no room */
size_t pool_failures(const pool *p);

/* Slots whose bytes of K and V the moments of one part take. */
size_t hybrid_part_slots(const bl_config *cfg);

#endif /* THEORY_H */
