/* speed.c - how fast the cache is, as a share of what the machine can do and beside other systems.

       build/bench/speed [--peers[=DIR]] [--json] [--quick] [--case NAME,..] ..   (--help: all)

   Every line is one race (measure.h): the limits of the machine, our backends and the peers take
   turns in short samples, and the best sample of each counts. bench/README.md says what each case
   means. Exit code 0; 1: a check failed or a call did; 2: wrong usage. */
#define _GNU_SOURCE /* MADV_HUGEPAGE, CLOCK_MONOTONIC, dlopen */
#if !defined(BALANCEKV_SIMD) && !defined(BALANCEKV_DISPATCH)
#define ALL_BACKENDS /* that the target has */
#endif
#define BALANCEKV_STATIC
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "ceilings.h"
#include "measure.h"
#include "outside.h"

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "unknown flags"
#endif

enum { RING = 4096, MAX_ENTRIES = 96, PREFILL = 512, TEAM_RUN = 16, STRETCHES = 8 };

/* ---- options and output ---- */
static struct {
    int json, quick, peers, rows; /* rows: only to be named */
    const char *cases, *backends, *filter;
    size_t pool_bytes; /* what a cold case cycles through */
    race_rules rules;
} opt = {0, 0, 0, 0, NULL, NULL, "", (size_t)256 << 20, {60, 5, 3e5, 2e9}};
static int failures;

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("speed: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

/* The table, and what belongs to it: with --json it goes to stderr, out of the way of the lines. */
static void note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(opt.json ? stderr : stdout, format, args);
    va_end(args);
}

static void progress(const char *format, ...) {
    va_list args;
    if (!isatty(2)) return;
    va_start(args, format);
    fputs("\r\033[K", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
}

static void require(bkv_result r, const char *call) {
    if (r != BKV_OK) die("%s: %s", call, bkv_result_string(r));
}

/* Is a name one of a comma-separated list? */
static int listed(const char *list, const char *name) {
    size_t n = strlen(name);
    const char *at = list;
    for (; at; at = strchr(at, ','), at = at ? at + 1 : NULL)
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == '\0')) return 1;
    return 0;
}

/* A time with three digits and a unit. */
static const char *readable(double ns) {
    static char text[4][24];
    static unsigned next;
    char *to = text[next++ % 4];
    const char *units[] = {"ns", "us", "ms", "s"};
    int u = 0, digits;
    for (; ns >= 999.5 && u < 3; u++) ns /= 1000.0;
    digits = ns < 9.995 ? 2 : ns < 99.95 ? 1 : 0;
    snprintf(to, sizeof text[0], "%.*f %s", digits, ns, units[u]);
    return to;
}

/* ---- rows: what one line of the output is about, and who takes part ---- */
typedef struct row {
    const char *name, *type;
    unsigned d, group;
    size_t n;
    double units;        /* of the result in one operation: tokens, halvings, elements */
    double flops, bytes; /* that an operation cannot do without; 0: it has no such limit */
    double cores;
} row;

enum { LIMIT_FMA, LIMIT_READ, OURS, PEER };
typedef struct entry {
    row r;
    int role;
    double error; /* relative, against the same in double; < 0: no such thing */
    double tolerance;
    unsigned lanes;             /* ours, LIMIT_FMA: of the backend's multiply-add */
    double (*best)(void *self); /* if it is not simply the best sample */
    const char *of;             /* a peer of this backend only; NULL: of all */
    int python;                 /* a peer that lives in the Python process */
} entry;

static contender list[MAX_ENTRIES];
static entry entries[MAX_ENTRIES];
static size_t n_entries;

static entry *enter(const row *r, int role, const char *name,
                    double (*sample)(void *self, size_t repeats), void *self) {
    contender *c = &list[n_entries];
    entry *e = &entries[n_entries];
    if (n_entries++ == MAX_ENTRIES) die("more than %d contenders in one race", MAX_ENTRIES);
    memset(c, 0, sizeof *c);
    memset(e, 0, sizeof *e);
    snprintf(c->name, sizeof c->name, "%s", name);
    c->sample = sample;
    c->self = self;
    c->warm = r->bytes == 0.0; /* not a cold case */
    e->r = *r;
    e->role = role;
    e->error = -1.0;
    e->lanes = role == OURS ? fma_lanes(name) : 0;
    return e;
}

static const char *label(const row *r) {
    static char text[96];
    snprintf(text, sizeof text, "%s d%u g%u n%zu %s", r->name, r->d, r->group, r->n, r->type);
    return text;
}

static size_t n_wanted;
static int wanted(const row *r) {
    int is = strstr(label(r), opt.filter) != NULL;
    n_wanted += (size_t)is;
    if (is && opt.rows) puts(label(r));
    return is && !opt.rows;
}

/* The limits as contenders: 128 turns of the FMA loop; a stretch of memory. */
enum { FMA_TURNS = 128 };
static double sample_fma(void *self, size_t repeats) {
    double start = now_ns();
    fma_loop(*(const unsigned *)self, repeats * FMA_TURNS);
    return now_ns() - start;
}
static double fma_gflops(double ns, unsigned lanes) {
    return 2.0 * FMA_TURNS * FMA_CHAINS * lanes / ns;
}
typedef struct reader {
    char *data;
    size_t stretch, bytes, at; /* one operation reads a stretch, the next one behind it */
} reader;
static double sample_read(void *self, size_t repeats) {
    reader *r = (reader *)self;
    double start = now_ns();
    for (; repeats; repeats--) {
        read_loop(r->data + r->at, r->stretch);
        r->at = r->at + r->stretch < r->bytes ? r->at + r->stretch : 0;
    }
    return now_ns() - start;
}
static double sample_readers(void *self, size_t repeats); /* two threads */
static reader *memory_reader(void) {
    static reader r;
    if (!r.data) {
        r.data = (char *)allocate(opt.pool_bytes);
        r.stretch = (size_t)256 << 10;
        r.bytes = opt.pool_bytes;
    }
    return &r;
}

static double result(size_t i) { /* ns of one unit */
    double ns = entries[i].best ? entries[i].best(list[i].self) : list[i].best;
    return ns / entries[i].r.units;
}

static int beside(size_t other, size_t ours) {
    const entry *p = &entries[other];
    return p->role == PEER && (!p->of || !strcmp(p->of, list[ours].name));
}

static void print_row(size_t i, double share, const char *of) {
    const entry *e = &entries[i];
    const row *r = &e->r;
    double ns = result(i);
    const char *comma = "";
    size_t j;
    if (opt.json) {
        printf("{\"case\": \"%s\", \"backend\": \"%s\", \"d\": %u, \"group\": %u, \"n\": %zu, "
               "\"type\": \"%s\", \"ns\": %.3f, \"share_of_limit\": ",
               r->name, list[i].name, r->d, r->group, r->n, r->type, ns);
        printf(share > 0.0 ? "%.4f" : "null", share);
        printf(", \"ratio_to\": {");
        for (j = 0; j < n_entries; j++)
            if (beside(j, i)) {
                printf("%s\"%s\": %.3f", comma, list[j].name, result(j) / ns);
                comma = ", ";
            }
        printf("}}\n");
    }
    note("%-12s %4u %3u %8zu  %-9s %-7s %9s", r->name, r->d, r->group, r->n, r->type, list[i].name,
         readable(ns));
    if (share > 0.0) note("  %5.1f %% of %s", 100.0 * share, of);
    if (e->error >= 0.0) note("  error %.1e", e->error);
    note("\n");
    fflush(stdout);
}

/* A peer, how many times our time it takes, and both errors. */
static void print_peer(size_t i) {
    const entry *e = &entries[i];
    double ours = -1.0;
    size_t j;
    note("    %-28s %23s", list[i].name, readable(result(i)));
    for (j = 0; j < n_entries; j++)
        if (entries[j].role == OURS && beside(i, j)) {
            note("  x %.2f of %s", result(i) / result(j), list[j].name);
            ours = entries[j].error;
        }
    if (e->error >= 0.0) note("  error %.1e (tolerance %.0e)", e->error, e->tolerance);
    if (ours >= 0.0) note(", ours %.1e", ours);
    note("\n");
}

/* Ends a race. */
static void leave_peers(void) {
    size_t i;
    for (i = 0; i < n_entries; i++) {
        if (entries[i].role == PEER && list[i].sample == sample_called) {
            const called *c = (const called *)list[i].self;
            c->p->close(c->state);
        }
        if (entries[i].python) close_python((const char *)list[i].self);
    }
    n_entries = 0;
}

