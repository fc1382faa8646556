/* model.c - a decoder of the llama family from a GGUF: weights, the graph of a step, computing it.
   Architectures: llama, qwen2 (biases of q, k, v), qwen3 (norms of q and k). What else a file of
   these names may ask for is refused by name. */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "llm.h"

int llm_fail(char *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, LLM_ERROR, format, args);
    va_end(args);
    return 0;
}

/* ---- reading a GGUF -------------------------------------------------------------------------- */

/* Index of "<arch>.<name>", or of a key with a dot in front of it as it stands; -1: not there. */
static int64_t find_key(const llm_model *m, const char *arch, const char *name) {
    char key[128];
    snprintf(key, sizeof key, "%s%s%s", name[0] == '.' ? "" : arch, name[0] == '.' ? "" : ".",
             name + (name[0] == '.'));
    return gguf_find_key(m->gguf, key);
}

/* A number, or the default where the file does not say. -1 in the default: required. */
static int read_u32(const llm_model *m, const char *arch, const char *name, int64_t otherwise,
                    uint32_t *x, char *err) {
    int64_t i = find_key(m, arch, name);
    if (i < 0 && otherwise < 0) return llm_fail(err, "the model lacks the key %s.%s", arch, name);
    if (i >= 0 && gguf_get_kv_type(m->gguf, i) != GGUF_TYPE_UINT32)
        return llm_fail(err, "unsupported model: %s.%s is not one 32-bit number", arch, name);
    *x = i < 0 ? (uint32_t)otherwise : gguf_get_val_u32(m->gguf, i);
    return 1;
}

static int read_f32(const llm_model *m, const char *arch, const char *name, float otherwise,
                    float *x, char *err) {
    int64_t i = find_key(m, arch, name);
    if (i >= 0 && gguf_get_kv_type(m->gguf, i) != GGUF_TYPE_FLOAT32)
        return llm_fail(err, "unsupported model: %s.%s is not one float", arch, name);
    *x = i < 0 ? otherwise : gguf_get_val_f32(m->gguf, i);
    return 1;
}

static const char *read_string(const llm_model *m, const char *arch, const char *name) {
    int64_t i = find_key(m, arch, name);
    return i >= 0 && gguf_get_kv_type(m->gguf, i) == GGUF_TYPE_STRING ? gguf_get_val_str(m->gguf, i)
                                                                      : "";
}

/* A tensor of the given shape; n1 = 0: a vector. */
static int take(const llm_model *m, struct ggml_tensor **t, const char *name, int layer, int64_t n0,
                int64_t n1, int required, char *err) {
    char full[128];
    if (layer >= 0)
        snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    else
        snprintf(full, sizeof full, "%s", name);
    *t = ggml_get_tensor(m->tensors, full);
    if (!*t && !required) return 1;
    if (!*t) return llm_fail(err, "unsupported model: it has no tensor %s", full);
    if ((*t)->ne[0] != n0 || (*t)->ne[1] != (n1 ? n1 : 1) || (*t)->ne[2] != 1 || (*t)->ne[3] != 1)
        return llm_fail(err, "unsupported model: tensor %s has another shape than the keys say",
                        full);
    if (!n1 && (*t)->type != GGML_TYPE_F32)
        return llm_fail(err, "unsupported model: tensor %s is not f32", full);
    return 1;
}

static int take_layers(llm_model *m, char *err) {
    const llm_shape *s = &m->shape;
    int64_t embd = m->n_embd, ff = m->n_ff, d = s->key_dim;
    int64_t q = s->n_q_heads * d, k = s->n_kv_heads * d, v = s->n_kv_heads * (int64_t)s->value_dim;
    int64_t attended = s->n_q_heads * (int64_t)s->value_dim;
    int i;
    for (i = 0; i < (int)s->n_layers; i++) {
        llm_layer *l = &m->layers[i];
        if (!take(m, &l->attn_norm, "attn_norm.weight", i, embd, 0, 1, err) ||
            !take(m, &l->q, "attn_q.weight", i, embd, q, 1, err) ||
            !take(m, &l->k, "attn_k.weight", i, embd, k, 1, err) ||
            !take(m, &l->v, "attn_v.weight", i, embd, v, 1, err) ||
            !take(m, &l->q_bias, "attn_q.bias", i, q, 0, 0, err) ||
            !take(m, &l->k_bias, "attn_k.bias", i, k, 0, 0, err) ||
            !take(m, &l->v_bias, "attn_v.bias", i, v, 0, 0, err) ||
            !take(m, &l->q_norm, "attn_q_norm.weight", i, d, 0, 0, err) ||
            !take(m, &l->k_norm, "attn_k_norm.weight", i, d, 0, 0, err) ||
            !take(m, &l->out, "attn_output.weight", i, attended, embd, 1, err) ||
            !take(m, &l->ffn_norm, "ffn_norm.weight", i, embd, 0, 1, err) ||
            !take(m, &l->ffn_gate, "ffn_gate.weight", i, embd, ff, 1, err) ||
            !take(m, &l->ffn_up, "ffn_up.weight", i, embd, ff, 1, err) ||
            !take(m, &l->ffn_down, "ffn_down.weight", i, ff, embd, 1, err))
            return 0;
    }
    return 1;
}

