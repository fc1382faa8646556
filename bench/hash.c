/* One hash of every output and every state byte of a fixed scenario: equal hashes from machines,
   backends or compilers mean equal bits. The last line is the hash; bench/hash.golden holds it.

       cc -std=c99 -O2 -I. bench/hash.c -o hash && ./hash --backend auto

   hash [--backend scalar|avx2|avx512|neon|auto] [--expect 16HEXDIGITS]
   Exit code 0; 1: a call failed, or the hash is not the expected one; 2: wrong usage, or this build
   or CPU lacks the backend. */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CHUNK = 130, TOKENS_BEYOND_BUDGET = 330 };

/* What one part of the scenario runs. Zeros are the defaults of bkv_config. */
typedef struct part {
    uint32_t rule, importance, rounds, kv_type, in_type, group, heads, head_dim, value_dim;
    uint32_t budget, sinks, window, threads;
    float scale, softcap, temp;
} part;

enum { KEY = BKV_IMPORTANCE_KEY, QUERY = BKV_IMPORTANCE_QUERY, USE = BKV_IMPORTANCE_USE };

/* Every rule and importance, pairs of types, the tuned head dims and odd ones, groups 1 to 16. */
#define SAMPLE BKV_RULE_SAMPLE
static const part parts[] = {
    {SAMPLE, 0, 0, BKV_F16, BKV_F32, 3, 2, 64, 0, 256, 0, 0, 1, 0.0f, 0.0f, 0.0f},
    {SAMPLE, 0, 1, BKV_F32, BKV_F32, 4, 1, 128, 0, 272, 0, 0, 1, 0.0f, 0.0f, 0.0f},
    {SAMPLE, KEY + QUERY + USE, 0, BKV_BF16, BKV_BF16, 2, 3, 80, 0, 300, 20, 100, 2, 0.5f, 0.0f,
     0.0f},
    {SAMPLE, KEY, 0, BKV_F16, BKV_F16, 7, 1, 33, 57, 320, BKV_NONE, 0, 1, 0.0f, 0.0f, 0.25f},
    {SAMPLE, QUERY, 3, BKV_F32, BKV_F16, 1, 2, 1, 1, 256, 0, BKV_NONE, 1, 1.0f, 0.0f, 0.0f},
    {SAMPLE, USE, 0, BKV_F16, BKV_BF16, 1, 1, 192, 128, 256, 0, 0, 1, 0.0f, 30.0f, 0.0f},
    {SAMPLE, KEY, 1, BKV_F32, BKV_BF16, 2, 1, 128, 0, 256, 0, 64, 1, 0.0f, 2.0f, 1.0f},
    {SAMPLE, 0, 0, BKV_BF16, BKV_F32, 5, 3, 20, 96, 272, 5, 0, 3, 0.3f, 0.0f, 4.0f},
    {SAMPLE, KEY + USE, BKV_NONE, BKV_F16, BKV_F16, 2, 2, 96, 0, 256, 0, 0, 1, 1.0f, 0.0f, 0.0f},
    {SAMPLE, BKV_NONE, BKV_NONE, BKV_F32, BKV_F32, 6, 1, 64, 7, 256, 100, BKV_NONE, 1, 2.0f, 5.0f,
     0.0f},
    {SAMPLE, BKV_NONE, 0, BKV_BF16, BKV_BF16, 1, 4, 64, 0, 256, 0, 0, 4, 0.0f, 0.0f, 0.0f},
    {SAMPLE, KEY + QUERY, 0, BKV_F16, BKV_F32, 3, 1, 256, 0, 256, 0, 0, 1, 0.0f, 50.0f, 0.0f},
    {SAMPLE, 0, 0, BKV_F32, BKV_F16, 16, 1, 17, 30, 500, 0, 0, 1, 2.0f, 0.0f, 0.0f},
    {BKV_RULE_WINDOW, 0, 0, BKV_F16, BKV_F32, 8, 1, 80, 81, 256, 0, 0, 1, 0.0f, 0.0f, 0.0f},
    {BKV_RULE_WINDOW, 0, 0, BKV_F32, BKV_F16, 1, 2, 512, 2, 220, 0, 64, 1, 0.0f, 0.0f, 0.0f},
    {SAMPLE, 0, 0, BKV_I8, BKV_F32, 3, 2, 64, 0, 528, 0, 0, 2, 0.0f, 0.0f, 0.0f},
    {SAMPLE, KEY + QUERY + USE, 0, BKV_I8, BKV_F16, 2, 1, 80, 57, 560, 20, 100, 1, 0.5f, 30.0f,
     0.0f},
    {SAMPLE, KEY, 0, BKV_I8, BKV_BF16, 7, 1, 17, 0, 256, 0, 64, 1, 1.0f, 0.0f, 0.0f},
    {BKV_RULE_WINDOW, 0, 0, BKV_I8, BKV_F32, 1, 2, 512, 128, 256, 0, 0, 1, 0.0f, 0.0f, 0.0f},
    {BKV_RULE_WINDOW, 0, 0, BKV_I8, BKV_F16, 4, 1, 1, 96, 256, 0, 0, 1, 0.0f, 0.0f, 0.0f},
    {SAMPLE, 0, 0, BKV_I4, BKV_F32, 3, 2, 72, 50, 544, 0, 0, 2, 0.0f, 0.0f, 0.0f},
    {SAMPLE, KEY + QUERY, 0, BKV_I4, BKV_F16, 2, 1, 80, 57, 560, 20, 100, 1, 0.5f, 30.0f, 0.0f},
    {SAMPLE, 0, 1, BKV_I4, BKV_BF16, 5, 2, 17, 33, 256, 0, 0, 1, 0.0f, 0.0f, 0.0f},
};

