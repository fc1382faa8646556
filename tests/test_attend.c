/* Attention against its formula in double precision, over the keys and values as they are stored:
   exact until the budget is full, the weighted formula of the manual afterwards. */
#include "test.h"

#define BOUND 2e-5    /* docs/method.md, times the largest value */
/* The same for types of integers, against tokens that were not rounded: a quarter above the worst
   that was seen. A step of 4 bits is 18 times one of 8, of a lone token all of it shows. */
static const double integer_bounds[N_STORAGE] = {0, 0, 0, 2e-2, 0.24};

typedef struct stream {
    tensor k, v, q;
} stream;

static stream stream_of(const bkv_config *cfg, size_t n, uint32_t type, double q_deviation) {
    uint32_t value_dim = cfg->value_dim ? cfg->value_dim : cfg->head_dim;
    stream s = {tensor_random(n, cfg->n_kv_heads, cfg->head_dim, type),
                tensor_random(n, cfg->n_kv_heads, value_dim, type),
                tensor_new(1, cfg->n_q_heads, cfg->head_dim, type, DENSE, 0)};
    tensor_randomise(&s.q, q_deviation);
    return s;
}

static void stream_free(stream *s) { tensor_free(&s->k), tensor_free(&s->v), tensor_free(&s->q); }

static void append(bkv_cache *c, const stream *s, size_t from, size_t n) {
    OK(bkv_append(c, tensor_from(&s->k, from), tensor_from(&s->v, from), n, 0, 0, 1));
}

/* ---- the reference --------------------------------------------------------------------------- */

typedef struct errors {
    double out;   /* |out - reference|, largest, over the largest |v| of the head's kept tokens */
    double logit; /* largest |logit|: says how exact the logits can be in f32 */
    int exact;    /* 1: all tokens of the stream, each with weight 1 */
    double doubt[2 * 16]; /* of each query head: the estimate of its error */
} errors;

/* 1: values of tokens that went through a halving are not those of the stream any more. */
static int refits(const bkv_config *cfg) {
    return cfg->rule == BKV_RULE_SAMPLE && cfg->rounds != BKV_NONE && cfg->importance != BKV_NONE &&
           cfg->importance & (BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY);
}

/* Compares out with sum_i w_i e^(s_i) v_i / sum_i w_i e^(s_i) over the kept tokens of c, whose rows
   are those of the stream at their positions, but for values that were refitted: these are
   exported. `stored`: rounded to the type of the cache. */
