/* peers.c - other implementations of the same work, as bench/peers.h wants them. Built by
   bench/peers.sh, with -DPEERS_GGML, -DPEERS_OPENBLAS, -DPEERS_NUMKONG for those that are there.
   Each gets the data in the layout it names before the clock starts. */
#define _GNU_SOURCE
#include "peers.h"
#include "peers_naive.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef PEERS_GGML
#include "ggml.h"
#include "ggml-cpu.h"
#include "vec.h" /* of ggml-cpu: ggml_v_expf */
#endif
#ifdef PEERS_OPENBLAS
#include <cblas.h>
#ifndef PEERS_BLAS /* how its names start: the wheel has a prefix, Debian has none */
#define PEERS_BLAS(name) name
#endif
void PEERS_BLAS(openblas_set_num_threads)(int);
char *PEERS_BLAS(openblas_get_config)(void);
char *PEERS_BLAS(openblas_get_corename)(void);
#endif
#ifdef PEERS_NUMKONG
#include <numkong/dot.h>
#include <numkong/dots.h>
#if NK_TARGET_SKYLAKE
#define NK_DOT nk_dot_f32_skylake
#define NK_GRAM nk_dots_symmetric_f32_skylake
#else
#define NK_DOT nk_dot_f32_haswell
#define NK_GRAM nk_dots_symmetric_f32_haswell
#endif
#endif

static void *allocate(size_t bytes) {
    const size_t unit = (size_t)2 << 20;
    void *p = NULL;
    bytes = (bytes + unit) / unit * unit;
    if (posix_memalign(&p, unit, bytes)) {
        fprintf(stderr, "peers: out of memory\n");
        exit(1);
    }
    madvise(p, bytes, MADV_HUGEPAGE);
    memset(p, 0, bytes);
    return p;
}

/* ---- K and V in a peer's layout ---- */
enum { BY_TOKEN, BY_HEAD, TRANSPOSED }; /* [n][heads][d], [heads][n][d], [heads][d][n] */

static size_t place(const peer_task *t, int layout, size_t token, size_t head, size_t i) {
    return layout == BY_TOKEN  ? (token * t->n_kv_heads + head) * t->dim + i
           : layout == BY_HEAD ? (head * t->n + token) * t->dim + i
                               : (head * t->dim + i) * t->n + token;
}

static uint16_t half_of(float x) {
#ifdef PEERS_GGML
    return ggml_fp32_to_fp16(x);
#else
    (void)x;
    return 0;
#endif
}

/* All copies of a tensor; *bytes: of one. */
static char *make_copies(const peer_task *t, const float *x, int layout, size_t *bytes) {
    int half = strcmp(t->type, "f16") == 0;
    size_t n = t->n * t->n_kv_heads * t->dim, token, head, i, copy;
    char *data;
    *bytes = n * (half ? 2 : 4);
    data = (char *)allocate(*bytes * t->copies);
    for (token = 0; token < t->n; token++)
        for (head = 0; head < t->n_kv_heads; head++)
            for (i = 0; i < t->dim; i++, x++) {
                size_t at = place(t, layout, token, head, i);
                if (half)
                    ((uint16_t *)(void *)data)[at] = half_of(*x);
                else
                    ((float *)(void *)data)[at] = *x;
            }
    for (copy = 1; copy < t->copies; copy++) memcpy(data + copy * *bytes, data, *bytes);
    return data;
}

/* ---- plain C, OpenBLAS and numkong: attention of one query a head, f32, by head ---- */
typedef struct plain {
    peer_task task;
    int kind;
    char *k, *v;
    size_t bytes;
    float *scores, *out;
} plain;
enum { NAIVE, SGEMV, SGEMM, SSYRK, NUMKONG };

static int kind_of(const peer *p) {
    return strcmp(p->name, "openblas_sgemv") == 0   ? SGEMV
           : strcmp(p->name, "openblas_sgemm") == 0 ? SGEMM
           : strcmp(p->name, "openblas_ssyrk") == 0 ? SSYRK
           : strcmp(p->name, "numkong") == 0        ? NUMKONG
                                                    : NAIVE;
}

