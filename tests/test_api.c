/* Arguments, good and bad: every code of bkv_result is reached, and a failing call changes neither
   the state nor the output. Also memory: alignment, bounds, foreign bytes, no allocation. */
#include "test.h"
#include <limits.h>

/* ---- no allocation: this program's own malloc counts the calls ------------------------------- */

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED
#endif
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(SANITIZED)
#define COUNT_ALLOCATIONS
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void __libc_free(void *p);

static volatile unsigned allocations;

void *malloc(size_t bytes) {
    allocations++;
    return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes) {
    allocations++;
    return __libc_calloc(n, bytes);
}

void *realloc(void *p, size_t bytes) {
    allocations++;
    return __libc_realloc(p, bytes);
}

void free(void *p) {
    allocations++;
    __libc_free(p);
}
#endif

/* ---- a cache in the middle of its life, and what no failing call may touch ------------------- */

enum { N_KV = 3, GROUP = 2, DIM = 37, VALUE_DIM = 21, N = 4, THREADS = 2, GUARD = 64 };
enum { OUT = N * N_KV * GROUP * VALUE_DIM, PARTS = N_KV * GROUP };

typedef struct fixture {
    bkv_config cfg;
    bkv_cache c, c_before;
    unsigned char *block, *block_before; /* GUARD bytes, the cache's memory, GUARD bytes */
    size_t block_bytes;
    float out[OUT], max[PARTS], sum[PARTS], before[OUT];
    tensor k, v, q;
} fixture;

static bkv_config config(void) {
    bkv_config cfg = bkv_config_default(N_KV * GROUP, N_KV, DIM, 208);
    cfg.value_dim = VALUE_DIM;
    cfg.n_threads = THREADS;
    return cfg;
}

static fixture fixture_new(uint32_t kv_type, uint32_t in_type, size_t n_tokens) {
    fixture f;
    memset(&f, 0, sizeof f);
    f.cfg = config();
    f.cfg.kv_type = kv_type;
    f.k = tensor_random(N, N_KV, DIM, in_type);
    f.v = tensor_random(N, N_KV, VALUE_DIM, in_type);
    f.q = tensor_random(N, N_KV * GROUP, DIM, in_type);
    f.block_bytes = bkv_size(&f.cfg) + 2 * GUARD;
    f.block = (unsigned char *)checked(malloc(f.block_bytes));
    f.block_before = (unsigned char *)checked(malloc(f.block_bytes));
    memset(f.block, 0xA5, f.block_bytes);
    OK(bkv_init(&f.c, &f.cfg, f.block + GUARD, f.block_bytes - 2 * GUARD));
    for (size_t t = 0; t < n_tokens; t++)
        OK(bkv_append(&f.c, tensor_from(&f.k, t % N), tensor_from(&f.v, t % N), 1, 0, 0, 1));
    memset(f.out, 0x5A, sizeof f.out);
    memset(f.max, 0x5A, sizeof f.max);
    memset(f.sum, 0x5A, sizeof f.sum);
    memcpy(f.before, f.out, sizeof f.out);
    memcpy(f.block_before, f.block, f.block_bytes);
    f.c_before = f.c;
    return f;
}

/* State, handle, outputs and the bytes around the block are what they were. */
static int untouched(const fixture *f) {
    size_t end = GUARD + f->c.state_bytes, after = f->block_bytes - GUARD;
    return memcmp(f->block, f->block_before, end) == 0 &&
           memcmp(f->block + after, f->block_before + after, GUARD) == 0 &&
           memcmp(&f->c, &f->c_before, sizeof f->c) == 0 &&
           memcmp(f->out, f->before, sizeof f->out) == 0 &&
           memcmp(f->max, f->before, sizeof f->max) == 0 &&
           memcmp(f->sum, f->before, sizeof f->sum) == 0;
}

static void fixture_free(fixture *f) {
    CHECK(untouched(f));
    tensor_free(&f->k), tensor_free(&f->v), tensor_free(&f->q);
    free(f->block), free(f->block_before);
}

/* The call fails with this code and changes nothing; needs a fixture f in scope. */
#define FAILS(call, code)                                                                          \
    do {                                                                                           \
        RESULT(call, code);                                                                        \
        CHECKF(untouched(&f), "changed by %s", #call);                                             \
    } while (0)

/* ---- configs --------------------------------------------------------------------------------- */

/* The config fails everywhere with this code. */
static void refuse_config(const bkv_config *cfg, bkv_result code) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    FAILS(bkv_check(cfg), code);
    CHECK(bkv_size(cfg) == 0);
    FAILS(bkv_init(&f.c, cfg, f.c.mem, f.c.bytes), code);
    fixture_free(&f);
}

#define REFUSE(field, value, code)                                                                 \
    do {                                                                                           \
        bkv_config cfg_ = config();                                                                \
        cfg_.field = value;                                                                        \
        refuse_config(&cfg_, code);                                                                \
    } while (0)
#define ACCEPT(field, value)                                                                       \
    do {                                                                                           \
        bkv_config cfg_ = config();                                                                \
        cfg_.field = value;                                                                        \
        OK(bkv_check(&cfg_));                                                                      \
        CHECK(bkv_size(&cfg_) > 0);                                                                \
    } while (0)