static errors compare(bkv_cache *c, const stream *s, const float *out, int stored) {
    const bkv_config *cfg = &c->cfg;
    bkv_stats_info st = cache_stats(c);
    uint32_t n = st.tokens_held, group = cfg->n_q_heads / cfg->n_kv_heads;
    uint32_t paged = n > st.sinks ? n - st.sinks : 0, n_pages = (paged + 63) / 64;
    uint32_t fine = c->n_pages / 4 < 4 ? c->n_pages / 4 : 4; /* pages with rests */
    if (fine > c->window_pages + 1) fine = c->window_pages + 1;
    if (fine < 1 || cfg->kv_type != BKV_I4) fine = 1;
    uint32_t newest = n_pages > fine ? st.sinks + (n_pages - fine) * 64 : n ? n - paged : 0;
    errors e = {0, 0, n == st.tokens_seen, {0}};
    size_t d = cfg->head_dim, dv = cfg->value_dim;
    double *k = (double *)checked(malloc(n * d * sizeof *k));
    double *v = (double *)checked(malloc(n * dv * sizeof *v));
    double *p = (double *)checked(malloc(n * sizeof *p)),
           *w = (double *)checked(malloc(n * sizeof *w));
    float *exported = new_floats(c->slots * dv);
    for (uint32_t head = 0; head < cfg->n_kv_heads; head++) {
        double largest = 0;
        bkvi_head state = bkvi_head_get(c, head, 0);
        bkv_rows rows;
        memset(&rows, 0, sizeof rows);
        rows.v = exported, rows.type = BKV_F32, rows.n_rows = c->slots;
        if (refits(cfg)) OK(bkv_export(c, head, &rows));
        for (uint32_t i = 0; i < n; i++) {
            bkv_token_info t = cache_token(c, head, i);
            w[i] = (double)t.weight;
            e.exact &= t.position == i && t.weight == 1;
            for (size_t j = 0; j < d; j++) k[i * d + j] = tensor_get(&s->k, t.position, head, j);
            for (size_t j = 0; j < dv; j++) v[i * dv + j] = tensor_get(&s->v, t.position, head, j);
            int with_rest = cfg->budget >= 512 && ((t.kind == BKV_KIND_SINK && i < 16) || i >= newest);
            if (stored) round_row(k + i * d, d, cfg->kv_type, 0, with_rest);
            if (stored) round_row(v + i * dv, dv, cfg->kv_type, 1, with_rest);
            for (size_t j = 0; j < dv && t.level && refits(cfg); j++)
                v[i * dv + j] = (double)exported[bkvi_slot_of(&state, i) * dv + j];
            for (size_t j = 0; j < dv; j++) largest = fmax(largest, fabs(v[i * dv + j]));
        }
        for (uint32_t h = head * group; h < (head + 1) * group; h++) {
            double max = -INFINITY, sum = 0;
            for (uint32_t i = 0; i < n; i++) {
                double x = 0, cap = (double)cfg->softcap;
                for (size_t j = 0; j < d; j++) x += tensor_get(&s->q, 0, h, j) * k[i * d + j];
                x *= (double)cfg->scale;
                p[i] = cap > 0 ? cap * tanh(x / cap) : x;
                max = fmax(max, p[i]);
                e.logit = fmax(e.logit, fabs(p[i]));
            }
            for (uint32_t i = 0; i < n; i++) sum += p[i] = w[i] * exp(p[i] - max);
            double variance = 0, square = 0;
            for (size_t j = 0; j < dv; j++) {
                double want = 0, got = (double)out[h * dv + j];
                for (uint32_t i = 0; i < n; i++) want += p[i] * v[i * dv + j];
                want /= sum;
                square += want * want;
                for (uint32_t i = 0; i < n; i++)
                    variance += pow(p[i] / sum * (v[i * dv + j] - want), 2) * (1 - 1 / w[i]);
                CHECKF(isfinite(got), "%g", got);
                if (largest > 0)
                    e.out = fmax(e.out, fabs(got - want) / largest);
                else
                    CHECK(got == 0);
            }
            e.doubt[h] = sqrt(variance / square);
        }
    }
    free(k), free(v), free(p), free(w), free(exported);
    return e;
}

/* attend() and attend_partial() of the cache as it is now. */
static errors attend_and_compare(bkv_cache *c, const stream *s) {
    size_t n_q = c->cfg.n_q_heads, dv = c->cfg.value_dim;
    float *out = new_floats(n_q * dv), *part = new_floats(n_q * dv);
    float *max = new_floats(n_q), *sum = new_floats(n_q);
    OK(bkv_attend(c, s->q.view, out, 0, 1));
    OK(bkv_attend_partial(c, s->q.view, part, max, sum, 0, 1));
    for (size_t i = 0; i < n_q * dv; i++) {
        double whole = (double)out[i], merged = (double)part[i] / (double)sum[i / dv];
        CHECKF(fabs(merged - whole) <= 1e-6 * fabs(whole) + 1e-44, "%.9g, not %.9g", merged, whole);
        CHECK(sum[i / dv] >= 1);
    }
    errors e = compare(c, s, out, 1);
    free(out), free(part), free(max), free(sum);
    return e;
}

/* ---- 2^x ------------------------------------------------------------------------------------- */

/* Two tokens of dimension 1: logit 0 with value 0, and logit q with value 1. The partial output is
   then the library's 2^x itself, x = q log2(e) rounded to float. */
