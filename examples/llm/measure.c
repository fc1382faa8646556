/* measure.c - ppl, passkey, speed, check, dump. */
#define _POSIX_C_SOURCE 200809L
#include "program.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- ppl ------------------------------------------------------------------------------------- */

void command_ppl(program *p) {
    uint32_t n_ctx = p->opt.ctx[0], n_scored = n_ctx / 2, n, w, i, windows;
    int32_t *tokens;
    score *scores;
    double nats = 0, seconds = 0;
    if (n_ctx < 16) die("--ctx %u is too short; 16 tokens at least", (unsigned)n_ctx);
    tokens = text_tokens(p, n_ctx, &n);
    windows = n / n_ctx < p->opt.windows ? n / n_ctx : p->opt.windows;
    open_run(p, n_ctx, p->opt.seed);
    scores = (score *)allocate(n_scored * sizeof *scores);
    for (w = 0; w < windows; w++) {
        const int32_t *window = tokens + (size_t)w * n_ctx;
        double start = now();
        if (!p->opt.endless) llm_attention_reset(p->attention);
        feed(p, window, n_ctx - 1, 0, n_scored, window + n_ctx - n_scored, scores);
        for (i = 0; i < n_scored; i++) nats += scores[i].nats;
        start = now() - start;
        seconds += start;
        if (isatty(2) || p->opt.endless)
            fprintf(stderr, "%u tokens: ppl %.4f, %.3f ms a token, %.1f MB resident\n",
                    (unsigned)((w + 1) * n_ctx), exp(nats / ((w + 1.0) * n_scored)),
                    1e3 * start / (n_ctx - 1), (double)resident_bytes() * 1e-6);
    }
    nats /= (double)windows * n_scored;
    print_setting(p, n_ctx);
    printf(p->opt.json ? "\"windows\": %u, \"tokens\": %u, \"nll\": %.6f, \"ppl\": %.5f, "
                         "\"ms_per_token\": %.4f}\n"
                       : "%u windows, %u tokens scored, nll %.5f, ppl %.4f, %.3f ms a token\n",
           (unsigned)windows, (unsigned)(windows * n_scored), nats, exp(nats),
           1e3 * seconds / ((double)windows * (n_ctx - 1)));
    free(scores);
    free(tokens);
}

/* ---- passkey --------------------------------------------------------------------------------- */

enum { DIGITS = 6, MAX_ANSWER = 16 };

static const char filler[] = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
                             "There and back again. ";

typedef struct passkey {
    int32_t *needle, *question; /* question: up to and with the answer */
    uint32_t n_needle, n_question, n_answer;
} passkey;

/* The answer's tokens: those in which the questions of keys without a common digit differ. */
static passkey make_passkey(const program *p, uint64_t seed) {
    char text[256], key[DIGITS + 1], other[DIGITS + 1];
    passkey k;
    uint32_t n, i, same = 0;
    int32_t *tokens;
    int size;
    for (i = 0; i < DIGITS; i++) {
        uint32_t digit = (uint32_t)(mix(seed * DIGITS + i) % 10);
        key[i] = (char)('0' + digit);
        other[i] = (char)('0' + (digit + 5) % 10);
    }
    key[DIGITS] = other[DIGITS] = 0;
    size = snprintf(text, sizeof text,
                    "\n\nThe pass key is %s. Remember it. %s is the pass key.\n\n", key, key);
    k.needle = tokenize(p, text, (size_t)size, 0, &k.n_needle);
    size = snprintf(text, sizeof text, "\n\nWhat is the pass key? The pass key is %s", other);
    tokens = tokenize(p, text, (size_t)size, 0, &n);
    memcpy(text + size - DIGITS, key, DIGITS);
    k.question = tokenize(p, text, (size_t)size, 0, &k.n_question);
    while (same < n && same < k.n_question && tokens[same] == k.question[same]) same++;
    k.n_answer = k.n_question - same;
    if (!same || !k.n_answer || k.n_answer > MAX_ANSWER)
        die("%s: its vocabulary does not write digits as this test wants", p->opt.model);
    free(tokens);
    return k;
}

