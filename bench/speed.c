/* speed.c - how fast the cache is, as a share of what the machine can do and beside other systems.

       build/bench/speed [--peers[=DIR]] [--json] [--quick] [--case NAME,..] [--backend NAME,..]

   Every line is one race (measure.h): the limits of the machine, our backends and the peers take
   turns in short samples, and the best sample of each counts. bench/README.md says what each case
   means. Exit code 0; 1: a check failed or a call did; 2: wrong usage. */
#define _GNU_SOURCE /* MADV_HUGEPAGE, CLOCK_MONOTONIC, dlopen */
#define BALANCEKV_STATIC
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <unistd.h>

#include "limits.h"
#include "measure.h"
#include "peers.h"

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "unknown flags"
#endif

enum { RING = 4096, MAX_ENTRIES = 96, PREFILL = 512 };

/* ---- options and output ---- */
static struct {
    int json, quick, peers;
    const char *cases, *backends, *filter;
    size_t pool_bytes; /* what a cold case cycles through */
    race_rules rules;
} opt = {0, 0, 0, NULL, NULL, "", (size_t)256 << 20, {60, 9, 3e5, 3e9}};
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

/* Text beside the results: in the table, or out of the way of the JSON lines. */
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
    double error;               /* relative, against the same in double; < 0: no such thing */
    unsigned lanes;             /* ours, LIMIT_FMA: of the backend's multiply-add */
    double (*best)(void *self); /* if it is not simply the best sample */
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

static int wanted(const row *r) { return strstr(label(r), opt.filter) != NULL; }

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

/* Peers of a row of ours: those of the same n. */
static int beside(size_t other, size_t ours) {
    return entries[other].role == PEER && entries[other].r.n == entries[ours].r.n;
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
    } else {
        printf("%-12s %4u %3u %8zu  %-9s %-7s %9s", r->name, r->d, r->group, r->n, r->type,
               list[i].name, readable(ns));
        if (share > 0.0) printf("  %5.1f %% of %s", 100.0 * share, of);
        if (e->error >= 0.0) printf("  error %.1e", e->error);
        printf("\n");
    }
    for (j = 0; j < n_entries; j++)
        if (beside(j, i)) {
            note(opt.json ? "peer %s: %s %s, %.2f times %s (%s)"
                          : "%0.0s    %-28s %9s  x %.2f of %s",
                 label(r), list[j].name, readable(result(j)), result(j) / ns, list[i].name,
                 readable(ns));
            if (entries[j].error >= 0.0)
                note("  error %.1e, ours %.1e", entries[j].error, e->error);
            note("\n");
        }
    fflush(stdout);
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
            enter(r, LIMIT_READ, "read", sample_read, memory_reader());
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
                part = r->bytes / ns / ((double)memory_reader()->stretch / list[j].best);
                if (part > share) share = part, of = "read";
            }
        }
        print_row(i, share, of);
    }
    n_entries = 0;
}

/* ---- backends ---- */
static uint32_t backends[8];
static size_t n_backends;

static uint32_t type_of(const char *name) {
    return strncmp(name, "f32", 3) == 0   ? BKV_F32
           : strncmp(name, "f16", 3) == 0 ? BKV_F16
                                          : BKV_BF16;
}
static size_t bytes_of(const char *type) { return type_of(type) == BKV_F32 ? 4 : 2; }

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
static void attend(bkv_cache *c, const tokens *t, float *out) {
    require(bkv_attend(c, bkv_dense(t->q, BKV_F32), out, 0, 1), "bkv_attend");
}

