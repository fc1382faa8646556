/* Trust: what is rolled back, shrunk, saved, moved or handed over is what it should be, and nothing
   that is broken gets in. BKV_LONG=1 runs the numbers that README names. Built with
   BALANCEKV_KV_TYPE and BALANCEKV_HEAD_DIM, `exported_rows` tests a copy of one shape. */
#include "test.h"

enum { N_KV = 2, GROUP = 2, N_Q = N_KV * GROUP, BUDGET = 272, REST_BUDGET = BKVI_FEW + 16 };
#ifdef BALANCEKV_HEAD_DIM
enum { DIM = BALANCEKV_HEAD_DIM, VALUE_DIM = BALANCEKV_HEAD_DIM };
#else
enum { DIM = 10, VALUE_DIM = 18 };
#endif

/* What there is to store in: integers without rests, and with. */
static const struct {
    uint32_t kv_type, budget;
} kinds[] = {
#ifdef BALANCEKV_KV_TYPE
    {BALANCEKV_KV_TYPE, BUDGET}
#else
    {BKV_F32, BUDGET}, {BKV_F16, BUDGET},     {BKV_BF16, BUDGET}, {BKV_I4, REST_BUDGET},
    {BKV_I8, BUDGET},  {BKV_I8, REST_BUDGET}, {BKV_I4, BUDGET}
#endif
};

/* How many of what a test makes, which it says; more() is the condition of its loop. */
static unsigned amount(unsigned normal, unsigned in_readme, const char *what) {
    unsigned n = test_quick() ? normal / 10 + 1 : getenv("BKV_LONG") ? in_readme : normal;
    printf("%u %s\n", n, what);
    return n;
}
static int more(unsigned round, unsigned n) {
    if (n >= 10 && round % (n / 10) == 0 && getenv("BKV_LONG")) {
        printf("  %u of %u\n", round, n);
        fflush(stdout);
    }
    return round < n;
}

static bkv_config config(uint32_t kv_type) {
    bkv_config cfg = bkv_config_default(N_Q, N_KV, DIM, BUDGET);
    cfg.value_dim = VALUE_DIM;
    cfg.kv_type = kv_type;
    cfg.seed = 11;
    return cfg;
}
static bkv_config config_of(size_t i) {
    bkv_config cfg = config(kinds[i % COUNT(kinds)].kv_type);
    cfg.budget = kinds[i % COUNT(kinds)].budget;
    return cfg;
}

/* A long stream that every test reads from. */
enum { LENGTH = 4096 };
typedef struct stream {
    tensor k, v, q;
} stream;
static stream stream_new(void) {
    stream s = {tensor_random(LENGTH, N_KV, DIM, BKV_F32),
                tensor_random(LENGTH, N_KV, VALUE_DIM, BKV_F32),
                tensor_random(LENGTH, N_Q, DIM, BKV_F32)};
    return s;
}
static void stream_free(stream *s) { tensor_free(&s->k), tensor_free(&s->v), tensor_free(&s->q); }

static void append(bkv_cache *c, const stream *s, size_t at, size_t n, uint32_t flags) {
    OK(bkv_append(c, tensor_from(&s->k, at % LENGTH), tensor_from(&s->v, at % LENGTH), n, flags, 0,
                  1));
}
static void attend(bkv_cache *c, const stream *s, size_t at, float *out) {
    OK(bkv_attend(c, tensor_from(&s->q, at % LENGTH), out, 0, 1));
}
static void prefill(bkv_cache *c, const stream *s, size_t at, size_t n, uint32_t flags,
                    float *out) {
    at %= LENGTH;
    OK(bkv_prefill(c, tensor_from(&s->k, at), tensor_from(&s->v, at), tensor_from(&s->q, at), out,
                   n, flags, 0, 1));
}

static bkv_cache copy_of(const bkv_cache *c) {
    bkv_cache copy = *c;
    copy.mem = (unsigned char *)checked(malloc(c->bytes));
    memcpy(copy.mem, c->mem, c->state_bytes);
    return copy;
}

/* Tokens now, then queries and tokens together for a while: the outputs and the state. */
static void go_on(bkv_cache *c, const stream *s, size_t at, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) {
        append(c, s, at + t, 1, 0);
        attend(c, s, at + t, out);
    }
}