/* Adds the limits that the rows need, races, prints our rows, and forgets all of it. */
static void run_race(void) {
    static unsigned lanes[MAX_ENTRIES];
    size_t i, j, n = n_entries, memory = 0;
    for (i = 0; i < n; i++) {
        const row *r = &entries[i].r;
        if (entries[i].role != OURS) continue;
        if (r->flops > 0.0 && entries[i].lanes > 0) {
            for (j = n; j < n_entries; j++)
                if (entries[j].role == LIMIT_FMA && entries[j].lanes == entries[i].lanes) break;
            if (j == n_entries) {
                lanes[j] = entries[i].lanes;
                enter(r, LIMIT_FMA, "fma", sample_fma, &lanes[j])->lanes = lanes[j];
            }
        }
        if (r->bytes > 0.0 && !memory) {
            memory = n_entries;
            enter(r, LIMIT_READ, "read", r->cores > 1.0 ? sample_readers : sample_read,
                  memory_reader());
        }
    }
    race(list, n_entries, &opt.rules);
    progress("");
    for (i = 0; i < n; i++) {
        const row *r = &entries[i].r;
        double ns = result(i) * r->units, share = 0.0, part;
        const char *of = "";
        if (entries[i].role != OURS) continue;
        for (j = n; j < n_entries; j++) {
            if (entries[j].role == LIMIT_FMA && entries[j].lanes == entries[i].lanes) {
                part = r->flops / ns / fma_gflops(list[j].best, entries[j].lanes) / r->cores;
                if (part > share) share = part, of = "FMA";
            } else if (entries[j].role == LIMIT_READ && r->bytes > 0.0) {
                part = (double)memory_reader()->stretch;
                if (r->cores > 1.0) part *= 2 * TEAM_RUN * STRETCHES;
                part = r->bytes / ns / (part / list[j].best);
                if (part > share) share = part, of = "read";
            }
        }
        print_row(i, share, of);
    }
    for (i = 0; i < n; i++)
        if (entries[i].role == PEER) print_peer(i);
    leave_peers();
}

/* ---- backends ---- */
static uint32_t backends[8];
static size_t n_backends;

static uint32_t type_of(const char *name) {
    return strncmp(name, "f32", 3) == 0   ? BKV_F32
           : strncmp(name, "f16", 3) == 0 ? BKV_F16
           : strncmp(name, "i8", 2) == 0  ? BKV_I8
           : strcmp(name, "i4") == 0      ? BKV_I4
                                          : BKV_BF16;
}
/* Bits of an element. */
static size_t bits_of(const char *type) {
    static const size_t bits[] = {0, 32, 16, 16, 8, 4}; /* by BKV_F32, .. */
    return bits[type_of(type)];
}

