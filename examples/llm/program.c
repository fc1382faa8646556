/* program.c - options, the model and its tokens, feeding them. */
#define _POSIX_C_SOURCE 200809L
#include "program.h"

#include "baseline.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: bkv-llm COMMAND --model M.gguf [options]\n"
    "  generate  continues --text FILE, --prompt TEXT or standard input\n"
    "  chat      talks on the terminal\n"
    "  ppl       perplexity of --text FILE: windows of --ctx tokens, their second half counts\n"
    "  passkey   six digits in a long text, asked for at its end\n"
    "  speed     a token at the end of --ctx, beside full attention in the same process\n"
    "  check     largest difference of the logits from llama.cpp's own, on --text FILE\n"
    "  dump      q, k, v of --layers L,L.. of --text FILE as .npy, in OUT_layerNN/ of --out OUT\n"
    "options\n"
    "  --method NAME   balancekv (default), sample, window: what balancekv.h does; full: ggml's\n"
    "                  flash attention over a growing f16 cache; walk, keydiff and the other\n"
    "                  streaming methods of build/bench/quality --list, to compare\n"
    "  --budget B      tokens kept per KV head; 0 (default): all of them\n"
    "  --share X       instead of --budget: the most slots that fit X times the bytes of a full\n"
    "                  f16 cache; 0.25 or 1/4\n"
    "  --set KEY=VALUE a field of bkv_config: kv_type=f16 (default), i8, i4, bf16, f32;\n"
    "                  window=256 ..; also behind the method: --method sample:window=256:rounds=1\n"
    "  --ctx N         tokens of a sequence (default: what the model was trained on)\n"
    "  --seed S        of the halvings, the pass keys, the sampling (default 1)\n"
    "  --threads T     (default: the processors)   --chunk C  tokens of a step (default 512)\n"
    "  --unpack TYPE   f16, bf16, f32: unpack the weights for the prompt: faster, more memory\n"
    "  --json          one JSON object a line\n"
    "generate, chat    --n N most new tokens   --temp T  0 (default): the likeliest token\n"
    "ppl               --windows W at most   --endless  never empty the caches in between\n"
    "passkey           --ctx N,N..   --depths D (default 10)   --seeds S (default 1)\n"
    "                  --text FILE instead of the filler   --each  a line for every case\n";