enum { PARTS = sizeof(llm_layer) / sizeof(struct ggml_tensor *) }; /* it holds nothing else */

static struct ggml_tensor **parts(llm_layer *l) { return (struct ggml_tensor **)(void *)l; }

static int read_model(llm_model *m, const char *path, char *err) {
    static const struct {
        const char *name;
        int rope_mode;
    } archs[] = {{"llama", GGML_ROPE_TYPE_NORMAL},
                 {"qwen2", GGML_ROPE_TYPE_NEOX},
                 {"qwen3", GGML_ROPE_TYPE_NEOX}};
    const char *arch = read_string(m, "", ".general.architecture"), *scaling;
    uint32_t experts;
    size_t i, n = sizeof archs / sizeof *archs;
    int64_t known;
    float factor;

    for (i = 0; i < n && strcmp(arch, archs[i].name); i++) continue;
    if (i == n)
        return llm_fail(err,
                        "%s: architecture '%.64s' is not supported; give a GGUF of llama, qwen2 "
                        "or qwen3",
                        path, arch);
    m->rope_mode = archs[i].rope_mode;
    if (!read_u32(m, arch, "block_count", -1, &m->shape.n_layers, err) ||
        !read_u32(m, arch, "context_length", -1, &m->n_trained, err) ||
        !read_u32(m, arch, "embedding_length", -1, &m->n_embd, err) ||
        !read_u32(m, arch, "feed_forward_length", -1, &m->n_ff, err) ||
        !read_u32(m, arch, "attention.head_count", -1, &m->shape.n_q_heads, err) ||
        !read_u32(m, arch, "attention.head_count_kv", m->shape.n_q_heads, &m->shape.n_kv_heads,
                  err) ||
        !read_u32(m, arch, "expert_count", 0, &experts, err))
        return 0;
    if (experts) return llm_fail(err, "%s: a mixture of experts is not supported", path);
    if (!m->shape.n_layers || m->shape.n_layers > 1024 || !m->shape.n_q_heads || !m->n_embd)
        return llm_fail(err, "%s: damaged: no layers, heads or elements; get the file again", path);
    if (!read_u32(m, arch, "attention.key_length", m->n_embd / m->shape.n_q_heads,
                  &m->shape.key_dim, err) ||
        !read_u32(m, arch, "attention.value_length", m->n_embd / m->shape.n_q_heads,
                  &m->shape.value_dim, err) ||
        !read_u32(m, arch, "rope.dimension_count", m->shape.key_dim, &m->n_rot, err) ||
        !read_f32(m, arch, "rope.freq_base", 10000.0f, &m->rope_base, err) ||
        !read_f32(m, arch, "attention.layer_norm_rms_epsilon", 1e-5f, &m->norm_eps, err) ||
        !read_f32(m, arch, "rope.scaling.factor", 1.0f, &factor, err))
        return 0;
    scaling = read_string(m, arch, "rope.scaling.type");
    if (*scaling && strcmp(scaling, "none") && strcmp(scaling, "linear"))
        return llm_fail(err, "%s: RoPE scaling '%.32s' is not supported, only linear", path,
                        scaling);
    m->rope_scale = !strcmp(scaling, "linear") && factor > 0 ? 1.0f / factor : 1.0f;
    if (m->n_rot > m->shape.key_dim || m->n_rot % 2)
        return llm_fail(err, "%s: damaged: %u of %u elements rotate", path, (unsigned)m->n_rot,
                        (unsigned)m->shape.key_dim);

    m->layers = (llm_layer *)calloc(m->shape.n_layers, sizeof *m->layers);
    m->embedding = ggml_get_tensor(m->tensors, "token_embd.weight");
    m->n_vocab = m->embedding ? (uint32_t)m->embedding->ne[1] : 0;
    if (!m->layers) return llm_fail(err, "out of memory");
    if (!take(m, &m->embedding, "token_embd.weight", -1, m->n_embd, m->n_vocab, 1, err) ||
        !take(m, &m->output_norm, "output_norm.weight", -1, m->n_embd, 0, 1, err) ||
        !take(m, &m->output, "output.weight", -1, m->n_embd, m->n_vocab, 0, err) ||
        !take(m, &m->rope_factors, "rope_freqs.weight", -1, m->n_rot / 2, 0, 0, err) ||
        !take_layers(m, err))
        return 0;

    /* A tensor that was not taken would be silently ignored. */
    known = 2 + (m->output != NULL) + (m->rope_factors != NULL);
    for (i = 0; i < m->shape.n_layers * (size_t)PARTS; i++) known += parts(m->layers)[i] != NULL;
    if (known != gguf_get_n_tensors(m->gguf))
        return llm_fail(err, "%s: unsupported model: %lld of its %lld tensors are unknown here",
                        path, (long long)(gguf_get_n_tensors(m->gguf) - known),
                        (long long)gguf_get_n_tensors(m->gguf));
    if (!m->output) m->output = m->embedding;
    return 1;
}

