/* baselines.c - streaming caches that evict the token of the lowest score; see baselines.h. */
#include "baselines.h"
#include "oneshot.h"
#include "slots.h"
#include "theory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct bl_cache {
    const bl_method *method;
    bl_config cfg;
    size_t group;
    uint32_t seen;
    slots **heads;
    pool **pools;    /* [n_kv_heads], or NULL and the rest is used */
    float *word;     /* [n_kv_heads][capacity]: what the method keeps of each slot */
    double *anchor;  /* [n_kv_heads][head_dim]: sum of the unit keys in the cache (keydiff) */
    float *mean;     /* [n_q_heads][head_dim] of the queries (expected) */
    float *moment;   /* [n_q_heads][head_dim][head_dim]: mean of q q^T */
    float *p, *work; /* scratch: [group][capacity], [capacity] */
};

static float *words_of(const bl_cache *c, size_t head) {
    return c->word + head * c->heads[head]->capacity;
}

static float norm(const float *x, size_t n) {
    double sum = 0;
    for (size_t d = 0; d < n; d++) sum += (double)x[d] * (double)x[d];
    return (float)sqrt(sum);
}

/* ---- scores: the lowest goes ----------------------------------------------------------------- */

/* StreamingLLM (arXiv 2309.17453): sinks and the newest tokens. Positions stay as they are. */
static void score_window(const bl_cache *c, size_t head, float *score) {
    const slots *s = c->heads[head];
    for (size_t i = 0; i < s->held; i++) score[i] = (float)(s->position[i] - c->seen);
}

/* "A Simple and Effective L2 Norm-Based Strategy" (arXiv 2406.11430): keys of a small norm stay.
   The word is the norm. */
static void score_knorm(const bl_cache *c, size_t head, float *score) {
    const float *word = words_of(c, head);
    for (size_t i = 0; i < c->heads[head]->held; i++) score[i] = -word[i];
}

/* KeyDiff (arXiv 2504.15364): keys stay that point away from the mean of the unit keys in the
   cache. The word is the norm. */
static void score_keydiff(const bl_cache *c, size_t head, float *score) {
    const slots *s = c->heads[head];
    const float *word = words_of(c, head);
    for (size_t d = 0; d < s->dim; d++)
        c->work[d] = (float)(c->anchor[head * s->dim + d] / (double)s->held);
    slots_logits(s, c->work, 1, -1, score); /* |anchor| does not change the order */
    for (size_t i = 0; i < s->held; i++) score[i] /= word[i] > 0 ? word[i] : 1;
}

/* H2O (arXiv 2306.14048): half of the budget is recent, the other half the tokens of the largest
   accumulated attention; the heads of a group add theirs. TOVA (arXiv 2401.06104): the token goes
   that the newest query attended to least, averaged over all heads of the layer. */
static void score_word(const bl_cache *c, size_t head, float *score) {
    memcpy(score, words_of(c, head), c->heads[head]->held * sizeof *score);
}

static void observe_sum(bl_cache *c, size_t head, const float *q, const float *p,
                        const float *sum) {
    const slots *s = c->heads[head];
    float *word = words_of(c, head);
    (void)q;
    for (size_t r = 0; r < c->group; r++)
        for (size_t i = 0; i < s->held; i++) word[i] += p[r * s->capacity + i] / sum[r];
}

/* All heads hold the same tokens in the same slots, as they all see the same average. */
static void observe_last(bl_cache *c, size_t head, const float *q, const float *p,
                         const float *sum) {
    const slots *s = c->heads[head];
    float *word = words_of(c, 0);
    if (head == 0) memset(word, 0, s->held * sizeof *word);
    observe_sum(c, 0, q, p, sum);
    if (head + 1 < c->cfg.n_kv_heads) return;
    for (size_t h = 1; h <= head; h++) memcpy(words_of(c, h), word, s->held * sizeof *word);
}