/* How the tokens arrive, again and again. Chunks of 19 and 70 cross halvings in mid-chunk. Every
   query teaches the cache, which the state and the next halvings show. */
enum { APPEND, ATTEND, PARTIAL, PREFILL };
static const struct {
    int operation;
    size_t n_tokens;
    uint32_t flags;
} steps[] = {{PREFILL, 19, 0},      {ATTEND, 1, 0}, {APPEND, MAX_CHUNK, 0}, {PARTIAL, 7, BKV_PIN},
             {PREFILL, 70, 0},      {ATTEND, 1, 0}, {ATTEND, 1, 0},         {APPEND, 64, 0},
             {PREFILL, 3, BKV_PIN}, {ATTEND, 70, 0}};

static void *allocate(size_t bytes) {
    void *p = malloc(bytes);
    if (p == NULL) {
        fprintf(stderr, "hash: out of memory\n");
        exit(1);
    }
    return p;
}

static void require(bkv_result r, const char *call) {
    if (r != BKV_OK) {
        fprintf(stderr, "hash: %s: %s\n", call, bkv_result_string(r));
        exit(1);
    }
}

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* Words are hashed as values, so that the hash does not depend on the byte order. */
static void hash_elements(uint64_t *h, const void *data, size_t bytes, size_t elem_bytes) {
    const unsigned char *at = (const unsigned char *)data, *end = at + bytes;
    for (; at < end; at += elem_bytes) {
        uint32_t word;
        uint16_t half;
        if (elem_bytes == sizeof word) {
            memcpy(&word, at, sizeof word);
        } else if (elem_bytes == 1) {
            word = *at;
        } else {
            memcpy(&half, at, sizeof half);
            word = half;
        }
        *h = (*h ^ word) * 0x9E3779B97F4A7C15u;
        *h ^= *h >> 32;
    }
}

/* The state is made of 4-byte words, except for the scales (2 bytes) and rests (1) of integers and
   the K and V elements at the end of each head. */
static void hash_state(uint64_t *h, const bkv_cache *c) {
    size_t heads = c->cfg.n_kv_heads, header = c->state_bytes - heads * c->head_bytes, i;
    hash_elements(h, c->mem, header, 4);
    for (i = 0; i < heads; i++) {
        const unsigned char *head = c->mem + header + i * c->head_bytes;
        hash_elements(h, head, c->at[BKVI_K_SCALE], 4);
        hash_elements(h, head + c->at[BKVI_K_SCALE], c->at[BKVI_K_REST] - c->at[BKVI_K_SCALE], 2);
        hash_elements(h, head + c->at[BKVI_K_REST], c->at[BKVI_K] - c->at[BKVI_K_REST], 1);
        hash_elements(h, head + c->at[BKVI_K], c->head_bytes - c->at[BKVI_K], c->elem_bytes);
    }
}

/* A random number's bit pattern: 2^-7 <= |x| < 2, now and then zero or subnormal. Made from bits:
   libm differs between machines. */
