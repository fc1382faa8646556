/* pool.c - see pool.h. */
#include "pool.h"
#include "theory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

pool *pool_new(const bl_config *cfg, size_t kv_head, size_t batch) {
    pool *p = (pool *)calloc(1, sizeof *p);
    size_t n;
    if (!p) return NULL;
    p->cfg = *cfg;
    p->head = kv_head;
    p->query_heads = cfg->n_q_heads / cfg->n_kv_heads;
    p->batch = batch;
    p->s = slots_new(cfg->head_dim, cfg->value_dim, cfg->budget + 2);
    n = p->s ? p->s->capacity : 0;
    p->group = (int *)calloc(n, sizeof *p->group);
    p->level = (int *)calloc(n, sizeof *p->level);
    p->p = (float *)calloc(n * p->query_heads, sizeof *p->p);
    p->logit = (float *)calloc(n * p->query_heads, sizeof *p->logit);
    p->list = (uint32_t *)calloc(n, sizeof *p->list);
    p->gram = (double *)calloc(batch * batch, sizeof *p->gram);
    p->key = (float *)calloc(cfg->head_dim, sizeof *p->key);
    p->keys = (float *)calloc(batch * cfg->head_dim, sizeof *p->keys);
    p->sign = (signed char *)calloc(batch, 1);
    if (p->s && p->group && p->level && p->p && p->logit && p->list && p->gram && p->key &&
        p->keys && p->sign)
        return p;
    pool_free(p);
    return NULL;
}

void pool_free(pool *p) {
    if (!p) return;
    for (size_t i = 0; i < POOL_PARTS; i++) free(p->parts[i].centre);
    slots_free(p->s);
    free(p->group);
    free(p->level);
    free(p->p);
    free(p->logit);
    free(p->list);
    free(p->gram);
    free(p->key);
    free(p->keys);
    free(p->sign);
    free(p);
}

size_t pool_put(pool *p, const float *k, const float *v, uint32_t position) {
    size_t i = p->s->held++;
    slots_put(p->s, i, k, v, position);
    p->group[i] = -1;
    p->level[i] = 0;
    return i;
}

void pool_drop(pool *p, size_t i) {
    size_t last = --p->s->held;
    slots_move(p->s, i, last);
    p->group[i] = p->group[last];
    p->level[i] = p->level[last];
}

size_t pool_gather(pool *p, int group, int level) {
    size_t n = 0;
    for (size_t i = 0; i < p->s->held; i++) {
        size_t at = n;
        if (p->group[i] != group || p->level[i] != level) continue;
        for (; at && p->s->position[p->list[at - 1]] > p->s->position[i]; at--)
            p->list[at] = p->list[at - 1];
        p->list[at] = (uint32_t)i;
        n++;
    }
    return n < p->batch ? n : p->batch;
}

/* Several sums, so that they fit the lanes of a vector. */
double pool_dot(const float *a, const float *b, size_t n) {
    double sums[8] = {0}, sum = 0;
    size_t d = 0;
    for (; d + 8 <= n; d += 8)
        for (size_t x = 0; x < 8; x++) sums[x] += (double)a[d + x] * (double)b[d + x];
    for (; d < n; d++) sum += (double)a[d] * (double)b[d];
    for (size_t x = 0; x < 8; x++) sum += sums[x];
    return sum;
}

const float *pool_value(const pool *p, size_t i) { return p->s->v + i * p->s->v_stride; }

void pool_products(pool *p, size_t n, const float *centre) {
    size_t d = p->s->dim;
    for (size_t i = 0; i < n; i++) {
        float *key = p->keys + i * d;
        slots_key(p->s, p->list[i], key);
        for (size_t a = 0; centre && a < d; a++) key[a] -= centre[a];
        for (size_t j = 0; j <= i; j++)
            p->gram[i * n + j] = pool_dot(key, p->keys + j * d, d) * (double)p->cfg.scale;
    }
}

void pool_append(pool *p, const float *k, const float *v) {
    if (p->full) return;
    p->append(p, k, v);
    p->full |= pool_held(p) > p->cfg.budget;
    p->seen++;
}

void pool_attend(pool *p, const float *q, float *out) {
    size_t d = p->s->dim, dv = p->s->v_dim, n = p->s->capacity, rows = p->query_heads;
    float max[16], sum[16];
    double moments[512], totals[16] = {0};
    slots_logits(p->s, q, rows, p->cfg.scale, p->p);
    memcpy(p->logit, p->p, rows * n * sizeof *p->logit);
    slots_exp(p->s, rows, p->p, max);
    for (size_t r = 0; p->n_parts && r < rows; r++)
        hybrid_residual(p, q + r * d, (double)max[r], p->logit + r * n, p->p + r * n);
    slots_output(p->s, p->p, rows, sum, out);
    for (size_t r = 0; r < rows; r++, out += dv) {
        memset(moments, 0, sizeof moments);
        if (p->n_parts) totals[r] = hybrid_moments(p, q + r * d, (double)max[r], moments);
        totals[r] += (double)sum[r];
        p->failures += totals[r] <= 0; /* a sum that was badly estimated; 0 is the answer then */
        for (size_t b = 0; b < dv; b++)
            out[b] = totals[r] > 0 ? (float)(((double)out[b] + moments[b]) / totals[r]) : 0;
    }
}

size_t pool_held(const pool *p) {
    return p->s->held + p->wanted_parts * hybrid_part_slots(&p->cfg);
}

size_t pool_failures(const pool *p) { return p->failures; }