static void *plain_open(const peer *self, const peer_task *task) {
    plain *p = (plain *)calloc(1, sizeof *p);
    p->task = *task;
    p->kind = kind_of(self);
    p->k = make_copies(task, task->k, BY_HEAD, &p->bytes);
    p->v = make_copies(task, task->v, BY_HEAD, &p->bytes);
    p->scores = (float *)allocate(task->n * task->n_q_heads * sizeof(float));
    p->out = (float *)allocate(task->n_q_heads * task->dim * sizeof(float));
    return p;
}
static void plain_run(void *state, size_t copy) {
    plain *p = (plain *)state;
    const peer_task *t = &p->task;
    size_t group = t->n_q_heads / t->n_kv_heads, n = t->n, d = t->dim, h, g;
    for (h = 0; h < t->n_kv_heads; h++) {
        const float *k = (const float *)(void *)(p->k + copy * p->bytes) + h * n * d;
        const float *v = (const float *)(void *)(p->v + copy * p->bytes) + h * n * d;
        const float *q = t->q + h * group * d;
        float *out = p->out + h * group * d, *s = p->scores;
#ifdef PEERS_OPENBLAS
        if (p->kind == SGEMM) {
            PEERS_BLAS(cblas_sgemm)
            (CblasRowMajor, CblasNoTrans, CblasTrans, (int)group, (int)n, (int)d, 1.0f, q, (int)d,
             k, (int)d, 0.0f, s, (int)n);
            for (g = 0; g < group; g++) naive_softmax(s + g * n, n, d);
            PEERS_BLAS(cblas_sgemm)
            (CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)group, (int)d, (int)n, 1.0f, s, (int)n,
             v, (int)d, 0.0f, out, (int)d);
            continue;
        }
#endif
        for (g = 0; g < group; g++, q += d, out += d) {
            if (p->kind == NAIVE) {
                naive_attend(k, v, q, out, s, n, d);
#ifdef PEERS_OPENBLAS
            } else if (p->kind == SGEMV) {
                PEERS_BLAS(cblas_sgemv)
                (CblasRowMajor, CblasNoTrans, (int)n, (int)d, 1.0f, k, (int)d, q, 1, 0.0f, s, 1);
                naive_softmax(s, n, d);
                PEERS_BLAS(cblas_sgemv)
                (CblasRowMajor, CblasTrans, (int)n, (int)d, 1.0f, v, (int)d, s, 1, 0.0f, out, 1);
#endif
#ifdef PEERS_NUMKONG
            } else if (p->kind == NUMKONG) {
                size_t i;
                for (i = 0; i < n; i++) {
                    nk_f64_t dot;
                    NK_DOT(q, k + i * d, d, &dot);
                    s[i] = (float)dot;
                }
                naive_softmax(s, n, d);
                naive_values(v, s, out, n, d);
#endif
            }
        }
    }
}
static const float *plain_result(void *state) { return ((plain *)state)->out; }
static void plain_close(void *state) {
    plain *p = (plain *)state;
    free(p->k);
    free(p->v);
    free(p->scores);
    free(p->out);
    free(p);
}

/* ---- the same three: a halving, the same as ours; products by theirs, the rest in plain C ---- */
typedef struct halving {
    int kind;
    const float *k, *v; /* of all blocks */
    naive_block *b;
    double *gram;  /* numkong's, the upper triangle */
    float *result; /* [128] weights, [128][dim] values, 0 of those that went */
} halving;