/* Maps the file and lets the tensors point into it. */
static int map_tensors(llm_model *m, const char *path, char *err) {
    size_t start = gguf_get_data_offset(m->gguf);
    int64_t i;
    struct stat status;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &status)) {
        if (fd >= 0) close(fd);
        return llm_fail(err, "%s: cannot be opened", path);
    }
    m->file_bytes = (size_t)status.st_size;
    m->file = mmap(NULL, m->file_bytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (m->file == MAP_FAILED) {
        m->file = NULL;
        return llm_fail(err, "%s: cannot be mapped into memory", path);
    }
    for (i = 0; i < gguf_get_n_tensors(m->gguf); i++) {
        size_t offset = start + gguf_get_tensor_offset(m->gguf, i);
        size_t bytes = gguf_get_tensor_size(m->gguf, i);
        if (offset > m->file_bytes || bytes > m->file_bytes - offset)
            return llm_fail(err, "%s: is truncated: %zu bytes, at least %zu expected; get it again",
                            path, m->file_bytes, offset + bytes);
        ggml_get_tensor(m->tensors, gguf_get_tensor_name(m->gguf, i))->data =
            (char *)m->file + offset;
    }
    return 1;
}

static void convert(const struct ggml_tensor *from, struct ggml_tensor *to, float *row) {
    int64_t i, n = from->ne[0];
    for (i = 0; i < from->ne[1]; i++) {
        char *x = (char *)to->data + (size_t)i * to->nb[1];
        ggml_get_type_traits(from->type)
            ->to_float((const char *)from->data + (size_t)i * from->nb[1], row, n);
        if (to->type == GGML_TYPE_F16)
            ggml_fp32_to_fp16_row(row, (ggml_fp16_t *)(void *)x, n);
        else if (to->type == GGML_TYPE_BF16)
            ggml_fp32_to_bf16_row(row, (ggml_bf16_t *)(void *)x, n);
        else
            memcpy(x, row, (size_t)n * sizeof *row);
    }
}

/* Quantised matrices in another type as well, for steps of many tokens: ggml has no matrix product
   for some types of files, where a wide one is several times as fast. */
static int unpack(llm_model *m, enum ggml_type type, char *err) {
    size_t bytes = 0, n = (size_t)m->shape.n_layers * PARTS, row = 1, i;
    struct ggml_init_params params = {n * ggml_tensor_overhead(), NULL, true};
    struct ggml_tensor **from = parts(m->layers), **to;
    float *buffer;
    char *data;
    for (i = 0; i < n; i++)
        if (from[i] && ggml_is_quantized(from[i]->type)) {
            bytes += ggml_row_size(type, ggml_nelements(from[i]));
            if ((size_t)from[i]->ne[0] > row) row = (size_t)from[i]->ne[0];
        }
    m->wide_layers = (llm_layer *)malloc(m->shape.n_layers * sizeof *m->wide_layers);
    m->wide_data = malloc(bytes + row * sizeof *buffer);
    m->wide = m->wide_layers && m->wide_data ? ggml_init(params) : NULL;
    if (!m->wide)
        return llm_fail(err, "%zu bytes for unpacked weights are not there; leave --unpack out",
                        bytes);
    to = parts(m->wide_layers);
    buffer = (float *)m->wide_data;
    data = (char *)(buffer + row);
    for (i = 0; i < n; i++) {
        to[i] = from[i];
        if (!from[i] || !ggml_is_quantized(from[i]->type)) continue;
        to[i] = ggml_new_tensor_2d(m->wide, type, from[i]->ne[0], from[i]->ne[1]);
        to[i]->data = data;
        data += ggml_nbytes(to[i]);
        convert(from[i], to[i], buffer);
    }
    return 1;
}

