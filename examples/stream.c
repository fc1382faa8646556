/* stream.c - the main job: a recorded stream of keys, values and queries of a language model goes
   through caches of several budgets, token by token. Prints what the caches hold, how far their
   output is from exact attention and what a token costs, and draws which tokens survive.
   Build and run: sh examples/run.sh [options], or
   cc -std=c99 -O2 -I. examples/stream.c -o stream -lm && ./stream examples/trace */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include "npy.h"
#include <inttypes.h>
#include <time.h>
#include <unistd.h>

enum {
    MIN_TOKENS = 256,
    MAX_BUDGETS = 16,
    PARTS = 4,    /* of the stream, timed apart */
    PASSES = 5,   /* over the stream: the fastest of each token counts, for other jobs disturb */
    SAMPLES = 256 /* positions of the second half whose output is compared */
};
#define MAX_SECONDS 1.0 /* no further pass of a run that took longer: slow machines */

static const char *const rule_names[] = {"default", "sample", "window"};
static const char *const type_names[] = {"default", "f32", "f16", "bf16", "i8", "i4"};
static const char *backend_names[5];
#define N_NAMES(list) (uint32_t)(sizeof(list) / sizeof((list)[0]))

static const char help[] =
    "usage: stream [TRACE_DIR] [options]\n"
    "Streams q.npy [n, n_q_heads, d], k.npy [n, n_kv_heads, d] and v.npy [n, n_kv_heads, dv]\n"
    "(f16 or f32) of TRACE_DIR (default: examples/trace) through caches of fixed size.\n"
    "  --budget B[,B...]  slots per KV head (default 512,1024,2048)\n"
    "  --rule NAME        sample (default) or window\n"
    "  --type NAME        storage: f16 (default), f32, bf16, i8 or i4\n"
    "  --seed S           of the halvings (default 1)\n"
    "  --backend NAME     auto (default), scalar, avx2, avx512 or neon\n"
    "  --svg FILE         the picture (default survivors.svg): KV head 0, the first budget\n"
    "  --csv FILE         the table again, for programs\n"
    "  --help             this text\n"
    "Of an option given twice the last one counts. Exit code 2: wrong options or input.\n";

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("stream: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *get_memory(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p) fail("no memory for %zu bytes; take a smaller budget or a shorter trace", bytes);
    return p;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- options --------------------------------------------------------------------------------- */

typedef struct options {
    const char *dir, *svg, *csv;
    uint32_t budgets[MAX_BUDGETS], n_budgets;
    uint32_t rule, type, backend;
    uint64_t seed;
} options;

static uint64_t parse_number(const char **text, uint64_t max, const char *option) {
    char *end;
    unsigned long long x;
    errno = 0;
    x = strtoull(*text, &end, 10);
    if (**text < '0' || **text > '9' || errno || x > max)
        fail("%s: '%s' is not a number of 0..%" PRIu64, option, *text, max);
    *text = end;
    return x;
}

static uint32_t parse_name(const char *text, const char *const *names, uint32_t n,
                           const char *option) {
    char all[128] = "";
    for (uint32_t i = 0; i < n; i++) {
        if (!strcmp(text, names[i])) return i;
        snprintf(all + strlen(all), sizeof all - strlen(all), " %s", names[i]);
    }
    fail("%s: '%s' is none of:%s", option, text, all);
    return 0;
}

static options parse_options(int argc, char **argv) {
    options o = {"examples/trace", "survivors.svg", NULL, {512, 1024, 2048}, 3, 0, 0, 0, 1};
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(option, "--help")) {
            fputs(help, stdout);
            exit(0);
        }
        if (option[0] != '-') {
            o.dir = option;
            continue;
        }
        if (strcmp(option, "--budget") && strcmp(option, "--rule") && strcmp(option, "--type") &&
            strcmp(option, "--seed") && strcmp(option, "--backend") && strcmp(option, "--svg") &&
            strcmp(option, "--csv"))
            fail("unknown option '%s'; --help lists them", option);
        if (!value) fail("%s needs a value; --help explains it", option);
        i++;
        if (!strcmp(option, "--rule")) {
            o.rule = parse_name(value, rule_names, N_NAMES(rule_names), option);
        } else if (!strcmp(option, "--type")) {
            o.type = parse_name(value, type_names, N_NAMES(type_names), option);
        } else if (!strcmp(option, "--backend")) {
            o.backend = parse_name(value, backend_names, N_NAMES(backend_names), option);
        } else if (!strcmp(option, "--svg")) {
            o.svg = value;
        } else if (!strcmp(option, "--csv")) {
            o.csv = value;
        } else if (!strcmp(option, "--seed")) {
            o.seed = parse_number(&value, UINT64_MAX, option);
            if (*value) fail("--seed: '%s' follows the number", value);
        } else {
            for (o.n_budgets = 0;; value++) {
                if (o.n_budgets == MAX_BUDGETS) fail("--budget: at most %d of them", MAX_BUDGETS);
                o.budgets[o.n_budgets++] = (uint32_t)parse_number(&value, UINT32_MAX, option);
                if (*value != ',') break;
            }
            if (*value) fail("--budget: '%s' follows the number", value);
        }
    }
    return o;
}