static void powers_of_two(void) {
    static const float key[] = {0, 1}, value[] = {0, 1};
    const int n = test_quick() ? 4000 : 200000;
    bkv_config cfg = bkv_config_default(1, 1, 1, 208);
    cfg.kv_type = BKV_F32;
    cfg.scale = 1;
    bkv_cache c = cache_new(&cfg);
    OK(bkv_append(&c, bkv_dense(key, BKV_F32), bkv_dense(value, BKV_F32), 2, 0, 0, 1));
    double worst = 0;
    for (int i = 0; i <= 2 * n; i++) { /* all of the range, then one octave and a half finely */
        const float q = i < n ? -86.0f * (float)i / (float)n : -1.1f * (float)(i - n) / (float)n;
        const volatile float x = q * 1.44269504088896341f;
        float out, max, sum;
        OK(bkv_attend_partial(&c, bkv_dense(&q, BKV_F32), &out, &max, &sum, 0, 1));
        const double exact = exp2((double)x);
        worst = fmax(worst, fabs((double)out - exact) / ldexp(1, ilogb(exact) - 23));
    }
    CHECKF(worst <= 1, "2^x is off by %.3f ulp", worst);
    for (float q = -87; q >= -2000; q *= 1.5f) { /* x < -125 */
        float out, max, sum;
        OK(bkv_attend_partial(&c, bkv_dense(&q, BKV_F32), &out, &max, &sum, 0, 1));
        CHECK(out == 0 && max == 0 && sum == 1);
    }
    printf("2^x: at most %.3f ulp off\n", worst);
    cache_free(&c);
}

/* ---- logits of every size -------------------------------------------------------------------- */

static void check_stream(bkv_config cfg, uint32_t in_type, double q_deviation, const size_t *at,
                         size_t n_at) {
    bkv_cache c = cache_new(&cfg);
    stream s = stream_of(&cfg, at[n_at - 1], in_type, q_deviation);
    double worst = 0;
    for (size_t i = 0, seen = 0; i < n_at; seen = at[i++]) {
        append(&c, &s, seen, at[i] - seen);
        errors e = attend_and_compare(&c, &s);
        worst = fmax(worst, e.out);
        CHECKF(e.logit <= 30, "the test's own logits: %g", e.logit);
        CHECKF(e.out <= BOUND, "error %.3g at %zu: d %u, %u, %s from %s, group %u, rule %u, cap %g",
               e.out, at[i], cfg.head_dim, cfg.value_dim, type_name(c.cfg.kv_type),
               type_name(in_type), cfg.n_q_heads / cfg.n_kv_heads, cfg.rule, (double)cfg.softcap);
        CHECK(e.exact == (at[i] <= c.slots));
    }
    stream_free(&s);
    cache_free(&c);
}

static bkv_config config(uint32_t group, uint32_t d, uint32_t dv, uint32_t kv_type,
                         uint32_t budget) {
    bkv_config cfg = bkv_config_default(2 * group, 2, d, budget);
    cfg.value_dim = dv;
    cfg.kv_type = kv_type;
    return cfg;
}

static void exact_until_full(void) {
    static const uint32_t dims[][2] = {{1, 1},   {7, 3},    {16, 40}, {64, 64},
                                       {80, 80}, {128, 96}, {200, 17}};
    static const uint32_t groups[] = {1, 2, 3, 4, 7, 8, 16};
    static const float caps[] = {1, 5, 30, 50, 100};
    static const size_t at[] = {1, 2, 15, 16, 17, 80, 81, 160, 336};
    uint32_t n = 0;
    for (size_t i = 0; i < COUNT(dims); i++)
        for (size_t t = 0; t < COUNT(storage_types); t++)
            for (int form = 0; form < 4; form++, n++) { /* plain; scale; softcap; both */
                uint32_t group = groups[n % COUNT(groups)];
                bkv_config cfg = config(group, dims[i][0], dims[i][1], storage_types[t],
                                        form % 2 ? 528 : 336);
                if (form & 1) cfg.scale = 0.5f / sqrtf((float)cfg.head_dim);
                if (form & 2) cfg.softcap = caps[n / 2 % COUNT(caps)];
                if (!test_quick() || n % 7 == 0)
                    check_stream(cfg, test_types[(t + n) % 3], 2.4, at, COUNT(at));
            }
}