/* The filler, or the text given instead; at least n_least tokens. */
static int32_t *filler_tokens(const program *p, uint32_t n_least, uint32_t *n) {
    size_t size = n_least * sizeof filler, i; /* no token is empty */
    char *text;
    int32_t *tokens;
    if (p->opt.text) return text_tokens(p, n_least, n);
    text = (char *)allocate(size);
    for (i = 0; i < size; i++) text[i] = filler[i % (sizeof filler - 1)];
    tokens = tokenize(p, text, n_least * (size_t)8, 0, n);
    free(text);
    return tokens;
}

/* Of one key in n_ctx tokens: found, and nats. The caches hold *held tokens of the text, and do so
   afterwards: more of it, up to where the key was. Scored with the true digits before each digit:
   all of them right is the same as generating them. */
static int one_key(program *p, uint64_t seed, const int32_t *text, uint32_t n_ctx, double depth,
                   uint32_t *held, void *snapshot, double *nats) {
    passkey k = make_passkey(p, seed);
    uint32_t n_text, at, i, position, found = 0;
    int saved;
    const int32_t *answer = k.question + k.n_question - k.n_answer;
    score scores[MAX_ANSWER];
    if (n_ctx < 2 * (k.n_needle + k.n_question))
        die("--ctx %u is too short for a pass key; %u tokens at least", (unsigned)n_ctx,
            (unsigned)(2 * (k.n_needle + k.n_question)));
    n_text = n_ctx - k.n_needle - k.n_question;
    at = (uint32_t)(depth * n_text);
    feed(p, text + *held, at - *held, *held, 0, NULL, NULL);
    *held = at;
    saved = llm_attention_save(p->attention, snapshot);
    feed(p, k.needle, k.n_needle, at, 0, NULL, NULL);
    feed(p, text + at, n_text - at, at + k.n_needle, 0, NULL, NULL);
    position = n_text + k.n_needle;
    feed(p, k.question, k.n_question - 1, position, k.n_answer, answer, scores);
    if (saved)
        llm_attention_restore(p->attention, snapshot);
    else {
        llm_attention_reset(p->attention);
        *held = 0;
    }
    for (*nats = 0, i = 0; i < k.n_answer; i++) {
        *nats += scores[i].nats / DIGITS;
        found += scores[i].likeliest == answer[i];
    }
    free(k.needle);
    free(k.question);
    return found == k.n_answer;
}

static void passkey_length(program *p, uint32_t n_ctx) {
    uint32_t seed, d, n, found = 0, cases = p->opt.seeds * p->opt.depths;
    int32_t *text = filler_tokens(p, n_ctx, &n);
    void *snapshot = NULL;
    double nats = 0, start = now();
    for (seed = p->opt.seed; seed < p->opt.seed + p->opt.seeds; seed++) {
        uint32_t held = 0, from = (uint32_t)(mix(seed) % (n - n_ctx + 1)); /* each elsewhere */
        open_run(p, n_ctx, seed);
        if (!snapshot) snapshot = allocate(llm_attention_bytes(p->attention));
        for (d = 0; d < p->opt.depths; d++) {
            double depth = (d + 0.5) / p->opt.depths, cost;
            int ok = one_key(p, (uint64_t)seed * 1000 + d, text + from, n_ctx, depth, &held,
                             snapshot, &cost);
            found += (uint32_t)ok;
            nats += cost / cases;
            if (!p->opt.each) continue;
            print_setting(p, n_ctx);
            printf(p->opt.json ? "\"key\": %u, \"depth\": %.3f, \"found\": %d, "
                                 "\"nll_per_digit\": %.4f}\n"
                               : "key %u at %.3f: found %d, %.4f nats a digit\n",
                   (unsigned)seed, depth, ok, cost);
            fflush(stdout);
        }
    }
    print_setting(p, n_ctx);
    printf(p->opt.json ? "\"cases\": %u, \"found\": %u, \"nll_per_digit\": %.4f, "
                         "\"seconds\": %.1f}\n"
                       : "of %u keys %u found, %.4f nats a digit, %.1f s\n",
           (unsigned)cases, (unsigned)found, nats, now() - start);
    fflush(stdout);
    free(snapshot);
    free(text);
}

void command_passkey(program *p) {
    uint32_t i;
    for (i = 0; i < p->opt.n_ctx; i++) passkey_length(p, p->opt.ctx[i]);
}

/* ---- speed ----------------------------------------------------------------------------------- */

/* Two halvings of every layer: one each 64 tokens. Alternating in short blocks, so that both see
   the same machine. */