/* ---- the exact output ------------------------------------------------------------------------ */

/* Softmax attention in double at every step-th position from first on. */
typedef struct exact {
    size_t first, step, n;
    double *out; /* [n][n_q_heads][value_dim] */
} exact;

static void attend_exactly(const npy_trace *t, size_t at, double *logit, double *out) {
    size_t group = t->n_q_heads / t->n_kv_heads;
    for (size_t h = 0; h < t->n_q_heads; h++, out += t->value_dim) {
        const float *q = t->q.data + (at * t->n_q_heads + h) * t->head_dim;
        double max = -HUGE_VAL, sum = 0;
        for (size_t i = 0; i <= at; i++) {
            const float *k = t->k.data + (i * t->n_kv_heads + h / group) * t->head_dim;
            double dot = 0;
            for (size_t d = 0; d < t->head_dim; d++) dot += (double)q[d] * (double)k[d];
            logit[i] = dot / sqrt((double)t->head_dim);
            if (logit[i] > max) max = logit[i];
        }
        for (size_t d = 0; d < t->value_dim; d++) out[d] = 0;
        for (size_t i = 0; i <= at; i++) {
            const float *v = t->v.data + (i * t->n_kv_heads + h / group) * t->value_dim;
            double p = exp(logit[i] - max);
            sum += p;
            for (size_t d = 0; d < t->value_dim; d++) out[d] += p * (double)v[d];
        }
        for (size_t d = 0; d < t->value_dim; d++) out[d] /= sum;
    }
}

static exact make_exact(const npy_trace *t) {
    size_t half = t->n - t->n / 2, row = t->n_q_heads * t->value_dim;
    double *logit = (double *)get_memory(t->n * sizeof *logit);
    exact e;
    e.first = t->n / 2;
    e.step = half > SAMPLES ? half / SAMPLES : 1;
    e.n = (half + e.step - 1) / e.step;
    e.out = (double *)get_memory(e.n * row * sizeof *e.out);
    for (size_t s = 0; s < e.n; s++)
        attend_exactly(t, e.first + s * e.step, logit, e.out + s * row);
    free(logit);
    return e;
}

