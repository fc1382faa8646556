/* oneshot.c - methods that compress a whole prompt once; see baselines.h. */
#include "baselines.h"
#include "oneshot.h"
#include "pool.h"
#include "slots.h"
#include "theory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a method may look at, and room for its scores. */
struct bl_prompt {
    const bl_method *method;
    const bl_config *asked; /* before the defaults were filled in */
    bl_config cfg;
    const exact_input *in;
    size_t kv_head, begin, end, group;
    float *score; /* [end], of one KV head */
    float *rows;  /* [n_q_heads][end]: attention received, by query head */
    slots *s;     /* all tokens of one KV head */
    float *p;     /* [group][capacity] */
};

static const float *key_at(const bl_prompt *t, size_t i) {
    return t->in->k + (i * t->in->n_kv_heads + t->kv_head) * t->in->head_dim;
}

static const float *value_at(const bl_prompt *t, size_t i) {
    return t->in->v + (i * t->in->n_kv_heads + t->kv_head) * t->in->value_dim;
}

static double dot(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t d = 0; d < n; d++) sum += (double)a[d] * (double)b[d];
    return sum;
}

/* A random number of 0..2^32-1, of a counter. */
static uint64_t draw(uint64_t seed, uint64_t head, uint64_t i) {
    uint64_t x = seed * 0x9E3779B97F4A7C15u + (head << 40) + i;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (x ^ (x >> 31)) >> 32;
}

/* Whether to take the next of n items if `wanted` of them are still to be found: a uniform sample
   (selection sampling, Knuth, algorithm 3.4.2S). */
static int sample_next(const bl_prompt *t, uint64_t number, size_t n, size_t wanted) {
    double u = (double)draw(t->cfg.seed, t->kv_head, number) / 4294967296.0;
    return u * (double)n < (double)wanted;
}

/* ---- keeping the largest scores -------------------------------------------------------------- */

typedef struct ranked {
    float score;
    uint32_t position;
} ranked;

/* Largest score first, among equals the newest: a total order. */
static int compare_ranked(const void *a, const void *b) {
    const ranked *x = (const ranked *)a, *y = (const ranked *)b;
    if (x->score < y->score || x->score > y->score) return x->score < y->score ? 1 : -1;
    return x->position < y->position ? 1 : -1;
}

static bl_token plain_token(size_t position) {
    bl_token x = {(uint32_t)position, 1, 1};
    return x;
}

/* The newest `window` tokens and, of the others, those of the largest scores. */
static size_t keep_best(const bl_prompt *t, size_t keep, size_t window, bl_token *out) {
    size_t n = t->end - t->begin, rest;
    ranked *list = (ranked *)malloc((n + 1) * sizeof *list);
    if (!list) return 0;
    if (keep > n) keep = n;
    if (window > keep) window = keep;
    rest = n - window;
    for (size_t i = 0; i < rest; i++) {
        list[i].score = t->score[t->begin + i];
        list[i].position = (uint32_t)(t->begin + i);
    }
    qsort(list, rest, sizeof *list, compare_ranked);
    for (size_t i = 0; i < keep - window; i++) out[i] = plain_token(list[i].position);
    for (size_t i = 0; i < window; i++) out[keep - window + i] = plain_token(t->end - window + i);
    free(list);
    return keep;
}

/* ---- from keys and values -------------------------------------------------------------------- */

/* StreamingLLM (arXiv 2309.17453): the whole budget to the window. */
size_t select_newest(const bl_prompt *t, size_t keep, bl_token *out) {
    return keep_best(t, keep, keep, out);
}

/* Knorm (arXiv 2406.11430): keys of a small norm. */
size_t select_knorm(const bl_prompt *t, size_t keep, bl_token *out) {
    for (size_t i = t->begin; i < t->end; i++)
        t->score[i] = -(float)sqrt(dot(key_at(t, i), key_at(t, i), t->in->head_dim));
    return keep_best(t, keep, t->cfg.window, out);
}

/* KeyDiff (arXiv 2504.15364): keys that point away from the mean of all unit keys. */
size_t select_keydiff(const bl_prompt *t, size_t keep, bl_token *out) {
    size_t n = t->in->head_dim;
    float *anchor = (float *)calloc(n, sizeof *anchor);
    if (!anchor) return 0;
    for (size_t i = 0; i < t->end; i++) {
        const float *k = key_at(t, i);
        double length = sqrt(dot(k, k, n));
        for (size_t d = 0; d < n && length > 0; d++)
            anchor[d] += (float)((double)k[d] / length / (double)t->end);
    }
    for (size_t i = t->begin; i < t->end; i++) {
        const float *k = key_at(t, i);
        double length = sqrt(dot(k, k, n));
        t->score[i] = (float)(-dot(anchor, k, n) / (length > 0 ? length : 1));
    }
    free(anchor);
    return keep_best(t, keep, t->cfg.window, out);
}