enum { TIMED = 128, BLOCK = 4, PER_HALVING = 64 };

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void command_speed(program *p) {
    program two[2];
    double times[2][TIMED], mean[2] = {0, 0}, halving = 0, share;
    uint32_t n_ctx = p->opt.ctx[0], n, first, i, s;
    uint64_t halvings = 0;
    int32_t *tokens;
    if (n_ctx < 2 * TIMED) die("speed needs --ctx %d or more", 2 * TIMED);
    tokens = text_tokens(p, n_ctx, &n);
    first = n_ctx - TIMED;
    for (s = 0; s < 2; s++) {
        two[s] = *p;
        if (s) {
            two[s].opt.attention.full = 1;
            two[s].opt.attention.baseline = NULL;
        }
        open_run(&two[s], n_ctx, p->opt.seed);
        feed(&two[s], tokens, first, 0, 0, NULL, NULL);
    }
    fprintf(stderr, "%u tokens fed to both; timing\n", (unsigned)first);
    for (i = 0; i < TIMED; i += BLOCK)
        for (s = 0; s < 2; s++) {
            uint32_t t;
            for (t = i; t < i + BLOCK; t++) {
                double start = now(), ms;
                step(&two[s], tokens[first + t], first + t);
                ms = 1e3 * (now() - start);
                times[s][t] = ms;
                mean[s] += ms / TIMED;
                if (!s && llm_attention_halvings(two[0].attention) != halvings) {
                    /* The first time it is only found out how many there were before. */
                    if (t && (!(halving > 0) || ms < halving)) halving = ms;
                    halvings = llm_attention_halvings(two[0].attention);
                }
            }
        }
    for (s = 0; s < 2; s++) qsort(times[s], TIMED, sizeof times[s][0], by_size);
    /* The best of many is what the machine can do; a halving is added as often as it comes. */
    share = halving > times[0][0]
                ? (halving - times[0][0]) / (halving + (PER_HALVING - 1) * times[0][0])
                : 0;
    p->opt.attention = two[0].opt.attention;
    p->attention = two[0].attention;
    p->run = two[0].run;
    print_setting(p, n_ctx);
    printf(p->opt.json ? "\"ms_best\": %.4f, \"ms_median\": %.4f, \"ms_mean\": %.4f, "
                         "\"ms_with_halving\": %.4f, \"halving_share\": %.4f, "
                         "\"full_ms_best\": %.4f, \"full_ms_median\": %.4f, "
                         "\"full_ms_mean\": %.4f, \"ratio_best\": %.3f, "
                         "\"ratio_median\": %.3f}\n"
                       : "best %.3f ms a token, median %.3f, mean %.3f; with a halving %.3f, which "
                         "is %.4f of all time; full attention best %.3f, median %.3f, mean %.3f; "
                         "%.2f times as fast at best, %.2f in the median\n",
           times[0][0], times[0][TIMED / 2], mean[0], halving, share, times[1][0],
           times[1][TIMED / 2], mean[1], times[1][0] / times[0][0],
           times[1][TIMED / 2] / times[0][TIMED / 2]);
    close_run(&two[1]);
    free(tokens);
}

/* ---- check ----------------------------------------------------------------------------------- */

typedef struct difference {
    double most, squares;
    size_t likeliest; /* rows that name another token */
} difference;

static void compare(difference *d, const float *x, const float *y, uint32_t n) {
    uint32_t i, best_x = 0, best_y = 0;
    for (i = 0; i < n; i++) {
        double e = fabs((double)x[i] - (double)y[i]);
        if (!(e <= d->most)) d->most = e; /* NaN stays */
        d->squares += e * e;
        if (x[i] > x[best_x]) best_x = i;
        if (y[i] > y[best_y]) best_y = i;
    }
    d->likeliest += best_x != best_y;
}

static struct llama_context *reference(const program *p, struct llama_model *model, int flash) {
    struct llama_context_params params = llama_context_default_params();
    struct llama_context *ctx;
    params.n_ctx = p->opt.ctx[0];
    params.n_batch = params.n_ubatch = p->opt.chunk;
    params.n_threads = params.n_threads_batch = (int32_t)p->opt.threads;
    params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (!flash) params.type_k = params.type_v = GGML_TYPE_F32;
    ctx = llama_init_from_model(model, params);
    if (!ctx) die("%s: llama.cpp cannot run it", p->opt.model);
    return ctx;
}

