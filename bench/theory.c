/* theory.c - the two streaming systems that come with proofs, so that what replaces them in
   balancekv.h is measured and not asserted.

   algorithm1: BalanceKV as its paper states it (arXiv 2502.07861, algorithm 1). Values are divided
   into octaves of their norm, each with an own MergeAndReduce instance for the numerator; one more
   instance, in which all values are 1, is for the denominator. An instance collects t tokens, keeps
   those of one sign of a self-balancing walk (the fewer), which go to the next level with doubled
   weights, where two such batches are reduced again. The walk takes + with probability
   1/2 - <w, x> / 2c, c = 30 ln(n / delta), for vectors x = e^(<k, .>/sqrt d) v of norm 1 at most, and
   fails where |<w, x>| > c. The paper's bound r on the keys is not known to a stream, so a batch is
   divided by its largest norm. Octaves whose values are too small to matter are dropped in the
   paper; with r of real keys that never happens.

   hybrid: after arXiv 2606.07205, which joins discrepancy, the polynomial method and a partition of
   space. Keys are assigned to the nearest of a few centres c (farthest points of the first 64). In
   each part e^<q,k> = e^<q,c> (1 + x + R(x)), x = <q, k - c>: the sums of 1 and x are kept exactly by
   moments of degree 0 and 1 of (1, v); the residual R(x) = e^x - 1 - x, a kernel as its Taylor
   coefficients are positive, is estimated from a coreset halved by the walk on that kernel. */
#include "theory.h"
#include "slots.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST = 64, BATCH = 128, OCTAVES = 64, LEVELS = 32, MAX_PARTS = 32 };
enum { EXACT = -1, DENOMINATOR = OCTAVES }; /* groups of tokens; else an octave, or a part */

/* Moments of a part, in float. */
typedef struct part {
    float *centre, *k, *v, *kv; /* c [d], sums of k - c [d], v [dv], (k - c) v^T [d][dv] */
    float n;
} part;

/* Tokens of one KV head in no order; each is in a group and has gone through `level` halvings. */
struct pool {
    bl_config cfg;
    int hybrid, full; /* full: more than the budget was needed */
    size_t query_heads, batch, n_parts, wanted_parts, failures;
    slots *s;
    int *group, *level;  /* [capacity] */
    float *p;            /* [query heads][capacity]: scratch, as the next ones */
    uint32_t *list;      /* [capacity] */
    double *gram;        /* [batch][batch] */
    float *key, *other;  /* [d] */
    part parts[MAX_PARTS];
    int waiting[OCTAVES + 1][LEVELS]; /* algorithm1: tokens at level 0, batches above */
    uint32_t seen;
    uint64_t draws;
};

static double dot(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t d = 0; d < n; d++) sum += (double)a[d] * (double)b[d];
    return sum;
}

static double draw(pool *p) {
    uint64_t x = ++p->draws * 0x9E3779B97F4A7C15u + p->cfg.seed;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) / 9007199254740992.0;
}

/* ---- the pool --------------------------------------------------------------------------------- */

static pool *pool_new(const bl_config *cfg, size_t kv_head, size_t batch) {
    pool *p = (pool *)calloc(1, sizeof *p);
    size_t n;
    if (!p) return NULL;
    p->cfg = *cfg;
    p->cfg.seed += (uint64_t)kv_head << 32;
    p->query_heads = cfg->n_q_heads / cfg->n_kv_heads;
    p->batch = batch;
    p->s = slots_new(cfg->head_dim, cfg->value_dim, cfg->budget + 2);
    n = p->s ? p->s->capacity : 0;
    p->group = (int *)calloc(n, sizeof *p->group);
    p->level = (int *)calloc(n, sizeof *p->level);
    p->p = (float *)calloc(n * p->query_heads, sizeof *p->p);
    p->list = (uint32_t *)calloc(n, sizeof *p->list);
    p->gram = (double *)calloc(batch * batch, sizeof *p->gram);
    p->key = (float *)calloc(2 * cfg->head_dim, sizeof *p->key);
    p->other = p->key + cfg->head_dim;
    if (p->s && p->group && p->level && p->p && p->list && p->gram && p->key) return p;
    pool_free(p);
    return NULL;
}

void pool_free(pool *p) {
    if (!p) return;
    for (size_t i = 0; i < MAX_PARTS; i++) free(p->parts[i].centre);
    slots_free(p->s);
    free(p->group);
    free(p->level);
    free(p->p);
    free(p->list);
    free(p->gram);
    free(p->key);
    free(p);
}

static size_t put(pool *p, const float *k, const float *v, uint32_t position) {
    size_t i = p->s->held++;
    slots_put(p->s, i, k, v, position);
    p->group[i] = EXACT;
    p->level[i] = 0;
    return i;
}

static void drop(pool *p, size_t i) {
    size_t last = --p->s->held;
    slots_move(p->s, i, last);
    p->group[i] = p->group[last];
    p->level[i] = p->level[last];
}