static void configs(void) {
    bkv_config zero;
    memset(&zero, 0, sizeof zero);
    CHECK(bkv_check(&zero) != BKV_OK && bkv_size(&zero) == 0);
    CHECK(bkv_size(0) == 0);
    RESULT(bkv_check(0), BKV_E_NULL);

    REFUSE(n_kv_heads, 0, BKV_E_HEADS);
    REFUSE(n_kv_heads, 4097, BKV_E_HEADS);
    REFUSE(n_kv_heads, UINT32_MAX, BKV_E_HEADS);
    REFUSE(n_q_heads, N_KV + 1, BKV_E_HEADS);
    REFUSE(n_q_heads, 1, BKV_E_HEADS);
    REFUSE(n_q_heads, N_KV * 17, BKV_E_HEADS);
    REFUSE(n_q_heads, UINT32_MAX, BKV_E_HEADS);
    ACCEPT(n_q_heads, N_KV * 16);
    ACCEPT(n_q_heads, 0);
    REFUSE(head_dim, 0, BKV_E_HEAD_DIM);
    REFUSE(head_dim, 513, BKV_E_HEAD_DIM);
    REFUSE(head_dim, UINT32_MAX, BKV_E_HEAD_DIM);
    REFUSE(value_dim, 513, BKV_E_HEAD_DIM);
    ACCEPT(head_dim, 512);
    ACCEPT(value_dim, 0);
    REFUSE(kv_type, BKV_I4 + 1, BKV_E_KV_TYPE);
    REFUSE(kv_type, UINT32_MAX, BKV_E_KV_TYPE);
    REFUSE(rule, 5, BKV_E_RULE);
    REFUSE(rule, UINT32_MAX, BKV_E_RULE);
    REFUSE(importance, 8, BKV_E_RULE);
    REFUSE(importance, BKV_NONE - 1, BKV_E_RULE);
    REFUSE(rounds, 65, BKV_E_RULE);
    REFUSE(rounds, BKV_NONE - 1, BKV_E_RULE);
    ACCEPT(importance, 7);
    ACCEPT(importance, BKV_NONE);
    ACCEPT(rounds, 64);
    ACCEPT(rounds, BKV_NONE);
    REFUSE(backend, 5, BKV_E_BACKEND);
    REFUSE(backend, 37, BKV_E_BACKEND);
    REFUSE(backend, UINT32_MAX, BKV_E_BACKEND);
    for (uint32_t b = BKV_BACKEND_SCALAR; b <= BKV_BACKEND_NEON; b++)
        if (bkv_backends() >> b & 1)
            ACCEPT(backend, b);
        else
            REFUSE(backend, b, BKV_E_BACKEND);
    REFUSE(n_threads, 1025, BKV_E_THREADS);
    REFUSE(n_threads, UINT32_MAX, BKV_E_THREADS);
    ACCEPT(n_threads, 1024);
    ACCEPT(n_threads, 0);
    static const float bad[] = {-1.0f, -1e-30f, NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < COUNT(bad); i++) {
        REFUSE(temp, bad[i], BKV_E_PARAM);
        REFUSE(scale, bad[i], BKV_E_PARAM);
        REFUSE(softcap, bad[i], BKV_E_PARAM);
    }
    REFUSE(scale, 8.5f, BKV_E_PARAM);
    REFUSE(temp, 8.5f * sqrtf(DIM), BKV_E_PARAM); /* the default scale is 1 / sqrt(DIM) */
    REFUSE(scale, 1e-39f, BKV_E_PARAM);
    REFUSE(temp, 1e-39f, BKV_E_PARAM);
    REFUSE(softcap, 0.5f, BKV_E_PARAM);
    REFUSE(softcap, 100.5f, BKV_E_PARAM);
    ACCEPT(scale, 8.0f);
    ACCEPT(temp, 7.5f * sqrtf(DIM));
    ACCEPT(softcap, 1.0f);
}

static void budgets(void) {
    REFUSE(budget, 0, BKV_E_BUDGET);
    REFUSE(budget, (1u << 24) + 1, BKV_E_BUDGET);
    REFUSE(budget, UINT32_MAX, BKV_E_BUDGET);
    static const struct {
        uint32_t sinks, window, least;
    } need[] = {{BKV_NONE, BKV_NONE, 128},
                {0, BKV_NONE, 144},
                {0, 0, 144},
                {0, 64, 208},
                {0, 1, 208},
                {17, 65, 288},
                {BKV_NONE, 640, 768}};
    for (size_t i = 0; i < COUNT(need); i++) {
        bkv_config cfg = config();
        cfg.sinks = need[i].sinks;
        cfg.window = need[i].window;
        cfg.budget = need[i].least;
        OK(bkv_check(&cfg));
        cfg.budget--;
        refuse_config(&cfg, BKV_E_BUDGET);
    }
    REFUSE(sinks, 0xFFFFFFF0u, BKV_E_BUDGET); /* what rounds up to nothing, or beyond 32 bits */
    REFUSE(sinks, 0xFFFFFFFEu, BKV_E_BUDGET);
    REFUSE(window, 0xFFFFFFC0u, BKV_E_BUDGET);
    REFUSE(window, 0xFFFFFFFEu, BKV_E_BUDGET);

    bkv_config huge = config(); /* 2^48 bytes: not on a 32-bit machine */
    huge.n_kv_heads = huge.n_q_heads = 4096;
    huge.head_dim = huge.value_dim = 512;
    huge.kv_type = BKV_F32;
    huge.budget = 1u << 24;
    if (sizeof(size_t) < 8)
        refuse_config(&huge, BKV_E_SIZE);
    else
        CHECK((uint64_t)bkv_size(&huge) > 1ull << 48);
}

