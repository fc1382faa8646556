/* theory.h - streaming baselines with weights: theory.c, pages.c, and what they share, pool.c. */
#ifndef THEORY_H
#define THEORY_H

#include "baselines.h"

pool *algorithm1_new(const bl_config *cfg, size_t kv_head);
pool *hybrid_new(const bl_config *cfg, size_t kv_head);
pool *walk_new(const bl_config *cfg, size_t kv_head);
pool *uniform_new(const bl_config *cfg, size_t kv_head);
pool *pair_new(const bl_config *cfg, size_t kv_head);
pool *stride_new(const bl_config *cfg, size_t kv_head);
void pool_free(pool *p);

void pool_append(pool *p, const float *k, const float *v);
void pool_attend(pool *p, const float *q, float *out); /* the query heads of one KV head */
size_t pool_held(const pool *p); /* slots in use, or taken by moments; above the budget: no room */
size_t pool_failures(const pool *p);

/* Slots whose bytes of K and V the moments of one part take. */
size_t hybrid_part_slots(const bl_config *cfg);

/* Of one query: turns the weights e^(logit - max) of tokens of parts into those of the residual;
   adds the moments to the sum of the numerator and returns those of the denominator. */
void hybrid_residual(pool *p, const float *q, double max, const float *logit, float *weight);
double hybrid_moments(pool *p, const float *q, double max, double *out);

/* Splits cfg->budget as balancekv.h does; returns the least budget that works. */
uint32_t pages_resolve(bl_config *cfg, int default_window);

#endif /* THEORY_H */
