/* program.h - what the commands share: options, the model and its tokens, feeding them. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stdio.h>

#include "llama.h"
#include "llm.h"

typedef struct options {
    const char *command, *model, *text, *prompt, *method, *out, *layers;
    uint32_t ctx[8], n_ctx; /* lengths; none: one, what the model was trained on */
    uint32_t threads, chunk, n, windows, depths, seeds, seed;
    uint32_t json, endless, each; /* flags */
    double share, temp;
    enum ggml_type weights; /* --unpack; GGML_TYPE_COUNT: no */
    llm_attention_config attention;
} options;

typedef struct program {
    options opt;
    llm_model model;
    struct llama_model *vocab_model;
    const struct llama_vocab *vocab;
    llm_attention *attention;
    llm_run *run;
} program;

/* Bad input: one line that says what to do, exit code 2. */
void die(const char *format, ...);
void *allocate(size_t bytes); /* or dies */

void parse_options(options *o, int argc, char **argv);
void open_model(program *p);
/* Makes empty caches for sequences of n_ctx tokens. */
void open_run(program *p, uint32_t n_ctx, uint64_t seed);
void close_run(program *p);

/* A file as it is; NULL: standard input. */
char *read_text(const char *path, size_t *size);
/* special: "<|im_end|>" is a token, and what the model wants at the start comes first. */
int32_t *tokenize(const program *p, const char *text, size_t size, int special, uint32_t *n);
/* The tokens of --text, at least n_least. */
int32_t *text_tokens(const program *p, uint32_t n_least, uint32_t *n);

/* What a token cost that was expected after the tokens before it, and which the model would say. */
typedef struct score {
    double nats;
    int32_t likeliest;
} score;

/* Feeds n tokens in steps of --chunk. The last n_scored positions are scored against their targets,
   the tokens that follow them in truth. */
void feed(program *p, const int32_t *tokens, uint32_t n, uint32_t position, uint32_t n_scored,
          const int32_t *targets, score *scores);
/* One token; the logits of the next. */
const float *step(program *p, int32_t token, uint32_t position);

/* The fields that every JSON line starts with, or the same as the start of a line of text. */
void print_setting(const program *p, uint32_t n_ctx);

double now(void);            /* seconds */
size_t resident_bytes(void); /* of this process; 0: the system does not tell */
uint64_t mix(uint64_t x);    /* splitmix64 */

/* talk.c */
void command_generate(program *p);
void command_chat(program *p);
/* measure.c */
void command_ppl(program *p);
void command_passkey(program *p);
void command_speed(program *p);
void command_check(program *p);
void command_dump(program *p);

#endif /* PROGRAM_H */
