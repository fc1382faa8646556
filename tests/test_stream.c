/* Streams: the same tokens give the same bytes however they are fed, and the state is at any time
   what the manual says (a small model of the pages in this file decides). */
#include "test.h"
#include <pthread.h>

enum { N_KV = 3, GROUP = 2, DIM = 24, VALUE_DIM = 20, MOST_THREADS = 5 };

typedef struct stream {
    size_t n;
    tensor k, v, q;
} stream;

static stream stream_new(size_t n, uint32_t type) {
    stream s = {n, tensor_random(n, N_KV, DIM, type), tensor_random(n, N_KV, VALUE_DIM, type),
                tensor_random(n, N_KV * GROUP, DIM, type)};
    return s;
}

static void stream_free(stream *s) { tensor_free(&s->k), tensor_free(&s->v), tensor_free(&s->q); }

static bkv_config config(uint32_t rule, uint32_t kv_type, uint32_t budget) {
    bkv_config cfg = bkv_config_default(N_KV * GROUP, N_KV, DIM, budget);
    cfg.value_dim = VALUE_DIM;
    cfg.kv_type = kv_type;
    cfg.rule = rule;
    cfg.n_threads = MOST_THREADS;
    cfg.seed = 7;
    return cfg;
}

static void append(bkv_cache *c, const stream *s, size_t from, size_t n) {
    OK(bkv_append(c, tensor_from(&s->k, from), tensor_from(&s->v, from), n, 0, 0, 1));
}

/* ---- ways to feed n tokens: each fills out[n][N_KV * GROUP][VALUE_DIM] or only its last row -- */
/* Queries teach the cache, so the same state is due to those feeders that ask the same queries. */

enum { ROW = N_KV * GROUP * VALUE_DIM };

enum { PREFILL, APPEND, ATTEND };
typedef struct job {
    int what;
    bkv_cache *c;
    const stream *s;
    size_t from, n;
    float *out;
    uint32_t ith, nth;
    bkv_result result;
} job;

static void *job_run(void *p) {
    job *j = (job *)p;
    bkv_tensor k = tensor_from(&j->s->k, j->from), v = tensor_from(&j->s->v, j->from);
    bkv_tensor q = tensor_from(&j->s->q, j->from);
    j->result = j->what == PREFILL  ? bkv_prefill(j->c, k, v, q, j->out, j->n, 0, j->ith, j->nth)
                : j->what == APPEND ? bkv_append(j->c, k, v, j->n, 0, j->ith, j->nth)
                                    : bkv_attend(j->c, q, j->out, j->ith, j->nth);
    return 0;
}

/* The shares of a job, in threads or one after the other, last first. */
static void in_shares(int what, bkv_cache *c, const stream *s, size_t from, size_t n, float *out,
                      uint32_t nth, int threads) {
    job jobs[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    for (uint32_t i = nth; i-- > 0;) {
        job j = {what, c, s, from, n, out, i, nth, BKV_OK};
        jobs[i] = j;
        if (!threads)
            (void)job_run(&jobs[i]);
        else if (pthread_create(&ids[i], 0, job_run, &jobs[i]))
            (void)checked(0);
    }
    for (uint32_t i = 0; i < nth; i++) {
        if (threads) (void)pthread_join(ids[i], 0);
        OK(jobs[i].result);
    }
}

static void feed_singly(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) {
        append(c, s, from + t, 1);
        OK(bkv_attend(c, tensor_from(&s->q, from + t), out + t * ROW, 0, 1));
    }
}

static void feed_appending(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) append(c, s, from + t, 1);
    OK(bkv_attend(c, tensor_from(&s->q, from + n - 1), out + (n - 1) * ROW, 0, 1));
}

static void feed_chunk(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    append(c, s, from, n);
    OK(bkv_attend(c, tensor_from(&s->q, from + n - 1), out + (n - 1) * ROW, 0, 1));
}

/* append() and attend() in shares of their own, more shares than KV heads among them. */
static void feed_chunk_shared(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    for (uint32_t i = 0; i < 4; i++)
        OK(bkv_append(c, tensor_from(&s->k, from), tensor_from(&s->v, from), n, 0, i, 4));
    for (uint32_t i = 2; i-- > 0;)
        OK(bkv_attend(c, tensor_from(&s->q, from + n - 1), out + (n - 1) * ROW, i, 2));
}

static void feed_prefill(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(PREFILL, c, s, from, n, out, 1, 0);
}

static void feed_shares_2(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(PREFILL, c, s, from, n, out, 2, 0);
}

static void feed_shares_3(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(PREFILL, c, s, from, n, out, 3, 0);
}

static void feed_shares_5(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(PREFILL, c, s, from, n, out, 5, 0);
}

static void feed_threads(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(PREFILL, c, s, from, n, out, 2 + (uint32_t)n % 3, 1);
}

static void feed_threads_apart(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    in_shares(APPEND, c, s, from, n, out, 3, 1);
    in_shares(ATTEND, c, s, from + n - 1, 1, out + (n - 1) * ROW, 2, 1);
}

/* Takes the cache to another address, of any alignment, with only its state copied. */
static void move(bkv_cache *c) {
    static unsigned char *old; /* the block before: the new one cannot get its address */
    size_t odd = random_below(64);
    unsigned char *block = (unsigned char *)checked(malloc(c->bytes + 64));
    memset(block, 0xEE, c->bytes + 64);
    memmove(block, c->mem, c->state_bytes);
    memset(c->mem, 0xEE, c->state_bytes);
    memmove(block + odd, block, c->state_bytes);
    bkv_cache moved;
    OK(bkv_attach(&moved, block + odd, c->bytes, c->cfg.backend));
    free(old);
    old = block;
    *c = moved;
}

static void feed_moving(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    feed_chunk(c, s, from, n, out);
    move(c);
}

/* The query that counts in parts: bkv_attend_partial() teaches as bkv_attend() does. */
static void feed_partial(bkv_cache *c, const stream *s, size_t from, size_t n, float *out) {
    float part[ROW], max[N_KV * GROUP], sum[N_KV * GROUP];
    bkv_cache twin = cache_new(&c->cfg);
    append(c, s, from, n);
    memcpy(twin.mem, c->mem, c->state_bytes);
    OK(bkv_attend(&twin, tensor_from(&s->q, from + n - 1), out + (n - 1) * ROW, 0, 1));
    OK(bkv_attend_partial(c, tensor_from(&s->q, from + n - 1), part, max, sum, 0, 1));
    cache_free(&twin);
}

