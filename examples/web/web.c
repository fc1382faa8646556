/* web.c - what the page runs as WebAssembly: the recorded trace goes through two caches of the same
   bytes, one by the rule chosen and one that keeps a window, beside exact attention in double. It
   makes the calls of examples/stream.c in its order, so the page shows the errors that prints. */
#define BALANCEKV_STATIC
#define BALANCEKV_HEAD_DIM 64
#define BALANCEKV_KV_TYPE BALANCEKV_F16
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#define EXPORT(name) __attribute__((export_name(#name)))
__attribute__((import_module("js"), import_name("exp"))) double js_exp(double x);

enum {
    TOKENS = 4096, /* of examples/trace, with its heads */
    Q_HEADS = 3,
    DIM = BALANCEKV_HEAD_DIM,
    OUT = Q_HEADS * DIM,
    SAMPLE = 8, /* the outputs of one position in so many are compared with the exact ones */
    SAMPLES = TOKENS / SAMPLE,
    COLUMNS = 1024, /* of the picture */
    MAX_BUDGET = TOKENS
};

/* The trace: as the page writes it, and as the caches read it. */
static uint16_t inbox[TOKENS * (OUT + DIM + DIM)];
static float q[TOKENS][OUT], k[TOKENS][DIM], v[TOKENS][DIM];

static double exact[SAMPLES][OUT]; /* kept from one run to the next */
static uint32_t n_exact, at;       /* tokens of the run so far */

static struct run {
    unsigned char memory[BKV_SIZE(Q_HEADS, 1, DIM, MAX_BUDGET, BKV_F16)];
    bkv_cache cache;
    double error[SAMPLES][Q_HEADS];
} chosen, window;

static float f16(uint16_t half) {
    union {
        uint32_t bits;
        float number;
    } x = {(uint32_t)(half & 0x7FFF) << 13}, sign = {(uint32_t)(half & 0x8000) << 16 | 0x3F800000};
    return x.number * 0x1p112f * sign.number; /* finite ones, subnormals included */
}

EXPORT(inbox) uint16_t *get_inbox(void) { return inbox; }
EXPORT(inbox_length) uint32_t get_inbox_length(void) { return sizeof inbox / sizeof *inbox; }

EXPORT(unpack) void unpack(void) {
    const uint16_t *from = inbox;
    float *to[] = {q[0], k[0], v[0]};
    static const uint32_t n[] = {TOKENS * OUT, TOKENS * DIM, TOKENS * DIM};
    for (int part = 0; part < 3; part++)
        for (uint32_t i = 0; i < n[part]; i++) to[part][i] = f16(*from++);
}

/* What the page offers as rules. */
enum { SAMPLE_DEFAULT, UNBALANCED, BY_KEYS, ALL_ALIKE, WINDOW_ONLY };

static bkv_result prepare(struct run *r, uint32_t budget, int method) {
    bkv_config cfg = bkv_config_default(Q_HEADS, 1, DIM, budget);
    cfg.seed = 1;
    if (method == UNBALANCED) cfg.rounds = BKV_NONE;
    if (method == BY_KEYS) cfg.importance = BKV_IMPORTANCE_KEY;
    if (method == ALL_ALIKE) cfg.importance = BKV_NONE;
    if (method == WINDOW_ONLY) cfg.rule = BKV_RULE_WINDOW;
    return bkv_init(&r->cache, &cfg, r->memory, sizeof r->memory);
}

/* Every function that returns a bkv_result: 0 is good. */
EXPORT(start) bkv_result start(uint32_t budget, int method) {
    bkv_result r = prepare(&chosen, budget, method);
    at = 0;
    return r == BKV_OK ? prepare(&window, budget, WINDOW_ONLY) : r;
}

