/* test_golden.c - the library against an independent model.

   tests/golden/cases.h holds what the float64 NumPy model of gen_golden.py keeps of a stream, with
   which weights and uses, and what attention over it gives. Each case is replayed on every backend
   and with every type of floats: the inputs are exact in all of them, so the results must agree
   until a refit's values are rounded to f16 or bf16, and a halving decides by those. The types of
   integers have cases of their own, whose model rounds as tests/golden/README.md says. */
#include "test.h"

typedef struct golden_case {
    uint32_t rule, importance, rounds, n_q_heads, n_kv_heads, head_dim, value_dim;
    uint32_t budget, sinks, window;
    float temp, scale, softcap;
    uint64_t seed, data; /* of the halvings; of the inputs */
    uint32_t every;      /* tokens from one attend to the next; 0: only at checkpoints */
    uint32_t pin;        /* every so many tokens one is pinned; 0: none */
    uint32_t integers;   /* the kv_type, BKV_I8 or above; 0: each type of floats */
    uint32_t at[2];      /* checkpoints: tokens seen */
} golden_case;

#include "golden/cases.h"

/* The stored answers are read in order: by checkpoint, then head. */
typedef struct golden_answers {
    const uint16_t *position;
    const double *weight, *use, *output;
} golden_answers;

enum { KEY, VALUE, QUERY, KEY_OFFSET, QUERY_OFFSET };
enum { MOST = 100 }; /* elements of the heads of a token */

/* An integer -64..63, gen_golden.py's noise(): the finaliser of splitmix64 over a counter. */
static int noise(uint64_t data, uint64_t what, uint64_t token, uint64_t head, uint64_t i) {
    uint64_t z = (((what << 20 | token) << 4 | head) << 9) + i + 1;
    z = data + 0x9E3779B97F4A7C15u * z;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (int)(z >> 57) - 64;
}

/* x[n_heads][dim] of one token. */
static void make_token(const golden_case *g, unsigned what, uint32_t token, uint32_t n_heads,
                       uint32_t dim, float *x) {
    for (uint32_t h = 0; h < n_heads; h++)
        for (uint32_t i = 0; i < dim; i++) {
            int n = noise(g->data, what, token, h, i);
            if (what == KEY)
                n += (noise(g->data, KEY_OFFSET, 0, h, i) + 64) / 2 - 32; /* rounded down */
            if (what == QUERY) n += noise(g->data, QUERY_OFFSET, 0, h, i);
            x[h * dim + i] = (float)n / 64.0f;
        }
}

/* Compares the tokens of all heads with the answers and steps over them. The answers know only a
   sum of the uses, each times its place; sinks have none to speak of. */
static void compare_tokens(const bkv_cache *c, const golden_case *g, golden_answers *a) {
    uint32_t held = cache_stats(c).tokens_held;
    for (uint32_t h = 0; h < g->n_kv_heads; h++, a->position += held, a->weight += held, a->use++) {
        double use = 0;
        for (uint32_t i = 0; i < held; i++) {
            bkv_token_info info = cache_token(c, h, i);
            CHECKF(info.position == a->position[i], "head %u, token %u: position %u, not %u",
                   (unsigned)h, (unsigned)i, (unsigned)info.position, (unsigned)a->position[i]);
            CHECKF(fabs((double)info.weight - a->weight[i]) <= 1e-5 * a->weight[i],
                   "head %u, position %u: weight %.9g, not %.9g", (unsigned)h,
                   (unsigned)info.position, (double)info.weight, a->weight[i]);
            if (info.kind != BKV_KIND_SINK) use += i * (double)info.use;
        }
        CHECKF(fabs(use - *a->use) <= 1e-5 * *a->use, "head %u: uses %.9g, not %.9g", (unsigned)h,
               use, *a->use);
    }
}

/* Attends with the checkpoint's queries. The inputs have max |v| = 1, so the bound is 2e-5 of it,
   and `rounding` of values that a refit has moved. */
static void compare_outputs(bkv_cache *c, const golden_case *g, uint32_t seen, double rounding,
                            golden_answers *a) {
    float q[MOST], out[MOST];
    uint32_t n = g->n_q_heads * g->value_dim;
    for (uint32_t t = 0; t < GOLDEN_QUERIES; t++, a->output += n) {
        make_token(g, QUERY, seen - 1 + t, g->n_q_heads, g->head_dim, q);
        OK(bkv_attend(c, bkv_dense(q, BKV_F32), out, 0, 1));
        for (uint32_t i = 0; i < n; i++)
            CHECKF(fabs((double)out[i] - a->output[i]) <= 2e-5 + rounding,
                   "query %u, output %u: %.9g, not %.9g", (unsigned)t, (unsigned)i, (double)out[i],
                   a->output[i]);
    }
}

