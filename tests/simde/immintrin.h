/* Stands before the system's <immintrin.h> on the include path, so that the AVX-512 block of
   balancekv.h runs on hosts without AVX-512: 256-bit intrinsics stay native, 512-bit ones come from
   SIMDe. The flags that belong to it stand in meson.build (option simde); BALANCEKV_EMULATED tells
   the header that no CPU needs to be asked. An operation that neither SIMDe nor this file has does
   not compile.
   tests/simde/selftest.c compares every operation with a scalar model. */
#ifndef BKV_TESTS_SIMDE_IMMINTRIN_H
#define BKV_TESTS_SIMDE_IMMINTRIN_H

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the AVX-512 shim needs -mavx2 -mfma -mf16c: without them its fmadd would round twice"
#endif
#ifdef __AVX512F__
#error "the AVX-512 shim must not be compiled with AVX-512 on: it would test the real instructions"
#endif

#pragma GCC system_header /* SIMDe is not clean at -Wconversion, and need not be */
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

/* What SIMDe 0.7 lacks, or has wrong, through the two native halves. */
static inline __m512 bkvt_join_ps(__m256 low, __m256 high) {
    simde__m512_private r;
    r.m256[0] = low;
    r.m256[1] = high;
    return simde__m512_from_private(r);
}
static inline __m512i bkvt_join_si(__m256i low, __m256i high) {
    simde__m512i_private r;
    r.m256i[0] = low;
    r.m256i[1] = high;
    return simde__m512i_from_private(r);
}
static inline __m256 bkvt_half_ps(__m512 a, int high) {
    return simde__m512_to_private(a).m256[high];
}
static inline __m256i bkvt_half_si(__m512i a, int high) {
    return simde__m512i_to_private(a).m256i[high];
}

static inline __m256i bkvt_maskz_epi16(__mmask16 mask, __m256i a) {
    simde__m256i_private r = simde__m256i_to_private(a);
    for (int i = 0; i < 16; i++)
        if (!(mask >> i & 1)) r.u16[i] = 0;
    return simde__m256i_from_private(r);
}

static inline __m512 bkvt_cvtph_ps(__m256i a) {
    return bkvt_join_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                        _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
static inline __m512i bkvt_cvtepu16_epi32(__m256i a) {
    return bkvt_join_si(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                        _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
static inline __m256i bkvt_cvtepi32_epi16(__m512i a) { /* truncates, unlike packus */
    const __m256i low16 = _mm256_set1_epi32(0xffff);
    __m256i r = _mm256_packus_epi32(_mm256_and_si256(bkvt_half_si(a, 0), low16),
                                    _mm256_and_si256(bkvt_half_si(a, 1), low16));
    return _mm256_permute4x64_epi64(r, 0xd8); /* packus works within 128-bit lanes */
}
static inline __m512 bkvt_abs_ps(__m512 a) { /* SIMDe's leaves -0 as it is */
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
static inline __m512 bkvt_shuffle_f32x4(__m512 a, __m512 b, int quarters) {
    simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b), r;
    r.m128[0] = x.m128[quarters & 3];
    r.m128[1] = x.m128[quarters >> 2 & 3];
    r.m128[2] = y.m128[quarters >> 4 & 3];
    r.m128[3] = y.m128[quarters >> 6 & 3];
    return simde__m512_from_private(r);
}

#undef _mm512_abs_ps
#undef _mm512_cvtph_ps
#undef _mm512_maskz_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_shuffle_f32x4
#define _mm512_abs_ps(a) bkvt_abs_ps(a)
#define _mm512_cvtph_ps(a) bkvt_cvtph_ps(a)
#define _mm512_maskz_cvtps_ph(mask, a, rounding)                                                   \
    bkvt_maskz_epi16(mask, _mm256_set_m128i(_mm256_cvtps_ph(bkvt_half_ps(a, 1), rounding),         \
                                            _mm256_cvtps_ph(bkvt_half_ps(a, 0), rounding)))
#define _mm512_cvtepu16_epi32(a) bkvt_cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) bkvt_cvtepi32_epi16(a)
#define _mm512_shuffle_f32x4(a, b, quarters) bkvt_shuffle_f32x4(a, b, quarters)

#endif
