/* quality.c - how far each method's output is from exact attention on recorded traces: one line for
   each (trace, method, budget, seed). bench/QUALITY.md has the tables and how to read them.
   Build: meson, or cc -std=c99 -O2 -I. -Iexamples bench/quality.c bench/exact.c bench/slots.c
   bench/baselines.c bench/oneshot.c bench/pool.c bench/theory.c
   bench/pages.c -lm -lpthread */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include "baselines.h"
#include "exact.h"
#include "npy.h"
#include "slots.h"
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_ITEMS = 64,    /* of each list on the command line */
    MAX_SETTINGS = 16, /* of a method */
    MAX_THREADS = 64,
    TEXT = 256,
    ONESHOT_EDGE = 256, /* first tokens, and last ones, that every method keeps exactly */
    CHUNK = 64          /* tokens of a call: as a page, so that the fullest moments are seen */
};

static const char help[] =
    "usage: quality --trace DIR[,DIR] [options]\n"
    "Relative error |o - o'| / |o| of attention over a cache of fixed size, against exact softmax\n"
    "in double. DIR has q.npy [n, n_q_heads, d], k.npy [n, n_kv_heads, d], v.npy [n, n_kv_heads,\n"
    "dv], f16 or f32; DIR+DIR is one stream after the other.\n"
    "  --protocol NAME     stream (default): tokens one by one, each query attends after its own\n"
    "                      token is appended; those of the second half count.\n"
    "                      oneshot: the first and the last 256 tokens are exact and the rest is\n"
    "                      compressed before any of the last 256 queries attends; those count.\n"
    "  --budget B[,B]      slots per KV head, everything included (default 512,1024,2048);\n"
    "                      oneshot also 1/8, a share of the rest (default 1/2,1/4,1/8,1/16)\n"
    "  --method NAME[,..]  default balancekv; a name may carry settings: "
    "balancekv:window=128:temp=2\n"
    "  --set KEY=VALUE     a setting for every method that has it\n"
    "  --seed S[,S]        default 1; a method without randomness runs once, for all of them\n"
    "  --tokens N          only the first N tokens of each trace\n"
    "  --every R           compare one query in R (default 1)\n"
    "  --chunk N           tokens of a call, at most (default 64; the results do not depend on "
    "it)\n"
    "  --threads N         default 2\n"
    "  --json              one JSON object a line instead of a table\n"
    "  --plot FILE.svg     also a picture, error against bytes, by bench/plot.py and $PYTHON\n"
    "                      (default python3; needs matplotlib)\n"
    "  --list              the methods and settings\n"
    "Of an option given twice the last one counts, except --set. Exit code 2: wrong options or\n"
    "input.\n";

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("quality: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *get_memory(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p) fail("no memory for %zu bytes; take a smaller budget or fewer --tokens", bytes);
    return p;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- methods --------------------------------------------------------------------------------- */

enum { STREAM = BL_STREAM, ONESHOT = BL_ONESHOT }; /* protocols */

/* The methods of the header; those of baselines.h come behind. needs: what a runtime must hand over
   beside k and v. */
typedef struct method {
    const char *name, *needs, *text;
    uint32_t rule;
    int protocols, random;
} method;

static const method methods[] = {
    {"balancekv", "queries", "balancekv.h as configured by default", BKV_RULE_DEFAULT,
     STREAM | ONESHOT, 1},
    {"sample", "queries", "balancekv.h, balanced sampling by importance", BKV_RULE_SAMPLE,
     STREAM | ONESHOT, 1},
    {"window", "nothing", "balancekv.h, sinks and a sliding window", BKV_RULE_WINDOW,
     STREAM | ONESHOT, 0},
    {"shrunk", "queries", "balancekv.h, exact until bkv_shrink() at the end of the prompt",
     BKV_RULE_DEFAULT, ONESHOT, 1},
};
#define N_METHODS (sizeof methods / sizeof *methods)

/* Fields of a config that --set and a method's settings may change. */
typedef struct field {
    const char *name;
    size_t offset;
    int is_float;
    const char *const *words; /* for a value by name: word i is the value i */
} field;

static const char *const rule_words[] = {"default", "sample", "window", NULL};
static const char *const type_words[] = {"default", "f32", "f16", "bf16", "i8", "i4", NULL};
static const char *const backend_words[] = {"auto", "scalar", "avx2", "avx512", "neon", NULL};

static const field header_fields[] = {
    {"sinks", offsetof(bkv_config, sinks), 0, NULL},
    {"window", offsetof(bkv_config, window), 0, NULL},
    {"rule", offsetof(bkv_config, rule), 0, rule_words},
    {"importance", offsetof(bkv_config, importance), 0, NULL},
    {"rounds", offsetof(bkv_config, rounds), 0, NULL},
    {"kv_type", offsetof(bkv_config, kv_type), 0, type_words},
    {"backend", offsetof(bkv_config, backend), 0, backend_words},
    {"temp", offsetof(bkv_config, temp), 1, NULL},
    {NULL, 0, 0, NULL},
};
static const field baseline_fields[] = {
    {"sinks", offsetof(bl_config, sinks), 0, NULL},
    {"window", offsetof(bl_config, window), 0, NULL},
    {"queries", offsetof(bl_config, queries), 0, NULL},
    {"pool", offsetof(bl_config, pool), 0, NULL},
    {"layer", offsetof(bl_config, layer), 0, NULL},
    {"layers", offsetof(bl_config, layers), 0, NULL},
    {"block", offsetof(bl_config, block), 0, NULL},
    {"gamma", offsetof(bl_config, gamma), 1, NULL},
    {"temp", offsetof(bl_config, temp), 1, NULL},
    {"share", offsetof(bl_config, share), 1, NULL},
    {NULL, 0, 0, NULL},
};

/* ---- options --------------------------------------------------------------------------------- */

typedef struct setting {
    char key[TEXT], value[TEXT];
} setting;

/* A method and its settings, as named on the command line. */
typedef struct choice {
    char name[TEXT];
    const method *method;      /* of the header, */
    const bl_method *baseline; /* or else this */
    const char *needs;
    int protocols, random;
    setting settings[MAX_SETTINGS];
    size_t n_settings;
} choice;

typedef struct budget {
    uint32_t slots;
    double share; /* of the middle (oneshot) if slots is 0 */
} budget;

typedef struct options {
    char *traces[MAX_ITEMS];
    choice choices[MAX_ITEMS];
    budget budgets[MAX_ITEMS];
    uint64_t seeds[MAX_ITEMS];
    size_t n_traces, n_choices, n_budgets, n_seeds;
    size_t tokens, every, chunk, threads;
    int protocol, json;
    const char *plot; /* file, or NULL */
} options;

static uint64_t parse_number(const char *text, uint64_t min, uint64_t max, const char *option) {
    char *end;
    unsigned long long x;
    errno = 0;
    x = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || x < min || x > max)
        fail("%s: '%s' is not a number of %" PRIu64 "..%" PRIu64, option, text, min, max);
    return x;
}

