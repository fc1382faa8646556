/* pages.c - other halving rules on the pages of balancekv.h: what its own has to be better than.

   The tokens behind the sinks stand in pages of 64. When there is no free page, of the pages older
   than the window the two neighbours of the lowest level, the oldest of those, become one: 64 of
   their 128 tokens stay. The kernel is K_ij = w_i w_j exp(<k~_i, k~_j> scale temp - m) (<v_i, v_j> +
   0.025), k~ = k - mean, m = the largest exponent; u_0, u_1, .. are the random numbers of
   balancekv.h (tests/golden/README.md).

   walk: the self-balancing walk (arXiv 2502.07861, algorithm 1 and its code). s_i = +1 if u_i <
   1/2 - gamma sum_{j<i} s_j K_ij / D, else -1, D = the largest K_ii: 1/2 / gamma is the imbalance at
   which the choice is no longer random. Once 64 tokens have one sign the rest get the other. Tokens
   with s = +1 stay, their weights times (sum of all) / (sum of theirs), though none below 1.
   uniform: 64 of 128 at random, the first half of a Fisher-Yates shuffle; weights as under walk.
   pair: kernel halving (arXiv 2105.05842). Of each pair (2t, 2t+1) one survives and takes the weight
   of both: the one that brings the signed sum of the block closer to zero under K, a if f_a / w_a <
   f_b / w_b, f = the inner products of the error so far with every weighted token.
   stride: always the first of a pair, or always the second, one choice for a block. */
#include "oneshot.h"
#include "pool.h"
#include "theory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 64, BLOCK = 2 * PAGE, ROW = 16, FEW = 512 };

/* Sinks and slots in multiples of 16; what whole pages leave over goes to the sinks. */
uint32_t pages_resolve(bl_config *cfg, int default_window) {
    uint32_t room = cfg->budget / ROW * ROW, sinks = (cfg->sinks + ROW - 1) / ROW * ROW;
    uint32_t pages = room > sinks ? (room - sinks) / PAGE : 0;
    uint32_t window = (cfg->window + PAGE - 1) / PAGE;
    if (default_window) {
        window = cfg->budget >= FEW ? cfg->budget / 4 / PAGE : 1;
        if (window + 2 > pages) window = pages > 2 ? pages - 2 : 0;
    }
    cfg->window = window * PAGE;
    cfg->sinks = room > sinks ? sinks + (room - sinks) % PAGE : sinks;
    return sinks + (window + 2) * PAGE;
}

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* The random numbers of balancekv.h: 24 bits, number i of halving t of a head. */
static uint32_t draw(const pool *p, uint64_t t, uint64_t i) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    uint64_t key = mix(mix(p->cfg.seed + golden * (p->head + 1)) + golden * (t + 1));
    return (uint32_t)(mix(key + golden * (i + 1)) >> 40);
}

static void make_gram(pool *p) {
    size_t d = p->s->dim;
    double top = -HUGE_VAL;
    memset(p->key, 0, d * sizeof *p->key);
    for (size_t i = 0; i < BLOCK; i++) {
        slots_key(p->s, p->list[i], p->keys);
        for (size_t a = 0; a < d; a++) p->key[a] += p->keys[a] / BLOCK;
    }
    pool_products(p, BLOCK, p->key);
    for (size_t i = 0; i < BLOCK; i++)
        if (p->gram[i * BLOCK + i] > top) top = p->gram[i * BLOCK + i];
    for (size_t i = 0; i < BLOCK; i++)
        for (size_t j = 0; j <= i; j++) {
            uint32_t a = p->list[i], b = p->list[j];
            double e = exp((p->gram[i * BLOCK + j] - top) * (double)p->cfg.temp);
            e *= pool_dot(pool_value(p, a), pool_value(p, b), p->s->v_dim) + 0.025;
            e *= (double)p->s->numerator[a] * (double)p->s->numerator[b];
            p->gram[i * BLOCK + j] = p->gram[j * BLOCK + i] = e;
        }
}

/* Rules: w holds the weights of the tokens of p->list, then those after the halving, 0 for what
   goes. */
typedef void rule(pool *p, double *w);

/* w_i > 0 of those that stay: times what makes the sum that of before. */
static void keep_sum(double *w, double all) {
    double kept = 0;
    for (size_t i = 0; i < BLOCK; i++) kept += w[i];
    for (size_t i = 0; i < BLOCK; i++)
        if (w[i] > 0) w[i] = fmax(w[i] * (all / kept), 1);
}

static void choose_walk(pool *p, double *w) {
    double largest = 0, all = 0;
    size_t kept = 0;
    make_gram(p);
    for (size_t i = 0; i < BLOCK; i++) {
        all += w[i];
        largest = fmax(largest, p->gram[i * (BLOCK + 1)]);
    }
    for (size_t i = 0; i < BLOCK; i++) {
        double u = draw(p, p->draws, i) / 16777216.0, f = 0;
        for (size_t j = 0; j < i; j++) f += p->sign[j] * p->gram[i * BLOCK + j];
        p->sign[i] = u < 0.5 - (double)p->cfg.gamma * (f / largest) ? 1 : -1;
        if (kept == PAGE) p->sign[i] = -1;
        if (i - kept == PAGE) p->sign[i] = 1;
        kept += p->sign[i] > 0;
        if (p->sign[i] < 0) w[i] = 0;
    }
    keep_sum(w, all);
}