/* ---- shapes and data ---- */
typedef struct shape {
    unsigned kv_heads, group, d;
} shape;
static const shape shapes[] = {{3, 3, 64}, {8, 4, 128}, {2, 7, 64}, {8, 2, 128}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* Tokens of a layer, and queries. A stream longer than n starts over: 64 tokens behind the end are
   those of the beginning, so that a chunk need not be split. */
typedef struct tokens {
    size_t n, kv, q_size; /* tokens; floats of a token's keys and of its queries */
    float *k, *v, *q;
} tokens;

static tokens make_tokens(const shape *s, size_t n, size_t n_queries) {
    tokens t;
    t.n = n;
    t.kv = (size_t)s->kv_heads * s->d;
    t.q_size = t.kv * s->group;
    t.k = (float *)allocate((n + 64) * t.kv * sizeof(float));
    t.v = (float *)allocate((n + 64) * t.kv * sizeof(float));
    t.q = (float *)allocate(n_queries * t.q_size * sizeof(float));
    fill_normal(t.k, n * t.kv, 1);
    fill_normal(t.v, n * t.kv, 2);
    fill_normal(t.q, n_queries * t.q_size, 3);
    memcpy(t.k + n * t.kv, t.k, (n < 64 ? n : 64) * t.kv * sizeof(float));
    memcpy(t.v + n * t.kv, t.v, (n < 64 ? n : 64) * t.kv * sizeof(float));
    return t;
}
static void free_tokens(tokens *t) {
    free(t->k);
    free(t->v);
    free(t->q);
}

static void append(bkv_cache *c, const tokens *t, size_t at, size_t n) {
    at %= t->n;
    require(bkv_append(c, bkv_dense(t->k + at * t->kv, BKV_F32),
                       bkv_dense(t->v + at * t->kv, BKV_F32), n, 0, 0, 1),
            "bkv_append");
}
static void advance(bkv_cache *c, const tokens *t, size_t from, size_t to) {
    for (; from < to; from += 64) append(c, t, from, to - from < 64 ? to - from : 64);
}
static void attend(bkv_cache *c, const tokens *t, float *out) {
    require(bkv_attend(c, bkv_dense(t->q, BKV_F32), out, 0, 1), "bkv_attend");
}

/* Exact attention in double of every stride-th of the n_queries last tokens. */
static double *exact(const shape *s, const tokens *t, size_t n_queries, size_t stride) {
    size_t heads = (size_t)s->kv_heads * s->group, d = s->d, i, h, j, x;
    double *out = (double *)allocate(n_queries * heads * d * sizeof(double));
    double *score = (double *)allocate(t->n * sizeof(double));
    for (i = 0; i < n_queries; i += stride)
        for (h = 0; h < heads; h++) {
            const float *q = t->q + (i * heads + h) * d;
            const float *k = t->k + h / s->group * d, *v = t->v + h / s->group * d;
            double *o = out + (i * heads + h) * d, most = -1e300, sum = 0.0;
            size_t n = t->n - n_queries + 1 + i;
            for (j = 0; j < n; j++) {
                double dot = 0.0;
                for (x = 0; x < d; x++) dot += (double)q[x] * (double)k[j * t->kv + x];
                score[j] = dot / sqrt((double)d);
                most = score[j] > most ? score[j] : most;
            }
            for (j = 0; j < n; j++) {
                double p = exp(score[j] - most);
                sum += p;
                for (x = 0; x < d; x++) o[x] += p * (double)v[j * t->kv + x];
            }
            for (x = 0; x < d; x++) o[x] /= sum;
        }
    free(score);
    return out;
}

/* What attention in this storage type may be off by, on this data. */
static double tolerance_of(const char *type) {
    static const double most[] = {0, 1e-5, 1e-3, 1e-2, 5e-2, 3e-1}; /* by BKV_F32, .. */
    return most[type_of(type)];
}
static void check_error(const char *what, double error, const char *type) {
    if (error <= tolerance_of(type)) return;
    fprintf(stderr, "speed: %s: error %.2e is above %.0e: this is not attention\n", what, error,
            tolerance_of(type));
    failures++;
}

/* ---- pools: copies of a layer, as a model has many, so that none is in the cache when its turn
   comes ---- */
typedef struct pool {
    bkv_cache *cache;
    unsigned char *mem;
    size_t copies, at, *seen;
    const tokens *t;
    float *out;
} pool;

static bkv_config config(const shape *s, const char *type, size_t budget, uint32_t backend) {
    bkv_config cfg =
        bkv_config_default(s->kv_heads * s->group, s->kv_heads, s->d, (uint32_t)budget);
    cfg.kv_type = type_of(type);
    cfg.backend = backend;
    require(bkv_check(&cfg), "bkv_check");
    return cfg;
}

/* Room for n tokens, every one of them exact: the sinks become one block of 64. */
static size_t budget_for(size_t n) { return n + 64; }

/* Layers that have seen n tokens of t - or are like `from`, which has: as many as fill `bytes`, a
   multiple of `unit`. */
static pool *make_pool(const bkv_config *cfg, const tokens *t, const bkv_cache *from, size_t n,
                       size_t bytes, size_t unit) {
    pool *p = (pool *)calloc(1, sizeof *p);
    size_t size = bkv_size(cfg), stride = (size + 63) & ~(size_t)63, i;
    p->copies = (bytes / stride / unit + 1) * unit;
    p->cache = (bkv_cache *)calloc(p->copies, sizeof *p->cache);
    p->seen = (size_t *)calloc(p->copies, sizeof *p->seen);
    p->mem = (unsigned char *)allocate(p->copies * stride);
    p->t = t;
    p->out = (float *)allocate(t->q_size * sizeof(float));
    require(bkv_init(&p->cache[0], cfg, p->mem, size), "bkv_init");
    if (!from) advance(&p->cache[0], t, 0, n);
    for (i = 0; i < p->copies; i++) {
        unsigned char *mem = p->mem + i * stride;
        if (from || i > 0) memcpy(mem, from ? from->mem : p->mem, p->cache[0].state_bytes);
        require(bkv_attach(&p->cache[i], mem, size, cfg->backend), "bkv_attach");
        p->seen[i] = n;
    }
    return p;
}
static void free_pool(pool *p) {
    free(p->out);
    free(p->mem);
    free(p->seen);
    free(p->cache);
    free(p);
}

/* ---- peers ---- */
static const peer_list *objects; /* what bench/peers.sh built; NULL: nothing */
static int has_python, has_reference;
static called callees[MAX_ENTRIES]; /* by entry */

/* What a peer must come near to, and the error of a result against it. */
typedef struct target {
    const double *reference;
    size_t n, query_size, stride; /* floats of a result; of a query; every stride-th is compared */
    double (*error)(const float *result, const struct target *target);
} target;

/* A peer whose result is not that of the task is left out, and the run fails. */
static int accept(const row *r, const char *name, double error, double tolerance) {
    if (error <= tolerance) return 1;
    fprintf(stderr, "speed: %s: %s left out, its error %.1e is above %.0e\n", label(r), name, error,
            tolerance);
    failures++;
    return 0;
}

static void enter_python(const row *r, const peer_task *task, const char *name, double tolerance,
                         const target *want) {
    entry *e;
    float *out;
    double error = HUGE_VAL;
    progress("%s: %s", label(r), name);
    if (!open_python(name, task)) die("%s does not start; run bench/peers.sh again", name);
    sample_python((void *)(uintptr_t)name, 1);
    out = result_of_python(name, want->n);
    if (out) error = want->error(out, want);
    free(out);
    if (accept(r, name, error, tolerance)) {
        e = enter(r, PEER, name, sample_python, (void *)(uintptr_t)name);
        e->error = error;
        e->tolerance = tolerance;
        e->python = 1;
    } else {
        close_python(name);
    }
}

static void enter_peers(const row *r, const peer_task *task, const target *want) {
    size_t i;
    if (!opt.peers) return;
    for (i = 0; objects && i < objects->count; i++) {
        const peer *p = &objects->peers[i];
        called *c = &callees[n_entries];
        double error;
        if (!strstr(p->work, task->work) || !strstr(p->types, task->type)) continue;
        progress("%s: %s", label(r), p->name);
        c->p = p;
        c->copies = task->copies;
        c->at = 0;
        c->state = p->open(p, task);
        p->run(c->state, 0);
        error = want->error(p->result(c->state), want);
        if (accept(r, p->name, error, p->tolerance)) {
            entry *e = enter(r, PEER, p->name, sample_called, c);
            e->error = error;
            e->tolerance = p->tolerance;
        } else {
            p->close(c->state);
        }
    }
    /* torch gets its data through a file: not the largest */
    if (has_python && task->q && task->dim && task->n * task->n_kv_heads * task->dim <= 1u << 25) {
        enter_python(r, task, "torch_sdpa_f32", 1e-4, want);
        if (strcmp(task->type, "f32") != 0) enter_python(r, task, "torch_sdpa_bf16", 2e-2, want);
    }
}

static double attention_error(const float *result, const target *want) {
    double off = 0.0, all = 0.0;
    size_t i, j;
    for (i = 0; i < want->n; i += want->query_size * want->stride)
        for (j = i; j < i + want->query_size; j++) {
            double x = want->reference[j];
            off += ((double)result[j] - x) * ((double)result[j] - x);
            all += x * x;
        }
    return sqrt(off / all);
}

/* ---- halve ---- */
static uint64_t halvings(const bkv_cache *c) {
    bkv_stats_info s;
    return bkv_stats(c, &s) == BKV_OK ? s.halvings : 0;
}

/* One append in 64 halves; only that one is timed. No queries are seen, as peers see none. */
static double sample_halving(void *self, size_t repeats) {
    pool *p = (pool *)self;
    bkv_cache *c = &p->cache[0];
    uint64_t before = halvings(c);
    double ns = 0.0, start;
    size_t i;
    for (i = 0; i < repeats; i++) {
        append(c, p->t, p->seen[0], 63);
        start = now_ns();
        append(c, p->t, p->seen[0] + 63, 1);
        ns += now_ns() - start;
        p->seen[0] += 64;
    }
    if (halvings(c) - before != repeats * c->cfg.n_kv_heads)
        die("%u appends that should halve once per KV head did so %u times", (unsigned)repeats,
            (unsigned)(halvings(c) - before));
    return ns;
}

/* One layer, just behind a halving. */
static pool *make_halver(const bkv_config *cfg, const tokens *t) {
    pool *p = make_pool(cfg, t, NULL, 0, 0, 1);
    while (halvings(&p->cache[0]) == 0) append(&p->cache[0], t, p->seen[0]++, 1);
    return p;
}

static double halving_flops(unsigned d) { return 2.0 * (128 * 127 / 2) * 2.0 * d; }

enum { BLOCKS = 4 }; /* that peers halve in turn, as many floats as the cache has */
/* What the first halving made of its 128 tokens: weights, then values, 0 of those that went. */
static double *first_halving(bkv_cache *c, size_t sinks, size_t d) {
    double *out = (double *)allocate(128 * (1 + d) * sizeof *out);
    float *v = (float *)allocate(c->slots * d * sizeof *v);
    bkv_rows rows;
    size_t i, j;
    memset(&rows, 0, sizeof rows);
    rows.v = v;
    rows.type = BKV_F32;
    rows.n_rows = c->slots;
    require(bkv_export(c, 0, &rows), "bkv_export");
    for (i = sinks; i < sinks + 64; i++) {
        bkv_token_info info;
        require(bkv_token(c, 0, (uint32_t)i, &info), "bkv_token");
        out[info.position - sinks] = (double)info.weight;
        for (j = 0; j < d; j++)
            out[128 + (info.position - sinks) * d + j] = (double)v[i * d + j];
    }
    free(v);
    return out;
}

/* The kernel matrix alone, of the two oldest pages: packing, products, 2^x, scores. */
static double sample_gram(void *self, size_t repeats) {
    const bkv_cache *c = &((pool *)self)->cache[0];
    const bkvi_head h = bkvi_head_get(c, 0, 0);
    const bkvi_kernels kernels = bkvi_kernels_of(c->cfg.backend);
    const uint32_t slots[2] = {bkvi_page_slot(&h, 0), bkvi_page_slot(&h, 1)};
    bkvi_block *block = (bkvi_block *)(void *)h.scratch;
    double start;
    size_t i;
    for (i = 0; i < 128; i++) block->weight[i] = 1.0f, block->use[i] = 0.0f;
    start = now_ns();
    for (; repeats; repeats--) kernels.gram(&h, slots, block);
    return now_ns() - start;
}

/* Of the reference in PyTorch: it must keep half of the tokens of each head. */
static double kept_error(const float *kept, const target *want) {
    size_t i;
    double worst = 0.0;
    for (i = 0; i < want->n; i++)
        worst = fmax(worst, fabs((double)kept[i] / (double)want->stride - 0.5));
    return worst;
}

static void enter_reference(const row *r, unsigned d) {
    static const char *const names[] = {"reference_4k", "reference_32k"};
    size_t i, heads = d == 64 ? 3 : 8;
    for (i = 0; i < (opt.quick ? 1 : 2); i++) {
        peer_task task = {"halve", "f32", 0, 0, 0, 0, 0, 1, NULL, NULL, NULL, NULL};
        target want = {NULL, 0, 0, 0, kept_error};
        size_t before = n_entries;
        task.n = i ? 32768 : 4096;
        task.n_q_heads = task.n_kv_heads = want.n = heads;
        task.dim = d;
        want.stride = task.n;
        enter_python(r, &task, names[i], 0.0, &want);
        if (n_entries > before) entries[before].r.units = (double)(heads * task.n / 128);
    }
}

/* "unmoved": without the refit, so that only keys and values are multiplied with themselves. */
static void halve_row(const char *name, const char *type, unsigned d) {
    row r = {name, type, d, 1, 128, 1.0, halving_flops(d), 0.0, 1.0};
    const shape s = {1, 1, d};
    peer_task task = {"halve", type, 1, 1, d, 128, 0, BLOCKS, NULL, NULL, NULL, NULL};
    target want = {NULL, 128 * (1 + (size_t)d), 128 * (1 + (size_t)d), 1, attention_error};
    int gram = strstr(type, "gram") != NULL;
    bkv_stats_info info;
    tokens t;
    pool *p[8];
    float u[128];
    double *first = NULL;
    size_t b, i;
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(&s, RING, 1);
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(&s, "f32", 512, backends[b]);
        if (strstr(type, "unmoved")) cfg.importance = BKV_IMPORTANCE_USE;
        p[b] = make_halver(&cfg, &t);
        enter(&r, OURS, bkv_backend_name(backends[b]), gram ? sample_gram : sample_halving, p[b]);
    }
    if (!gram) {
        const uint64_t key = bkvi_draw_key(p[0]->cache[0].cfg.seed, 0, 0);
        for (i = 0; i < 128; i++) u[i] = bkvi_uniform(key, (uint32_t)i);
        require(bkv_stats(&p[0]->cache[0], &info), "bkv_stats");
        want.reference = first = first_halving(&p[0]->cache[0], info.sinks, d);
        task.k = t.k + info.sinks * t.kv;
        task.v = t.v + info.sinks * t.kv;
        task.u = u;
        enter_peers(&r, &task, &want);
        if (has_reference) enter_reference(&r, d);
    }
    run_race();
    for (b = 0; b < n_backends; b++) free_pool(p[b]);
    free(first);
    free_tokens(&t);
}
static void case_halve(const char *name) {
    static const char *const types[] = {"f32", "f32 unmoved", "f32 gram"};
    size_t i;
    unsigned d;
    for (i = 0; i < 3; i++)
        for (d = 64; d <= 128; d += 64) halve_row(name, types[i], d);
}