/* A uniform sample; every token stands for the same number. */
size_t select_uniform(const bl_prompt *t, size_t keep, bl_token *out) {
    size_t n = t->end - t->begin, found = 0;
    if (keep > n) keep = n;
    for (size_t i = 0; i < n; i++) {
        if (!sample_next(t, i, n - i, keep - found)) continue;
        out[found].position = (uint32_t)(t->begin + i);
        out[found].numerator = out[found].denominator = (float)((double)n / (double)keep);
        found++;
    }
    return found;
}

/* ---- the published BalanceKV ----------------------------------------------------------------- */

/* One self-balancing walk over a block (arXiv 2502.07861, SoftmaxBalance): sign_i is + with
   probability 1/2 - gamma sum_{j<i} sign_j K_ij, K_ij = e^(<k_i,k_j> scale temp) (<v_i,v_j> + c).
   As published gamma is not in units of the kernel; keys are centred, which changes K_ij by factors
   of i and of j only and keeps the exponents small. */
static void walk(const bl_prompt *t, const bl_token *block, size_t n, uint64_t number,
                 signed char *sign) {
    size_t dim = t->in->head_dim;
    double *mean = (double *)calloc(dim, sizeof *mean);
    float *k = (float *)calloc(n * dim, sizeof *k);
    double rate = (double)t->cfg.scale * (double)t->cfg.temp;
    for (size_t i = 0; mean && i < n; i++)
        for (size_t d = 0; d < dim; d++)
            mean[d] += (double)key_at(t, block[i].position)[d] / (double)n;
    for (size_t i = 0; mean && k && i < n; i++) {
        double sum = 0, p;
        for (size_t d = 0; d < dim; d++)
            k[i * dim + d] = (float)((double)key_at(t, block[i].position)[d] - mean[d]);
        for (size_t j = 0; j < i; j++) {
            double e = dot(k + i * dim, k + j * dim, dim) * rate;
            double v = dot(value_at(t, block[i].position), value_at(t, block[j].position),
                           t->in->value_dim);
            sum += (double)sign[j] * exp(e < 600 ? e : 600) * (v + 0.025);
        }
        p = (double)draw(t->cfg.seed, t->kv_head, number + i) / 4294967296.0;
        sign[i] = p < 0.5 - (double)t->cfg.gamma * sum ? 1 : -1;
    }
    free(mean);
    free(k);
}

/* Halvings of all blocks, again and again, until what remains and the newest tokens fill the
   budget. As published exactly half is kept: those of sign +, whose weight doubles; if they are too
   many, a sample of them; if too few, also a sample of sign -, whose weight stays. */
static size_t select_walk(const bl_prompt *t, size_t keep, bl_token *out, int both) {
    size_t n = t->end - t->begin, rounds = 0, exact, kept;
    bl_token *list = (bl_token *)malloc((n + 1) * sizeof *list);
    signed char *sign = (signed char *)calloc(n + 1, 1);
    if (!list || !sign || !keep) keep = 0;
    while (keep && n > keep << rounds) rounds++;
    /* The largest number for which exact + (n - exact) / 2^rounds <= keep. */
    exact = rounds ? ((keep << rounds) - n) / (((size_t)1 << rounds) - 1) : n;
    kept = n - exact;
    for (size_t i = 0; keep && i < n; i++) list[i] = plain_token(t->begin + i);
    for (size_t round = 0; keep && round < rounds; round++) {
        size_t half = kept / 2, plus = 0, to = 0, left[2], wanted[2]; /* of sign -, of sign + */
        for (size_t i = 0; i < kept; i += t->cfg.block)
            walk(t, list + i, kept - i < t->cfg.block ? kept - i : t->cfg.block,
                 (2 * round + 1) << 32 | i, sign + i);
        for (size_t i = 0; i < kept; i++) plus += sign[i] > 0;
        left[1] = plus;
        left[0] = kept - plus;
        wanted[1] = plus < half ? plus : half;
        wanted[0] = half - wanted[1];
        for (size_t i = 0; i < kept; i++) {
            int x = sign[i] > 0;
            int take = sample_next(t, (2 * round + 2) << 32 | i, left[x]--, wanted[x]);
            if (!take) continue;
            wanted[x]--;
            list[to] = list[i];
            list[to].numerator *= x ? 2 : 1;
            list[to++].denominator *= 2;
        }
        kept = to;
    }
    for (size_t i = 0; keep && i < kept; i++) {
        out[i] = list[i];
        if (both) out[i].denominator = out[i].numerator;
    }
    for (size_t i = 0; keep && i < exact; i++) out[kept + i] = plain_token(t->end - exact + i);
    free(list);
    free(sign);
    return keep ? kept + exact : 0;
}