static const struct feeder {
    const char *name;
    void (*feed)(bkv_cache *c, const stream *s, size_t from, size_t n, float *out);
    int last_row_only;
} feeders[] = {
    {"one by one", feed_singly, 0},
    {"prefill", feed_prefill, 0},
    {"2 shares", feed_shares_2, 0},
    {"3 shares", feed_shares_3, 0},
    {"5 shares", feed_shares_5, 0},
    {"threads", feed_threads, 0},
    {"appending", feed_appending, 1},
    {"chunks", feed_chunk, 1},
    {"chunks in shares", feed_chunk_shared, 1},
    {"chunks in threads", feed_threads_apart, 1},
    {"moving", feed_moving, 1},
    {"partial", feed_partial, 1},
};

/* Sizes at which something could go wrong, and any other. */
static size_t chunk_size(size_t left) {
    static const size_t special[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300};
    size_t n = random_below(2) ? special[random_below(COUNT(special))] : 1 + random_below(90);
    return n < left ? n : left;
}

static void lockstep(bkv_config cfg, const stream *s) {
    bkv_cache c[COUNT(feeders)];
    float *out[COUNT(feeders)];
    unsigned char *first_block[COUNT(feeders)];
    for (size_t f = 0; f < COUNT(feeders); f++) {
        c[f] = cache_new(&cfg);
        first_block[f] = c[f].mem;
        out[f] = new_floats(300 * ROW);
    }
    for (size_t from = 0, n; from < s->n; from += n) {
        size_t first = 0; /* of the feeders that ask the same queries */
        n = chunk_size(s->n - from);
        for (size_t f = 0; f < COUNT(feeders); f++) {
            size_t skip = feeders[f].last_row_only ? n - 1 : 0;
            feeders[f].feed(&c[f], s, from, n, out[f]);
            if (feeders[f].last_row_only != feeders[first].last_row_only) first = f;
            CHECKF(same_state(&c[first], &c[f]), "state: rule %u, %s: %s, tokens %zu to %zu",
                   cfg.rule, type_name(cfg.kv_type), feeders[f].name, from, from + n - 1);
            CHECKF(memcmp(out[first] + skip * ROW, out[f] + skip * ROW,
                          (n - skip) * ROW * sizeof(float)) == 0,
                   "output: rule %u, %s: %s, tokens %zu to %zu", cfg.rule, type_name(cfg.kv_type),
                   feeders[f].name, from, from + n - 1);
        }
    }
    CHECK(cache_stats(&c[0]).halvings >= 3 * N_KV);
    for (size_t f = 0; f < COUNT(feeders); f++) {
        free(first_block[f]);
        free(out[f]);
    }
}

/* For rule `sample`: what it takes for important, and how often it balances. */
static const uint32_t importances[] = {0, 1, 2, 3, 4, 5, 6, 7, BKV_NONE};
static const uint32_t rounds[] = {0, BKV_NONE, 1, 7};

static void ways_to_feed(void) {
    size_t n = test_quick() ? 560 : 1500;
    for (size_t t = 0; t < COUNT(test_types); t++) {
        stream s = stream_new(n, test_types[t]);
        for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
            if (!test_quick() || t == rule % 3)
                lockstep(config(rule, storage_types[(2 * t + rule) % N_STORAGE], 300), &s);
        for (size_t i = t; i < COUNT(importances) && !test_quick(); i += 3) {
            bkv_config cfg = config(BKV_RULE_SAMPLE, storage_types[i % N_STORAGE], 300);
            cfg.importance = importances[i];
            cfg.rounds = rounds[i % COUNT(rounds)];
            lockstep(cfg, &s);
        }
        stream_free(&s);
    }
}

/* Sinks that reach over several blocks of 64 slots. */
static void many_sinks(void) {
    stream s = stream_new(720, BKV_F32);
    bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_I8, 528);
    cfg.sinks = 200, cfg.window = 64;
    lockstep(cfg, &s);
    stream_free(&s);
}

/* ---- the state at any time, against a model of the manual's "The stream" --------------------- */

enum { MOST_PAGES = 64, MOST_SLOTS = 2048 };

typedef struct model {
    uint32_t sinks, n_pages, window_pages, rule, importance;
    uint32_t level[MOST_PAGES]; /* of the pages in use, oldest first */
    uint32_t pages, newest;     /* pages in use, tokens in the newest of them */
    uint64_t seen, halvings;
} model;

static void model_halve(model *m) {
    uint32_t best = 0, best_level = UINT32_MAX;
    for (uint32_t i = 0; i + 1 < m->pages - m->window_pages; i++) {
        uint32_t level = m->level[i] > m->level[i + 1] ? m->level[i] : m->level[i + 1];
        if (level < best_level) best = i, best_level = level;
    }
    m->level[best] = best_level + (m->rule != BKV_RULE_WINDOW);
    for (uint32_t i = best + 1; i + 1 < m->pages; i++) m->level[i] = m->level[i + 1];
    m->pages--;
    m->halvings++;
}

static void model_append(model *m) {
    if (m->seen++ < m->sinks) return;
    if (m->pages == 0 || m->newest == 64) {
        if (m->pages == m->n_pages) model_halve(m);
        m->level[m->pages++] = 0;
        m->newest = 0;
    }
    m->newest++;
}

static uint32_t model_held(const model *m) {
    uint32_t in_sinks = m->seen < m->sinks ? (uint32_t)m->seen : m->sinks;
    return in_sinks + (m->pages ? (m->pages - 1) * 64 + m->newest : 0);
}

static bkv_token_info kept[MOST_SLOTS];

/* All that is promised of the tokens of a head; returns the largest weight. was: 1 for every
   position that was held at the last look or is newer. */