/* Expected Attention (arXiv 2510.00636): future queries are taken for a Gaussian, so that a key's
   expected weight is exp(<mean, k> scale + k^T cov k scale^2 / 2); times |v|. The paper has the
   queries of before RoPE and turns them to the positions to come; here mean and covariance are
   those of the latest queries as they are (64, 256 or 512 of them do no better than 128; those of
   the whole prompt point everywhere, and are useless). Weights are normalised for each query head
   and averaged over the group; the paper's small constant keeps tiny weights apart. */
static void score_expected(const bl_cache *c, size_t head, float *score) {
    const slots *s = c->heads[head];
    size_t n = s->dim;
    float *k = c->work, *y = c->work + n;
    memset(score, 0, s->held * sizeof *score);
    for (size_t h = head * c->group; h < (head + 1) * c->group; h++) {
        const float *mean = c->mean + h * n, *moment = c->moment + h * n * n;
        double top = -HUGE_VAL, total = 0;
        for (size_t i = 0; i < s->held; i++) {
            double square = 0, dot = 0;
            slots_key(s, i, k);
            memset(y, 0, n * sizeof *y);
            for (size_t a = 0; a < n; a++)
                for (size_t b = 0; b < n; b++) y[b] += moment[a * n + b] * k[a];
            for (size_t a = 0; a < n; a++) {
                square += (double)y[a] * (double)k[a];
                dot += (double)mean[a] * (double)k[a];
            }
            dot *= (double)c->cfg.scale;
            square = square * (double)c->cfg.scale * (double)c->cfg.scale - dot * dot;
            c->p[i] = (float)(dot + square / 2);
            if ((double)c->p[i] > top) top = (double)c->p[i];
        }
        for (size_t i = 0; i < s->held; i++) total += exp((double)c->p[i] - top);
        for (size_t i = 0; i < s->held; i++)
            score[i] += (float)(exp((double)c->p[i] - top) / total / (double)c->group);
    }
    for (size_t i = 0; i < s->held; i++)
        score[i] = (score[i] + 1e-2f / (float)s->held) * words_of(c, head)[i];
}

static void observe_query(bl_cache *c, size_t head, const float *q, const float *p,
                          const float *sum) {
    size_t n = c->cfg.head_dim;
    float rate = 1.0f / (float)(c->seen < QUERY_MEMORY ? c->seen : QUERY_MEMORY);
    (void)p, (void)sum;
    for (size_t r = 0; r < c->group; r++, q += n) {
        float *mean = c->mean + (head * c->group + r) * n;
        float *moment = c->moment + (head * c->group + r) * n * n;
        for (size_t a = 0; a < n; a++) {
            mean[a] += (q[a] - mean[a]) * rate;
            for (size_t b = 0; b < n; b++)
                moment[a * n + b] += (q[a] * q[b] - moment[a * n + b]) * rate;
        }
    }
}

enum { BOTH = BL_STREAM | BL_ONESHOT };
static const char nothing[] = "nothing", queries[] = "queries", rows[] = "attention rows";
static const char all_rows[] = "attention rows of all heads";