/* 1 / sqrt(dim) to nearest for every dim: it is computed without libm. */
static void default_scales(void) {
    for (uint32_t dim = 1; dim <= 512; dim++)
        CHECK(bkv_config_default(1, 1, dim, 512).scale == (float)(1.0 / sqrt((double)dim)));
}

/* A zeroed config with the four fields, and bkv_config_default(), make the same cache. */
static void defaults(void) {
    static const uint32_t budgets[] = {144, 208, 300, 511, 512, 575, 576, 767, 1024, 4096};
    for (size_t i = 0; i < COUNT(budgets); i++) {
        bkv_config zero, full = bkv_config_default(6, 3, 64, budgets[i]);
        memset(&zero, 0, sizeof zero);
        zero.n_q_heads = 6, zero.n_kv_heads = 3, zero.head_dim = 64, zero.budget = budgets[i];
        CHECK(full.value_dim == 64 && full.kv_type == BKV_F16 && full.rule == BKV_RULE_SAMPLE);
        CHECK(full.importance == (BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY | BKV_IMPORTANCE_USE));
        CHECK(full.rounds == 1);
        CHECK(full.sinks > 0 && full.window > 0 && full.n_threads == 1);
        if (budgets[i] > 208)
            CHECK(full.window == (budgets[i] < 512 ? 64 : budgets[i] / 4 / 64 * 64));
        CHECK(full.temp == 0.1f && full.softcap == 0);
        CHECK(full.scale == 0.125f && full.budget == budgets[i] && full.seed == 0);
        CHECK(bkv_size(&zero) == bkv_size(&full));
        bkv_cache a = cache_new(&zero), b = cache_new(&full);
        CHECK(same_state(&a, &b));
        CHECK(memcmp(&a.cfg, &b.cfg, sizeof a.cfg) == 0);
        full.backend = a.cfg.backend; /* may be left open in a config, but not in a cache */
        CHECK(memcmp(&a.cfg, &full, sizeof full) == 0);
        cache_free(&a), cache_free(&b);
    }
    bkv_config cfg = {0}; /* three pages beside the sinks: two must remain */
    cfg.n_kv_heads = 1, cfg.head_dim = 64, cfg.budget = 512, cfg.sinks = 300;
    bkv_cache few = cache_new(&cfg);
    CHECK(few.cfg.window == 64);
    cache_free(&few);
    bkv_config bad = bkv_config_default(5, 3, 64, 208); /* repairs nothing */
    RESULT(bkv_check(&bad), BKV_E_HEADS);
    bad = bkv_config_default(0, 0, 0, 0);
    CHECK(bkv_check(&bad) != BKV_OK);
}

/* BKV_SIZE is a constant, and bkv_size() of the same shape. */
static unsigned char constant_size[BKV_SIZE(9, 3, 80, 512, BKV_I4)];

static void constant_sizes(void) {
    bkv_config cfg = bkv_config_default(9, 3, 80, 512);
    cfg.kv_type = BKV_I4;
    CHECK(sizeof constant_size == bkv_size(&cfg) && !constant_size[0]);
    for (uint32_t dim = 1; dim <= 512; dim += dim < 20 ? 1 : 19)
        for (uint32_t budget = 144; budget < 20000; budget += budget < 300 ? 9 : budget / 2)
            for (uint32_t i = 0; i < 2 * N_STORAGE; i++) {
                const uint32_t kv_heads = 1 + i * 5 % 7, q_heads = kv_heads * (1 + i * 7 % 16);
                cfg = bkv_config_default(q_heads, kv_heads, dim, budget);
                cfg.kv_type = storage_types[i % N_STORAGE];
                CHECKF(bkv_size(&cfg) == BKV_SIZE(q_heads, kv_heads, dim, budget, cfg.kv_type),
                       "%u query heads, %u KV heads of %u, budget %u, type %u", (unsigned)q_heads,
                       (unsigned)kv_heads, (unsigned)dim, (unsigned)budget, (unsigned)cfg.kv_type);
            }
}

/* ---- arguments of calls ---------------------------------------------------------------------- */

/* append() and prefill(), attend() and attend_partial() fail alike; K, V, Q: the tensors to use. */
#define FAIL_INTO(K, V, Q, n, flags, ith, nth, code)                                               \
    do {                                                                                           \
        FAILS(bkv_append(&f.c, K, V, n, flags, ith, nth), code);                                   \
        FAILS(bkv_prefill(&f.c, K, V, Q, f.out, n, flags, ith, nth), code);                        \
    } while (0)
#define FAIL_FROM(Q, ith, nth, code)                                                               \
    do {                                                                                           \
        FAILS(bkv_attend(&f.c, Q, f.out, ith, nth), code);                                         \
        FAILS(bkv_attend_partial(&f.c, Q, f.out, f.max, f.sum, ith, nth), code);                   \
    } while (0)