/* Weights in the numerator only; the denominator takes 2^rounds for each token. */
size_t select_published(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_walk(t, keep, out, 0);
}

size_t select_published_both(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_walk(t, keep, out, 1);
}

/* The prompt through a cache of pages, whose sinks are the tokens before `begin`. */
size_t select_pages(const bl_prompt *t, size_t keep, bl_token *out) {
    bl_config cfg = *t->asked;
    size_t found = 0;
    pool *p;
    cfg.budget = (uint32_t)(keep + t->begin);
    cfg.sinks = t->begin ? (uint32_t)t->begin : BL_NONE;
    if (bl_resolve(t->method, &cfg) > keep + t->begin) return 0;
    p = t->method->make(&cfg, t->kv_head);
    for (size_t i = 0; p && i < t->end; i++) pool_append(p, key_at(t, i), value_at(t, i));
    for (size_t i = 0; p && i < p->s->held; i++) {
        if (p->s->position[i] < t->begin) continue;
        out[found].position = p->s->position[i];
        out[found].numerator = p->s->numerator[i];
        out[found++].denominator = p->s->denominator[i];
    }
    pool_free(p);
    return found;
}

/* ---- from attention rows --------------------------------------------------------------------- */

/* rows[h][i] = attention that token i receives from query head h at positions from..to-1, for the
   heads of one KV head. */
static void add_rows(const bl_prompt *t, size_t kv_head, size_t from, size_t to) {
    const exact_input *in = t->in;
    bl_prompt other = *t;
    slots *s = t->s;
    float sum[16], max[16];
    other.kv_head = kv_head;
    for (size_t i = 0; i < to; i++) slots_put(s, i, key_at(&other, i), value_at(&other, i), 0);
    memset(t->rows + kv_head * t->group * t->end, 0, t->group * t->end * sizeof *t->rows);
    for (size_t at = from; at < to; at++) {
        const float *q = in->q + (at * in->n_q_heads + kv_head * t->group) * in->head_dim;
        s->held = at + 1;
        slots_logits(s, q, t->group, t->cfg.scale, t->p);
        slots_exp(s, t->group, t->p, max);
        slots_output(s, t->p, t->group, sum, NULL);
        for (size_t r = 0; r < t->group; r++) {
            float *row = t->rows + (kv_head * t->group + r) * t->end;
            for (size_t i = 0; i <= at && i < t->end; i++)
                row[i] += t->p[r * s->capacity + i] / sum[r];
        }
    }
}

/* Sum over the group. */
static void score_rows(const bl_prompt *t) {
    memset(t->score, 0, t->end * sizeof *t->score);
    for (size_t r = 0; r < t->group; r++)
        for (size_t i = 0; i < t->end; i++)
            t->score[i] += t->rows[(t->kv_head * t->group + r) * t->end + i];
}

/* H2O (arXiv 2306.14048) on a prompt: half recent, half the largest attention of all queries. */
size_t select_h2o(const bl_prompt *t, size_t keep, bl_token *out) {
    add_rows(t, t->kv_head, 0, t->end);
    score_rows(t);
    return keep_best(t, keep, t->cfg.window ? t->cfg.window : keep / 2, out);
}

/* TOVA (arXiv 2401.06104) on a prompt: the attention of its last query, over all heads. */
size_t select_tova(const bl_prompt *t, size_t keep, bl_token *out) {
    memset(t->score, 0, t->end * sizeof *t->score);
    for (size_t h = 0; h < t->in->n_kv_heads; h++) {
        add_rows(t, h, t->end - 1, t->end);
        for (size_t r = h * t->group; r < (h + 1) * t->group; r++)
            for (size_t i = 0; i < t->end; i++) t->score[i] += t->rows[r * t->end + i];
    }
    return keep_best(t, keep, t->cfg.window, out);
}

/* SnapKV (arXiv 2404.14469): the attention of the last queries of the prompt, averaged over
   neighbouring tokens so that they stay together. The tokens of those queries stay too. */