/* Cuts the comma-separated items of text into place. */
static size_t split(char *text, char **items, const char *option) {
    size_t n = 0;
    for (char *end = text; end; text = end + 1) {
        if (n == MAX_ITEMS) fail("%s: at most %d items", option, MAX_ITEMS);
        end = strchr(text, ',');
        if (end) *end = 0;
        if (!*text) fail("%s: an item is empty", option);
        items[n++] = text;
    }
    return n;
}

static budget parse_budget(const char *text) {
    budget b = {0, 0};
    unsigned long over = 0, under = 0;
    char rest;
    if (!strchr(text, '/')) {
        b.slots = (uint32_t)parse_number(text, 1, 1u << 24, "--budget");
    } else {
        if (sscanf(text, "%lu/%lu%c", &over, &under, &rest) != 2 || !over || over >= under)
            fail("--budget: '%s' is no share like 1/8", text);
        b.share = (double)over / (double)under;
    }
    return b;
}

static void add_setting(setting *list, size_t *n, const char *text, const char *option) {
    const char *equals = strchr(text, '=');
    if (*n == MAX_SETTINGS) fail("%s: at most %d settings", option, MAX_SETTINGS);
    if (!equals || strlen(text) >= TEXT) fail("%s: '%s' is not KEY=VALUE", option, text);
    memset(&list[*n], 0, sizeof *list);
    memcpy(list[*n].key, text, (size_t)(equals - text));
    strcpy(list[*n].value, equals + 1);
    ++*n;
}

static void list_method(const char *name, const char *needs, const char *text, int protocols) {
    printf("%-14s needs %-26s %s%s\n", name, needs, text,
           protocols == STREAM    ? " (stream only)"
           : protocols == ONESHOT ? " (oneshot only)"
                                  : "");
}

static void list_fields(const char *title, const field *f) {
    fputs(title, stdout);
    for (; f->name; f++) {
        printf(" %s", f->name);
        for (size_t i = 0; f->words && f->words[i]; i++) printf("%c%s", i ? '|' : '=', f->words[i]);
    }
    putchar('\n');
}

static void list_all(void) {
    for (size_t i = 0; i < N_METHODS; i++)
        list_method(methods[i].name, methods[i].needs, methods[i].text, methods[i].protocols);
    for (size_t i = 0; i < bl_n_methods; i++)
        list_method(bl_methods[i].name, bl_methods[i].needs, bl_methods[i].text,
                    bl_methods[i].protocols);
    list_fields("settings of balancekv.h:", header_fields);
    list_fields("settings of the others: ", baseline_fields);
}

static const field *find_field(const choice *c, const char *key) {
    const field *f = c->method ? header_fields : baseline_fields;
    while (f->name && strcmp(f->name, key)) f++;
    return f->name ? f : NULL;
}

static void parse_choice(choice *c, char *text) {
    char *colon = strchr(text, ':'), names[1024] = "";
    if (strlen(text) >= TEXT) fail("--method: '%s' is too long", text);
    memset(c, 0, sizeof *c);
    strcpy(c->name, text);
    if (colon) *colon = 0;
    for (size_t i = 0; i < N_METHODS; i++) {
        snprintf(names + strlen(names), sizeof names - strlen(names), " %s", methods[i].name);
        if (strcmp(text, methods[i].name)) continue;
        c->method = &methods[i];
        c->needs = c->method->needs;
        c->protocols = c->method->protocols;
        c->random = c->method->random;
    }
    for (size_t i = 0; i < bl_n_methods; i++)
        snprintf(names + strlen(names), sizeof names - strlen(names), " %s", bl_methods[i].name);
    c->baseline = bl_find(text);
    if (c->baseline) {
        c->needs = c->baseline->needs;
        c->protocols = c->baseline->protocols;
        c->random = c->baseline->random;
    } else if (!c->method) {
        fail("--method: '%s' is none of:%s", text, names);
    }
    while (colon) {
        text = colon + 1;
        colon = strchr(text, ':');
        if (colon) *colon = 0;
        add_setting(c->settings, &c->n_settings, text, "--method");
        if (!find_field(c, c->settings[c->n_settings - 1].key))
            fail("%s: there is no setting '%s'; --list has them", c->name,
                 c->settings[c->n_settings - 1].key);
    }
}

/* A setting of --set goes to every method that has it, before the method's own, which win. */
static void add_common(options *o, const setting *s) {
    int used = 0;
    for (size_t i = 0; i < o->n_choices; i++) {
        choice *c = &o->choices[i];
        if (!find_field(c, s->key)) continue;
        if (c->n_settings == MAX_SETTINGS) fail("--set: at most %d settings", MAX_SETTINGS);
        memmove(c->settings + 1, c->settings, c->n_settings++ * sizeof *s);
        c->settings[0] = *s;
        used = 1;
    }
    if (!used) fail("--set: no method here has a setting '%s'; --list has them", s->key);
}

