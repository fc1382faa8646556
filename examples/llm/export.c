/* export.c - balancekv.h keeps the tokens, ggml's own flash attention reads them: bkv_export()
   writes the rows of every KV head to tensors of ggml, and the logarithms of their weights to the
   mask of ggml_flash_attn_ext, which so counts them in numerator and denominator.

   Compares both attentions after a prompt, more tokens, drafts, other tokens in their place, and a
   page more. The stream is noise, or a trace of 1 KV head and 3 query heads, as in examples/trace:
       export [TRACE]         exit code 1: they differ by more than `bar`, or a row is wrong */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include "../npy.h"
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

enum { KV_HEADS = 4, GROUP = 3, Q_HEADS = KV_HEADS * GROUP, DIM = 64 };
enum { BUDGET = 1000, PROMPT = 4010, MORE = 7, DRAFTS = 5, OTHERS = 6 }; /* they fit in a page */
enum { ROWS_STEP = 256 }; /* what the fast kernels of GPUs ask for */

/* ---- what a runtime has, per layer ----------------------------------------------------------- */

typedef struct flash {
    struct ggml_context *ctx;
    ggml_backend_buffer_t buffer;
    struct ggml_cgraph *graph;
    struct ggml_tensor *q, *k, *v, *mask, *out;
    bkv_rows rows[KV_HEADS][2]; /* keys and mask; values, whose type may be another */
} flash;

/* KV heads stand where ggml has streams, in dimension 3, and the query heads of a group where it
   has heads. So each KV head has its mask; masks of heads are refused by CUDA. The graph is for
   good: the number of rows does not grow. */