static void score_snapkv(const bl_prompt *t, size_t from, size_t to) {
    size_t width = t->cfg.pool;
    float *sums = t->rows + t->kv_head * t->group * t->end;
    add_rows(t, t->kv_head, from, to);
    score_rows(t);
    memcpy(sums, t->score, t->end * sizeof *sums);
    for (size_t i = 0; i < t->end; i++) {
        size_t start = i < width / 2 ? 0 : i - width / 2, stop = i + (width + 1) / 2;
        t->score[i] = 0;
        for (size_t j = start; j < stop && j < t->end; j++) t->score[i] += sums[j] / (float)width;
    }
}

static size_t observed_window(const bl_prompt *t) {
    return t->cfg.window > t->cfg.queries ? t->cfg.window : t->cfg.queries;
}

size_t select_snapkv(const bl_prompt *t, size_t keep, bl_token *out) {
    score_snapkv(t, t->end - t->cfg.queries, t->end);
    return keep_best(t, keep, observed_window(t), out);
}

/* The same score from queries behind the prompt, which no runtime has when it compresses. */
size_t select_snapkv_ahead(const bl_prompt *t, size_t keep, bl_token *out) {
    score_snapkv(t, t->end, t->end + t->cfg.queries);
    return keep_best(t, keep, t->cfg.window, out);
}

/* PyramidKV (arXiv 2406.02069): SnapKV with the budget of its layer, see bl_keep(). */
size_t select_pyramidkv(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_snapkv(t, keep, out);
}

/* KVCrush (arXiv 2503.00022): part of the budget goes to the tokens of the largest scores (here
   SnapKV's), the rest to representatives of the others. A token's signature has a bit for each head
   that would keep it. The others are ordered by the Hamming distance of their signatures to one
   anchor, cut into as many buckets as there is room for; the middle one of each bucket stays. */
typedef enum anchor { ANCHOR_RANDOM, ANCHOR_MEAN, ANCHOR_ALTERNATE } anchor;

static void make_signatures(const bl_prompt *t, size_t keep, unsigned char *bits) {
    size_t n = t->end - t->begin;
    ranked *list = (ranked *)malloc((n + 1) * sizeof *list);
    for (size_t h = 0; list && h < t->in->n_q_heads; h++) {
        if (h % t->group == 0) add_rows(t, h / t->group, t->end - t->cfg.queries, t->end);
        for (size_t i = 0; i < n; i++) {
            list[i].score = t->rows[h * t->end + t->begin + i];
            list[i].position = (uint32_t)i;
        }
        qsort(list, n, sizeof *list, compare_ranked);
        for (size_t i = 0; i < keep && i < n; i++)
            bits[list[i].position * t->in->n_q_heads + h] = 1;
    }
    free(list);
}

static size_t select_kvcrush(const bl_prompt *t, size_t keep, bl_token *out, anchor kind) {
    size_t n = t->end - t->begin, heads = t->in->n_q_heads, rest = 0, extra;
    size_t kept = keep < n ? keep - (size_t)((double)t->cfg.share * (double)keep) : n;
    unsigned char *bits = (unsigned char *)calloc(n * heads + 1, 1);
    unsigned char *taken = (unsigned char *)calloc(n + 1, 1);
    ranked *list = (ranked *)malloc((n + 1) * sizeof *list);
    extra = keep < n ? keep - kept : 0;
    if (bits && taken && list) {
        make_signatures(t, keep, bits);
        score_snapkv(t, t->end - t->cfg.queries, t->end);
        kept = keep_best(t, kept, observed_window(t), out);
        for (size_t i = 0; i < kept; i++) taken[out[i].position - t->begin] = 1;
        for (size_t i = 0; i < n; i++) {
            if (taken[i]) continue;
            list[rest].score = 0;
            list[rest++].position = (uint32_t)(t->begin + i);
        }
        for (size_t h = 0; h < heads; h++) {
            size_t ones = 0, bit;
            for (size_t i = 0; i < rest; i++)
                ones += bits[(list[i].position - t->begin) * heads + h];
            bit = h % 2;
            if (kind == ANCHOR_RANDOM) bit = draw(t->cfg.seed, t->kv_head, h) % 2;
            if (kind == ANCHOR_MEAN) bit = 2 * ones > rest;
            for (size_t i = 0; i < rest; i++)
                list[i].score -= bits[(list[i].position - t->begin) * heads + h] != bit;
        }
        qsort(list, rest, sizeof *list, compare_ranked);
        for (size_t i = 0; i < extra; i++)
            out[kept++] = plain_token(list[(2 * i + 1) * rest / (2 * extra)].position);
    } else {
        kept = 0;
    }
    free(bits);
    free(taken);
    free(list);
    return kept;
}

