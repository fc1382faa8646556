/* theory.c - the two streaming systems that come with proofs, so that what replaces them in
   balancekv.h is measured and not asserted.

   algorithm1: BalanceKV as its paper states it (arXiv 2502.07861, algorithm 1). Values are divided
   into octaves of their norm, each with an own MergeAndReduce instance for the numerator; one more
   instance, in which all values are 1, is for the denominator. An instance collects t tokens, keeps
   those of one sign of a self-balancing walk (the fewer), which go to the next level with doubled
   weights, where two such batches are reduced again. The walk takes + with probability
   1/2 - <w, x> / 2c, c = 30 ln(n / delta), delta = 0.01, for vectors x = e^(<k, .>/sqrt d) v of
   norm 1 at most, and fails where |<w, x>| > c. The paper's bound r on the keys is not known to a
   stream, so a batch is divided by its largest norm. Octaves whose values are too small to matter
   are dropped in the paper; with r of real keys that never happens.

   hybrid: after arXiv 2606.07205, which joins discrepancy, the polynomial method and a partition of
   space. Keys are assigned to the nearest of a few centres c (farthest points of the first 64). In
   each part e^<q,k> = e^<q,c> (1 + x + R(x)), x = <q, k - c>: the sums of 1 and x are kept exactly
   by moments of degree 0 and 1 of (1, v); the residual R(x) = e^x - 1 - x, a kernel as its Taylor
   coefficients are positive, is estimated from a coreset halved by the walk on that kernel. */
#include "theory.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST = 64, BATCH = 128, DENOMINATOR = POOL_GROUPS - 1, OCTAVES = POOL_GROUPS - 1 };

static double draw(pool *p) {
    uint64_t x = ++p->draws * 0x9E3779B97F4A7C15u + p->cfg.seed + (p->head << 32);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) / 9007199254740992.0;
}

/* Kernel of the tokens of p->list, largest diagonal entry 1; with a centre that of the residual. */
static void make_gram(pool *p, size_t n, const float *centre, int values) {
    double largest = 0, top = -HUGE_VAL;
    pool_products(p, n, centre);
    for (size_t i = 0; i < n; i++)
        if (p->gram[i * n + i] > top) top = p->gram[i * n + i];
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            const float *a = pool_value(p, p->list[i]), *b = pool_value(p, p->list[j]);
            double x = p->gram[i * n + j], e = exp(x - top);
            if (centre) e -= (1 + x) * exp(-top);
            if (values) e *= pool_dot(a, b, p->s->v_dim) + (centre ? 0.025 : 0);
            p->gram[i * n + j] = e;
            if (i == j && e > largest) largest = e;
        }
    for (size_t i = 0; i < n * n && largest > 0; i++) p->gram[i] /= largest;
}

/* Self-balancing walk over p->list: + with probability 1/2 - <w, x> / 2c. With `even` as many get
   one sign as the other. Returns how many got +. */
static size_t walk(pool *p, size_t n, double c, int even) {
    signed char *sign = p->sign;
    size_t plus = 0;
    for (size_t i = 0; i < n; i++) {
        double f = 0;
        for (size_t j = 0; j < i; j++) f += (double)sign[j] * p->gram[i * n + j];
        p->failures += !even && fabs(f) > c;
        sign[i] = draw(p) < 0.5 - f / (2 * c) ? 1 : -1;
        if (even && plus == n / 2) sign[i] = -1;
        if (even && i - plus == n - n / 2) sign[i] = 1;
        plus += sign[i] > 0;
    }
    return plus;
}

/* Those of p->list that have the sign go one level up with twice the weight, the rest is gone. */
static void keep_sign(pool *p, size_t n, int kept) {
    for (size_t i = 0; i < n; i++) {
        size_t x = p->list[i];
        if (p->sign[i] != kept) {
            p->level[x] = -1;
            continue;
        }
        p->level[x]++;
        p->s->numerator[x] *= 2;
        p->s->denominator[x] *= 2;
    }
    for (size_t i = p->s->held; i-- > 0;)
        if (p->level[i] < 0) pool_drop(p, i);
}