/* |out - exact| / |exact| of one head. */
static double relative_error(const float *out, const double *exact_out, size_t n) {
    double diff = 0, norm = 0;
    for (size_t d = 0; d < n; d++) {
        double x = (double)out[d] - exact_out[d];
        diff += x * x;
        norm += exact_out[d] * exact_out[d];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- the picture ----------------------------------------------------------------------------- */

enum { ROWS = 48, COLUMNS = 1024, CLASSES = 25, KINDS = 4 };

/* What a cache held of the text at ROWS moments. A column covers n / COLUMNS tokens (so a file is
   never large) and shows the heaviest of those kept. */
typedef struct picture {
    unsigned char kind[ROWS][COLUMNS]; /* BKV_KIND_*, 0: nothing kept */
    float weight[ROWS][COLUMNS];
    uint32_t n_rows;
} picture;

static void take_snapshot(picture *p, const bkv_cache *c, size_t n) {
    bkv_stats_info s;
    bkv_token_info token;
    uint32_t row = p->n_rows++;
    bkv_stats(c, &s);
    for (uint32_t i = 0; i < s.tokens_held; i++) {
        size_t column, end;
        if (bkv_token(c, 0, i, &token) != BKV_OK) fail("token %" PRIu32 " cannot be read", i);
        column = (size_t)(token.position * COLUMNS / n);
        end = (size_t)((token.position + 1) * COLUMNS / n);
        do {
            if (token.weight <= p->weight[row][column]) continue;
            p->weight[row][column] = token.weight;
            p->kind[row][column] = (unsigned char)token.kind;
        } while (++column < end);
    }
}

/* Weights 1, 2, 4, .. are classes 0, 1, 2, .. */
static int weight_class(float weight) {
    int c = (int)(log2((double)weight) + 0.5);
    return c < 0 ? 0 : c >= CLASSES ? CLASSES - 1 : c;
}

enum { LEFT = 92, WIDTH = COLUMNS, TOP = 96, ROW = 11, MAP = ROWS * ROW };
enum { STEMS_TOP = TOP + MAP + 78, STEMS = 132, STEMS_BASE = STEMS_TOP + STEMS };
enum { PAGE_WIDTH = LEFT + WIDTH + 36, PAGE_HEIGHT = STEMS_BASE + 62 };

/* In the map: height of a mark of this class, and how opaque it is. */
static double mark_height(int c, int top) {
    return (ROW - 1) * (0.3 + 0.7 * (double)c / (double)(top ? top : 1));
}
static double mark_opacity(int c, int top) {
    return 0.5 + 0.5 * (double)c / (double)(top ? top : 1);
}
/* In the stems: distance from the base line. */
static double stem_height(float weight, int top) {
    return 12 + (STEMS - 24) * log2((double)weight) / (double)(top ? top : 1);
}

static void draw_text(FILE *f, double x, double y, const char *style, const char *format, ...) {
    va_list args;
    fprintf(f, "<text x=\"%g\" y=\"%g\" class=\"%s\">", x, y, style);
    va_start(args, format);
    vfprintf(f, format, args);
    va_end(args);
    fputs("</text>\n", f);
}

/* One path of all marks of a kind and class in a row, neighbours joined, on the base line y. */
static void draw_marks(FILE *f, const picture *p, uint32_t row, int kind, int c, int top) {
    int pen = -1;
    for (int x = 0, end; x < COLUMNS; x = end) {
        end = x + 1;
        if (p->kind[row][x] != kind || weight_class(p->weight[row][x]) != c) continue;
        while (end < COLUMNS && p->kind[row][end] == kind && weight_class(p->weight[row][end]) == c)
            end++;
        if (pen < 0)
            fprintf(f, "<path class=\"k%d h%d\" d=\"M%d %.1fh%d", kind, c, x,
                    ROW - mark_height(c, top) / 2, end - x);
        else
            fprintf(f, "m%d 0h%d", x - pen, end - x);
        pen = end;
    }
    if (pen >= 0) fputs("\"/>", f);
}

static void draw_style(FILE *f, int top) {
    fputs("<style>\n"
          "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;"
          "fill:#1f2328}\n"
          ".title{font-size:21px;font-weight:600}.head{font-weight:600}\n"
          ".soft{fill:#59636e}.num{fill:#59636e;font-size:12px;text-anchor:middle}\n"
          ".right{fill:#59636e;font-size:12px;text-anchor:end}\n"
          ".back{fill:#ffffff}.seen{fill:#f2f4f7}.grid{stroke:#8c959f;stroke-opacity:.3}\n"
          ".grid,.k1,.k2,.k3{fill:none}.k1{stroke:#c2410c}.k2{stroke:#1d4ed8}.k3{stroke:#0f8a5f}\n"
          ".f1{fill:#c2410c}.f2{fill:#1d4ed8}.f3{fill:#0f8a5f}\n"
          "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.soft,.num,.right{fill:#9198a1}\n"
          ".back{fill:#0d1117}.seen{fill:#161b22}.grid{stroke:#b1bac4}\n"
          ".k1{stroke:#fb923c}.k2{stroke:#79b0ff}.k3{stroke:#3ddc97}\n"
          ".f1{fill:#fb923c}.f2{fill:#79b0ff}.f3{fill:#3ddc97}}\n",
          f);
    for (int c = 0; c <= top; c++)
        fprintf(f, ".h%d{stroke-width:%.1f}.k2.h%d,.f2.o%d{opacity:%.2f}\n", c, mark_height(c, top),
                c, c, mark_opacity(c, top));
    fputs("</style>\n", f);
}

static void draw_legend(FILE *f, const bkv_stats_info *s, int top) {
    const double x = LEFT + WIDTH * 0.5, y = TOP + 18;
    draw_text(f, x, y, "head", "A row is the whole cache at one moment, a mark is a kept token");
    fprintf(f, "<rect class=\"f1\" x=\"%g\" y=\"%g\" width=\"14\" height=\"10\"/>\n", x, y + 17);
    draw_text(f, x + 24, y + 26, "", "sinks: the first %" PRIu32 " tokens, exact for ever",
              s->sinks);
    fprintf(f, "<rect class=\"f3\" x=\"%g\" y=\"%g\" width=\"14\" height=\"10\"/>\n", x, y + 39);
    draw_text(f, x + 24, y + 48, "", "window: at least the newest %" PRIu32 " tokens, exact",
              s->window);
    fprintf(f, "<rect class=\"f2\" x=\"%g\" y=\"%g\" width=\"14\" height=\"10\"/>\n", x, y + 61);
    draw_text(f, x + 24, y + 70, "", "pages between: halved again and again, 128 tokens to 64");
    draw_text(f, x, y + 100, "soft", "taller and stronger: stands for more tokens");
    for (int c = 0; c <= top; c++) {
        double at = x + 8 + c * (top > 12 ? 400.0 / top : 34.0), h = mark_height(c, top);
        fprintf(f, "<rect class=\"f2 o%d\" x=\"%g\" y=\"%g\" width=\"10\" height=\"%g\"/>\n", c, at,
                y + 122 - h, h);
        draw_text(f, at + 5, y + 138, "num", "%.0f", exp2((double)c));
    }
}

/* Round step for about eight ticks. */
static uint64_t tick_step(uint64_t n) {
    uint64_t step = 1;
    while (n / step > 80) step *= 10;
    return n / step > 30 ? step * 5 : n / step > 12 ? step * 2 : step;
}

static void draw_picture(const char *path, const picture *p, const bkv_config *cfg,
                         const bkv_stats_info *s, uint64_t n) {
    int top = weight_class(s->max_weight);
    uint64_t step = tick_step(n);
    FILE *f = fopen(path, "w");
    if (!f) fail("%s: %s; --svg FILE names another place", path, strerror(errno));

    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" role=\"img\">\n"
            "<title>Which tokens survive in a balancekv cache</title>\n",
            PAGE_WIDTH, PAGE_HEIGHT);
    draw_style(f, top);
    fprintf(f, "<rect class=\"back\" width=\"%d\" height=\"%d\"/>\n", PAGE_WIDTH, PAGE_HEIGHT);
    draw_text(f, LEFT, 36, "title",
              "Which tokens survive: %" PRIu64 " tokens through %" PRIu32 " slots", n, s->slots);
    draw_text(f, LEFT, 60, "soft",
              "one KV head, rule %s, %s, seed %" PRIu64 "; at the end %" PRIu32
              " tokens are held, with weights up to %.0f",
              rule_names[s->rule], type_names[cfg->kv_type], cfg->seed, s->tokens_held,
              (double)s->max_weight);

    /* The map: time runs down, and what was seen so far is shaded. */
    fprintf(f, "<path class=\"seen\" d=\"M%d %dV%dH%dZ\"/>\n", LEFT, TOP, TOP + MAP, LEFT + WIDTH);
    for (uint64_t i = 0; i <= n; i += step) {
        double share = (double)i / (double)n, x = LEFT + WIDTH * share, y = TOP + MAP * share;
        fprintf(f, "<path class=\"grid\" d=\"M%.1f %.1fV%dM%.1f %dv%dM%d %.1fH%.1f\"/>\n", x, y,
                TOP + MAP, x, STEMS_TOP, STEMS, LEFT - 4, y, x);
        draw_text(f, x, TOP + MAP + 18, "num", "%" PRIu64, i);
        draw_text(f, x, STEMS_BASE + 18, "num", "%" PRIu64, i);
        draw_text(f, LEFT - 10, y + 4, "right", "%" PRIu64, i);
    }
    draw_text(f, LEFT - 10, TOP - 14, "right", "tokens seen");
    for (uint32_t row = 0; row < p->n_rows; row++) {
        fprintf(f, "<g transform=\"translate(%d %u)\">", LEFT, TOP + row * ROW);
        for (int kind = 1; kind < KINDS; kind++)
            for (int c = 0; c <= top; c++) draw_marks(f, p, row, kind, c, top);
        fputs("</g>\n", f);
    }
    draw_legend(f, s, top);

    /* The stems: the last row again, with a scale for the weights. */
    draw_text(f, LEFT, STEMS_TOP - 14, "head",
              "The cache at the end, and how many tokens each of its tokens stands for");
    draw_text(f, LEFT - 10, STEMS_TOP - 14, "right", "weight");
    for (int c = 0; c <= top; c++) {
        double y = STEMS_BASE - stem_height((float)exp2((double)c), top);
        fprintf(f, "<path class=\"grid\" d=\"M%d %.1fh%d\"/>\n", LEFT, y, WIDTH);
        draw_text(f, LEFT - 10, y + 4, "right", "%.0f", exp2((double)c));
    }
    fprintf(f, "<g transform=\"translate(%d %d)\">", LEFT, STEMS_BASE);
    for (int kind = 1; kind < KINDS; kind++) {
        fprintf(f, "<path class=\"k%d\" d=\"", kind);
        for (int x = 0; x < COLUMNS; x++)
            if (p->kind[p->n_rows - 1][x] == kind)
                fprintf(f, "M%d.5 0v-%.1f", x, stem_height(p->weight[p->n_rows - 1][x], top));
        fputs("\"/>", f);
    }
    fputs("</g>\n", f);
    draw_text(f, LEFT + WIDTH / 2, STEMS_BASE + 42, "num", "position of the token in the text");
    fputs("</svg>\n", f);
    if (ferror(f) | fclose(f)) fail("%s: cannot be written", path);
}

/* ---- streaming ------------------------------------------------------------------------------- */

typedef struct run {
    const char *method;
    bkv_config cfg;
    bkv_stats_info stats;
    double error, error_p95;
    double append[PARTS], attend[PARTS]; /* seconds for that part of the stream */
} run;

static void check(bkv_result r, const char *what) {
    if (r != BKV_OK) fail("%s: %s", what, bkv_result_string(r));
}

static void check_token(bkv_result r, size_t token, const char *type) {
    if (r == BKV_E_VALUE)
        fail("token %zu: %s in %s; --type bf16 or f32 holds larger ones", token,
             bkv_result_string(r), type);
    check(r, "this token");
}

static size_t part_end(size_t n, int part) { return n * (size_t)(part + 1) / PARTS; }

/* One pass over the stream. cost[2 * token] is lowered to the seconds of its append, the next to
   those of its attend. With errors, an array of [exact->n][n_q_heads], it also compares. */
static void stream_once(const run *r, const npy_trace *t, bkv_cache *c, void *mem, double *cost,
                        const exact *e, double *errors, picture *p) {
    size_t q_row = t->n_q_heads * t->head_dim, k_row = t->n_kv_heads * t->head_dim;
    size_t v_row = t->n_kv_heads * t->value_dim, out_row = t->n_q_heads * t->value_dim;
    float *out = (float *)get_memory(out_row * sizeof *out);
    check(bkv_init(c, &r->cfg, mem, bkv_size(&r->cfg)), "bkv_init");
    for (size_t i = 0; i < t->n; i++) {
        bkv_result appended, attended;
        double start = seconds(), middle, end;
        appended = bkv_append(c, bkv_dense(t->k.data + i * k_row, BKV_F32),
                              bkv_dense(t->v.data + i * v_row, BKV_F32), 1, 0, 0, 1);
        middle = seconds();
        attended = bkv_attend(c, bkv_dense(t->q.data + i * q_row, BKV_F32), out, 0, 1);
        end = seconds();
        check_token(appended, i, type_names[r->cfg.kv_type]);
        check_token(attended, i, type_names[r->cfg.kv_type]);
        if (middle - start < cost[2 * i]) cost[2 * i] = middle - start;
        if (end - middle < cost[2 * i + 1]) cost[2 * i + 1] = end - middle;
        if (errors && i >= e->first && (i - e->first) % e->step == 0) {
            size_t at = (i - e->first) / e->step * t->n_q_heads;
            for (size_t h = 0; h < t->n_q_heads; h++)
                errors[at + h] = relative_error(out + h * t->value_dim,
                                                e->out + (at + h) * t->value_dim, t->value_dim);
        }
        if (p && i + 1 == t->n * (p->n_rows + 1) / ROWS) take_snapshot(p, c, t->n);
        if (i % 256 == 0 && isatty(2))
            fprintf(stderr, "\r%-9s budget %-8" PRIu32 " token %-9zu", r->method, r->cfg.budget, i);
    }
    free(out);
}

static void stream_trace(run *r, const npy_trace *t, const exact *e, picture *p) {
    size_t n_errors = e->n * t->n_q_heads;
    double *errors = (double *)get_memory(n_errors * sizeof *errors);
    double *cost = (double *)get_memory(2 * t->n * sizeof *cost), start = seconds();
    void *mem = get_memory(bkv_size(&r->cfg));
    bkv_cache c;

    for (size_t i = 0; i < 2 * t->n; i++) cost[i] = HUGE_VAL;
    stream_once(r, t, &c, mem, cost, e, errors, p);
    for (int pass = 1; pass < PASSES && seconds() - start < MAX_SECONDS; pass++)
        stream_once(r, t, &c, mem, cost, e, NULL, NULL);
    if (isatty(2)) fprintf(stderr, "\r%60s\r", "");
    check(bkv_stats(&c, &r->stats), "bkv_stats");

    for (size_t i = 0, part = 0; i < t->n; i++) {
        if (i == part_end(t->n, (int)part)) part++;
        r->append[part] += cost[2 * i];
        r->attend[part] += cost[2 * i + 1];
    }
    for (size_t i = 0; i < n_errors; i++) r->error += errors[i] / (double)n_errors;
    qsort(errors, n_errors, sizeof *errors, compare_doubles);
    r->error_p95 = errors[(n_errors * 95 + 99) / 100 - 1];
    free(errors);
    free(cost);
    free(mem);
}

/* ---- what is printed ------------------------------------------------------------------------- */

/* Bytes of the plain f16 cache of n tokens that a runtime would hold. */
static double plain_bytes(const npy_trace *t, size_t n) {
    return (double)n * (double)t->n_kv_heads * (double)(t->head_dim + t->value_dim) * 2;
}

static double total_us(const double parts[PARTS], size_t n) {
    double s = 0;
    for (int i = 0; i < PARTS; i++) s += parts[i];
    return s * 1e6 / (double)n;
}

static double part_us(const run *r, size_t n, int part) {
    size_t start = part ? part_end(n, part - 1) : 0;
    return (r->append[part] + r->attend[part]) * 1e6 / (double)(part_end(n, part) - start);
}

static void print_table(const run *runs, size_t n_runs, const npy_trace *t) {
    printf("\n%-10s %7s %9s %7s  %10s %10s  %9s %9s  %7s\n", "method", "budget", "KiB", "share",
           "error", "95 %", "append us", "attend us", "weights");
    for (size_t i = 0; i < n_runs; i++) {
        const run *r = &runs[i];
        printf("%-10s %7" PRIu32 " %9.1f %6.1f%%  %10.3g %10.3g  %9.2f %9.2f  %7.3g\n", r->method,
               r->stats.slots, (double)r->stats.bytes / 1024,
               100 * (double)r->stats.bytes / plain_bytes(t, t->n), r->error, r->error_p95,
               total_us(r->append, t->n), total_us(r->attend, t->n), (double)r->stats.max_weight);
    }
    printf("(KiB: all of bkv_size(), %.1f of it scratch. Share: of plain K and V in f16.)\n",
           (double)(runs->stats.bytes - runs->stats.state_bytes) / 1024);
}

static void print_growth(const run *fixed, const run *full, const npy_trace *t) {
    const run *both[2];
    both[0] = full;
    both[1] = fixed;
    printf("\nas the stream grows %12s", "up to token");
    for (int part = 0; part < PARTS; part++) printf(" %9zu", part_end(t->n, part));
    for (int i = 0; i < 2; i++) {
        printf("\n%-10s %8" PRIu32 "  us per token", both[i]->method, both[i]->stats.slots);
        for (int part = 0; part < PARTS; part++) printf(" %9.2f", part_us(both[i], t->n, part));
        printf("\n%-10s %8s  KiB needed  ", "", "");
        for (int part = 0; part < PARTS; part++)
            printf(" %9.1f",
                   (i ? (double)fixed->stats.bytes : plain_bytes(t, part_end(t->n, part))) / 1024);
    }
    puts("\n(KiB needed by the full cache: plain K and V in f16 of the tokens so far.)");
}

static void print_words(const run *runs, size_t n_budgets, const run *fixed, const run *full,
                        const npy_trace *t) {
    puts("\nIn words");
    for (size_t i = 0; i < n_budgets; i++) {
        const run *ours = &runs[2 * i], *window = &runs[2 * i + 1];
        printf("- %" PRIu32 " slots for %zu tokens: ", ours->stats.slots, t->n);
        if (!ours->stats.halvings) {
            puts("everything fits, nothing was halved.");
            continue;
        }
        printf("the output is off by %.1f %% on average,\n", 100 * ours->error);
        if (ours->error < 0.95 * window->error)
            printf("  with a window of the same bytes by %.1f %%, %.2f times as much.\n",
                   100 * window->error, window->error / ours->error);
        else if (window->error < 0.95 * ours->error)
            printf("  with a window of the same bytes by %.1f %%: the window is BETTER here.\n",
                   100 * window->error);
        else
            printf("  with a window of the same bytes by %.1f %%: no real difference.\n",
                   100 * window->error);
    }
    printf("- Full cache: off by %.1e; without a halving only the rounding of %s storage and of\n"
           "  float sums is left.\n",
           full->error, type_names[full->cfg.kv_type]);
    printf("- From the first quarter of the stream to the last, a token of the full cache came to\n"
           "  cost %.1f times as much and its memory grew to %.1f times; with %" PRIu32
           " slots the cost\n  went to %.2f times and the memory stayed.\n",
           part_us(full, t->n, PARTS - 1) / part_us(full, t->n, 0),
           plain_bytes(t, t->n) / plain_bytes(t, part_end(t->n, 0)), fixed->stats.slots,
           part_us(fixed, t->n, PARTS - 1) / part_us(fixed, t->n, 0));
}

static void write_csv(const char *path, const run *runs, size_t n_runs, const npy_trace *t) {
    FILE *f = fopen(path, "w");
    if (!f) fail("%s: %s; --csv FILE names another place", path, strerror(errno));
    fputs("method,rule,type,backend,seed,budget,held,bytes,state_bytes,share,rel_err,rel_err_p95,"
          "append_us,attend_us,max_weight\n",
          f);
    for (size_t i = 0; i < n_runs; i++) {
        const run *r = &runs[i];
        fprintf(f,
                "%s,%s,%s,%s,%" PRIu64 ",%" PRIu32 ",%" PRIu32 ",%zu,%zu,%.6g,%.6g,%.6g,%.4g,%.4g,"
                "%.6g\n",
                r->method, rule_names[r->stats.rule], type_names[r->cfg.kv_type],
                bkv_backend_name(r->stats.backend), r->cfg.seed, r->cfg.budget,
                r->stats.tokens_held, r->stats.bytes, r->stats.state_bytes,
                (double)r->stats.bytes / plain_bytes(t, t->n), r->error, r->error_p95,
                total_us(r->append, t->n), total_us(r->attend, t->n), (double)r->stats.max_weight);
    }
    if (ferror(f) | fclose(f)) fail("%s: cannot be written", path);
}

/* ---- main ------------------------------------------------------------------------------------ */

static run make_run(const options *o, const npy_trace *t, const char *method, uint32_t budget,
                    uint32_t rule) {
    run r;
    bkv_result result;
    memset(&r, 0, sizeof r);
    r.method = method;
    r.cfg = bkv_config_default((uint32_t)t->n_q_heads, (uint32_t)t->n_kv_heads,
                               (uint32_t)t->head_dim, budget);
    r.cfg.value_dim = (uint32_t)t->value_dim;
    r.cfg.kv_type = o->type ? o->type : BKV_F16;
    r.cfg.rule = rule;
    r.cfg.backend = o->backend;
    r.cfg.seed = o->seed;
    result = bkv_check(&r.cfg);
    if (result == BKV_E_BUDGET) {
        bkv_config least = r.cfg;
        least.window = 0; /* that of the budget tried */
        for (least.budget = 1; least.budget < 4096 && bkv_check(&least) != BKV_OK;) least.budget++;
        fail("budget %" PRIu32 ": %s; the smallest that works here is %" PRIu32, budget,
             bkv_result_string(result), least.budget);
    }
    if (result == BKV_E_BACKEND) {
        char here[64] = "";
        for (uint32_t i = 1; i < N_NAMES(backend_names); i++)
            if (bkv_backends() >> i & 1)
                snprintf(here + strlen(here), sizeof here - strlen(here), " %s", backend_names[i]);
        fail("backend %s: %s; it has:%s", backend_names[o->backend], bkv_result_string(result),
             here);
    }
    check(result, "this trace does not fit a cache");
    return r;
}

int main(int argc, char **argv) {
    run runs[2 * MAX_BUDGETS + 1];
    const run *shown, *full;
    char err[NPY_ERROR];
    size_t n_runs = 0;
    picture *pic;
    npy_trace t;
    options o;
    exact e;

    for (uint32_t i = 0; i < N_NAMES(backend_names); i++) backend_names[i] = bkv_backend_name(i);
    o = parse_options(argc, argv);
    if (!npy_load_trace(&t, o.dir, err)) fail("%s", err);
    if (t.n < MIN_TOKENS || t.n > 1u << 23)
        fail("%s: holds %zu tokens; record %d to %u", o.dir, t.n, MIN_TOKENS, 1u << 23);
    if (t.n_q_heads > 65536 || t.head_dim > 65536 || t.value_dim > 65536)
        fail("%s: %zu heads of %zu and %zu elements are too many", o.dir, t.n_q_heads, t.head_dim,
             t.value_dim);

    for (uint32_t i = 0; i < o.n_budgets; i++) {
        runs[n_runs++] = make_run(&o, &t, "balancekv", o.budgets[i], o.rule);
        runs[n_runs++] = make_run(&o, &t, "window", o.budgets[i], BKV_RULE_WINDOW);
    }
    /* Room for every token: whole rows of 16, and not less than the smallest cache. */
    runs[n_runs++] = make_run(&o, &t, "full", ((uint32_t)t.n + 15) / 16 * 16, BKV_RULE_DEFAULT);
    shown = &runs[0]; /* the first budget: in the growth table and in the picture */
    full = &runs[n_runs - 1];

    printf("trace     %s: %zu tokens\n"
           "          query heads %zu, KV heads %zu, elements of a key %zu, of a value %zu\n",
           o.dir, t.n, t.n_q_heads, t.n_kv_heads, t.head_dim, t.value_dim);
    fflush(stdout);
    e = make_exact(&t);
    pic = (picture *)get_memory(sizeof *pic);
    for (size_t i = 0; i < n_runs; i++)
        stream_trace(&runs[i], &t, &e, &runs[i] == shown ? pic : NULL);

    printf("cache     rule %s, %s storage, backend %s, seed %" PRIu64 ", balancekv.h %s\n",
           rule_names[shown->stats.rule], type_names[shown->cfg.kv_type],
           bkv_backend_name(shown->stats.backend), o.seed, bkv_version());
    printf("error     |out - exact| / |exact|, exact softmax in double, mean and 95th percentile\n"
           "          of %zu outputs: one position in %zu of the second half, all heads\n",
           e.n * t.n_q_heads, e.step);
    print_table(runs, n_runs, &t);
    print_growth(shown, full, &t);
    print_words(runs, o.n_budgets, shown, full, &t);
    draw_picture(o.svg, pic, &shown->cfg, &shown->stats, t.n);
    printf("\npicture   %s\n", o.svg);
    if (o.csv) {
        write_csv(o.csv, runs, n_runs, &t);
        printf("table     %s\n", o.csv);
    }
    free(pic);
    free(e.out);
    npy_free_trace(&t);
    return 0;
}
