/* attention.c - from q, k, v of a step to the output of its attention: one balancekv cache per
   layer, run by ggml's threads as a custom operator; or, to compare with, a growing f16 cache and
   ggml's flash attention, in the layout of llama.cpp. */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "baseline.h"
#include "llm.h"

enum { MAX_THREADS = 64, ROWS_STEP = 256 }; /* llama.cpp rounds the rows it reads up to 256 */

typedef struct layer {
    struct llm_attention *owner;
    bkv_cache cache;
    bkv_result result[MAX_THREADS]; /* of the first call that failed, per thread */
    struct ggml_tensor *k, *v;      /* full: f16 [n_ctx][n_kv_heads * dim] */
    baseline *other;                /* instead of the cache */
} layer;

struct llm_attention {
    llm_shape shape;
    llm_attention_config cfg;
    layer *layers;
    char *memory;                    /* of all caches, one after the other */
    size_t layer_bytes, state_bytes; /* of one layer */
    struct ggml_context *rows;       /* full: the tensors k and v */
    struct ggml_tensor *mask, *index;
    llm_tap tap;
    void *tap_user;
};

/* ---- balancekv ------------------------------------------------------------------------------- */

static bkv_tensor view(const struct ggml_tensor *t) { /* ne: dim, heads, tokens */
    bkv_tensor x = {t->data, BKV_F32, t->nb[2], t->nb[1], t->nb[0]};
    return x;
}

/* The operator. Every thread of ggml calls it with its share (ith, nth); ggml waits for all of them
   before the next operator, as balancekv asks for. */
static void attend(struct ggml_tensor *out, int ith, int nth, void *user) {
    layer *l = (layer *)user;
    const struct ggml_tensor *q = out->src[0], *k = out->src[1], *v = out->src[2];
    bkv_result r = bkv_prefill(&l->cache, view(k), view(v), view(q), (float *)out->data,
                               (size_t)q->ne[2], 0, (uint32_t)ith, (uint32_t)nth);
    if (r != BKV_OK && l->result[ith] == BKV_OK) l->result[ith] = r;
    if (ith == 0 && l->owner->tap)
        l->owner->tap(l->owner->tap_user, (uint32_t)(l - l->owner->layers), q, k, v);
}

static void attend_other(struct ggml_tensor *out, int ith, int nth, void *user) {
    baseline_attend(((layer *)user)->other, out, ith, nth);
}

/* The config of a layer's cache. */
static bkv_config cache_config(const llm_shape *s, const llm_attention_config *cfg,
                               uint32_t index) {
    bkv_config c = cfg->bkv;
    c.n_q_heads = s->n_q_heads;
    c.n_kv_heads = s->n_kv_heads;
    c.head_dim = s->key_dim;
    c.value_dim = s->value_dim;
    c.n_threads = cfg->n_threads;
    c.seed = cfg->bkv.seed * s->n_layers + index; /* each layer its own */
    if (!c.budget) c.budget = cfg->n_ctx + 128;   /* every token: exact; and rounding */
    return c;
}

static int new_caches(llm_attention *a, char *err) {
    bkv_config c = cache_config(&a->shape, &a->cfg, 0);
    uint32_t i;
    a->layer_bytes = bkv_size(&c);
    if (!a->layer_bytes)
        return llm_fail(err, "--budget %u: %s%s", (unsigned)c.budget,
                        bkv_result_string(bkv_check(&c)),
                        bkv_check(&c) == BKV_E_BUDGET ? "; give more, or 0 for all tokens" : "");
    a->memory = (char *)malloc(a->layer_bytes * a->shape.n_layers);
    if (!a->memory)
        return llm_fail(err, "%zu bytes for the caches are not there; take a smaller --budget",
                        a->layer_bytes * a->shape.n_layers);
    for (i = 0; i < a->shape.n_layers; i++) {
        bkv_result r;
        c = cache_config(&a->shape, &a->cfg, i);
        r = bkv_init(&a->layers[i].cache, &c, a->memory + i * a->layer_bytes, a->layer_bytes);
        if (r != BKV_OK) return llm_fail(err, "layer %u: %s", (unsigned)i, bkv_result_string(r));
    }
    a->state_bytes = a->layers[0].cache.state_bytes;
    return 1;
}