static void weighted_after_halving(void) {
    static const size_t at[] = {272, 273, 400, 700, 1100};
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
        for (uint32_t seed = 0; seed < (test_quick() ? 1 : 3); seed++) {
            uint32_t type = storage_types[(rule + 2 * seed) % N_STORAGE];
            bkv_config cfg = config(1 + seed, 32 + 13 * seed, 40, type, type >= BKV_I8 ? 528 : 272);
            cfg.rule = rule;
            cfg.seed = seed;
            cfg.softcap = seed == 2 ? 20.0f : 0;
            check_stream(cfg, test_types[(rule + 2 * seed) % 3], 4, at, COUNT(at));
        }
}

static float error_of(const bkv_cache *c, uint32_t head) {
    float error = -1;
    OK(bkv_error(c, head, &error));
    return error;
}

/* The running mean of one query head's estimate, in turns, whenever the newest page is full. */
static void errors_are_estimated(void) {
    static const uint32_t groups[] = {1, 3, 7, 16};
    for (size_t n = 0; n < N_STORAGE * COUNT(groups); n++) {
        uint32_t group = groups[n / N_STORAGE], type = storage_types[n % N_STORAGE];
        /* Of 4 bits whole rows: what their coarse steps leave in the padding counts, too. */
        uint32_t dv = integer_bits(type) == 4 ? 64 : 40;
        bkv_config cfg = config(group, 24, dv, type, 208);
        if (n % 3 == 0) cfg.softcap = 5;
        cfg.window = BKV_NONE;
        cfg.rule = n == 5 ? BKV_RULE_WINDOW : BKV_RULE_SAMPLE;
        bkv_cache c = cache_new(&cfg);
        stream s = stream_of(&cfg, 1500, BKV_F32, 1.5);
        double want[2] = {0, 0};
        float *out = new_floats(2 * group * dv);
        for (size_t seen = cache_stats(&c).sinks; seen + 64 <= 1500; seen += 64) {
            size_t from = cache_stats(&c).tokens_seen;
            append(&c, &s, from, seen - from + 30);
            OK(bkv_attend(&c, s.q.view, out, 0, 1));
            CHECK(fabs((double)error_of(&c, 0) - want[0]) <= 1e-4 * want[0]);
            append(&c, &s, seen + 30, 34);
            OK(bkv_attend(&c, s.q.view, out, 0, 1));
            errors e = compare(&c, &s, out, 1);
            bkv_stats_info st = cache_stats(&c);
            for (uint32_t h = 0; h < 2; h++) {
                double x = e.doubt[h * group + st.halvings / 2 % group];
                want[h] += st.halvings ? (x - want[h]) * (want[h] > 0 ? 1.0 / 16 : 1) : 0;
                CHECKF(fabs((double)error_of(&c, h) - want[h]) <= 1e-4 * want[h],
                       "%s, group %u, seen %zu, head %u: %.6g, not %.6g", type_name(cfg.kv_type),
                       group, seen + 64, h, (double)error_of(&c, h), want[h]);
            }
            CHECK(fabs((double)st.error - (want[0] + want[1]) / 2) <= 1e-4 * (double)st.error);
        }
        for (uint32_t h = 0; h < 2; h++)
            CHECK(cfg.rule == BKV_RULE_WINDOW ? error_of(&c, h) == 0 : error_of(&c, h) > 0.01f);
        CHECK(bkv_reset(&c) == BKV_OK && error_of(&c, 0) == 0);
        free(out);
        stream_free(&s);
        cache_free(&c);
    }
}

