/* slots.c - see slots.h. */
#include "slots.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t int_lanes __attribute__((vector_size(64), aligned(4), may_alias));

enum { LANES = 16, PANELS = 2, VECTORS = 4, ROWS = 4 }; /* of a register tile */

#define ALWAYS_INLINE inline __attribute__((always_inline))

slots *slots_new(size_t dim, size_t v_dim, size_t capacity) {
    slots *s = (slots *)calloc(1, sizeof *s);
    size_t unit = LANES * PANELS;
    if (!s) return NULL;
    s->dim = dim;
    s->v_dim = v_dim;
    s->v_stride = (v_dim + LANES * VECTORS - 1) / (LANES * VECTORS) * (LANES * VECTORS);
    s->capacity = (capacity + unit - 1) / unit * unit;
    s->k = (float *)calloc(s->capacity * dim, sizeof *s->k);
    s->v = (float *)calloc(s->capacity * s->v_stride, sizeof *s->v);
    s->numerator = (float *)calloc(s->capacity, sizeof *s->numerator);
    s->denominator = (float *)calloc(s->capacity, sizeof *s->denominator);
    s->position = (uint32_t *)calloc(s->capacity, sizeof *s->position);
    if (s->k && s->v && s->numerator && s->denominator && s->position) return s;
    slots_free(s);
    return NULL;
}

void slots_free(slots *s) {
    if (!s) return;
    free(s->k);
    free(s->v);
    free(s->numerator);
    free(s->denominator);
    free(s->position);
    free(s);
}