/* ---- full attention -------------------------------------------------------------------------- */

static int new_rows(llm_attention *a, char *err) {
    const llm_shape *s = &a->shape;
    int64_t n = llm_attention_rows(a, a->cfg.n_ctx);
    size_t k_bytes = (size_t)n * s->n_kv_heads * s->key_dim * sizeof(ggml_fp16_t);
    struct ggml_init_params params = {2 * s->n_layers * ggml_tensor_overhead(), NULL, true};
    uint32_t i;
    a->state_bytes = a->layer_bytes =
        k_bytes + (size_t)n * s->n_kv_heads * s->value_dim * sizeof(ggml_fp16_t);
    a->memory = (char *)calloc(s->n_layers, a->layer_bytes); /* 0: masked rows are read too */
    a->rows = a->memory ? ggml_init(params) : NULL;
    if (!a->rows)
        return llm_fail(err, "%zu bytes for the caches are not there; take a smaller --ctx",
                        a->layer_bytes * s->n_layers);
    for (i = 0; i < s->n_layers; i++) {
        layer *l = &a->layers[i];
        l->k = ggml_new_tensor_2d(a->rows, GGML_TYPE_F16, s->n_kv_heads * s->key_dim, n);
        l->v = ggml_new_tensor_2d(a->rows, GGML_TYPE_F16, s->n_kv_heads * s->value_dim, n);
        l->k->data = a->memory + i * a->layer_bytes;
        l->v->data = a->memory + i * a->layer_bytes + k_bytes;
    }
    return 1;
}

static struct ggml_tensor *flash(llm_attention *a, struct ggml_context *ctx,
                                 struct ggml_cgraph *graph, layer *l, struct ggml_tensor *q,
                                 struct ggml_tensor *k, struct ggml_tensor *v) {
    int64_t n = a->mask->ne[0];
    float scale = a->cfg.bkv.scale > 0 ? a->cfg.bkv.scale : 1.0f / sqrtf((float)a->shape.key_dim);
    struct ggml_tensor *rows[2], *out;
    struct ggml_tensor *cache[2] = {l->k, l->v}, *added[2] = {k, v};
    int i;
    for (i = 0; i < 2; i++) {
        int64_t dim = added[i]->ne[0], heads = added[i]->ne[1];
        struct ggml_tensor *flat = ggml_reshape_2d(ctx, added[i], dim * heads, added[i]->ne[2]);
        ggml_build_forward_expand(graph, ggml_set_rows(ctx, cache[i], flat, a->index));
        rows[i] = ggml_view_3d(ctx, cache[i], dim, n, heads, cache[i]->nb[1],
                               ggml_row_size(GGML_TYPE_F16, dim), 0);
    }
    out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), rows[0], rows[1], a->mask,
                              scale, 0.0f, a->cfg.bkv.softcap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    return out;
}

/* ---- baselines ------------------------------------------------------------------------------- */

static int new_baselines(llm_attention *a, char *err) {
    uint32_t i, least;
    for (i = 0; i < a->shape.n_layers; i++) {
        bkv_config c = cache_config(&a->shape, &a->cfg, i);
        a->layers[i].other = baseline_new(a->cfg.baseline, &a->shape, &c, i, &least);
        if (!a->layers[i].other)
            return llm_fail(err, "--budget %u: %s keeps %u tokens at least; or there is no memory",
                            (unsigned)c.budget, a->cfg.baseline, (unsigned)least);
    }
    a->state_bytes = a->layer_bytes = baseline_bytes(a->layers[0].other);
    return 1;
}

/* ---- all ------------------------------------------------------------------------------------ */