/* ---- attend ---- */
static double sample_attend(void *self, size_t repeats) {
    pool *p = (pool *)self;
    double start = now_ns();
    for (; repeats; repeats--) {
        attend(&p->cache[p->at], p->t, p->out);
        p->at = p->at + 1 < p->copies ? p->at + 1 : 0;
    }
    return now_ns() - start;
}

/* Copies of K and V of all heads that fill `bytes`. */
static size_t copies_in(size_t bytes, const shape *s, size_t n, const char *type) {
    return bytes / (2 * n * s->kv_heads * s->d * bits_of(type) / 8) + 1;
}

static void attend_row(const char *name, const shape *s, size_t n, const char *type, int cold) {
    double rows = (double)n * s->kv_heads;
    size_t pool_bytes = cold ? opt.pool_bytes : 0, b;
    row r = {name, type, s->d, s->group, n, 1.0, 4.0 * rows * s->group * s->d, 0.0, 1.0};
    peer_task task = {"attend",
                      type,
                      s->kv_heads * s->group,
                      s->kv_heads,
                      s->d,
                      n,
                      1,
                      copies_in(pool_bytes, s, n, bits_of(type) < 16 ? "bf16" : type), /* theirs */
                      NULL,
                      NULL,
                      NULL,
                      NULL};
    target want = {NULL, 0, 0, 1, attention_error};
    tokens t;
    pool *p[8];
    double *reference;
    if (cold) r.bytes = rows * 2.0 * s->d * (double)bits_of(type) / 8.0;
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(s, n, 1);
    want.n = want.query_size = t.q_size;
    want.reference = reference = exact(s, &t, 1, 1);
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(s, type, budget_for(n), backends[b]);
        entry *e;
        p[b] = make_pool(&cfg, &t, NULL, n, pool_bytes, 1);
        attend(&p[b]->cache[0], &t, p[b]->out);
        e = enter(&r, OURS, bkv_backend_name(backends[b]), sample_attend, p[b]);
        e->error = attention_error(p[b]->out, &want);
        check_error(label(&r), e->error, type);
    }
    task.k = t.k;
    task.v = t.v;
    task.q = t.q;
    enter_peers(&r, &task, &want);
    run_race();
    for (b = 0; b < n_backends; b++) free_pool(p[b]);
    free(reference);
    free_tokens(&t);
}

/* Attention over the tokens that a cache holds, as it holds them, in double. */
static double *exact_of_held(bkv_cache *c, const tokens *t) {
    size_t d = c->cfg.head_dim, slots, h, i, x;
    double *out = (double *)allocate(t->q_size * sizeof(double)), cap = (double)c->cfg.softcap;
    bkv_rows rows;
    bkv_stats_info s;
    require(bkv_stats(c, &s), "bkv_stats");
    slots = s.slots;
    memset(&rows, 0, sizeof rows);
    rows.k = allocate(slots * d * sizeof(float));
    rows.v = allocate(slots * d * sizeof(float));
    rows.mask = allocate(slots * sizeof(float));
    rows.type = rows.mask_type = BKV_F32;
    for (h = 0; h < c->cfg.n_q_heads; h++) {
        const float *q = t->q + h * d;
        double *o = out + h * d, sum = 0.0;
        rows.n_rows = (uint32_t)slots;
        rows.seen = rows.halvings = 0;
        require(bkv_export(c, (uint32_t)h / c->group, &rows), "bkv_export");
        for (i = 0; i < slots; i++) {
            const float *k = (float *)rows.k + i * d, *v = (float *)rows.v + i * d;
            double dot = 0.0, p;
            for (x = 0; x < d; x++) dot += (double)q[x] * (double)k[x];
            dot /= sqrt((double)d); /* of order 1, as is all of this data */
            p = exp((cap > 0.0 ? cap * tanh(dot / cap) : dot) + (double)((float *)rows.mask)[i]);
            sum += p;
            for (x = 0; x < d; x++) o[x] += p * (double)v[x];
        }
        for (x = 0; x < d; x++) o[x] /= sum;
    }
    free(rows.k);
    free(rows.v);
    free(rows.mask);
    return out;
}

static float partial_max[32], partial_sum[32];
static double sample_partial(void *self, size_t repeats) {
    pool *p = (pool *)self;
    double start = now_ns();
    for (; repeats; repeats--) {
        require(bkv_attend_partial(&p->cache[p->at], bkv_dense(p->t->q, BKV_F32), p->out,
                                   partial_max, partial_sum, 0, 1),
                "bkv_attend_partial");
        p->at = p->at + 1 < p->copies ? p->at + 1 : 0;
    }
    return now_ns() - start;
}

/* The newest token of each cache again, as a draft: nothing is learnt while it is there. */
static void redraft(pool *p, size_t n) {
    const bkv_tensor k = bkv_dense(p->t->k + (n - 1) * p->t->kv, BKV_F32);
    const bkv_tensor v = bkv_dense(p->t->v + (n - 1) * p->t->kv, BKV_F32);
    size_t i;
    for (i = 0; i < p->copies; i++) {
        require(bkv_truncate(&p->cache[i], n - 1), "bkv_truncate");
        require(bkv_append(&p->cache[i], k, v, 1, BKV_DRAFT, 0, 1), "bkv_append");
    }
}

/* With weights: of twice as many tokens as fit, and some more, as the error is estimated where a
   page ends. With a softcap. As (max, sum) partials. With a draft, which is without learning. Beside
   each, `plain`: as many tokens without. */
static void attend_variant(const char *name, const shape *s, size_t n, const char *type, int cold) {
    int weights = strstr(type, "weights") != NULL, partial = strstr(type, "partial") != NULL;
    size_t pool_bytes = cold ? opt.pool_bytes : 0, b, i;
    row r = {name, type, s->d, s->group, n, 1.0, 0.0, 0.0, 1.0};
    bkv_stats_info info;
    target want = {NULL, 0, 0, 1, attention_error};
    tokens t;
    pool *p[8], *plain[8];
    double *reference = NULL;
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(s, 2 * n, 1);
    want.n = want.query_size = t.q_size;
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(s, "f16", budget_for(n), backends[b]);
        double held;
        entry *e;
        cfg.softcap = strstr(type, "softcap") ? 3.0f : 0.0f;
        p[b] = make_pool(&cfg, &t, NULL, weights ? 2 * n + 32 : n, pool_bytes, 1);
        require(bkv_stats(&p[b]->cache[0], &info), "bkv_stats");
        held = (double)info.tokens_held * s->kv_heads;
        r.flops = held * 4.0 * s->group * s->d;
        r.bytes = cold ? held * 4.0 * s->d : 0.0;
        cfg.softcap = 0.0f;
        plain[b] = make_pool(&cfg, &t, NULL, info.tokens_held, pool_bytes, 1);
        if (!reference) want.reference = reference = exact_of_held(&p[b]->cache[0], &t);
        if (strstr(type, "draft")) redraft(p[b], n);
        (partial ? sample_partial : sample_attend)(p[b], p[b]->copies); /* ends where it began */
        for (i = 0; partial && i < t.q_size; i++) p[b]->out[i] /= partial_sum[i / s->d];
        e = enter(&r, OURS, bkv_backend_name(backends[b]), partial ? sample_partial : sample_attend,
                  p[b]);
        e->error = attention_error(p[b]->out, &want);
        check_error(label(&r), e->error, "f32");
        enter(&r, PEER, "plain", sample_attend, plain[b])->of = bkv_backend_name(backends[b]);
    }
    run_race();
    for (b = 0; b < n_backends; b++) {
        free_pool(p[b]);
        free_pool(plain[b]);
    }
    free(reference);
    free_tokens(&t);
}
static void attend_variants(const char *name, int cold) {
    static const char *const types[] = {"f16 weights", "f16 softcap", "f16 partial"};
    size_t i, s, n;
    for (i = 0; i < 3; i++)
        for (s = 0; s < N_SHAPES; s++)
            attend_variant(name, &shapes[s], opt.quick ? 1024 : 4096, types[i], cold);
    for (s = 0; s < N_SHAPES; s++)
        for (n = 512; n <= (opt.quick ? 512 : 4096) && !cold; n *= n == 512 ? 2 : 4)
            attend_variant(name, &shapes[s], n, "f16 draft", cold);
}

