/* exact.c - see exact.h. Vectors of 8 doubles by the compiler (gcc and clang lower them to whatever
   the target has); flags that help: -O3 -march=native -ffp-contract=fast. */
#include "exact.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef double lanes __attribute__((vector_size(64)));
typedef int64_t int_lanes __attribute__((vector_size(64)));

enum { LANES = 8, KEYS = 64, VECTORS = KEYS / LANES, ROWS = 2 }; /* of a tile */

/* e^x for x <= 0, within 2 ulp: 2^n times a Taylor series on |r| <= ln(2) / 2. */
static inline __attribute__((always_inline)) void exp_lanes(lanes *x) {
    static const double inverse[] = {1.0 / 2,        1.0 / 6,         1.0 / 24,
                                     1.0 / 120,      1.0 / 720,       1.0 / 5040,
                                     1.0 / 40320,    1.0 / 362880,    1.0 / 3628800,
                                     1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800}; /* 1/i! */
    const double shifter = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer */
    lanes n, r, p = {0};
    int_lanes bits = *x > -700; /* below, e^x is next to nothing: e^-700 will do */
    *x = (lanes)(((int_lanes)*x & bits) | ((int_lanes)(p - 700) & ~bits));
    n = *x * 1.4426950408889634 + shifter;
    bits = (int_lanes)n;
    n -= shifter;
    r = *x - n * 6.93147180369123816490e-01; /* ln 2 in two parts, the first with zeros behind */
    r -= n * 1.90821492927058770002e-10;
    for (int i = 11; i >= 0; i--) p = p * r + inverse[i];
    p = (p * r + 1) * r + 1;
    *x = (lanes)((int_lanes)p + (bits << 52)); /* shifts all but the integer out of bits */
}

/* scratch: keys [head_dim][KEYS] and values [KEYS][padded value_dim] of a tile, queries and outputs
   of all rows, their maxima and sums. Rows are in pairs: the last one may be a copy. */
typedef struct job {
    size_t group, n_rows, dim, v_dim;
    double *keys, *values, *q, *out, *max, *sum;
} job;

static size_t round_up(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }

static job make_job(const exact_input *in, void *scratch) {
    job j;
    j.group = in->n_q_heads / in->n_kv_heads;
    j.n_rows = round_up(EXACT_QUERIES * j.group, ROWS);
    j.dim = in->head_dim;
    j.v_dim = round_up(in->value_dim, LANES);
    j.keys = (double *)(((uintptr_t)scratch + 63) / 64 * 64);
    j.values = j.keys + j.dim * KEYS;
    j.out = j.values + KEYS * j.v_dim;
    j.q = j.out + j.n_rows * j.v_dim;
    j.max = j.q + j.n_rows * j.dim;
    j.sum = j.max + j.n_rows;
    return j;
}

size_t exact_scratch_bytes(const exact_input *in) {
    size_t rows = round_up(EXACT_QUERIES * (in->n_q_heads / in->n_kv_heads), ROWS);
    size_t v_dim = round_up(in->value_dim, LANES);
    return ((in->head_dim + v_dim) * (KEYS + rows) + 2 * rows) * sizeof(double) + 64;
}

static void load_tile(const exact_input *in, const job *j, size_t kv_head, size_t start,
                      size_t n_keys) {
    for (size_t i = 0; i < KEYS; i++) {
        size_t at = start + (i < n_keys ? i : 0); /* what is beyond gets no weight */
        const float *k = in->k + (at * in->n_kv_heads + kv_head) * in->head_dim;
        const float *v = in->v + (at * in->n_kv_heads + kv_head) * in->value_dim;
        for (size_t d = 0; d < j->dim; d++) j->keys[d * KEYS + i] = (double)k[d];
        for (size_t d = 0; d < j->v_dim; d++)
            j->values[i * j->v_dim + d] = d < in->value_dim ? (double)v[d] : 0;
    }
}