int llm_attention_new(llm_attention **result, const llm_shape *shape,
                      const llm_attention_config *cfg, char *err) {
    llm_attention *a = (llm_attention *)calloc(1, sizeof *a);
    layer *layers = (layer *)calloc(shape->n_layers, sizeof *layers);
    uint32_t i;
    int ok;
    if (!a || !layers) {
        free(a);
        free(layers);
        return llm_fail(err, "out of memory");
    }
    a->shape = *shape;
    a->cfg = *cfg;
    a->layers = layers;
    for (i = 0; i < shape->n_layers; i++) layers[i].owner = a;
    if (cfg->n_threads > MAX_THREADS)
        ok = llm_fail(err, "at most %d threads", MAX_THREADS);
    else
        ok = cfg->full       ? new_rows(a, err)
             : cfg->baseline ? new_baselines(a, err)
                             : new_caches(a, err);
    if (!ok) {
        llm_attention_free(a);
        a = NULL;
    }
    *result = a;
    return ok;
}

void llm_attention_free(llm_attention *a) {
    uint32_t i;
    if (!a) return;
    for (i = 0; i < a->shape.n_layers; i++) baseline_free(a->layers[i].other);
    if (a->rows) ggml_free(a->rows);
    free(a->memory);
    free(a->layers);
    free(a);
}

void llm_attention_reset(llm_attention *a) {
    uint32_t i;
    for (i = 0; i < a->shape.n_layers && !a->cfg.full; i++)
        if (!a->layers[i].other)
            bkv_reset(&a->layers[i].cache);
        else
            baseline_reset(a->layers[i].other);
}

uint32_t llm_attention_rows(const llm_attention *a, uint32_t end_position) {
    return a->cfg.full ? (end_position + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP : 0;
}

void llm_attention_inputs(llm_attention *a, struct ggml_context *ctx, uint32_t n_tokens,
                          uint32_t n_rows) {
    if (!a->cfg.full) return;
    a->mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_rows, n_tokens);
    a->index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    ggml_set_input(a->mask);
    ggml_set_input(a->index);
}

void llm_attention_set_inputs(llm_attention *a, uint32_t position, uint32_t n_tokens) {
    uint32_t t, i;
    if (!a->cfg.full) return;
    for (t = 0; t < n_tokens; t++) {
        uint16_t *row = (uint16_t *)a->mask->data + t * (size_t)a->mask->ne[0];
        for (i = 0; i < (uint32_t)a->mask->ne[0]; i++)
            row[i] = i <= position + t ? 0 : 0xfc00; /* f16 -inf */
        ((int64_t *)a->index->data)[t] = position + t;
    }
}

struct ggml_tensor *llm_attention_build(llm_attention *a, struct ggml_context *ctx,
                                        struct ggml_cgraph *graph, uint32_t layer_index,
                                        struct ggml_tensor *q, struct ggml_tensor *k,
                                        struct ggml_tensor *v) {
    layer *l = &a->layers[layer_index];
    struct ggml_tensor *args[3] = {q, k, v}, *out;
    ggml_custom_op_t op = l->other ? attend_other : attend;
    if (a->cfg.full)
        out = flash(a, ctx, graph, l, q, k, v);
    else
        out = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], 1, args, 3, op,
                             GGML_N_TASKS_MAX, l);
    return ggml_reshape_2d(ctx, out, v->ne[0] * q->ne[1], q->ne[2]);
}

int llm_attention_ok(const llm_attention *a, char *err) {
    uint32_t i, t;
    for (i = 0; i < a->shape.n_layers; i++)
        for (t = 0; t < a->cfg.n_threads; t++)
            if (a->layers[i].result[t] != BKV_OK)
                return llm_fail(err, "layer %u: %s", (unsigned)i,
                                bkv_result_string(a->layers[i].result[t]));
    return 1;
}

size_t llm_attention_bytes(const llm_attention *a) { return a->state_bytes * a->shape.n_layers; }

size_t llm_attention_scratch_bytes(const llm_attention *a) {
    return (a->layer_bytes - a->state_bytes) * a->shape.n_layers;
}

