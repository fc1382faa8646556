/* Every backend against the first one (scalar where it is compiled in): the same calls must give
   the same bytes, outputs and state, for all dimensions, types, groups, layouts and rules. */
#include "test.h"

enum { PREFILL = 20, MIXED = 317 }; /* tokens: prefill, then appended in chunks */

typedef struct scene {
    bkv_config cfg;
    tensor k, v, q;
    size_t n_floats; /* of all outputs together */
} scene;

typedef struct axis {
    uint32_t n_values, seen; /* bit i: value i was tried */
} axis;

/* Any value of an axis, and a note that it was tried. */
static uint32_t any(axis *a) {
    uint32_t i = random_below(a->n_values);
    a->seen |= 1u << i;
    return i;
}

static const uint32_t dims[] = {1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 80, 96, 100, 128, 256, 512};

static axis value_dims = {COUNT(dims), 0}, types_q = {3, 0}, groups = {16, 0}, rules = {6, 0},
            layouts_k = {N_LAYOUTS, 0}, layouts_v = {N_LAYOUTS, 0}, layouts_q = {N_LAYOUTS, 0},
            shifts = {2, 0}, forms = {4, 0}, windows = {3, 0}, n_heads = {3, 0},
            importances = {9, 0}, rounds = {4, 0};

static uint32_t exercised; /* bit of each backend that ran */

static tensor random_tensor(size_t n, size_t heads, size_t dim, uint32_t type, uint32_t layout) {
    tensor x = tensor_new(n, heads, dim, type, (int)layout, any(&shifts));
    tensor_randomise(&x, 1.5);
    return x;
}

static scene scene_new(uint32_t d, uint32_t in_type, uint32_t kv_type) {
    static const uint32_t window[] = {0, BKV_NONE, 64}, n_rounds[] = {0, BKV_NONE, 1, 5};
    scene s;
    memset(&s, 0, sizeof s);
    bkv_config *cfg = &s.cfg;
    uint32_t form = any(&forms);
    cfg->head_dim = d;
    do /* wide with wide only: keeps the slowest backend fast enough */
        cfg->value_dim = dims[any(&value_dims)];
    while (test_quick() && d * cfg->value_dim > 20000);
    cfg->n_kv_heads = d > 128 ? 1 : 1 + any(&n_heads);
    cfg->n_q_heads = cfg->n_kv_heads * (1 + any(&groups));
    cfg->kv_type = kv_type;
    cfg->budget = 208;
    cfg->window = window[any(&windows)];
    cfg->rule = any(&rules); /* half of the scenes `sample`: it has most to compute */
    if (cfg->rule == BKV_RULE_DEFAULT || cfg->rule > BKV_RULE_WINDOW) cfg->rule = BKV_RULE_SAMPLE;
    cfg->importance = any(&importances);
    if (cfg->importance == 8) cfg->importance = BKV_NONE;
    cfg->rounds = n_rounds[any(&rounds)];
    cfg->scale = form & 1 ? 0.11f : 0;
    cfg->softcap = form & 2 ? 3.0f : 0;
    cfg->seed = random_bits();
    s.k = random_tensor(PREFILL + MIXED, cfg->n_kv_heads, d, in_type, any(&layouts_k));
    s.v = random_tensor(PREFILL + MIXED, cfg->n_kv_heads, cfg->value_dim, in_type, any(&layouts_v));
    s.q = random_tensor(PREFILL, cfg->n_q_heads, d, test_types[any(&types_q)], any(&layouts_q));
    s.n_floats = (size_t)cfg->n_q_heads * ((PREFILL + 4) * cfg->value_dim + 2);
    return s;
}

static void scene_free(scene *s) { tensor_free(&s->k), tensor_free(&s->v), tensor_free(&s->q); }

/* Runs the calls of the scene on a backend; out gets all outputs. */
static bkv_cache play(const scene *s, uint32_t backend, float *out) {
    static const size_t chunks[] = {1, 43, 144, MIXED - 1 - 43 - 144}; /* 208 slots, and beyond */
    bkv_config cfg = s->cfg;
    cfg.backend = backend;
    bkv_cache c = cache_new(&cfg);
    size_t row = (size_t)cfg.n_q_heads * cfg.value_dim, t = PREFILL;
    OK(bkv_prefill(&c, s->k.view, s->v.view, s->q.view, out, PREFILL, 0, 0, 1));
    out += PREFILL * row;
    for (size_t i = 0; i < COUNT(chunks); t += chunks[i++], out += row) {
        bkv_tensor q = tensor_from(&s->q, 3 * i);
        OK(bkv_append(&c, tensor_from(&s->k, t), tensor_from(&s->v, t), chunks[i], 0, 0, 1));
        if (i + 1 < COUNT(chunks))
            OK(bkv_attend(&c, q, out, 0, 1));
        else
            OK(bkv_attend_partial(&c, q, out, out + row, out + row + cfg.n_q_heads, 0, 1));
    }
    CHECK(cache_stats(&c).halvings > 0);
    CHECK(cache_stats(&c).backend == backend);
    exercised |= 1u << cache_stats(&c).backend;
    return c;
}