static void *halving_open(const peer *self, const peer_task *task) {
    halving *h = (halving *)calloc(1, sizeof *h);
    h->kind = kind_of(self);
    h->b = (naive_block *)allocate(sizeof *h->b);
    h->k = task->k;
    h->v = task->v;
    h->b->u = task->u;
    h->b->d = task->dim;
    h->b->moves = strstr(task->type, "unmoved") == NULL;
    h->gram = (double *)allocate(BLOCK * BLOCK * sizeof(double));
    h->result = (float *)allocate(BLOCK * (1 + task->dim) * sizeof(float));
    return h;
}
static void gram(halving *h, const float *x, float *to) {
    size_t d = h->b->d;
    if (h->kind == NAIVE) naive_gram(x, to, d);
#ifdef PEERS_OPENBLAS
    if (h->kind == SSYRK)
        PEERS_BLAS(cblas_ssyrk)
        (CblasRowMajor, CblasLower, CblasNoTrans, BLOCK, (int)d, 1.0f, x, (int)d, 0.0f, to, BLOCK);
    if (h->kind == SGEMM)
        PEERS_BLAS(cblas_sgemm)
        (CblasRowMajor, CblasNoTrans, CblasTrans, BLOCK, BLOCK, (int)d, 1.0f, x, (int)d, x, (int)d,
         0.0f, to, BLOCK);
#endif
#ifdef PEERS_NUMKONG
    if (h->kind == NUMKONG) {
        size_t i, j, a;
        NK_GRAM(x, BLOCK, d, d * sizeof(float), h->gram, BLOCK * sizeof(double), 0, BLOCK);
        for (i = 0; i < BLOCK; i += 16) /* turned, in squares */
            for (j = 0; j < i + 16; j++)
                for (a = i; a < i + 16; a++) to[a * BLOCK + j] = (float)h->gram[j * BLOCK + a];
    }
#endif
}
/* The steps of the values that move: a product, then a unit lower triangular system. */
static void steps(halving *h) {
    naive_block *b = h->b;
#ifdef PEERS_OPENBLAS
    int d = (int)b->d, n = (int)b->n;
    if (h->kind == SSYRK || h->kind == SGEMM) {
        PEERS_BLAS(cblas_sgemm)
        (CblasRowMajor, CblasNoTrans, CblasNoTrans, n, d, BLOCK, -0.5f, b->c, BLOCK, b->v_centred,
         d, 0.0f, b->step, d);
        PEERS_BLAS(cblas_strsm)
        (CblasRowMajor, CblasLeft, CblasLower, CblasNoTrans, CblasUnit, n, d, 1.0f, b->among, PAGE,
         b->step, d);
        return;
    }
#endif
    naive_product(b);
    naive_solve(b);
}
static void halving_run(void *state, size_t copy) {
    halving *h = (halving *)state;
    naive_block *b = h->b;
    float mean[MAX_DIM];
    b->k = h->k + copy * BLOCK * b->d;
    b->v = h->v + copy * BLOCK * b->d;
    naive_centre(b->v, mean, b->v_centred, b->d);
    naive_centre(b->k, b->mean, b->k_centred, b->d);
    gram(h, b->k_centred, b->kk);
    gram(h, b->v_centred, b->vv);
    naive_choose(b);
    if (b->moves) {
        naive_coefficients(b);
        steps(h);
    }
    naive_keep(b);
}
static const float *halving_result(void *state) {
    halving *h = (halving *)state;
    const naive_block *b = h->b;
    float *values = h->result + BLOCK;
    size_t i, n = 0;
    memset(h->result, 0, BLOCK * (1 + b->d) * sizeof(float));
    for (i = 0; i < BLOCK; i++)
        if (b->keep[i]) {
            h->result[i] = b->weight[n];
            memcpy(values + i * b->d, b->kept_v + n++ * b->d, b->d * sizeof(float));
        }
    return h->result;
}
static void halving_close(void *state) {
    halving *h = (halving *)state;
    free(h->b);
    free(h->gram);
    free(h->result);
    free(h);
}

/* ---- exp ---- */
typedef struct exponential {
    const float *x;
    float *y;
    size_t n;
    void (*run)(const float *x, float *y, size_t n);
} exponential;
static void exp_of_libm(const float *x, float *y, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) y[i] = expf(x[i]);
}
#ifdef PEERS_GGML
static void exp_of_ggml(const float *x, float *y, size_t n) {
    size_t i;
#if defined(__AVX512F__)
    for (i = 0; i < n; i += 16) _mm512_storeu_ps(y + i, ggml_v_expf(_mm512_loadu_ps(x + i)));
#elif defined(__AVX2__)
    for (i = 0; i < n; i += 8) _mm256_storeu_ps(y + i, ggml_v_expf(_mm256_loadu_ps(x + i)));
#else
    for (i = 0; i < n; i += 4) vst1q_f32(y + i, ggml_v_expf(vld1q_f32(x + i)));
#endif
}
#endif
static void *exp_open(const peer *self, const peer_task *task) {
    exponential *e = (exponential *)calloc(1, sizeof *e);
    e->x = task->q;
    e->n = task->n;
    e->y = (float *)allocate(task->n * sizeof(float));
    e->run = strcmp(self->name, "libm") == 0 ? exp_of_libm : naive_exp;
#ifdef PEERS_GGML
    if (strcmp(self->name, "ggml") == 0) e->run = exp_of_ggml;
#endif
    return e;
}
static void exp_run(void *state, size_t copy) {
    exponential *e = (exponential *)state;
    (void)copy;
    e->run(e->x, e->y, e->n);
}
static const float *exp_result(void *state) { return ((exponential *)state)->y; }
static void exp_close(void *state) {
    free(((exponential *)state)->y);
    free(state);
}