/* The oldest tokens of a group and level, at most `most`, in order, to p->list. */
static size_t gather(pool *p, int group, int level, size_t most) {
    size_t n = 0;
    for (size_t i = 0; i < p->s->held; i++) {
        size_t at = n;
        if (p->group[i] != group || p->level[i] != level) continue;
        for (; at && p->s->position[p->list[at - 1]] > p->s->position[i]; at--)
            p->list[at] = p->list[at - 1];
        p->list[at] = (uint32_t)i;
        n++;
    }
    return n < most ? n : most;
}

/* Kernel of the tokens of p->list, largest diagonal entry 1. */
static void make_gram(pool *p, size_t n, const float *centre, int values) {
    size_t d = p->s->dim;
    double largest = 0, scale = (double)p->cfg.scale, top = -HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        slots_key(p->s, p->list[i], p->key);
        for (size_t a = 0; centre && a < d; a++) p->key[a] -= centre[a];
        for (size_t j = 0; j <= i; j++) {
            slots_key(p->s, p->list[j], p->other);
            for (size_t a = 0; centre && a < d; a++) p->other[a] -= centre[a];
            p->gram[i * n + j] = dot(p->key, p->other, d) * scale;
        }
        if (p->gram[i * n + i] > top) top = p->gram[i * n + i];
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            const float *a = p->s->v + p->list[i] * p->s->v_stride;
            const float *b = p->s->v + p->list[j] * p->s->v_stride;
            double x = p->gram[i * n + j], e = exp(x - top);
            if (centre) e -= (1 + x) * exp(-top);
            if (values) e *= dot(a, b, p->s->v_dim) + (centre ? 0.025 : 0);
            p->gram[i * n + j] = e;
            if (i == j && e > largest) largest = e;
        }
    for (size_t i = 0; i < n * n && largest > 0; i++) p->gram[i] /= largest;
}

/* Self-balancing walk over p->list: + with probability 1/2 - <w, x> / 2c. With `even` as many get
   one sign as the other. Returns how many got +. */