static void reference_step(struct llama_context *ctx, const int32_t *tokens, uint32_t n,
                           uint32_t position) {
    struct llama_batch batch = llama_batch_init((int32_t)n, 0, 1);
    uint32_t i;
    batch.n_tokens = (int32_t)n;
    for (i = 0; i < n; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = (int32_t)(position + i);
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(ctx, batch)) die("llama.cpp cannot compute these tokens");
    llama_batch_free(batch);
}

/* The same tokens in the same steps through llama.cpp: with flash attention over f16, what it does
   by default, and without over f32, the most exact it can do. How far these two are from each other
   is the yardstick: quantised weights amplify the smallest difference to that of their own
   rounding. */
void command_check(program *p) {
    uint32_t n_ctx = p->opt.ctx[0], n, done, i, n_vocab = p->model.n_vocab;
    struct llama_model_params params = llama_model_default_params();
    struct llama_model *model;
    struct llama_context *flash, *exact;
    int32_t *tokens = text_tokens(p, n_ctx, &n);
    difference d[3]; /* from flash, from exact, of flash from exact */
    double squares = 0;
    memset(d, 0, sizeof d);
    open_run(p, n_ctx, p->opt.seed);
    params.use_extra_bufts = false; /* weights as they are in the file */
    model = llama_model_load_from_file(p->opt.model, params);
    if (!model) die("%s: llama.cpp cannot run it", p->opt.model);
    flash = reference(p, model, 1);
    exact = reference(p, model, 0);
    for (done = 0; done < n_ctx;) {
        uint32_t c = n_ctx - done < p->opt.chunk ? n_ctx - done : p->opt.chunk, j;
        const float *ours;
        char err[LLM_ERROR];
        reference_step(flash, tokens + done, c, done);
        reference_step(exact, tokens + done, c, done);
        if (!llm_run_eval(p->run, tokens + done, c, done, c, &ours, err)) die("%s", err);
        for (i = 0; i < c; i++, ours += n_vocab) {
            const float *x = llama_get_logits_ith(flash, (int32_t)i);
            const float *y = llama_get_logits_ith(exact, (int32_t)i);
            compare(&d[0], ours, x, n_vocab);
            compare(&d[1], ours, y, n_vocab);
            compare(&d[2], x, y, n_vocab);
            for (j = 0; j < n_vocab; j++) squares += (double)y[j] * (double)y[j];
        }
        done += c;
    }
    print_setting(p, n_ctx);
    if (p->opt.json)
        printf("\"max_diff\": %.6g, \"rel_diff\": %.6g, \"other_token\": %zu, "
               "\"max_diff_exact\": %.6g, \"rel_diff_exact\": %.6g, \"other_token_exact\": %zu, "
               "\"own_max_diff\": %.6g, \"own_rel_diff\": %.6g, \"own_other_token\": %zu}\n",
               d[0].most, sqrt(d[0].squares / squares), d[0].likeliest, d[1].most,
               sqrt(d[1].squares / squares), d[1].likeliest, d[2].most,
               sqrt(d[2].squares / squares), d[2].likeliest);
    else
        printf("logits differ by at most\n"
               "  %.4g (relative %.3g, %zu of %u likeliest tokens) from llama.cpp's, flash "
               "attention over f16\n"
               "  %.4g (%.3g, %zu) from llama.cpp's, exact attention over f32\n"
               "  %.4g (%.3g, %zu): these two of llama.cpp from each other\n",
               d[0].most, sqrt(d[0].squares / squares), d[0].likeliest, (unsigned)n_ctx, d[1].most,
               sqrt(d[1].squares / squares), d[1].likeliest, d[2].most,
               sqrt(d[2].squares / squares), d[2].likeliest);
    llama_free(flash);
    llama_free(exact);
    llama_model_free(model);
    free(tokens);
}

/* ---- dump ------------------------------------------------------------------------------------ */

typedef struct dump {
    FILE **files; /* [n_layers][q, k, v]; NULL: the layer is not wanted */
    int failed;
} dump;