size_t select_kvcrush_random(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_kvcrush(t, keep, out, ANCHOR_RANDOM);
}
size_t select_kvcrush_mean(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_kvcrush(t, keep, out, ANCHOR_MEAN);
}
size_t select_kvcrush_alternate(const bl_prompt *t, size_t keep, bl_token *out) {
    return select_kvcrush(t, keep, out, ANCHOR_ALTERNATE);
}

/* Expected Attention (arXiv 2510.00636), see baselines.c; the latest queries of the prompt. */
size_t select_expected(const bl_prompt *t, size_t keep, bl_token *out) {
    size_t n = t->in->head_dim, first = t->end > QUERY_MEMORY ? t->end - QUERY_MEMORY : 0;
    double *mean = (double *)calloc(n, sizeof *mean), *y = (double *)calloc(n, sizeof *y);
    double *moment = (double *)calloc(n * n, sizeof *moment);
    double scale = (double)t->cfg.scale;
    memset(t->score, 0, t->end * sizeof *t->score);
    for (size_t r = 0; mean && y && moment && r < t->group; r++) {
        double top = -HUGE_VAL, total = 0;
        memset(mean, 0, n * sizeof *mean);
        memset(moment, 0, n * n * sizeof *moment);
        for (size_t at = first; at < t->end; at++) {
            const float *q = t->in->q + (at * t->in->n_q_heads + t->kv_head * t->group + r) * n;
            for (size_t a = 0; a < n; a++) {
                mean[a] += (double)q[a] / (double)(t->end - first);
                for (size_t b = 0; b < n; b++)
                    moment[a * n + b] += (double)q[a] * (double)q[b] / (double)(t->end - first);
            }
        }
        for (size_t i = t->begin; i < t->end; i++) {
            const float *k = key_at(t, i);
            double linear = 0, square = 0;
            memset(y, 0, n * sizeof *y);
            for (size_t a = 0; a < n; a++)
                for (size_t b = 0; b < n; b++) y[b] += moment[a * n + b] * (double)k[a];
            for (size_t a = 0; a < n; a++) {
                linear += mean[a] * (double)k[a] * scale;
                square += y[a] * (double)k[a] * scale * scale;
            }
            t->p[i] = (float)(linear + (square - linear * linear) / 2);
            if ((double)t->p[i] > top) top = (double)t->p[i];
        }
        for (size_t i = t->begin; i < t->end; i++) total += exp((double)t->p[i] - top);
        for (size_t i = t->begin; i < t->end; i++)
            t->score[i] += (float)(exp((double)t->p[i] - top) / total / (double)t->group);
    }
    for (size_t i = t->begin; i < t->end; i++)
        t->score[i] = (t->score[i] + 1e-2f / (float)(t->end - t->begin)) *
                      (float)sqrt(dot(value_at(t, i), value_at(t, i), t->in->value_dim));
    free(mean);
    free(y);
    free(moment);
    return keep_best(t, keep, t->cfg.window, out);
}

/* PyramidKV: of a mean budget per layer the last one gets 1/20, the first what makes the mean
   right, and those between follow a line. */
size_t bl_keep(const bl_method *m, const bl_config *cfg, size_t keep) {
    bl_config filled = *cfg;
    double last = (double)keep / 20, first = 2 * (double)keep - last;
    if (m->select != select_pyramidkv) return keep;
    bl_resolve(m, &filled);
    if (filled.layers < 2) return keep;
    return (size_t)(first - (first - last) * (double)filled.layer / (double)(filled.layers - 1));
}

size_t bl_select(const bl_method *m, const bl_config *cfg, const exact_input *prompt,
                 size_t kv_head, size_t begin, size_t end, size_t keep, bl_token *out) {
    bl_prompt t;
    size_t found = 0;
    memset(&t, 0, sizeof t);
    t.method = m;
    t.asked = cfg;
    t.cfg = *cfg;
    bl_resolve(m, &t.cfg);
    t.cfg.window = cfg->window == BL_NONE ? 0 : cfg->window;
    t.in = prompt;
    t.kv_head = kv_head;
    t.begin = begin;
    t.end = end;
    t.group = prompt->n_q_heads / prompt->n_kv_heads;
    t.s = slots_new(prompt->head_dim, prompt->value_dim, end + t.cfg.queries);
    t.score = (float *)calloc(end, sizeof *t.score);
    t.rows = (float *)calloc(prompt->n_q_heads * end, sizeof *t.rows);
    t.p = t.s ? (float *)calloc(t.group * t.s->capacity, sizeof *t.p) : NULL;
    if (t.s && t.score && t.rows && t.p) found = m->select(&t, keep, out);
    slots_free(t.s);
    free(t.score);
    free(t.rows);
    free(t.p);
    return found;
}