static void parse_options(options *o, int argc, char **argv) {
    static const char *const names[] = {"--trace", "--protocol", "--budget", "--method",
                                        "--set",   "--seed",     "--tokens", "--every",
                                        "--chunk", "--threads",  "--plot"};
    static char default_method[] = "balancekv";
    setting common[MAX_SETTINGS];
    size_t n_common = 0;
    char *items[MAX_ITEMS];
    memset(o, 0, sizeof *o);
    o->every = 1;
    o->chunk = CHUNK;
    o->threads = 2;
    o->protocol = STREAM;
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i];
        char *value = i + 1 < argc ? argv[i + 1] : NULL;
        size_t known = 0, n;
        if (!strcmp(option, "--help") || !strcmp(option, "--list")) {
            if (option[2] == 'h') fputs(help, stdout);
            list_all();
            exit(0);
        }
        if (!strcmp(option, "--json")) {
            o->json = 1;
            continue;
        }
        while (known < sizeof names / sizeof *names && strcmp(option, names[known])) known++;
        if (known == sizeof names / sizeof *names)
            fail("unknown option '%s'; --help lists them", option);
        if (!value) fail("%s needs a value; --help explains it", option);
        i++;
        if (!strcmp(option, "--protocol")) {
            o->protocol = !strcmp(value, "stream")    ? STREAM
                          : !strcmp(value, "oneshot") ? ONESHOT
                                                      : 0;
            if (!o->protocol) fail("--protocol: '%s' is neither stream nor oneshot", value);
        } else if (!strcmp(option, "--plot")) {
            o->plot = value;
        } else if (!strcmp(option, "--set")) {
            add_setting(common, &n_common, value, option);
        } else if (!strcmp(option, "--tokens")) {
            o->tokens = (size_t)parse_number(value, 2, UINT32_MAX, option);
        } else if (!strcmp(option, "--every")) {
            o->every = (size_t)parse_number(value, 1, UINT32_MAX, option);
        } else if (!strcmp(option, "--chunk")) {
            o->chunk = (size_t)parse_number(value, 1, CHUNK, option);
        } else if (!strcmp(option, "--threads")) {
            o->threads = (size_t)parse_number(value, 1, MAX_THREADS, option);
        } else {
            n = split(value, items, option);
            if (!strcmp(option, "--trace")) {
                memcpy(o->traces, items, sizeof items);
                o->n_traces = n;
            } else if (!strcmp(option, "--method")) {
                for (size_t m = 0; m < n; m++) parse_choice(&o->choices[m], items[m]);
                o->n_choices = n;
            } else if (!strcmp(option, "--budget")) {
                for (size_t m = 0; m < n; m++) o->budgets[m] = parse_budget(items[m]);
                o->n_budgets = n;
            } else {
                for (size_t m = 0; m < n; m++)
                    o->seeds[m] = parse_number(items[m], 0, UINT64_MAX, option);
                o->n_seeds = n;
            }
        }
    }
    if (!o->n_traces) fail("--trace is missing; --help explains it");
    if (!o->n_choices) parse_choice(&o->choices[o->n_choices++], default_method);
    if (!o->n_seeds) o->seeds[o->n_seeds++] = 1;
    if (!o->n_budgets) {
        for (; o->n_budgets < (o->protocol == STREAM ? 3u : 4u); o->n_budgets++) {
            o->budgets[o->n_budgets].slots = o->protocol == STREAM ? 512u << o->n_budgets : 0;
            o->budgets[o->n_budgets].share = 0.5 / (double)(1u << o->n_budgets);
        }
    }
    for (size_t i = 0; i < o->n_budgets; i++)
        if (o->protocol == STREAM && !o->budgets[i].slots)
            fail("--budget: a share needs --protocol oneshot");
    for (size_t i = 0; i < o->n_choices; i++)
        if (!(o->choices[i].protocols & o->protocol))
            fail("--method: %s has no %s protocol", o->choices[i].name,
                 o->protocol == STREAM ? "stream" : "oneshot");
    while (n_common) add_common(o, &common[--n_common]);
}

/* ---- a run ----------------------------------------------------------------------------------- */

/* A trace and the exact outputs at the positions first + i * every. */
typedef struct reference {
    char name[TEXT];
    int is_first; /* of the command's traces */
    npy_trace t;
    size_t first, every, n; /* n of them */
    double *out;            /* [n][n_q_heads][value_dim] */
} reference;

typedef struct run {
    const choice *choice;
    bkv_config cfg;    /* if the method is the header's, */
    bl_config bl;      /* or else this */
    const char *needs; /* as configured */
    uint64_t seed;
    uint32_t budget, held_max;
    const struct run *same_as; /* a run that this one would repeat */
    size_t bytes;
    size_t failures;
    double error, error_p95, error_clamped, seconds, *head_error; /* [n_kv_heads] */
    double *head_estimate; /* the same by bkv_error(), at the end of a stream; or NULL */
} run;

static void set_field(void *cfg, const field *f, const setting *s) {
    uint32_t number = 0;
    float real;
    char *end;
    if (f->is_float) {
        real = strtof(s->value, &end);
        if (!*s->value || *end) fail("%s: '%s' is not a number", s->key, s->value);
        memcpy((char *)cfg + f->offset, &real, sizeof real);
        return;
    }
    if (f->words) {
        while (f->words[number] && strcmp(f->words[number], s->value)) number++;
        if (!f->words[number]) fail("%s: there is no '%s'; --list has them", s->key, s->value);
    } else if (!strcmp(s->value, "none")) {
        number = BKV_NONE;
    } else {
        number = (uint32_t)parse_number(s->value, 0, UINT32_MAX, s->key);
    }
    memcpy((char *)cfg + f->offset, &number, sizeof number);
}

static uint32_t slots_of(const budget *b, const reference *r) {
    size_t edges = 2 * ONESHOT_EDGE;
    return b->slots ? b->slots : (uint32_t)edges + (uint32_t)((double)(r->t.n - edges) * b->share);
}

static int is_shrunk(const choice *c) { return !strcmp(c->method->name, "shrunk"); }

