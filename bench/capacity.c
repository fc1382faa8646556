/* capacity.c - how much a session weighs: the caches of whole models, from bkv_size() alone, beside
   a cache of every token. Measures nothing, so it prints the same everywhere.
   Build and run: cc -std=c99 -O2 -I. bench/capacity.c -o capacity && ./capacity */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As the models' config.json has them. Layers of a sliding window keep its tokens and no more,
   whatever holds the others: they are counted alike on both sides. */
typedef struct shape {
    const char *name;
    uint32_t layers, q_heads, kv_heads, dim, window_layers, window;
} shape;

static const shape shapes[] = {
    {"SmolLM2-135M", 30, 9, 3, 64, 0, 0},     {"SmolLM2-360M", 32, 15, 5, 64, 0, 0},
    {"SmolLM2-1.7B", 24, 32, 32, 64, 0, 0},   {"Qwen2.5-0.5B", 24, 14, 2, 64, 0, 0},
    {"Qwen2.5-1.5B", 28, 12, 2, 128, 0, 0},   {"Qwen2.5-7B", 28, 28, 4, 128, 0, 0},
    {"Qwen2.5-32B", 64, 40, 8, 128, 0, 0},    {"Llama-3.2-1B", 16, 32, 8, 64, 0, 0},
    {"Llama-3.2-3B", 28, 24, 8, 128, 0, 0},   {"Llama-3.1-8B", 32, 32, 8, 128, 0, 0},
    {"Llama-3.1-70B", 80, 64, 8, 128, 0, 0},  {"Gemma-2-2B", 26, 8, 4, 256, 13, 4096},
    {"Gemma-2-9B", 42, 16, 8, 256, 21, 4096}, {"Gemma-3-1B", 26, 4, 1, 256, 22, 512},
    {"Gemma-3-4B", 34, 8, 4, 256, 29, 1024},  {"Gemma-3-12B", 48, 16, 8, 256, 40, 1024},
    {"Mistral-7B", 32, 32, 8, 128, 0, 0},     {"Mistral-Nemo", 40, 32, 8, 128, 0, 0},
};
static const uint32_t lengths[] = {8192, 32768, 131072};
static const uint32_t budgets[] = {512, 1024, 2048, 4096, 8192};
static const uint64_t memories[] = {8, 64, 512}; /* GB of 2^30 bytes, all of them for caches */
static const char *const types[] = {NULL, "f32",  "f16", "bf16",
                                    "i8", "i4"}; /* by BKV_F32, .. */
enum { TYPES = sizeof types / sizeof *types };
#define COUNT(list) (sizeof(list) / sizeof *(list))