static void integers_round_little(void) {
    static const uint32_t dims[] = {16, 33, 64, 80, 96, 128, 256};
    static const size_t at[] = {1, 17, 100, 336};
    for (size_t t = 0; t < N_STORAGE; t++) {
        double worst = 0;
        for (size_t i = 0; i < 3 * COUNT(dims) && integer_bounds[t] > 0; i++) {
            const uint32_t dim = dims[i / 3];
            bkv_config cfg = config(4, dim, dim, storage_types[t], i % 3 == 1 ? 528 : 336);
            bkv_cache c = cache_new(&cfg);
            stream s = stream_of(&cfg, 336, BKV_F32, 2.4);
            float *out = new_floats(8 * dim);
            for (size_t j = 0, seen = 0; j < COUNT(at); seen = at[j++]) {
                append(&c, &s, seen, at[j] - seen);
                OK(bkv_attend(&c, s.q.view, out, 0, 1));
                worst = fmax(worst, compare(&c, &s, out, 0).out);
            }
            free(out);
            stream_free(&s);
            cache_free(&c);
        }
        if (integer_bounds[t] > 0)
            printf("%s: at most %.3g of the largest value off\n", type_name(storage_types[t]),
                   worst);
        CHECKF(worst <= integer_bounds[t], "%.3g", worst);
    }
}

/* Caches that share a stream out among them give, merged, the attention of one over all of it. */
static void partials_merge(void) {
    enum { N_Q = 6, DIM = 48, N = 300 };
    for (size_t split = 1; split < N; split += 59) {
        bkv_config cfg = config(3, DIM, DIM, BKV_F16, 336);
        bkv_cache one = cache_new(&cfg), part[2] = {cache_new(&cfg), cache_new(&cfg)};
        stream s = stream_of(&cfg, N, BKV_F32, 5);
        static float want[N_Q * DIM], out[2][N_Q * DIM], max[2][N_Q], sum[2][N_Q];
        append(&one, &s, 0, N);
        append(&part[0], &s, 0, split);
        append(&part[1], &s, split, N - split);
        OK(bkv_attend(&one, s.q.view, want, 0, 1));
        for (int i = 0; i < 2; i++)
            OK(bkv_attend_partial(&part[i], s.q.view, out[i], max[i], sum[i], 0, 1));
        for (size_t h = 0; h < N_Q; h++) {
            double top = fmax((double)max[0][h], (double)max[1][h]);
            double a = exp((double)max[0][h] - top), b = exp((double)max[1][h] - top);
            double total = a * (double)sum[0][h] + b * (double)sum[1][h];
            for (size_t i = h * DIM; i < (h + 1) * DIM; i++) {
                double merged = (a * (double)out[0][i] + b * (double)out[1][i]) / total;
                CHECKF(fabs(merged - (double)want[i]) <= 1e-5, "%.9g, not %.9g", merged,
                       (double)want[i]);
            }
        }
        stream_free(&s);
        cache_free(&one), cache_free(&part[0]), cache_free(&part[1]);
    }
}

/* A part of which all is minus infinity: of a cache of nothing, and beside one far above. */
static void parts_without_mass(void) {
    enum { DIM = 16, N = 40 };
    bkv_config cfg = config(1, DIM, DIM, BKV_F32, 208);
    bkv_cache c = cache_new(&cfg), low = cache_new(&cfg);
    stream s = stream_of(&cfg, N, BKV_F32, 1);
    static float out[2][2 * DIM], max[2][2], sum[2][2], mask[208], k[208 * DIM];
    bkv_rows rows;
    memset(&rows, 0, sizeof rows);
    rows.k = k, rows.mask = mask, rows.n_rows = 208, rows.type = rows.mask_type = BKV_F32;
    OK(bkv_export(&c, 0, &rows));
    for (size_t i = 0; i < 208; i++) CHECK(mask[i] == -INFINITY && k[i * DIM] == 0);
    RESULT(bkv_attend_partial(&c, s.q.view, out[0], max[0], sum[0], 0, 1), BKV_E_EMPTY);
    append(&c, &s, 0, N);
    for (size_t i = 0; i < DIM; i++)
        for (size_t h = 0; h < cfg.n_q_heads; h++) tensor_set(&s.q, 0, h, i, 1);
    for (size_t t = 0; t < N; t++)
        for (size_t h = 0; h < cfg.n_kv_heads; h++)
            for (size_t i = 0; i < DIM; i++) tensor_set(&s.k, t, h, i, -1e16);
    append(&low, &s, 0, N);
    OK(bkv_attend_partial(&c, s.q.view, out[0], max[0], sum[0], 0, 1));
    OK(bkv_attend_partial(&low, s.q.view, out[1], max[1], sum[1], 0, 1));
    for (size_t h = 0; h < cfg.n_q_heads; h++) { /* finite, and the merge leaves it out */
        CHECK(max[1][h] < -1e16f && max[1][h] > -INFINITY && sum[1][h] >= 1);
        CHECK(exp((double)max[1][h] - (double)max[0][h]) == 0);
        for (size_t i = 0; i < DIM; i++) CHECK(isfinite(out[1][h * DIM + i]));
    }
    stream_free(&s);
    cache_free(&c), cache_free(&low);
}