static void configure_header(run *x, const npy_trace *t, int protocol) {
    uint32_t outside = protocol == ONESHOT ? ONESHOT_EDGE : 0; /* the last tokens */
    const choice *c = x->choice;
    bkv_result result;
    x->cfg = bkv_config_default((uint32_t)t->n_q_heads, (uint32_t)t->n_kv_heads,
                                (uint32_t)t->head_dim, x->budget - outside);
    x->cfg.value_dim = (uint32_t)t->value_dim;
    x->cfg.rule = c->method->rule;
    x->cfg.seed = x->seed;
    x->cfg.window = 0; /* the default comes with the budget */
    if (outside) x->cfg.sinks = ONESHOT_EDGE;
    for (size_t i = 0; i < c->n_settings; i++)
        set_field(&x->cfg, find_field(c, c->settings[i].key), &c->settings[i]);
    result = bkv_check(&x->cfg);
    if (result == BKV_E_BUDGET) {
        bkv_config least = x->cfg;
        for (least.budget = 1; least.budget < 1u << 24 && bkv_check(&least) != BKV_OK;)
            least.budget++;
        fail("%s, budget %" PRIu32 ": %s; the smallest that works here is %" PRIu32, c->name,
             x->budget, bkv_result_string(result), least.budget + outside);
    }
    if (result != BKV_OK) fail("%s: %s", c->name, bkv_result_string(result));
    if (x->cfg.importance == BKV_NONE || x->cfg.importance == BKV_IMPORTANCE_KEY)
        x->needs = "nothing";
}

/* The number behind "layer" in a trace's name, as in psalms_layer05. */
static uint32_t layer_of(const char *name) {
    const char *p = strstr(name, "layer");
    return p ? (uint32_t)strtoul(p + 5, NULL, 10) : 0;
}

static void configure_baseline(run *x, const reference *r, int protocol) {
    const npy_trace *t = &r->t;
    const choice *c = x->choice;
    bl_config filled;
    uint32_t least, outside = 0; /* the last tokens, where the first ones count */
    x->bl.layer = layer_of(r->name);
    x->bl.n_q_heads = (uint32_t)t->n_q_heads;
    x->bl.n_kv_heads = (uint32_t)t->n_kv_heads;
    x->bl.head_dim = (uint32_t)t->head_dim;
    x->bl.value_dim = (uint32_t)t->value_dim;
    x->bl.budget = x->budget;
    x->bl.seed = x->seed;
    x->bl.tokens = (uint32_t)t->n;
    for (size_t i = 0; i < c->n_settings; i++)
        set_field(&x->bl, find_field(c, c->settings[i].key), &c->settings[i]);
    filled = x->bl;
    if (protocol == ONESHOT && c->baseline->make) {
        filled.sinks = outside = ONESHOT_EDGE;
        filled.budget -= outside;
    }
    least = bl_resolve(c->baseline, &filled) + outside;
    if (filled.layer >= filled.layers)
        fail("%s: layer %" PRIu32 " of %" PRIu32 "; set layers", c->name, filled.layer,
             filled.layers);
    if (filled.queries > ONESHOT_EDGE) fail("%s: at most %d queries", c->name, ONESHOT_EDGE);
    if ((protocol == STREAM || outside) && least > x->budget)
        fail("%s, budget %" PRIu32 ": the smallest that works here is %" PRIu32, c->name, x->budget,
             least);
}

static run make_run(const options *o, const reference *r, const choice *c, const budget *b,
                    uint64_t seed) {
    run x;
    memset(&x, 0, sizeof x);
    x.choice = c;
    x.needs = c->needs;
    x.seed = seed;
    x.budget = slots_of(b, r);
    if (o->protocol == ONESHOT && x.budget <= 2 * ONESHOT_EDGE)
        fail("budget %" PRIu32 ": oneshot needs more than %d slots", x.budget, 2 * ONESHOT_EDGE);
    if (c->method)
        configure_header(&x, &r->t, o->protocol);
    else
        configure_baseline(&x, r, o->protocol);
    return x;
}

/* |out - exact| / |exact| of one head. *clamped: with max(exact, 1e-8), element by element, in the
   denominator, as the published figures of BalanceKV have it. */