static const char *const attend_types[] = {"f16", "bf16", "f32", "i8", "i4"};
enum { N_TYPES = sizeof attend_types / sizeof *attend_types };

static void case_attend_hot(const char *name) {
    size_t i, s, n;
    for (i = 0; i < N_TYPES; i++)
        for (s = 0; s < N_SHAPES; s++)
            for (n = 1024; n <= (opt.quick || i ? 1024 : 4096); n *= 4)
                attend_row(name, &shapes[s], n, attend_types[i], 0);
    attend_variants(name, 0);
}

static void case_attend_cold(const char *name) {
    size_t i, s, n;
    for (s = 0; s < N_SHAPES; s++)
        for (n = 1024; n <= (opt.quick ? 1024 : 65536); n *= 4)
            attend_row(name, &shapes[s], n, "f16", 1);
    for (i = 1; i < N_TYPES; i++)
        for (s = 0; s < N_SHAPES; s++)
            attend_row(name, &shapes[s], opt.quick ? 1024 : 4096, attend_types[i], 1);
    attend_variants(name, 1);
}

/* ---- prefill: the last 512 tokens of n, causal, as one chunk ---- */
typedef struct prefiller {
    pool *p;
    unsigned char *before; /* the state that has seen n - 512 tokens */
    float *out;
} prefiller;

static double sample_prefill(void *self, size_t repeats) {
    prefiller *f = (prefiller *)self;
    bkv_cache *c = &f->p->cache[0];
    const tokens *t = f->p->t;
    size_t first = (t->n - PREFILL) * t->kv;
    double ns = 0.0, start;
    for (; repeats; repeats--) {
        memcpy(c->mem, f->before, c->state_bytes);
        start = now_ns();
        require(bkv_prefill(c, bkv_dense(t->k + first, BKV_F32), bkv_dense(t->v + first, BKV_F32),
                            bkv_dense(t->q, BKV_F32), f->out, PREFILL, 0, 0, 1),
                "bkv_prefill");
        ns += now_ns() - start;
    }
    return ns;
}

static void prefill_row(const char *name, const shape *s, size_t n) {
    double pairs = (double)PREFILL * (double)(n - PREFILL) + PREFILL * (PREFILL + 1) / 2.0;
    row r = {name, "f16", s->d, s->group, n, PREFILL, 4.0 * pairs * s->kv_heads * s->group * s->d,
             0.0,  1.0};
    peer_task task = {
        "prefill", "f16", s->kv_heads * s->group, s->kv_heads, s->d, n, PREFILL, 1, NULL, NULL,
        NULL,      NULL};
    target want = {NULL, 0, 0, 73, attention_error}; /* eight of the queries are compared */
    prefiller f[8];
    tokens t;
    double *reference;
    size_t b;
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(s, n, PREFILL);
    want.query_size = t.q_size;
    want.n = PREFILL * t.q_size;
    want.reference = reference = exact(s, &t, PREFILL, want.stride);
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(s, "f16", budget_for(n), backends[b]);
        entry *e = enter(&r, OURS, bkv_backend_name(backends[b]), sample_prefill, &f[b]);
        f[b].p = make_pool(&cfg, &t, NULL, n - PREFILL, 0, 1);
        f[b].before = (unsigned char *)allocate(f[b].p->cache[0].state_bytes);
        memcpy(f[b].before, f[b].p->cache[0].mem, f[b].p->cache[0].state_bytes);
        f[b].out = (float *)allocate(want.n * sizeof(float));
        sample_prefill(&f[b], 1);
        e->error = attention_error(f[b].out, &want);
        check_error(label(&r), e->error, "f16");
    }
    task.k = t.k;
    task.v = t.v;
    task.q = t.q;
    enter_peers(&r, &task, &want);
    run_race();
    for (b = 0; b < n_backends; b++) {
        free_pool(f[b].p);
        free(f[b].before);
        free(f[b].out);
    }
    free(reference);
    free_tokens(&t);
}

static void case_prefill(const char *name) {
    size_t s, n;
    for (s = 0; s < N_SHAPES; s++)
        for (n = 1024; n <= (opt.quick ? 1024 : 4096); n *= 4) prefill_row(name, &shapes[s], n);
}

/* ---- streams: append, growth, worst_append ---- */
enum { STEADY_BUDGET = 512, GROWTH_BUDGET = 2048 };

/* A cache on the best backend - all of them come to the same bytes - that goes through the stream
   once; pools start from its states. */
static bkv_cache *open_stream(const shape *s, size_t budget) {
    bkv_cache *c = (bkv_cache *)calloc(1, sizeof *c);
    bkv_config cfg = config(s, "f16", budget, BKV_BACKEND_AUTO);
    size_t size = bkv_size(&cfg);
    require(bkv_init(c, &cfg, allocate(size), size), "bkv_init");
    return c;
}
static void close_stream(bkv_cache *c) {
    free(c->mem);
    free(c);
}

/* 64 tokens, one by one: each layer of the pool in turn takes one, and attends if `out`. Whatever
   comes once in 64 tokens comes once, as the layers stand at different phases. */
static double stream_64(pool *p, size_t repeats, int with_attend) {
    double start = now_ns();
    size_t i;
    for (i = 0; i < 64 * repeats; i++) {
        bkv_cache *c = &p->cache[p->at];
        append(c, p->t, p->seen[p->at]++, 1);
        if (with_attend) attend(c, p->t, p->out);
        p->at = p->at + 1 < p->copies ? p->at + 1 : 0;
    }
    return now_ns() - start;
}
static double sample_append(void *self, size_t repeats) {
    return stream_64((pool *)self, repeats, 0);
}
static double sample_growth(void *self, size_t repeats) {
    return stream_64((pool *)self, repeats, 1);
}

/* Layers at n tokens, and a token more each, up to 63. */
static pool *make_phases(const bkv_config *cfg, const tokens *t, const bkv_cache *from, size_t n,
                         size_t bytes) {
    pool *p = make_pool(cfg, t, from, n, bytes, 64);
    size_t i;
    for (i = 0; i < p->copies; i++)
        for (; p->seen[i] < n + i % 64; p->seen[i]++) append(&p->cache[i], t, p->seen[i], 1);
    return p;
}

/* Tokens that 64 attends of the pool read, all together. */
static double held_in_64(const pool *p) {
    double held = 0.0;
    size_t i;
    for (i = 0; i < 64; i++) {
        bkv_stats_info s;
        bkv_stats(&p->cache[i % p->copies], &s);
        held += s.tokens_held;
    }
    return held;
}

static void case_append(const char *name) {
    size_t last = opt.quick ? 4096 : (size_t)1 << 20, n, i, b, made;
    for (i = 0; i < 2; i++) {
        const shape *s = &shapes[i];
        row r = {name, "f16", s->d, s->group, 1024, 64.0, s->kv_heads * halving_flops(s->d),
                 0.0,  1.0};
        tokens t;
        bkv_cache *c;
        pool *p[16];
        if (!wanted(&r)) continue;
        t = make_tokens(s, RING, 1);
        c = open_stream(s, STEADY_BUDGET);
        for (made = 0, n = 0; n < last; n = r.n) {
            r.n = n ? last : 1024;
            progress("%s", label(&r));
            advance(c, &t, n, r.n);
            for (b = 0; b < n_backends; b++, made++) {
                bkv_config cfg = config(s, "f16", STEADY_BUDGET, backends[b]);
                p[made] = make_pool(&cfg, &t, c, r.n, 0, 1);
                enter(&r, OURS, bkv_backend_name(backends[b]), sample_append, p[made]);
            }
        }
        run_race();
        while (made) free_pool(p[--made]);
        close_stream(c);
        free_tokens(&t);
    }
}