static size_t walk(pool *p, size_t n, double c, int even, signed char *sign) {
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
static void keep_sign(pool *p, size_t n, const signed char *sign, int kept) {
    for (size_t i = 0; i < n; i++) {
        size_t x = p->list[i];
        if (sign[i] != kept) {
            p->level[x] = -1;
            continue;
        }
        p->level[x]++;
        p->s->numerator[x] *= 2;
        p->s->denominator[x] *= 2;
    }
    for (size_t i = p->s->held; i-- > 0;)
        if (p->level[i] < 0) drop(p, i);
}

/* The token that leaves sinks and window, or s->held if there is none. */
static size_t leaving(const pool *p) {
    const slots *s = p->s;
    size_t i = 0;
    uint32_t at = p->seen - p->cfg.window;
    if (p->seen < p->cfg.window || at < p->cfg.sinks) return s->held;
    while (i < s->held && (p->group[i] != EXACT || s->position[i] != at)) i++;
    return i;
}

/* ---- algorithm 1 ------------------------------------------------------------------------------ */

pool *algorithm1_new(const bl_config *cfg, size_t kv_head) {
    return pool_new(cfg, kv_head, cfg->block);
}

static void reduce_batch(pool *p, int group, int level) {
    signed char *sign = (signed char *)p->p;
    size_t n = gather(p, group, level, p->batch), plus;
    make_gram(p, n, NULL, group != DENOMINATOR);
    plus = walk(p, n, 30 * log((double)p->cfg.tokens / 0.01), 0, sign);
    keep_sign(p, n, sign, 2 * plus <= n ? 1 : -1);
}

static void merge_and_reduce(pool *p, int group) {
    int *waiting = p->waiting[group], level = 0;
    if (++waiting[0] < (int)p->batch) return;
    do {
        reduce_batch(p, group, level);
        waiting[level] = 0;
    } while (++waiting[++level] == 2 && level + 1 < LEVELS);
}

static void algorithm1_append(pool *p) {
    size_t i = leaving(p), copy;
    const float *v = p->s->v + i * p->s->v_stride;
    int octave;
    double length;
    if (i == p->s->held) return;
    slots_key(p->s, i, p->key);
    length = sqrt(dot(v, v, p->s->v_dim));
    frexp(length, &octave);
    octave = length > 0 ? octave + OCTAVES / 2 : 0;
    p->group[i] = octave < 0 ? 0 : octave < OCTAVES ? octave : OCTAVES - 1;
    copy = put(p, p->key, v, p->s->position[i]);
    p->group[copy] = DENOMINATOR;
    p->s->denominator[i] = p->s->numerator[copy] = 0;
    octave = p->group[i];
    p->full |= p->s->held > p->cfg.budget;
    merge_and_reduce(p, octave);
    merge_and_reduce(p, DENOMINATOR);
}

/* ---- the hybrid ------------------------------------------------------------------------------- */

size_t hybrid_part_slots(const bl_config *cfg) {
    size_t d = cfg->head_dim, dv = cfg->value_dim;
    size_t bytes = 4 * (2 * d + dv + d * dv + 1), slot = 2 * (d + dv);
    return (bytes + slot - 1) / slot;
}

pool *hybrid_new(const bl_config *cfg, size_t kv_head) {
    pool *p = pool_new(cfg, kv_head, BATCH);
    size_t d = cfg->head_dim, dv = cfg->value_dim, room = cfg->budget - cfg->sinks - cfg->window;
    if (!p) return NULL;
    p->hybrid = 1;
    p->wanted_parts = room / 3 / hybrid_part_slots(cfg); /* a third of what is not exact */
    if (!p->wanted_parts) p->wanted_parts = 1;
    if (p->wanted_parts > MAX_PARTS) p->wanted_parts = MAX_PARTS;
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
    const float *v = p->s->v + i * p->s->v_stride;
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
    signed char *sign = (signed char *)p->p;
    size_t count[MAX_PARTS][LEVELS], n, most = 0;
    int group = 0, level = 0;
    memset(count, 0, sizeof count);
    for (size_t i = 0; i < p->s->held; i++)
        if (p->group[i] >= 0 && p->group[i] < MAX_PARTS) count[p->group[i]][p->level[i]]++;
    for (int l = 0; l < LEVELS && most < FIRST; l++)
        for (int g = 0; g < (int)p->n_parts; g++)
            if (count[g][l] > most) {
                most = count[g][l];
                group = g;
                level = l;
            }
    n = gather(p, group, level, BATCH);
    make_gram(p, n, p->parts[group].centre, 1);
    walk(p, n, 0.125, 1, sign);
    keep_sign(p, n, sign, 1);
}

static void hybrid_append(pool *p) {
    size_t i = leaving(p), n;
    if (p->n_parts == p->wanted_parts) {
        if (i < p->s->held) assign(p, i);
    } else if (i < p->s->held) { /* wait for the first ones */
        p->group[i] = MAX_PARTS;
        n = gather(p, MAX_PARTS, 0, FIRST);
        if (n < FIRST) return;
        choose_centres(p, n);
        for (size_t x = 0; x < n; x++) assign(p, p->list[x]);
    }
    while (pool_held(p) >= p->cfg.budget) make_room(p);
}

/* Adds moments to the sums of one query, and turns the weights of tokens of parts into those of the
   residual: p holds e^(logit - max). */
static double attend_parts(pool *p, const float *q, double max, float *weight, double *out) {
    size_t d = p->s->dim, dv = p->s->v_dim;
    double scale = (double)p->cfg.scale, total = 0, base[MAX_PARTS];
    for (size_t g = 0; g < p->n_parts; g++) {
        const part *x = &p->parts[g];
        double e;
        base[g] = dot(q, x->centre, d) * scale;
        e = exp(base[g] - max);
        total += e * ((double)x->n + scale * dot(q, x->k, d));
        for (size_t b = 0; b < dv; b++) out[b] += e * (double)x->v[b];
        for (size_t a = 0; a < d; a++)
            for (size_t b = 0; b < dv; b++)
                out[b] += e * scale * (double)q[a] * (double)x->kv[a * dv + b];
    }
    for (size_t i = 0; i < p->s->held; i++) {
        int g = p->group[i];
        if (g < 0 || g >= MAX_PARTS) continue;
        slots_key(p->s, i, p->key);
        weight[i] -= (float)((1 + dot(q, p->key, d) * scale - base[g]) * exp(base[g] - max));
    }
    return total;
}

/* ---- both ------------------------------------------------------------------------------------- */

void pool_append(pool *p, const float *k, const float *v) {
    if (p->full) return;
    put(p, k, v, p->seen);
    if (p->hybrid) hybrid_append(p);
    else algorithm1_append(p);
    p->full |= pool_held(p) > p->cfg.budget;
    p->seen++;
}

void pool_attend(pool *p, const float *q, float *out) {
    size_t d = p->s->dim, dv = p->s->v_dim;
    float max[16], sum[16];
    double moments[512];
    slots_logits(p->s, q, p->query_heads, p->cfg.scale, p->p);
    slots_exp(p->s, p->query_heads, p->p, max);
    for (size_t r = 0; r < p->query_heads; r++, q += d, out += dv) {
        double total = 0;
        float *weight = p->p + r * p->s->capacity;
        memset(moments, 0, sizeof moments);
        if (p->hybrid) total = attend_parts(p, q, (double)max[r], weight, moments);
        slots_output(p->s, weight, 1, sum, out);
        total += (double)sum[0];
        p->failures += total <= 0; /* a residual that was badly estimated; 0 is the answer then */
        for (size_t b = 0; b < dv; b++)
            out[b] = total > 0 ? (float)(((double)out[b] + moments[b]) / total) : 0;
    }
}

size_t pool_held(const pool *p) {
    return p->s->held + (p->hybrid ? p->wanted_parts * hybrid_part_slots(&p->cfg) : 0);
}

size_t pool_failures(const pool *p) { return p->failures; }
