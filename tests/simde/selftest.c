/* The emulated AVX-512 operations against a scalar model, bit for bit: an emulation that rounded
   twice or mixed up lanes would make the comparison of backends worthless. */
#include "test.h"
#include <immintrin.h>

enum { ROUNDS = 20000 };

typedef union lanes {
    float f[16];
    uint32_t u[16];
    uint16_t h[32];
    double d[8];
} lanes;

static lanes a, b, c, got; /* the operands of a round, and what the emulation makes of them */

static __m512 vector(const lanes *x) { return _mm512_loadu_ps(x); }
static void keep(__m512 x) { _mm512_storeu_ps(&got, x); }
static __m512i bits(const lanes *x) { return _mm512_castps_si512(vector(x)); }
static void keep_bits(__m512i x) { keep(_mm512_castsi512_ps(x)); }
static void keep_half(__m256i x) { _mm256_storeu_si256((__m256i *)(void *)&got, x); }

/* All magnitudes, zeros and subnormals; close ones too, so that sums cancel. No NaN. */
static float any_float(void) {
    static const float special[] = {0.0f, -0.0f, 1.0f, 1e-40f, 65519.0f, 65520.0f, 5.9604645e-8f};
    uint32_t r = random_bits(), choice = r % 16;
    if (choice < COUNT(special)) return special[choice];
    if (choice < 12) return (float)random_normal();
    return (float)ldexp((double)(r >> 8) - 8388608.0, (int)(random_below(200)) - 120);
}

static void new_operands(void) {
    for (int i = 0; i < 16; i++) {
        a.f[i] = any_float();
        b.f[i] = any_float();
        c.f[i] = random_below(2) ? any_float() : -(a.f[i] * b.f[i]);
        if (!isfinite(c.f[i])) c.f[i] = 1.0f;
    }
}

static int same(float x, float y) { return memcmp(&x, &y, sizeof x) == 0; }
static float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Runs an operation on fresh operands again and again; `good` must hold of every lane i. */
#define LANES(n_lanes, operation, good)                                                            \
    for (int round = 0; round < ROUNDS; round++) {                                                 \
        new_operands();                                                                            \
        operation;                                                                                 \
        for (int i = 0; i < (n_lanes); i++) CHECKF(good, "%s, lane %d", #operation, i);            \
    }
#define FLOATS(operation, model) LANES(16, keep(operation), same(got.f[i], model))
#define WORDS(operation, model) LANES(16, keep_bits(operation), got.u[i] == (model))

static void arithmetic(void) {
    FLOATS(_mm512_add_ps(vector(&a), vector(&b)), a.f[i] + b.f[i])
    FLOATS(_mm512_sub_ps(vector(&a), vector(&b)), a.f[i] - b.f[i])
    FLOATS(_mm512_mul_ps(vector(&a), vector(&b)), a.f[i] * b.f[i])
    FLOATS(_mm512_div_ps(vector(&a), _mm512_set1_ps(b.f[3] + 2.5f)), a.f[i] / (b.f[3] + 2.5f))
    FLOATS(_mm512_fmadd_ps(vector(&a), vector(&b), vector(&c)), fmaf(a.f[i], b.f[i], c.f[i]))
    FLOATS(_mm512_max_ps(vector(&a), vector(&b)), a.f[i] > b.f[i] ? a.f[i] : b.f[i])
    FLOATS(_mm512_min_ps(vector(&a), vector(&b)), a.f[i] < b.f[i] ? a.f[i] : b.f[i])
    FLOATS(_mm512_abs_ps(vector(&a)), from_bits(a.u[i] & 0x7FFFFFFFu))
    FLOATS(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(vector(&a), vector(&b), _CMP_GT_OQ), vector(&c),
                                vector(&a)),
           a.f[i] > b.f[i] ? a.f[i] : c.f[i])
}

static void integers(void) {
    WORDS(_mm512_add_epi32(bits(&a), bits(&b)), a.u[i] + b.u[i])
    WORDS(_mm512_and_si512(bits(&a), bits(&b)), (a.u[i] & b.u[i]))
    WORDS(_mm512_slli_epi32(bits(&a), 16), a.u[i] << 16)
    WORDS(_mm512_slli_epi32(bits(&a), 23), a.u[i] << 23)
    WORDS(_mm512_srli_epi32(bits(&a), 16), a.u[i] >> 16)
    WORDS(_mm512_set1_epi32((int)a.u[5]), a.u[5])
}

static void conversions(void) {
    WORDS(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(void *)&a)), a.h[i])
    LANES(16, keep_half(_mm512_cvtepi32_epi16(bits(&a))), got.h[i] == (uint16_t)a.u[i])
    LANES(16, keep_half(_mm512_maskz_cvtps_ph((__mmask16)(b.u[0] | 0xF0Fu), vector(&a), 0)),
          got.h[i] == ((b.u[0] | 0xF0Fu) >> i & 1 ? encode((double)a.f[i], BKV_F16) : 0))
    for (uint32_t first = 0; first < 0x10000; first += 16) {
        for (uint32_t i = 0; i < 16; i++) a.h[i] = (uint16_t)(first + i);
        keep(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(void *)&a)));
        for (uint32_t i = 0; i < 16; i++) {
            double want = decode(first + i, BKV_F16);
            CHECKF(isnan(want) ? isnan(got.f[i]) : same(got.f[i], (float)want), "f16 %x",
                   first + i);
        }
    }
}

static void lanes_move(void) {
    FLOATS(_mm512_unpacklo_ps(vector(&a), vector(&b)), (i % 2 ? b : a).f[i / 4 * 4 + i % 4 / 2])
    FLOATS(_mm512_unpackhi_ps(vector(&a), vector(&b)), (i % 2 ? b : a).f[i / 4 * 4 + i % 4 / 2 + 2])
    FLOATS(_mm512_castpd_ps(
               _mm512_unpacklo_pd(_mm512_castps_pd(vector(&a)), _mm512_castps_pd(vector(&b)))),
           (i / 2 % 2 ? b : a).f[i / 4 * 4 + i % 2])
    FLOATS(_mm512_castpd_ps(
               _mm512_unpackhi_pd(_mm512_castps_pd(vector(&a)), _mm512_castps_pd(vector(&b)))),
           (i / 2 % 2 ? b : a).f[i / 4 * 4 + i % 2 + 2])
    FLOATS(_mm512_shuffle_f32x4(vector(&a), vector(&b), 0x88),
           (i < 8 ? a : b).f[i / 4 % 2 * 8 + i % 4])
    FLOATS(_mm512_shuffle_f32x4(vector(&a), vector(&b), 0xDD),
           (i < 8 ? a : b).f[i / 4 % 2 * 8 + 4 + i % 4])
    LANES(8, _mm256_storeu_ps(got.f, _mm512_castps512_ps256(vector(&a))), same(got.f[i], a.f[i]))
    LANES(8, _mm256_storeu_pd(got.d, _mm512_extractf64x4_pd(_mm512_castps_pd(vector(&a)), 1)),
          same(got.f[i], a.f[i + 8]))
}

int main(int argc, char **argv) {
    TEST_MAIN(T(arithmetic), T(integers), T(conversions), T(lanes_move));
}