static entry *enter_growth(row *r, const shape *s, pool *p, size_t backend, int full) {
    double held = held_in_64(p) * s->kv_heads;
    r->flops = held * 4.0 * s->group * s->d + (full ? s->kv_heads * halving_flops(s->d) : 0.0);
    r->bytes = held * 2.0 * s->d * 2.0;
    return enter(r, OURS, bkv_backend_name(backends[backend]), sample_growth, p);
}

/* One budget, all lengths, in one race. */
static void growth_of_budget(const char *name) {
    static const size_t lengths[] = {1024, 2048, 4096, 16384, 65536, 262144, 1048576};
    const shape *s = &shapes[0];
    row r = {name, "f16", s->d, s->group, 0, 64.0, 0.0, 0.0, 1.0};
    size_t n_lengths = opt.quick ? 3 : 7, i, b, made = 0, n = 0;
    tokens t;
    bkv_cache *c;
    pool *p[56];
    if (!wanted(&r)) return;
    t = make_tokens(s, RING, 1);
    c = open_stream(s, GROWTH_BUDGET);
    for (i = 0; i < n_lengths; i++) {
        r.n = lengths[i];
        progress("%s", label(&r));
        advance(c, &t, n, r.n);
        n = r.n;
        for (b = 0; b < n_backends; b++) {
            bkv_config cfg = config(s, "f16", GROWTH_BUDGET, backends[b]);
            p[made] = make_phases(&cfg, &t, c, n, 0);
            enter_growth(&r, s, p[made++], b, n > GROWTH_BUDGET);
        }
    }
    run_race();
    while (made) free_pool(p[--made]);
    close_stream(c);
    free_tokens(&t);
}

/* A budget of n / 16, beside the peers on all n tokens. */
static void growth_of_share(const char *name, const shape *s, size_t n) {
    row r = {name, "f16 1/16", s->d, s->group, n, 64.0, 0.0, 0.0, 1.0}, whole;
    peer_task task = {"attend",
                      "f16",
                      s->kv_heads * s->group,
                      s->kv_heads,
                      s->d,
                      n,
                      1,
                      copies_in(opt.pool_bytes, s, n, "f16"),
                      NULL,
                      NULL,
                      NULL,
                      NULL};
    target want = {NULL, 0, 0, 1, attention_error};
    tokens t;
    bkv_cache *c;
    pool *p[8];
    double *reference;
    size_t b;
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(s, n, 1);
    c = open_stream(s, n / 16);
    advance(c, &t, 0, n);
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(s, "f16", n / 16, backends[b]);
        p[b] = make_phases(&cfg, &t, c, n, opt.pool_bytes);
        enter_growth(&r, s, p[b], b, 1);
    }
    want.n = want.query_size = t.q_size;
    want.reference = reference = exact(s, &t, 1, 1);
    task.k = t.k;
    task.v = t.v;
    task.q = t.q;
    whole = r;
    whole.units = 1.0;
    enter_peers(&whole, &task, &want);
    run_race();
    for (b = 0; b < n_backends; b++) free_pool(p[b]);
    free(reference);
    close_stream(c);
    free_tokens(&t);
}

static void case_growth(const char *name) {
    size_t i, n;
    growth_of_budget(name);
    for (i = 0; i < 2; i++)
        for (n = 4096; n <= (opt.quick ? 4096 : i ? 65536 : 262144); n *= 4)
            growth_of_share(name, &shapes[i], n);
}

/* The same stretch of a stream again and again; the best time of each append, and of these the
   worst. What disturbs a single append is not in it, what the append itself does is. */
enum { STRETCH = 1024 };
typedef struct stretch {
    pool *p;
    unsigned char *before;
    double best[STRETCH];
} stretch;

static double sample_stretch(void *self, size_t repeats) {
    stretch *x = (stretch *)self;
    pool *p = x->p;
    double ns = 0.0;
    size_t i;
    for (; repeats; repeats--) {
        memcpy(p->cache[0].mem, x->before, p->cache[0].state_bytes);
        for (i = 0; i < STRETCH; i++) {
            double start = now_ns(), took;
            append(&p->cache[0], p->t, p->seen[0] + i, 1);
            took = now_ns() - start;
            ns += took;
            if (x->best[i] == 0.0 || took < x->best[i]) x->best[i] = took;
        }
    }
    return ns;
}
static double worst_of_stretch(void *self) {
    const stretch *x = (const stretch *)self;
    double worst = 0.0;
    size_t i;
    for (i = 0; i < STRETCH; i++) worst = x->best[i] > worst ? x->best[i] : worst;
    return worst;
}

static void case_worst_append(const char *name) {
    size_t n = opt.quick ? 4096 : 65536, i, j, b;
    for (i = 0; i < 2; i++) {
        const shape *s = &shapes[i];
        row r = {name, "f16", s->d, s->group, n, 1.0, s->kv_heads * halving_flops(s->d), 0.0, 1.0};
        row single = r;
        shape one = {1, 1, 0};
        tokens t, t1;
        bkv_cache *c;
        stretch *x[8];
        pool *halver[8];
        if (!wanted(&r)) continue;
        progress("%s", label(&r));
        one.d = s->d;
        single.units = 1.0 / s->kv_heads;
        t = make_tokens(s, RING, 1);
        t1 = make_tokens(&one, RING, 1);
        c = open_stream(s, GROWTH_BUDGET);
        advance(c, &t, 0, n);
        for (b = 0; b < n_backends; b++) {
            bkv_config cfg = config(s, "f16", GROWTH_BUDGET, backends[b]);
            bkv_config cfg1 = config(&one, "f16", STEADY_BUDGET, backends[b]);
            x[b] = (stretch *)calloc(1, sizeof **x);
            x[b]->p = make_pool(&cfg, &t, c, n, 0, 1);
            x[b]->before = (unsigned char *)allocate(c->state_bytes);
            memcpy(x[b]->before, c->mem, c->state_bytes);
            enter(&r, OURS, bkv_backend_name(backends[b]), sample_stretch, x[b])->best =
                worst_of_stretch;
            for (j = 0; j < STRETCH; j++) { /* no append does more than one halving per KV head */
                uint64_t before = halvings(&x[b]->p->cache[0]);
                append(&x[b]->p->cache[0], &t, n + j, 1);
                if (halvings(&x[b]->p->cache[0]) - before > s->kv_heads)
                    die("worst_append: an append did more than one halving per KV head");
            }
            /* beside it: one halving, times the KV heads */
            halver[b] = make_halver(&cfg1, &t1);
            enter(&single, PEER, "halvings", sample_halving, halver[b])->of =
                bkv_backend_name(backends[b]);
        }
        run_race();
        for (b = 0; b < n_backends; b++) {
            free_pool(halver[b]);
            free_pool(x[b]->p);
            free(x[b]->before);
            free(x[b]);
        }
        close_stream(c);
        free_tokens(&t);
        free_tokens(&t1);
    }
}

/* ---- threads: two of the caller's share the KV heads of each attend ---- */
typedef struct team {
    pool *p; /* NULL: they read memory, some stretches each */
    unsigned step, done; /* operations begun; finished by the second thread */
    size_t repeats;
} team;

static void do_share(const team *x, size_t i, uint32_t ith) {
    const pool *p = x->p;
    const reader *r = memory_reader();
    size_t j;
    for (j = 0; !p && j < STRETCHES; j++)
        read_loop(r->data + ((2 * i + ith) * STRETCHES + j) * r->stretch % r->bytes, r->stretch);
    if (p)
        require(bkv_attend(&p->cache[(p->at + i) % p->copies], bkv_dense(p->t->q, BKV_F32), p->out,
                           ith, 2),
                "bkv_attend");
}
/* Spins, as a decode loop would; gives way now and then, in case both are on one core. */
static void wait_for(const unsigned *counter, unsigned value) {
    unsigned spins = 0;
    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < value)
        if (++spins % 4096 == 0) sched_yield();
}
static void *second_thread(void *self) {
    team *x = (team *)self;
    size_t i;
    __atomic_store_n(&x->done, 1, __ATOMIC_RELEASE); /* here */
    for (i = 0; i < x->repeats; i++) {
        wait_for(&x->step, (unsigned)i + 1);
        do_share(x, i, 1);
        __atomic_store_n(&x->done, (unsigned)i + 2, __ATOMIC_RELEASE);
    }
    return NULL;
}
/* An operation is TEAM_RUN steps, and as many before the clock starts: a new thread finds nothing
   of its share in the cache of its core. */