static void rejected_drafts_leave_no_trace(void) {
    enum { MOST = 8 };
    stream s = stream_new();
    unsigned rounds = amount(7500, 100000, "sequences of drafts") / (unsigned)COUNT(kinds);
    for (size_t i = 0; i < COUNT(kinds); i++) {
        bkv_config cfg = config_of(i);
        bkv_cache tried = cache_new(&cfg), never = cache_new(&cfg);
        float *out = new_floats(MOST * N_Q * VALUE_DIM), *same = new_floats(N_Q * VALUE_DIM);
        size_t seen = 0;
        for (unsigned round = 0; more(round, rounds); round++) {
            uint32_t room, drafts, kept;
            while ((room = cache_stats(&tried).room) == 0 || random_below(4) == 0) {
                go_on(&tried, &s, seen, 1, out);
                go_on(&never, &s, seen, 1, same);
                CHECK(!memcmp(out, same, N_Q * VALUE_DIM * sizeof *out));
                seen++;
            }
            const size_t at = seen % (LENGTH - MOST);
            drafts = 1 + random_below(room < MOST ? room : MOST);
            kept = random_below(drafts + 1);
            if (random_below(2)) {
                prefill(&tried, &s, at, drafts, BKV_DRAFT, out);
            } else {
                for (uint32_t t = 0; t < drafts; t++) {
                    append(&tried, &s, at + t, 1, BKV_DRAFT);
                    attend(&tried, &s, at + t, out);
                }
            }
            OK(bkv_truncate(&tried, seen + kept));
            if (kept) append(&never, &s, at, kept, BKV_DRAFT);
            seen += kept;
            if (seen) {
                attend(&tried, &s, at + MOST, out);
                attend(&never, &s, at + MOST, same);
                CHECK(!memcmp(out, same, N_Q * VALUE_DIM * sizeof *out));
            }
            CHECKF(same_state(&tried, &never), "round %u", round);
        }
        OK(bkv_validate(&tried));
        CHECK(test_quick() || cache_stats(&tried).halvings > 20);
        free(out), free(same), cache_free(&tried), cache_free(&never);
    }
    stream_free(&s);
}

/* While the newest tokens are drafts attention changes nothing; the next token accepts them. */
static void drafts_teach_once_accepted(void) {
    stream s = stream_new();
    bkv_config cfg = config(BKV_F16);
    bkv_cache c = cache_new(&cfg), before;
    float out[N_Q * VALUE_DIM];
    append(&c, &s, 0, 20, 0);
    append(&c, &s, 20, 3, BKV_DRAFT);
    before = copy_of(&c);
    attend(&c, &s, 22, out);
    CHECK(same_state(&c, &before));
    append(&c, &s, 23, 1, 0);
    memcpy(before.mem, c.mem, c.state_bytes);
    attend(&c, &s, 23, out);
    CHECK(!same_state(&c, &before));
    cache_free(&c), cache_free(&before);
    stream_free(&s);
}

static void rollback_before_any_halving_and_its_limits(void) {
    stream s = stream_new();
    bkv_config cfg = config(BKV_F16);
    bkv_cache c = cache_new(&cfg), small = cache_new(&cfg), before;
    append(&c, &s, 0, BUDGET, 0);
    for (size_t n = BUDGET; n-- > 0;) {
        OK(bkv_truncate(&c, n));
        OK(bkv_validate(&c));
        if (n % 37) continue;
        OK(bkv_reset(&small));
        if (n) append(&small, &s, 0, n, 0);
        CHECKF(same_state(&c, &small), "%zu tokens", n);
    }
    RESULT(bkv_truncate(&c, 1), BKV_E_ROLLBACK);
    RESULT(bkv_truncate(NULL, 0), BKV_E_NULL);
    append(&c, &s, 0, BUDGET + 5, 0);
    CHECK(cache_stats(&c).room == 64 - 5);
    before = copy_of(&c);
    RESULT(bkv_truncate(&c, BUDGET), BKV_E_ROLLBACK);
    RESULT(bkv_truncate(&c, BUDGET + 6), BKV_E_ROLLBACK);
    CHECK(same_state(&c, &before));
    OK(bkv_truncate(&c, BUDGET + 1));
    RESULT(bkv_truncate(&c, BUDGET), BKV_E_ROLLBACK);
    cache_free(&c), cache_free(&small), cache_free(&before);
    stream_free(&s);
}

static void shrinks_in_place(void) {
    stream s = stream_new();
    float out[N_Q * VALUE_DIM];
    unsigned rounds = amount(200, 2000, "caches shrunk");
    for (unsigned round = 0; more(round, rounds); round++) {
        bkv_config cfg = config_of(round);
        cfg.budget = 400 + random_below(800);
        cfg.window = round % 5 == 0 ? BKV_NONE : 0;
        int few_pages = cfg.kv_type == BKV_I4 && round % 2; /* fewer than had rests are left */
        if (few_pages) cfg.budget += 1000, cfg.sinks = 336;
        size_t n = few_pages ? 500 + random_below(363) : 1 + random_below(2000);
        bkv_cache c = cache_new(&cfg), before;
        if (few_pages) /* queries would have seen more rests, and taught it */
            append(&c, &s, 0, n, 0);
        else
            go_on(&c, &s, 0, n, out);
        bkv_stats_info was = cache_stats(&c), is;
        uint32_t budget = few_pages ? 864 + random_below(200) : 208 + random_below(cfg.budget - 208);
        OK(bkv_shrink(&c, budget));
        is = cache_stats(&c);
        OK(bkv_validate(&c));
        CHECKF(is.slots <= budget && is.slots + 64 > budget && is.bytes <= was.bytes,
               "%u slots of %u", is.slots, budget);
        CHECK(bkv_size(&c.cfg) == is.bytes && is.tokens_seen == n);
        /* Then it is the cache that was always small, but for queries that saw rests. */
        if (was.tokens_held <= is.slots &&
            (cfg.kv_type < BKV_I8 || (was.slots < BKVI_FEW) == (is.slots < BKVI_FEW))) {
            bkv_config small = c.cfg;
            small.backend = 0;
            bkv_cache other = cache_new(&small);
            if (few_pages)
                append(&other, &s, 0, n, 0);
            else
                go_on(&other, &s, 0, n, out);
            CHECK(same_state(&c, &other));
            cache_free(&other);
        }
        for (uint32_t i = 0; i < is.window && i < n; i++) /* the newest are all there, exactly */
            CHECK(cache_token(&c, 1, is.tokens_held - 1 - i).position == n - 1 - i);
        go_on(&c, &s, n, 300, out);
        OK(bkv_validate(&c));
        before = copy_of(&c);
        RESULT(bkv_shrink(&c, c.cfg.budget + 1), BKV_E_BUDGET);
        RESULT(bkv_shrink(&c, 64), BKV_E_BUDGET);
        OK(bkv_shrink(&c, c.cfg.budget));
        CHECK(same_state(&c, &before));
        cache_free(&c), cache_free(&before);
    }
    RESULT(bkv_shrink(NULL, 64), BKV_E_NULL);
    stream_free(&s);
}

