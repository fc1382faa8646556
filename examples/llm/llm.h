/* llm.h - a language model on ggml whose attention is exchangeable.

   model.c      weights of a GGUF, the graph of a step, its computation
   attention.c  between q, k, v and the attention's output: all of balancekv.h
   program.c, talk.c, measure.c, bkv-llm.c    the commands

   Functions that can fail return 1, or 0 with one line in err[LLM_ERROR] that says what to do. */
#ifndef LLM_H
#define LLM_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "balancekv.h"
#include "ggml.h"

enum { LLM_ERROR = 512 };

int llm_fail(char *err, const char *format, ...);

/* ---- attention.c ----------------------------------------------------------------------------- */

/* What the attention of a model is made of; the same for every layer. */
typedef struct llm_shape {
    uint32_t n_layers, n_q_heads, n_kv_heads, key_dim, value_dim;
} llm_shape;

/* How the tokens of a layer are kept. */
typedef struct llm_attention_config {
    int full;             /* all of them, in f16, attended by ggml's flash attention */
    const char *baseline; /* or: by this method of bench/baselines.h, with the fields of bkv */
    bkv_config bkv;       /* otherwise: the cache of each layer; budget 0 keeps everything */
    uint32_t n_ctx;       /* most tokens of a sequence */
    uint32_t n_threads;
} llm_attention_config;

typedef struct llm_attention llm_attention;

int llm_attention_new(llm_attention **a, const llm_shape *shape, const llm_attention_config *cfg,
                      char *err);
void llm_attention_free(llm_attention *a);
void llm_attention_reset(llm_attention *a); /* empty */

/* The part of a graph that appends k and v (f32 [n_tokens][n_kv_heads][dim], after RoPE) to a layer
   and attends with q ([n_tokens][n_q_heads][key_dim]): f32 [n_tokens][n_q_heads * value_dim]. */
struct ggml_tensor *llm_attention_build(llm_attention *a, struct ggml_context *ctx,
                                        struct ggml_cgraph *graph, uint32_t layer,
                                        struct ggml_tensor *q, struct ggml_tensor *k,
                                        struct ggml_tensor *v);
/* Graphs of steps at which this number differs are different: rows that flash attention reads. */
uint32_t llm_attention_rows(const llm_attention *a, uint32_t end_position);
/* Before llm_attention_build() of the first layer, and before the graph is computed. */
void llm_attention_inputs(llm_attention *a, struct ggml_context *ctx, uint32_t n_tokens,
                          uint32_t n_rows);
void llm_attention_set_inputs(llm_attention *a, uint32_t position, uint32_t n_tokens);
/* After a graph was computed: did a cache refuse its inputs? */
int llm_attention_ok(const llm_attention *a, char *err);

/* Bytes that the caches of all layers hold (keys, values and everything that belongs to them), and
   their working memory. need: what _bytes() would say of a config; 0 if it is refused. full: of an
   f16 cache of n_tokens. */
size_t llm_attention_bytes(const llm_attention *a);
size_t llm_attention_scratch_bytes(const llm_attention *a);
size_t llm_attention_need(const llm_shape *shape, const llm_attention_config *cfg);
size_t llm_full_bytes(const llm_shape *shape, uint32_t n_tokens);

uint64_t llm_attention_halvings(const llm_attention *a); /* of the first layer so far */
/* The estimate of the caches of what their outputs are wrong by, relative, mean over the layers. */
double llm_attention_error(const llm_attention *a);

/* The state of all layers, llm_attention_bytes(), to return to. save: 0 if it is no block of bytes
   (baselines). */
int llm_attention_save(const llm_attention *a, void *snapshot);
void llm_attention_restore(llm_attention *a, const void *snapshot);

/* The same to a file, for any machine, and from one that the same settings wrote. When reading
   fails nothing has changed. */
int llm_attention_write(const llm_attention *a, FILE *f, char *err);
int llm_attention_read(llm_attention *a, FILE *f, char *err);

/* From now on q, k and v of each step are shown to a function, on one of the threads, before the
   next step. Not with full attention. */
typedef void (*llm_tap)(void *user, uint32_t layer, const struct ggml_tensor *q,
                        const struct ggml_tensor *k, const struct ggml_tensor *v);
void llm_attention_tap(llm_attention *a, llm_tap tap, void *user);

/* ---- model.c --------------------------------------------------------------------------------- */

typedef struct llm_layer {
    struct ggml_tensor *attn_norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *out;
    struct ggml_tensor *ffn_norm, *ffn_gate, *ffn_up, *ffn_down;
} llm_layer;

typedef struct llm_model {
    llm_shape shape;
    uint32_t n_embd, n_ff, n_vocab, n_rot, n_trained; /* n_trained: tokens it was trained on */
    int rope_mode;                                    /* which elements make a pair: GGML_ROPE_* */
    float rope_base, rope_scale, norm_eps;
    struct ggml_tensor *embedding, *output_norm, *output, *rope_factors;
    llm_layer *layers;
    llm_layer *wide_layers; /* with unpacked weights, for steps of many tokens; or NULL */
    struct ggml_context *wide;
    void *wide_data;
    struct gguf_context *gguf;
    struct ggml_context *tensors;
    void *file; /* the mapped file, which holds the tensors' data */
    size_t file_bytes;
} llm_model;

/* type: what quantised weights are unpacked to, for steps of many tokens; GGML_TYPE_COUNT: not. */
int llm_model_load(llm_model *m, const char *path, enum ggml_type type, char *err);
void llm_model_free(llm_model *m);

/* One sequence of a model. */
typedef struct llm_run llm_run;

int llm_run_new(llm_run **r, const llm_model *m, llm_attention *a, uint32_t n_threads, char *err);
void llm_run_free(llm_run *r);

/* Feeds n_tokens tokens, the first of which stands at the given position. n_logits: for how many of
   the last ones logits are wanted; *logits: f32 [n_logits][n_vocab], until the next call. */
int llm_run_eval(llm_run *r, const int32_t *tokens, uint32_t n_tokens, uint32_t position,
                 uint32_t n_logits, const float **logits, char *err);

#endif /* LLM_H */