static void attend_exactly(double *out) {
    static double logit[TOKENS];
    for (int h = 0; h < Q_HEADS; h++, out += DIM) {
        double max = -1e300, sum = 0;
        for (uint32_t i = 0; i <= at; i++) {
            double dot = 0;
            for (int d = 0; d < DIM; d++) dot += (double)q[at][h * DIM + d] * (double)k[i][d];
            logit[i] = dot / __builtin_sqrt((double)DIM);
            if (logit[i] > max) max = logit[i];
        }
        for (int d = 0; d < DIM; d++) out[d] = 0;
        for (uint32_t i = 0; i <= at; i++) {
            double p = js_exp(logit[i] - max);
            sum += p;
            for (int d = 0; d < DIM; d++) out[d] += p * (double)v[i][d];
        }
        for (int d = 0; d < DIM; d++) out[d] /= sum;
    }
}

/* The next token; every SAMPLE-th is also compared. */
static bkv_result feed(struct run *r, int attends) {
    float out[OUT];
    bkv_result result =
        bkv_append(&r->cache, bkv_dense(k[at], BKV_F32), bkv_dense(v[at], BKV_F32), 1, 0, 0, 1);
    if (result != BKV_OK || !attends) return result;
    result = bkv_attend(&r->cache, bkv_dense(q[at], BKV_F32), out, 0, 1);
    for (int h = 0; at % SAMPLE == 0 && h < Q_HEADS; h++) {
        double diff = 0, norm = 0;
        for (int d = h * DIM; d < (h + 1) * DIM; d++) {
            double truth = exact[at / SAMPLE][d], x = (double)out[d] - truth;
            diff += x * x;
            norm += truth * truth;
        }
        r->error[at / SAMPLE][h] = __builtin_sqrt(diff / norm);
    }
    return result;
}

EXPORT(step) bkv_result step(void) {
    const int compares = at % SAMPLE == 0;
    bkv_result r;
    if (at == TOKENS) return BKV_E_COUNT;
    if (compares && n_exact == at / SAMPLE) attend_exactly(exact[n_exact++]);
    r = feed(&chosen, 1);
    if (r == BKV_OK) r = feed(&window, compares); /* a window learns nothing from its queries */
    if (r == BKV_OK) at++;
    return r;
}

/* Mean error of the samples first .. end - 1 of either cache. */
EXPORT(error) double mean_error(int of_window, uint32_t first, uint32_t end) {
    const struct run *r = of_window ? &window : &chosen;
    double sum = 0;
    for (uint32_t s = first; s < end; s++)
        for (int h = 0; h < Q_HEADS; h++) sum += r->error[s][h];
    return sum / (double)((end - first) * Q_HEADS);
}

/* What the chosen cache holds of the text: a column covers TOKENS / COLUMNS tokens and shows the
   heaviest of those kept. */
static float weight[COLUMNS];
static unsigned char kind[COLUMNS]; /* BKV_KIND_*, 0: nothing kept */
static bkv_stats_info stats;

EXPORT(columns) uint32_t columns(void) { return COLUMNS; }
EXPORT(weight) float *get_weight(void) { return weight; }
EXPORT(kind) unsigned char *get_kind(void) { return kind; }
EXPORT(look) bkv_result look(void) {
    bkv_result r = bkv_stats(&chosen.cache, &stats);
    for (uint32_t i = 0; i < COLUMNS; i++) weight[i] = 0, kind[i] = 0;
    for (uint32_t i = 0; i < stats.tokens_held && r == BKV_OK; i++) {
        bkv_token_info token;
        uint32_t column;
        r = bkv_token(&chosen.cache, 0, i, &token);
        column = (uint32_t)token.position * COLUMNS / TOKENS;
        if (r != BKV_OK || token.weight <= weight[column]) continue;
        weight[column] = token.weight;
        kind[column] = (unsigned char)token.kind;
    }
    return r;
}

/* Of what look() saw. */
EXPORT(tokens) uint32_t tokens(void) { return TOKENS; }
EXPORT(seen) uint32_t seen(void) { return at; }
EXPORT(held) uint32_t held(void) { return stats.tokens_held; }
EXPORT(sinks) uint32_t sinks(void) { return stats.sinks; }
EXPORT(recent) uint32_t recent(void) { return stats.window; }
EXPORT(bytes) uint32_t bytes(void) { return (uint32_t)stats.bytes; }
EXPORT(heaviest) float heaviest(void) { return stats.max_weight; }
EXPORT(text) const char *text(bkv_result r) { return bkv_result_string(r); }