int llm_model_load(llm_model *m, const char *path, enum ggml_type type, char *err) {
    struct gguf_init_params params = {true, NULL};
    char magic[4] = {0};
    FILE *f = fopen(path, "rb");
    int ok;
    memset(m, 0, sizeof *m);
    if (!f) return llm_fail(err, "%s: no such model; examples/llm/setup.sh gets one", path);
    ok = fread(magic, 1, 4, f) == 4 && !memcmp(magic, "GGUF", 4);
    fclose(f);
    if (!ok) return llm_fail(err, "%s: is not a GGUF file; give a model in that format", path);
    params.ctx = &m->tensors;
    m->gguf = gguf_init_from_file(path, params);
    if (!m->gguf)
        return llm_fail(err, "%s: is a truncated or damaged GGUF file; get it again", path);
    ok = map_tensors(m, path, err) && read_model(m, path, err) &&
         (type == GGML_TYPE_COUNT || unpack(m, type, err));
    if (!ok) llm_model_free(m);
    return ok;
}

void llm_model_free(llm_model *m) {
    free(m->layers);
    if (m->gguf) gguf_free(m->gguf);
    if (m->tensors) ggml_free(m->tensors);
    if (m->wide) ggml_free(m->wide);
    free(m->wide_layers);
    free(m->wide_data);
    if (m->file) munmap(m->file, m->file_bytes);
    memset(m, 0, sizeof *m);
}

/* ---- a step ---------------------------------------------------------------------------------- */

enum { WIDE = 16 }; /* tokens of a step from which unpacked weights pay */

struct llm_run {
    const llm_model *model;
    llm_attention *attention;
    struct ggml_threadpool *threads;
    ggml_backend_t backend;
    ggml_gallocr_t allocator;
    struct ggml_context *ctx; /* of the graph; kept while the next step has the same shape */
    struct ggml_cgraph *graph;
    struct ggml_tensor *tokens, *positions, *logits;
    uint32_t n_tokens, n_logits, n_rows;
};

int llm_run_new(llm_run **result, const llm_model *m, llm_attention *a, uint32_t n_threads,
                char *err) {
    llm_run *r = (llm_run *)calloc(1, sizeof *r);
    struct ggml_threadpool_params params = ggml_threadpool_params_default((int)n_threads);
    *result = r;
    if (!r) return llm_fail(err, "out of memory");
    r->model = m;
    r->attention = a;
    r->threads = ggml_threadpool_new(&params);
    r->backend = ggml_backend_cpu_init();
    r->allocator = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    ggml_backend_cpu_set_n_threads(r->backend, (int)n_threads);
    ggml_backend_cpu_set_threadpool(r->backend, r->threads);
    return 1;
}

void llm_run_free(llm_run *r) {
    if (!r) return;
    if (r->ctx) ggml_free(r->ctx);
    ggml_gallocr_free(r->allocator);
    ggml_backend_free(r->backend);
    ggml_threadpool_free(r->threads);
    free(r);
}

static struct ggml_tensor *norm(struct ggml_context *ctx, struct ggml_tensor *x,
                                struct ggml_tensor *weight, const llm_model *m) {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, m->norm_eps), weight);
}

/* A projection to heads: [n_tokens][n_heads][dim]. */
static struct ggml_tensor *heads(struct ggml_context *ctx, struct ggml_tensor *x,
                                 struct ggml_tensor *weight, struct ggml_tensor *bias, int64_t dim,
                                 int64_t n_heads) {
    struct ggml_tensor *y = ggml_mul_mat(ctx, weight, x);
    if (bias) y = ggml_add(ctx, y, bias);
    return ggml_reshape_3d(ctx, y, dim, n_heads, x->ne[1]);
}

static struct ggml_tensor *rope(struct ggml_context *ctx, const llm_run *r, struct ggml_tensor *x) {
    const llm_model *m = r->model;
    return ggml_rope_ext(ctx, x, r->positions, m->rope_factors, (int)m->n_rot, m->rope_mode,
                         (int)m->n_trained, m->rope_base, m->rope_scale, 0.0f, 1.0f, 32.0f, 1.0f);
}

