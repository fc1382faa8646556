/* Fuzzing of all operations, against a plain reference in double: bytes become a config and then
   operations. After each the state must be valid; outputs must be those of softmax over the tokens
   that bkv_export() shows; a call that fails must have changed nothing.

   libFuzzer  clang -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_ops.c -o fuzz -lm
   AFL++      afl-clang-fast -g -O1 -DREPLAY -I. tests/fuzz_ops.c -o fuzz -lm; afl-fuzz .. ./fuzz @@
   replay     cc -O1 -DREPLAY -I. tests/fuzz_ops.c -o fuzz -lm; ./fuzz FILE.. or
              ./fuzz --random OPERATIONS [SEED] */
#ifndef LINKED /* with an object of tests/linked.c */
#define BALANCEKV_IMPLEMENTATION
#endif
#include "balancekv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_Q = 8, MOST_DIM = 40, MOST_TOKENS = 150, GUARD = 64 };
#define REQUIRE(cond) ((cond) ? (void)0 : broken(__LINE__, #cond))

static void broken(int line, const char *what) {
    fprintf(stderr, "fuzz_ops.c:%d: not true: %s\n", line, what);
    abort();
}

/* ---- the bytes ---- */
static const uint8_t *bytes_at, *bytes_end;
static uint64_t done_operations;
static uint32_t next_byte(void) { return bytes_at < bytes_end ? *bytes_at++ : 0; }
static uint32_t below(uint32_t n) { return (next_byte() << 8 | next_byte()) % n; }

/* Numbers from a counter that the bytes set: whole tensors need no input of their own. Now and then
   huge, tiny or equal ones. */
static uint64_t noise;
static float number(uint32_t kind) {
    noise = noise * 6364136223846793005u + 1442695040888963407u;
    float x = (float)((double)(int32_t)(noise >> 33) / 1073741824.0 - 1.0);
    return kind == 0   ? x * 1e-30f
           : kind == 1 ? x * 1000.0f
           : kind == 2 ? 1.0f
           : kind == 3 ? (noise >> 40 & 7 ? 0.0f : x * 30.0f)
                       : 2.0f * x;
}

/* ---- one cache under test ---- */
static float k_in[MOST_TOKENS * MOST_Q * MOST_DIM], v_in[MOST_TOKENS * MOST_Q * MOST_DIM],
    q_in[MOST_TOKENS * MOST_Q * MOST_DIM], out[MOST_TOKENS * MOST_Q * MOST_DIM];

static void fill(float *x, size_t n) {
    uint32_t kind = below(12);
    for (size_t i = 0; i < n; i++) x[i] = number(kind);
}

static unsigned char *block_new(size_t bytes) { /* guarded on both sides, at any alignment */
    unsigned char *p = (unsigned char *)malloc(bytes + 2 * GUARD);
    if (!p) exit(2);
    memset(p, 0xA5, bytes + 2 * GUARD);
    return p + GUARD - 1;
}
static void block_free(unsigned char *mem, size_t bytes) {
    for (size_t i = 0; i < GUARD - 1; i++) REQUIRE(mem[i - GUARD + 1] == 0xA5);
    for (size_t i = 0; i < GUARD; i++) REQUIRE(mem[bytes + i] == 0xA5);
    free(mem - GUARD + 1);
}

static int finite_floats(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(x[i] - x[i] == 0.0f)) return 0;
    return 1;
}

