/* baseline.c - see baseline.h. The methods know one thread per cache, so that each KV head gets a
   cache of its own. */
#include "baseline.h"

#include <stdlib.h>
#include <string.h>

#include "baselines.h"

struct baseline {
    const bl_method *method;
    bl_config cfg;
    uint32_t n_heads, group, kv_type;
    bl_cache *heads[]; /* [n_heads] */
};

int baseline_known(const char *method) {
    const bl_method *m = bl_find(method);
    return m && (m->protocols & BL_STREAM);
}

static void drop(baseline *b) {
    uint32_t h;
    for (h = 0; h < b->n_heads; h++) {
        bl_free(b->heads[h]);
        b->heads[h] = NULL;
    }
}

int baseline_reset(baseline *b) {
    uint32_t h;
    drop(b);
    for (h = 0; h < b->n_heads; h++) {
        bl_config cfg = b->cfg;
        cfg.seed = b->cfg.seed * b->n_heads + h;
        b->heads[h] = bl_new(b->method, &cfg);
        if (!b->heads[h]) return 0;
    }
    return 1;
}

baseline *baseline_new(const char *method, const llm_shape *shape, const bkv_config *c,
                       uint32_t layer, uint32_t *least) {
    baseline *b = (baseline *)calloc(1, sizeof *b + shape->n_kv_heads * sizeof b->heads[0]);
    if (!b) return NULL;
    b->method = bl_find(method);
    b->n_heads = shape->n_kv_heads;
    b->group = shape->n_q_heads / shape->n_kv_heads;
    b->kv_type = c->kv_type;
    b->cfg.n_q_heads = b->group;
    b->cfg.n_kv_heads = 1;
    b->cfg.head_dim = shape->key_dim;
    b->cfg.value_dim = shape->value_dim;
    b->cfg.budget = c->budget;
    b->cfg.sinks = c->sinks;
    b->cfg.window = c->window;
    b->cfg.temp = c->temp;
    b->cfg.scale = c->scale;
    b->cfg.layer = layer;
    b->cfg.layers = shape->n_layers;
    b->cfg.seed = c->seed;
    *least = bl_resolve(b->method, &b->cfg);
    if (c->budget < *least || !baseline_reset(b)) {
        baseline_free(b);
        return NULL;
    }
    return b;
}

void baseline_free(baseline *b) {
    if (!b) return;
    drop(b);
    free(b);
}

/* bl_bytes() counts rows of f16. */
size_t baseline_bytes(const baseline *b) {
    size_t elements = b->cfg.head_dim + b->cfg.value_dim, row = 2 * elements, bytes = 0;
    uint32_t h;
    if (b->kv_type == BKV_F32) row = 4 * elements;
    if (b->kv_type >= BKV_I8) row = elements / (b->kv_type == BKV_I4 ? 2 : 1) + 4; /* two scales */
    for (h = 0; h < b->n_heads; h++)
        bytes += bl_bytes(b->heads[h]) + b->cfg.budget * row - b->cfg.budget * 2 * elements;
    return bytes;
}

static const float *row(const struct ggml_tensor *t, int64_t token, int64_t head) {
    return (const float *)(const void *)((const char *)t->data + token * (int64_t)t->nb[2] +
                                         head * (int64_t)t->nb[1]);
}

void baseline_attend(baseline *b, struct ggml_tensor *out, int ith, int nth) {
    const struct ggml_tensor *q = out->src[0], *k = out->src[1], *v = out->src[2];
    int64_t t, h;
    for (h = ith; h < b->n_heads; h += nth)
        for (t = 0; t < q->ne[2]; t++) {
            /* The queries of a group, and their outputs, lie one behind the other. */
            float *o = (float *)out->data + (t * q->ne[1] + h * b->group) * v->ne[0];
            bl_append(b->heads[h], row(k, t, h), row(v, t, h));
            bl_attend(b->heads[h], row(q, t, h * b->group), o);
        }
}