static double relative_error(const float *out, const double *exact_out, size_t n, double *clamped) {
    double diff = 0, norm = 0, positive = 0;
    for (size_t d = 0; d < n; d++) {
        double x = (double)out[d] - exact_out[d], y = exact_out[d] > 1e-8 ? exact_out[d] : 1e-8;
        diff += x * x;
        norm += exact_out[d] * exact_out[d];
        positive += y * y;
    }
    *clamped = sqrt(diff / positive);
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Errors of the outputs [n_tokens][n_q_heads][value_dim] of positions at, at + 1, .. */
static void compare(run *x, const reference *r, const float *out, size_t at, size_t n_tokens,
                    double *errors) {
    size_t heads = r->t.n_q_heads, dim = r->t.value_dim;
    double clamped;
    for (size_t i = 0; i < n_tokens; i++) {
        size_t to = at + i - r->first;
        if (at + i < r->first || to % r->every) continue;
        to = to / r->every * heads;
        for (size_t h = 0; h < heads; h++) {
            errors[to + h] =
                relative_error(out + (i * heads + h) * dim, r->out + (to + h) * dim, dim, &clamped);
            x->error_clamped += clamped / (double)(r->n * heads);
        }
    }
}

static void summarise(run *x, const reference *r, double *errors) {
    size_t heads = r->t.n_q_heads, group = heads / r->t.n_kv_heads, n = r->n * heads;
    x->head_error = (double *)get_memory(r->t.n_kv_heads * sizeof *x->head_error);
    for (size_t i = 0; i < n; i++) {
        x->error += errors[i] / (double)n;
        x->head_error[i % heads / group] += errors[i] / (double)(r->n * group);
    }
    qsort(errors, n, sizeof *errors, compare_doubles);
    x->error_p95 = errors[(n * 95 + 99) / 100 - 1];
}

static void check(bkv_result r, const run *x) {
    if (r != BKV_OK)
        fail("%s, budget %" PRIu32 ": %s", x->choice->name, x->budget, bkv_result_string(r));
}

/* Tokens 0..n-1 through the cache. Where outputs are compared, or the rule learns from queries,
   by bkv_prefill(): it gives the bits of single tokens. */
static void feed(run *x, const reference *r, bkv_cache *c, size_t n, size_t chunk, double *errors) {
    const npy_trace *t = &r->t;
    size_t q_row = t->n_q_heads * t->head_dim, k_row = t->n_kv_heads * t->head_dim;
    size_t v_row = t->n_kv_heads * t->value_dim;
    float *out = (float *)get_memory(chunk * t->n_q_heads * t->value_dim * sizeof *out);
    bkv_stats_info s;
    bkv_stats(c, &s);
    for (size_t i = 0, m; i < n; i += m) {
        bkv_tensor k = bkv_dense(t->k.data + i * k_row, BKV_F32);
        bkv_tensor v = bkv_dense(t->v.data + i * v_row, BKV_F32);
        /* Up to the end of a page, where the cache is as full as it gets. */
        m = i < s.sinks ? s.sinks - i : CHUNK - (i - s.sinks) % CHUNK;
        if (m > chunk) m = chunk;
        if (i < r->first && i + m > r->first) m = r->first - i;
        if (i + m > n) m = n - i;
        if (i >= r->first || x->cfg.rule == BKV_RULE_SAMPLE) {
            check(bkv_prefill(c, k, v, bkv_dense(t->q.data + i * q_row, BKV_F32), out, m, 0, 0, 1),
                  x);
            compare(x, r, out, i, m, errors);
        } else {
            check(bkv_append(c, k, v, m, 0, 0, 1), x);
        }
        bkv_stats(c, &s);
        if (s.tokens_held > x->held_max) x->held_max = s.tokens_held;
    }
    x->bytes = s.state_bytes;
    free(out);
}

/* Joins partial attention (max, sum, unnormalised out) of one head with the exact keys and values
   of positions start..at. */
static void join_exact(const npy_trace *t, float scale, size_t head, size_t start, size_t at,
                       float max, float sum, float *out) {
    size_t kv_head = head / (t->n_q_heads / t->n_kv_heads);
    const float *q = t->q.data + (at * t->n_q_heads + head) * t->head_dim;
    double logit[ONESHOT_EDGE], top = (double)max, total, old;
    for (size_t i = start; i <= at; i++) {
        const float *k = t->k.data + (i * t->n_kv_heads + kv_head) * t->head_dim;
        double dot = 0;
        for (size_t d = 0; d < t->head_dim; d++) dot += (double)q[d] * (double)k[d];
        logit[i - start] = dot * (double)scale;
        if (logit[i - start] > top) top = logit[i - start];
    }
    old = exp((double)max - top);
    total = (double)sum * old;
    for (size_t d = 0; d < t->value_dim; d++) out[d] = (float)((double)out[d] * old);
    for (size_t i = start; i <= at; i++) {
        const float *v = t->v.data + (i * t->n_kv_heads + kv_head) * t->value_dim;
        double p = exp(logit[i - start] - top);
        total += p;
        for (size_t d = 0; d < t->value_dim; d++) out[d] += (float)(p * (double)v[d]);
    }
    for (size_t d = 0; d < t->value_dim; d++) out[d] = (float)((double)out[d] / total);
}

static void attend_oneshot(run *x, const reference *r, bkv_cache *c, double *errors) {
    const npy_trace *t = &r->t;
    size_t heads = t->n_q_heads, start = t->n - ONESHOT_EDGE;
    float *out = (float *)get_memory(heads * (t->value_dim + 2) * sizeof *out);
    float *max = out + heads * t->value_dim, *sum = max + heads;
    for (size_t at = start; at < t->n; at++) {
        bkv_tensor q = bkv_dense(t->q.data + at * heads * t->head_dim, BKV_F32);
        check(bkv_attend_partial(c, q, out, max, sum, 0, 1), x);
        for (size_t h = 0; h < heads; h++)
            join_exact(t, x->cfg.scale, h, start, at, max[h], sum[h], out + h * t->value_dim);
        compare(x, r, out, at, 1, errors);
    }
    x->held_max += ONESHOT_EDGE;
    x->bytes += ONESHOT_EDGE * t->n_kv_heads * (t->head_dim + t->value_dim) *
                (x->cfg.kv_type == BKV_F32 ? 4 : 2);
    free(out);
}

/* What a window of 0 means at the budget of the config. */
static uint32_t default_window(const run *x) {
    size_t bytes = bkv_size(&x->cfg);
    void *mem = get_memory(bytes);
    bkv_cache c;
    check(bkv_init(&c, &x->cfg, mem, bytes), x);
    free(mem);
    return c.cfg.window;
}

static void run_header(run *x, const reference *r, const options *o, double *errors) {
    const uint32_t kept = x->cfg.budget;
    uint32_t room = kept; /* before it shrinks: whole pages more, for all tokens */
    bkv_cache c;
    size_t bytes;
    void *mem;
    if (is_shrunk(x->choice)) room += ((uint32_t)r->t.n - kept + 63) / 64 * 64;
    if (room > kept && !x->cfg.window) x->cfg.window = default_window(x);
    x->cfg.budget = room;
    bytes = bkv_size(&x->cfg);
    mem = get_memory(bytes);
    check(bkv_init(&c, &x->cfg, mem, bytes), x);
    x->cfg = c.cfg; /* with the defaults filled in */
    feed(x, r, &c, o->protocol == STREAM ? r->t.n : r->t.n - ONESHOT_EDGE, o->chunk, errors);
    if (room > kept) {
        bkv_stats_info s;
        check(bkv_shrink(&c, kept), x);
        bkv_stats(&c, &s);
        x->held_max = s.tokens_held;
        x->bytes = s.state_bytes;
    }
    if (o->protocol == ONESHOT) {
        attend_oneshot(x, r, &c, errors);
    } else {
        x->head_estimate = (double *)get_memory(r->t.n_kv_heads * sizeof *x->head_estimate);
        for (uint32_t h = 0; h < x->cfg.n_kv_heads; h++) {
            float estimate;
            check(bkv_error(&c, h, &estimate), x);
            x->head_estimate[h] = (double)estimate;
        }
    }
    free(mem);
}

static void stream_baseline(run *x, const reference *r, double *errors) {
    const npy_trace *t = &r->t;
    float *out = (float *)get_memory(t->n_q_heads * t->value_dim * sizeof *out);
    bl_cache *c;
    if (!x->bl.block && !bl_fit(x->choice->baseline, &x->bl, t->k.data, t->v.data, t->n))
        fail("%s, budget %" PRIu32 ": too small for this trace", x->choice->name, x->budget);
    c = bl_new(x->choice->baseline, &x->bl);
    if (!c) fail("%s: no memory", x->choice->name);
    for (size_t i = 0; i < t->n; i++) {
        int compared = i >= r->first && (i - r->first) % r->every == 0;
        bl_append(c, t->k.data + i * t->n_kv_heads * t->head_dim,
                  t->v.data + i * t->n_kv_heads * t->value_dim);
        bl_attend(c, t->q.data + i * t->n_q_heads * t->head_dim, compared ? out : NULL);
        if (compared) compare(x, r, out, i, 1, errors);
        if (bl_held(c) > x->held_max) x->held_max = bl_held(c);
    }
    x->bytes = bl_bytes(c);
    x->failures = bl_failures(c);
    bl_free(c);
    free(out);
}

/* One KV head: the first tokens, those that were selected, and behind them the last tokens one by
   one, each with its queries. */
static void attend_selected(run *x, const reference *r, size_t kv_head, const bl_token *list,
                            size_t n_list, float *outs) {
    const npy_trace *t = &r->t;
    size_t group = t->n_q_heads / t->n_kv_heads, start = t->n - ONESHOT_EDGE;
    const float *k = t->k.data + kv_head * t->head_dim, *v = t->v.data + kv_head * t->value_dim;
    size_t k_row = t->n_kv_heads * t->head_dim, v_row = t->n_kv_heads * t->value_dim;
    slots *s = slots_new(t->head_dim, t->value_dim, 2 * ONESHOT_EDGE + n_list);
    float *p = (float *)get_memory(s ? group * s->capacity * sizeof *p : 0), max[16], sum[16];
    if (!s) fail("%s: no memory", x->choice->name);
    for (; s->held < ONESHOT_EDGE; s->held++)
        slots_put(s, s->held, k + s->held * k_row, v + s->held * v_row, 0);
    for (size_t i = 0; i < n_list; i++, s->held++) {
        slots_put(s, s->held, k + list[i].position * k_row, v + list[i].position * v_row, 0);
        s->numerator[s->held] = list[i].numerator;
        s->denominator[s->held] = list[i].denominator;
    }
    for (size_t at = start; at < t->n; at++) {
        float *out = outs + ((at - start) * t->n_q_heads + kv_head * group) * t->value_dim;
        slots_put(s, s->held, k + at * k_row, v + at * v_row, 0);
        s->held++;
        slots_logits(s, t->q.data + (at * t->n_q_heads + kv_head * group) * t->head_dim, group,
                     (float)(1 / sqrt((double)t->head_dim)), p);
        slots_exp(s, group, p, max);
        slots_output(s, p, group, sum, out);
        for (size_t i = 0; i < group * t->value_dim; i++) out[i] /= sum[i / t->value_dim];
    }
    if (s->held > x->held_max) x->held_max = (uint32_t)s->held;
    slots_free(s);
    free(p);
}

/* Bytes: 2 for each element of K and V, 4 for the position, and 4 where tokens carry weights. */
static void oneshot_baseline(run *x, const reference *r, double *errors) {
    const npy_trace *t = &r->t;
    exact_input in = {t->q.data,     t->k.data,   t->v.data,    t->n_q_heads,
                      t->n_kv_heads, t->head_dim, t->value_dim, 1 / sqrt((double)t->head_dim)};
    size_t keep = x->budget - 2 * ONESHOT_EDGE, most = bl_keep(x->choice->baseline, &x->bl, keep);
    bl_token *list = (bl_token *)get_memory((most + 1) * sizeof *list);
    float *outs = (float *)get_memory(ONESHOT_EDGE * t->n_q_heads * t->value_dim * sizeof *outs);
    for (size_t h = 0; h < t->n_kv_heads; h++) {
        size_t weighted = 0, n = bl_select(x->choice->baseline, &x->bl, &in, h, ONESHOT_EDGE,
                                           t->n - ONESHOT_EDGE, most, list);
        if (!n || n > most) fail("%s: selected %zu of %zu tokens", x->choice->name, n, most);
        for (size_t i = 0; i < n; i++) weighted |= list[i].numerator > 1 || list[i].denominator > 1;
        x->bytes += (n + 2 * ONESHOT_EDGE) * (2 * (t->head_dim + t->value_dim) + 4 + 4 * weighted);
        attend_selected(x, r, h, list, n, outs);
    }
    compare(x, r, outs, t->n - ONESHOT_EDGE, ONESHOT_EDGE, errors);
    free(list);
    free(outs);
}

static void execute(run *x, const reference *r, const options *o) {
    double start = seconds();
    uint32_t most = x->budget;
    double *errors = (double *)get_memory(r->n * r->t.n_q_heads * sizeof *errors);
    if (x->choice->method)
        run_header(x, r, o, errors);
    else if (o->protocol == STREAM)
        stream_baseline(x, r, errors);
    else
        oneshot_baseline(x, r, errors);
    if (x->choice->baseline && o->protocol == ONESHOT) /* budgets may differ between layers */
        most = (uint32_t)bl_keep(x->choice->baseline, &x->bl, x->budget - 2 * ONESHOT_EDGE) +
               2 * ONESHOT_EDGE;
    if (x->held_max > most)
        fail("%s, budget %" PRIu32 ": held %" PRIu32 " tokens", x->choice->name, x->budget,
             x->held_max);
    summarise(x, r, errors);
    x->seconds = seconds() - start;
    free(errors);
}

/* ---- threads and progress -------------------------------------------------------------------- */

typedef struct work {
    pthread_mutex_t lock;
    const options *options;
    reference *reference;
    run *runs;
    size_t n, next, done; /* jobs: runs, or blocks of exact queries if runs is NULL */
    double start;
} work;

static void show_progress(const work *w) {
    if (!isatty(2)) return;
    fprintf(stderr, "\r%-24.24s %s %zu of %zu, %.0f s ", w->reference->name,
            w->runs ? "runs" : "exact reference", w->done, w->n, seconds() - w->start);
}

static void exact_job(const work *w, size_t job, void *scratch) {
    const reference *r = w->reference;
    const npy_trace *t = &r->t;
    exact_input in = {t->q.data,     t->k.data,   t->v.data,    t->n_q_heads,
                      t->n_kv_heads, t->head_dim, t->value_dim, 1 / sqrt((double)t->head_dim)};
    size_t i = job / t->n_kv_heads * EXACT_QUERIES, n = r->n - i;
    exact_attend(&in, job % t->n_kv_heads, r->first + i * r->every, r->every,
                 n < EXACT_QUERIES ? n : EXACT_QUERIES, r->out + i * t->n_q_heads * t->value_dim,
                 scratch);
}

static void *worker(void *argument) {
    work *w = (work *)argument;
    const npy_trace *t = &w->reference->t;
    exact_input in = {NULL, NULL, NULL, t->n_q_heads, t->n_kv_heads, t->head_dim, t->value_dim, 1};
    void *scratch = w->runs ? NULL : get_memory(exact_scratch_bytes(&in));
    pthread_mutex_lock(&w->lock);
    while (w->next < w->n) {
        size_t job = w->next++;
        pthread_mutex_unlock(&w->lock);
        if (!w->runs)
            exact_job(w, job, scratch);
        else if (!w->runs[job].same_as)
            execute(&w->runs[job], w->reference, w->options);
        pthread_mutex_lock(&w->lock);
        w->done++;
        if (w->runs || w->done % 16 == 0) show_progress(w);
    }
    pthread_mutex_unlock(&w->lock);
    free(scratch);
    return NULL;
}

static void do_all(work *w) {
    pthread_t threads[MAX_THREADS];
    size_t n = w->options->threads;
    pthread_mutex_init(&w->lock, NULL);
    w->next = w->done = 0;
    for (size_t i = 1; i < n; i++)
        if (pthread_create(&threads[i], NULL, worker, w)) fail("cannot start thread %zu", i);
    worker(w);
    for (size_t i = 1; i < n; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&w->lock);
}

/* ---- output ---------------------------------------------------------------------------------- */

static double mean_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum / (double)n;
}