static float check_head(const bkv_cache *c, const model *m, uint32_t head, unsigned char *was) {
    bkv_stats_info s = cache_stats(c);
    double mass = 0, page_mass = 0;
    float heaviest = 0;
    uint32_t n = s.tokens_held;
    for (uint32_t i = 0; i < n; i++) {
        bkv_token_info t = kept[i] = cache_token(c, head, i);
        uint32_t page = i < m->sinks ? 0 : (i - m->sinks) / 64;
        mass += (double)t.weight;
        CHECK(i == 0 || t.position > kept[i - 1].position);
        CHECK(t.position < m->seen && was[t.position]);
        CHECK(t.weight >= 1 && t.weight <= s.max_weight && t.weight <= (float)m->seen);
        CHECK(t.use >= 0 && isfinite(t.use));
        page_mass = i < m->sinks || (i - m->sinks) % 64 == 0 ? 0 : page_mass;
        page_mass += (double)t.weight; /* at most the tokens seen, but for weights raised to 1 */
        CHECKF(page_mass <= 1.0001 * (double)m->seen + 64, "a page weighs %g", page_mass);
        heaviest = t.weight > heaviest ? t.weight : heaviest;
        CHECK((t.kind == BKV_KIND_SINK) == (i < m->sinks));
        CHECK(t.kind >= BKV_KIND_SINK && t.kind <= BKV_KIND_WINDOW);
        CHECK(t.kind == BKV_KIND_PAGE || (t.weight == 1 && t.level == 0));
        CHECKF(t.level == (i < m->sinks ? 0 : m->level[page]),
               "rule %u, seen %u, token %u: level %u", m->rule, (unsigned)m->seen, i, t.level);
        CHECK(t.weight == 1 || t.level > 0);
        CHECK(i >= m->sinks || (t.position == i && t.weight == 1));
    }
    for (uint32_t i = 0; i < n && i < s.window; i++) /* from the newest back */
        CHECK(kept[n - 1 - i].position == m->seen - 1 - i && kept[n - 1 - i].weight == 1 &&
              kept[n - 1 - i].kind != BKV_KIND_PAGE);
    if (m->rule == BKV_RULE_WINDOW)
        for (uint32_t i = 0; i + m->sinks < n; i++)
            CHECK(kept[n - 1 - i].position == m->seen - 1 - i && kept[n - 1 - i].weight == 1);
    else if (m->importance == BKV_NONE)
        CHECKF(fabs(mass - (double)m->seen) <= 1e-5 * (double)m->seen, "mass %.9g", mass);
    memset(was, 0, (size_t)m->seen);
    for (uint32_t i = 0; i < n; i++) was[kept[i].position] = 1;
    return heaviest;
}

static uint32_t round_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }

static void stream_against_model(bkv_config cfg, const stream *s) {
    uint32_t slots = cfg.budget / 16 * 16;
    uint32_t sinks = cfg.sinks == BKV_NONE ? 0 : round_up(cfg.sinks ? cfg.sinks : 4, 16);
    uint32_t window = cfg.window == BKV_NONE ? 0 : round_up(cfg.window, 64);
    model m;
    memset(&m, 0, sizeof m);
    m.rule = cfg.rule, m.importance = cfg.importance;
    if (slots < sinks + window + 128) {
        RESULT(bkv_check(&cfg), BKV_E_BUDGET);
        return;
    }
    bkv_cache c = cache_new(&cfg);
    bkv_stats_info st = cache_stats(&c);
    m.n_pages = (slots - sinks) / 64;
    m.sinks = slots - m.n_pages * 64;
    m.window_pages = cfg.window ? window / 64 : st.window / 64;
    CHECK(st.slots == slots && st.n_pages == m.n_pages && st.sinks == m.sinks);
    CHECK(cfg.window == 0 || st.window == window);
    CHECK(st.rule == cfg.rule && st.bytes == bkv_size(&cfg) && st.state_bytes <= st.bytes);
    CHECK(st.tokens_seen == 0 && st.tokens_held == 0 && st.halvings == 0 && st.max_level == 0);

    unsigned char *was = (unsigned char *)checked(calloc(N_KV, s->n));
    for (size_t t = 0; t < s->n; t++) {
        uint32_t top = 0;
        float out[ROW];
        append(&c, s, t, 1);
        if (t % 5 == 0) OK(bkv_attend(&c, tensor_from(&s->q, t), out, 0, 1));
        model_append(&m);
        st = cache_stats(&c);
        for (uint32_t i = 0; i < m.pages; i++) top = m.level[i] > top ? m.level[i] : top;
        CHECK(st.tokens_seen == m.seen && st.tokens_held == model_held(&m));
        CHECK(st.tokens_held <= st.slots && st.max_level == top);
        CHECKF(st.halvings == N_KV * m.halvings, "%u halvings after %u tokens",
               (unsigned)st.halvings, (unsigned)m.seen);
        CHECK(m.seen > slots || (st.tokens_held == m.seen && st.max_weight == 1));
        int look = t % 61 < 2 || t % 64 == slots % 64; /* also right after a halving */
        float heaviest = 0;
        for (uint32_t h = 0; h < N_KV; h++) {
            was[h * s->n + t] = 1;
            if (look) heaviest = fmaxf(heaviest, check_head(&c, &m, h, was + h * s->n));
        }
        CHECK(!look || heaviest == st.max_weight);
    }
    CHECK(m.halvings >= 4);
    free(was);
    cache_free(&c);
}

static void state_at_any_time(void) {
    static const uint32_t sinks[] = {0, BKV_NONE, 16, 20}, window[] = {0, BKV_NONE, 64, 100, 200};
    static const uint32_t budgets[] = {128, 143, 144, 300, 350, 511};
    stream s = stream_new(test_quick() ? 850 : 1100, BKV_F32);
    uint32_t n = 0;
    for (size_t b = 0; b < COUNT(budgets); b++)
        for (size_t i = 0; i < COUNT(sinks); i++)
            for (size_t w = 0; w < COUNT(window); w++) {
                bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_F16, budgets[b]);
                if (n % 4 == 0) cfg.rule = BKV_RULE_WINDOW;
                cfg.importance = importances[n % COUNT(importances)];
                cfg.rounds = rounds[n++ / 4 % COUNT(rounds)];
                cfg.sinks = sinks[i];
                cfg.window = window[w];
                if (!test_quick() || n % 3 == 0) stream_against_model(cfg, &s);
            }
    stream_free(&s);
}

static void long_streams(void) {
    stream s = stream_new(test_quick() ? 1000 : 3000, BKV_BF16);
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
        stream_against_model(config(rule, BKV_F32, 208), &s);
    stream_free(&s);
}

/* ---- rule sample ----------------------------------------------------------------------------- */

