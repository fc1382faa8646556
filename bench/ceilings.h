/* ceilings.h - what the machine can do at most, so that a share is a share of something: fused
   multiply-adds in registers of a backend's width, and bytes read in order. */
#ifndef BENCH_CEILINGS_H
#define BENCH_CEILINGS_H

#include <stddef.h>
#include <stdint.h>

enum { READ_STEP = 1024 }; /* bytes of one turn of read_loop() */

#if defined(__x86_64__)
/* 14 independent chains and two operands: 16 registers, and more chains than two units of latency
   four can use. The clobbers are xmm: the wider registers are the same ones. */
#define FMA_CHAINS 14
#define FMA_ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define FMA_CLOBBERS                                                                               \
    "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define FMA_LOOP(name, X)                                                                          \
    static void name(size_t n) {                                                                   \
        __asm__ volatile("vxorps %%xmm14, %%xmm14, %%xmm14\n vxorps %%xmm15, %%xmm15, %%xmm15\n"   \
                         "1:\n" FMA_ALL(X) "dec %0\n jnz 1b\n vzeroupper"                          \
                         : "+r"(n)                                                                 \
                         :                                                                         \
                         : FMA_CLOBBERS);                                                          \
    }
#define FMA_512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA_256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define FMA_ONE(i) "vfmadd231ss %%xmm14, %%xmm15, %%xmm" #i "\n"
FMA_LOOP(fma_loop_512, FMA_512)
FMA_LOOP(fma_loop_256, FMA_256)
FMA_LOOP(fma_loop_one, FMA_ONE)

static void fma_loop(unsigned lanes, size_t n) {
    if (lanes == 16)
        fma_loop_512(n);
    else if (lanes == 8)
        fma_loop_256(n);
    else
        fma_loop_one(n);
}

/* Lanes of one fused multiply-add of a backend; 0: this CPU has none. */
static unsigned fma_lanes(const char *backend) {
    if (!__builtin_cpu_supports("fma")) return 0;
    return strcmp(backend, "avx512") == 0 ? 16 : strcmp(backend, "avx2") == 0 ? 8 : 1;
}

#define READ_512(i) "vmovups " #i "*64(%0), %%zmm" #i "\n"
#define READ_256(i) "vmovups " #i "*64(%0), %%ymm" #i "\n vmovups " #i "*64+32(%0), %%ymm" #i "\n"
#define READ_128(i)                                                                                \
    "movups " #i "*64(%0), %%xmm" #i "\n movups " #i "*64+16(%0), %%xmm" #i "\n movups " #i        \
    "*64+32(%0), %%xmm" #i "\n movups " #i "*64+48(%0), %%xmm" #i "\n"
#define READ_LOOP(X, end)                                                                          \
    __asm__ volatile("1:\n" FMA_ALL(X) X(14) X(15) "add %2, %0\n dec %1\n jnz 1b\n" end            \
                     : "+r"(p), "+r"(n)                                                            \
                     : "i"(READ_STEP)                                                              \
                     : "memory", FMA_CLOBBERS)
static void read_loop(const char *p, size_t bytes) {
    size_t n = bytes / READ_STEP;
    if (__builtin_cpu_supports("avx512f"))
        READ_LOOP(READ_512, "vzeroupper");
    else if (__builtin_cpu_supports("avx2"))
        READ_LOOP(READ_256, "vzeroupper");
    else
        READ_LOOP(READ_128, "");
}

#elif defined(__aarch64__)
/* 24 chains: four units of latency four, and some. */
#define FMA_CHAINS 24
#define FMA_ALL(X)                                                                                 \
    X(0)                                                                                           \
    X(1)                                                                                           \
    X(2)                                                                                           \
    X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
        X(20) X(21) X(22) X(23)
#define FMA_CLOBBERS                                                                               \
    "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13",  \
        "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25"
#define FMA_LOOP(X)                                                                                \
    __asm__ volatile("movi v24.4s, #0\n movi v25.4s, #0\n"                                         \
                     "1:\n" FMA_ALL(X) "subs %0, %0, #1\n b.ne 1b"                                 \
                     : "+r"(n)                                                                     \
                     :                                                                             \
                     : FMA_CLOBBERS)
#define FMA_128(i) "fmla v" #i ".4s, v24.4s, v25.4s\n"
#define FMA_ONE(i) "fmadd s" #i ", s24, s25, s" #i "\n"
static void fma_loop(unsigned lanes, size_t n) {
    if (lanes == 4)
        FMA_LOOP(FMA_128);
    else
        FMA_LOOP(FMA_ONE);
}
static unsigned fma_lanes(const char *backend) { return strcmp(backend, "neon") == 0 ? 4 : 1; }

#define READ_64(i) "ldp q0, q1, [%0, #" #i "*64]\n ldp q2, q3, [%0, #" #i "*64+32]\n"
static void read_loop(const char *p, size_t bytes) {
    size_t n = bytes / READ_STEP;
    __asm__ volatile("1:\n" READ_64(0) READ_64(1) READ_64(2) READ_64(3) READ_64(4) READ_64(5)
                         READ_64(6) READ_64(7) "add %0, %0, #512\n" READ_64(0) READ_64(1) READ_64(2)
                             READ_64(3) READ_64(4) READ_64(5) READ_64(6)
                                 READ_64(7) "add %0, %0, #512\n subs %1, %1, #1\n b.ne 1b"
                     : "+r"(p), "+r"(n)
                     :
                     : "memory", "cc", "v0", "v1", "v2", "v3");
}

#else /* no probe of the arithmetic: its share stays unknown */
#define FMA_CHAINS 1
static void fma_loop(unsigned lanes, size_t n) { (void)lanes, (void)n; }
static unsigned fma_lanes(const char *backend) { return (void)backend, 0; }
static void read_loop(const char *p, size_t bytes) {
    const volatile uint64_t *word = (const volatile uint64_t *)(const void *)p;
    size_t i;
    for (i = 0; i < bytes / 8; i += 4)
        (void)word[i], (void)word[i + 1], (void)word[i + 2], (void)word[i + 3];
}
#endif
#endif