/* To nearest f16, ties to even; below 2^-14 f16 has a fixed unit, that of floats of 0.5 to 1. */
static float round_to_f16(float x) {
    uint32_t bits;
    if (fabsf(x) < 6.103515625e-5f) {
        volatile float shifted = fabsf(x) + 0.5f; /* not to be optimised away */
        return copysignf(shifted - 0.5f, x);
    }
    memcpy(&bits, &x, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    bits &= ~0x1fffu;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

static float *key_at(const slots *s, size_t i) {
    return s->k + i / LANES * LANES * s->dim + i % LANES;
}

void slots_put(slots *s, size_t i, const float *k, const float *v, uint32_t position) {
    float *to = key_at(s, i);
    for (size_t d = 0; d < s->dim; d++) to[d * LANES] = round_to_f16(k[d]);
    for (size_t d = 0; d < s->v_dim; d++) s->v[i * s->v_stride + d] = round_to_f16(v[d]);
    s->numerator[i] = s->denominator[i] = 1;
    s->position[i] = position;
}

void slots_move(slots *s, size_t to, size_t from) {
    float *a = key_at(s, to);
    const float *b = key_at(s, from);
    if (to == from) return;
    for (size_t d = 0; d < s->dim; d++) a[d * LANES] = b[d * LANES];
    memcpy(s->v + to * s->v_stride, s->v + from * s->v_stride, s->v_stride * sizeof *s->v);
    s->numerator[to] = s->numerator[from];
    s->denominator[to] = s->denominator[from];
    s->position[to] = s->position[from];
}

void slots_key(const slots *s, size_t i, float *k) {
    const float *from = key_at(s, i);
    for (size_t d = 0; d < s->dim; d++) k[d] = from[d * LANES];
}

/* rows is a constant at each call, so that the sums stay in registers. */
static ALWAYS_INLINE void logits_tile(const slots *s, const float *q, size_t rows, float scale,
                                      float *p) {
    for (size_t i = 0; i < s->held; i += LANES * PANELS) {
        const float *k = s->k + i * s->dim;
        lanes sum[ROWS][PANELS];
        memset(sum, 0, sizeof sum);
        for (size_t d = 0; d < s->dim; d++)
            for (size_t x = 0; x < PANELS; x++) {
                lanes key = *(const lanes *)(k + (x * s->dim + d) * LANES);
                for (size_t r = 0; r < rows; r++) sum[r][x] += key * q[r * s->dim + d];
            }
        for (size_t r = 0; r < rows; r++)
            for (size_t x = 0; x < PANELS; x++)
                *(lanes *)(p + r * s->capacity + i + x * LANES) = sum[r][x] * scale;
    }
}

void slots_logits(const slots *s, const float *q, size_t rows, float scale, float *p) {
    for (size_t r = 0; r < rows; r += ROWS, q += ROWS * s->dim, p += ROWS * s->capacity) {
        size_t n = rows - r;
        if (n >= 4)
            logits_tile(s, q, 4, scale, p);
        else if (n == 3)
            logits_tile(s, q, 3, scale, p);
        else if (n == 2)
            logits_tile(s, q, 2, scale, p);
        else
            logits_tile(s, q, 1, scale, p);
    }
}

/* e^x for x <= 0, within some ulp: 2^n times a Taylor series on |r| <= ln(2) / 2. */
static ALWAYS_INLINE void exp_lanes(float *x) {
    lanes a = *(lanes *)x, n, r, y = {0};
    int_lanes bits = a > -87; /* below, e^x is next to nothing: e^-87 will do */
    a = (lanes)(((int_lanes)a & bits) | ((int_lanes)(y - 87) & ~bits));
    n = a * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    bits = (int_lanes)n;
    n -= 12582912.0f;
    r = a - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    y = r * (1.0f / 720) + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = (y * r + 1) * r + 1;
    *(lanes *)x = (lanes)((int_lanes)y + (bits << 23));
}

void slots_exp(const slots *s, size_t rows, float *p, float *max) {
    for (size_t r = 0; r < rows; r++, p += s->capacity) {
        size_t i;
        float top = p[0];
        for (i = 1; i < s->held; i++) top = p[i] > top ? p[i] : top;
        max[r] = top;
        for (i = 0; i < s->held; i += LANES) {
            *(lanes *)(p + i) -= top;
            exp_lanes(p + i);
        }
        memset(p + s->held, 0, (s->capacity - s->held) * sizeof *p);
    }
}

static ALWAYS_INLINE void output_tile(const slots *s, const float *p, size_t rows, float *out) {
    for (size_t d = 0; d < s->v_dim; d += LANES * VECTORS) {
        lanes sum[ROWS][VECTORS];
        memset(sum, 0, sizeof sum);
        for (size_t i = 0; i < s->held; i++) {
            const float *v = s->v + i * s->v_stride + d;
            for (size_t r = 0; r < rows; r++) {
                float w = p[r * s->capacity + i] * s->numerator[i];
                for (size_t x = 0; x < VECTORS; x++)
                    sum[r][x] += *(const lanes *)(v + x * LANES) * w;
            }
        }
        for (size_t r = 0; r < rows; r++) {
            size_t n = s->v_dim - d < LANES * VECTORS ? s->v_dim - d : LANES * VECTORS;
            memcpy(out + r * s->v_dim + d, sum[r], n * sizeof *out);
        }
    }
}

void slots_output(const slots *s, const float *p, size_t rows, float *sum, float *out) {
    for (size_t r = 0; r < rows; r++) {
        lanes total = {0};
        for (size_t i = 0; i < s->capacity; i += LANES)
            total +=
                *(const lanes *)(p + r * s->capacity + i) * *(const lanes *)(s->denominator + i);
        sum[r] = 0;
        for (size_t x = 0; x < LANES; x++) sum[r] += total[x];
    }
    if (!out) return;
    for (size_t r = 0; r < rows; r += ROWS, p += ROWS * s->capacity, out += ROWS * s->v_dim) {
        size_t n = rows - r;
        if (n >= 4)
            output_tile(s, p, 4, out);
        else if (n == 3)
            output_tile(s, p, 3, out);
        else if (n == 2)
            output_tile(s, p, 2, out);
        else
            output_tile(s, p, 1, out);
    }
}