size_t llm_attention_need(const llm_shape *shape, const llm_attention_config *cfg) {
    bkv_config c = cache_config(shape, cfg, 0);
    size_t bytes;
    if (cfg->baseline) {
        uint32_t least;
        baseline *b = baseline_new(cfg->baseline, shape, &c, 0, &least);
        bytes = b ? baseline_bytes(b) : 0;
        baseline_free(b);
        return bytes * shape->n_layers;
    }
    c.n_threads = 1;
    bytes = bkv_size(&c);
    c.n_threads = 2;
    return bytes ? (2 * bytes - bkv_size(&c)) * shape->n_layers : 0; /* without scratch */
}

size_t llm_full_bytes(const llm_shape *s, uint32_t n_tokens) {
    return (size_t)n_tokens * s->n_layers * s->n_kv_heads * (s->key_dim + s->value_dim) * 2;
}

uint64_t llm_attention_halvings(const llm_attention *a) {
    bkv_stats_info s;
    memset(&s, 0, sizeof s);
    if (!a->cfg.full && !a->cfg.baseline) bkv_stats(&a->layers[0].cache, &s);
    return s.halvings;
}

double llm_attention_error(const llm_attention *a) {
    double sum = 0;
    uint32_t i;
    for (i = 0; i < a->shape.n_layers && !a->cfg.full && !a->cfg.baseline; i++) {
        bkv_stats_info s;
        bkv_stats(&a->layers[i].cache, &s);
        sum += (double)s.error;
    }
    return sum / a->shape.n_layers;
}

int llm_attention_save(const llm_attention *a, void *snapshot) {
    uint32_t i;
    if (!a->memory) return 0;
    for (i = 0; i < a->shape.n_layers; i++)
        memcpy((char *)snapshot + i * a->state_bytes, a->memory + i * a->layer_bytes,
               a->state_bytes);
    return 1;
}

void llm_attention_restore(llm_attention *a, const void *snapshot) {
    uint32_t i;
    for (i = 0; i < a->shape.n_layers; i++)
        memcpy(a->memory + i * a->layer_bytes, (const char *)snapshot + i * a->state_bytes,
               a->state_bytes);
}

int llm_attention_write(const llm_attention *a, FILE *f, char *err) {
    void *saved = malloc(a->state_bytes);
    uint32_t i;
    int ok = saved != NULL;
    if (a->cfg.full || a->cfg.baseline) {
        free(saved);
        return llm_fail(err, "only caches of balancekv.h can be saved");
    }
    for (i = 0; i < a->shape.n_layers && ok; i++)
        ok = bkv_save(&a->layers[i].cache, saved, a->state_bytes) == BKV_OK &&
             fwrite(saved, 1, a->state_bytes, f) == a->state_bytes;
    free(saved);
    return ok ? 1 : llm_fail(err, "cannot be written; is there room for it?");
}

int llm_attention_read(llm_attention *a, FILE *f, char *err) {
    uint32_t i, n = a->shape.n_layers;
    char *memory = (char *)malloc(a->layer_bytes * n);
    bkv_cache *caches = (bkv_cache *)malloc(n * sizeof *caches);
    void *saved = malloc(a->state_bytes);
    int ok = memory && caches && saved && !a->cfg.full && !a->cfg.baseline;
    for (i = 0; i < n && ok; i++) {
        ok = fread(saved, 1, a->state_bytes, f) == a->state_bytes &&
             bkv_load(&caches[i], saved, a->state_bytes, memory + i * a->layer_bytes,
                      a->layer_bytes, a->cfg.n_threads, a->cfg.bkv.backend) == BKV_OK &&
             !memcmp(&caches[i].cfg, &a->layers[i].cache.cfg, sizeof caches[i].cfg);
    }
    free(saved);
    if (ok) {
        for (i = 0; i < n; i++) a->layers[i].cache = caches[i];
        free(a->memory);
        a->memory = memory;
    } else {
        free(memory);
    }
    free(caches);
    return ok ? 1 : llm_fail(err, "damaged, or saved with other options");
}

void llm_attention_tap(llm_attention *a, llm_tap tap, void *user) {
    a->tap = tap;
    a->tap_user = user;
}