static void compare_backends(const scene *s) {
    uint32_t list[8];
    size_t n = test_backends(list);
    float *want = new_floats(s->n_floats), *got = new_floats(s->n_floats);
    bkv_cache first = play(s, list[0], want);
    for (size_t i = 0; i < s->n_floats; i++) CHECK(isfinite(want[i]));
    for (size_t b = 1; b < n; b++) {
        memset(got, 0, s->n_floats * sizeof(float));
        bkv_cache c = play(s, list[b], got);
        size_t at = 0;
        while (at < s->n_floats && memcmp(&want[at], &got[at], sizeof(float)) == 0) at++;
        CHECKF(at == s->n_floats && same_state(&first, &c),
               "%s: %s of d %u, %u, %s from %s, q %s, heads %u/%u, rule %u, importance %u, "
               "rounds %u, scale %g, softcap %g",
               bkv_backend_name(list[b]), at == s->n_floats ? "state" : "output", s->cfg.head_dim,
               s->cfg.value_dim, type_name(s->cfg.kv_type), type_name(s->k.view.type),
               type_name(s->q.view.type), s->cfg.n_q_heads, s->cfg.n_kv_heads, s->cfg.rule,
               s->cfg.importance, s->cfg.rounds, (double)s->cfg.scale, (double)s->cfg.softcap);
        cache_free(&c);
    }
    cache_free(&first);
    free(want), free(got);
}

static void backends_agree(void) {
    for (size_t d = 0; d < COUNT(dims); d++)
        for (size_t pair = 0; pair < 3 * N_STORAGE; pair++) {
            if (test_quick() && pair != d % (3 * N_STORAGE)) continue;
            scene s = scene_new(dims[d], test_types[pair % 3], storage_types[pair / 3]);
            compare_backends(&s);
            scene_free(&s);
        }
    axis *all[] = {&types_q, &rules,  &layouts_k,  &layouts_v,   &layouts_q, &shifts, &forms,
                   &windows, &groups, &value_dims, &importances, &n_heads,   &rounds};
    for (size_t i = 0; i < COUNT(all) && !test_quick(); i++)
        CHECKF(all[i]->seen == (1u << all[i]->n_values) - 1, "axis %zu: only %x", i, all[i]->seen);
}

/* Logits that are zeros of both signs: which of them is the maximum must not show. */
static void zeros_of_both_signs(void) {
    static const float key[20] = {0, 1e-30f, 0, 0, 1e-30f, -0.0f, 0, -1e-30f, 0, 1e-30f};
    uint32_t first = 0;
    float expected[3] = {0, 0, 0};
    bkv_config cfg = bkv_config_default(1, 1, 1, 208);
    cfg.kv_type = BKV_F32;
    for (uint32_t b = BKV_BACKEND_SCALAR; b <= BKV_BACKEND_NEON; b++)
        for (uint32_t n = 1; n <= COUNT(key) && bkv_backends() >> b & 1; n++) {
            const float q = -1e-30f;
            float got[3];
            cfg.backend = b;
            bkv_cache c = cache_new(&cfg);
            OK(bkv_append(&c, bkv_dense(key, BKV_F32), bkv_dense(key, BKV_F32), n, 0, 0, 1));
            OK(bkv_attend_partial(&c, bkv_dense(&q, BKV_F32), got, got + 1, got + 2, 0, 1));
            CHECK(got[1] == 0 && !signbit(got[1]));
            if (n == COUNT(key) && !first) memcpy(expected, got, sizeof got), first = b;
            if (n == COUNT(key)) CHECK(memcmp(expected, got, sizeof got) == 0);
            cache_free(&c);
        }
}

/* BKV_EXPECT=scalar,avx2: these must have run, so that no machine skips one in silence. */
static void expected_backends_ran(void) {
    const char *want = getenv("BKV_EXPECT");
    printf("backends exercised:");
    for (uint32_t b = 0; b < 32; b++)
        if (exercised >> b & 1) printf(" %s", bkv_backend_name(b));
    printf("\n");
    CHECK(exercised == bkv_backends());
    for (uint32_t a = 0; a < 32; a++) /* and by functions of their own */
        for (uint32_t b = 0; b < a; b++)
            if ((exercised >> a & exercised >> b & 1) != 0)
                CHECK(bkvi_kernels_of(a).attend != bkvi_kernels_of(b).attend);
    while (want && *want) {
        size_t n = strcspn(want, ",");
        int ran = 0;
        for (uint32_t b = 0; b < 32; b++) {
            const char *name = bkv_backend_name(b);
            ran |= (exercised >> b & 1) && strlen(name) == n && strncmp(name, want, n) == 0;
        }
        CHECKF(ran || n == 0, "expected, but not run: %.*s", (int)n, want);
        want += n + (want[n] == ',');
    }
}

int main(int argc, char **argv) {
    TEST_MAIN(T(backends_agree), T(zeros_of_both_signs), T(expected_backends_ran));
}