void die(const char *format, ...) {
    va_list args;
    fputs("bkv-llm: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(2);
}

void *allocate(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) die("out of memory: %zu bytes", bytes);
    return p;
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

size_t resident_bytes(void) {
    unsigned long pages = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return 0;
    if (fscanf(f, "%lu %lu", &pages, &resident) != 2) resident = 0;
    fclose(f);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* ---- options --------------------------------------------------------------------------------- */

typedef struct word {
    const char *name;
    uint32_t value;
} word;

static const word methods[] = {{"balancekv", BKV_RULE_DEFAULT},
                               {"sample", BKV_RULE_SAMPLE},
                               {"window", BKV_RULE_WINDOW},
                               {NULL, 0}};
static const word kv_types[] = {
    {"f32", BKV_F32}, {"f16", BKV_F16}, {"bf16", BKV_BF16}, {"i8", BKV_I8},
    {"i4", BKV_I4},   {NULL, 0}};
static const word weight_types[] = {
    {"f16", GGML_TYPE_F16}, {"bf16", GGML_TYPE_BF16}, {"f32", GGML_TYPE_F32}, {NULL, 0}};

/* Fields of bkv_config that --set knows. */
static const struct {
    const char *name;
    size_t offset;
    const word *words; /* NULL: a number */
    int is_float;
} fields[] = {
    {"kv_type", offsetof(bkv_config, kv_type), kv_types, 0},
    {"rule", offsetof(bkv_config, rule), methods, 0},
    {"sinks", offsetof(bkv_config, sinks), NULL, 0},
    {"window", offsetof(bkv_config, window), NULL, 0},
    {"backend", offsetof(bkv_config, backend), NULL, 0},
    {"importance", offsetof(bkv_config, importance), NULL, 0},
    {"rounds", offsetof(bkv_config, rounds), NULL, 0},
    {"temp", offsetof(bkv_config, temp), NULL, 1},
    {"scale", offsetof(bkv_config, scale), NULL, 1},
    {"softcap", offsetof(bkv_config, softcap), NULL, 1},
};

enum kind { FLAG, TEXT, WHOLE, REAL, SHARE, METHOD, SET, WEIGHTS, LENGTHS };
static const struct {
    const char *name;
    enum kind kind;
    size_t offset;
    double least, most;
} option_list[] = {
    {"--model", TEXT, offsetof(options, model), 0, 0},
    {"--text", TEXT, offsetof(options, text), 0, 0},
    {"--prompt", TEXT, offsetof(options, prompt), 0, 0},
    {"--out", TEXT, offsetof(options, out), 0, 0},
    {"--layers", TEXT, offsetof(options, layers), 0, 0},
    {"--method", METHOD, offsetof(options, method), 0, 0},
    {"--budget", WHOLE, offsetof(options, attention.bkv.budget), 0, 1 << 24},
    {"--share", SHARE, offsetof(options, share), 1e-6, 1},
    {"--set", SET, 0, 0, 0},
    {"--ctx", LENGTHS, 0, 1, 1 << 24},
    {"--seed", WHOLE, offsetof(options, seed), 0, 4294967295.0},
    {"--threads", WHOLE, offsetof(options, threads), 1, 64},
    {"--chunk", WHOLE, offsetof(options, chunk), 1, 4096},
    {"--unpack", WEIGHTS, 0, 0, 0},
    {"--json", FLAG, offsetof(options, json), 0, 0},
    {"--n", WHOLE, offsetof(options, n), 1, 1 << 24},
    {"--temp", REAL, offsetof(options, temp), 0, 10},
    {"--windows", WHOLE, offsetof(options, windows), 1, 1 << 24},
    {"--endless", FLAG, offsetof(options, endless), 0, 0},
    {"--depths", WHOLE, offsetof(options, depths), 1, 1000},
    {"--seeds", WHOLE, offsetof(options, seeds), 1, 1000},
    {"--each", FLAG, offsetof(options, each), 0, 0},
};

static double number(const char *what, const char *text, double least, double most) {
    char *end;
    double x = strtod(text, &end);
    if (!*text || *end || !(x >= least && x <= most))
        die("%s: '%s' is not a number from %.10g to %.10g", what, text, least, most);
    return x;
}

/* A number, or one by another: 1/8. */
static double ratio(const char *what, const char *text, double least, double most) {
    char top[32];
    const char *slash = strchr(text, '/');
    double x, y;
    if (!slash || slash - text >= (int)sizeof top) return number(what, text, least, most);
    memcpy(top, text, (size_t)(slash - text));
    top[slash - text] = 0;
    x = number(what, top, 0, 1e9), y = number(what, slash + 1, 1e-9, 1e9);
    if (!(x / y >= least && x / y <= most))
        die("%s: %s is not from %.10g to %.10g", what, text, least, most);
    return x / y;
}

static uint32_t whole(const char *what, const char *text, double least, double most) {
    double x = number(what, text, least, most);
    if (x != floor(x)) die("%s: '%s' is not a whole number", what, text);
    return (uint32_t)x;
}

static uint32_t find_word(const char *what, const char *text, const word *words, const char *more) {
    char list[256] = "";
    const word *w;
    for (w = words; w->name; w++) {
        if (!strcmp(text, w->name)) return w->value;
        strcat(strcat(list, w == words ? "" : ", "), w->name); /* a few short names */
    }
    die("%s: '%s' is none of %s%s", what, text, list, more);
    return 0;
}

static void set_field(bkv_config *c, const char *pair) {
    const char *value = strchr(pair, '=');
    size_t i, n = sizeof fields / sizeof *fields, length;
    char what[64], names[256] = "";
    char *field;
    if (!value || value == pair) die("--set: '%s' is not KEY=VALUE, as in --set window=256", pair);
    length = (size_t)(value++ - pair);
    for (i = 0; i < n; i++) {
        if (strlen(fields[i].name) == length && !memcmp(fields[i].name, pair, length)) break;
        strcat(strcat(names, i ? ", " : ""), fields[i].name);
    }
    if (i == n) die("--set: '%s' is none of %s", pair, names);
    snprintf(what, sizeof what, "--set %s", fields[i].name);
    field = (char *)c + fields[i].offset;
    if (fields[i].is_float)
        *(float *)(void *)field = (float)number(what, value, -1e30, 1e30);
    else if (fields[i].words)
        *(uint32_t *)(void *)field = find_word(what, value, fields[i].words, "");
    else
        *(uint32_t *)(void *)field =
            !strcmp(value, "none") ? BKV_NONE : whole(what, value, 0, 1 << 24);
}

/* NAME, or NAME:KEY=VALUE:KEY=VALUE.. with what --set takes. */
static void set_method(options *o, const char *value) {
    char *copy = (char *)allocate(strlen(value) + 1), *name, *item;
    const word *w = methods;
    strcpy(copy, value);
    name = strtok(copy, ":");
    if (!name) die("--method: '%s' is no method", value);
    while (w->name && strcmp(name, w->name)) w++;
    o->method = value;
    o->attention.full = !strcmp(name, "full");
    o->attention.baseline = !w->name && baseline_known(name) ? name : NULL; /* so copy stays */
    if (!o->attention.full && !o->attention.baseline)
        o->attention.bkv.rule =
            find_word("--method", name, methods,
                      ", full, keydiff or a streaming method of build/bench/quality --list");
    while ((item = strtok(NULL, ":"))) set_field(&o->attention.bkv, item);
}

static void set_lengths(options *o, const char *value, double least, double most) {
    char *copy = (char *)allocate(strlen(value) + 1), *p = copy, *item;
    strcpy(copy, value);
    for (o->n_ctx = 0; (item = strtok(p, ",")); p = NULL) {
        if (o->n_ctx == sizeof o->ctx / sizeof *o->ctx) die("--ctx: at most 8 lengths");
        o->ctx[o->n_ctx++] = whole("--ctx", item, least, most);
    }
    free(copy);
    if (!o->n_ctx) die("--ctx needs a number of tokens");
}

static void set_option(options *o, size_t i, const char *value) {
    const char *name = option_list[i].name;
    double least = option_list[i].least, most = option_list[i].most;
    void *target = (char *)o + option_list[i].offset;
    switch (option_list[i].kind) {
    case FLAG: *(uint32_t *)target = 1; break;
    case TEXT: *(const char **)target = value; break;
    case WHOLE: *(uint32_t *)target = whole(name, value, least, most); break;
    case REAL: *(double *)target = number(name, value, least, most); break;
    case SHARE: *(double *)target = ratio(name, value, least, most); break;
    case SET: set_field(&o->attention.bkv, value); break;
    case LENGTHS: set_lengths(o, value, least, most); break;
    case WEIGHTS: o->weights = (enum ggml_type)find_word(name, value, weight_types, ""); break;
    case METHOD: set_method(o, value); break;
    }
}

void parse_options(options *o, int argc, char **argv) {
    size_t i, n = sizeof option_list / sizeof *option_list;
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int at;
    memset(o, 0, sizeof *o);
    o->method = "balancekv";
    o->threads = processors < 1 ? 1 : processors > 64 ? 64 : (uint32_t)processors;
    o->chunk = 512;
    o->n = 256;
    o->windows = UINT32_MAX;
    o->depths = 10;
    o->seeds = 1;
    o->seed = 1;
    o->weights = GGML_TYPE_COUNT;
    o->attention.bkv.kv_type = BKV_F16;
    for (at = 1; at < argc; at++)
        if (!strcmp(argv[at], "--help") || !strcmp(argv[at], "-h")) {
            fputs(usage, stdout);
            exit(0);
        }
    if (argc < 2) die("no command; bkv-llm --help lists them");
    o->command = argv[1];
    for (at = 2; at < argc; at++) {
        for (i = 0; i < n && strcmp(argv[at], option_list[i].name); i++) continue;
        if (i == n) die("unknown option '%s'; bkv-llm --help lists them", argv[at]);
        if (option_list[i].kind != FLAG && ++at == argc) die("%s needs a value", argv[at - 1]);
        set_option(o, i, argv[at]);
    }
    if (!o->model) die("--model M.gguf is missing; examples/llm/setup.sh gets one");
    if (o->share > 0 && o->attention.bkv.budget) die("--budget and --share: give one of them");
    o->attention.n_threads = o->threads;
}

/* ---- the model and its tokens ---------------------------------------------------------------- */

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)level, (void)text, (void)user;
}