enum { RANDOM, ZERO_VALUES, EQUAL_KEYS, EQUAL_VALUES, ONE_HUGE, ALL_HUGE, N_KINDS };

/* Whatever it takes for important and whatever comes, 64 of 128 stay, in order, with finite weights
   of at least 1, and attention is finite. stream_against_model() looks at every token. */
static void any_importance_of_any_input(void) {
    enum { N_TOKENS = 460 };
    for (int kind = 0; kind < N_KINDS; kind++) {
        stream s = stream_new(N_TOKENS, BKV_F32);
        for (size_t t = 0; t < N_TOKENS; t++)
            for (size_t h = 0; h < N_KV; h++)
                for (size_t i = 0; i < DIM; i++) {
                    double k = tensor_get(&s.k, t, h, i), huge = ldexp(1.5, 54);
                    if (kind == EQUAL_KEYS) k = 0.5;
                    if (kind == ONE_HUGE && t == 100) k *= 1e15;
                    if (kind == ALL_HUGE) k = k < 0 ? -huge : huge;
                    tensor_set(&s.k, t, h, i, k);
                    if (i >= VALUE_DIM) continue;
                    double v = tensor_get(&s.v, t, h, i);
                    if (kind == ZERO_VALUES) v = 0;
                    if (kind == EQUAL_VALUES) v = -3;
                    if (kind == ONE_HUGE && t == 101) v *= 1e15;
                    if (kind == ALL_HUGE) v = v < 0 ? -huge : huge;
                    tensor_set(&s.v, t, h, i, v);
                }
        for (size_t i = 0; i < COUNT(importances); i++)
            for (size_t r = 0; r < COUNT(rounds); r++) {
                bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_F32, 208);
                float out[ROW];
                cfg.importance = importances[i];
                cfg.rounds = rounds[r];
                if (test_quick() && (i + r + (size_t)kind) % 5) continue;
                if (kind == RANDOM || kind == ZERO_VALUES) cfg.scale = 2; /* sharp attention */
                stream_against_model(cfg, &s);
                bkv_cache c = cache_new(&cfg);
                for (size_t t = 0; t < N_TOKENS; t += 20) {
                    append(&c, &s, t, 20);
                    OK(bkv_attend(&c, tensor_from(&s.q, t), out, 0, 1));
                    for (size_t x = 0; x < ROW; x++)
                        CHECKF(isfinite(out[x]), "kind %d, importance %u, rounds %u, token %zu",
                               kind, cfg.importance, cfg.rounds, t);
                }
                cache_free(&c);
            }
        stream_free(&s);
    }
}

static bkv_config one_head(uint32_t importance, uint32_t n_rounds, uint64_t seed) {
    bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_F32, 144);
    cfg.n_q_heads = cfg.n_kv_heads = 1;
    cfg.window = BKV_NONE;
    cfg.importance = importance;
    cfg.rounds = n_rounds;
    cfg.seed = seed;
    return cfg;
}

/* The tokens of KV head 0 only. */
static void append_one_head(bkv_cache *c, const stream *s, size_t from, size_t n) {
    bkv_tensor k = tensor_from(&s->k, from), v = tensor_from(&s->v, from);
    k.token_stride = s->k.token_stride, k.head_stride = s->k.head_stride;
    v.token_stride = s->v.token_stride, v.head_stride = s->v.head_stride;
    k.elem_stride = s->k.elem_stride, v.elem_stride = s->v.elem_stride;
    OK(bkv_append(c, k, v, n, 0, 0, 1));
}

/* Without balancing a token of weight 1 and chance p stays with weight 1 / p, in a share p of all
   seeds: it counts 1 on average. So does everything together after more halvings. */
static void weights_on_average(void) {
    enum { SINKS = 512, BUDGET = SINKS + 128, LATER = BUDGET + 256 };
    unsigned seeds = test_quick() ? 100 : 1000;
    stream s = stream_new(LATER, BKV_F32);
    for (size_t m = 0; m < COUNT(importances); m++) {
        unsigned stayed[BUDGET] = {0}, uneven = 0;
        float weight[BUDGET] = {0}, out[VALUE_DIM];
        double sum = 0, squares = 0;
        for (unsigned seed = 0; seed < seeds; seed++) {
            bkv_config cfg = one_head(importances[m], BKV_NONE, seed);
            cfg.sinks = SINKS,
            cfg.budget = BUDGET; /* no page comes near to weigh all tokens seen */
            bkv_cache c = cache_new(&cfg);
            append_one_head(&c, &s, 0, SINKS);
            for (size_t t = SINKS; t < BUDGET; t += 16) {
                append_one_head(&c, &s, t, 16);
                OK(bkv_attend(&c, tensor_from(&s.q, t), out, 0, 1));
            }
            append_one_head(&c, &s, BUDGET, 1);
            for (uint32_t i = SINKS; i < SINKS + 64; i++) {
                bkv_token_info info = cache_token(&c, 0, i);
                CHECK(weight[info.position] == 0 || weight[info.position] == info.weight);
                weight[info.position] = info.weight;
                stayed[info.position]++;
            }
            append_one_head(&c, &s, BUDGET + 1, LATER - BUDGET - 1);
            double mass = 0;
            for (uint32_t i = 0; i < cache_stats(&c).tokens_held; i++)
                mass += (double)cache_token(&c, 0, i).weight;
            sum += mass, squares += mass * mass;
            cache_free(&c);
        }
        for (size_t t = SINKS; t < BUDGET; t++) {
            double p = 1 / fmax((double)weight[t], 1);
            CHECKF(!stayed[t] ||
                       fabs(stayed[t] - seeds * p) <= 5 * sqrt(seeds * p * (1 - p)) + 1e-3,
                   "importance %u, token %zu: chance %g, stayed %u of %u times", importances[m], t,
                   p, stayed[t], seeds);
            uneven += stayed[t] && fabs(p - 0.5) > 0.05;
        }
        CHECKF((uneven > 10) == (importances[m] != BKV_NONE), "importance %u: %u uneven",
               importances[m], uneven);
        double mean = sum / seeds, deviation = sqrt(fmax(squares / seeds - mean * mean, 0) / seeds);
        CHECKF(fabs(mean - LATER) <= 5 * deviation + 1e-3, "importance %u: mass %g +- %g",
               importances[m], mean, deviation);
    }
    stream_free(&s);
}