static void choose_uniform(pool *p, double *w) {
    size_t order[BLOCK];
    double all = 0;
    for (size_t i = 0; i < BLOCK; i++) {
        order[i] = i;
        all += w[i];
    }
    for (size_t i = 0; i < PAGE; i++) {
        size_t j = i + (size_t)((uint64_t)draw(p, p->draws, i) * (BLOCK - i) >> 24);
        size_t chosen = order[j];
        order[j] = order[i];
        order[i] = chosen;
    }
    for (size_t i = PAGE; i < BLOCK; i++) w[order[i]] = 0;
    keep_sum(w, all);
}

static void choose_pairs(pool *p, double *w) {
    double f[BLOCK] = {0};
    make_gram(p);
    for (size_t a = 0; a < BLOCK; a += 2) {
        size_t b = a + 1, kept, gone;
        double u = draw(p, p->draws, a / 2) / 16777216.0, share;
        int first =
            f[a] / w[a] < f[b] / w[b] || (f[a] / w[a] <= f[b] / w[b] && u < w[a] / (w[a] + w[b]));
        kept = first ? a : b;
        gone = first ? b : a;
        share = w[gone] / w[kept];
        w[kept] += w[gone];
        w[gone] = 0;
        for (size_t i = 0; i < BLOCK; i++)
            f[i] += share * p->gram[kept * BLOCK + i] - p->gram[gone * BLOCK + i];
    }
}

static void choose_stride(pool *p, double *w) {
    size_t kept = draw(p, p->draws, 0) >> 23;
    for (size_t i = 0; i < BLOCK; i += 2) {
        w[i + kept] += w[i + !kept];
        w[i + !kept] = 0;
    }
}

/* Makes one page of two; the freed one becomes the newest. */
static void halve(pool *p, rule *choose) {
    double w[BLOCK];
    uint32_t best = 0;
    int lowest = 1 << 30, freed;
    size_t n;
    for (uint32_t i = 0; i + 1 < p->n_pages - p->window_pages; i++) {
        int a = p->page_level[i], b = p->page_level[i + 1], level = a > b ? a : b;
        if (level < lowest) {
            lowest = level;
            best = i;
        }
    }
    freed = p->page[best + 1];
    for (size_t i = 0; i < p->s->held; i++)
        if (p->group[i] == freed) p->group[i] = p->page[best];
    n = pool_gather(p, p->page[best], 0);
    for (size_t i = 0; i < n; i++) w[i] = (double)p->s->numerator[p->list[i]];
    choose(p, w);
    p->draws++;
    for (size_t i = 0; i < n; i++) p->s->numerator[p->list[i]] = (float)w[i];
    for (size_t i = p->s->held; i-- > 0;) {
        p->s->denominator[i] = p->s->numerator[i];
        if (!(p->s->numerator[i] > 0)) pool_drop(p, i);
    }
    p->page_level[best] = lowest + 1;
    for (uint32_t i = best + 1; i + 1 < p->n_pages; i++) {
        p->page[i] = p->page[i + 1];
        p->page_level[i] = p->page_level[i + 1];
    }
    p->page[p->n_pages - 1] = freed;
    p->page_level[p->n_pages - 1] = 0;
}

static void append(pool *p, const float *k, const float *v, rule *choose) {
    if (p->seen < p->cfg.sinks) {
        pool_put(p, k, v, p->seen);
        return;
    }
    if (p->used == 0 || p->fill == PAGE) {
        if (p->used < p->n_pages) {
            p->page[p->used] = (int)p->used;
            p->used++;
        } else {
            halve(p, choose);
        }
        p->fill = 0;
    }
    p->group[pool_put(p, k, v, p->seen)] = p->page[p->used - 1];
    p->fill++;
}

static pool *pages_new(const bl_config *cfg, size_t kv_head,
                       void (*append_one)(pool *p, const float *k, const float *v)) {
    pool *p = pool_new(cfg, kv_head, BLOCK);
    if (!p) return NULL;
    p->append = append_one;
    p->n_pages = (cfg->budget / ROW * ROW - cfg->sinks) / PAGE;
    p->window_pages = cfg->window / PAGE;
    if (p->n_pages <= POOL_PAGES) return p;
    pool_free(p);
    return NULL;
}

#define METHOD(name, choose)                                                                       \
    static void name##_append(pool *p, const float *k, const float *v) {                           \
        append(p, k, v, choose);                                                                   \
    }                                                                                              \
    pool *name##_new(const bl_config *cfg, size_t kv_head) {                                       \
        return pages_new(cfg, kv_head, name##_append);                                             \
    }
METHOD(walk, choose_walk)
METHOD(uniform, choose_uniform)
METHOD(pair, choose_pairs)
METHOD(stride, choose_stride)