static uint32_t random_pattern(uint32_t type, uint64_t r) {
    uint32_t mantissa_bits = type == BKV_F32 ? 23 : type == BKV_F16 ? 10 : 7;
    uint32_t one = type == BKV_F16 ? 15 : 127, sign_at = type == BKV_F32 ? 31 : 15;
    uint32_t exponent = (r & 63) == 0 ? 0 : one - 7 + (uint32_t)(r >> 6 & 7);
    uint32_t mantissa = (uint32_t)(r >> (64 - mantissa_bits));
    return (uint32_t)(r >> 9 & 1) << sign_at | exponent << mantissa_bits | mantissa;
}

/* Fills [n_tokens][n_heads][dim], tokens counted from `first`, or with the tokens innermost, as
   some runtimes hold V. The values are the same either way. */
static bkv_tensor make_tensor(void *data, uint32_t type, uint64_t stream, size_t first,
                              size_t n_tokens, size_t n_heads, size_t dim, int tokens_innermost) {
    bkv_tensor x = bkv_dense(data, type);
    size_t bytes = type == BKV_F32 ? 4 : 2, t, h, i;
    x.elem_stride = tokens_innermost ? bytes * n_tokens : bytes;
    x.head_stride = x.elem_stride * dim;
    x.token_stride = tokens_innermost ? bytes : x.head_stride * n_heads;
    for (t = 0; t < n_tokens; t++) {
        for (h = 0; h < n_heads; h++) {
            for (i = 0; i < dim; i++) {
                uint64_t index = ((first + t) * n_heads + h) * dim + i;
                uint32_t word = random_pattern(type, mix((stream << 40) + index));
                uint16_t half = (uint16_t)word;
                memcpy((unsigned char *)data + t * x.token_stride + h * x.head_stride +
                           i * x.elem_stride,
                       type == BKV_F32 ? (const void *)&word : (const void *)&half, bytes);
            }
        }
    }
    return x;
}

static void run_part(const part *p, uint64_t number, uint32_t backend, uint64_t *outputs,
                     uint64_t *states) {
    uint32_t q_heads = p->heads * p->group, value_dim = p->value_dim ? p->value_dim : p->head_dim;
    uint32_t ith, nth = p->threads;
    size_t kv_floats = (size_t)MAX_CHUNK * p->heads;
    size_t n_tokens = p->budget + TOKENS_BEYOND_BUDGET, seen = 0, step = (size_t)number, bytes;
    size_t shift = 0;
    void *k_data = allocate(kv_floats * p->head_dim * sizeof(float));
    void *v_data = allocate(kv_floats * value_dim * sizeof(float));
    void *q_data = allocate(kv_floats * p->group * p->head_dim * sizeof(float));
    float *out = (float *)allocate(kv_floats * p->group * value_dim * sizeof(float));
    float *max = (float *)allocate(2 * q_heads * sizeof(float)), *sum = max + q_heads;
    unsigned char *mem;
    bkv_cache cache;
    bkv_config cfg = bkv_config_default(q_heads, p->heads, p->head_dim, p->budget);
    cfg.value_dim = p->value_dim;
    cfg.kv_type = p->kv_type;
    cfg.sinks = p->sinks;
    cfg.window = p->window;
    cfg.rule = p->rule;
    cfg.importance = p->importance;
    cfg.rounds = p->rounds;
    cfg.backend = backend;
    cfg.n_threads = p->threads;
    cfg.scale = p->scale;
    cfg.softcap = p->softcap;
    cfg.temp = p->temp;
    cfg.seed = mix(number);
    require(bkv_check(&cfg), "bkv_check");
    bytes = bkv_size(&cfg);
    mem = (unsigned char *)allocate(bytes + 64);
    require(bkv_init(&cache, &cfg, mem, bytes), "bkv_init");

    while (seen < n_tokens) {
        int operation = steps[step % (sizeof steps / sizeof *steps)].operation;
        size_t n = steps[step % (sizeof steps / sizeof *steps)].n_tokens, n_queries;
        uint32_t flags = steps[step % (sizeof steps / sizeof *steps)].flags;
        bkv_tensor k, v, q;
        n = n < n_tokens - seen ? n : n_tokens - seen;
        n_queries = operation == PREFILL ? n : 1;
        k = make_tensor(k_data, p->in_type, 4 * number, seen, n, p->heads, p->head_dim, 0);
        v = make_tensor(v_data, p->in_type, 4 * number + 1, seen, n, p->heads, value_dim,
                        number % 3 == 1);
        q = make_tensor(q_data, p->in_type, 4 * number + 2, seen, n_queries, q_heads, p->head_dim,
                        0);
        for (ith = 0; ith < nth; ith++) {
            if (operation == PREFILL) {
                require(bkv_prefill(&cache, k, v, q, out, n, flags, ith, nth), "bkv_prefill");
            } else {
                require(bkv_append(&cache, k, v, n, flags, ith, nth), "bkv_append");
            }
        }
        for (ith = 0; ith < nth && operation == ATTEND; ith++) {
            require(bkv_attend(&cache, q, out, ith, nth), "bkv_attend");
        }
        for (ith = 0; ith < nth && operation == PARTIAL; ith++) {
            require(bkv_attend_partial(&cache, q, out, max, sum, ith, nth), "bkv_attend_partial");
        }
        if (operation == PARTIAL) {
            hash_elements(outputs, max, 2 * q_heads * sizeof(float), 4);
        }
        if (operation != APPEND) {
            hash_elements(outputs, out, n_queries * q_heads * value_dim * sizeof(float), 4);
        }
        hash_state(states, &cache);
        seen += n;
        step++;
        memmove(mem + (shift + 13) % 64, mem + shift, bytes); /* to another alignment */
        shift = (shift + 13) % 64;
        require(bkv_attach(&cache, mem + shift, bytes, backend), "bkv_attach");
    }
    free(mem);
    free(max);
    free(out);
    free(q_data);
    free(v_data);
    free(k_data);
}