static void saved_states_go_on_bit_for_bit(void) {
    stream s = stream_new();
    float out[2][N_Q * VALUE_DIM];
    uint32_t backends[8];
    size_t n_backends = test_backends(backends);
    unsigned rounds = amount(100, 1000, "streams saved, loaded and gone on with");
    for (unsigned round = 0; more(round, rounds); round++) {
        bkv_config cfg = config_of(round);
        bkv_cache c = cache_new(&cfg), back;
        size_t n = random_below(1500), bytes = cache_stats(&c).state_bytes, need;
        if (n) go_on(&c, &s, 0, n, out[0]);
        unsigned char *saved = (unsigned char *)checked(malloc(bytes + 1));
        RESULT(bkv_save(&c, saved + 1, bytes - 1), BKV_E_MEMORY);
        OK(bkv_save(&c, saved + 1, bytes));
        need = bkv_load_size(saved + 1, bytes, 1 + round % 3);
        CHECK(need >= bytes);
        void *mem = checked(malloc(need));
        RESULT(bkv_load(&back, saved + 1, bytes, mem, need - 1, 1 + round % 3, 0), BKV_E_MEMORY);
        OK(bkv_load(&back, saved + 1, bytes, mem, need, 1 + round % 3,
                    backends[round % n_backends]));
        CHECK(back.cfg.n_threads == 1 + round % 3);
        go_on(&c, &s, n, 200, out[0]);
        go_on(&back, &s, n, 200, out[1]);
        CHECK(!memcmp(out[0], out[1], sizeof out[0]));
        for (uint32_t head = 0; head < N_KV; head++) /* the header names the threads */
            CHECK(!memcmp(bkvi_head_mem(&c, head), bkvi_head_mem(&back, head), c.head_bytes));
        RESULT(bkv_load(&back, saved + 1, bytes, mem, need, 1025, 0), BKV_E_THREADS);
        RESULT(bkv_load(&back, saved + 1, bytes, mem, need, 1, 31), BKV_E_BACKEND);
        RESULT(bkv_load(&back, saved + 1, bytes - 1, mem, need, 1, 0), BKV_E_STATE);
        RESULT(bkv_load(&back, saved + 1, 255, mem, need, 1, 0), BKV_E_STATE);
        free(saved), cache_free(&c), cache_free(&back);
    }
    stream_free(&s);
}

/* One saved state with broken bits, again and again; how many of those were sound. As a checksum
   catches all of them by itself, half get a fitting one: what then still loads must behave. */
static unsigned break_state(const bkv_config *cfg, const stream *s, unsigned rounds) {
    float out[N_Q * VALUE_DIM];
    bkv_cache c = cache_new(cfg), back;
    size_t bytes = cache_stats(&c).state_bytes;
    unsigned char *saved = (unsigned char *)checked(malloc(bytes));
    unsigned char *broken = (unsigned char *)checked(malloc(bytes));
    void *mem = checked(malloc(c.bytes));
    unsigned loaded = 0;
    go_on(&c, s, 0, 900, out);
    OK(bkv_save(&c, saved, bytes));
    for (unsigned round = 0; more(round, rounds); round++) {
        /* In the header, in the tables of a head, anywhere. */
        size_t span = round % 3 == 0   ? BKVI_HEADER_BYTES
                      : round % 3 == 1 ? BKVI_HEADER_BYTES + c.at[BKVI_K]
                                       : bytes;
        memcpy(broken, saved, bytes);
        do { /* until the flips do not undo each other */
            for (uint32_t flips = 1 + random_below(round % 2 ? 1 : 8); flips; flips--) {
                size_t at = random_below((uint32_t)span);
                broken[at] = (unsigned char)(broken[at] ^ (1u << random_below(8)));
            }
        } while (!memcmp(broken, saved, bytes));
        if (round / 3 % 2) {
            bkvi_put_sum(broken, 0);
            bkvi_put_sum(broken, bkvi_checksum(0, broken, bytes));
        }
        if (bkv_load(&back, broken, bytes, mem, c.bytes, 1, 0) != BKV_OK) continue;
        CHECK(round / 3 % 2);
        loaded++;
        if (back.cfg.n_q_heads != N_Q || back.cfg.n_kv_heads != N_KV || back.cfg.head_dim != DIM ||
            back.cfg.value_dim != VALUE_DIM)
            continue; /* a sound state of another shape */
        go_on(&back, s, 0, 70, out);
        RESULT(bkv_truncate(&back, 0), BKV_E_ROLLBACK);
        for (size_t i = 0; i < COUNT(out); i++) CHECK(out[i] - out[i] == 0.0f);
    }
    free(saved), free(broken), free(mem), cache_free(&c);
    return loaded;
}
static void broken_bytes_are_rejected_or_harmless(void) {
    stream s = stream_new();
    unsigned rounds = amount(20000, 1000000, "broken states"), loaded = 0;
    for (size_t i = 0; i < COUNT(kinds); i++) {
        bkv_config cfg = config_of(i);
        loaded += break_state(&cfg, &s, rounds / (unsigned)COUNT(kinds));
    }
    printf("%u of them, with a fitting checksum, were sound\n", loaded);
    CHECK(loaded > 0);
    stream_free(&s);
}