/* out[h][..] against softmax over the exported rows. */
static void compare(bkv_cache *c, const float *q, const float *got) {
    const bkv_config *g = &c->cfg;
    const uint32_t group = g->n_q_heads / g->n_kv_heads, slots = c->slots;
    float *k = (float *)malloc(slots * (g->head_dim + g->value_dim + 1) * sizeof *k);
    float *v = k + slots * g->head_dim, *mask = v + slots * g->value_dim;
    double *logit = (double *)malloc(slots * sizeof *logit);
    for (uint32_t h = 0; h < g->n_q_heads; h++) {
        bkv_rows rows;
        double max = -1e300, sum = 0, o[MOST_DIM] = {0}, size = 0, shift = 0;
        memset(&rows, 0, sizeof rows);
        rows.k = k, rows.v = v, rows.mask = mask, rows.n_rows = slots;
        rows.type = rows.mask_type = BKV_F32;
        REQUIRE(h % group || bkv_export(c, h / group, &rows) == BKV_OK);
        for (uint32_t r = 0; r < slots; r++) {
            double s = 0;
            logit[r] = -1e300;
            if (!(mask[r] > -1e30f)) continue;
            for (uint32_t i = 0; i < g->head_dim; i++)
                s += (double)q[h * g->head_dim + i] * (double)k[r * g->head_dim + i];
            s *= (double)g->scale;
            if (g->softcap > 0) s = (double)g->softcap * tanh(s / (double)g->softcap);
            if (fabs(s) > shift) shift = fabs(s);
            logit[r] = s + (double)mask[r];
            if (logit[r] > max) max = logit[r];
        }
        for (uint32_t r = 0; r < slots; r++) {
            if (logit[r] - max < -745) continue; /* exp() of it is 0 */
            double p = exp(logit[r] - max);
            sum += p;
            for (uint32_t i = 0; i < g->value_dim; i++) {
                o[i] += p * (double)v[r * g->value_dim + i];
                if (logit[r] > -1e299 && fabs((double)v[r * g->value_dim + i]) > size)
                    size = fabs((double)v[r * g->value_dim + i]);
            }
        }
        /* An error of the logits is at most a few roundings of the largest. */
        for (uint32_t i = 0; i < g->value_dim && shift < 1e5; i++)
            REQUIRE(fabs(o[i] / sum - (double)got[h * g->value_dim + i]) <=
                    size * (1e-4 + 4e-6 * shift) + 1e-35);
    }
    free(k), free(logit);
}

static bkv_tensor tensor(float *x) { return bkv_dense(x, BKV_F32); }

/* Calls that must fail and change nothing. */
static void bad_call(bkv_cache *c) {
    unsigned char *was = (unsigned char *)malloc(c->state_bytes);
    bkv_cache handle = *c;
    bkv_tensor t = tensor(k_in), bad = t;
    bkv_stats_info s;
    bkv_rows rows;
    memset(&rows, 0, sizeof rows);
    memcpy(was, c->mem, c->state_bytes);
    REQUIRE(bkv_stats(c, &s) == BKV_OK);
    switch (below(11)) {
    case 0: REQUIRE(bkv_append(c, t, t, 0, 0, 0, 1) == BKV_E_COUNT); break;
    case 1: REQUIRE(bkv_append(c, t, t, 1, 1u << 31, 0, 1) == BKV_E_FLAGS); break;
    case 2: REQUIRE(bkv_append(c, t, t, 1, 0, 1, 1) == BKV_E_THREADS); break;
    case 3:
        bad.type = 99;
        REQUIRE(bkv_append(c, t, bad, 1, 0, 0, 1) == BKV_E_TYPE);
        break;
    case 4:
        bad.data = NULL;
        REQUIRE(bkv_append(c, bad, t, 1, 0, 0, 1) == BKV_E_NULL);
        break;
    case 5: {
        float old = k_in[0];
        k_in[0] = below(2) ? NAN : INFINITY;
        REQUIRE(bkv_append(c, t, t, 3, 0, 0, 1) == BKV_E_VALUE);
        k_in[0] = old;
        break;
    }
    case 6: REQUIRE(bkv_truncate(c, s.tokens_seen + 1) == BKV_E_ROLLBACK); break;
    case 7: REQUIRE(bkv_shrink(c, s.slots + 16) == BKV_E_BUDGET); break;
    case 8: REQUIRE(bkv_shrink(c, s.sinks + 127) == BKV_E_BUDGET); break;
    case 9: REQUIRE(bkv_save(c, was, c->state_bytes - 1) == BKV_E_MEMORY); break;
    default: REQUIRE(bkv_export(c, c->cfg.n_kv_heads, &rows) == BKV_E_INDEX); break;
    }
    REQUIRE(!memcmp(was, c->mem, c->state_bytes) && !memcmp(&handle, c, sizeof handle));
    free(was);
}