static void print_list(FILE *to, const char *name, const double *x, size_t n) {
    fprintf(to, ", \"%s\": [", name);
    for (size_t i = 0; i < n; i++) fprintf(to, "%s%.6g", i ? ", " : "", x[i]);
    fputc(']', to);
}

static void print_json(FILE *to, const run *x, const run *as, const reference *r,
                       const options *o) {
    fprintf(to,
            "{\"trace\": \"%s\", \"protocol\": \"%s\", \"method\": \"%s\", \"budget\": %" PRIu32
            ", \"held_max\": %" PRIu32 ", \"bytes\": %zu, \"rel_err\": %.6g, \"rel_err_p95\": %.6g"
            ", \"seed\": %" PRIu64 ", \"needs\": \"%s\", \"tokens\": %zu",
            r->name, o->protocol == STREAM ? "stream" : "oneshot", x->choice->name, x->budget,
            as->held_max, as->bytes, as->error, as->error_p95, x->seed, x->needs, r->t.n);
    print_list(to, "head_err", as->head_error, r->t.n_kv_heads);
    if (as->head_estimate) {
        fprintf(to, ", \"est_err\": %.6g", mean_of(as->head_estimate, r->t.n_kv_heads));
        print_list(to, "head_est", as->head_estimate, r->t.n_kv_heads);
    }
    fprintf(to, ", \"rel_err_clamped\": %.6g, \"failures\": %zu, \"seconds\": %.3f}\n",
            as->error_clamped, as->failures, as->seconds);
}