void open_model(program *p) {
    char err[LLM_ERROR];
    struct llama_model_params params = llama_model_default_params();
    llama_log_set(quiet, NULL); /* what is wrong is said in one line of ours */
    if (!llm_model_load(&p->model, p->opt.model, p->opt.weights, err)) die("%s", err);
    params.vocab_only = true;
    p->vocab_model = llama_model_load_from_file(p->opt.model, params);
    if (!p->vocab_model)
        die("%s: its vocabulary is damaged or unknown; get it again", p->opt.model);
    p->vocab = llama_model_get_vocab(p->vocab_model);
    if ((uint32_t)llama_vocab_n_tokens(p->vocab) > p->model.n_vocab)
        die("%s: more tokens than embeddings; get it again", p->opt.model);
    if (!p->opt.n_ctx) p->opt.ctx[p->opt.n_ctx++] = p->model.n_trained;
}

/* The largest budget whose caches fit --share. */
static uint32_t budget_of_share(const program *p, llm_attention_config cfg) {
    uint32_t low = 0, high = 8 * cfg.n_ctx + 1024; /* small types take several slots per f16 row */
    double most = p->opt.share * (double)llm_full_bytes(&p->model.shape, cfg.n_ctx);
    while (low + 16 < high) {
        cfg.bkv.budget = (low + high) / 32 * 16;
        /* 0 bytes: too small to be a budget */
        if ((double)llm_attention_need(&p->model.shape, &cfg) > most)
            high = cfg.bkv.budget;
        else
            low = cfg.bkv.budget;
    }
    cfg.bkv.budget = low;
    if (!llm_attention_need(&p->model.shape, &cfg))
        die("--share %g of %u tokens is too small for a budget; raise it", p->opt.share,
            (unsigned)cfg.n_ctx);
    return low;
}