/* ---- ggml: flash attention, or two multiplications with a softmax between; in the layout of
   llama.cpp's cache (by token), or by head, which is kinder to it ---- */
#ifdef PEERS_GGML
typedef struct graph {
    peer_task task;
    struct ggml_context *context;
    struct ggml_threadpool *threads;
    struct ggml_cgraph *nodes;
    struct ggml_cplan plan;
    struct ggml_tensor *k, *v, *out;
    char *keys, *values;
    size_t bytes;
    int flash;
    float *ordered;
    void *owned[8];
    int n_owned;
} graph;

static void *own(graph *g, size_t bytes) { return g->owned[g->n_owned++] = allocate(bytes); }

static struct ggml_tensor *by_layout(graph *g, enum ggml_type type, int layout) {
    int64_t d = (int64_t)g->task.dim, n = (int64_t)g->task.n, heads = (int64_t)g->task.n_kv_heads;
    if (layout == BY_TOKEN)
        return ggml_permute(g->context, ggml_new_tensor_3d(g->context, type, d, heads, n), 0, 2, 1,
                            3);
    return layout == BY_HEAD ? ggml_new_tensor_3d(g->context, type, d, n, heads)
                             : ggml_new_tensor_3d(g->context, type, n, d, heads);
}

/* Query i of the last n_queries tokens sees everything up to its own token. */
static struct ggml_tensor *causal_mask(graph *g) {
    size_t n = g->task.n, n_queries = g->task.n_queries, i, j;
    struct ggml_tensor *mask =
        ggml_new_tensor_2d(g->context, GGML_TYPE_F16, (int64_t)n, (int64_t)n_queries);
    ggml_fp16_t *m = (ggml_fp16_t *)own(g, n * n_queries * sizeof *m);
    for (i = 0; i < n_queries; i++)
        for (j = 0; j < n; j++)
            m[i * n + j] = ggml_fp32_to_fp16(j <= n - n_queries + i ? 0.0f : -INFINITY);
    mask->data = m;
    return mask;
}

static void *graph_open(const peer *self, const peer_task *task) {
    struct ggml_init_params params = {(size_t)16 << 20, NULL, true};
    struct ggml_threadpool_params one = ggml_threadpool_params_default(1);
    enum ggml_type type = strcmp(task->type, "f16") == 0 ? GGML_TYPE_F16 : GGML_TYPE_F32;
    int k_layout = strstr(self->name, "llama") ? BY_TOKEN : BY_HEAD, v_layout;
    size_t out_floats = task->n_queries * task->n_q_heads * task->dim;
    float scale = 1.0f / sqrtf((float)task->dim);
    struct ggml_tensor *q, *mask;
    graph *g = (graph *)calloc(1, sizeof *g);
    ggml_cpu_init();
    g->task = *task;
    g->flash = strstr(self->name, "flash") != NULL;
    g->context = ggml_init(params);
    g->threads = ggml_threadpool_new(&one);
    v_layout = g->flash ? k_layout : TRANSPOSED; /* as llama.cpp keeps V */
    g->keys = make_copies(task, task->k, k_layout, &g->bytes);
    g->values = make_copies(task, task->v, v_layout, &g->bytes);
    g->k = by_layout(g, type, k_layout);
    g->v = by_layout(g, type, v_layout);
    q = ggml_new_tensor_3d(g->context, GGML_TYPE_F32, (int64_t)task->dim, (int64_t)task->n_q_heads,
                           (int64_t)task->n_queries);
    q->data = (void *)(uintptr_t)task->q;
    q = ggml_permute(g->context, q, 0, 2, 1, 3);
    mask = task->n_queries > 1 ? causal_mask(g) : NULL;
    if (g->flash) {
        g->out = ggml_flash_attn_ext(g->context, q, g->k, g->v, mask, scale, 0.0f, 0.0f);
    } else {
        size_t bytes = task->n * task->n_queries * task->n_q_heads * sizeof(float);
        struct ggml_tensor *scores = ggml_mul_mat(g->context, g->k, q), *weights;
        scores->data = own(g, bytes);
        weights = ggml_soft_max_ext_inplace(g->context, scores, mask, scale, 0.0f);
        weights->data = scores->data;
        g->out = ggml_mul_mat(g->context, g->v, weights);
    }
    g->out->data = own(g, out_floats * sizeof(float));
    g->ordered = (float *)own(g, out_floats * sizeof(float));
    g->nodes = ggml_new_graph_custom(g->context, 16, false);
    ggml_build_forward_expand(g->nodes, g->out);
    g->plan = ggml_graph_plan(g->nodes, 1, g->threads);
    g->plan.work_data = (uint8_t *)own(g, g->plan.work_size + 64);
    return g;
}
static void graph_run(void *state, size_t copy) {
    graph *g = (graph *)state;
    g->k->data = g->keys + copy * g->bytes;
    g->v->data = g->values + copy * g->bytes;
    ggml_graph_compute(g->nodes, &g->plan);
}
static const float *graph_result(void *state) {
    graph *g = (graph *)state;
    size_t heads = g->task.n_q_heads, d = g->task.dim, n = g->task.n_queries, i, h;
    const float *out = (const float *)g->out->data;
    if (g->flash) return out;
    for (i = 0; i < n; i++) /* [heads][queries][d] */
        for (h = 0; h < heads; h++)
            memcpy(g->ordered + (i * heads + h) * d, out + (h * n + i) * d, d * sizeof(float));
    return g->ordered;
}
static void graph_close(void *state) {
    graph *g = (graph *)state;
    ggml_threadpool_free(g->threads);
    ggml_free(g->context);
    free(g->keys);
    free(g->values);
    while (g->n_owned) free(g->owned[--g->n_owned]);
    free(g);
}
#endif