static const char help[] =
    "usage: capacity [--type f32|f16|bf16|i8|i4] [--json]\n"
    "Bytes of a session with balancekv.h at several budgets (slots per KV head), and with a cache\n"
    "of every token in f16; sessions that fit in 8, 64 and 512 GB. --type: storage, default f16;\n"
    "of another one also the slots that the bytes of so many slots of f16 give.\n"
    "--json: one JSON object a line.\n";

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("capacity: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

/* K and V of n tokens in f16, in so many layers. */
static uint64_t rows(const shape *s, uint32_t layers, uint32_t n) {
    return (uint64_t)layers * n * s->kv_heads * s->dim * 2 * 2;
}

static uint64_t window_bytes(const shape *s, uint32_t length) {
    return rows(s, s->window_layers, length < s->window ? length : s->window);
}

static uint64_t full_bytes(const shape *s, uint32_t length) {
    return rows(s, s->layers - s->window_layers, length) + window_bytes(s, length);
}

static uint64_t our_bytes(const shape *s, uint32_t budget, uint32_t type) {
    bkv_config cfg = bkv_config_default(s->q_heads, s->kv_heads, s->dim, budget);
    cfg.kv_type = type;
    if (bkv_check(&cfg) != BKV_OK) fail("%s: %s", s->name, bkv_result_string(bkv_check(&cfg)));
    return (s->layers - s->window_layers) * (uint64_t)bkv_size(&cfg) + window_bytes(s, UINT32_MAX);
}

/* Slots of this type in the bytes that a layer takes with so many of f16. */
static uint32_t slots_of(const shape *s, uint32_t budget, uint32_t type) {
    bkv_config cfg = bkv_config_default(s->q_heads, s->kv_heads, s->dim, budget);
    size_t bytes = bkv_size(&cfg);
    cfg.kv_type = type, cfg.sinks = cfg.window = 0; /* those of its own slots */
    return bkv_budget_for_bytes(&cfg, bytes);
}

static void print_json(const shape *s, const char *type, const char *kind, uint32_t n,
                       uint64_t bytes, uint32_t slots) {
    printf("{\"model\": \"%s\", \"type\": \"%s\", \"%s\": %" PRIu32 ", \"bytes\": %" PRIu64
           ", \"sessions\": {",
           s->name, type, kind, n, bytes);
    for (size_t i = 0; i < COUNT(memories); i++)
        printf("%s\"%" PRIu64 "\": %" PRIu64, i ? ", " : "", memories[i],
               (memories[i] << 30) / bytes);
    fputs("}", stdout);
    if (slots) printf(", \"slots_for_f16\": %" PRIu32, slots);
    puts("}");
}

static void print_tables(uint32_t type) {
    printf("MiB a session: a cache of every token (f16) at 8k, 32k, 128k tokens; balancekv.h (%s) "
           "at any length\n\n%-14s", types[type], "");
    for (size_t i = 0; i < COUNT(lengths); i++) printf("   full %3uk", lengths[i] / 1024);
    for (size_t i = 0; i < COUNT(budgets); i++) printf("  %4u slots", budgets[i]);
    puts("");
    for (const shape *s = shapes; s < shapes + COUNT(shapes); s++) {
        printf("%-14s", s->name);
        for (size_t i = 0; i < COUNT(lengths); i++)
            printf("%12.1f", (double)full_bytes(s, lengths[i]) / 1048576);
        for (size_t i = 0; i < COUNT(budgets); i++)
            printf("%12.1f", (double)our_bytes(s, budgets[i], type) / 1048576);
        puts("");
    }
    for (size_t m = 0; m < COUNT(memories); m++) {
        printf("\nSessions in %" PRIu64 " GB (of 2^30 bytes, the model's weights not counted)\n\n",
               memories[m]);
        for (const shape *s = shapes; s < shapes + COUNT(shapes); s++) {
            printf("%-14s", s->name);
            for (size_t i = 0; i < COUNT(lengths); i++)
                printf("%12" PRIu64, (memories[m] << 30) / full_bytes(s, lengths[i]));
            for (size_t i = 0; i < COUNT(budgets); i++)
                printf("%12" PRIu64, (memories[m] << 30) / our_bytes(s, budgets[i], type));
            puts("");
        }
    }
    if (type == BKV_F16) return;
    printf("\nSlots of %s in the bytes of so many of f16\n\n", types[type]);
    for (const shape *s = shapes; s < shapes + COUNT(shapes); s++) {
        printf("%-50s", s->name);
        for (size_t i = 0; i < COUNT(budgets); i++)
            printf("%12" PRIu32, slots_of(s, budgets[i], type));
        puts("");
    }
}

int main(int argc, char **argv) {
    uint32_t type = BKV_F16;
    int json = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            fputs(help, stdout);
            return 0;
        }
        if (!strcmp(argv[i], "--json")) {
            json = 1;
        } else if (!strcmp(argv[i], "--type")) {
            if (++i == argc) fail("--type needs a value; --help explains it");
            for (type = 1; type < TYPES && strcmp(argv[i], types[type]); type++) continue;
            if (type == TYPES) fail("--type: '%s' is none of: f32 f16 bf16 i8 i4", argv[i]);
        } else {
            fail("unknown option '%s'; --help lists them", argv[i]);
        }
    }
    if (!json) print_tables(type);
    for (const shape *s = shapes; json && s < shapes + COUNT(shapes); s++) {
        for (size_t i = 0; i < COUNT(lengths); i++)
            print_json(s, "f16", "full_tokens", lengths[i], full_bytes(s, lengths[i]), 0);
        for (size_t i = 0; i < COUNT(budgets); i++)
            print_json(s, types[type], "budget", budgets[i], our_bytes(s, budgets[i], type),
                       slots_of(s, budgets[i], type));
    }
    return 0;
}