/* One token takes so much of the attention that the uses of all others, squares, are denormal; values
   so small that their squares are. Every backend must take the same roots of them. */
static void denormals_on_every_backend(void) {
    enum { N_TOKENS = 330 };
    stream s = stream_new(N_TOKENS, BKV_F32);
    uint32_t backends[8];
    size_t n = test_backends(backends);
    float out[VALUE_DIM];
    for (int logit = 42; logit < 56; logit++) {
        double size = logit % 2 ? 1 : 1e-20;
        for (size_t t = 0; t < N_TOKENS; t++) {
            tensor_set(&s.q, t, 0, 0, logit);
            tensor_set(&s.k, t, 0, 0, t == 0);
            for (size_t i = 1; i < DIM; i++) tensor_set(&s.k, t, 0, i, 0.01 * (double)((t * i) % 9));
            for (size_t i = 0; i < VALUE_DIM; i++)
                tensor_set(&s.v, t, 0, i, size * (double)((t * 7 + i * 5) % 11));
        }
        bkv_cache first = {0};
        for (size_t b = 0; b < n; b++) {
            bkv_config cfg = one_head(BKV_IMPORTANCE_USE, 2, 1);
            cfg.scale = 1;
            cfg.kv_type = BKV_F32;
            cfg.backend = backends[b];
            bkv_cache c = cache_new(&cfg);
            for (size_t t = 0; t < N_TOKENS; t++) {
                append_one_head(&c, &s, t, 1);
                bkv_tensor q = tensor_from(&s.q, t);
                q.elem_stride = s.q.elem_stride;
                OK(bkv_attend(&c, q, out, 0, 1));
            }
            CHECKF(b == 0 || same_state(&c, &first), "logit %d: %s is not %s", logit,
                   bkv_backend_name(backends[b]), bkv_backend_name(backends[0]));
            if (b == 0)
                first = c;
            else
                cache_free(&c);
        }
        CHECK(cache_stats(&first).halvings > 0);
        cache_free(&first);
    }
    stream_free(&s);
}

/* A token that took nearly all the attention while it was young is certain to stay, as it is. */
static void certain_tokens_stay(void) {
    enum { NEEDLE = 70, N_TOKENS = 700 };
    stream s = stream_new(N_TOKENS, BKV_F32);
    for (size_t i = 0; i < DIM; i++)
        tensor_set(&s.k, NEEDLE, 0, i, 8.0 * tensor_get(&s.q, 0, 0, i));
    for (unsigned seed = 0; seed < 20; seed++)
        for (size_t r = 0; r < COUNT(rounds); r++) {
            bkv_config cfg = one_head(BKV_IMPORTANCE_USE, rounds[r], seed);
            bkv_cache c = cache_new(&cfg);
            float out[VALUE_DIM];
            uint32_t level = 0;
            append_one_head(&c, &s, 0, NEEDLE + 1);
            OK(bkv_attend(&c, s.q.view, out, 0, 1));
            append_one_head(&c, &s, NEEDLE + 1, N_TOKENS - NEEDLE - 1);
            for (uint32_t i = 0; i < cache_stats(&c).tokens_held; i++) {
                bkv_token_info info = cache_token(&c, 0, i);
                if (info.position != NEEDLE) continue;
                CHECK(info.weight == 1 && info.use > 0.9f);
                level = info.level;
            }
            CHECK(level >= 3);
            cache_free(&c);
        }
    stream_free(&s);
}

/* Of the tokens first .. end - 1 those that are held as they were, and pinned. */
static unsigned count_pinned(const bkv_cache *c, uint32_t head, size_t first, size_t end) {
    unsigned n = 0;
    for (uint32_t i = 0; i < cache_stats(c).tokens_held; i++) {
        bkv_token_info info = cache_token(c, head, i);
        CHECK(info.pinned <= 1 && (!info.pinned || (info.weight == 1 && info.use == 0)));
        n += info.pinned && info.position >= first && info.position < end;
    }
    return n;
}

/* n pinned tokens from `first` on: with the budgets that have room for all, all hold to the end; with
   the others the oldest 32 do, and what lost its pin is as any other. */
static void pinned_tokens_stay(void) {
    enum { FIRST = 270, N_TOKENS = 2000 };
    static const struct {
        uint32_t budget, n, at_least;
    } cases[] = {{144, 32, 32}, {144, 40, 32},    {208, 32, 32},  {208, 33, 32},
                 {300, 64, 32}, {1024, 200, 200}, {400, 900, 32}};
    stream s = stream_new(N_TOKENS, BKV_F32);
    float *out = new_floats(900 * ROW);
    for (size_t i = 0; i < COUNT(cases); i++)
        for (size_t r = 0; r < COUNT(rounds); r++) {
            size_t n = cases[i].n, end = FIRST + n;
            bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_F16, cases[i].budget);
            cfg.rounds = rounds[r];
            cfg.window = BKV_NONE;
            bkv_cache c = cache_new(&cfg);
            append(&c, &s, 0, FIRST);
            OK(bkv_prefill(&c, tensor_from(&s.k, FIRST), tensor_from(&s.v, FIRST),
                           tensor_from(&s.q, FIRST), out, n, BKV_PIN, 0, 1));
            for (size_t t = end; t < N_TOKENS; t++) {
                append(&c, &s, t, 1);
                if (t % 9 == 0) OK(bkv_attend(&c, tensor_from(&s.q, t), out, 0, 1));
            }
            for (uint32_t h = 0; h < N_KV; h++) {
                CHECK(count_pinned(&c, h, FIRST, FIRST + 32) == 32);
                CHECKF(count_pinned(&c, h, FIRST, end) >= cases[i].at_least, "budget %u: %u of %zu",
                       cases[i].budget, count_pinned(&c, h, FIRST, end), n);
                CHECK(count_pinned(&c, h, FIRST, end) == count_pinned(&c, h, 0, N_TOKENS));
            }
            cache_free(&c);
        }
    free(out);
    stream_free(&s);
}