#define PLAIN plain_open, plain_run, plain_result, plain_close
#define HALVING halving_open, halving_run, halving_result, halving_close
#define EXP exp_open, exp_run, exp_result, exp_close
#define GRAPH graph_open, graph_run, graph_result, graph_close

/* Tolerances. ggml's flash attention sums values of f16 in f16. Of a halving one token kept instead
   of another is an error of about 0.2: a tie that rounding decides would look like that. */
static const peer all[] = {
    {"naive", "halve", "f32 unmoved", 1e-5, HALVING},
    {"naive", "attend", "f32", 1e-4, PLAIN},
    {"libm", "exp", "f32", 1e-6, EXP},
    {"naive", "exp", "f32", 1e-6, EXP},
#ifdef PEERS_OPENBLAS
    {"openblas_ssyrk", "halve", "f32 unmoved", 1e-5, HALVING},
    {"openblas_sgemm", "halve", "f32 unmoved", 1e-5, HALVING},
    {"openblas_sgemm", "attend", "f32", 1e-4, PLAIN},
    {"openblas_sgemv", "attend", "f32", 1e-4, PLAIN},
#endif
#ifdef PEERS_NUMKONG
    {"numkong", "halve", "f32 unmoved", 1e-5, HALVING},
    {"numkong", "attend", "f32", 1e-4, PLAIN},
#endif
#ifdef PEERS_GGML
    {"ggml", "exp", "f32", 1e-6, EXP},
    {"ggml_flash_llama", "attend prefill", "f16", 1e-1, GRAPH},
    {"ggml_flash_heads", "attend prefill", "f16", 1e-1, GRAPH},
    {"ggml_matmul_llama", "attend prefill", "f16", 5e-3, GRAPH},
    {"ggml_matmul_heads", "attend prefill", "f16", 5e-3, GRAPH},
    {"ggml_flash_llama", "attend prefill", "f32", 1e-4, GRAPH},
    {"ggml_flash_heads", "attend prefill", "f32", 1e-4, GRAPH},
    {"ggml_matmul_llama", "attend prefill", "f32", 1e-4, GRAPH},
    {"ggml_matmul_heads", "attend prefill", "f32", 1e-4, GRAPH},
#endif
};

#ifndef PEERS_ABOUT
#define PEERS_ABOUT ""
#endif
const peer_list *PEERS_SYMBOL(void);
const peer_list *PEERS_SYMBOL(void) {
    static char about[512];
    static peer_list l = {about, all, sizeof all / sizeof *all};
    snprintf(about, sizeof about, "%s", PEERS_ABOUT);
#ifdef PEERS_OPENBLAS
    PEERS_BLAS(openblas_set_num_threads)(1);
    snprintf(about + strlen(about), sizeof about - strlen(about), "; %s, kernels of %s",
             PEERS_BLAS(openblas_get_config)(), PEERS_BLAS(openblas_get_corename)());
#endif
    return &l;
}