static void print_row(const run *x, const run *as, const reference *r) {
    printf("%-20s %-28s %7" PRIu32 " %7" PRIu32 " %9.1f %9.5f %9.5f %6" PRIu64 " %7.2f\n", r->name,
           x->choice->name, x->budget, as->held_max, (double)as->bytes / 1024, as->error,
           as->error_p95, x->seed, as->seconds);
}

/* What is written to it becomes the picture. By the environment, so that no name needs quotes. */
#ifndef PLOT_PY
#define PLOT_PY "bench/plot.py"
#endif
static FILE *open_plot(const char *file) {
    FILE *plot = NULL;
    if (!setenv("QUALITY_PLOT", PLOT_PY, 1) && !setenv("QUALITY_SVG", file, 1))
        plot = popen("exec \"${PYTHON:-python3}\" \"$QUALITY_PLOT\" quality /dev/stdin "
                     ">\"$QUALITY_SVG\"",
                     "w");
    if (!plot) fail("cannot start %s", PLOT_PY);
    return plot;
}

/* ---- main ------------------------------------------------------------------------------------ */

/* The folder's own name: results must not depend on where traces lie. */
static const char *base_name(char *path) {
    char *end = path + strlen(path);
    while (end > path + 1 && end[-1] == '/') *--end = 0;
    while (end > path && end[-1] != '/') end--;
    for (const char *p = end; *p; p++)
        if ((unsigned char)*p < 32 || *p == '"' || *p == '\\')
            fail("%s: a folder's name must be plain text", path);
    return end;
}