static flash flash_new(ggml_backend_t backend, const bkv_cache *cache,
                       const enum ggml_type type[2]) {
    struct ggml_init_params params = {8 * ggml_tensor_overhead() + ggml_graph_overhead(), NULL, 1};
    const bkv_config *cfg = &cache->cfg; /* with the default scale filled in */
    bkv_stats_info s;
    flash f;
    bkv_stats(cache, &s);
    uint32_t n_rows = (s.slots + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP;
    f.ctx = ggml_init(params);
    f.q = ggml_new_tensor_4d(f.ctx, GGML_TYPE_F32, DIM, 1, GROUP, KV_HEADS);
    f.k = ggml_new_tensor_4d(f.ctx, type[0], DIM, n_rows, 1, KV_HEADS);
    f.v = ggml_new_tensor_4d(f.ctx, type[1], DIM, n_rows, 1, KV_HEADS);
    f.mask = ggml_new_tensor_4d(f.ctx, GGML_TYPE_F16, n_rows, 1, 1, KV_HEADS);
    f.out = ggml_flash_attn_ext(f.ctx, f.q, f.k, f.v, f.mask, cfg->scale, 0.0f, cfg->softcap);
    f.graph = ggml_new_graph(f.ctx);
    ggml_build_forward_expand(f.graph, f.out);
    f.buffer = ggml_backend_alloc_ctx_tensors(f.ctx, backend);
    GGML_ASSERT(f.buffer);
    memset(f.rows, 0, sizeof f.rows);
    for (size_t h = 0; h < KV_HEADS; h++) {
        f.rows[h][0].k = (char *)f.k->data + h * f.k->nb[3];
        f.rows[h][0].mask = (char *)f.mask->data + h * f.mask->nb[3];
        f.rows[h][1].v = (char *)f.v->data + h * f.v->nb[3];
        for (int i = 0; i < 2; i++) {
            f.rows[h][i].type = type[i] == GGML_TYPE_F16 ? BKV_F16 : BKV_F32;
            f.rows[h][i].mask_type = BKV_F16, f.rows[h][i].n_rows = n_rows;
        }
    }
    return f;
}

/* Before each step. With tensors on a GPU, let `rows` point to a copy in the memory of the CPU and
   upload rows first .. first + n - 1 with ggml_backend_tensor_set(). */
static void flash_update(flash *f, bkv_cache *cache) {
    for (uint32_t h = 0; h < KV_HEADS; h++)
        for (int i = 0; i < 2; i++) GGML_ASSERT(bkv_export(cache, h, &f->rows[h][i]) == BKV_OK);
}

/* After bkv_truncate(): rows of tokens that are no more have to go, and those which new tokens took
   have to come, whatever their number. */
static void flash_forget(flash *f) {
    for (int h = 0; h < KV_HEADS; h++) f->rows[h][0].seen = f->rows[h][1].seen = 0;
}

/* q and the result: [Q_HEADS][DIM], as bkv_attend() has them. */
static const float *flash_attend(flash *f, ggml_backend_t backend, const void *q) {
    memcpy(f->q->data, q, ggml_nbytes(f->q));
    GGML_ASSERT(ggml_backend_graph_compute(backend, f->graph) == GGML_STATUS_SUCCESS);
    return (const float *)f->out->data;
}

/* ---- the comparison -------------------------------------------------------------------------- */

static const enum ggml_type kinds[3][2] = {
    {GGML_TYPE_F32, GGML_TYPE_F32}, {GGML_TYPE_F16, GGML_TYPE_F32}, {GGML_TYPE_F16, GGML_TYPE_F16}};
static const double bar = 5e-3; /* ggml sums up values of f16 in f16, others in f32 */
static npy_trace trace;         /* or nothing */
static float q[KV_HEADS][GROUP * DIM], k[KV_HEADS][DIM], v[KV_HEADS][DIM]; /* of the last token */
static bkv_cache cache;
static ggml_backend_t backend;
static flash kept[3], other[3]; /* carried on from step to step; to compare with */

static void fill(float *x, const npy_array *from, size_t token, size_t n, float size) {
    static uint32_t state = 1;
    for (size_t i = 0; i < n; i++, state = state * 1664525u + 1013904223u)
        x[i] = from->data ? from->data[token % trace.n * n + i]
                          : ((float)(state >> 9) / 4194304 - 1) * size;
}

static void append(size_t token, size_t n, uint32_t flags) {
    for (; n--; token++) {
        for (size_t h = 0; h < KV_HEADS; h++) { /* of a trace, each another part */
            fill(q[h], &trace.q, token + 1000 * h, GROUP * DIM, 6);
            fill(k[h], &trace.k, token + 1000 * h, DIM, 1);
            fill(v[h], &trace.v, token + 1000 * h, DIM, 1);
        }
        bkv_tensor key = bkv_dense(k, BKV_F32), value = bkv_dense(v, BKV_F32);
        GGML_ASSERT(bkv_append(&cache, key, value, 1, flags, 0, 1) == BKV_OK);
    }
}

/* Updates f; o takes the same export over 0xAA, then one of everything. 1 if n rows per head were
   written, no other was touched, and f is like o. */
static int update(flash *f, flash *o, uint32_t n) {
    struct ggml_tensor *of_f[3] = {f->k, f->mask, f->v}, *of_o[3] = {o->k, o->mask, o->v};
    int ok = 1;
    for (int i = 0; i < 3; i++) memset(of_o[i]->data, 0xAA, ggml_nbytes(of_o[i]));
    for (int h = 0; h < KV_HEADS; h++)
        for (int i = 0; i < 2; i++) {
            o->rows[h][i].seen = f->rows[h][i].seen;
            o->rows[h][i].halvings = f->rows[h][i].halvings;
        }
    flash_update(o, &cache);
    for (int i = 0; i < 3; i++)
        for (size_t at = 0; at < ggml_nbytes(of_o[i]); at++) {
            const bkv_rows *r = &o->rows[at / of_o[i]->nb[3]][i / 2];
            size_t row = at % of_o[i]->nb[3] / (of_o[i]->nb[3] / r->n_rows);
            ok &= r->n == n && (row - r->first < n || ((uint8_t *)of_o[i]->data)[at] == 0xAA);
        }
    flash_update(f, &cache);
    flash_forget(o);
    flash_update(o, &cache);
    for (int i = 0; i < 3; i++) ok &= !memcmp(of_f[i]->data, of_o[i]->data, ggml_nbytes(of_f[i]));
    return ok;
}

static double compare(flash *f, const float *out) {
    const float *x = flash_attend(f, backend, q);
    double off = 0, norm = 0;
    for (int i = 0; i < Q_HEADS * DIM; i++)
        off += pow((double)(x[i] - out[i]), 2), norm += pow((double)out[i], 2);
    return sqrt(off / norm);
}

/* A line of the table; 1 if all is well. */
static int check(const char *step, uint32_t n) {
    static float out[Q_HEADS * DIM];
    uint16_t *mask = (uint16_t *)other[0].mask->data;
    double off[4];
    int ok = 1, rows_ok = 1;
    GGML_ASSERT(bkv_attend(&cache, bkv_dense(q, BKV_F32), out, 0, 1) == BKV_OK);
    for (int i = 0; i < 3; i++) {
        rows_ok &= update(&kept[i], &other[i], n);
        off[i] = compare(&kept[i], out);
        ok &= off[i] <= bar;
    }
    /* Had this met the bar, nothing would have been checked. */
    for (size_t i = ggml_nbytes(other[0].mask) / sizeof *mask; i--;)
        if (mask[i] != 0xFC00) mask[i] = 0;
    off[3] = compare(&other[0], out);
    ok &= off[3] > 10 * bar;
    printf("  %-12s %9u    %.1e    %.1e    %.1e    %.1e%s%s\n", step, (unsigned)n, off[0], off[1],
           off[2], off[3], ok ? "" : "  ABOVE THE BAR", rows_ok ? "" : "  WRONG ROWS");
    return ok & rows_ok;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"f32", "f16", "bf16", "i8", "i4", "f16, softcap 20"};
    static const uint32_t types[] = {BKV_F32, BKV_F16, BKV_BF16, BKV_I8, BKV_I4, BKV_F16};
    char err[NPY_ERROR] = "the trace must have heads of 64, 3 of them on 1 KV head";
    int ok = 1;
    if (argc > 1 && (!npy_load_trace(&trace, argv[1], err) || trace.head_dim != DIM ||
                     trace.value_dim != DIM || trace.n_q_heads != GROUP || trace.n_kv_heads != 1)) {
        fprintf(stderr, "export: %s\n", err);
        return 2;
    }
    backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    printf("|ggml - bkv_attend| / |bkv_attend|, all heads, by the types of the rows of K and V\n"
           "  %-12s %12s    %-11s%-11s%-11sf32, all weights 1\n",
           "", "rows written", "f32", "f16, V f32", "f16");
    for (int c = 0; c < 6; c++) {
        bkv_config cfg = bkv_config_default(Q_HEADS, KV_HEADS, DIM, BUDGET);
        bkv_stats_info s;
        cfg.kv_type = types[c];
        cfg.softcap = c == 5 ? 20.0f : 0.0f;
        cfg.importance = BKV_IMPORTANCE_KEY; /* a cache learns nothing from ggml's attention */
        void *mem = malloc(bkv_size(&cfg));
        GGML_ASSERT(bkv_init(&cache, &cfg, mem, bkv_size(&cfg)) == BKV_OK);
        for (int i = 0; i < 3; i++) {
            kept[i] = flash_new(backend, &cache, kinds[i]);
            other[i] = flash_new(backend, &cache, kinds[i]);
        }
        uint32_t all = kept[0].rows[0][0].n_rows;
        append(0, PROMPT, 0);
        bkv_stats(&cache, &s);
        printf("cache of %s: %d tokens, %u slots, %u halvings, weights up to %.1f\n", names[c],
               PROMPT, (unsigned)s.slots, (unsigned)s.halvings, (double)s.max_weight);
        ok &= check("prompt", all);
        append(PROMPT, MORE, 0);
        ok &= check("more tokens", MORE);
        append(PROMPT + MORE, DRAFTS, BKV_DRAFT);
        ok &= check("drafts", DRAFTS);
        GGML_ASSERT(bkv_truncate(&cache, PROMPT + MORE) == BKV_OK);
        append(PROMPT + MORE + DRAFTS, OTHERS, 0);
        for (int i = 0; i < 3; i++) flash_forget(&kept[i]);
        ok &= check("others", all);
        append(PROMPT + MORE + DRAFTS + OTHERS, 64, 0);
        ok &= check("a page more", all);
        for (int i = 0; i < 6; i++) {
            ggml_backend_buffer_free((i < 3 ? kept : other)[i % 3].buffer);
            ggml_free((i < 3 ? kept : other)[i % 3].ctx);
        }
        free(mem);
    }
    ggml_backend_free(backend);
    if (trace.n) npy_free_trace(&trace);
    return !ok;
}