/* ---- extremes -------------------------------------------------------------------------------- */

enum { SAME_KEYS, VERY_NEGATIVE, LARGE, ONE_HUGE, DENORMALS, LARGEST, ZERO_VALUES };
enum { ALTERNATING = ZERO_VALUES + 1, ALL_MASS, SORTED, N_EXTREMES };

static const char *const extreme_names[N_EXTREMES] = {
    "same keys", "very negative", "large",       "one huge",         "denormals",
    "largest",   "zero values",   "alternating", "all mass on one", "sorted by similarity"};

/* Small whole numbers where the logits are large: their products are exact in f32. */
static void make_extreme(const stream *s, int kind) {
    for (size_t t = 0; t < s->k.n_tokens; t++)
        for (size_t h = 0; h < s->k.n_heads; h++)
            for (size_t i = 0; i < s->k.dim; i++) {
                double k = tensor_get(&s->k, t, h, i), v = tensor_get(&s->v, t, h, i);
                double sign = random_below(2) ? 1 : -1;
                int tiny = s->v.view.type == BKV_F16 ? -20 : -130;
                switch (kind) {
                case SAME_KEYS: k = 0.5; break;
                case VERY_NEGATIVE: k = i ? 0 : -10000.0 + random_below(4); break;
                case LARGE: k = sign * 10000; break;
                case ONE_HUGE: k = t == 100 ? 30000 : k; break;
                case DENORMALS: k = ldexp(k, tiny), v = ldexp(v, tiny); break;
                case LARGEST: k = sign * ldexp(1.9, 54), v = sign * ldexp(1.9, 54); break;
                case ALTERNATING: k = v = t % 2 ? 10000 : -10000; break;
                case ALL_MASS: k = t == 5 ? 60 : 0; break; /* a sink: it stays */
                case SORTED: k = (double)t / (double)s->k.n_tokens + (i ? 0 : 1); break;
                default: v = 0;
                }
                tensor_set(&s->k, t, h, i, k);
                tensor_set(&s->v, t, h, i, v);
            }
    for (size_t h = 0; h < s->q.n_heads; h++)
        for (size_t i = 0; i < s->q.dim; i++)
            if (kind == VERY_NEGATIVE || kind == ONE_HUGE || kind == ALL_MASS)
                tensor_set(&s->q, 0, h, i, 1);
            else if (kind == LARGE)
                tensor_set(&s->q, 0, h, i, (double)random_below(7) - 3);
            else if (kind == LARGEST)
                tensor_set(&s->q, 0, h, i, ldexp(1.9, 54));
}

/* Logits of size L are only known to about L * 2^-22, and so is the output: beside
   softmax in double over what the cache holds it is off by that and 2e-5 of the largest value. */