/* Every bit of the metadata of every head: of one head, whose counters no other confirms, and of
   two; empty, in the sinks, in pages, after halvings; the newest tokens drafts, or none. */
static void validation_finds_every_flipped_bit(void) {
    stream s = stream_new();
    float out[N_Q * VALUE_DIM];
    static const size_t lengths[] = {0, 7, 90, 208, 700};
    for (size_t i = 0; i < 4 * COUNT(lengths); i++) {
        size_t n = lengths[i / 4];
        bkv_config cfg = config(i % 2 ? storage_types[3 + i / 4 % 2] : BKV_F16);
        cfg.budget = 208;
        cfg.n_kv_heads = 1 + (uint32_t)i % 4 / 2;
        cfg.n_q_heads = GROUP * cfg.n_kv_heads;
        bkv_cache c = cache_new(&cfg);
        if (n) go_on(&c, &s, 0, n - n / 2 % 4, out);
        if (n / 2 % 4) append(&c, &s, n - n / 2 % 4, n / 2 % 4, BKV_DRAFT);
        OK(bkv_validate(&c));
        for (uint32_t head = 0; head < cfg.n_kv_heads; head++) {
            size_t at_head = BKVI_HEADER_BYTES + head * c.head_bytes;
            const struct {
                size_t at, bytes;
            } parts[] = {{0, head ? 0 : BKVI_HEADER_BYTES},
                         {at_head, 60},
                         {at_head + c.at[BKVI_TABLE], 8 * (size_t)c.n_pages},
                         {at_head + c.at[BKVI_WEIGHT], 4 * (size_t)c.slots},
                         {at_head + c.at[BKVI_POSITION], 4 * (size_t)c.slots}};
            for (size_t p = 0; p < COUNT(parts); p++)
                for (size_t bit = 0; bit < 8 * parts[p].bytes; bit++) {
                    unsigned char *at = c.mem + parts[p].at + bit / 8;
                    *at = (unsigned char)(*at ^ 1u << bit % 8);
                    CHECKF(bkv_validate(&c) == BKV_E_STATE, "%zu tokens, part %zu, bit %zu", n, p,
                           bit);
                    *at = (unsigned char)(*at ^ 1u << bit % 8);
                }
        }
        OK(bkv_validate(&c));
        cache_free(&c);
    }
    RESULT(bkv_validate(NULL), BKV_E_NULL);
    stream_free(&s);
}

