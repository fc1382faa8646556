/* insn.c - fixed work for bench/insn.py to count the instructions of: insn SCENARIO BACKEND. Only
   work() is counted; what it needs is made before. */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 2, MAX_DIM = 128, MAX_GROUP = 4, BUDGET = 512, CHUNK = 64, STREAM = 768 };
enum { APPEND, HALVE, ATTEND, PREFILL };

static const struct {
    const char *name;
    int operation;
    uint32_t dim, group, kv_type, rule;
} scenarios[] = {
    {"append f16 d64", APPEND, 64, 1, BKV_F16, BKV_RULE_WINDOW},
    {"halve f32 d64", HALVE, 64, 1, BKV_F32, BKV_RULE_DEFAULT},
    {"halve f32 d128", HALVE, 128, 1, BKV_F32, BKV_RULE_DEFAULT},
    {"halve f16 d64", HALVE, 64, 1, BKV_F16, BKV_RULE_DEFAULT},
    {"attend f16 d64 group 3", ATTEND, 64, 3, BKV_F16, BKV_RULE_DEFAULT},
    {"attend f32 d128 group 4", ATTEND, 128, 4, BKV_F32, BKV_RULE_DEFAULT},
    {"attend bf16 d128 group 1", ATTEND, 128, 1, BKV_BF16, BKV_RULE_DEFAULT},
    {"prefill f16 d64 group 3", PREFILL, 64, 3, BKV_F16, BKV_RULE_DEFAULT},
};
enum { N_SCENARIOS = sizeof scenarios / sizeof *scenarios };

static float k[CHUNK * HEADS * MAX_DIM], v[CHUNK * HEADS * MAX_DIM];
static float q[CHUNK * HEADS * MAX_GROUP * MAX_DIM], out[CHUNK * HEADS * MAX_GROUP * MAX_DIM];

static void fill(float *x, size_t n) {
    static uint32_t state = 1;
    for (; n--; state = state * 1664525u + 1013904223u)
        *x++ = (float)(state >> 9) / 4194304.0f - 1.0f;
}

static void require(bkv_result r) {
    if (r == BKV_OK) return;
    fprintf(stderr, "insn: %s\n", bkv_result_string(r));
    exit(1);
}

static void append(bkv_cache *c, size_t n) {
    require(bkv_append(c, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), n, 0, 0, 1));
}

/* Counted. The name must not change: bench/insn.py asks for it. */
__attribute__((noinline)) void work(bkv_cache *c, int operation);
__attribute__((noinline)) void work(bkv_cache *c, int operation) {
    int i;
    if (operation == APPEND)
        for (i = 0; i < CHUNK; i++) append(c, 1);
    else if (operation == HALVE)
        append(c, 1);
    else if (operation == ATTEND)
        require(bkv_attend(c, bkv_dense(q, BKV_F32), out, 0, 1));
    else
        require(bkv_prefill(c, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), bkv_dense(q, BKV_F32),
                            out, CHUNK / 4, 0, 0, 1));
}

int main(int argc, char **argv) {
    bkv_config cfg;
    bkv_cache c;
    uint32_t backend = 0;
    unsigned char *mem;
    bkv_stats_info before, after;
    size_t s, seen;
    if (argc != 3) { /* the list */
        for (s = 0; s < N_SCENARIOS; s++) puts(scenarios[s].name);
        return 0;
    }
    for (s = 0; s < N_SCENARIOS && strcmp(scenarios[s].name, argv[1]) != 0; s++) {
    }
    if (s == N_SCENARIOS) return 2;
    cfg = bkv_config_default(HEADS * scenarios[s].group, HEADS, scenarios[s].dim, BUDGET);
    cfg.kv_type = scenarios[s].kv_type;
    cfg.rule = scenarios[s].rule;
    while (strcmp(bkv_backend_name(backend), argv[2]) != 0)
        if (++backend == 32) return 2;
    fill(k, sizeof k / sizeof *k);
    fill(v, sizeof v / sizeof *v);
    fill(q, sizeof q / sizeof *q);
    mem = (unsigned char *)malloc(bkv_size(&cfg));
    require(bkv_init(&c, &cfg, mem, bkv_size(&cfg)));
    for (seen = 0; seen < STREAM; seen += CHUNK) append(&c, CHUNK);
    do { /* on to where the next append halves; one attend, in case a rule wants queries */
        bkv_stats(&c, &before);
        append(&c, 1);
        bkv_stats(&c, &after);
    } while (after.halvings == before.halvings);
    require(bkv_attend(&c, bkv_dense(q, BKV_F32), out, 0, 1));
    append(&c, scenarios[s].operation == PREFILL ? 1 : CHUNK - 1); /* prefill: within a page */
    before = after;
    require(bkv_attach(&c, mem, bkv_size(&cfg), backend)); /* so far the fastest one */
    work(&c, scenarios[s].operation);
    bkv_stats(&c, &after);
    if (scenarios[s].operation == HALVE && after.halvings - before.halvings != HEADS) {
        fprintf(stderr, "insn: no halving was counted\n");
        return 1;
    }
    return 0;
}