static void append_array(npy_array *a, npy_array *b) {
    size_t row = a->shape[1] * a->shape[2];
    float *both = (float *)realloc(a->data, (a->shape[0] + b->shape[0]) * row * sizeof *both);
    if (!both) fail("no memory for so many tokens");
    memcpy(both + a->shape[0] * row, b->data, b->shape[0] * row * sizeof *both);
    a->data = both;
    a->shape[0] += b->shape[0];
}

/* DIR or DIR+DIR+.., one stream after the other. */
static void load_trace(npy_trace *t, char *name, char *dir) {
    char err[NPY_ERROR], *plus = strchr(dir, '+');
    npy_trace next;
    size_t used;
    if (plus) *plus = 0;
    if (!npy_load_trace(t, dir, err)) fail("%s", err);
    snprintf(name, TEXT, "%s", base_name(dir));
    while (plus) {
        dir = plus + 1;
        plus = strchr(dir, '+');
        if (plus) *plus = 0;
        if (!npy_load_trace(&next, dir, err)) fail("%s", err);
        if (next.n_q_heads != t->n_q_heads || next.n_kv_heads != t->n_kv_heads ||
            next.head_dim != t->head_dim || next.value_dim != t->value_dim)
            fail("%s: other heads or elements than the trace before it", dir);
        append_array(&t->q, &next.q);
        append_array(&t->k, &next.k);
        append_array(&t->v, &next.v);
        t->n += next.n;
        npy_free_trace(&next);
        used = strlen(name);
        snprintf(name + used, TEXT - used, "+%s", base_name(dir));
    }
}

static void load(reference *r, char *dir, const options *o) {
    size_t edge = o->protocol == ONESHOT ? 2 * ONESHOT_EDGE : 1;
    memset(r, 0, sizeof *r);
    load_trace(&r->t, r->name, dir);
    if (o->tokens > r->t.n) fail("%s: has %zu tokens, not %zu", dir, r->t.n, o->tokens);
    if (o->tokens) r->t.n = o->tokens;
    if (r->t.n <= edge) fail("%s: %zu tokens are too few", dir, r->t.n);
    if (r->t.n_q_heads / r->t.n_kv_heads > 16 || r->t.head_dim > 512 || r->t.value_dim > 512)
        fail("%s: more than 16 query heads per KV head, or 512 elements, are too many", dir);
    r->first = o->protocol == STREAM ? r->t.n / 2 : r->t.n - ONESHOT_EDGE;
    r->every = o->every;
    r->n = (r->t.n - r->first + r->every - 1) / r->every;
}

/* How often the cache's own estimate is within a factor 2 of the error of a KV head. */
typedef struct tally {
    size_t within, all;
} tally;

static void count_estimates(tally *t, const run *x, size_t heads) {
    for (size_t h = 0; x->head_estimate && h < heads; h++) {
        double ratio = x->head_estimate[h] / x->head_error[h];
        if (!(x->head_estimate[h] > 0)) continue; /* exact, or rule window, which makes none */
        t->within += ratio > 0.5 && ratio < 2;
        t->all++;
    }
}

static void evaluate(reference *r, const options *o, double start, tally *estimates, FILE *plot) {
    size_t heads = r->t.n_q_heads;
    work w;
    memset(&w, 0, sizeof w);
    w.options = o;
    w.reference = r;
    w.start = start;
    w.n = o->n_choices * o->n_budgets * o->n_seeds;
    w.runs = (run *)get_memory(w.n * sizeof *w.runs);
    for (size_t i = 0; i < w.n; i++) { /* before the long part, so that mistakes show at once */
        size_t seed = i % o->n_seeds, b = i / o->n_seeds % o->n_budgets;
        const choice *c = &o->choices[i / o->n_seeds / o->n_budgets];
        w.runs[i] = make_run(o, r, c, &o->budgets[b], o->seeds[seed]);
        if (seed && !c->random) w.runs[i].same_as = &w.runs[i - seed];
    }
    r->out = (double *)get_memory(r->n * heads * r->t.value_dim * sizeof *r->out);
    {
        work exact = w;
        exact.runs = NULL;
        exact.n = (r->n + EXACT_QUERIES - 1) / EXACT_QUERIES * r->t.n_kv_heads;
        do_all(&exact);
    }
    do_all(&w);
    if (isatty(2)) fprintf(stderr, "\r%70s\r", "");
    if (!o->json && r->is_first)
        printf("%-20s %-28s %7s %7s %9s %9s %9s %6s %7s\n", "trace", "method", "budget", "held",
               "KiB", "error", "95 %", "seed", "s");
    for (size_t i = 0; i < w.n; i++) {
        const run *as = w.runs[i].same_as ? w.runs[i].same_as : &w.runs[i];
        if (plot) print_json(plot, &w.runs[i], as, r, o);
        if (o->json)
            print_json(stdout, &w.runs[i], as, r, o);
        else
            print_row(&w.runs[i], as, r);
    }
    fflush(stdout);
    for (size_t i = 0; i < w.n; i++) {
        count_estimates(estimates, &w.runs[i], r->t.n_kv_heads);
        free(w.runs[i].head_error);
        free(w.runs[i].head_estimate);
    }
    free(w.runs);
    free(r->out);
}

int main(int argc, char **argv) {
    static options o; /* large */
    double start = seconds();
    tally estimates = {0, 0};
    FILE *plot;
    parse_options(&o, argc, argv);
    signal(SIGPIPE, SIG_IGN); /* a plot.py that has given up says so itself */
    plot = o.plot ? open_plot(o.plot) : NULL;
    for (size_t i = 0; i < o.n_traces; i++) {
        reference r;
        load(&r, o.traces[i], &o);
        r.is_first = i == 0;
        evaluate(&r, &o, start, &estimates, plot);
        npy_free_trace(&r.t);
    }
    if (estimates.all)
        fprintf(o.json ? stderr : stdout, "estimate within a factor 2: %zu of %zu\n",
                estimates.within, estimates.all);
    if (plot && pclose(plot)) {
        remove(o.plot);
        fail("%s: no picture", o.plot);
    }
    return 0;
}