/* The token that leaves sinks and window, or s->held if there is none. */
static size_t leaving(const pool *p) {
    const slots *s = p->s;
    size_t i = 0;
    uint32_t at = p->seen - p->cfg.window;
    if (p->seen < p->cfg.window || at < p->cfg.sinks) return s->held;
    while (i < s->held && (p->group[i] != -1 || s->position[i] != at)) i++;
    return i;
}

/* ---- algorithm 1 ----------------------------------------------------------------------------- */

static void reduce_batch(pool *p, int group, int level) {
    size_t n = pool_gather(p, group, level), plus;
    make_gram(p, n, NULL, group != DENOMINATOR);
    plus = walk(p, n, 30 * log((double)p->cfg.tokens / 0.01), 0);
    keep_sign(p, n, 2 * plus <= n ? 1 : -1);
}

static void merge_and_reduce(pool *p, int group) {
    int *waiting = p->waiting[group], level = 0;
    if (++waiting[0] < (int)p->batch) return;
    do {
        reduce_batch(p, group, level);
        waiting[level] = 0;
    } while (++waiting[++level] == 2 && level + 1 < POOL_LEVELS);
}

static void algorithm1_append(pool *p, const float *k, const float *value) {
    size_t i, copy;
    const float *v;
    int octave;
    double length;
    pool_put(p, k, value, p->seen);
    i = leaving(p);
    if (i == p->s->held) return;
    v = pool_value(p, i);
    slots_key(p->s, i, p->key);
    length = sqrt(pool_dot(v, v, p->s->v_dim));
    frexp(length, &octave);
    octave = length > 0 ? octave + OCTAVES / 2 : 0;
    p->group[i] = octave < 0 ? 0 : octave < OCTAVES ? octave : OCTAVES - 1;
    copy = pool_put(p, p->key, v, p->s->position[i]);
    p->group[copy] = DENOMINATOR;
    p->s->denominator[i] = p->s->numerator[copy] = 0;
    octave = p->group[i];
    p->full |= p->s->held > p->cfg.budget; /* before anything is reduced */
    merge_and_reduce(p, octave);
    merge_and_reduce(p, DENOMINATOR);
}

pool *algorithm1_new(const bl_config *cfg, size_t kv_head) {
    pool *p = pool_new(cfg, kv_head, cfg->block);
    if (p) p->append = algorithm1_append;
    return p;
}

/* ---- the hybrid ------------------------------------------------------------------------------ */

size_t hybrid_part_slots(const bl_config *cfg) {
    size_t d = cfg->head_dim, dv = cfg->value_dim;
    size_t bytes = 4 * (2 * d + dv + d * dv + 1), slot = 2 * (d + dv);
    return (bytes + slot - 1) / slot;
}

static double distance(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t d = 0; d < n; d++) {
        double x = (double)a[d] - (double)b[d];
        sum += x * x;
    }
    return sum;
}

/* The part of the nearest centre, among the parts that have one. */
static size_t nearest(const pool *p, const float *key, double *how_far) {
    size_t best = 0;
    *how_far = HUGE_VAL;
    for (size_t i = 0; i < p->n_parts; i++) {
        double far = distance(key, p->parts[i].centre, p->s->dim);
        if (far < *how_far) {
            *how_far = far;
            best = i;
        }
    }
    return best;
}

/* Centres: the oldest key, then again and again the key farthest from those there are. */
static void choose_centres(pool *p, size_t n) {
    while (p->n_parts < p->wanted_parts) {
        double farthest = -1, far;
        size_t chosen = p->list[0];
        for (size_t i = 0; p->n_parts && i < n; i++) {
            slots_key(p->s, p->list[i], p->key);
            nearest(p, p->key, &far);
            if (far > farthest) {
                farthest = far;
                chosen = p->list[i];
            }
        }
        slots_key(p->s, chosen, p->parts[p->n_parts++].centre);
    }
}

static void assign(pool *p, size_t i) {
    size_t d = p->s->dim, dv = p->s->v_dim, which;
    const float *v = pool_value(p, i);
    double far;
    part *x;
    slots_key(p->s, i, p->key);
    which = nearest(p, p->key, &far);
    x = &p->parts[which];
    p->group[i] = (int)which;
    p->level[i] = 0;
    x->n += 1;
    for (size_t b = 0; b < dv; b++) x->v[b] += v[b];
    for (size_t a = 0; a < d; a++) {
        float y = p->key[a] - x->centre[a];
        x->k[a] += y;
        for (size_t b = 0; b < dv; b++) x->kv[a * dv + b] += y * v[b];
    }
}