/* Importance by keys needs no query: a key that points away from the others is nearly certain. */
static void odd_keys_stay(void) {
    enum { ODD = 50, N_TOKENS = 145, SEEDS = 200 };
    unsigned stayed = 0;
    stream s = stream_new(N_TOKENS, BKV_F32);
    for (size_t t = 0; t < N_TOKENS; t++)
        for (size_t i = 0; i < DIM; i++)
            tensor_set(&s.k, t, 0, i, tensor_get(&s.k, t, 0, i) + (t == ODD ? -3 : 3));
    for (unsigned seed = 0; seed < SEEDS; seed++) {
        bkv_config cfg = one_head(BKV_IMPORTANCE_KEY, 0, seed);
        bkv_cache c = cache_new(&cfg);
        append_one_head(&c, &s, 0, N_TOKENS);
        for (uint32_t i = 0; i < cache_stats(&c).tokens_held; i++)
            stayed += cache_token(&c, 0, i).position == ODD;
        cache_free(&c);
    }
    CHECKF(stayed == SEEDS, "stayed %u times of %u", stayed, SEEDS);
    stream_free(&s);
}

/* Balancing brings attention closer to the exact one: the squared error, over seeds and queries. */
static void rounds_of_balancing_help(void) {
    enum { N_TOKENS = 145, QUERIES = 16 };
    unsigned seeds = test_quick() ? 60 : 300;
    stream s = stream_new(N_TOKENS, BKV_F32);
    bkv_config whole = one_head(BKV_NONE, 0, 0);
    whole.budget = 256;
    bkv_cache exact = cache_new(&whole);
    append_one_head(&exact, &s, 0, N_TOKENS);
    for (size_t m = 0; m < COUNT(importances); m++) {
        double error[2] = {0, 0};
        for (unsigned run = 0; run < 2 * seeds; run++) {
            bkv_config cfg = one_head(importances[m], run % 2 ? 2 : BKV_NONE, run / 2);
            bkv_cache c = cache_new(&cfg);
            float out[VALUE_DIM], want[VALUE_DIM];
            append_one_head(&c, &s, 0, N_TOKENS);
            for (size_t t = 0; t < QUERIES; t++) {
                OK(bkv_attend(&c, tensor_from(&s.q, t), out, 0, 1));
                OK(bkv_attend(&exact, tensor_from(&s.q, t), want, 0, 1));
                for (size_t i = 0; i < VALUE_DIM; i++)
                    error[run % 2] += pow((double)out[i] - (double)want[i], 2);
            }
            cache_free(&c);
        }
        printf("importance %10u: squared error %.4g, balanced %.4g\n", importances[m],
               error[0] / seeds, error[1] / seeds);
        CHECK(error[1] < 0.9 * error[0]);
    }
    cache_free(&exact);
    stream_free(&s);
}

/* ---- the refit: values of tokens that stay by chance, and nothing else, move ------------------ */

enum { REFIT_SINKS = 256, REFIT_BUDGET = REFIT_SINKS + 128, REFIT_TOKENS = REFIT_BUDGET + 5 * 64 };

/* Head 0 as rows of f32, in which every storage type is exact. Below 512 slots no row has a rest. */
typedef struct head_rows {
    float k[REFIT_BUDGET][DIM], v[REFIT_BUDGET][VALUE_DIM], mask[REFIT_BUDGET];
} head_rows;

static void export_head(bkv_cache *c, head_rows *to) {
    bkv_rows rows;
    memset(&rows, 0, sizeof rows);
    rows.k = to->k, rows.v = to->v, rows.mask = to->mask;
    rows.type = rows.mask_type = BKV_F32;
    rows.n_rows = REFIT_BUDGET;
    OK(bkv_export(c, 0, &rows));
}

/* A stream of one head, some of whose values are so large that their tokens stay for certain. Every
   29th token is pinned. */
static stream refit_stream(double size) {
    stream s = stream_new(REFIT_TOKENS, BKV_F32);
    for (size_t t = 0; t < s.n; t++)
        for (size_t i = 0; i < VALUE_DIM; i++)
            tensor_set(&s.v, t, 0, i, size * (t % 31 == 0 ? 1 : 0.03) * tensor_get(&s.v, t, 0, i));
    return s;
}

typedef struct refit_counts {
    unsigned certain, pinned, by_chance, moved;
    float largest; /* element of a value that has moved */
} refit_counts;

static int is_pin(size_t t) { return t % 29 == 0; }

/* Feeds a stream, and looks at every token after every halving. */
static refit_counts count_refits(const bkv_config *cfg, const stream *s) {
    static head_rows rows;
    static float k[REFIT_TOKENS][DIM], v[REFIT_TOKENS][VALUE_DIM]; /* as appended, or moved last */
    bkv_cache c = cache_new(cfg), one = cache_new(cfg);
    float out[VALUE_DIM], weight[REFIT_TOKENS], mass;
    refit_counts n = {0, 0, 0, 0, 0};
    for (size_t t = 0; t < s->n; t++) {
        OK(bkv_reset(&one));
        append_one_head(&one, s, t, 1);
        export_head(&one, &rows);
        memcpy(k[t], rows.k[0], sizeof k[t]), memcpy(v[t], rows.v[0], sizeof v[t]);
        weight[t] = 1;
    }
    for (size_t t = 0; t < s->n; t++) {
        uint64_t halvings = cache_stats(&c).halvings;
        bkv_tensor key = tensor_from(&s->k, t), value = tensor_from(&s->v, t);
        OK(bkv_append(&c, key, value, 1, is_pin(t) ? BKV_PIN : 0, 0, 1));
        OK(bkv_validate(&c));
        if (t % 4 == 0) OK(bkv_attend(&c, tensor_from(&s->q, t), out, 0, 1));
        for (size_t i = 0; i < VALUE_DIM; i++) CHECK(isfinite(out[i]));
        if (cache_stats(&c).halvings == halvings) continue;
        float now[REFIT_TOKENS] = {0};
        unsigned held = 0;
        mass = 0;
        for (uint32_t i = 0; i < cache_stats(&c).tokens_held; i++) {
            bkv_token_info info = cache_token(&c, 0, i);
            now[info.position] = info.weight;
            if (info.kind == BKV_KIND_PAGE && info.level) mass += info.weight;
        }
        CHECK(mass < 0.99f * (float)t); /* else weights would be scaled down */
        export_head(&c, &rows);
        for (size_t row = 0; row < REFIT_BUDGET; row++) {
            if (!isfinite(rows.mask[row])) continue;
            size_t i = 0;
            while (i <= t && memcmp(k[i], rows.k[row], sizeof k[i])) i++;
            CHECKF(i <= t && now[i] > 0, "row %zu has a key that no token has", row);
            if (i > t) continue;
            int moved = memcmp(v[i], rows.v[row], sizeof v[i]) != 0;
            int certain = now[i] <= weight[i];
            held++;
            CHECKF(!moved || !certain, "after %zu tokens: %zu stays for certain and moves", t, i);
            CHECK(certain || !is_pin(i));
            n.certain += certain && i >= REFIT_SINKS && i < t;
            n.pinned += is_pin(i) && i >= REFIT_SINKS && i < t;
            n.by_chance += !certain, n.moved += (unsigned)moved;
            for (size_t x = 0; x < VALUE_DIM; x++) {
                CHECK(isfinite(rows.v[row][x]));
                if (moved) n.largest = fmaxf(n.largest, fabsf(rows.v[row][x]));
            }
            memcpy(v[i], rows.v[row], sizeof v[i]);
        }
        memcpy(weight, now, sizeof weight);
        for (size_t i = t + 1; i < s->n; i++) weight[i] = 1;
        CHECK(held == cache_stats(&c).tokens_held);
    }
    cache_free(&c), cache_free(&one);
    return n;
}

