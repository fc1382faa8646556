/* test.h - what the C tests share: the harness, number formats, tensors, caches.

   A test file includes this, and with it the whole of balancekv.h, and ends with
       int main(int argc, char **argv) { TEST_MAIN(T(first_test), T(second_test)); }
   An argument runs only the tests whose name contains it. BKV_QUICK=1 asks for smaller sizes. */
#ifndef TEST_H
#define TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* mmap and threads under -std=c99 */
#endif
#ifndef LINKED /* of balancekv.h the public part alone: the rest is tests/linked.c, compiled once */
#define BALANCEKV_IMPLEMENTATION
#endif
#include "balancekv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- harness --------------------------------------------------------------------------------- */

typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;

static unsigned test_errors; /* failed checks of the running test */

/* Counts a failed check; 1 if it is worth printing more about. */
static inline int test_fail(const char *file, int line, const char *what) {
    if (++test_errors <= 10) printf("%s:%d: not true: %s\n", file, line, what);
    return test_errors <= 10;
}

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) (void)test_fail(__FILE__, __LINE__, #cond);                                   \
    } while (0)
/* CHECKF(cond, "format", ...): with the values that a reader of the failure wants to see. */
#define CHECKF(cond, ...)                                                                          \
    do {                                                                                           \
        if (!(cond) && test_fail(__FILE__, __LINE__, #cond)) {                                     \
            printf("    " __VA_ARGS__);                                                            \
            putchar('\n');                                                                         \
        }                                                                                          \
    } while (0)
#define RESULT(call, want)                                                                         \
    do {                                                                                           \
        bkv_result got_ = (call);                                                                  \
        CHECKF(got_ == (want), "%s: %s", #call, bkv_result_string(got_));                          \
    } while (0)
#define OK(call) RESULT(call, BKV_OK)

static inline int test_quick(void) {
    const char *s = getenv("BKV_QUICK");
    return s && *s && *s != '0';
}

static uint64_t test_state; /* of the random numbers; every test starts at the same place */

static inline int test_main(const test_case *tests, size_t n, int argc, char **argv) {
    unsigned passed = 0, failed = 0;
    for (size_t i = 0; i < n; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1])) continue;
        clock_t t = clock();
        test_errors = 0;
        test_state = 1;
        tests[i].run();
        printf("%-6s %s (%.1f s", test_errors ? "FAILED" : "ok", tests[i].name,
               (double)(clock() - t) / CLOCKS_PER_SEC);
        printf(test_errors ? ", %u checks failed)\n" : ")\n", test_errors);
        fflush(stdout);
        if (test_errors)
            failed++;
        else
            passed++;
    }
    printf("%u passed, %u failed\n", passed, failed);
    return failed || !passed;
}
#define T(function)                                                                                \
    { #function, function }
#define TEST_MAIN(...)                                                                             \
    const test_case tests_[] = {__VA_ARGS__};                                                      \
    return test_main(tests_, COUNT(tests_), argc, argv)

/* ---- random numbers -------------------------------------------------------------------------- */

static inline uint32_t random_bits(void) {
    test_state = test_state * 6364136223846793005u + 1442695040888963407u;
    uint64_t x = (test_state ^ (test_state >> 29)) * 0xBF58476D1CE4E5B9u;
    return (uint32_t)(x >> 32);
}

static inline uint32_t random_below(uint32_t n) { return random_bits() % n; }

/* Mean 0, variance 1, at most 3.47 in magnitude: tests may rely on the bound. */
static inline double random_normal(void) {
    double sum = 0;
    for (int i = 0; i < 4; i++) sum += random_bits() / 4294967296.0 - 0.5;
    return sum * sqrt(3.0);
}

/* ---- number formats, from their definition --------------------------------------------------- */

typedef struct format {
    unsigned bytes, fraction_bits;
    int lowest; /* the smallest denormal is 2^lowest */
    uint32_t sign, infinity;
} format;

static inline format format_of(uint32_t type) {
    static const format f32 = {4, 23, -149, 0x80000000u, 0x7F800000u};
    static const format f16 = {2, 10, -24, 0x8000u, 0x7C00u};
    static const format bf16 = {2, 7, -133, 0x8000u, 0x7F80u};
    return type == BKV_F32 ? f32 : type == BKV_F16 ? f16 : bf16;
}

static const uint32_t test_types[3] = {BKV_F32, BKV_F16, BKV_BF16};
enum { N_STORAGE = 5 };
static const uint32_t storage_types[N_STORAGE] = {BKV_F32, BKV_F16, BKV_BF16, BKV_I8, BKV_I4};

static inline const char *type_name(uint32_t type) {
    static const char *const names[] = {"f32", "f16", "bf16", "i8", "i4"};
    return names[type - BKV_F32];
}

/* Bits of the integers that a key or value is stored in; 0: it is stored in floats. */
static inline unsigned integer_bits(uint32_t kv_type) {
    return kv_type < BKV_I8 ? 0 : kv_type == BKV_I4 ? 4 : 8;
}

/* The number that a pattern stands for. */
static inline double decode(uint32_t bits, uint32_t type) {
    format f = format_of(type);
    uint32_t magnitude = bits & (f.sign - 1), exponent = magnitude >> f.fraction_bits;
    uint32_t fraction = magnitude & ((1u << f.fraction_bits) - 1);
    double x = exponent ? ldexp(fraction | (1u << f.fraction_bits), (int)exponent - 1 + f.lowest)
                        : ldexp(fraction, f.lowest);
    if (magnitude >= f.infinity) x = magnitude > f.infinity ? (double)NAN : (double)INFINITY;
    return bits & f.sign ? -x : x;
}

/* The pattern nearest to a finite x, ties to the even one. The exponent field counts how far the
   last place is above 2^lowest, so adding the significand also carries into it. */
static inline uint32_t encode(double x, uint32_t type) {
    format f = format_of(type);
    int e, last;
    (void)frexp(x, &e);
    last = e - 1 - (int)f.fraction_bits;
    if (last < f.lowest || x == 0) last = f.lowest;
    uint32_t significand = (uint32_t)nearbyint(ldexp(fabs(x), -last));
    uint32_t bits = ((uint32_t)(last - f.lowest) << f.fraction_bits) + significand;
    return (signbit(x) ? f.sign : 0) | (bits < f.infinity ? bits : f.infinity);
}

static inline double round_to(double x, uint32_t type) { return decode(encode(x, type), type); }

/* x times the Hadamard matrix of its size, a power of two, in f32, by butterflies in place. */
static inline void hadamard(float *x, size_t size) {
    float norm = (float)sqrt(1.0 / (double)size);
    for (size_t half = size / 2; half; half /= 2)
        for (size_t i = 0; i < size; i++)
            if (!(i & half)) {
                float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    for (size_t i = 0; i < size; i++) x[i] *= norm;
}

/* Its own inverse: by powers of two, the largest first. */
static inline void rotate(float *x, size_t n) {
    for (size_t size = 512; size; size /= 2)
        if (n & size) hadamard(x, size), x += size;
}

/* A key, or a value, becomes what a cache of this type holds of it. Integers: of a sink or a token
   of the newest pages the rest is held, too, in 1/128 of a step, or of 4 bits in 1/14. */
static inline void round_row(double *x, size_t n, uint32_t kv_type, int is_value, int with_rest) {
    const unsigned bits = integer_bits(kv_type);
    const size_t unit = bits == 4 ? 32 : 16, padded = is_value ? (n + unit - 1) / unit * unit : n;
    const float most = bits == 4 ? 7 : 127;
    const double parts = bits == 4 ? 14 : 128;
    float row[512] = {0}, largest = 1e-28f;
    for (size_t i = 0; i < n; i++)
        if (bits)
            row[i] = (float)x[i];
        else
            x[i] = round_to(x[i], kv_type);
    if (!bits) return;
    rotate(row, padded);
    for (size_t i = 0; i < padded; i++) largest = fmaxf(largest, fabsf(row[i]));
    float step = largest / most, inverse;
    uint32_t word;
    memcpy(&word, &step, 4);
    word = (word + 0xFFFF) & 0xFFFF0000u; /* up to bf16 */
    memcpy(&step, &word, 4);
    inverse = 1 / step;
    for (size_t i = 0; i < padded; i++) {
        double steps = (double)row[i] * (double)inverse, q = nearbyint(steps); /* exact */
        double rest = nearbyint((double)(float)(steps - q) * parts);
        float part = step * (1 / (float)parts), more = with_rest ? (float)rest : 0;
#if !defined(BALANCEKV_FMA) || BALANCEKV_FMA
        row[i] = fmaf(more, part, (float)q * step);
#else
        volatile float product = more * part;
        row[i] = product + (float)q * step;
#endif
    }
    rotate(row, padded);
    for (size_t i = 0; i < n; i++) x[i] = (double)row[i];
}

static inline uint32_t load_bits(const void *p, uint32_t type) {
    uint32_t b4 = 0;
    uint16_t b2 = 0;
    if (format_of(type).bytes == 4)
        memcpy(&b4, p, 4);
    else
        memcpy(&b2, p, 2);
    return b4 | b2;
}

static inline void store_bits(void *p, uint32_t bits, uint32_t type) {
    uint16_t b2 = (uint16_t)bits;
    if (format_of(type).bytes == 4)
        memcpy(p, &bits, 4);
    else
        memcpy(p, &b2, 2);
}

/* ---- memory and tensors ---------------------------------------------------------------------- */

static inline void *checked(void *p) {
    if (!p || p == MAP_FAILED) {
        printf("out of memory\n");
        exit(2);
    }
    return p;
}

static inline float *new_floats(size_t n) { return (float *)checked(calloc(n, sizeof(float))); }

/* A block whose end lies `shift` bytes before a page that must not be touched. */
typedef struct guarded {
    unsigned char *data;
    void *map;
    size_t map_bytes;
} guarded;

static inline guarded guarded_new(size_t bytes, size_t shift) {
    guarded g;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t body = (bytes + shift + page - 1) / page * page;
    g.map_bytes = body + page;
    g.map =
        checked(mmap(0, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    g.data = (unsigned char *)g.map + body - shift - bytes;
    if (mprotect((unsigned char *)g.map + body, page, PROT_NONE)) (void)checked(0);
    return g;
}

static inline void guarded_free(guarded *g) { (void)munmap(g->map, g->map_bytes); }

enum { DENSE, PADDED, HEAD_MAJOR, TRANSPOSED, INTERLEAVED, N_LAYOUTS };

/* A tensor ends right before an untouchable page, or one byte earlier with shift 1 (and is then
   misaligned). What lies between its elements is NaN in every type. */
typedef struct tensor {
    bkv_tensor view;
    size_t n_tokens, n_heads, dim;
    size_t token_stride, head_stride, elem_stride; /* as in view, but never 0 */
    guarded block;
} tensor;

static inline tensor tensor_new(size_t n_tokens, size_t n_heads, size_t dim, uint32_t type,
                                int layout, size_t shift) {
    size_t e = format_of(type).bytes, pad = layout == PADDED ? 3 * e + 1 : 0;
    tensor x;
    memset(&x, 0, sizeof x);
    x.n_tokens = n_tokens, x.n_heads = n_heads, x.dim = dim;
    switch (layout) {
    case HEAD_MAJOR: /* [n_heads][n_tokens][dim] */
        x.elem_stride = e, x.token_stride = dim * e, x.head_stride = n_tokens * dim * e;
        break;
    case TRANSPOSED: /* [n_heads][dim][n_tokens] */
        x.token_stride = e, x.elem_stride = n_tokens * e, x.head_stride = dim * n_tokens * e;
        break;
    case INTERLEAVED: /* [n_tokens][dim][n_heads] */
        x.head_stride = e, x.elem_stride = n_heads * e, x.token_stride = dim * n_heads * e;
        break;
    default: /* [n_tokens][n_heads][dim], rows and tokens padded if PADDED */
        x.elem_stride = e, x.head_stride = dim * e + pad;
        x.token_stride = n_heads * x.head_stride + pad;
    }
    size_t bytes = (n_tokens - 1) * x.token_stride + (n_heads - 1) * x.head_stride +
                   (dim - 1) * x.elem_stride + e;
    x.block = guarded_new(bytes, shift);
    memset(x.block.data, 0xFF, bytes);
    x.view = bkv_dense(x.block.data, type);
    if (layout != DENSE) {
        x.view.token_stride = x.token_stride;
        x.view.head_stride = x.head_stride;
        x.view.elem_stride = x.elem_stride;
    }
    return x;
}

static inline void tensor_free(tensor *x) { guarded_free(&x->block); }

static inline unsigned char *tensor_at(const tensor *x, size_t t, size_t h, size_t i) {
    return x->block.data + t * x->token_stride + h * x->head_stride + i * x->elem_stride;
}

static inline double tensor_get(const tensor *x, size_t t, size_t h, size_t i) {
    return decode(load_bits(tensor_at(x, t, h, i), x->view.type), x->view.type);
}

static inline void tensor_set(const tensor *x, size_t t, size_t h, size_t i, double value) {
    store_bits(tensor_at(x, t, h, i), encode(value, x->view.type), x->view.type);
}

/* The tokens from t on. */
static inline bkv_tensor tensor_from(const tensor *x, size_t t) {
    bkv_tensor view = x->view;
    view.data = tensor_at(x, t, 0, 0);
    return view;
}

static inline void tensor_randomise(const tensor *x, double deviation) {
    for (size_t t = 0; t < x->n_tokens; t++)
        for (size_t h = 0; h < x->n_heads; h++)
            for (size_t i = 0; i < x->dim; i++) tensor_set(x, t, h, i, random_normal() * deviation);
}

static inline tensor tensor_random(size_t n_tokens, size_t n_heads, size_t dim, uint32_t type) {
    tensor x = tensor_new(n_tokens, n_heads, dim, type, DENSE, 0);
    tensor_randomise(&x, 1.0);
    return x;
}

/* ---- caches ---------------------------------------------------------------------------------- */

/* The available backends, scalar first if there is one; returns how many. */
static inline size_t test_backends(uint32_t list[8]) {
    size_t n = 0;
    for (uint32_t b = BKV_BACKEND_SCALAR; b <= BKV_BACKEND_NEON; b++)
        if (bkv_backends() >> b & 1) list[n++] = b;
    return n;
}

/* An empty cache in a block of its own, which held other bytes before. */
static inline bkv_cache cache_new(const bkv_config *cfg) {
    bkv_cache c;
    size_t bytes = bkv_size(cfg);
    memset(&c, 0, sizeof c);
    bkv_result r = bkv_init(&c, cfg, memset(checked(malloc(bytes + 1)), 0xEE, bytes + 1), bytes);
    if (r != BKV_OK) {
        printf("bkv_init: %s\n", bkv_result_string(r));
        exit(2);
    }
    return c;
}

static inline void cache_free(bkv_cache *c) { free(c->mem); }

static inline bkv_stats_info cache_stats(const bkv_cache *c) {
    bkv_stats_info s;
    OK(bkv_stats(c, &s));
    return s;
}

static inline bkv_token_info cache_token(const bkv_cache *c, uint32_t head, uint32_t i) {
    bkv_token_info info;
    memset(&info, 0, sizeof info);
    OK(bkv_token(c, head, i, &info));
    return info;
}

static inline int same_state(const bkv_cache *a, const bkv_cache *b) {
    return a->state_bytes == b->state_bytes && memcmp(a->mem, b->mem, a->state_bytes) == 0;
}

#endif