static struct ggml_tensor *last_rows(struct ggml_context *ctx, struct ggml_tensor *x, int64_t n) {
    return ggml_view_2d(ctx, x, x->ne[0], n, x->nb[1], (size_t)(x->ne[1] - n) * x->nb[1]);
}

static void build(llm_run *r) {
    const llm_model *m = r->model;
    const llm_shape *s = &m->shape;
    const llm_layer *layers = m->wide_layers && r->n_tokens >= WIDE ? m->wide_layers : m->layers;
    size_t nodes = s->n_layers * (size_t)48 + 64;
    struct ggml_init_params params = {0, NULL, true};
    struct ggml_context *ctx;
    struct ggml_tensor *x;
    uint32_t i;

    params.mem_size = nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false);
    if (r->ctx) ggml_free(r->ctx);
    ctx = r->ctx = ggml_init(params);
    r->graph = ggml_new_graph_custom(ctx, nodes, false);
    r->tokens = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, r->n_tokens);
    r->positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, r->n_tokens);
    ggml_set_input(r->tokens);
    ggml_set_input(r->positions);
    llm_attention_inputs(r->attention, ctx, r->n_tokens, r->n_rows);

    x = ggml_get_rows(ctx, m->embedding, r->tokens);
    for (i = 0; i < s->n_layers; i++) {
        const llm_layer *l = &layers[i];
        struct ggml_tensor *y = norm(ctx, x, l->attn_norm, m), *q, *k, *v;
        q = heads(ctx, y, l->q, l->q_bias, s->key_dim, s->n_q_heads);
        k = heads(ctx, y, l->k, l->k_bias, s->key_dim, s->n_kv_heads);
        v = heads(ctx, y, l->v, l->v_bias, s->value_dim, s->n_kv_heads);
        if (l->q_norm) q = norm(ctx, q, l->q_norm, m);
        if (l->k_norm) k = norm(ctx, k, l->k_norm, m);
        y = llm_attention_build(r->attention, ctx, r->graph, i, rope(ctx, r, q), rope(ctx, r, k),
                                v);
        ggml_build_forward_expand(r->graph, y); /* it changes the cache: also if no one reads it */
        if (i + 1 == s->n_layers) {             /* only the rows that are asked for go on */
            if (!r->n_logits) return;
            y = last_rows(ctx, y, r->n_logits);
            x = last_rows(ctx, x, r->n_logits);
        }
        x = ggml_add(ctx, ggml_mul_mat(ctx, l->out, y), x);
        y = norm(ctx, x, l->ffn_norm, m);
        y = ggml_swiglu_split(ctx, ggml_mul_mat(ctx, l->ffn_gate, y),
                              ggml_mul_mat(ctx, l->ffn_up, y));
        x = ggml_add(ctx, ggml_mul_mat(ctx, l->ffn_down, y), x);
    }
    r->logits = ggml_mul_mat(ctx, m->output, norm(ctx, x, m->output_norm, m));
    ggml_set_output(r->logits);
    ggml_build_forward_expand(r->graph, r->logits);
}

int llm_run_eval(llm_run *r, const int32_t *tokens, uint32_t n_tokens, uint32_t position,
                 uint32_t n_logits, const float **logits, char *err) {
    uint32_t n_rows = llm_attention_rows(r->attention, position + n_tokens), i;
    if (!r->ctx || n_tokens != r->n_tokens || n_logits != r->n_logits || n_rows != r->n_rows) {
        r->n_tokens = n_tokens;
        r->n_logits = n_logits;
        r->n_rows = n_rows;
        build(r);
        if (!ggml_gallocr_alloc_graph(r->allocator, r->graph)) {
            ggml_free(r->ctx);
            r->ctx = NULL;
            return llm_fail(err, "no memory for a step of %u tokens; take a smaller --chunk",
                            (unsigned)n_tokens);
        }
    }
    for (i = 0; i < n_tokens; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= r->model->n_vocab)
            return llm_fail(err, "token %d is not in the model's vocabulary", (int)tokens[i]);
        ((int32_t *)r->tokens->data)[i] = tokens[i];
        ((int32_t *)r->positions->data)[i] = (int32_t)(position + i);
    }
    llm_attention_set_inputs(r->attention, position, n_tokens);
    if (ggml_backend_graph_compute(r->backend, r->graph) != GGML_STATUS_SUCCESS)
        return llm_fail(err, "ggml could not compute a step of %u tokens", (unsigned)n_tokens);
    if (logits) *logits = n_logits ? (const float *)r->logits->data : NULL;
    return llm_attention_ok(r->attention, err);
}