static bkv_config refit_config(uint32_t kv_type) {
    bkv_config cfg = one_head(0, 0, 3);
    cfg.kv_type = kv_type;
    cfg.sinks = REFIT_SINKS, cfg.budget = REFIT_BUDGET;
    return cfg;
}

/* Values move only where keys or queries tell which tokens count, and there of nearly all that are
   not certain; count_refits() looks at keys and at those that are. */
static void values_move_by_chance(void) {
    static const uint32_t kinds[] = {0, BKV_NONE, 1, 2, 4, 5, 6, 7};
    stream s = refit_stream(4);
    uint32_t turn = 0;
    for (size_t t = 0; t < COUNT(storage_types); t++)
        for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
            for (size_t i = 0; i < (rule == BKV_RULE_SAMPLE ? COUNT(kinds) : 1); i++)
                for (size_t r = 0; r < COUNT(rounds); r++) {
                    if (test_quick() && turn++ % 5) continue;
                    bkv_config cfg = refit_config(storage_types[t]);
                    cfg.rule = rule, cfg.importance = kinds[i], cfg.rounds = rounds[r];
                    int known = kinds[i] == 0 || (kinds[i] != BKV_NONE && kinds[i] & 3);
                    int refits = known && rule == BKV_RULE_SAMPLE && rounds[r] != BKV_NONE;
                    refit_counts n = count_refits(&cfg, &s);
                    CHECKF(refits ? n.moved > 0.9 * n.by_chance : !n.moved,
                           "%s, rule %u, importance %u, rounds %u: %u of %u moved",
                           type_name(cfg.kv_type), rule, cfg.importance, cfg.rounds, n.moved,
                           n.by_chance);
                    if (rule == BKV_RULE_WINDOW) continue;
                    CHECK(n.by_chance > 100 && n.pinned > 30);
                    CHECKF(kinds[i] == BKV_NONE || n.certain > n.pinned + 4, "%u certain, %u pins",
                           n.certain, n.pinned);
                }
    stream_free(&s);
}

/* A value that a refit would make too large to be stored stays as it is. The same values, far from
   the limit, move. */
static void too_large_is_not_refitted(void) {
    for (size_t t = 0; t < COUNT(storage_types); t++) {
        uint32_t type = storage_types[t];
        double limit = type == BKV_F16 ? 65520 : ldexp(1, 50);
        refit_counts n[2];
        for (int large = 0; large < 2; large++) {
            stream s = stream_new(REFIT_TOKENS, BKV_F32);
            bkv_config cfg = refit_config(type);
            for (size_t i = 0; i < s.n; i++)
                for (size_t x = 0; x < VALUE_DIM; x++) {
                    double size = limit * (i % 2 ? 0.99 : 0.5) * (large ? 1 : ldexp(1, -12));
                    tensor_set(&s.v, i, 0, x, random_below(2) ? size : -size);
                }
            n[large] = count_refits(&cfg, &s);
            stream_free(&s);
        }
        printf("%s: of %u moved %u, near the limit of %u %u, to %g\n", type_name(type),
               n[0].by_chance, n[0].moved, n[1].by_chance, n[1].moved, (double)n[1].largest);
        CHECK(n[0].moved > 0.9 * n[0].by_chance);
        CHECK(n[1].moved > 20 && n[1].moved + 20 < n[1].by_chance);
        if (type >= BKV_I8) limit *= sqrt(32); /* it is one of turned rows */
        CHECK((double)n[1].largest < 1.01 * limit);
    }
}

/* ---- other promises -------------------------------------------------------------------------- */

static void reset_is_init(void) {
    stream s = stream_new(700, BKV_F32);
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++) {
        bkv_config cfg = config(rule, BKV_F16, 300);
        bkv_cache used = cache_new(&cfg), fresh = cache_new(&cfg);
        append(&used, &s, 0, 700);
        append(&fresh, &s, 0, 450);
        CHECK(!same_state(&used, &fresh));
        OK(bkv_reset(&used));
        OK(bkv_init(&fresh, &cfg, memset(fresh.mem, 0x11, fresh.bytes), fresh.bytes));
        CHECK(same_state(&used, &fresh));
        append(&used, &s, 0, 700);
        append(&fresh, &s, 0, 700);
        CHECK(same_state(&used, &fresh));
        cache_free(&used), cache_free(&fresh);
    }
    stream_free(&s);
}

/* A copy of the state is a branch: what one does is nothing to the other. */
static void branches(void) {
    stream s = stream_new(1000, BKV_F32), other = stream_new(1000, BKV_F32);
    bkv_config cfg = config(BKV_RULE_SAMPLE, BKV_F16, 300);
    bkv_cache trunk = cache_new(&cfg), twin = cache_new(&cfg), straight = cache_new(&cfg);
    append(&straight, &s, 0, 1000);
    append(&trunk, &s, 0, 500);
    memcpy(twin.mem, trunk.mem, trunk.state_bytes);
    OK(bkv_attach(&twin, twin.mem, twin.bytes, 0));
    append(&twin, &other, 500, 500);
    append(&trunk, &s, 500, 500);
    CHECK(same_state(&trunk, &straight));
    CHECK(!same_state(&twin, &straight));
    cache_free(&trunk), cache_free(&twin), cache_free(&straight);
    stream_free(&s), stream_free(&other);
}