/* Steps over the answers of a checkpoint. */
static void skip(const bkv_cache *c, const golden_case *g, golden_answers *a) {
    uint32_t held = g->n_kv_heads * cache_stats(c).tokens_held;
    a->position += held;
    a->weight += held;
    a->use += g->n_kv_heads;
    a->output += GOLDEN_QUERIES * g->n_q_heads * g->value_dim;
}

/* What 16 bits make of a value below 2, as all are that one refit has moved; 0: nothing, as they
   hold the inputs and no refit is due, f32 holds all, and the model of integers rounds as well. */
static double rounding_of(const golden_case *g, uint32_t kv_type) {
    const uint32_t parts = g->importance == BKV_NONE ? 0 : g->importance ? g->importance : 7;
    if (g->integers || g->rule != BKV_RULE_SAMPLE || g->rounds == BKV_NONE ||
        !(parts & (BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY)))
        return 0;
    return kv_type == BKV_F16 ? 1.0 / 2048 : kv_type == BKV_BF16 ? 1.0 / 256 : 0;
}

/* Streams one case through a cache; returns the place of the next case's answers. */
static golden_answers replay(const golden_case *g, uint32_t backend, uint32_t kv_type,
                             golden_answers a) {
    unsigned errors_before = test_errors;
    bkv_config cfg = bkv_config_default(g->n_q_heads, g->n_kv_heads, g->head_dim, g->budget);
    cfg.value_dim = g->value_dim;
    cfg.kv_type = g->integers ? g->integers : kv_type;
    cfg.sinks = g->sinks;
    cfg.window = g->window;
    cfg.rule = g->rule;
    cfg.importance = g->importance;
    cfg.rounds = g->rounds;
    cfg.backend = backend;
    cfg.temp = g->temp;
    cfg.scale = g->scale;
    cfg.softcap = g->softcap;
    cfg.seed = g->seed;
    bkv_cache c = cache_new(&cfg);
    float k[MOST], v[MOST], q[MOST], out[MOST];
    uint32_t seen = 0, level;
    const double rounding = rounding_of(g, kv_type);
    for (unsigned i = 0; i < GOLDEN_CHECKPOINTS; i++) {
        for (; seen < g->at[i]; seen++) {
            make_token(g, KEY, seen, g->n_kv_heads, g->head_dim, k);
            make_token(g, VALUE, seen, g->n_kv_heads, g->value_dim, v);
            OK(bkv_append(&c, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), 1,
                          g->pin && seen % g->pin == 0 ? BKV_PIN : 0, 0, 1));
            if (g->every == 0 || seen % g->every) continue;
            make_token(g, QUERY, seen, g->n_q_heads, g->head_dim, q);
            OK(bkv_attend(&c, bkv_dense(q, BKV_F32), out, 0, 1));
        }
        level = cache_stats(&c).max_level;
        CHECK(i > 0 || level == 1 || rounding <= 0); /* every type has a refit to agree in */
        if (level > 1 && rounding > 0) {
            skip(&c, g, &a);
        } else {
            compare_tokens(&c, g, &a);
            compare_outputs(&c, g, seen, rounding, &a);
        }
    }
    if (test_errors != errors_before)
        printf("    ... in case %u, %s, %s\n", (unsigned)(g - golden_cases),
               bkv_backend_name(backend), type_name(cfg.kv_type));
    cache_free(&c);
    return a;
}

/* All cases with one storage type, on every backend. */
static void golden(uint32_t type) {
    uint32_t backends[8];
    size_t n_backends = test_backends(backends);
    CHECK(n_backends > 0);
    for (size_t b = 0; b < n_backends; b++) {
        golden_answers a = {golden_positions, golden_weights, golden_uses, golden_outputs};
        for (size_t i = 0; i < COUNT(golden_cases); i++)
            a = replay(&golden_cases[i], backends[b], type, a);
        CHECK(a.position == golden_positions + COUNT(golden_positions));
        CHECK(a.weight == golden_weights + COUNT(golden_weights));
        CHECK(a.use == golden_uses + COUNT(golden_uses));
        CHECK(a.output == golden_outputs + COUNT(golden_outputs));
    }
}

static void golden_f32(void) { golden(BKV_F32); }
static void golden_f16(void) { golden(BKV_F16); }
static void golden_bf16(void) { golden(BKV_BF16); }

int main(int argc, char **argv) { TEST_MAIN(T(golden_f32), T(golden_f16), T(golden_bf16)); }
