/* slots.h - weighted tokens of one KV head and softmax attention over them, in float: the common
   ground of the baselines. Vectors by the compiler, as in exact.c. */
#ifndef SLOTS_H
#define SLOTS_H

#include <stddef.h>
#include <stdint.h>

typedef struct slots {
    size_t dim, v_dim, v_stride;    /* elements of a key, of a value, of a value's row */
    size_t capacity, held;          /* slots 0..held-1 are in use */
    float *k;                       /* [capacity / 16][dim][16] */
    float *v;                       /* [capacity][v_stride] */
    float *numerator, *denominator; /* weights [capacity], normally 1 */
    uint32_t *position;             /* [capacity] */
} slots;

/* Capacity is rounded up; NULL if there is no memory. */
slots *slots_new(size_t dim, size_t v_dim, size_t capacity);
void slots_free(slots *s);

/* Writes slot i, rounded to f16 as a cache would hold it, with weights 1. */
void slots_put(slots *s, size_t i, const float *k, const float *v, uint32_t position);
void slots_move(slots *s, size_t to, size_t from);
void slots_key(const slots *s, size_t i, float *k);

/* p[r * capacity + i] = scale * <q_r, k_i> for the slots in use; q: [rows][dim]. */
void slots_logits(const slots *s, const float *q, size_t rows, float scale, float *p);

/* p = e^(logit - max) of each row, 0 for slots not in use. */
void slots_exp(const slots *s, size_t rows, float *p, float *max);

/* sum[r] = sum_i denominator_i p_ri, out[r * v_dim + ..] = sum_i numerator_i p_ri v_i.
   out may be NULL. */
void slots_output(const slots *s, const float *p, size_t rows, float *sum, float *out);

#endif /* SLOTS_H */