void open_run(program *p, uint32_t n_ctx, uint64_t seed) {
    char err[LLM_ERROR];
    llm_attention_config *cfg = &p->opt.attention;
    if (n_ctx > p->model.n_trained)
        die("--ctx %u: the model was trained on %u tokens, positions beyond them mean nothing to "
            "it",
            (unsigned)n_ctx, (unsigned)p->model.n_trained);
    close_run(p);
    cfg->n_ctx = n_ctx;
    cfg->bkv.seed = seed;
    if (p->opt.share > 0 && !cfg->full) cfg->bkv.budget = budget_of_share(p, *cfg);
    if (!llm_attention_new(&p->attention, &p->model.shape, cfg, err) ||
        !llm_run_new(&p->run, &p->model, p->attention, p->opt.threads, err))
        die("%s", err);
}

void close_run(program *p) {
    llm_run_free(p->run);
    llm_attention_free(p->attention);
    p->run = NULL;
    p->attention = NULL;
}

char *read_text(const char *path, size_t *size) {
    size_t room = 1 << 16;
    char *text = (char *)allocate(room);
    FILE *f = path ? fopen(path, "rb") : stdin;
    if (!f) die("--text %s: %s", path, strerror(errno));
    for (*size = 0;;) {
        *size += fread(text + *size, 1, room - *size, f);
        if (*size < room) break;
        text = (char *)realloc(text, room *= 2);
        if (!text) die("the text does not fit into memory");
    }
    if (ferror(f)) die("%s cannot be read: %s", path ? path : "standard input", strerror(errno));
    if (path) fclose(f);
    return text;
}