static void operation(bkv_cache *c, size_t *block_bytes) {
    const bkv_config *g = &c->cfg;
    const size_t k_row = g->n_kv_heads * g->head_dim, v_row = g->n_kv_heads * g->value_dim;
    const size_t q_row = g->n_q_heads * g->head_dim, out_row = g->n_q_heads * g->value_dim;
    uint32_t what = next_byte() % 16, flags = next_byte() % 4 == 0 ? next_byte() % 4 : 0;
    bkv_stats_info before;
    REQUIRE(bkv_stats(c, &before) == BKV_OK);
    done_operations++;
    if (what < 7) {
        size_t n = what < 3 ? 1 : 1 + below(MOST_TOKENS);
        fill(k_in, n * k_row), fill(v_in, n * v_row), fill(q_in, n * q_row);
        if (what % 2) {
            REQUIRE(bkv_prefill(c, tensor(k_in), tensor(v_in), tensor(q_in), out, n, flags, 0, 1) ==
                    BKV_OK);
            compare(c, q_in + (n - 1) * q_row, out + (n - 1) * out_row);
            REQUIRE(finite_floats(out, n * out_row));
        } else {
            REQUIRE(bkv_append(c, tensor(k_in), tensor(v_in), n, flags, 0, 1) == BKV_OK);
        }
    } else if (what < 9) {
        float max[MOST_Q], sum[MOST_Q];
        bkv_result r;
        fill(q_in, q_row);
        r = what == 7 ? bkv_attend(c, tensor(q_in), out, 0, 1)
                      : bkv_attend_partial(c, tensor(q_in), out, max, sum, 0, 1);
        REQUIRE(r == (before.tokens_seen ? BKV_OK : BKV_E_EMPTY));
        if (r != BKV_OK) return;
        for (uint32_t h = 0; h < g->n_q_heads && what == 8; h++)
            for (uint32_t i = 0; i < g->value_dim; i++) out[h * g->value_dim + i] /= sum[h];
        compare(c, q_in, out);
    } else if (what == 9) {
        uint64_t n = before.tokens_seen - below(90) % (before.tokens_seen + 1);
        bkv_result r = bkv_truncate(c, n);
        REQUIRE(r == BKV_OK || (r == BKV_E_ROLLBACK && (before.halvings || g->kv_type >= BKV_I8)));
        REQUIRE(bkv_stats(c, &before) == BKV_OK && (r != BKV_OK || before.tokens_seen == n));
    } else if (what == 10) {
        uint32_t budget = below(before.slots + 1);
        bkv_result r = bkv_shrink(c, budget);
        REQUIRE(r == BKV_OK || (r == BKV_E_BUDGET && budget < before.sinks + 128));
    } else if (what < 14) { /* saved and loaded; moved; branched */
        bkv_cache other;
        size_t bytes = what == 11 ? bkv_size(g) : *block_bytes;
        unsigned char *mem = block_new(bytes), *saved = block_new(c->state_bytes);
        if (what == 11) {
            REQUIRE(bkv_save(c, saved, c->state_bytes) == BKV_OK);
            REQUIRE(bkv_load_size(saved, c->state_bytes, g->n_threads) == bytes);
            REQUIRE(bkv_load(&other, saved, c->state_bytes, mem, bytes, g->n_threads,
                             below(16) ? BKV_BACKEND_AUTO : BKV_BACKEND_SCALAR) == BKV_OK);
        } else {
            memcpy(mem, c->mem, c->state_bytes);
            REQUIRE(bkv_attach(&other, mem, bytes, 0) == BKV_OK);
        }
        REQUIRE(!memcmp(other.mem, c->mem, c->state_bytes));
        block_free(saved, c->state_bytes);
        block_free(c->mem, *block_bytes);
        *c = other, *block_bytes = bytes;
    } else if (what == 14) {
        bad_call(c);
    } else {
        uint32_t i = next_byte();
        bkv_token_info token;
        REQUIRE(bkv_token(c, i % g->n_kv_heads, i, &token) ==
                (i < before.tokens_held ? BKV_OK : BKV_E_INDEX));
        if (i == 0) REQUIRE(bkv_reset(c) == BKV_OK);
    }
    REQUIRE(bkv_validate(c) == BKV_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint32_t types[] = {BKV_F32, BKV_F16, BKV_BF16, BKV_I8, BKV_I4};
    bkv_config cfg;
    bkv_cache c;
    size_t bytes;
    unsigned char *mem;
    bytes_at = data, bytes_end = data + size;
    memset(&cfg, 0, sizeof cfg);
    noise = next_byte();
    cfg.n_kv_heads = 1 + next_byte() % 2;
    cfg.n_q_heads = cfg.n_kv_heads * (1 + next_byte() % 4);
    cfg.head_dim = 1 + next_byte() % MOST_DIM;
    cfg.value_dim = next_byte() % (MOST_DIM + 1);
    cfg.kv_type = types[next_byte() % 5];
    cfg.budget = 192 + below(500);
    cfg.sinks = next_byte() % 30;
    cfg.window = next_byte() % 3 ? 0 : 64;
    cfg.importance = next_byte() % 8;
    cfg.softcap = next_byte() % 4 ? 0.0f : 20.0f;
    cfg.backend = next_byte() % 16; /* one by name now and then: most of the time goes to SCALAR */
    if (!(bkv_backends() >> cfg.backend & 1)) cfg.backend = BKV_BACKEND_AUTO;
    bytes = bkv_size(&cfg);
    if (!bytes) return 0;
    mem = block_new(bytes);
    REQUIRE(bkv_init(&c, &cfg, mem, bytes - 1) == BKV_E_MEMORY);
    REQUIRE(bkv_init(&c, &cfg, mem, bytes) == BKV_OK);
    while (bytes_at < bytes_end) operation(&c, &bytes);
    block_free(c.mem, bytes);
    return 0;
}

#ifdef REPLAY
static int run_file(const char *name) {
    static uint8_t data[1 << 16];
    FILE *f = fopen(name, "rb");
    size_t n;
    if (!f) {
        perror(name);
        return 2;
    }
    n = fread(data, 1, sizeof data, f);
    fclose(f);
    return LLVMFuzzerTestOneInput(data, n);
}

int main(int argc, char **argv) {
    if (argc >= 3 && !strcmp(argv[1], "--random")) {
        uint64_t wanted = strtoull(argv[2], NULL, 10),
                 state = argc > 3 ? strtoull(argv[3], 0, 10) : 1;
        for (uint64_t next = 0; done_operations < wanted;) {
            uint8_t data[400];
            if (done_operations >= next && wanted >= 1000000) {
                printf("%llu of %llu\n", (unsigned long long)next, (unsigned long long)wanted);
                fflush(stdout);
                next += wanted / 10;
            }
            for (size_t i = 0; i < sizeof data; i++) {
                state = state * 6364136223846793005u + 1442695040888963407u;
                data[i] = (uint8_t)(state >> 56);
            }
            LLVMFuzzerTestOneInput(data, 100 + state % 300);
        }
    } else if (argc >= 2) {
        for (int i = 1; i < argc; i++)
            if (run_file(argv[i])) return 2;
    } else {
        fprintf(stderr, "usage: %s FILE.. | --random OPERATIONS [SEED]\n", argv[0]);
        return 2;
    }
    printf("%llu operations without a finding\n", (unsigned long long)done_operations);
    return 0;
}
#endif