/* Attention over exported rows, in double, is attention. */
static void exported_rows_attend_alike(void) {
    stream s = stream_new();
    float out[N_Q * VALUE_DIM];
    unsigned rounds = amount(100, 600, "caches exported, six times each");
    for (unsigned round = 0; more(round, rounds); round++) {
        bkv_config cfg = config_of(round / 2);
        bkv_cache c = cache_new(&cfg);
        uint32_t type = cfg.kv_type == BKV_F16 && round % 4 < 2 ? BKV_F16 : BKV_F32;
        uint32_t mask_type = round % 2 ? BKV_F16 : BKV_F32, rows_n = cfg.budget + 48;
        size_t es = format_of(type).bytes, n = 0;
        unsigned char *k = (unsigned char *)checked(calloc(rows_n, DIM * es));
        unsigned char *v = (unsigned char *)checked(calloc(rows_n, VALUE_DIM * es + 6));
        unsigned char *mask = (unsigned char *)checked(calloc(rows_n, 4));
        double *p = (double *)checked(calloc(rows_n, sizeof *p));
        bkv_rows rows;
        memset(&rows, 0, sizeof rows);
        rows.k = k, rows.v = v, rows.mask = mask, rows.v_stride = VALUE_DIM * es + 6;
        rows.type = type, rows.mask_type = mask_type, rows.n_rows = rows_n;
        for (int step = 0; step < 6; step++) {
            size_t more = 1 + random_below(step % 2 ? 20 : 400);
            go_on(&c, &s, n, more, out);
            n += more;
            OK(bkv_export(&c, 1, &rows));
            CHECK(step == 0 || rows.n <= rows_n);
            attend(&c, &s, n - 1, out);
            for (uint32_t g = 0; g < GROUP; g++) {
                double sum = 0, o[VALUE_DIM] = {0}, norm = 0, off = 0, may = 0;
                for (uint32_t r = 0; r < rows_n; r++) {
                    double m = decode(load_bits(mask + r * format_of(mask_type).bytes, mask_type),
                                      mask_type),
                           logit = m;
                    for (uint32_t i = 0; i < DIM; i++)
                        logit += tensor_get(&s.q, (n - 1) % LENGTH, GROUP + g, i) *
                                 decode(load_bits(k + (r * DIM + i) * es, type), type) *
                                 (double)c.cfg.scale;
                    sum += p[r] = exp(logit);
                    for (uint32_t i = 0; i < VALUE_DIM; i++)
                        o[i] += p[r] * decode(load_bits(v + r * rows.v_stride + i * es, type), type);
                    if (p[r] > 0) p[r] *= m; /* what f16 rounds a mask by, at most, in 2^-11 */
                }
                for (uint32_t i = 0; i < VALUE_DIM; i++) {
                    double d = (o[i] /= sum) - (double)out[(GROUP + g) * VALUE_DIM + i];
                    norm += o[i] * o[i], off += d * d;
                }
                for (uint32_t r = 0; r < rows_n && mask_type == BKV_F16; r++) {
                    double far = 0;
                    for (uint32_t i = 0; i < VALUE_DIM; i++) {
                        double d = o[i] -
                                   decode(load_bits(v + r * rows.v_stride + i * es, type), type);
                        far += d * d;
                    }
                    may += p[r] / sum * sqrt(far) / 2048;
                }
                CHECKF(sqrt(off) < 1.01 * may + 2e-5 * sqrt(norm), "%g of %g, %g may be rounding",
                       sqrt(off), sqrt(norm), may);
            }
        }
        bkv_rows again = rows;
        OK(bkv_export(&c, 1, &again)); /* nothing new */
        CHECK(again.n == 0);
        again.n_rows = c.slots - 1;
        RESULT(bkv_export(&c, 1, &again), BKV_E_COUNT);
        RESULT(bkv_export(&c, N_KV, &rows), BKV_E_INDEX);
        RESULT(bkv_export(&c, 0, NULL), BKV_E_NULL);
        again = rows, again.k_stride = DIM * es - 1;
        RESULT(bkv_export(&c, 0, &again), BKV_E_STRIDE);
        again = rows, again.mask_type = BKV_BF16;
        RESULT(bkv_export(&c, 0, &again), BKV_E_TYPE);
        free(k), free(v), free(mask), free(p), cache_free(&c);
    }
    stream_free(&s);
}

/* Any part of the rows can be left out, and every backend exports the same bytes. */
static void exported_rows_in_parts(void) {
    stream s = stream_new();
    uint32_t backends[8];
    size_t n_backends = test_backends(backends);
    for (size_t i = 0; i < COUNT(kinds); i++) {
        static unsigned char first[REST_BUDGET * (DIM + VALUE_DIM) * 4];
        for (size_t b = 0; b < n_backends; b++) {
            bkv_config cfg = config_of(i);
            cfg.backend = backends[b];
            bkv_cache c = cache_new(&cfg);
            static unsigned char k[REST_BUDGET * DIM * 4], v[REST_BUDGET * VALUE_DIM * 4];
            bkv_rows rows;
            append(&c, &s, 0, 900, 0);
            memset(&rows, 0, sizeof rows);
            rows.type = BKV_F32, rows.n_rows = cfg.budget, rows.k = k;
            OK(bkv_export(&c, 0, &rows)); /* no values, no mask */
            memset(&rows, 0, sizeof rows);
            rows.type = BKV_F32, rows.n_rows = cfg.budget, rows.v = v;
            OK(bkv_export(&c, 0, &rows));
            if (b == 0) memcpy(first, k, sizeof k), memcpy(first + sizeof k, v, sizeof v);
            CHECK(!memcmp(first, k, sizeof k) && !memcmp(first + sizeof k, v, sizeof v));
            rows.type = 0;
            RESULT(bkv_export(&c, 0, &rows), BKV_E_TYPE);
            rows.type = BKV_I4;
            RESULT(bkv_export(&c, 0, &rows), BKV_E_TYPE);
            rows.type = BKV_F32, rows.v_stride = VALUE_DIM * 4 - 1;
            RESULT(bkv_export(&c, 0, &rows), BKV_E_STRIDE);
            cache_free(&c);
        }
    }
    stream_free(&s);
}

/* What a saved or a living state may not hold, and flipped bits by themselves do not give. */
static void impossible_states_are_refused(void) {
    stream s = stream_new();
    float out[N_Q * VALUE_DIM];
    bkv_config cfg = config(BKV_F32);
    bkv_cache c = cache_new(&cfg), back;
    go_on(&c, &s, 0, 900, out);
    const struct {
        size_t at;
        uint32_t word;
    } wrong[] = {{BKVI_ERROR_AT, 0x7FC00000u}, {c.at[BKVI_QUERIES], 0x7F800000u},
                 {c.at[BKVI_USE], 0xBF800000u},     {c.at[BKVI_USE], 0x7E967698u}, /* nearly a pin */
                 {c.at[BKVI_WEIGHT], 0x7F000000u},  {c.at[BKVI_K], 0x7FC00000u},
                 {c.at[BKVI_V], 0xFF800000u}};
    size_t bytes = cache_stats(&c).state_bytes, head = BKVI_HEADER_BYTES + c.head_bytes;
    unsigned char *saved = (unsigned char *)checked(malloc(bytes));
    void *mem = checked(malloc(c.bytes));
    for (size_t i = 0; i < COUNT(wrong); i++) {
        unsigned char *at = c.mem + head + wrong[i].at;
        uint32_t was = bkvi_get32(at);
        bkvi_put32(at, wrong[i].word);
        RESULT(bkv_validate(&c), BKV_E_STATE);
        OK(bkv_save(&c, saved, bytes));
        RESULT(bkv_load(&back, saved, bytes, mem, c.bytes, 1, 0), BKV_E_STATE);
        bkvi_put32(at, was);
        OK(bkv_validate(&c));
    }
    OK(bkv_save(&c, saved, bytes)); /* of a machine of the other byte order, or another version */
    bkvi_put32(saved, bkvi_get32(saved) << 24 | (bkvi_get32(saved) & 0xFF00u) << 8 |
                          (bkvi_get32(saved) >> 8 & 0xFF00u) | bkvi_get32(saved) >> 24);
    RESULT(bkv_load(&back, saved, bytes, mem, c.bytes, 1, 0), BKV_E_VERSION);
    CHECK(bkv_load_size(saved, bytes, 1) == 0);
    free(saved), free(mem), cache_free(&c);
    stream_free(&s);
}