static void extremes(void) {
    for (int kind = 0; kind < N_EXTREMES; kind++)
        for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++)
            for (size_t t = 0; t < COUNT(storage_types); t++) {
                bkv_config cfg = config(2, 24, 24, storage_types[t], 208);
                cfg.rule = rule;
                cfg.importance = kind % 3 == 0 ? BKV_IMPORTANCE_KEY : kind % 3 == 1 ? 7 : 0;
                cfg.scale = 1;
                if (kind == LARGEST && cfg.kv_type == BKV_F16) /* such numbers are refused there */
                    continue;
                bkv_cache c = cache_new(&cfg);
                stream s = stream_of(&cfg, 600, t < 3 ? test_types[t] : (uint32_t)BKV_F32, 1);
                make_extreme(&s, kind);
                for (size_t seen = 0; seen < 600; seen += 200) {
                    append(&c, &s, seen, 200);
                    errors e = attend_and_compare(&c, &s);
                    CHECKF(e.out <= BOUND + e.logit * ldexp(1, -22) || kind == LARGEST,
                           "%s, rule %u, %s: %.3g with logits up to %.3g", extreme_names[kind],
                           rule, type_name(cfg.kv_type), e.out, e.logit);
                }
                bkv_stats_info st = cache_stats(&c);
                CHECK(isfinite(st.max_weight) && st.max_weight <= 600);
                stream_free(&s);
                cache_free(&c);
            }
}

/* ---- what a larger budget buys --------------------------------------------------------------- */

/* Keys and values scattered around a few centres that come and go, as topics do in a text. */
static void make_topics(const stream *s) {
    enum { TOPICS = 8 };
    size_t d = s->k.dim;
    double *centre = (double *)checked(malloc(2 * TOPICS * d * sizeof *centre));
    for (size_t i = 0; i < 2 * TOPICS * d; i++) centre[i] = random_normal();
    for (size_t h = 0; h < s->k.n_heads; h++)
        for (size_t t = 0, topic = 0; t < s->k.n_tokens; t++) {
            if (random_below(20) == 0) topic = random_below(TOPICS);
            for (size_t i = 0; i < d; i++) {
                const double *at = centre + 2 * topic * d + 2 * i;
                tensor_set(&s->k, t, h, i, at[0] + 0.5 * random_normal());
                tensor_set(&s->v, t, h, i, at[1] + 0.5 * random_normal());
            }
        }
    free(centre);
}

static void larger_budgets_err_less(void) {
    enum { SEEDS = 4, BUDGETS = 4, N = 2048, N_Q = 8, DIM = 32 };
    static const uint32_t budgets[BUDGETS] = {208, 464, 976, N};
    double error[BUDGETS] = {0};
    for (uint32_t seed = 0; seed < SEEDS; seed++) {
        static float out[BUDGETS][N_Q * DIM];
        bkv_config cfg = config(N_Q / 2, DIM, DIM, BKV_F32, N);
        stream s = stream_of(&cfg, N, BKV_F32, 1);
        make_topics(&s);
        for (int b = BUDGETS; b-- > 0;) { /* the last holds all tokens: the truth */
            cfg = config(N_Q / 2, DIM, DIM, BKV_F32, budgets[b]);
            cfg.rule = BKV_RULE_SAMPLE;
            cfg.seed = seed;
            bkv_cache c = cache_new(&cfg);
            append(&c, &s, 0, N);
            OK(bkv_attend(&c, s.q.view, out[b], 0, 1));
            for (size_t i = 0; i < N_Q * DIM; i++)
                error[b] += fabs((double)out[b][i] - (double)out[BUDGETS - 1][i]) / SEEDS;
            cache_free(&c);
        }
        stream_free(&s);
    }
    for (int b = 0; b + 1 < BUDGETS; b++)
        CHECKF(error[b] > error[b + 1], "budget %u: %g, budget %u: %g", budgets[b], error[b],
               budgets[b + 1], error[b + 1]);
}

int main(int argc, char **argv) {
    TEST_MAIN(T(powers_of_two), T(exact_until_full), T(weighted_after_halving),
              T(errors_are_estimated), T(integers_round_little), T(partials_merge),
              T(parts_without_mass), T(extremes), T(larger_budgets_err_less));
}