static void null_pointers(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    bkv_tensor k = f.k.view, v = f.v.view, q = f.q.view, none = bkv_dense(0, BKV_F32);
    bkv_token_info info;
    float error;
    bkv_stats_info stats;
    size_t bytes = f.c.bytes;
    FAILS(bkv_init(0, &f.cfg, f.c.mem, bytes), BKV_E_NULL);
    FAILS(bkv_init(&f.c, 0, f.c.mem, bytes), BKV_E_NULL);
    FAILS(bkv_init(&f.c, &f.cfg, 0, bytes), BKV_E_NULL);
    FAILS(bkv_attach(0, f.c.mem, bytes, 0), BKV_E_NULL);
    FAILS(bkv_attach(&f.c, 0, bytes, 0), BKV_E_NULL);
    FAILS(bkv_reset(0), BKV_E_NULL);
    FAILS(bkv_append(0, k, v, N, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_prefill(0, k, v, q, f.out, N, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_prefill(&f.c, k, v, q, 0, N, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_prefill(&f.c, k, v, none, f.out, N, 0, 0, 1), BKV_E_NULL);
    FAIL_INTO(none, v, q, N, 0, 0, 1, BKV_E_NULL);
    FAIL_INTO(k, none, q, N, 0, 0, 1, BKV_E_NULL);
    FAIL_FROM(none, 0, 1, BKV_E_NULL);
    FAILS(bkv_attend(0, q, f.out, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend(&f.c, q, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend_partial(0, q, f.out, f.max, f.sum, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend_partial(&f.c, q, 0, f.max, f.sum, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend_partial(&f.c, q, f.out, 0, f.sum, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend_partial(&f.c, q, f.out, f.max, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_token(0, 0, 0, &info), BKV_E_NULL);
    FAILS(bkv_token(&f.c, 0, 0, 0), BKV_E_NULL);
    FAILS(bkv_error(0, 0, &error), BKV_E_NULL);
    FAILS(bkv_error(&f.c, 0, 0), BKV_E_NULL);
    FAILS(bkv_stats(0, &stats), BKV_E_NULL);
    FAILS(bkv_stats(&f.c, 0), BKV_E_NULL);
    bkv_cache never_made;
    memset(&never_made, 0, sizeof never_made);
    FAILS(bkv_append(&never_made, k, v, N, 0, 0, 1), BKV_E_NULL);
    FAILS(bkv_attend(&never_made, q, f.out, 0, 1), BKV_E_NULL);
    FAILS(bkv_stats(&never_made, &stats), BKV_E_NULL);
    FAILS(bkv_token(&never_made, 0, 0, &info), BKV_E_NULL);
    FAILS(bkv_reset(&never_made), BKV_E_NULL);
    FAILS(bkv_truncate(&never_made, 0), BKV_E_NULL);
    FAILS(bkv_shrink(&never_made, 144), BKV_E_NULL);
    FAILS(bkv_validate(&never_made), BKV_E_NULL);
    FAILS(bkv_error(&never_made, 0, &error), BKV_E_NULL);

    bkv_cache other;
    bkv_rows rows;
    uint32_t index, kept;
    float weight;
    memset(&rows, 0, sizeof rows);
    unsigned char saved[8] = {0};
    FAILS(bkv_save(0, saved, sizeof saved), BKV_E_NULL);
    FAILS(bkv_save(&never_made, saved, sizeof saved), BKV_E_NULL);
    FAILS(bkv_save(&f.c, 0, 0), BKV_E_NULL);
    FAILS(bkv_load(0, saved, sizeof saved, f.c.mem, bytes, 1, 0), BKV_E_NULL);
    FAILS(bkv_load(&other, 0, sizeof saved, f.c.mem, bytes, 1, 0), BKV_E_NULL);
    FAILS(bkv_load(&other, saved, sizeof saved, 0, bytes, 1, 0), BKV_E_NULL);
    CHECK(bkv_load_size(0, 0, 1) == 0 && bkv_load_size(saved, sizeof saved, 1) == 0);
    FAILS(bkv_export(0, 0, &rows), BKV_E_NULL);
    FAILS(bkv_export(&never_made, 0, &rows), BKV_E_NULL);
    FAILS(bkv_select(&f.cfg, f.c.mem, bytes, k, v, N, &index, 0, &kept), BKV_E_NULL);
    FAILS(bkv_select(&f.cfg, f.c.mem, bytes, k, v, N, &index, &weight, 0), BKV_E_NULL);
    fixture_free(&f);
}

static void counts_flags_threads(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    bkv_tensor k = f.k.view, v = f.v.view, q = f.q.view;
    FAIL_INTO(k, v, q, 0, 0, 0, 1, BKV_E_COUNT);
    for (uint32_t bit = 0; bit < 32; bit++)
        if (1u << bit != BKV_DRAFT && 1u << bit != BKV_PIN)
            FAIL_INTO(k, v, q, N, 1u << bit, 0, 1, BKV_E_FLAGS);
    static const uint32_t bad[][2] = {{0, 0},
                                      {1, 1},
                                      {2, 2},
                                      {0, THREADS + 1},
                                      {THREADS, THREADS + 1},
                                      {UINT32_MAX, 1},
                                      {0, UINT32_MAX},
                                      {UINT32_MAX, UINT32_MAX}};
    for (size_t i = 0; i < COUNT(bad); i++) {
        FAIL_INTO(k, v, q, N, 0, bad[i][0], bad[i][1], BKV_E_THREADS);
        FAIL_FROM(q, bad[i][0], bad[i][1], BKV_E_THREADS);
    }
    fixture_free(&f);

    f = fixture_new(BKV_F16, BKV_F32, 0);
    FAIL_FROM(f.q.view, 0, 1, BKV_E_EMPTY);
    fixture_free(&f);
}

static void tensors(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    const bkv_tensor good[3] = {f.k.view, f.v.view, f.q.view};
    const size_t heads[3] = {N_KV, N_KV, N_KV * GROUP}, dim[3] = {DIM, VALUE_DIM, DIM};
    enum { OF_ONE_TOKEN = 12 }; /* the first cases below */
    const size_t too_far = SIZE_MAX - 65536;
    for (int which = 0; which < 3; which++) {
        size_t row = dim[which] * 4, all = heads[which] * row, far = SIZE_MAX / 2 + 8;
        struct {
            uint32_t type;
            size_t token_stride, head_stride, elem_stride;
            bkv_result code;
        } bad[] = {
            {0, 0, 0, 0, BKV_E_TYPE},
            {4, 0, 0, 0, BKV_E_TYPE},
            {UINT32_MAX, 0, 0, 0, BKV_E_TYPE},
            {BKV_F32, all, row, 3, BKV_E_STRIDE},
            {BKV_F32, all, row, 1, BKV_E_STRIDE},
            {BKV_F32, all, row - 1, 4, BKV_E_STRIDE},
            {BKV_F32, all, 4, 4, BKV_E_STRIDE},
            {BKV_F32, all, row - 4, 4, BKV_E_STRIDE},
            {BKV_F32, all, row, far, BKV_E_SIZE},
            {BKV_F32, all, far, 4, BKV_E_SIZE},
            {BKV_F32, SIZE_MAX, SIZE_MAX, SIZE_MAX, BKV_E_SIZE},
            {BKV_F32, all, too_far / (heads[which] - 1), 4, BKV_E_SIZE},
            /* the stride between tokens, which attend() does not look at: */
            {BKV_F32, all - 1, row, 4, BKV_E_STRIDE},
            {BKV_F32, row, row, 4, BKV_E_STRIDE},
            {BKV_F32, 4, row, 4, BKV_E_STRIDE},
            {BKV_F32, far, row, 4, BKV_E_SIZE},
            {BKV_F32, SIZE_MAX / 3, row, 4, BKV_E_SIZE},
        };
        for (size_t i = 0; i < COUNT(bad); i++) {
            bkv_tensor x[3] = {good[0], good[1], good[2]};
            x[which].type = bad[i].type;
            x[which].token_stride = bad[i].token_stride;
            x[which].head_stride = bad[i].head_stride;
            x[which].elem_stride = bad[i].elem_stride;
            if (which < 2)
                FAIL_INTO(x[0], x[1], x[2], N, 0, 0, 1, bad[i].code);
            else {
                FAILS(bkv_prefill(&f.c, x[0], x[1], x[2], f.out, N, 0, 0, 1), bad[i].code);
                if (i < OF_ONE_TOKEN) FAIL_FROM(x[2], 0, 1, bad[i].code);
            }
        }
    }
    FAIL_INTO(good[0], good[1], good[2], SIZE_MAX, 0, 0, 1, BKV_E_SIZE);
    FAIL_INTO(good[0], good[1], good[2], SIZE_MAX / (N_KV * DIM * 4), 0, 0, 1, BKV_E_SIZE);

    bkv_tensor q = good[2]; /* attend() looks at one token: the stride between tokens is free */
    q.elem_stride = 4, q.head_stride = DIM * 4, q.token_stride = 1;
    OK(bkv_attend(&f.c, q, f.out, 0, 1));
    CHECK(memcmp(f.block, f.block_before, f.block_bytes) != 0); /* it has learned */
    memcpy(f.block_before, f.block, f.block_bytes);
    memcpy(f.out, f.before, sizeof f.out);
    fixture_free(&f);
}

static void indices(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    bkv_token_info info, before;
    float error;
    memset(&info, 0x77, sizeof info);
    before = info;
    FAILS(bkv_token(&f.c, 0, 10, &info), BKV_E_INDEX);
    FAILS(bkv_token(&f.c, N_KV, 0, &info), BKV_E_INDEX);
    FAILS(bkv_token(&f.c, 0, UINT32_MAX, &info), BKV_E_INDEX);
    FAILS(bkv_token(&f.c, UINT32_MAX, 0, &info), BKV_E_INDEX);
    FAILS(bkv_error(&f.c, N_KV, &error), BKV_E_INDEX);
    OK(bkv_error(&f.c, N_KV - 1, &error));
    CHECK(memcmp(&info, &before, sizeof info) == 0);
    OK(bkv_token(&f.c, N_KV - 1, 9, &info));
    CHECK(info.position == 9);
    fixture_free(&f);
    f = fixture_new(BKV_F16, BKV_F32, 0);
    FAILS(bkv_token(&f.c, 0, 0, &info), BKV_E_INDEX);
    fixture_free(&f);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* Puts the pattern at one place of a tensor; every call that reads it fails, in every share. */
static void refuse_value(fixture *shared, const tensor *x, size_t t, size_t h, size_t i,
                         uint32_t bits) {
    fixture f = *shared;
    unsigned char *at = tensor_at(x, t, h, i);
    bkv_tensor k = f.k.view, v = f.v.view, q = f.q.view;
    uint32_t old = load_bits(at, x->view.type);
    store_bits(at, bits, x->view.type);
    for (uint32_t ith = 0; ith < THREADS; ith++) {
        FAILS(bkv_prefill(&f.c, k, v, q, f.out, N, 0, ith, THREADS), BKV_E_VALUE);
        if (x->n_heads == N_KV)
            FAILS(bkv_append(&f.c, k, v, N, 0, ith, THREADS), BKV_E_VALUE);
        else
            FAIL_FROM(tensor_from(x, t), ith, THREADS, BKV_E_VALUE);
    }
    store_bits(at, old, x->view.type);
}

static void bad_values(void) {
    static const size_t at[] = {0, 15, 16, 20};
    for (size_t s = 0; s < COUNT(storage_types); s++)
        for (size_t t = 0; t < COUNT(test_types); t++) {
            uint32_t type = test_types[t], kv_type = storage_types[s];
            format m = format_of(type);
            fixture f = fixture_new(kv_type, type, 10);
            const tensor *x[3] = {&f.k, &f.v, &f.q};
            for (int which = 0; which < 3; which++) {
                double limit = which < 2 && kv_type == BKV_F16 ? 65520 : ldexp(1, 55);
                uint32_t bad[8] = {
                    m.infinity, m.infinity | m.sign,   m.infinity + 1,
                    m.sign - 1, m.sign | (m.sign - 1), m.infinity | (m.infinity >> 1)};
                size_t n = 6;
                if (type == BKV_BF16 && limit < 1e6)
                    limit = 65536; /* bf16 has nothing between it and 65280 */
                if (type != BKV_F16) {
                    bad[n++] = encode(limit, type);
                    bad[n++] = encode(-limit, type);
                }
                size_t last[3] = {N - 1, x[which]->n_heads - 1, x[which]->dim - 1};
                for (size_t b = 0; b < n; b++) {
                    refuse_value(&f, x[which], last[0], last[1], last[2], bad[b]);
                    for (size_t i = 0; i < COUNT(at) && (!test_quick() || b == 0); i++)
                        for (size_t h = 0; h <= last[1]; h++)
                            refuse_value(&f, x[which], i * last[0] / 3, h, at[i], bad[b]);
                }
            }
            fixture_free(&f);
        }
}

static void bad_values_on_every_backend(void) {
    uint32_t backends[8];
    size_t n_backends = test_backends(backends);
    for (size_t b = 0; b < n_backends; b++)
        for (size_t t = 0; t < COUNT(test_types); t++) {
            bkv_config cfg = config();
            cfg.backend = backends[b];
            bkv_cache c = cache_new(&cfg);
            tensor k = tensor_random(1, N_KV, DIM, test_types[t]);
            tensor v = tensor_random(1, N_KV, VALUE_DIM, test_types[t]);
            format m = format_of(test_types[t]);
            const uint32_t bad[] = {m.infinity, m.infinity | m.sign, m.infinity + 1};
            for (size_t i = 0; i < COUNT(bad); i++) {
                uint32_t was = load_bits(tensor_at(&k, 0, N_KV - 1, DIM - 1), test_types[t]);
                store_bits(tensor_at(&k, 0, N_KV - 1, DIM - 1), bad[i], test_types[t]);
                RESULT(bkv_append(&c, k.view, v.view, 1, 0, 0, 1), BKV_E_VALUE);
                store_bits(tensor_at(&k, 0, N_KV - 1, DIM - 1), was, test_types[t]);
            }
            OK(bkv_append(&c, k.view, v.view, 1, 0, 0, 1));
            tensor_free(&k), tensor_free(&v), cache_free(&c);
        }
}

/* The largest numbers that are still good, in all places at once. */
static void largest_values(void) {
    for (size_t s = 0; s < COUNT(storage_types); s++)
        for (size_t t = 0; t < COUNT(test_types); t++) {
            uint32_t type = test_types[t], kv_type = storage_types[s];
            double limit = kv_type == BKV_F16 ? 65520 : ldexp(1, 55);
            uint32_t bits = type == BKV_F16 ? 0x7BFF : encode(limit, type);
            while (decode(bits, type) >= limit) bits--;
            fixture f = fixture_new(kv_type, type, 0);
            const tensor *x[3] = {&f.k, &f.v, &f.q};
            for (int which = 0; which < 3; which++)
                for (size_t i = 0; i < N * x[which]->n_heads * x[which]->dim; i++)
                    store_bits(tensor_at(x[which], 0, 0, i),
                               bits | (i % 2 ? format_of(type).sign : 0), type);
            OK(bkv_prefill(&f.c, f.k.view, f.v.view, f.q.view, f.out, N, 0, 0, 1));
            for (int i = 0; i < 100; i++) /* through halvings, too */
                OK(bkv_append(&f.c, f.k.view, f.v.view, N, 0, 0, 1));
            CHECK(cache_stats(&f.c).halvings > 0);
            OK(bkv_attend(&f.c, f.q.view, f.out, 0, 1));
            for (size_t i = 0; i < OUT; i++) CHECK(isfinite(f.out[i]));
            tensor_free(&f.k), tensor_free(&f.v), tensor_free(&f.q);
            free(f.block), free(f.block_before);
        }
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Fills the budget and beyond, and attends; all sizes are known, so nothing here allocates. */
static void whole_life(bkv_cache *c, const bkv_config *cfg, void *mem, const fixture *f,
                       float *out) {
    bkv_stats_info stats;
    bkv_token_info info;
    size_t bytes = bkv_size(cfg);
    OK(bkv_init(c, cfg, mem, bytes));
    for (int i = 0; i < 90; i++) OK(bkv_append(c, f->k.view, f->v.view, N, 0, 0, 1));
    OK(bkv_prefill(c, f->k.view, f->v.view, f->q.view, out, N, 0, 0, 1));
    OK(bkv_attend_partial(c, f->q.view, out, out + OUT, out + OUT + PARTS, 0, 1));
    OK(bkv_attach(c, mem, bytes, 0));
    OK(bkv_attend(c, tensor_from(&f->q, 1), out + PARTS * VALUE_DIM, 0, 1));
    OK(bkv_token(c, 0, 0, &info));
    OK(bkv_stats(c, &stats));
    CHECK(stats.halvings > 0);
}

enum { LIFE_OUT = OUT + 2 * PARTS };

static void any_alignment(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 0);
    float want[LIFE_OUT], got[LIFE_OUT];
    for (uint32_t rule = BKV_RULE_SAMPLE; rule <= BKV_RULE_WINDOW; rule++) {
        bkv_config cfg = f.cfg;
        cfg.rule = rule;
        cfg.kv_type = storage_types[2 * rule];
        size_t bytes = bkv_size(&cfg);
        unsigned char *block = (unsigned char *)checked(malloc(bytes + 3 * 64));
        unsigned char *base = block + (64 - (uintptr_t)block % 64);
        bkv_cache first = cache_new(&cfg), c;
        memset(want, 0, sizeof want);
        whole_life(&first, &cfg, first.mem, &f, want);
        for (size_t offset = 0; offset < 64; offset += test_quick() ? 9 : 1) {
            memset(block, 0xC3, bytes + 3 * 64);
            memset(got, 0, sizeof got);
            whole_life(&c, &cfg, base + offset, &f, got);
            CHECKF(same_state(&first, &c), "offset %zu", offset);
            CHECKF(memcmp(want, got, sizeof got) == 0, "offset %zu", offset);
            for (unsigned char *p = block; p < block + bytes + 3 * 64; p++)
                if (p < base + offset || p >= base + offset + bytes)
                    CHECKF(*p == 0xC3, "offset %zu: wrote outside the block", offset);
        }
        cache_free(&first);
        free(block);
    }
    fixture_free(&f);
}

static void no_allocation(void) {
#ifdef COUNT_ALLOCATIONS
    static float out[LIFE_OUT];
    fixture f = fixture_new(BKV_F16, BKV_F32, 0);
    bkv_cache c = cache_new(&f.cfg);
    void *(*volatile allocate)(size_t) = malloc;
    void (*volatile release)(void *) = free;
    unsigned before = allocations;
    release(allocate(1));
    CHECK(allocations == before + 2); /* the counter works */
    before = allocations;
    whole_life(&c, &f.cfg, c.mem, &f, out);
    CHECKF(allocations == before, "%u allocations", allocations - before);
    cache_free(&c);
    fixture_free(&f);
#else
    printf("left out: counting allocations needs glibc and no sanitizer\n");
#endif
}

static void memory_too_small(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    size_t bytes = bkv_size(&f.cfg), sizes[] = {0, 1, 7, 8, 63, 64, 200, bytes / 2, bytes - 1};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        guarded end = guarded_new(sizes[i], 0); /* nothing beyond the size may be read either */
        memcpy(end.data, f.c.mem, sizes[i]);
        FAILS(bkv_init(&f.c, &f.cfg, end.data, sizes[i]), BKV_E_MEMORY);
        FAILS(bkv_attach(&f.c, end.data, sizes[i], 0), BKV_E_MEMORY);
        CHECK(memcmp(end.data, f.c.mem, sizes[i]) == 0);
        guarded_free(&end);
    }
    bkv_config larger = f.cfg; /* one more thread wants more scratch, and no other state */
    larger.n_threads++;
    CHECK(bkv_size(&larger) > bytes);
    FAILS(bkv_init(&f.c, &larger, f.c.mem, bytes), BKV_E_MEMORY);
    fixture_free(&f);
}

/* ---- attach ---------------------------------------------------------------------------------- */

static void attach_backends(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    uint32_t backends[8];
    size_t n = test_backends(backends);
    CHECK(cache_stats(&f.c).backend == backends[n - 1]); /* left open: the last is the fastest */
    for (uint32_t b = BKV_BACKEND_SCALAR; b <= BKV_BACKEND_NEON + 1; b++)
        if (b <= BKV_BACKEND_NEON && bkv_backends() >> b & 1) {
            bkv_cache c;
            OK(bkv_attach(&c, f.c.mem, f.c.bytes, b));
            CHECK(cache_stats(&c).backend == b);
        } else
            FAILS(bkv_attach(&f.c, f.c.mem, f.c.bytes, b), BKV_E_BACKEND);
    fixture_free(&f);
}

static void attach_foreign_bytes(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 10);
    unsigned char *block = (unsigned char *)checked(calloc(f.c.bytes, 1));
    FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_STATE);
    memset(block, 0xFF, f.c.bytes);
    FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_STATE);
    memcpy(block, f.c.mem, f.c.state_bytes); /* as a machine of the other byte order begins */
    for (size_t i = 0; i < 4; i++) block[i] = f.c.mem[3 - i];
    FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_VERSION);
    for (int n = 0; n < 200; n++) {
        for (size_t i = 0; i < f.c.bytes; i++) block[i] = (unsigned char)random_bits();
        FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_STATE);
    }
    free(block);
    fixture_free(&f);
}

/* Heads that did not see the same tokens: one is empty, or behind. */
static void attach_uneven_heads(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 400);
    unsigned char *block = (unsigned char *)checked(malloc(f.c.bytes));
    unsigned char *last = block + f.c.state_bytes - f.c.head_bytes;
    memcpy(block, f.c.mem, f.c.state_bytes);
    memset(last, 0, f.c.at[BKVI_TABLE]);
    FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_STATE);
    free(block);
    fixture_free(&f);
}

/* Two pages of a head in one place. */
static void attach_twofold_pages(void) {
    fixture f = fixture_new(BKV_F16, BKV_F32, 400);
    unsigned char *block = (unsigned char *)checked(malloc(f.c.bytes));
    unsigned char *pages = block + f.c.state_bytes - f.c.head_bytes + f.c.at[BKVI_TABLE];
    memcpy(block, f.c.mem, f.c.state_bytes);
    memcpy(pages + 8, pages, 4);
    FAILS(bkv_attach(&f.c, block, f.c.bytes, 0), BKV_E_STATE);
    free(block);
    fixture_free(&f);
}

/* Flips every bit of the header and of every head's counters and page table. The attempt either
   fails and changes nothing, or gives a cache that works without harm: it was another config. */
static void attach_damaged_bytes(void) {
    enum { MOST_HEADS = 64 };
    static float rows[MOST_HEADS * 512], out[MOST_HEADS * 512];
    const bkv_tensor zeros = bkv_dense(rows, BKV_F32);
    fixture f = fixture_new(BKV_F16, BKV_F32, 400);
    bkv_cache c = f.c;
    size_t header = c.state_bytes - N_KV * c.head_bytes, tables = c.at[BKVI_TABLE] + 8 * c.n_pages;
    unsigned seen[32] = {0}; /* how often each result came */
    unsigned char *block = (unsigned char *)checked(malloc(c.bytes));
    for (size_t i = 0; i < c.state_bytes; i++) {
        if (i >= header && (i - header) % c.head_bytes >= tables) continue;
        for (size_t bit = test_quick() ? i % 8 : 0; bit < 8; bit += test_quick() ? 8 : 1) {
            memcpy(block, c.mem, c.state_bytes);
            block[i] ^= (unsigned char)(1u << bit);
            bkv_result r = bkv_attach(&f.c, block, c.bytes, 0);
            seen[-(int)r]++;
            if (i >= 80 && i < header) CHECK(r == BKV_E_STATE); /* behind the config all is 0 */
            if (r != BKV_OK) {
                CHECK(untouched(&f));
                block[i] ^= (unsigned char)(1u << bit);
                CHECK(memcmp(block, c.mem, c.state_bytes) == 0);
            } else if (f.c.cfg.n_q_heads <= MOST_HEADS) {
                for (int n = 0; n < 70; n++) OK(bkv_append(&f.c, zeros, zeros, 1, 0, 0, 1));
                OK(bkv_attend(&f.c, zeros, out, 0, 1));
            }
            f.c = c;
        }
    }
    CHECK(seen[-BKV_E_VERSION] > 0 && seen[-BKV_E_STATE] > 100);
    free(block);
    fixture_free(&f);
}

/* ---- names ----------------------------------------------------------------------------------- */

static void names(void) {
#define BKV_X(name, value, text) name,
    static const bkv_result all[] = {BKV_RESULTS(BKV_X)};
#undef BKV_X
    static const bkv_result unknown[] = {BKV_RESULT_FORCE_INT, (bkv_result)1, (bkv_result)-99,
                                         (bkv_result)-1000, (bkv_result)INT_MIN};
    for (size_t i = 0; i < COUNT(all); i++) {
        const char *text = bkv_result_string(all[i]);
        CHECK(text && *text && (i == 0 || all[i] < 0));
        for (size_t j = 0; j < i; j++)
            CHECK(all[i] != all[j] && text && strcmp(text, bkv_result_string(all[j])) != 0);
        for (size_t j = 0; j < COUNT(unknown); j++)
            CHECK(bkv_result_string(unknown[j]) && text &&
                  strcmp(text, bkv_result_string(unknown[j])) != 0);
    }
    char version[32];
    (void)snprintf(version, sizeof version, "%d.%d.%d", BKV_VERSION_MAJOR, BKV_VERSION_MINOR,
                   BKV_VERSION_PATCH);
    CHECK(strcmp(bkv_version(), version) == 0);
    static const char *const backends[] = {"auto", "scalar", "avx2", "avx512", "neon", "?"};
    for (uint32_t b = 0; b < COUNT(backends); b++)
        CHECK(strcmp(bkv_backend_name(b), backends[b]) == 0);
    CHECK(strcmp(bkv_backend_name(UINT32_MAX), "?") == 0);
    CHECK(bkv_backends() != 0 && (bkv_backends() & 1) == 0 && bkv_backends() < 32);
}

int main(int argc, char **argv) {
    TEST_MAIN(T(configs), T(budgets), T(defaults), T(default_scales), T(constant_sizes),
              T(null_pointers), T(counts_flags_threads), T(tensors), T(indices), T(bad_values),
              T(bad_values_on_every_backend), T(largest_values), T(any_alignment), T(no_allocation),
              T(memory_too_small), T(attach_backends), T(attach_foreign_bytes),
              T(attach_damaged_bytes), T(attach_uneven_heads), T(attach_twofold_pages), T(names));
}