/* What f16 cannot hold is refused, and left in the cache as it was. */
static void exported_numbers_fit(void) {
    stream s = stream_new();
    bkv_config cfg = config(BKV_F32);
    bkv_cache c = cache_new(&cfg);
    unsigned char k[2 * BUDGET * DIM];
    bkv_rows rows;
    tensor_set(&s.k, 5, 0, 3, 65520);
    append(&c, &s, 0, 9, 0);
    memset(&rows, 0, sizeof rows);
    rows.k = k, rows.type = BKV_F16, rows.n_rows = BUDGET;
    RESULT(bkv_export(&c, 0, &rows), BKV_E_VALUE);
    OK(bkv_export(&c, 1, &rows));
    cache_free(&c);
    stream_free(&s);
}

static void selects_what_a_cache_would_hold(void) {
    enum { ROW = BUDGET + 3 }; /* not a whole number of sixteens */
    stream s = stream_new();
    bkv_config cfg = config(BKV_F32);
    cfg.budget = ROW;
    cfg.importance = BKV_IMPORTANCE_KEY;
    bkv_cache c = cache_new(&cfg);
    size_t bytes = bkv_size(&cfg);
    void *mem = checked(malloc(bytes));
    uint32_t *index = (uint32_t *)checked(calloc(N_KV * ROW, 4)), kept;
    float *weight = new_floats(N_KV * ROW);
    append(&c, &s, 0, 1000, 0);
    OK(bkv_select(&cfg, mem, bytes, s.k.view, s.v.view, 1000, index, weight, &kept));
    CHECK(kept == cache_stats(&c).tokens_held);
    for (uint32_t head = 0; head < N_KV; head++)
        for (uint32_t i = 0; i < kept; i++) {
            bkv_token_info t = cache_token(&c, head, i);
            CHECK(t.position == index[head * ROW + i] && t.weight == weight[head * ROW + i]);
        }
    RESULT(bkv_select(&cfg, mem, bytes - 1, s.k.view, s.v.view, 9, index, weight, &kept),
           BKV_E_MEMORY);
    RESULT(bkv_select(&cfg, mem, bytes, s.k.view, s.v.view, 0, index, weight, &kept), BKV_E_COUNT);
    RESULT(bkv_select(&cfg, mem, bytes, s.k.view, s.v.view, 9, NULL, weight, &kept), BKV_E_NULL);
    free(mem), free(index), free(weight), cache_free(&c);
    stream_free(&s);
}

static void budget_for_bytes_inverts_size(void) {
    unsigned rounds = amount(3000, 20000, "budgets for bytes");
    for (unsigned round = 0; more(round, rounds); round++) {
        bkv_config cfg =
            bkv_config_default(4, 1 + random_below(4) * 3 / 2, 1 + random_below(200), 0);
        cfg.n_q_heads = cfg.n_kv_heads * (1 + random_below(8));
        cfg.kv_type = storage_types[random_below(N_STORAGE)];
        cfg.window = random_below(2) ? 0 : 64 * (1 + random_below(3));
        size_t bytes = random_below(1u << (10 + random_below(20)));
        uint32_t budget = bkv_budget_for_bytes(&cfg, bytes);
        if (budget) {
            cfg.budget = budget;
            CHECK(bkv_size(&cfg) && bkv_size(&cfg) <= bytes);
            CHECK(bkv_budget_for_bytes(&cfg, bkv_size(&cfg)) == budget);
        }
        cfg.budget = budget + 16;
        CHECKF(bkv_size(&cfg) == 0 || bkv_size(&cfg) > bytes, "%u slots in %zu bytes", budget,
               bytes);
    }
    CHECK(bkv_budget_for_bytes(NULL, 1000000) == 0);
    bkv_config cfg = bkv_config_default(1, 1, 512, 0);
    CHECK(sizeof(size_t) < 8 || bkv_budget_for_bytes(&cfg, SIZE_MAX) == 1u << 24);
    cfg.head_dim = 513;
    CHECK(bkv_budget_for_bytes(&cfg, SIZE_MAX) == 0);
}