static double sample_team(void *self, size_t repeats) {
    team *x = (team *)self;
    pthread_t second;
    double ns = 0.0;
    size_t i;
    x->step = x->done = 0;
    x->repeats = (repeats + 1) * TEAM_RUN;
    if (pthread_create(&second, NULL, second_thread, x)) die("threads: no second thread");
    wait_for(&x->done, 1);
    for (i = 0; i < x->repeats; i++) {
        if (i == TEAM_RUN) ns = now_ns();
        __atomic_store_n(&x->step, (unsigned)i + 1, __ATOMIC_RELEASE);
        do_share(x, i, 0);
        wait_for(&x->done, (unsigned)i + 2);
    }
    ns = now_ns() - ns;
    pthread_join(second, NULL);
    if (x->p) x->p->at = (x->p->at + x->repeats) % x->p->copies;
    return ns;
}
static double sample_readers(void *self, size_t repeats) {
    team x = {NULL, 0, 0, 0};
    (void)self;
    return sample_team(&x, repeats);
}

static void case_threads(const char *name) {
    static const char *const types[] = {"f16", "f16 cold"};
    size_t i, b;
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) {
        if (!opt.rows) note("threads: left out, there is one processor\n");
        return;
    }
    for (i = 0; i < 2; i++) {
        const shape *s = &shapes[1];
        size_t n = i && !opt.quick ? 4096 : 1024;
        double rows = (double)n * s->kv_heads;
        row r = {
            name, types[i], s->d, s->group, n, TEAM_RUN, TEAM_RUN * 4.0 * rows * s->group * s->d,
            i ? TEAM_RUN * 4.0 * rows * s->d : 0.0, 2.0};
        row single = r;
        tokens t;
        team x[8];
        pool *alone[8];
        if (!wanted(&r)) continue;
        single.units = 1.0;
        progress("%s", label(&r));
        t = make_tokens(s, n, 1);
        for (b = 0; b < n_backends; b++) {
            bkv_config cfg = config(s, "f16", budget_for(n), backends[b]);
            cfg.n_threads = 2;
            x[b].p = make_pool(&cfg, &t, NULL, n, i ? opt.pool_bytes : 0, 1);
            alone[b] = make_pool(&cfg, &t, NULL, n, i ? opt.pool_bytes : 0, 1);
            enter(&r, OURS, bkv_backend_name(backends[b]), sample_team, &x[b]);
            enter(&single, PEER, "one_thread", sample_attend, alone[b])->of =
                bkv_backend_name(backends[b]);
        }
        run_race();
        for (b = 0; b < n_backends; b++) {
            free_pool(x[b].p);
            free_pool(alone[b]);
        }
        free_tokens(&t);
    }
}

/* ---- exp: the one internal that is measured by itself ---- */
enum { EXP_N = 4096, EXP_FMAS = 6 };
static float *exp_data;
/* In place, again and again; what `self` points to is subtracted from the exponent. With 1 the
   numbers tend to 1. `target`: the instructions of what is inlined here. */