int32_t *tokenize(const program *p, const char *text, size_t size, int special, uint32_t *n) {
    int32_t got;
    int32_t *tokens;
    if (size > 1u << 29) die("the text has more than %u bytes; cut it", 1u << 29);
    tokens = (int32_t *)allocate((size + 8) * sizeof *tokens);
    got =
        llama_tokenize(p->vocab, text, (int32_t)size, tokens, (int32_t)size + 8, special, special);
    if (got < 0) die("the text cannot be turned into tokens");
    *n = (uint32_t)got;
    return tokens;
}

int32_t *text_tokens(const program *p, uint32_t n_least, uint32_t *n) {
    size_t size;
    char *text;
    int32_t *tokens;
    if (!p->opt.text) die("%s needs --text FILE", p->opt.command);
    text = read_text(p->opt.text, &size);
    tokens = tokenize(p, text, size, 0, n);
    free(text);
    if (*n < n_least)
        die("--text %s: %u tokens are too short for --ctx %u; take a longer text or a smaller "
            "--ctx",
            p->opt.text, (unsigned)*n, (unsigned)n_least);
    return tokens;
}

static score score_row(const float *row, uint32_t n, int32_t target) {
    score s = {0, 0};
    double sum = 0;
    uint32_t i;
    for (i = 1; i < n; i++)
        if (row[i] > row[s.likeliest]) s.likeliest = (int32_t)i;
    for (i = 0; i < n; i++) sum += (double)expf(row[i] - row[s.likeliest]);
    s.nats = log(sum) + ((double)row[s.likeliest] - (double)row[target]);
    if (!isfinite(s.nats)) die("a logit is not a finite number: the model's file is damaged");
    return s;
}

void feed(program *p, const int32_t *tokens, uint32_t n, uint32_t position, uint32_t n_scored,
          const int32_t *targets, score *scores) {
    uint32_t done, i, first = n - n_scored;
    for (done = 0; done < n;) {
        uint32_t c = n - done < p->opt.chunk ? n - done : p->opt.chunk;
        uint32_t wanted = done + c <= first ? 0 : done >= first ? c : done + c - first;
        const float *logits;
        char err[LLM_ERROR];
        if (!llm_run_eval(p->run, tokens + done, c, position + done, wanted, &logits, err))
            die("%s", err);
        done += c;
        for (i = done - wanted; i < done; i++, logits += p->model.n_vocab)
            scores[i - first] = score_row(logits, p->model.n_vocab, targets[i - first]);
    }
}

const float *step(program *p, int32_t token, uint32_t position) {
    const float *logits;
    char err[LLM_ERROR];
    if (!llm_run_eval(p->run, &token, 1, position, 1, &logits, err)) die("%s", err);
    return logits;
}

void print_setting(const program *p, uint32_t n_ctx) {
    const options *o = &p->opt;
    const word *type = kv_types;
    unsigned budget = o->attention.full ? 0 : (unsigned)o->attention.bkv.budget;
    size_t bytes = llm_attention_bytes(p->attention), full = llm_full_bytes(&p->model.shape, n_ctx);
    while (type->value != o->attention.bkv.kv_type) type++;
    if (o->json)
        printf("{\"command\": \"%s\", \"method\": \"%s\", \"kv_type\": \"%s\", \"budget\": %u, "
               "\"ctx\": %u, \"seed\": %u, \"bytes_kv\": %zu, \"bytes_kv_full\": %zu, "
               "\"bytes_scratch\": %zu, ",
               o->command, o->method, type->name, budget, (unsigned)n_ctx, (unsigned)o->seed, bytes,
               full, llm_attention_scratch_bytes(p->attention));
    else
        printf("%s in %s, budget %u, ctx %u, caches %.2f MB (full %.2f): ", o->method, type->name,
               budget, (unsigned)n_ctx, (double)bytes * 1e-6, (double)full * 1e-6);
}