/* Exact attention in double: query i of n_queries sees all tokens but the last n_queries - 1 - i. */
static double *exact(const shape *s, const tokens *t, size_t n_queries) {
    size_t heads = (size_t)s->kv_heads * s->group, d = s->d, i, h, j, x;
    double *out = (double *)allocate(n_queries * heads * d * sizeof(double));
    double *score = (double *)allocate(t->n * sizeof(double));
    for (i = 0; i < n_queries; i++)
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

static double relative_error(const float *x, const double *reference, size_t n) {
    double off = 0.0, all = 0.0;
    size_t i;
    for (i = 0; i < n; i++) {
        off += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        all += reference[i] * reference[i];
    }
    return sqrt(off / all);
}

/* What attention in this storage type may be off by, on this data. */
static double tolerance_of(const char *type) {
    return type_of(type) == BKV_F32 ? 1e-5 : type_of(type) == BKV_F16 ? 1e-3 : 1e-2;
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

/* Layers that have seen n tokens of t: as many as fill `bytes`, a multiple of `unit`. */
static pool *make_pool(const bkv_config *cfg, const tokens *t, size_t n, size_t bytes,
                       size_t unit) {
    pool *p = (pool *)calloc(1, sizeof *p);
    size_t size = bkv_size(cfg), stride = (size + 63) & ~(size_t)63, i;
    p->copies = (bytes / stride / unit + 1) * unit;
    p->cache = (bkv_cache *)calloc(p->copies, sizeof *p->cache);
    p->seen = (size_t *)calloc(p->copies, sizeof *p->seen);
    p->mem = (unsigned char *)allocate(p->copies * stride);
    p->t = t;
    p->out = (float *)allocate(t->q_size * sizeof(float));
    require(bkv_init(&p->cache[0], cfg, p->mem, size), "bkv_init");
    for (i = 0; i < n; i += 64) append(&p->cache[0], t, i, n - i < 64 ? n - i : 64);
    for (i = 0; i < p->copies; i++) {
        unsigned char *mem = p->mem + i * stride;
        if (i > 0) memcpy(mem, p->mem, p->cache[0].state_bytes);
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

/* ---- halve ---- */
typedef struct halver {
    pool *p;
    double ns;
} halver;

static uint64_t halvings(const bkv_cache *c) {
    bkv_stats_info s;
    bkv_stats(c, &s);
    return s.halvings;
}

/* One append in 64 halves; only that one is timed. */
static double sample_halving(void *self, size_t repeats) {
    pool *p = (pool *)self;
    bkv_cache *c = &p->cache[0];
    uint64_t before = halvings(c);
    double ns = 0.0, start;
    size_t i;
    for (i = 0; i < repeats; i++) {
        append(c, p->t, p->seen[0], 63);
        attend(c, p->t, p->out);
        start = now_ns();
        append(c, p->t, p->seen[0] + 63, 1);
        ns += now_ns() - start;
        p->seen[0] += 64;
    }
    if (halvings(c) - before != repeats * c->cfg.n_kv_heads)
        die("halve: %u appends that should halve once per KV head did so %u times",
            (unsigned)repeats, (unsigned)(halvings(c) - before));
    return ns;
}

/* One layer, just behind a halving. */
static pool *make_halver(const bkv_config *cfg, const tokens *t) {
    pool *p = make_pool(cfg, t, 0, 0, 1);
    while (halvings(&p->cache[0]) == 0) append(&p->cache[0], t, p->seen[0]++, 1);
    return p;
}

static double halving_flops(unsigned d) { return 2.0 * (128 * 127 / 2) * 2.0 * d; }

static void case_halve(const char *name) {
    static const struct {
        const char *type;
        uint32_t rule;
    } kinds[] = {{"f32", BKV_RULE_DEFAULT}, {"f32 walk", BKV_RULE_WALK}};
    unsigned d;
    size_t i, b;
    for (i = 0; i < 2; i++)
        for (d = 64; d <= 128; d += 64) {
            row r = {name, kinds[i].type, d, 1, 128, 1.0, halving_flops(d), 0.0, 1.0};
            shape s = {1, 1, 0};
            tokens t;
            pool *p[8];
            s.d = d;
            if (!wanted(&r)) continue;
            progress("%s", label(&r));
            t = make_tokens(&s, RING, 1);
            for (b = 0; b < n_backends; b++) {
                bkv_config cfg = config(&s, "f32", 512, backends[b]);
                cfg.rule = kinds[i].rule;
                p[b] = make_halver(&cfg, &t);
                enter(&r, OURS, bkv_backend_name(backends[b]), sample_halving, p[b]);
            }
            run_race();
            for (b = 0; b < n_backends; b++) free_pool(p[b]);
            free_tokens(&t);
        }
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

static void attend_row(const char *name, const shape *s, size_t n, const char *type, int cold) {
    double rows = (double)n * s->kv_heads;
    row r = {name, type, s->d, s->group, n, 1.0, 4.0 * rows * s->group * s->d, 0.0, 1.0};
    tokens t;
    pool *p[8];
    double *reference;
    size_t b;
    if (cold) r.bytes = rows * 2.0 * s->d * (double)bytes_of(type);
    if (!wanted(&r)) return;
    progress("%s", label(&r));
    t = make_tokens(s, n, 1);
    reference = exact(s, &t, 1);
    for (b = 0; b < n_backends; b++) {
        bkv_config cfg = config(s, type, budget_for(n), backends[b]);
        entry *e;
        p[b] = make_pool(&cfg, &t, n, cold ? opt.pool_bytes : 0, 1);
        attend(&p[b]->cache[0], &t, p[b]->out);
        e = enter(&r, OURS, bkv_backend_name(backends[b]), sample_attend, p[b]);
        e->error = relative_error(p[b]->out, reference, t.q_size);
        check_error(label(&r), e->error, type);
    }
    run_race();
    for (b = 0; b < n_backends; b++) free_pool(p[b]);
    free(reference);
    free_tokens(&t);
}

static void case_attend_hot(const char *name) {
    static const char *const types[] = {"f16", "bf16", "f32"};
    size_t i, s, n;
    for (i = 0; i < 3; i++)
        for (s = 0; s < N_SHAPES; s++)
            for (n = 1024; n <= (opt.quick || i ? 1024 : 4096); n *= 4)
                attend_row(name, &shapes[s], n, types[i], 0);
}

static void case_attend_cold(const char *name) {
    static const char *const types[] = {"f16", "bf16", "f32"};
    size_t i, s, n;
    for (s = 0; s < N_SHAPES; s++)
        for (n = 1024; n <= (opt.quick ? 1024 : 65536); n *= 4)
            attend_row(name, &shapes[s], n, "f16", 1);
    for (i = 1; i < 3; i++)
        for (s = 0; s < N_SHAPES; s++)
            attend_row(name, &shapes[s], opt.quick ? 1024 : 4096, types[i], 1);
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
};
enum { N_CASES = sizeof cases / sizeof *cases };

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

static int usage(const char *what, const char *argument) {
    size_t i;
    fprintf(stderr, "speed: %s '%s'; choose from:", what, argument);
    if (strstr(what, "backend")) {
        for (i = 1; i < 32; i++)
            if (bkv_backends() >> i & 1) fprintf(stderr, " %s", bkv_backend_name((uint32_t)i));
    } else if (strstr(what, "case")) {
        for (i = 0; i < N_CASES; i++) fprintf(stderr, " %s", cases[i].name);
    } else {
        fprintf(stderr, " --case NAME,.. --backend NAME,.. --filter TEXT --peers[=DIR] --json "
                        "--quick --list");
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

int main(int argc, char **argv) {
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
        } else if (!strcmp(a, "--quick")) {
            const race_rules few = {7, 3, 1e5, 3e8};
            opt.quick = 1;
            opt.rules = few;
            opt.pool_bytes = (size_t)32 << 20;
        } else if (!strcmp(a, "--list")) {
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
    print_machine();
    print_limits();
    if (!opt.json)
        printf("\n%-12s %4s %3s %8s  %-9s %-7s %9s\n", "case", "d", "grp", "n", "type", "backend",
               "time");
    for (c = 0; c < N_CASES; c++)
        if (!opt.cases || listed(opt.cases, cases[c].name)) cases[c].run(cases[c].name);
    return failures > 0;
}