/* Halves the largest group of the lowest level at which a group has a fair number of tokens. */
static void make_room(pool *p) {
    size_t count[POOL_PARTS][POOL_LEVELS], n, most = 0;
    int group = 0, level = 0;
    memset(count, 0, sizeof count);
    for (size_t i = 0; i < p->s->held; i++)
        if (p->group[i] >= 0 && p->group[i] < POOL_PARTS) count[p->group[i]][p->level[i]]++;
    for (int l = 0; l < POOL_LEVELS && most < FIRST; l++)
        for (int g = 0; g < (int)p->n_parts; g++)
            if (count[g][l] > most) {
                most = count[g][l];
                group = g;
                level = l;
            }
    n = pool_gather(p, group, level);
    make_gram(p, n, p->parts[group].centre, 1);
    walk(p, n, 0.125, 1);
    keep_sign(p, n, 1);
}

static void hybrid_append(pool *p, const float *k, const float *v) {
    size_t i, n;
    pool_put(p, k, v, p->seen);
    i = leaving(p);
    if (p->n_parts == p->wanted_parts) {
        if (i < p->s->held) assign(p, i);
    } else if (i < p->s->held) { /* wait for the first ones */
        p->group[i] = POOL_PARTS;
        n = pool_gather(p, POOL_PARTS, 0);
        if (n < FIRST) return;
        choose_centres(p, n);
        for (size_t x = 0; x < n; x++) assign(p, p->list[x]);
    }
    while (pool_held(p) >= p->cfg.budget) make_room(p);
}

pool *hybrid_new(const bl_config *cfg, size_t kv_head) {
    pool *p = pool_new(cfg, kv_head, BATCH);
    size_t d = cfg->head_dim, dv = cfg->value_dim, room = cfg->budget - cfg->sinks - cfg->window;
    if (!p) return NULL;
    p->append = hybrid_append;
    p->wanted_parts = room / 3 / hybrid_part_slots(cfg); /* a third of what is not exact */
    if (!p->wanted_parts) p->wanted_parts = 1;
    if (p->wanted_parts > POOL_PARTS) p->wanted_parts = POOL_PARTS;
    for (size_t i = 0; i < p->wanted_parts; i++) {
        part *x = &p->parts[i];
        x->centre = (float *)calloc(2 * d + dv + d * dv, sizeof *x->centre);
        if (!x->centre) {
            pool_free(p);
            return NULL;
        }
        x->k = x->centre + d;
        x->v = x->k + d;
        x->kv = x->v + dv;
    }
    return p;
}

void hybrid_residual(pool *p, const float *q, double max, const float *logit, float *weight) {
    double base[POOL_PARTS], shifted[POOL_PARTS];
    for (size_t g = 0; g < p->n_parts; g++) {
        base[g] = pool_dot(q, p->parts[g].centre, p->s->dim) * (double)p->cfg.scale;
        shifted[g] = exp(base[g] - max);
    }
    for (size_t i = 0; i < p->s->held; i++) {
        int g = p->group[i];
        if (g < 0 || g >= POOL_PARTS) continue;
        weight[i] -= (float)((1 + (double)logit[i] - base[g]) * shifted[g]);
    }
}

double hybrid_moments(pool *p, const float *q, double max, double *out) {
    size_t d = p->s->dim, dv = p->s->v_dim;
    double scale = (double)p->cfg.scale, total = 0;
    for (size_t g = 0; g < p->n_parts; g++) {
        const part *x = &p->parts[g];
        double e = exp(pool_dot(q, x->centre, d) * scale - max);
        total += e * ((double)x->n + scale * pool_dot(q, x->k, d));
        for (size_t b = 0; b < dv; b++) out[b] += e * (double)x->v[b];
        for (size_t a = 0; a < d; a++)
            for (size_t b = 0; b < dv; b++)
                out[b] += e * scale * (double)q[a] * (double)x->kv[a * dv + b];
    }
    return total;
}