const bl_method bl_methods[] = {
    {"streamingllm", nothing, "sinks and a sliding window, arXiv 2309.17453", BOTH, 0, 0,
     score_window, NULL, 0, 1, select_newest, NULL},
    {"knorm", nothing, "keys of small norm, arXiv 2406.11430", BOTH, 0, 1.0 / 3, score_knorm, NULL,
     1, 1, select_knorm, NULL},
    {"keydiff", nothing, "keys unlike the mean key, arXiv 2504.15364", BOTH, 0, 1.0 / 3,
     score_keydiff, NULL, 1, 1, select_keydiff, NULL},
    {"h2o", rows, "largest accumulated attention, arXiv 2306.14048", BOTH, 0, 0.5, score_word,
     observe_sum, 1, 1, select_h2o, NULL},
    {"tova", all_rows, "largest attention of the newest query, arXiv 2401.06104", BOTH, 0, 0,
     score_word, observe_last, 1, 1, select_tova, NULL},
    {"expected", queries, "expected attention of Gaussian queries, arXiv 2510.00636", BOTH, 0,
     1.0 / 3, score_expected, observe_query, 1, 64, select_expected, NULL},
    {"uniform-once", nothing, "a uniform sample", BL_ONESHOT, 1, 0, NULL, NULL, 0, 0,
     select_uniform, NULL},
    {"published", nothing, "BalanceKV as published, weights in the numerator, arXiv 2502.07861",
     BL_ONESHOT, 1, 0, NULL, NULL, 0, 0, select_published, NULL},
    {"published-both", nothing, "the same, weights in the denominator too", BL_ONESHOT, 1, 0, NULL,
     NULL, 0, 0, select_published_both, NULL},
    {"snapkv", rows, "attention of the last queries, arXiv 2404.14469", BL_ONESHOT, 0, 0, NULL,
     NULL, 0, 0, select_snapkv, NULL},
    {"snapkv-ahead", "attention rows of the future", "the same from the next queries", BL_ONESHOT,
     0, 0, NULL, NULL, 0, 0, select_snapkv_ahead, NULL},
    {"pyramidkv", rows, "SnapKV with less for later layers, arXiv 2406.02069", BL_ONESHOT, 0, 0,
     NULL, NULL, 0, 0, select_pyramidkv, NULL},
    {"kvcrush-random", all_rows, "SnapKV and representatives, arXiv 2503.00022", BL_ONESHOT, 1, 0,
     NULL, NULL, 0, 0, select_kvcrush_random, NULL},
    {"kvcrush-mean", all_rows, "the same, anchor the mean signature", BL_ONESHOT, 0, 0, NULL, NULL,
     0, 0, select_kvcrush_mean, NULL},
    {"kvcrush-alternate", all_rows, "the same, anchor 0101..", BL_ONESHOT, 0, 0, NULL, NULL, 0, 0,
     select_kvcrush_alternate, NULL},
    {"walk", nothing, "self-balancing walk on the pages of balancekv.h, arXiv 2502.07861", BOTH, 1,
     0, NULL, NULL, 1, 1, select_pages, walk_new},
    {"uniform", nothing, "64 of 128 at random on the pages of balancekv.h", BOTH, 1, 0, NULL, NULL,
     1, 1, select_pages, uniform_new},
    {"pair", nothing, "kernel halving of pairs on the pages of balancekv.h, arXiv 2105.05842", BOTH,
     1, 0, NULL, NULL, 1, 1, select_pages, pair_new},
    {"stride", nothing, "every other token on the pages of balancekv.h", BOTH, 1, 0, NULL, NULL, 1,
     1, select_pages, stride_new},
    {"algorithm1", nothing, "merge-and-reduce of arXiv 2502.07861 as stated", BL_STREAM, 1, 0, NULL,
     NULL, 3, 1, NULL, algorithm1_new},
    {"hybrid", nothing, "moments, parts and a coreset, after arXiv 2606.07205", BL_STREAM, 1,
     1.0 / 3, NULL, NULL, 2, 1, NULL, hybrid_new},
};
const size_t bl_n_methods = sizeof bl_methods / sizeof *bl_methods;

/* ---- the cache ------------------------------------------------------------------------------- */

const bl_method *bl_find(const char *name) {
    for (size_t i = 0; i < bl_n_methods; i++)
        if (!strcmp(name, bl_methods[i].name)) return &bl_methods[i];
    return NULL;
}

static uint32_t resolve(uint32_t x, uint32_t standard) {
    return x == BL_NONE ? 0 : x ? x : standard;
}

uint32_t bl_resolve(const bl_method *m, bl_config *cfg) {
    int default_window = cfg->window == 0;
    cfg->sinks = resolve(cfg->sinks, m->make == algorithm1_new ? 0 : 4);
    cfg->window = resolve(cfg->window, (uint32_t)(m->window_share * (double)cfg->budget));
    cfg->queries = resolve(cfg->queries, 64);
    cfg->pool = resolve(cfg->pool, 5);
    cfg->queries += !cfg->queries;
    cfg->pool += !cfg->pool;
    if (!cfg->block) cfg->block = 128;
    if (!cfg->tokens) cfg->tokens = 1u << 20;
    if (!cfg->layers) cfg->layers = 30;
    if (!(cfg->gamma > 0)) cfg->gamma = 4;
    if (!(cfg->temp > 0)) cfg->temp = 1;
    if (!(cfg->share > 0)) cfg->share = 0.25f;
    if (!(cfg->scale > 0)) cfg->scale = 1 / sqrtf((float)cfg->head_dim);
    if (m->select == select_pages) return pages_resolve(cfg, default_window);
    return cfg->sinks + cfg->window + m->batch +
           (m->make == hybrid_new ? 192 + (uint32_t)hybrid_part_slots(cfg) : 0);
}