static int usage(const char *what, const char *argument) {
    uint32_t b;
    fprintf(stderr,
            "hash: %s '%s'\nusage: hash [--backend NAME] [--expect HASH]\nbackends here:", what,
            argument);
    for (b = 0; b < 32; b++) {
        if (b == BKV_BACKEND_AUTO || (bkv_backends() >> b & 1)) {
            fprintf(stderr, " %s", bkv_backend_name(b));
        }
    }
    fprintf(stderr, "\n");
    return 2;
}

int main(int argc, char **argv) {
    const char *name = "auto", *expected = NULL;
    char text[17];
    uint32_t backend = 0;
    uint64_t total = 0;
    size_t i;
    for (i = 1; i < (size_t)argc; i += 2) {
        if (strcmp(argv[i], "--help") == 0) {
            printf("usage: hash [--backend NAME] [--expect HASH]\n"
                   "The hash of all outputs and states; exit code 1 if another one is expected.\n");
            return 0;
        } else if (i + 1 == (size_t)argc) {
            return usage("no value after", argv[i]);
        } else if (strcmp(argv[i], "--backend") == 0) {
            name = argv[i + 1];
        } else if (strcmp(argv[i], "--expect") == 0) {
            expected = argv[i + 1];
        } else {
            return usage("unknown option", argv[i]);
        }
    }
    while (strcmp(bkv_backend_name(backend), name) != 0) {
        if (++backend == 32) {
            return usage("unknown backend", name);
        }
    }
    if (backend != BKV_BACKEND_AUTO && !(bkv_backends() >> backend & 1)) {
        return usage("this build or this CPU does not have the backend", name);
    }

    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        static const char *const types[] = {"?", "f32", "f16", "bf16", "i8", "i4"};
        static const char *const rules[] = {"?", "sample", "window"};
        const part *p = &parts[i];
        uint64_t outputs = 0, states = 0;
        run_part(p, i, backend, &outputs, &states);
        printf(
            "%-7s importance %2d rounds %2d store %-4s input %-4s group %2u heads %u dim %3u/%-3u  "
            "outputs %08x%08x  states %08x%08x\n",
            rules[p->rule], (int)p->importance, (int)p->rounds, types[p->kv_type],
            types[p->in_type], (unsigned)p->group, (unsigned)p->heads, (unsigned)p->head_dim,
            (unsigned)(p->value_dim ? p->value_dim : p->head_dim), (unsigned)(outputs >> 32),
            (unsigned)outputs, (unsigned)(states >> 32), (unsigned)states);
        fflush(stdout);
        total = mix(total ^ mix(outputs) ^ states);
    }
    sprintf(text, "%08x%08x", (unsigned)(total >> 32), (unsigned)(total & 0xFFFFFFFFu));
    printf("%s\n", text);
    if (expected != NULL && strcmp(text, expected) != 0) {
        fprintf(stderr, "hash: expected %s: this is not the arithmetic of bench/hash.golden\n",
                expected);
        return 1;
    }
    return 0;
}