/* Sizes are exact: whatever the config, all operations stay within bkv_size() bytes. */
static void configs_stay_in_bounds(void) {
    enum { HEADS = 3, MOST_DIM = 70, N = 330, GUARD = 64 };
    tensor k = tensor_random(N, HEADS, MOST_DIM, BKV_F32),
           v = tensor_random(N, HEADS, MOST_DIM, BKV_F32);
    tensor q = tensor_random(N, HEADS * 4, MOST_DIM, BKV_F32);
    float *out = new_floats(N * HEADS * 4 * MOST_DIM);
    unsigned rounds = amount(300, 10000, "configs with guards around the memory");
    for (unsigned round = 0; more(round, rounds); round++) {
        bkv_config cfg = bkv_config_default(1, 1, 8, 256);
        size_t bytes, shift = random_below(64);
        do { /* until the budget has room for sinks, window and two pages */
            cfg.n_kv_heads = 1 + random_below(HEADS);
            cfg.n_q_heads = cfg.n_kv_heads * (1 + random_below(4));
            cfg.head_dim = 1 + random_below(MOST_DIM), cfg.value_dim = 1 + random_below(MOST_DIM);
            cfg.kv_type = storage_types[random_below(N_STORAGE)];
            cfg.budget = 192 + random_below(400), cfg.sinks = random_below(40);
            cfg.window = random_below(2) ? 0 : 64;
            cfg.n_threads = 1 + random_below(3);
        } while (!(bytes = bkv_size(&cfg)));
        unsigned char *block = (unsigned char *)checked(malloc(bytes + shift + 2 * GUARD));
        memset(block, 0xA5, bytes + shift + 2 * GUARD);
        bkv_cache c;
        RESULT(bkv_init(&c, &cfg, block + GUARD + shift, bytes - 1), BKV_E_MEMORY);
        OK(bkv_init(&c, &cfg, block + GUARD + shift, bytes));
        size_t n = 1 + random_below(N);
        uint32_t flags = random_below(4) ? 0 : BKV_DRAFT;
        for (uint32_t ith = 0; ith < cfg.n_threads; ith++)
            OK(bkv_prefill(&c, k.view, v.view, q.view, out, n, flags, ith, cfg.n_threads));
        bkv_result r = bkv_truncate(&c, n - 1);
        CHECK(r == BKV_OK || r == BKV_E_ROLLBACK);
        if (n > 1) OK(bkv_attend(&c, q.view, out, 0, 1));
        r = bkv_shrink(&c, 192 + random_below(200));
        CHECK(r == BKV_OK || r == BKV_E_BUDGET);
        OK(bkv_append(&c, k.view, v.view, n, 0, 0, 1));
        float sums[HEADS * 8];
        OK(bkv_attend_partial(&c, q.view, out, sums, sums + HEADS * 4, 0, 1));
        size_t state_bytes = cache_stats(&c).state_bytes; /* fewer than `out` has */
        OK(bkv_save(&c, out, state_bytes));
        CHECK(bkv_load_size(out, state_bytes, cfg.n_threads) <= bytes);
        OK(bkv_load(&c, out, state_bytes, block + GUARD + shift, bytes, cfg.n_threads, 0));
        bkv_rows rows;
        memset(&rows, 0, sizeof rows);
        rows.type = BKV_F32, rows.n_rows = c.slots;
        rows.k = out, rows.v = out + (size_t)c.slots * MOST_DIM;
        OK(bkv_export(&c, 0, &rows));
        OK(bkv_validate(&c));
        for (size_t i = 0; i < GUARD + shift; i++) CHECK(block[i] == 0xA5);
        for (size_t i = 0; i < GUARD; i++) CHECK(block[GUARD + shift + bytes + i] == 0xA5);
        free(block);
    }
    free(out);
    tensor_free(&k), tensor_free(&v), tensor_free(&q);
}

/* Millions of tokens, the same 4096 again and again, so that exact attention is known: the error
   does not grow, the weights still add up, what was learnt stays near what is asked. */