/* One tile for ROWS rows, of which row r sees the first visible[r] keys. */
static void attend_tile(const job *j, size_t row, const size_t *visible) {
    lanes logit[ROWS][VECTORS], *out = (lanes *)(j->out + row * j->v_dim);
    const double *q = j->q + row * j->dim;
    size_t v_vectors = j->v_dim / LANES;
    memset(logit, 0, sizeof logit);
    for (size_t d = 0; d < j->dim; d++) {
        const lanes *k = (const lanes *)(j->keys + d * KEYS);
        for (int x = 0; x < VECTORS; x++)
            for (int r = 0; r < ROWS; r++) logit[r][x] += k[x] * q[(size_t)r * j->dim + d];
    }
    for (int r = 0; r < ROWS; r++) {
        double *s = (double *)logit[r], *max = &j->max[row + (size_t)r], old = *max, sum = 0;
        for (size_t i = 0; i < visible[r]; i++) *max = s[i] > *max ? s[i] : *max;
        for (int x = 0; x < VECTORS; x++) {
            logit[r][x] -= *max;
            exp_lanes(&logit[r][x]);
        }
        for (size_t i = 0; i < KEYS; i++) sum += i < visible[r] ? s[i] : (s[i] = 0);
        old = exp(old - *max);
        j->sum[row + (size_t)r] = j->sum[row + (size_t)r] * old + sum;
        if (old < 1)
            for (size_t x = 0; x < v_vectors; x++) out[(size_t)r * v_vectors + x] *= old;
    }
    for (size_t x0 = 0; x0 < v_vectors; x0 += VECTORS) {
        size_t n = v_vectors - x0 < VECTORS ? v_vectors - x0 : VECTORS;
        lanes sum[ROWS][VECTORS];
        memset(sum, 0, sizeof sum);
        for (size_t i = 0; i < KEYS; i++) {
            const lanes *v = (const lanes *)(j->values + i * j->v_dim) + x0;
            double p[ROWS];
            for (int r = 0; r < ROWS; r++) p[r] = ((double *)logit[r])[i];
            if (n == VECTORS) { /* a constant count keeps the sums in registers */
                for (int x = 0; x < VECTORS; x++)
                    for (int r = 0; r < ROWS; r++) sum[r][x] += v[x] * p[r];
            } else {
                for (size_t x = 0; x < n; x++)
                    for (int r = 0; r < ROWS; r++) sum[r][x] += v[x] * p[r];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (size_t x = 0; x < n; x++) out[(size_t)r * v_vectors + x0 + x] += sum[r][x];
    }
}

void exact_attend(const exact_input *in, size_t kv_head, size_t first, size_t step,
                  size_t n_queries, double *out, void *scratch) {
    job j = make_job(in, scratch);
    size_t n_rows = n_queries * j.group, end = first + (n_queries - 1) * step + 1;
    for (size_t r = 0; r < round_up(n_rows, ROWS); r++) {
        size_t x = r < n_rows ? r : n_rows - 1, at = first + x / j.group * step;
        const float *q =
            in->q + (at * in->n_q_heads + kv_head * j.group + x % j.group) * in->head_dim;
        for (size_t d = 0; d < j.dim; d++) j.q[r * j.dim + d] = (double)q[d] * in->scale;
        j.max[r] = -HUGE_VAL;
        j.sum[r] = 0;
    }
    memset(j.out, 0, round_up(n_rows, ROWS) * j.v_dim * sizeof *j.out);
    for (size_t start = 0; start < end; start += KEYS) {
        load_tile(in, &j, kv_head, start, end - start);
        for (size_t r = 0; r < n_rows; r += ROWS) {
            size_t visible[ROWS], most = 0;
            for (size_t x = 0; x < ROWS; x++) {
                size_t row = r + x < n_rows ? r + x : n_rows - 1;
                size_t seen = first + row / j.group * step + 1;
                visible[x] = seen <= start ? 0 : seen - start < KEYS ? seen - start : KEYS;
                most = visible[x] > most ? visible[x] : most;
            }
            if (most) attend_tile(&j, r, visible);
        }
    }
    for (size_t r = 0; r < n_rows; r++) {
        double *o =
            out + (r / j.group * in->n_q_heads + kv_head * j.group + r % j.group) * in->value_dim;
        for (size_t d = 0; d < in->value_dim; d++) o[d] = j.out[r * j.v_dim + d] / j.sum[r];
    }
}