bl_cache *bl_new(const bl_method *m, const bl_config *cfg) {
    size_t capacity, n = cfg->head_dim, heads = cfg->n_kv_heads;
    bl_cache *c = (bl_cache *)calloc(1, sizeof *c);
    int good;
    if (!c) return NULL;
    c->method = m;
    c->cfg = *cfg;
    c->group = cfg->n_q_heads / heads;
    good = bl_resolve(m, &c->cfg) <= cfg->budget;
    if (m->make) {
        c->pools = (pool **)calloc(heads, sizeof *c->pools);
        for (size_t h = 0; c->pools && good && h < heads; h++)
            good &= (c->pools[h] = m->make(&c->cfg, h)) != NULL;
        if (c->pools && good) return c;
        bl_free(c);
        return NULL;
    }
    c->heads = (slots **)calloc(heads, sizeof *c->heads);
    for (size_t h = 0; c->heads && h < heads; h++)
        good &= (c->heads[h] = slots_new(n, cfg->value_dim, cfg->budget)) != NULL;
    if (!c->heads || !good) {
        bl_free(c);
        return NULL;
    }
    capacity = c->heads[0]->capacity;
    c->word = (float *)calloc(heads * capacity, sizeof *c->word);
    c->anchor = (double *)calloc(heads * n, sizeof *c->anchor);
    c->mean = (float *)calloc(cfg->n_q_heads * n, sizeof *c->mean);
    c->moment = (float *)calloc(cfg->n_q_heads * n * n, sizeof *c->moment);
    c->p = (float *)calloc(c->group * capacity, sizeof *c->p);
    c->work = (float *)calloc(capacity + 2 * n, sizeof *c->work);
    if (c->word && c->anchor && c->mean && c->moment && c->p && c->work) return c;
    bl_free(c);
    return NULL;
}

void bl_free(bl_cache *c) {
    if (!c) return;
    for (size_t h = 0; c->heads && h < c->cfg.n_kv_heads; h++) slots_free(c->heads[h]);
    for (size_t h = 0; c->pools && h < c->cfg.n_kv_heads; h++) pool_free(c->pools[h]);
    free(c->pools);
    free(c->heads);
    free(c->word);
    free(c->anchor);
    free(c->mean);
    free(c->moment);
    free(c->p);
    free(c->work);
    free(c);
}

/* Adds or takes away the unit key of a slot. */
static void shift_anchor(bl_cache *c, size_t head, size_t i, double sign) {
    const slots *s = c->heads[head];
    float length;
    slots_key(s, i, c->work);
    length = norm(c->work, s->dim);
    for (size_t d = 0; d < s->dim && length > 0; d++)
        c->anchor[head * s->dim + d] += sign * (double)c->work[d] / (double)length;
}

/* Frees a batch of slots: those of the lowest scores that are neither sink nor in the window, of
   which the token to come will be one. Among equals the oldest goes. */
static void evict(bl_cache *c, size_t head) {
    slots *s = c->heads[head];
    float *score = c->work + 2 * s->dim, *word = words_of(c, head);
    c->method->score(c, head, score);
    for (size_t n = 0; n < c->method->batch; n++) {
        size_t worst = s->held;
        for (size_t i = 0; i < s->held; i++) {
            if (s->position[i] < c->cfg.sinks || c->seen - s->position[i] < c->cfg.window) continue;
            if (worst == s->held || score[i] < score[worst] ||
                (score[i] <= score[worst] && s->position[i] < s->position[worst]))
                worst = i;
        }
        if (c->method->score == score_keydiff) shift_anchor(c, head, worst, -1);
        s->held--;
        slots_move(s, worst, s->held);
        score[worst] = score[s->held];
        word[worst] = word[s->held];
    }
}