/* How many of the tokens that two heads hold are not held by both; n_seen <= 1000. */
static unsigned differing(const bkv_cache *a, uint32_t head_a, const bkv_cache *b,
                          uint32_t head_b) {
    unsigned char held[1000] = {0};
    unsigned n = 0;
    for (uint32_t i = 0; i < cache_stats(a).tokens_held; i++)
        held[cache_token(a, head_a, i).position] = 1;
    for (uint32_t i = 0; i < cache_stats(b).tokens_held; i++)
        n += !held[cache_token(b, head_b, i).position];
    return n;
}

static void seeds(void) {
    stream s = stream_new(1000, BKV_F32);
    for (size_t t = 0; t < s.n; t++) /* head 1 sees what head 0 sees */
        for (size_t i = 0; i < DIM; i++) {
            tensor_set(&s.k, t, 1, i, tensor_get(&s.k, t, 0, i));
            if (i < VALUE_DIM) tensor_set(&s.v, t, 1, i, tensor_get(&s.v, t, 0, i));
        }
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++) {
        bkv_config cfg = config(rule, BKV_F16, 300);
        bkv_cache a = cache_new(&cfg), b = cache_new(&cfg);
        cfg.seed++;
        bkv_cache c = cache_new(&cfg);
        append(&a, &s, 0, s.n), append(&b, &s, 0, s.n), append(&c, &s, 0, s.n);
        CHECK(same_state(&a, &b));
        CHECK(!same_state(&a, &c));
        int random = rule != BKV_RULE_WINDOW;
        CHECKF((differing(&a, 0, &c, 0) > 0) == random, "rule %u: another seed", rule);
        CHECKF((differing(&a, 0, &a, 1) > 0) == random, "rule %u: another head", rule);
        cache_free(&a), cache_free(&b), cache_free(&c);
    }
    stream_free(&s);
}

/* Positions are only carried along: with the count of tokens seen moved on, as if the stream were
   longer than it is (beyond 2^32, too), every output stays as it was. The count is the first word
   of a head's state, little-endian (section 8 of the header). */
static void positions_do_not_matter(void) {
    static const uint64_t shifts[] = {1, 1000003, 0xFFFFFFFFu - 1200, 0x123456789ABCDEFu};
    enum { SPLIT = 500, N = 1000 };
    stream s = stream_new(N, BKV_F32);
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
        for (size_t i = 0; i < COUNT(shifts); i++) {
            bkv_config cfg = config(rule, BKV_F16, 300);
            bkv_cache a = cache_new(&cfg), b = cache_new(&cfg);
            append(&a, &s, 0, SPLIT), append(&b, &s, 0, SPLIT);
            for (uint32_t h = 0; h < N_KV; h++) {
                unsigned char *seen = b.mem + b.state_bytes - (N_KV - h) * b.head_bytes;
                for (int byte = 0; byte < 8; byte++)
                    seen[byte] = (unsigned char)((SPLIT + shifts[i]) >> 8 * byte);
            }
            CHECK(cache_stats(&b).tokens_seen == SPLIT + shifts[i]);
            for (size_t t = SPLIT; t < N; t += 50) {
                float out[2][ROW];
                append(&a, &s, t, 50), append(&b, &s, t, 50);
                OK(bkv_attend(&a, tensor_from(&s.q, t), out[0], 0, 1));
                OK(bkv_attend(&b, tensor_from(&s.q, t), out[1], 0, 1));
                CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0);
            }
            for (uint32_t n = 0; n < cache_stats(&a).tokens_held; n++) {
                bkv_token_info x = cache_token(&a, 1, n), y = cache_token(&b, 1, n);
                uint64_t moved = x.position < SPLIT ? 0 : shifts[i];
                CHECK(y.position == (uint32_t)(x.position + moved) && x.weight == y.weight);
            }
            cache_free(&a), cache_free(&b);
        }
    stream_free(&s);
}

/* Two caches of other shapes and types in turns: each is as if it were alone. */
static void two_caches(void) {
    enum { N = 600 };
    bkv_config narrow = config(BKV_RULE_SAMPLE, BKV_BF16, 300), wide = narrow;
    wide.head_dim = 96, wide.value_dim = 33, wide.kv_type = BKV_I8,
    wide.importance = BKV_IMPORTANCE_KEY;
    stream s = stream_new(N, BKV_F32),
           w = {N, tensor_random(N, N_KV, 96, BKV_F16), tensor_random(N, N_KV, 33, BKV_F16),
                tensor_random(1, N_KV * GROUP, 96, BKV_F16)};
    bkv_cache c[4] = {cache_new(&narrow), cache_new(&wide), cache_new(&narrow), cache_new(&wide)};
    append(&c[2], &s, 0, N);
    append(&c[3], &w, 0, N);
    for (size_t t = 0, n; t < N; t += n) {
        n = chunk_size(N - t);
        append(&c[t % 2], t % 2 ? &w : &s, t, n);
        append(&c[!(t % 2)], t % 2 ? &s : &w, t, n);
    }
    for (int i = 0; i < 2; i++) {
        float out[2][N_KV * GROUP * 33];
        memset(out, 0, sizeof out);
        CHECK(same_state(&c[i], &c[i + 2]));
        OK(bkv_attend(&c[i], i ? w.q.view : s.q.view, out[0], 0, 1));
        OK(bkv_attend(&c[i + 2], i ? w.q.view : s.q.view, out[1], 0, 1));
        CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0);
    }
    for (int i = 0; i < 4; i++) cache_free(&c[i]);
    stream_free(&s), stream_free(&w);
}

int main(int argc, char **argv) {
    TEST_MAIN(T(ways_to_feed), T(many_sinks), T(state_at_any_time), T(long_streams),
              T(any_importance_of_any_input), T(weights_on_average), T(certain_tokens_stay),
              T(denormals_on_every_backend), T(pinned_tokens_stay), T(odd_keys_stay),
              T(rounds_of_balancing_help), T(values_move_by_chance), T(too_large_is_not_refitted),
              T(reset_is_init), T(branches), T(seeds), T(positions_do_not_matter), T(two_caches));
}