static void soak(void) {
    enum { SHORT = 24 };
    stream s = stream_new();
    for (size_t t = 0; t < LENGTH; t++)
        for (size_t h = 0; h < N_KV; h++)
            for (size_t i = 0; i < VALUE_DIM; i++)
                tensor_set(&s.v, t, h, i, 1 + 0.3 * tensor_get(&s.v, t, h, i));
    unsigned passes = amount(SHORT, 2442, "passes of 4096 tokens through one cache");
    static const uint32_t types[] = {BKV_F16, BKV_I8, BKV_I4};
    for (size_t type = 0; type < COUNT(types); type++) {
        bkv_config cfg = config(types[type]);
        cfg.budget = 528;
        bkv_cache c = cache_new(&cfg);
        float *out = new_floats(LENGTH * N_Q * VALUE_DIM);
        double early = 0, late = 0;
        for (unsigned pass = 1; more(pass - 1, passes); pass++) {
            OK(bkv_prefill(&c, s.k.view, s.v.view, s.q.view, out, LENGTH, 0, 0, 1));
            if (pass != SHORT && pass != passes && pass != 1) continue;
            double error = 0;
            for (size_t t = 0; t < 16; t++) {
                attend(&c, &s, t * 251, out);
                for (size_t h = 0; h < N_Q; h++) {
                    double sum = 0, o[VALUE_DIM] = {0}, off = 0, norm = 0;
                    for (size_t i = 0; i < LENGTH; i++) {
                        double p = 0;
                        for (size_t j = 0; j < DIM; j++)
                            p +=
                                tensor_get(&s.q, t * 251, h, j) * tensor_get(&s.k, i, h / GROUP, j);
                        p = exp(p * (double)c.cfg.scale);
                        sum += p;
                        for (size_t j = 0; j < VALUE_DIM; j++)
                            o[j] += p * tensor_get(&s.v, i, h / GROUP, j);
                    }
                    for (size_t j = 0; j < VALUE_DIM; j++) {
                        double d = o[j] / sum - (double)out[h * VALUE_DIM + j];
                        off += d * d, norm += o[j] / sum * o[j] / sum;
                    }
                    error += sqrt(off / norm) / 16 / N_Q;
                }
            }
            if (pass <= SHORT) early = error;
            late = error;
        }
        OK(bkv_validate(&c));
        double weights = 0, page = 0, seen = (double)passes * LENGTH, most = 0;
        bkv_stats_info info = cache_stats(&c);
        for (uint32_t head = 0; head < N_KV; head++)
            for (uint32_t i = 0; i < info.tokens_held; i++) {
                if (i < info.sinks || (i - info.sinks) % 64 == 0) page = 0;
                page += (double)cache_token(&c, head, i).weight;
                weights += (double)cache_token(&c, head, i).weight / N_KV;
                CHECK(page <= seen * (1 + 1e-5)); /* the manual's bound */
            }
        for (size_t head = 0; head < N_KV; head++) { /* queries have mean 0, variance 1 */
            const unsigned char *means = bkvi_head_mem(&c, (uint32_t)head) + c.at[BKVI_QUERIES];
            for (size_t i = 0; i < GROUP * 16; i++) {
                double m = fabs((double)bkvi_getf(means + 4 * i));
                most = m > most ? m : most;
            }
        }
        printf("%s: %.0f tokens through one cache, error %.4f, after 98,304 %.4f, weights %.3f\n",
               type_name(cfg.kv_type), seen, late, early, weights / seen);
        CHECK(info.tokens_seen == (uint64_t)passes * LENGTH);
        /* Balancing looks at errors, not at sums of weights: they wander, but not away. */
        CHECK(late < 1.5 * early + 0.005 && weights > 0.5 * seen && weights < 2 * seen);
        CHECK(most < 0.5); /* 7 deviations of a mean at rate 0.01 */
        free(out), cache_free(&c);
    }
    stream_free(&s);
}

/* Numbers at the limits go in and come back; scales that are none, and holes, do not. */
static void limits_of_states(void) {
    stream s = stream_new();
    float out[N_Q * VALUE_DIM];
    for (size_t i = 0; i < COUNT(kinds); i++) {
        bkv_config cfg = config_of(i);
        bkv_cache c = cache_new(&cfg), back;
        size_t bytes = cache_stats(&c).state_bytes, head = BKVI_HEADER_BYTES + c.head_bytes;
        unsigned char *saved = (unsigned char *)checked(malloc(bytes)), was[2], *at;
        void *mem = checked(malloc(c.bytes));
        tensor_set(&s.k, 1, 1, 0, cfg.kv_type == BKV_F16 ? 65519.0 : 3.6028e16);
        for (size_t j = 0; j < DIM; j++) tensor_set(&s.q, 3, 1, j, 3.6e16);
        append(&c, &s, 0, 700, 0);
        for (int j = 0; j < 300; j++) attend(&c, &s, 3, out);
        OK(bkv_save(&c, saved, bytes));
        OK(bkv_load(&back, saved, bytes, mem, c.bytes, 1, 0));
        uint32_t w = bkvi_get32(c.mem + head + c.at[BKVI_WEIGHT]); /* slot 0, and the last, once empty */
        OK(bkv_reset(&c));
        append(&c, &s, 2, 5, 0);
        bkvi_put32(c.mem + head + c.at[BKVI_WEIGHT], 0);
        bkvi_put32(c.mem + head + c.at[BKVI_WEIGHT] + 4 * (c.slots - 1), w);
        RESULT(bkv_validate(&c), BKV_E_STATE);
        OK(bkv_reset(&c));
        append(&c, &s, 2, 5, 0);
        if (cfg.kv_type >= BKV_I8) {
            at = c.mem + head + c.at[BKVI_K_SCALE];
            memcpy(was, at, 2);
            bkvi_put16(at, 0x7FC0);
            RESULT(bkv_validate(&c), BKV_E_STATE);
            memcpy(at, was, 2);
        }
        OK(bkv_validate(&c));
        free(saved), free(mem), cache_free(&c);
    }
    stream_free(&s);
}

int main(int argc, char **argv) {
    TEST_MAIN(T(rejected_drafts_leave_no_trace), T(drafts_teach_once_accepted),
              T(rollback_before_any_halving_and_its_limits), T(shrinks_in_place),
              T(saved_states_go_on_bit_for_bit), T(broken_bytes_are_rejected_or_harmless),
              T(validation_finds_every_flipped_bit), T(exported_rows_attend_alike),
              T(exported_rows_in_parts), T(exported_numbers_fit), T(impossible_states_are_refused),
              T(selects_what_a_cache_would_hold), T(budget_for_bytes_inverts_size),
              T(configs_stay_in_bounds), T(limits_of_states), T(soak));
}