static void dump_tensor(dump *d, FILE *f, const struct ggml_tensor *t) {
    int64_t row, head;
    ggml_fp16_t half[512];
    for (row = 0; row < t->ne[2]; row++)
        for (head = 0; head < t->ne[1]; head++) {
            const char *x =
                (const char *)t->data + (size_t)row * t->nb[2] + (size_t)head * t->nb[1];
            ggml_fp32_to_fp16_row((const float *)(const void *)x, half, t->ne[0]);
            d->failed |= fwrite(half, 2, (size_t)t->ne[0], f) != (size_t)t->ne[0];
        }
}

static void dump_layer(void *user, uint32_t layer, const struct ggml_tensor *q,
                       const struct ggml_tensor *k, const struct ggml_tensor *v) {
    dump *d = (dump *)user;
    FILE **f = d->files + 3 * (size_t)layer;
    if (!f[0]) return;
    dump_tensor(d, f[0], q);
    dump_tensor(d, f[1], k);
    dump_tensor(d, f[2], v);
}

static FILE *open_npy(const char *folder, char name, uint32_t n, uint32_t heads, uint32_t dim) {
    char path[1024], header[128];
    FILE *f;
    snprintf(path, sizeof path, "%s/%c.npy", folder, name);
    f = fopen(path, "wb");
    if (!f) die("%s: %s", path, strerror(errno));
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\1\0\x76\0", 10); /* version 1, 118 bytes follow */
    header[10 + snprintf(header + 10, sizeof header - 10,
                         "{'descr': '<f2', 'fortran_order': False, 'shape': (%u, %u, %u), }",
                         (unsigned)n, (unsigned)heads, (unsigned)dim)] = ' ';
    header[127] = '\n';
    if (fwrite(header, 1, sizeof header, f) != sizeof header) die("%s: cannot be written", path);
    return f;
}

static void open_layer(const program *p, dump *d, const char *number) {
    const llm_shape *s = &p->model.shape;
    char folder[900], *end;
    unsigned long layer = strtoul(number, &end, 10);
    FILE **f = d->files + 3 * layer;
    if (!*number || *end || layer >= s->n_layers)
        die("--layers: '%s' is no layer; there are 0 to %u", number, (unsigned)s->n_layers - 1);
    if (f[0]) return;
    if (snprintf(folder, sizeof folder, "%s_layer%02lu", p->opt.out, layer) >= (int)sizeof folder)
        die("--out: the name is too long");
    if (mkdir(folder, 0777) && errno != EEXIST) die("%s: %s", folder, strerror(errno));
    f[0] = open_npy(folder, 'q', p->opt.ctx[0], s->n_q_heads, s->key_dim);
    f[1] = open_npy(folder, 'k', p->opt.ctx[0], s->n_kv_heads, s->key_dim);
    f[2] = open_npy(folder, 'v', p->opt.ctx[0], s->n_kv_heads, s->value_dim);
}

void command_dump(program *p) {
    const llm_shape *s = &p->model.shape;
    uint32_t n_ctx = p->opt.ctx[0], n, i;
    char *layers, *rest, *item;
    int32_t *tokens;
    dump d = {NULL, 0};
    if (!p->opt.out || !p->opt.layers) die("dump needs --layers L,L.. and --out NAME");
    if (p->opt.attention.full) die("dump: --method full has no taps; leave it out, 0 is exact too");
    if (s->key_dim > 512 || s->value_dim > 512) die("dump: heads of more than 512 elements");
    tokens = text_tokens(p, n_ctx, &n);
    open_run(p, n_ctx, p->opt.seed);
    d.files = (FILE **)allocate(3 * (size_t)s->n_layers * sizeof *d.files);
    for (i = 0; i < 3 * s->n_layers; i++) d.files[i] = NULL;
    rest = layers = (char *)allocate(strlen(p->opt.layers) + 1);
    strcpy(layers, p->opt.layers);
    for (; (item = strtok(rest, ",")); rest = NULL) open_layer(p, &d, item);
    llm_attention_tap(p->attention, dump_layer, &d);
    feed(p, tokens, n_ctx, 0, 0, NULL, NULL);
    for (i = 0; i < 3 * s->n_layers; i++)
        if (d.files[i]) d.failed |= fclose(d.files[i]) != 0;
    if (d.failed) die("--out %s: cannot be written; is the disk full?", p->opt.out);
    free(d.files);
    free(layers);
    free(tokens);
}