void bl_append(bl_cache *c, const float *k, const float *v) {
    for (size_t h = 0; h < c->cfg.n_kv_heads; h++, k += c->cfg.head_dim, v += c->cfg.value_dim) {
        slots *s;
        float *word;
        if (c->pools) {
            pool_append(c->pools[h], k, v);
            continue;
        }
        s = c->heads[h];
        word = words_of(c, h);
        if (s->held == c->cfg.budget) evict(c, h);
        slots_put(s, s->held, k, v, c->seen);
        word[s->held] = 0;
        if (c->method->score == score_knorm || c->method->score == score_keydiff)
            word[s->held] = norm(k, s->dim);
        if (c->method->score == score_expected) word[s->held] = norm(v, s->v_dim);
        s->held++;
        if (c->method->score == score_keydiff) shift_anchor(c, h, s->held - 1, 1);
    }
    c->seen++;
}

void bl_attend(bl_cache *c, const float *q, float *out) {
    size_t q_step = c->group * c->cfg.head_dim, v_dim = c->cfg.value_dim;
    int attends = out || c->method->observe == observe_sum || c->method->observe == observe_last;
    for (size_t h = 0; h < c->cfg.n_kv_heads; h++, q += q_step) {
        const slots *s = c->pools ? NULL : c->heads[h];
        if (c->pools) {
            if (out) pool_attend(c->pools[h], q, out + h * c->group * v_dim);
            continue;
        }
        if (attends) {
            slots_logits(s, q, c->group, c->cfg.scale, c->p);
            slots_exp(s, c->group, c->p, c->work);
            slots_output(s, c->p, c->group, c->work, out ? out + h * c->group * v_dim : NULL);
        }
        for (size_t r = 0; out && r < c->group; r++)
            for (size_t d = 0; d < v_dim; d++) out[(h * c->group + r) * v_dim + d] /= c->work[r];
        if (c->method->observe) c->method->observe(c, h, q, c->p, c->work);
    }
}

uint32_t bl_held(const bl_cache *c) {
    size_t most = 0;
    for (size_t h = 0; h < c->cfg.n_kv_heads; h++) {
        size_t held = c->pools ? pool_held(c->pools[h]) : c->heads[h]->held;
        if (held > most) most = held;
    }
    return (uint32_t)most;
}

size_t bl_failures(const bl_cache *c) {
    size_t n = 0;
    for (size_t h = 0; c->pools && h < c->cfg.n_kv_heads; h++) n += pool_failures(c->pools[h]);
    return n;
}

int bl_fit(const bl_method *m, bl_config *cfg, const float *k, const float *v, size_t n) {
    size_t k_row = cfg->n_kv_heads * cfg->head_dim, v_row = cfg->n_kv_heads * cfg->value_dim;
    uint32_t low = 0, high = cfg->budget / 4; /* low fits, 2 * (high + 1) does not */
    if (m->make != algorithm1_new) return 1;
    while (low < high) {
        uint32_t middle = (low + high + 1) / 2, fits = 1;
        bl_cache *c;
        cfg->block = 2 * middle;
        c = bl_new(m, cfg);
        for (size_t i = 0; c && i < n && fits; i++) {
            bl_append(c, k + i * k_row, v + i * v_row);
            fits = bl_held(c) <= cfg->budget;
        }
        if (c && fits)
            low = middle;
        else
            high = middle - 1;
        bl_free(c);
    }
    cfg->block = 2 * low;
    return low > 0;
}

size_t bl_bytes(const bl_cache *c) {
    const bl_config *f = &c->cfg;
    size_t n = f->head_dim, slot = 2 * (n + f->value_dim) + 4 + 4 * (size_t)c->method->words;
    size_t bytes = (size_t)f->n_kv_heads * f->budget * slot;
    if (c->method->score == score_keydiff) bytes += 4 * f->n_kv_heads * n;
    if (c->method->score == score_expected) bytes += 4 * f->n_q_heads * (n + n * n);
    return bytes;
}
