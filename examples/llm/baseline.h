/* baseline.h - a layer kept by one of the streaming methods of bench/baselines.h, for comparison. */
#ifndef BASELINE_H
#define BASELINE_H

#include "llm.h"

typedef struct baseline baseline;

/* NULL: the budget is below *least, or there is no memory. */
baseline *baseline_new(const char *method, const llm_shape *shape, const bkv_config *cfg,
                       uint32_t layer, uint32_t *least);
void baseline_free(baseline *b);
int baseline_reset(baseline *b); /* 0: no memory */
/* What its slots would take in the kv_type of cfg. It computes in f32: without rounding, for it. */
size_t baseline_bytes(const baseline *b);

/* As bkv_prefill(): a share of the heads, of all tokens of a step. */
void baseline_attend(baseline *b, struct ggml_tensor *out, int ith, int nth);

/* Is there a streaming method of that name? */
int baseline_known(const char *method);

#endif /* BASELINE_H */