#define EXP_SAMPLE(backend, target)                                                                \
    target static double sample_exp_##backend(void *self, size_t repeats) {                        \
        enum { WIDTH = sizeof(bkvi_vec_##backend) / sizeof(float) };                               \
        const bkvi_vec_##backend shift = bkvi_v_set_##backend(*(const float *)self);               \
        double start = now_ns();                                                                   \
        for (; repeats; repeats--)                                                                 \
            for (float *x = exp_data; x < exp_data + EXP_N; x += 4 * WIDTH) {                      \
                bkvi_vec_##backend t[4];                                                           \
                for (int k = 0; k < 4; k++) t[k] = bkvi_v_load_##backend(x + k * WIDTH) - shift;   \
                bkvi_exp2_##backend(t);                                                            \
                for (int k = 0; k < 4; k++) bkvi_v_store_##backend(x + k * WIDTH, t[k]);           \
            }                                                                                      \
        return now_ns() - start;                                                                   \
    }
#if defined(ALL_BACKENDS) && defined(__x86_64__)
EXP_SAMPLE(scalar, )
EXP_SAMPLE(avx2, __attribute__((target("avx2,fma,f16c"))))
EXP_SAMPLE(avx512, __attribute__((target("avx512f,avx2,fma,f16c"))))
#define EXP_OF(X) X(SCALAR, scalar) X(AVX2, avx2) X(AVX512, avx512)
#elif defined(ALL_BACKENDS) && defined(__aarch64__)
EXP_SAMPLE(neon, )
#define EXP_OF(X) X(NEON, neon)
#elif BALANCEKV_SIMD == BALANCEKV_SIMD_SCALAR
EXP_SAMPLE(scalar, )
#define EXP_OF(X) X(SCALAR, scalar)
#else /* a switch left few of them: not worth a case each */
#define EXP_OF(X)
#endif

static double (*exp_of(uint32_t backend))(void *, size_t) {
#define EXP_CASE(constant, name)                                                                   \
    if (backend == BKV_BACKEND_##constant) return sample_exp_##name;
    EXP_OF(EXP_CASE)
    (void)backend;
    return NULL;
}

static double exp_error(const float *result, const target *want) {
    double worst = 0.0;
    size_t i;
    for (i = 0; i < want->n; i++)
        worst = fmax(worst, fabs((double)result[i] / want->reference[i] - 1.0));
    return worst;
}

static void case_exp(const char *name) {
    row r = {name, "f32", 0, 0, EXP_N, EXP_N, 2.0 * EXP_FMAS * EXP_N, 0.0, 1.0};
    peer_task task = {"exp", "f32", 0, 0, 0, EXP_N, 0, 1, NULL, NULL, NULL, NULL};
    target want = {NULL, EXP_N, 0, 0, exp_error};
    float *x, shift[2] = {0.0f, 1.0f};
    double *of_2, *of_e;
    size_t i, b;
    if (!wanted(&r)) return;
    exp_data = (float *)allocate(EXP_N * sizeof(float));
    x = (float *)allocate(EXP_N * sizeof(float));
    of_2 = (double *)allocate(EXP_N * sizeof(double));
    of_e = (double *)allocate(EXP_N * sizeof(double));
    for (i = 0; i < EXP_N; i++) { /* as after subtracting the maximum */
        x[i] = -20.0f * (float)i / EXP_N;
        of_2[i] = exp2((double)x[i]);
        of_e[i] = exp((double)x[i]);
    }
    for (b = 0; b < n_backends; b++) {
        double (*sample)(void *, size_t) = exp_of(backends[b]);
        entry *e;
        if (!sample) continue;
        memcpy(exp_data, x, EXP_N * sizeof(float));
        sample(&shift[0], 1);
        want.reference = of_2;
        e = enter(&r, OURS, bkv_backend_name(backends[b]), sample, &shift[1]);
        e->error = exp_error(exp_data, &want);
        check_error(label(&r), e->error, "f32");
    }
    want.reference = of_e;
    task.q = x;
    enter_peers(&r, &task, &want);
    run_race();
    free(exp_data);
    free(x);
    free(of_2);
    free(of_e);
}

/* ---- the list of cases, and main ---- */
static const struct {
    const char *name;
    void (*run)(const char *name);
    const char *what;
} cases[] = {
    {"halve", case_halve, "128 tokens of one KV head become 64 (ns of a halving)"},
    {"attend_hot", case_attend_hot, "one position, the layer in the cache (ns of a token)"},
    {"attend_cold", case_attend_cold, "one position, the layer in memory (ns of a token)"},
    {"prefill", case_prefill, "the last 512 of n tokens as one chunk (ns of a token)"},
    {"append", case_append, "without attend, after n tokens (ns of a token)"},
    {"growth", case_growth, "append and attend after n tokens, fixed budget (ns of a token)"},
    {"worst_append", case_worst_append, "the slowest of 1024 appends (ns of an append)"},
    {"threads", case_threads, "attend by two threads (ns of a token)"},
    {"exp", case_exp, "2^x (ns of an element)"},
};
enum { N_CASES = sizeof cases / sizeof *cases };

/* Is most of the reader's memory on huge pages? */
static int on_huge_pages(void) {
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    char line[256];
    long kib = 0;
    while (f && !kib && fgets(line, sizeof line, f)) sscanf(line, "AnonHugePages: %ld", &kib);
    if (f) fclose(f);
    return kib > (long)(opt.pool_bytes >> 11);
}

/* The limits at a glance; each race measures those it needs again. */
static void print_limits(void) {
    static const struct {
        const char *name;
        size_t bytes;
    } levels[] = {{"L1", (size_t)16 << 10}, {"L2", (size_t)256 << 10}, {"L3", (size_t)8 << 20}};
    reader readers[3];
    unsigned lanes[8];
    row r = {"limit", "", 0, 0, 0, 1.0, 0.0, 0.0, 1.0};
    size_t i;
    for (i = 0; i < n_backends; i++) {
        lanes[i] = fma_lanes(bkv_backend_name(backends[i]));
        if (lanes[i]) enter(&r, LIMIT_FMA, bkv_backend_name(backends[i]), sample_fma, &lanes[i]);
    }
    for (i = 0; i < 3; i++) {
        readers[i].data = memory_reader()->data;
        readers[i].stretch = readers[i].bytes = levels[i].bytes;
        readers[i].at = 0;
        enter(&r, LIMIT_READ, levels[i].name, sample_read, &readers[i]);
    }
    enter(&r, LIMIT_READ, "memory", sample_read, memory_reader());
    note("memory: %s pages\n", on_huge_pages() ? "huge" : "small");
    race(list, n_entries, &opt.rules);
    for (i = 0; i < n_entries; i++) {
        if (entries[i].role == LIMIT_FMA)
            note("limit: FMA %-7s %6.1f GFLOP/s\n", list[i].name,
                 fma_gflops(list[i].best, *(unsigned *)list[i].self));
        else
            note("limit: read %-6s %6.1f GB/s\n", list[i].name,
                 (double)((reader *)list[i].self)->stretch / list[i].best);
    }
    n_entries = 0;
}

static void print_machine(void) {
    char line[256], model[256] = "unknown", load[64] = "unknown", date[32];
    time_t now = time(NULL);
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(model, sizeof model, "%s", strchr(line, ':') + 2);
            model[strcspn(model, "\n")] = '\0';
            break;
        }
    if (f) fclose(f);
    f = fopen("/proc/loadavg", "r");
    if (f && fgets(load, sizeof load, f)) load[strcspn(load, " ")] = '\0';
    if (f) fclose(f);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    note("balancekv %s, %s\ncpu: %s, %ld processors, load %s\ncompiler: "
#if defined(__clang__)
         "clang "
#else
         "gcc "
#endif
         __VERSION__ ", %s\n",
         bkv_version(), date, model, sysconf(_SC_NPROCESSORS_ONLN), load, BENCH_FLAGS);
}

static const char options[] =
    "--case NAME,.. --backend NAME,.. --filter TEXT --peers[=DIR] --json --quick --small-pages "
    "--rows --list --help";

static int usage(const char *what, const char *argument) {
    size_t i;
    fprintf(stderr, "speed: %s '%s'; choose from:", what, argument);
    if (strstr(what, "backend")) {
        for (i = 1; i < 32; i++)
            if (bkv_backends() >> i & 1) fprintf(stderr, " %s", bkv_backend_name((uint32_t)i));
    } else if (strstr(what, "case")) {
        for (i = 0; i < N_CASES; i++) fprintf(stderr, " %s", cases[i].name);
    } else {
        fprintf(stderr, " %s", options);
    }
    fputc('\n', stderr);
    return 2;
}

/* Every name of a comma-separated list must be known. */
static const char *unknown_name(const char *names, int of_backends) {
    static char name[64];
    size_t i;
    while (*names) {
        size_t n = strcspn(names, ",");
        int known = 0;
        snprintf(name, sizeof name, "%.*s", (int)n, names);
        for (i = 1; of_backends && i < 32; i++)
            known |= (bkv_backends() >> i & 1) && !strcmp(name, bkv_backend_name((uint32_t)i));
        for (i = 0; !of_backends && i < N_CASES; i++) known |= !strcmp(name, cases[i].name);
        if (!known) return name;
        names += n + (names[n] == ',');
    }
    return NULL;
}

static void choose_backends(void) {
    uint32_t b, have = bkv_backends();
    for (b = 1; b < 32; b++) {
        int chosen = opt.backends ? listed(opt.backends, bkv_backend_name(b))
                                  : b != BKV_BACKEND_SCALAR || have == 1u << BKV_BACKEND_SCALAR;
        if ((have >> b & 1) && chosen) backends[n_backends++] = b;
    }
}

/* Opens what bench/peers.sh installed, and names what it did not. */
static void find_peers(const char *given) {
    static const char *const built[] = {"ggml", "openblas", "numkong"};
    char directory[2048], script[2100], reference[2100];
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    size_t i, j;
    if (given)
        snprintf(directory, sizeof directory, "%s", given);
    else if (cache && *cache)
        snprintf(directory, sizeof directory, "%s/balancekv-peers", cache);
    else
        snprintf(directory, sizeof directory, "%s/.cache/balancekv-peers", home ? home : ".");
    objects = load_peers(directory);
    if (objects) note("peers: %s\n", objects->about);
    for (i = 0; i < 3; i++) {
        for (j = 0; objects && j < objects->count; j++)
            if (!strncmp(objects->peers[j].name, built[i], strlen(built[i]))) break;
        if (!objects || j == objects->count)
            fprintf(stderr, "speed: no %s in %s; to install it: sh bench/peers.sh\n", built[i],
                    directory);
    }
    snprintf(reference, sizeof reference, "%s/reference", directory);
    snprintf(script, sizeof script, "%s/peers_torch.py", directory);
    has_python = start_python(directory, script, reference);
    if (has_python)
        note("peers: %s\n", python.about);
    else
        fprintf(stderr, "speed: no torch in %s; to install it (3 GB): sh bench/peers.sh --torch\n",
                directory);
    strncat(reference, "/balanced_walk.py", sizeof reference - strlen(reference) - 1);
    has_reference = has_python && access(reference, R_OK) == 0;
    if (!has_reference)
        fprintf(stderr,
                "speed: no BalanceKV reference in %s; to add it: sh bench/peers.sh --torch "
                "--reference DIR (the folder of its balanced_walk.py)\n",
                directory);
}

int main(int argc, char **argv) {
    const char *directory = NULL;
    int i;
    size_t c;
    for (i = 1; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--case") || !strcmp(a, "--backend") || !strcmp(a, "--filter")) {
            if (!value) return usage("no value after", a);
            *(a[2] == 'c' ? &opt.cases : a[2] == 'b' ? &opt.backends : &opt.filter) = value;
            i++;
        } else if (!strcmp(a, "--json")) {
            opt.json = 1;
        } else if (!strcmp(a, "--rows")) {
            opt.rows = 1;
        } else if (!strcmp(a, "--small-pages")) {
            if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)) die("small pages: no such system call");
        } else if (!strcmp(a, "--quick")) {
            const race_rules few = {7, 3, 1e5, 3e8};
            opt.quick = 1;
            opt.rules = few;
            opt.pool_bytes = (size_t)128 << 20; /* in 32 MiB of L3 a pool may stay */
        } else if (!strncmp(a, "--peers", 7) && (!a[7] || (a[7] == '=' && a[8]))) {
            opt.peers = 1;
            directory = a[7] ? a + 8 : NULL;
        } else if (!strcmp(a, "--list") || !strcmp(a, "--help")) {
            if (a[2] == 'h')
                printf("usage: speed %s\nRows whose label contains the filter, as 'd64 g3': --rows "
                       "names them, a stream by where it begins. Peers as bench/peers.sh has "
                       "installed them. Cases:\n",
                       options);
            for (c = 0; c < N_CASES; c++) printf("%-12s %s\n", cases[c].name, cases[c].what);
            return 0;
        } else {
            return usage("unknown option", a);
        }
    }
    if (opt.cases && unknown_name(opt.cases, 0))
        return usage("unknown case", unknown_name(opt.cases, 0));
    if (opt.backends && unknown_name(opt.backends, 1))
        return usage("no such backend here", unknown_name(opt.backends, 1));
    choose_backends();
    if (!opt.rows) print_machine();
    if (opt.peers && !opt.rows) find_peers(directory);
    if (!opt.rows) print_limits();
    if (!opt.json && !opt.rows)
        printf("\n%-12s %4s %3s %8s  %-9s %-7s %9s\n", "case", "d", "grp", "n", "type", "backend",
               "time");
    for (c = 0; c < N_CASES; c++) {
        size_t before = n_wanted;
        if (opt.cases && !listed(opt.cases, cases[c].name)) continue;
        cases[c].run(cases[c].name);
        if (opt.cases && *opt.filter && n_wanted == before)
            fprintf(stderr, "speed: no row of %s contains '%s'; --rows names them\n",
                    cases[c].name, opt.filter);
    }
    stop_python();
    if (*opt.filter && !n_wanted) {
        fprintf(stderr, "speed: no row contains '%s'; without --filter it shows all\n", opt.filter);
        return 2;
    }
    return failures > 0;
}
