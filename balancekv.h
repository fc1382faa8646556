/* balancekv.h - v0.1.0 - an attention cache of fixed size for language models - MIT or Unlicense

   Keys and values of a transformer go in, one token or one chunk at a time; attention comes out.
   The memory is one block of the caller's, of a size known beforehand, and neither it nor the time
   per token grows with the stream. As long as the tokens fit the budget the result is exact softmax
   attention; beyond it, an estimate from a weighted subset ("BalanceKV", arXiv 2502.07861).

   Use: copy this file. In exactly one C or C++ file:
       #define BALANCEKV_IMPLEMENTATION
       #include "balancekv.h"
   and then, per transformer layer (complete program: examples/minimal.c):
       bkv_config cfg = bkv_config_default(n_q_heads, n_kv_heads, head_dim, budget);
       size_t bytes = bkv_size(&cfg);                       // 0: bkv_check(&cfg) says why
       void *mem = take_from_your_arena(bytes);             // any block of yours
       bkv_cache cache;
       bkv_result r = bkv_init(&cache, &cfg, mem, bytes);
       // for every token: keys after RoPE, [n_kv_heads][head_dim]; queries [n_q_heads][head_dim]
       r = bkv_append(&cache, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), 1, 0, 0, 1);
       r = bkv_attend(&cache, bkv_dense(q, BKV_F32), out, 0, 1);   // out: [n_q_heads][value_dim]

   Where is what (search for the tag):
     §1  >>manual    words, the method, memory, threads, errors, arithmetic
     §2  >>config    compile-time switches
     §3  >>api       types and functions
     §4  >>platform  compilers and CPUs; the only place that names them
     §5  >>scalar    conversions, exact FMA, random numbers
     §6  >>dispatch  which backends exist, and choosing one
     §7  >>halving   128 tokens become 64: the rules
     §8  >>stream    pages: layout of the state, append, which pages to halve
     §9  >>attend    softmax attention over the pages
     §10 >>public    argument checks and the public functions, in the order of §3
     §11 >>vec       16 float lanes: one block per backend      (compiled once per backend)
     §12 >>kernels   the inner loops, written once over §11     (compiled once per backend)
     §13 >>licence

   ---- §1 MANUAL --------------------------------------------------------------------- >>manual

   Words. Token: a (key, value) pair of one KV head, the key after RoPE. Group: query heads per KV
     head (GQA). Slot: storage of a token, with its position, an f32 weight (w >= 1, the number of
     tokens that it stands for) and an f32 use (sum of squared shares of attention while it was
     young). Sinks, window: the first and the newest tokens, kept exactly. Page: 64 slots; pages are
     in the order of their tokens. Level of a page: how often its tokens went through a halving,
     which makes one page of two neighbours. Budget: slots per KV head, everything included.

   The estimate. For a query q, over all kept tokens i:
         out = sum_i w_i e^(s_i) v_i / sum_i w_i e^(s_i),     s_i = <q, k_i> * scale
     Weights stand in the numerator AND in the denominator. With softcap c > 0 the logit is
     c * tanh(s_i / c). While nothing was halved all w_i are 1 and this is exact attention.

   The method (docs/method.md; to the last tie in tests/golden/README.md). Tokens fill the sinks,
     then page after page. When no page is free, one halving frees one: two neighbours older than
     the window, the least halved, the oldest. 64 of the 128 tokens stay, with chances p by
     importance, and weigh w / p from then on. Tokens then change places, and at last the values of
     those that stay by chance move, while that shortens the error under the kernel of the paper,
         K_ij = a_i a_j exp(<k~_i, k~_j> * scale * temp - m) * (<v_i, v_j> + c).
     Attention teaches a cache the queries' means and the uses of its two newest pages.

   Memory. bkv_size() bytes, state and n_threads * scratch. The state holds no pointer: it may be
     copied, moved, mapped, then bkv_attach()ed. Any alignment works; 64 is fastest. Frames stay
     below 1 KiB. The library calls mem{cpy,set,move} and nothing else.
   Storage. f32, f16 and bf16 round every element. BKV_I8 turns rows by Hadamard matrices, which
     spreads outliers, and keeps bytes, BKV_I4 4 bits, with one scale (bf16) per token and KV head.
     From 512 slots on the first 16 sinks and the newest page, of 4 bits a quarter of the pages up
     to four, have as many bits again for what rounding left.
   Threads. None inside, no global mutable state. A call with (ith, nth) does its share of the KV
     heads, (0, 1) all; all nth calls, with equal arguments, come before the next operation on the
     cache. The result does not depend on nth.
   Errors. A negative bkv_result; the cache is then unchanged. Inputs are checked first, NaN and Inf
     included: a key or value must be finite in kv_type (|x| < 65520 for f16), all below 2^55.
   Arithmetic. Same input bytes + same config => same output and state bytes on every backend,
     compiler and optimisation level, for any nth and any chunking of the same tokens: one correctly
     rounded fused multiply-add (of doubles where the CPU has none), one reduction tree, own 2^x.
     BALANCEKV_FMA=0 rounds products: a second class of bits, as equal everywhere; states go from
     one to the other. Not under -ffast-math, nor where denormals are flushed. */

/* ---- §2 CONFIG --------------------------------------------------------------------- >>config
   BALANCEKV_IMPLEMENTATION   Affects: compiles the functions.  Define in exactly one file.
   BALANCEKV_STATIC           Affects: all functions become static, private to this file.
   BALANCEKV_API              Affects: decoration of public functions (DLL).  Default: extern.
   BALANCEKV_SIMD             Affects: the widest backend compiled in.
                              Values: BALANCEKV_SIMD_AUTO, _SCALAR, _AVX2, _AVX512, _NEON.
                              Default: AUTO (up to AVX512 on x86-64, AVX2 on i386; AArch64: NEON).
   BALANCEKV_DISPATCH         Affects: 1 compiles every backend up to BALANCEKV_SIMD, bkv_init picks
                              one (no -m flag needed); 0 compiles one, the widest that the flags
                              allow or BALANCEKV_SIMD names.  Default: 1 on x86, 0 elsewhere.
   BALANCEKV_HEAD_DIM         Affects: code size. The one head_dim = value_dim this copy supports;
                              others give BKV_E_HEAD_DIM.  Values: 1..512.  Default: any.
   BALANCEKV_KV_TYPE          Affects: code size. The one kv_type supported; others: BKV_E_KV_TYPE.
                              Values: BALANCEKV_F32, _F16, _BF16, _I8, _I4.  Default: any.
   BALANCEKV_HEADER_NAME      Affects: the file's name if you rename it.  Default: "balancekv.h".
   BALANCEKV_SIMDE            Affects: 1 makes the block of BALANCEKV_SIMD (NEON, which is then the
                              default, or AVX512) from SIMDe's functions, for any CPU; simde/ must
                              be on the include path.  Values: 0, 1.  Default: 0.
   BALANCEKV_FMA              Affects: the bits, see §1. 0 rounds every product before it is added:
                              faster where no fused multiply-add exists.  Values: 0, 1.  Default: 1.
   BALANCEKV_ALLOW_FAST_MATH  Affects: lets -ffast-math compile; results are then not reproducible.

   No switch changes a public type: files of different switches link. Only FMA changes results. */
#ifndef BKVI_PASS /* the file includes itself for §11 and §12; everything else is read once */
#ifndef BALANCEKV_H
#define BALANCEKV_H

#define BALANCEKV_SIMD_AUTO 1
#define BALANCEKV_SIMD_SCALAR 2
#define BALANCEKV_SIMD_AVX2 3
#define BALANCEKV_SIMD_AVX512 4
#define BALANCEKV_SIMD_NEON 5

#define BALANCEKV_F32 1
#define BALANCEKV_F16 2
#define BALANCEKV_BF16 3
#define BALANCEKV_I8 4
#define BALANCEKV_I4 5

/* ---- §3 PUBLIC API -------------------------------------------------------------------- >>api */
#include <stddef.h>
#include <stdint.h>

#define BKV_VERSION_MAJOR 0
#define BKV_VERSION_MINOR 1
#define BKV_VERSION_PATCH 0
#define BKV_VERSION "0.1.0"

#ifndef BALANCEKV_API
#if defined(BALANCEKV_STATIC) && (defined(__GNUC__) || defined(__clang__))
#define BALANCEKV_API static __attribute__((unused))
#elif defined(BALANCEKV_STATIC)
#define BALANCEKV_API static
#else
#define BALANCEKV_API extern
#endif
#endif
#if defined(__GNUC__) || defined(__clang__)
#define BKV_MUST_USE __attribute__((warn_unused_result))
#else
#define BKV_MUST_USE
#endif
#ifdef __cplusplus
extern "C" {
#endif

/* Results. Every failing call leaves the cache as it was. One list makes the enum and the texts. */
#define BKV_RESULTS(X)                                                                             \
    X(BKV_OK, 0, "ok")                                                                             \
    X(BKV_E_NULL, -1, "a required pointer is NULL")                                                \
    X(BKV_E_HEADS, -2, "n_kv_heads must be 1..4096 and n_q_heads 1..16 times as many")             \
    X(BKV_E_HEAD_DIM, -3, "head_dim and value_dim must be 1..512 (and BALANCEKV_HEAD_DIM if set)") \
    X(BKV_E_KV_TYPE, -4, "kv_type must be BKV_F32, _F16, _BF16, _I8 or _I4 (and compiled in)")     \
    X(BKV_E_BUDGET, -5, "budget is smaller than sinks + window + two pages of 64, or above 2^24")  \
    X(BKV_E_RULE, -6, "unknown rule or importance, or rounds above 64")                            \
    X(BKV_E_PARAM, -7, "temp, scale or softcap is out of range")                                   \
    X(BKV_E_BACKEND, -8, "this CPU, or this build, does not have the requested backend")           \
    X(BKV_E_THREADS, -9, "need ith < nth <= n_threads <= 1024")                                    \
    X(BKV_E_SIZE, -10, "the cache, or a tensor's extent, does not fit the address space")          \
    X(BKV_E_MEMORY, -11, "the memory block is smaller than bkv_size() says")                       \
    X(BKV_E_STATE, -12, "these bytes are not a balancekv state, or it is damaged")                 \
    X(BKV_E_VERSION, -13, "this state is of another version or byte order")                        \
    X(BKV_E_TYPE, -14, "a tensor's type must be BKV_F32, BKV_F16 or BKV_BF16")                     \
    X(BKV_E_STRIDE, -15, "a tensor's strides are too small: its elements would overlap")           \
    X(BKV_E_COUNT, -16, "n_tokens must be at least 1")                                             \
    X(BKV_E_FLAGS, -17, "unknown flag")                                                            \
    X(BKV_E_VALUE, -18, "K, V or q holds NaN, Inf or a number too large for the cache")            \
    X(BKV_E_EMPTY, -19, "the cache holds no token yet")                                            \
    X(BKV_E_INDEX, -20, "head or token index out of range")                                        \
    X(BKV_E_ROLLBACK, -21, "these tokens are not there, or already part of a halving")

typedef enum bkv_result {
#define BKV_X(name, value, text) name = value,
    BKV_RESULTS(BKV_X)
#undef BKV_X
        BKV_RESULT_FORCE_INT = 0x7fffffff
} bkv_result;

/* Element types of tensors and of the cache; integers of the cache alone, see §1. 0 is no type. */
enum { BKV_F32 = BALANCEKV_F32, BKV_F16 = BALANCEKV_F16, BKV_BF16 = BALANCEKV_BF16 };
enum { BKV_I8 = BALANCEKV_I8, BKV_I4 = BALANCEKV_I4 };

/* Halving rules: BKV_RULE_SAMPLE, the default, see §1; BKV_RULE_WINDOW keeps the newer 64. */
enum { BKV_RULE_DEFAULT = 0, BKV_RULE_SAMPLE = 1, BKV_RULE_WINDOW = 2 };

/* What BKV_RULE_SAMPLE takes for important: keys unlike the others (needs no queries), what the
   queries' means expect, use; BKV_NONE: weights alone. Values move under KEY or QUERY only. */
enum { BKV_IMPORTANCE_KEY = 1, BKV_IMPORTANCE_QUERY = 2, BKV_IMPORTANCE_USE = 4 };

/* Flags of bkv_append() and bkv_prefill(). PIN: every halving leaves these tokens as they are, 32
   of a block at most, but under BKV_RULE_WINDOW. DRAFT: tokens on trial (speculative decoding).
   While the newest tokens are drafts, attention teaches the cache nothing, so that bkv_truncate()
   leaves no trace of them; the next token without it accepts those left. */
enum { BKV_PIN = 1, BKV_DRAFT = 2 };

/* Backends. All give the same bits. BKV_BACKEND_AUTO takes the fastest that this CPU has. */
enum { BKV_BACKEND_AUTO = 0, BKV_BACKEND_SCALAR = 1, BKV_BACKEND_AVX2 = 2 };
enum { BKV_BACKEND_AVX512 = 3, BKV_BACKEND_NEON = 4 };

/* For the fields of bkv_config in which 0 means "default": really none. */
#define BKV_NONE 0xFFFFFFFFu

/* A cache: one transformer layer, or any set of KV heads that share a shape. 0 means default, so
   a zeroed struct with the four fields of bkv_config_default() set is complete. */
typedef struct bkv_config {
    uint32_t n_q_heads;  /* query heads; 0: as many as n_kv_heads */
    uint32_t n_kv_heads; /* KV heads, 1..4096; required */
    uint32_t head_dim;   /* elements of a key or query, 1..512; required */
    uint32_t value_dim;  /* elements of a value, 1..512; 0: head_dim */
    uint32_t kv_type;    /* storage: BKV_F32, _F16, _BF16, _I8, _I4; 0: BKV_F16 */
    uint32_t budget;     /* slots per KV head, everything included, up to 2^24; required */
    uint32_t sinks;      /* first tokens kept exactly, rounded up to 16; 0: 4; or BKV_NONE */
    uint32_t window;     /* newest tokens kept exactly, rounded up to 64; 0: budget / 4 rounded
                            down to 64, below 512 slots 64, if two pages remain; or BKV_NONE */
    uint32_t rule;       /* BKV_RULE_*; 0: BKV_RULE_SAMPLE */
    uint32_t importance; /* BKV_IMPORTANCE_*, added up, or BKV_NONE; 0: all of them */
    uint32_t rounds;     /* of exchanges, up to 64; 0: 1; BKV_NONE: none, nor do values move */
    uint32_t backend;    /* BKV_BACKEND_*; 0: the fastest this CPU has */
    uint32_t n_threads;  /* most threads that share one call, 1..1024; 0: 1 */
    float temp;          /* factor on the logits of the kernel of §1, 1e-6..1e6; 0: 0.1 */
    float scale;         /* factor on <q, k>, 1e-6..8, as is scale * temp; 0: 1/sqrt(head_dim) */
    float softcap;       /* logit softcap as in Gemma 2, 1..100; 0: none */
    uint64_t seed;       /* of the halvings; give each layer its own */
} bkv_config;

/* bkv_size() as a constant expression, for static arrays: of what bkv_config_default() gives, with
   this kv_type, n_q_heads not 0. Checks nothing, bkv_init() does. See examples/freestanding.c. */
#define BKV_SIZE(n_q_heads, n_kv_heads, head_dim, budget, kv_type)                                 \
    (256 + 64 + 142336 + 512 * BKV_SIZE_ROW(head_dim, kv_type) + /* header, scratch */             \
     BKV_SIZE_HEAD((n_q_heads) / (n_kv_heads), (size_t)(budget) / 16 * 16, kv_type,                \
                   (kv_type) == BALANCEKV_I4 ? BKV_SIZE_ROW(head_dim, kv_type) : (head_dim),       \
                   BKV_SIZE_ROW(head_dim, kv_type), BKV_SIZE_PAD(head_dim, 16)) *                  \
         (n_kv_heads))
#define BKV_SIZE_ROW(dim, type) BKV_SIZE_PAD(dim, (type) == BALANCEKV_I4 ? 32 : 16)
#define BKV_SIZE_HEAD(group, slots, type, k, v, query)                                             \
    (64 + BKV_SIZE_PAD(((slots)-16) / 64 * 8, 64) + 4 * (query) * (group) + 12 * (slots) +         \
     ((type) < BALANCEKV_I8 ? 0 : 2 * BKV_SIZE_PAD((slots)*2, 64)) + /* scales */                  \
     BKV_SIZE_OF(k, BKV_SIZE_RESTS(slots, type), type) + BKV_SIZE_OF(k, slots, type) +             \
     BKV_SIZE_OF(v, BKV_SIZE_RESTS(slots, type), type) + BKV_SIZE_OF(v, slots, type))
#define BKV_SIZE_RESTS(slots, type) /* of 16 sinks and the newest pages */                         \
    ((type) < BALANCEKV_I8 || (slots) < 512 ? 0 : (type) == BALANCEKV_I8 ? 80                      \
     : 16 + ((slots) < 1040 ? ((slots)-16) / 256 : 4) * 64)
#define BKV_SIZE_OF(dim, slots, type) /* bytes, of half a byte each of BKV_I4 */                   \
    BKV_SIZE_PAD((size_t)(dim) * (slots) / 2 * ((type) == BALANCEKV_F32  ? 8                       \
                                                : (type) < BALANCEKV_I8  ? 4                       \
                                                : (type) == BALANCEKV_I8 ? 2 : 1), 64)
#define BKV_SIZE_PAD(n, unit) (((size_t)(n) + (unit)-1) / (unit) * (unit))

/* A tensor of the caller's: element (token t, head h, index i) is at
       (char *)data + t * token_stride + h * head_stride + i * elem_stride        (bytes).
   Strides of 0 mean dense [n_tokens][n_heads][dim]. Any alignment. Read-only to the library. */
typedef struct bkv_tensor {
    const void *data;
    uint32_t type; /* BKV_F32, BKV_F16, BKV_BF16 */
    size_t token_stride, head_stride, elem_stride;
} bkv_tensor;

/* A cache handle: fields are private, the size is not. Holds the only pointer to the memory. Copy
   it freely. After bkv_shrink() through one copy the others are stale; bkv_attach() renews them. */
typedef struct bkv_cache {
    unsigned char *mem;
    bkv_config cfg; /* every default resolved; backend is the one in use */
    uint32_t group, slots, sink_slots, n_pages, window_pages, rests;
    size_t elem_bytes, at[13], each[12]; /* parts of a head: offset, bytes per slot, page or head */
    size_t head_bytes, scratch_bytes, state_bytes, bytes;
} bkv_cache;

/* Kind of a kept token. */
enum { BKV_KIND_SINK = 1, BKV_KIND_PAGE = 2, BKV_KIND_WINDOW = 3 };

typedef struct bkv_token_info {
    uint64_t position; /* index of the token in the stream, modulo 2^32 */
    float weight;      /* tokens it stands for */
    float use;         /* observed use, see §1; pinned: 0 */
    uint32_t kind;     /* BKV_KIND_*; PAGE covers all that is neither sink nor window */
    uint32_t level;    /* halvings it went through */
    uint32_t pinned;   /* 1: by BKV_PIN, and in force */
} bkv_token_info;

typedef struct bkv_stats_info {
    uint64_t tokens_seen; /* appended since init or reset */
    uint64_t halvings;    /* sum over KV heads */
    uint32_t tokens_held; /* per KV head, <= slots */
    uint32_t slots;       /* per KV head: the budget after rounding */
    uint32_t sinks;       /* slots of the sinks after rounding */
    uint32_t window;      /* exact newest tokens after rounding */
    uint32_t n_pages;     /* pages per KV head */
    uint32_t room;        /* tokens that fit, and can be taken back, until a halving (or page) */
    uint32_t backend;     /* BKV_BACKEND_* in use */
    uint32_t rule;        /* BKV_RULE_* in use */
    uint32_t max_level;   /* highest level of any page */
    float max_weight;     /* heaviest kept token of any head */
    float error;          /* mean of bkv_error() over the KV heads */
    size_t bytes;         /* bkv_size() */
    size_t state_bytes;   /* the first bytes of the block: all that must be copied or saved */
} bkv_stats_info;

/* Of every function below, unless it says otherwise: constant cost; no pointer is kept; any thread
   may call it, but no two at a time on one cache, except as shares (ith, nth) of one operation. */

/* A config with every default filled in, so that it can be read and adjusted. */
BALANCEKV_API bkv_config bkv_config_default(uint32_t n_q_heads, uint32_t n_kv_heads,
                                            uint32_t head_dim, uint32_t budget);

/* BKV_OK, or what is wrong with the config. cfg: NULL gives BKV_E_NULL. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_check(const bkv_config *cfg);

/* Exact bytes for bkv_init(), scratch of n_threads included; 0 if bkv_check() fails. */
BALANCEKV_API size_t bkv_size(const bkv_config *cfg);

/* Makes an empty cache in mem[mem_bytes] (the caller's, any alignment, must outlive the cache).
   Returns bkv_check()'s errors, BKV_E_NULL, BKV_E_MEMORY. Cost: writes the state once. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_init(bkv_cache *c, const bkv_config *cfg, void *mem,
                                               size_t mem_bytes);

/* Takes up a state at its present address: after the block was moved or copied (stats.state_bytes
   are enough; mem_bytes must still be bkv_size()), or from another process of the same byte order.
   backend: BKV_BACKEND_*, 0 = best. Checks header and page table: bytes that are not a state give
   BKV_E_STATE, one of another version BKV_E_VERSION. Trusts the rest. Cost: reads the tables. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_attach(bkv_cache *c, void *mem, size_t mem_bytes,
                                                 uint32_t backend);

/* Empties the cache, as if just made. Returns BKV_E_NULL. Cost: writes the state once. */
BALANCEKV_API bkv_result bkv_reset(bkv_cache *c);

/* Takes back all but the first n_tokens tokens. What is left is, bit for bit, the state before
   them, but for what attention to tokens that were no drafts has taught, and drafts that a later
   token accepted stay accepted. Once something was halved (integers from 512 slots on: once there
   is a second page) the first token of the newest page and all before it cannot be taken back:
   stats.room says how many more are safe. Returns BKV_E_NULL, _ROLLBACK. Cost: by tokens. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_truncate(bkv_cache *c, uint64_t n_tokens);

/* Lowers the budget in place: the oldest pages are halved by the rule in use until the tokens fit,
   then the state moves together; stats.bytes, fewer now, are still needed. The window shrinks only
   if it must. Returns BKV_E_NULL, _BUDGET. Cost: the halvings, and moves the state once. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_shrink(bkv_cache *c, uint32_t budget);

/* The largest budget, in sixteens, whose bkv_size() is at most `bytes`, all else as in cfg (whose
   budget is not read; window = 0 grows with it); 0: none. */
BALANCEKV_API uint32_t bkv_budget_for_bytes(const bkv_config *cfg, size_t bytes);

/* Writes stats.state_bytes bytes, the same on every machine. Returns BKV_E_NULL, _MEMORY. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_save(const bkv_cache *c, void *out, size_t out_bytes);

/* Makes a cache in mem[mem_bytes] of what bkv_save() wrote, by any machine and for any backend;
   the stream goes on bit for bit. n_threads, backend: as in bkv_config. bkv_load_size() says how
   large mem must be; 0: these bytes are no state. Bytes from anywhere are safe: everything is
   checked. Returns BKV_E_NULL, _STATE, _VERSION, _MEMORY, _THREADS, and _BACKEND, _HEAD_DIM,
   _KV_TYPE if this build or CPU lacks what it asks for; c is then unchanged, mem undefined. */
BALANCEKV_API size_t bkv_load_size(const void *saved, size_t saved_bytes, uint32_t n_threads);
BALANCEKV_API BKV_MUST_USE bkv_result bkv_load(bkv_cache *c, const void *saved, size_t saved_bytes,
                                               void *mem, size_t mem_bytes, uint32_t n_threads,
                                               uint32_t backend);

/* BKV_OK if every invariant of the state holds. One flipped bit of header, counters, page tables,
   positions or weights is always found. Keys, values and what attention teaches (uses, in which
   pins are marked, means of queries, error) are data: no sum covers what every token renews, but
   NaN, Inf and numbers out of range are found. BKV_E_STATE otherwise. Cost: reads the state. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_validate(const bkv_cache *c);

/* A dense tensor [n_tokens][n_heads][dim]. */
BALANCEKV_API bkv_tensor bkv_dense(const void *data, uint32_t type);

/* Appends n_tokens tokens to all KV heads. k: [n_tokens][n_kv_heads][head_dim], v: the same with
   value_dim; flags: BKV_PIN, BKV_DRAFT. One by one, in chunks, by bkv_prefill(): the same state.
   Returns BKV_E_NULL, _COUNT, _FLAGS, _THREADS, _TYPE, _STRIDE, _SIZE, _VALUE.
   Cost: a pass over the inputs per share, and at most one halving per KV head and 64 tokens. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_append(bkv_cache *c, bkv_tensor k, bkv_tensor v,
                                                 size_t n_tokens, uint32_t flags, uint32_t ith,
                                                 uint32_t nth);

/* Attention of one position. q: [n_q_heads][head_dim] (its token_stride is not used); query head h
   reads KV head h / group. out: f32 [n_q_heads][value_dim], must overlap neither cache nor q.
   Returns BKV_E_NULL, _THREADS, _TYPE, _STRIDE, _SIZE, _VALUE, _EMPTY. Cost: by slots in use. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_attend(bkv_cache *c, bkv_tensor q, float *out,
                                                 uint32_t ith, uint32_t nth);

/* As bkv_attend(), in parts that can be merged with those of other keys; max, sum: f32 [n_q_heads]:
   max[h] = largest logit, sum[h] = sum_i w_i e^(s_i - max[h]), out[h] = sum_i w_i e^(..) v_i. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_attend_partial(bkv_cache *c, bkv_tensor q, float *out,
                                                         float *max, float *sum, uint32_t ith,
                                                         uint32_t nth);

/* Appends a chunk and attends: query t sees everything before the chunk and the chunk's tokens
   0..t, bit for bit as n_tokens pairs of bkv_append() and bkv_attend() would give.
   q: [n_tokens][n_q_heads][head_dim], out: f32 [n_tokens][n_q_heads][value_dim], overlaps neither
   cache nor inputs. Errors as of bkv_append(). Memory: nothing beyond the scratch. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_prefill(bkv_cache *c, bkv_tensor k, bkv_tensor v,
                                                  bkv_tensor q, float *out, size_t n_tokens,
                                                  uint32_t flags, uint32_t ith, uint32_t nth);

/* The i-th kept token of a KV head, oldest first, i < tokens_held. Returns BKV_E_NULL, _INDEX. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_token(const bkv_cache *c, uint32_t head, uint32_t i,
                                                bkv_token_info *info);

/* Estimated |out - exact| / |exact| of a KV head, a running mean. Returns BKV_E_NULL, _INDEX. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_error(const bkv_cache *c, uint32_t head, float *error);

/* What the cache holds. Returns BKV_E_NULL. Cost: one pass over weights and page tables. */
BALANCEKV_API bkv_result bkv_stats(const bkv_cache *c, bkv_stats_info *info);

/* The tokens of a KV head as rows for another attention kernel, ggml_flash_attn_ext for one: slot i
   is row i; mask[i] = log(weight), -inf for rows without a token, is added to the scaled logits. */
typedef struct bkv_rows {
    void *k, *v, *mask;         /* [n_rows][head_dim], [n_rows][value_dim], [n_rows]; NULL: not */
    size_t k_stride, v_stride;  /* bytes between rows, 0: dense */
    uint32_t type, mask_type;   /* BKV_F32, BKV_F16, BKV_BF16; mask: the first two */
    uint32_t n_rows;            /* at least stats.slots */
    uint32_t first, n;          /* out, with BKV_OK: the range of rows that this call wrote */
    uint64_t seen, halvings;    /* of the last call here: only what changed since is written; set to
                                   0 after bkv_truncate, _shrink, _reset, _load, for another head */
} bkv_rows;
/* Returns BKV_E_NULL, _INDEX (head), _TYPE, _STRIDE, _COUNT (n_rows), _VALUE (too large for f16).
   Uses the scratch of the first thread. Cost: the rows that changed, all after a halving. */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_export(bkv_cache *c, uint32_t head, bkv_rows *rows);

/* Chooses from the caller's own n_tokens keys and values what a cache of this config would hold at
   the end: per KV head *n_kept tokens with index[head * budget + i] and weight[..], in order. mem:
   bkv_size(cfg) bytes of working memory. No queries are seen: set importance to BKV_IMPORTANCE_KEY.
   The caller's values stay; a cache moves its own. Errors: those of bkv_init(), bkv_append(). */
BALANCEKV_API BKV_MUST_USE bkv_result bkv_select(const bkv_config *cfg, void *mem, size_t mem_bytes,
                                                 bkv_tensor k, bkv_tensor v, size_t n_tokens,
                                                 uint32_t *index, float *weight, uint32_t *n_kept);

/* English text of a result, never NULL. */
BALANCEKV_API const char *bkv_result_string(bkv_result r);
/* "0.1.0" of the compiled implementation. */
BALANCEKV_API const char *bkv_version(void);
/* Bit (1 << BKV_BACKEND_x) is set for every backend that is compiled in and that this CPU runs. */
BALANCEKV_API uint32_t bkv_backends(void);
/* "scalar", "avx2", "avx512", "neon", "auto"; "?" for an unknown one. */
BALANCEKV_API const char *bkv_backend_name(uint32_t backend);

#ifdef __cplusplus
}
#endif
#endif /* BALANCEKV_H */

#if defined(BALANCEKV_IMPLEMENTATION) && !defined(BALANCEKV_IMPLEMENTED)
#define BALANCEKV_IMPLEMENTED

/* ---- §4 PLATFORM ----------------------------------------------------------------- >>platform
   The only section that names compilers and CPUs; the rest of the file asks BKVI_*. */
#if __STDC_HOSTED__
#include <string.h>
#else /* no C library: the program brings mem*, and by these names the compiler knows them */
#define BKVI_BARE 1
#define memcpy __builtin_memcpy
#define memset __builtin_memset
#define memmove __builtin_memmove
#endif

#if !defined(__GNUC__) && !defined(__clang__)
#error "balancekv.h: needs gcc, clang or a compiler that speaks their extensions"
#elif defined(__FAST_MATH__) && !defined(BALANCEKV_ALLOW_FAST_MATH)
#error "balancekv.h: -ffast-math breaks the arithmetic contract; see BALANCEKV_ALLOW_FAST_MATH"
#elif defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "balancekv.h: excess precision; x86: -msse2 -mfpmath=sse, s390x: -fexcess-precision=fast"
#endif
#if defined(__x86_64__) || defined(__i386__)
#define BKVI_ARCH_X86 1
#else
#define BKVI_ARCH_X86 0
#endif
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define BKVI_ARCH_ARM64
#endif
#ifndef BALANCEKV_SIMD
#define BALANCEKV_SIMD BALANCEKV_SIMD_AUTO
#endif
#ifndef BALANCEKV_DISPATCH
#define BALANCEKV_DISPATCH BKVI_ARCH_X86
#endif
#ifndef BALANCEKV_SIMDE
#define BALANCEKV_SIMDE 0
#endif
#ifndef BALANCEKV_FMA
#define BALANCEKV_FMA 1
#endif
#if (BALANCEKV_SIMD + 0) < BALANCEKV_SIMD_AUTO || (BALANCEKV_SIMD + 0) > BALANCEKV_SIMD_NEON
#error "balancekv.h: BALANCEKV_SIMD must be BALANCEKV_SIMD_AUTO, _SCALAR, _AVX2, _AVX512 or _NEON"
#elif (BALANCEKV_DISPATCH | BALANCEKV_SIMDE | BALANCEKV_FMA) >> 1 /* and below 0 */
#error "balancekv.h: BALANCEKV_DISPATCH, BALANCEKV_SIMDE and BALANCEKV_FMA must be 0 or 1"
#elif BALANCEKV_SIMDE &&                                                                           \
    (BALANCEKV_SIMD == BALANCEKV_SIMD_SCALAR || BALANCEKV_SIMD == BALANCEKV_SIMD_AVX2)
#error "balancekv.h: BALANCEKV_SIMDE goes with BALANCEKV_SIMD_AUTO, _NEON or _AVX512"
#elif BALANCEKV_SIMDE && defined(__arm__) && defined(__ARM_NEON)
#error "balancekv.h: ARMv7's NEON flushes denormals, which gives other bits; leave BALANCEKV_SIMDE"
#elif !BALANCEKV_SIMDE && ((BALANCEKV_SIMD == BALANCEKV_SIMD_NEON && !defined(BKVI_ARCH_ARM64)) || \
                           (BALANCEKV_SIMD == BALANCEKV_SIMD_AVX2 && !BKVI_ARCH_X86) ||            \
                           (BALANCEKV_SIMD == BALANCEKV_SIMD_AVX512 && !defined(__x86_64__)))
#error "balancekv.h: BALANCEKV_SIMD_AVX2 needs an x86 target, _AVX512 x86-64, _NEON AArch64"
#endif
#ifndef BALANCEKV_HEAD_DIM
#define BKVI_DIM(x) (x)
#elif (BALANCEKV_HEAD_DIM + 0) < 1 || (BALANCEKV_HEAD_DIM + 0) > 512
#error "balancekv.h: BALANCEKV_HEAD_DIM must be 1..512"
#else
#define BKVI_DIM(x) ((uint32_t)(BALANCEKV_HEAD_DIM) + 0u * (x)) /* a constant, and x is used */
#endif
#ifndef BALANCEKV_KV_TYPE
#define BKVI_TYPE(t) (t)
#elif (BALANCEKV_KV_TYPE + 0) < BALANCEKV_F32 || (BALANCEKV_KV_TYPE + 0) > BALANCEKV_I4
#error "balancekv.h: BALANCEKV_KV_TYPE must be BALANCEKV_F32, _F16, _BF16, _I8 or _I4"
#else
#define BKVI_TYPE(t) ((uint32_t)(BALANCEKV_KV_TYPE) + 0u * (t))
#endif
#ifndef BALANCEKV_HEADER_NAME
#define BALANCEKV_HEADER_NAME "balancekv.h"
#endif

/* The widest backend of this build, and which others there are. */
#if BALANCEKV_SIMD != BALANCEKV_SIMD_AUTO
#define BKVI_WIDEST BALANCEKV_SIMD
#elif defined(BKVI_ARCH_ARM64) || BALANCEKV_SIMDE
#define BKVI_WIDEST BALANCEKV_SIMD_NEON
#elif defined(__x86_64__) && (BALANCEKV_DISPATCH || defined(__AVX512F__)) /* i386: 8 registers */
#define BKVI_WIDEST BALANCEKV_SIMD_AVX512
#elif BKVI_ARCH_X86 &&                                                                             \
    (BALANCEKV_DISPATCH || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)))
#define BKVI_WIDEST BALANCEKV_SIMD_AVX2
#else
#define BKVI_WIDEST BALANCEKV_SIMD_SCALAR
#endif
#define BKVI_HAVE_NEON (BKVI_WIDEST == BALANCEKV_SIMD_NEON)
#define BKVI_HAVE_AVX512 (BKVI_WIDEST == BALANCEKV_SIMD_AVX512)
#define BKVI_HAVE_AVX2                                                                             \
    (BKVI_WIDEST == BALANCEKV_SIMD_AVX2 ||                                                         \
     (BKVI_HAVE_AVX512 && BALANCEKV_DISPATCH && !BALANCEKV_SIMDE))
#define BKVI_HAVE_SCALAR (BKVI_WIDEST == BALANCEKV_SIMD_SCALAR || BALANCEKV_DISPATCH)
#if BALANCEKV_SIMDE && BKVI_HAVE_NEON
#include <simde/arm/neon.h>
#elif BALANCEKV_SIMDE
#include <simde/x86/avx512.h>
#elif BKVI_HAVE_NEON
#include <arm_neon.h>
#elif BKVI_HAVE_AVX2 || BKVI_HAVE_AVX512
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__OPTIMIZE_SIZE__) /* one shape of register tile, not a dozen; no bit depends on it */
#define BKVI_SMALL 1
#define BKVI_ONCE static __attribute__((unused)) /* inline but where size counts */
#define BKVI_FOUR /* unrolled: loops over four registers that hide each other's latency */
#else
#define BKVI_SMALL 0
#define BKVI_ONCE BKVI_INLINE
#define BKVI_FOUR BKVI_UNROLL
#endif
/* BKVI_UNROLL: gcc -O2 keeps register tiles, small arrays, in registers only if every loop over
   them is unrolled (3x on a halving). BKVI_TARGET, BKVI_TARGET_END: code for these instructions,
   whatever the compiler flags are; gcc warns of its own _mm512_undefined_ps(), in C++. */
#define BKVI_PRAGMA(x) _Pragma(#x)
#if BKVI_SMALL && BKVI_WIDEST == BALANCEKV_SIMD_SCALAR
#define BKVI_UNROLL
#elif defined(__clang__)
#define BKVI_UNROLL _Pragma("clang loop unroll(full)")
#define BKVI_TARGET(isa)                                                                           \
    BKVI_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define BKVI_TARGET_END _Pragma("clang attribute pop")
#else
#define BKVI_UNROLL _Pragma("GCC unroll 32")
#define BKVI_TARGET(isa)                                                                           \
    _Pragma("GCC push_options") BKVI_PRAGMA(GCC target(isa)) _Pragma("GCC diagnostic push")        \
    _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")                                          \
    _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define BKVI_TARGET_END _Pragma("GCC diagnostic pop") _Pragma("GCC pop_options")
#endif
#define BKVI_INLINE static inline __attribute__((always_inline, unused))
#define BKVI_NOINLINE static __attribute__((noinline))

/* One scalar instruction for a correctly rounded a * b + c, where the target always has it. */
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) ||                   \
    defined(__aarch64__) || defined(__riscv_flen) || defined(__powerpc64__) || defined(__s390x__)
#define BKVI_HARDWARE_FMA
#endif
/* BALANCEKV_FMA=0: x is rounded here. No compiler may fuse it with the addition that follows, as
   gcc does in gnu modes and all do under -ffp-contract=fast, where the instruction exists. */
#if BKVI_ARCH_X86 && !BALANCEKV_SIMDE
#define BKVI_ROUND(x) __asm__("" : "+v"(x))
#elif defined(BKVI_ARCH_ARM64)
#define BKVI_ROUND(x) __asm__("" : "+w"(x))
#elif defined(BKVI_HARDWARE_FMA)
#define BKVI_ROUND(x) __asm__("" : "+m"(x))
#else
#define BKVI_ROUND(x) ((void)0)
#endif
/* BKVI_WAIT: no load through p comes before x is there. Only clang needs it, see bkvi_tile_fma. */
#if BKVI_ARCH_X86 && !BALANCEKV_SIMDE && defined(__clang__)
#define BKVI_CLANG_X86 1
#define BKVI_WAIT(p, x) __asm__("" : "+r"(p) : "v"(x))
#else
#define BKVI_CLANG_X86 0
#define BKVI_WAIT(p, x) ((void)0)
#endif

enum {
    BKVI_PAGE = 64,          /* slots of a page */
    BKVI_PINS = 32,          /* pins that hold in a halving */
    BKVI_FEW = 512,          /* with fewer slots: a window of one page, no rests */
    BKVI_BLOCK = 128,        /* tokens of a halving: two pages */
    BKVI_LANES = 16,         /* lanes of a vector, tokens of a key panel */
    BKVI_ROWS = 32,          /* (token, query head) rows that attend works on at once */
    BKVI_TILE_MAX = 4,       /* rows that share a register tile, at most: the size of scratch */
    BKVI_TILE_ROWS = BKVI_SMALL ? 1 : BALANCEKV_SIMDE ? 2 : 4, /* the same, of this build */
    BKVI_DIM_MAX = 512,      /* elements of a key or value, at most */
    BKVI_HEADER_BYTES = 256, /* of the state: magic, version, config */
    BKVI_CONFIG_BYTES = 64,  /* of bkv_config, all that stands before the seed */
    BKVI_COUNTER_BYTES = 32, /* of bkvi_head in the state, but for the sum */
    BKVI_SUM_AT = 240,       /* in the header: checksum of a saved state */
    BKVI_ERROR_AT = 60,      /* the error in the state of a head */
    BKVI_MAGIC = 0x4B564B42, BKVI_MAGIC_SWAPPED = 0x424B564B, /* "BKVK" and "KVKB" */
    BKVI_STATE_VERSION = 1,
    BKVI_HIGH = BKV_I4 + 1 /* see bkvi_units */
};
/* Parts of a head's state, ordered as in §8; a value's follows the key's: BKVI_V = BKVI_K + 1. */
enum { BKVI_COUNTERS, BKVI_TABLE, BKVI_WEIGHT, BKVI_USE, BKVI_POSITION, BKVI_QUERIES, BKVI_K_SCALE,
       BKVI_V_SCALE, BKVI_K_REST, BKVI_V_REST, BKVI_K, BKVI_V, BKVI_END };
static const float BKVI_LOG2E = 1.44269504088896341f, BKVI_LN2 = 0.693147180559945309f;
static const float BKVI_HUGE = 3.6028797018963968e16f; /* 2^55: keys, values, queries are below */
static const float BKVI_MASKED = -3e38f; /* the score of a slot that a row does not see */
static const float BKVI_LOWEST = -1e38f; /* below every score, above BKVI_MASKED */
static const float BKVI_LEARN = 0.01f; /* share of a query in its running mean */
static const float BKVI_PINNED = 1e38f; /* a use that marks a pin: no share changes it */
static const uint64_t BKVI_GOLDEN = 0x9E3779B97F4A7C15u;

/* ---- §5 SCALAR --------------------------------------------------------------------- >>scalar */
/* The state may stand at any address, so single words go through memcpy. */
#define BKVI_X(name, type)                                                                         \
    BKVI_INLINE type bkvi_get##name(const unsigned char *p) {                                      \
        type x;                                                                                    \
        memcpy(&x, p, sizeof x);                                                                   \
        return x;                                                                                  \
    }                                                                                              \
    BKVI_INLINE void bkvi_put##name(unsigned char *p, type x) { memcpy(p, &x, sizeof x); }
BKVI_X(16, uint16_t) BKVI_X(32, uint32_t) BKVI_X(f, float)
#undef BKVI_X
BKVI_INLINE uint32_t bkvi_bits(float x) { return bkvi_get32((const unsigned char *)&x); }
BKVI_INLINE float bkvi_float(uint32_t u) { return bkvi_getf((const unsigned char *)&u); }
/* 64-bit counters are two words, low first, so that the state is made of 32-bit words only. */
BKVI_INLINE uint64_t bkvi_get64(const unsigned char *p) {
    return (uint64_t)bkvi_get32(p) | (uint64_t)bkvi_get32(p + 4) << 32;
}
BKVI_INLINE void bkvi_put64(unsigned char *p, uint64_t x) {
    bkvi_put32(p, (uint32_t)x), bkvi_put32(p + 4, (uint32_t)(x >> 32));
}

BKVI_INLINE uint32_t bkvi_min(uint32_t a, uint32_t b) { return a < b ? a : b; }
BKVI_INLINE uint32_t bkvi_max(uint32_t a, uint32_t b) { return a > b ? a : b; }
BKVI_INLINE uint32_t bkvi_round_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }
BKVI_INLINE size_t bkvi_type_bytes(uint32_t t) { return t == BKV_F32 ? 4 : t >= BKV_I8 ? 1 : 2; }
/* Is it one of the types made of integers? Not in builds of another type. */
BKVI_INLINE int bkvi_is_int(uint32_t type) {
    return BKVI_TYPE((uint32_t)BKV_I8) >= BKV_I8 && type >= BKV_I8;
}
BKVI_INLINE int bkvi_is_i4(uint32_t type) { return bkvi_is_int(type) && type >= BKV_I4; }
/* The parts of a step in which what rounding leaves is counted. */
BKVI_INLINE float bkvi_parts(uint32_t type) { return bkvi_is_i4(type) ? 14.0f : 128.0f; }

/* memcmp() == 0, which clang would turn into a call of bcmp(). */
static int bkvi_same(const unsigned char *a, const unsigned char *b, size_t n) {
    for (; n && *a == *b; n--) a++, b++;
    return n == 0;
}

/* n elements between rows of any stride (bytes). A loop each, or each element would call memcpy. */
static void bkvi_copy(unsigned char *dst, size_t dst_stride, const unsigned char *src,
                      size_t src_stride, uint32_t n, size_t elem_bytes) {
    if (elem_bytes == 4)
        for (; n; n--, dst += dst_stride, src += src_stride) memcpy(dst, src, 4);
    else if (elem_bytes == 2)
        for (; n; n--, dst += dst_stride, src += src_stride) memcpy(dst, src, 2);
    else
        for (; n; n--, dst += dst_stride, src += src_stride) *dst = *src;
}

/* The mixing function of splitmix64 (Steele, Lea, Flood 2014; public domain constants). */
static uint64_t bkvi_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
static uint64_t bkvi_draw_key(uint64_t seed, uint32_t head, uint64_t halving) {
    return bkvi_mix(bkvi_mix(seed + BKVI_GOLDEN * ((uint64_t)head + 1)) +
                    BKVI_GOLDEN * (halving + 1));
}
/* Random number i of a halving in [0, 1): 24 bits, so that the product is exact. */
static float bkvi_uniform(uint64_t key, uint32_t i) {
    return (float)(bkvi_mix(key + BKVI_GOLDEN * ((uint64_t)i + 1)) >> 40) * 5.9604644775390625e-8f;
}

/* The square root of a positive finite number, without libm: Newton from a guess by the exponent of
   the double. No root of a float is so near the middle of two that the last bits could matter. */
static double bkvi_root(float x) {
    double d = (double)x, y;
    uint64_t u;
    int i;
    memcpy(&u, &d, sizeof u);
    u = (u >> 1) + ((uint64_t)1023 << 51);
    memcpy(&y, &u, sizeof y);
    for (i = 0; i < 5; i++) y = 0.5 * (y + d / y);
    return y;
}

/* Round to nearest even; the caller keeps NaN and overflow out (bkvi_scan). */
BKVI_INLINE uint16_t bkvi_to_bf16(float x) {
    uint32_t u = bkvi_bits(x);
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

#if BKVI_HAVE_SCALAR || BALANCEKV_SIMDE
static float bkvi_sqrt(float x) { /* to nearest; 0 of what is not positive */
    return x > 0.0f ? x - x == 0.0f ? (float)bkvi_root(x) : x : 0.0f;
}

/* Correctly rounded a * b + c. Without the instruction: the product is exact in double, TwoSum has
   the sum's error, and rounding to odd makes the last rounding correct (Boldo, Melquiond 2008). */
BKVI_INLINE float bkvi_fma(float a, float b, float c) {
#ifdef BKVI_HARDWARE_FMA
    return __builtin_fmaf(a, b, c);
#else
    double p = (double)a * (double)b, sum = p + (double)c;
    double back = sum - p, error = (p - (sum - back)) + ((double)c - back);
    if (error != 0.0) {
        uint64_t u;
        memcpy(&u, &sum, sizeof u);
        if (!(u & 1)) {
            u += (error > 0.0) == (sum > 0.0) ? 1u : (uint64_t)-1;
            memcpy(&sum, &u, sizeof sum);
        }
    }
    return (float)sum;
#endif
}

BKVI_ONCE float bkvi_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest >= 0x7C00u) /* Inf, NaN (made quiet, as the hardware does) */
        return bkvi_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13 |
                          (rest > 0x7C00u ? 0x400000u : 0u));
    if (rest >= 0x400u) return bkvi_float(sign | ((rest << 13) + 0x38000000u));
    return bkvi_float(sign | bkvi_bits((float)rest * 5.9604644775390625e-8f)); /* exact */
}

BKVI_INLINE uint16_t bkvi_to_f16(float x) {
    uint32_t u = bkvi_bits(x), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
    if (rest < 0x38800000u) { /* below 2^-14: a multiple of 2^-24, rounded by adding 2^-1 */
        float y = bkvi_float(rest) + 0.5f;
        return (uint16_t)(sign | (bkvi_bits(y) - 0x3F000000u));
    }
    rest += 0xFFFu + (rest >> 13 & 1u);
    return (uint16_t)(sign | (rest - 0x38000000u) >> 13);
}
#endif

/* ---- §6 DISPATCH ----------------------------------------------------------------- >>dispatch
   A backend is a set of functions, made by one pass over §11 and §12. */
typedef struct bkvi_head bkvi_head;

/* What a halving works with; the start of the scratch. */
typedef struct bkvi_block {
    float mass[BKVI_BLOCK], weight[BKVI_BLOCK];  /* weights as in the state; over the largest */
    float use[BKVI_BLOCK], chance[BKVI_BLOCK];   /* chance: to stay */
    float score[BKVI_BLOCK]; /* importance, then what a token lacks of its weight, over weight */
    float factor[BKVI_BLOCK];                    /* in the kernel */
    float norm[BKVI_BLOCK], mean[BKVI_DIM_MAX];  /* squared norms; of keys, then of values */
    float expected[BKVI_BLOCK], unlike[BKVI_BLOCK]; /* shares of importance */
    float kernel[BKVI_BLOCK * BKVI_BLOCK]; /* of the keys alone; then coefficients of the refit */
    float matrix[BKVI_BLOCK * BKVI_BLOCK]; /* times that of the values; values while they move */
    float tile[BKVI_LANES * BKVI_PAGE]; /* products before they are used, and other work */
    float panels[8 * (BKVI_DIM_MAX + 1) * BKVI_LANES]; /* operands: [8][dim + 1][16]; new values */
} bkvi_block;

/* Queries of the n newest tokens of a KV head (§9): tokens first .. first + n - 1 of q and out. */
typedef struct bkvi_queries {
    const bkv_tensor *q;
    float *out, *max, *sum; /* of token 0, query head 0 of the call; max == NULL: normalise */
    size_t first;
    uint32_t n;
} bkvi_queries;

typedef struct bkvi_kernels {
    int (*scan)(const unsigned char *p, uint32_t type, size_t stride, uint32_t n, float limit);
    void (*put)(unsigned char *dst, size_t step, unsigned char *rest, unsigned char *scale,
                uint32_t kv_type, const unsigned char *src, uint32_t type, size_t stride,
                uint32_t n, float *work);
    void (*fetch)(float *x, const unsigned char *src, uint32_t type, size_t stride, uint32_t n,
                  const unsigned char *scale, const unsigned char *rest);
    void (*gram)(const bkvi_head *h, const uint32_t *slots, bkvi_block *block);
    void (*exchange)(bkvi_block *block, uint32_t rounds, unsigned char *keep);
    void (*refit)(const bkvi_head *h, const uint32_t *slots, bkvi_block *block);
    void (*attend)(const bkvi_head *h, const bkvi_queries *queries);
} bkvi_kernels;

/* A KV head in hand, and the counters that stand in its state (§8). */
struct bkvi_head {
    const bkv_cache *c;
    unsigned char *mem;
    float *scratch;
    uint32_t index;
    uint32_t sinks, used, fill; /* tokens in the sinks; pages in use; tokens in the newest page */
    uint32_t drafts, sum;       /* newest tokens on trial; of all weights, positions and levels */
    uint64_t seen, halvings;    /* tokens appended; halvings done */
};

/* At the end of §12. Of one backend a constant, so that compilers call its functions directly. */
static bkvi_kernels bkvi_kernels_of(uint32_t backend);

#if (BKVI_HAVE_AVX2 || BKVI_HAVE_AVX512) && !BALANCEKV_SIMDE
/* The instructions AND the operating system's saving of their registers. */
static uint32_t bkvi_x86_backends(void) {
    uint32_t a, b, c, d, b7, os, high, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    if (!__get_cpuid_count(7, 0, &a, &b7, &b, &d)) return 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" /* xgetbv */ : "=a"(os), "=d"(high) : "c"(0));
    if ((os & 0x06) == 0x06 && (c >> 28 & c >> 12 & c >> 29 & b7 >> 5 & 1)) /* AVX FMA F16C AVX2 */
        found |= 1u << BKV_BACKEND_AVX2;
    if (found && (os & 0xE6) == 0xE6 && (b7 >> 16 & 1)) /* AVX-512 F */
        found |= 1u << BKV_BACKEND_AVX512;
    return found;
}
#endif

/* Of §3: what §10 would only pass on. */
BALANCEKV_API uint32_t bkv_backends(void) {
    const uint32_t built = (uint32_t)BKVI_HAVE_SCALAR << BKV_BACKEND_SCALAR |
                           (uint32_t)BKVI_HAVE_AVX2 << BKV_BACKEND_AVX2 |
                           (uint32_t)BKVI_HAVE_AVX512 << BKV_BACKEND_AVX512 |
                           (uint32_t)BKVI_HAVE_NEON << BKV_BACKEND_NEON; /* in every AArch64 */
#if (BKVI_HAVE_AVX2 || BKVI_HAVE_AVX512) && !BALANCEKV_SIMDE
    return built & (bkvi_x86_backends() | 1u << BKV_BACKEND_SCALAR);
#else
    return built;
#endif
}

/* 0 if there is none. */
static uint32_t bkvi_pick_backend(uint32_t wanted) {
    uint32_t have = bkv_backends(), b;
    if (wanted > BKV_BACKEND_NEON) return 0;
    if (wanted != BKV_BACKEND_AUTO) return have >> wanted & 1 ? wanted : 0;
    for (b = BKV_BACKEND_NEON; b > 0 && !(have >> b & 1);) b--;
    return b;
}

/* ---- §7 HALVING ------------------------------------------------------------------- >>halving
   Choosing 64 of the 128 tokens of two neighbouring pages, and their new weights. The rules are
   stated in tests/golden/README.md; what costs time is bkvi_gram, _exchange and _refit in §12. */
/* Chances to stay: in proportion to scores, 64 in all; 1 of what is pinned or would exceed it. */
static void bkvi_chances(const float *score, const unsigned char *pinned, float *chance) {
    uint32_t i, certain = 0, before;
    for (i = 0; i < BKVI_BLOCK; i++) chance[i] = pinned[i], certain += pinned[i];
    do {
        double sum = 0.0, each;
        before = certain;
        for (i = 0; i < BKVI_BLOCK; i++) sum += chance[i] < 1.0f ? (double)score[i] : 0.0;
        each = sum > 0.0 ? (double)(BKVI_PAGE - before) / sum : 0.0;
        for (i = 0; i < BKVI_BLOCK; i++)
            if (chance[i] < 1.0f) {
                chance[i] = (float)((double)score[i] * each);
                if (chance[i] >= 1.0f) chance[i] = 1.0f, certain++;
            }
    } while (certain > before);
}

static float bkvi_least(float a, float b) { return a < b ? a : b; }
/* Pivotal sampling (Deville, Tille 1998): of two undecided tokens one is decided at each step, the
   other carries on with what their chances leave. Without branches, as each would be a coin. */
static void bkvi_draw_tokens(const float *chance, uint64_t key, unsigned char *keep) {
    uint32_t i, draws = 0, held = 0, kept = 0; /* held: the undecided token, if p > 0 */
    float p = 0.0f;                            /* its chance by now */
    for (i = 0; i < BKVI_BLOCK; i++) {
        const float sum = p + chance[i], u = bkvi_uniform(key, draws);
        uint32_t stays, first; /* one stays or one goes; the held token stays or carries on */
        keep[i] = chance[i] >= 1.0f;
        if (keep[i] || chance[i] <= 0.0f) continue;
        stays = sum >= 1.0f;
        first = u * bkvi_least(sum, 2.0f - sum) < bkvi_least(p, 1.0f - chance[i]);
        draws += p > 0.0f;
        keep[first ? held : i] = (unsigned char)stays;
        held = first == stays ? i : held;
        p = sum - (float)stays;
    }
    for (i = 0; i < BKVI_BLOCK; i++) kept += keep[i];
    if (p > 0.0f) keep[held] = kept < BKVI_PAGE; /* p is 0 or 1 but for rounding */
}

/* keep[i]: 1 for what is pinned, then for the 64 survivors; block->mass: weights, old, then new. */
BKVI_NOINLINE void bkvi_choose(const bkvi_head *h, const uint32_t *slots, bkvi_block *block,
                               unsigned char *keep) {
    const bkv_config *cfg = &h->c->cfg;
    float heaviest = 0.0f, *mass = block->mass;
    double kept = 0.0;
    uint32_t i;
    if (cfg->rule == BKV_RULE_WINDOW) {
        for (i = 0; i < BKVI_BLOCK; i++) keep[i] = i >= BKVI_PAGE;
        return;
    }
    for (i = 0; i < BKVI_BLOCK; i++) heaviest = mass[i] > heaviest ? mass[i] : heaviest;
    for (i = 0; i < BKVI_BLOCK; i++)
        block->weight[i] = mass[i] / heaviest; /* so that products stay in range */
    bkvi_kernels_of(cfg->backend).gram(h, slots, block);
    bkvi_chances(block->score, keep, block->chance);
    bkvi_draw_tokens(block->chance, bkvi_draw_key(cfg->seed, h->index, h->halvings), keep);
    if (cfg->rounds != BKV_NONE) bkvi_kernels_of(cfg->backend).exchange(block, cfg->rounds, keep);
    for (i = 0; i < BKVI_BLOCK; i++) { /* of those that go 0, whatever their chance */
        const float grown = (float)keep[i] / (block->chance[i] + (float)!keep[i]);
        mass[i] *= grown;
        block->score[i] = 1.0f - grown;
        kept += (double)mass[i];
    }
    for (i = 0; i < BKVI_BLOCK && kept > (double)h->seen; i++) /* or it grows without end */
        mass[i] = (float)((double)mass[i] * ((double)h->seen / kept));
    if (cfg->rounds != BKV_NONE && cfg->importance != BKV_NONE &&
        cfg->importance & (BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY))
        bkvi_kernels_of(cfg->backend).refit(h, slots, block);
}

/* ---- §8 STREAM --------------------------------------------------------------------- >>stream
   State: a header of 64 words (magic, version, config), then one region per KV head:
       16 words    tokens seen, halvings (both low, high), sinks, pages in use, newest page's fill,
                   drafts, sum (mod 2^32) of drafts and the words of weights, positions and
                   levels, six zeros, and f32, the estimate of the error
       page table  [n_pages] (place, level), oldest first; page p has slots sink_slots + 64 p ..
       per slot    f32 weight (0: empty), f32 observed use, u32 position
       queries     f32, the running mean of each query head, [group][head_dim padded to 16]
       integers    per slot two scales, as bf16; from 512 slots on rests of the first 16 sinks and
                   newest pages (bkvi_rest), in 1/128 of a step, 1/14 of 4 bits, in the form of:
       keys        panels of 16 slots, each [units][16]: <q, k> needs no sum across lanes
       values      rows, units of v_dim_pad
   Parts start at multiples of 64 bytes; slots without a token are all zero. Behind it: scratch. */
static unsigned char *bkvi_head_mem(const bkv_cache *c, uint32_t head) {
    return c->mem + BKVI_HEADER_BYTES + (size_t)head * c->head_bytes;
}
/* n elements padded to whole sixteens, of 4 bits two of them; value_dim so padded. */
BKVI_INLINE uint32_t bkvi_padded(uint32_t type, uint32_t n) {
    return bkvi_round_up(n, bkvi_is_i4(type) ? 2 * BKVI_LANES : BKVI_LANES);
}
BKVI_INLINE uint32_t bkvi_v_dim(const bkv_cache *c) {
    return bkvi_padded(BKVI_TYPE(c->cfg.kv_type), BKVI_DIM(c->cfg.value_dim));
}
/* Units in which n elements are stored: elements, or, of 4 bits, bytes, 16 times a high digit plus
   a low one, each -7..7: low are the first elements, high (type BKVI_HIGH) the others. */
BKVI_INLINE uint32_t bkvi_units(uint32_t type, uint32_t n) {
    return bkvi_is_i4(type) ? bkvi_padded(type, n) / 2 : n;
}
static uint32_t bkvi_high(uint32_t t, uint32_t i, uint32_t n) { return bkvi_is_i4(t) && i >= n; }
static bkvi_head bkvi_head_get(const bkv_cache *c, uint32_t head, uint32_t ith) {
    unsigned char *mem = bkvi_head_mem(c, head), *scratch = c->mem + c->state_bytes;
    bkvi_head h;
    scratch += (64 - ((uintptr_t)scratch & 63)) & 63;
    h.scratch = (float *)(void *)(scratch + (size_t)ith * c->scratch_bytes);
    h.c = c, h.mem = mem, h.index = head;
    h.seen = bkvi_get64(mem), h.halvings = bkvi_get64(mem + 8);
    h.sinks = bkvi_get32(mem + 16), h.used = bkvi_get32(mem + 20);
    h.fill = bkvi_get32(mem + 24), h.drafts = bkvi_get32(mem + 28);
    h.sum = bkvi_get32(mem + 32) - h.drafts;
    return h;
}
static void bkvi_head_put(const bkvi_head *h) {
    bkvi_put64(h->mem, h->seen), bkvi_put64(h->mem + 8, h->halvings);
    bkvi_put32(h->mem + 16, h->sinks), bkvi_put32(h->mem + 20, h->used);
    bkvi_put32(h->mem + 24, h->fill), bkvi_put32(h->mem + 28, h->drafts);
    bkvi_put32(h->mem + 32, h->sum + h->drafts);
}

/* Tokens the head holds. */
static uint32_t bkvi_held(const bkvi_head *h) {
    return h->sinks + (h->used ? (h->used - 1) * BKVI_PAGE + h->fill : 0);
}

/* The bytes of a slot in a part; of a key the first element, the next ones follow 16 elements apart
   (so a multiple of 16 slots is where a panel starts). Also page `slot` of the table, counted from
   the oldest, and the mean of query head `slot`. */
static inline unsigned char *bkvi_part(const bkvi_head *h, int part, uint32_t slot) {
    const uint32_t lane = part == BKVI_K || part == BKVI_K_REST ? slot % BKVI_LANES : 0;
    return h->mem + h->c->at[part] + (size_t)(slot - lane) * h->c->each[part] +
           lane * (part == BKVI_K ? h->c->elem_bytes : 1);
}
static float bkvi_weight(const bkvi_head *h, uint32_t slot) {
    return bkvi_getf(bkvi_part(h, BKVI_WEIGHT, slot));
}

/* Page i, counted from the oldest: its place, level and first slot. */
static uint32_t bkvi_place(const bkvi_head *h, uint32_t i) {
    return bkvi_get32(bkvi_part(h, BKVI_TABLE, i));
}
static uint32_t bkvi_level(const bkvi_head *h, uint32_t i) {
    return bkvi_get32(bkvi_part(h, BKVI_TABLE, i) + 4);
}
static void bkvi_set_page(const bkvi_head *h, uint32_t i, uint32_t place, uint32_t level) {
    bkvi_put32(bkvi_part(h, BKVI_TABLE, i), place);
    bkvi_put32(bkvi_part(h, BKVI_TABLE, i) + 4, level);
}
static uint32_t bkvi_page_slot(const bkvi_head *h, uint32_t i) {
    return h->c->sink_slots + BKVI_PAGE * bkvi_place(h, i);
}

/* What rounding left of a slot's key (part BKVI_K) or value, or NULL: the first sixteen sinks and
   the newest pages have it, in turns: as many were begun as are in use and were halved. */
static unsigned char *bkvi_rest(const bkvi_head *h, int part, uint32_t slot) {
    const uint32_t sinks = h->c->rests % BKVI_PAGE, pages = h->c->rests / BKVI_PAGE;
    uint32_t i, at = slot, turn;
    if (!bkvi_is_int(BKVI_TYPE(h->c->cfg.kv_type)) || !pages) return NULL;
    part += BKVI_K_REST - BKVI_K;
    if (slot < h->c->sink_slots) return slot < sinks ? bkvi_part(h, part, slot) : NULL;
    for (i = h->used; i > 0 && i + pages > h->used; i--) {
        at = slot - bkvi_page_slot(h, i - 1), turn = (uint32_t)((h->halvings + i) % pages);
        if (at < BKVI_PAGE) return bkvi_part(h, part, sinks + BKVI_PAGE * turn + at);
    }
    return NULL;
}

/* Slot `to` becomes a copy of slot `from`, with a new weight. */
static void bkvi_move_slot(const bkvi_head *h, uint32_t to, uint32_t from, float weight) {
    const size_t es = h->c->elem_bytes, step = BKVI_LANES * es;
    int i;
    if (to != from) {
        memcpy(bkvi_part(h, BKVI_USE, to), bkvi_part(h, BKVI_USE, from), 4);
        memcpy(bkvi_part(h, BKVI_POSITION, to), bkvi_part(h, BKVI_POSITION, from), 4);
        for (i = BKVI_K_SCALE; i <= BKVI_V_SCALE && bkvi_is_int(h->c->cfg.kv_type); i++)
            memcpy(bkvi_part(h, i, to), bkvi_part(h, i, from), 2);
        memcpy(bkvi_part(h, BKVI_V, to), bkvi_part(h, BKVI_V, from), h->c->each[BKVI_V]);
        bkvi_copy(bkvi_part(h, BKVI_K, to), step, bkvi_part(h, BKVI_K, from), step,
                  (uint32_t)(h->c->each[BKVI_K] / es), es);
    }
    bkvi_putf(bkvi_part(h, BKVI_WEIGHT, to), weight);
}

/* The slot of the i-th kept token, oldest first. */
static uint32_t bkvi_slot_of(const bkvi_head *h, uint32_t i) {
    if (i < h->sinks) return i;
    i -= h->sinks;
    return bkvi_page_slot(h, i / BKVI_PAGE) + i % BKVI_PAGE;
}

/* The words of n slots that h->sum covers. */
static uint32_t bkvi_sum(const bkvi_head *h, uint32_t slot, uint32_t n) {
    uint32_t sum = 0;
    for (; n; n--, slot++)
        sum += bkvi_get32(bkvi_part(h, BKVI_WEIGHT, slot)) +
               bkvi_get32(bkvi_part(h, BKVI_POSITION, slot));
    return sum;
}

/* n slots lose their tokens: one, or a page. */
static void bkvi_clear(const bkvi_head *h, uint32_t slot, uint32_t n) {
    static const unsigned char zero[4] = {0, 0, 0, 0};
    static const unsigned char own[] = {BKVI_WEIGHT,  BKVI_USE,     BKVI_POSITION,
                                        BKVI_K_SCALE, BKVI_V_SCALE, BKVI_V};
    const size_t es = h->c->elem_bytes;
    uint32_t i;
    for (i = 0; i < sizeof own; i++) memset(bkvi_part(h, own[i], slot), 0, n * h->c->each[own[i]]);
    if (n == 1)
        bkvi_copy(bkvi_part(h, BKVI_K, slot), BKVI_LANES * es, zero, 0,
                  (uint32_t)(h->c->each[BKVI_K] / es), es);
    else
        memset(bkvi_part(h, BKVI_K, slot), 0, n * h->c->each[BKVI_K]);
}

/* A pin is in force while its token is exact. */
static uint32_t bkvi_pinned(const bkvi_head *h, uint32_t slot) {
    return bkvi_getf(bkvi_part(h, BKVI_USE, slot)) >= BKVI_PINNED && bkvi_weight(h, slot) <= 1.0f;
}

/* Of the first n_pages pages the pair of neighbours with the lowest level, the oldest of those; one
   with more pins than hold only if there is no other. */
static uint32_t bkvi_pick_pair(const bkvi_head *h, uint32_t n_pages) {
    uint32_t i, j, best = 0, best_level = 0xFFFFFFFFu;
    for (i = 0; i + 1 < n_pages; i++) {
        uint32_t level = bkvi_max(bkvi_level(h, i), bkvi_level(h, i + 1)), pins = 0;
        for (j = 0; j < BKVI_BLOCK && level < best_level; j++)
            pins += bkvi_pinned(h, bkvi_page_slot(h, i + j / BKVI_PAGE) + j % BKVI_PAGE);
        level += pins > BKVI_PINS ? 1u << 31 : 0;
        if (level < best_level) best = i, best_level = level;
    }
    return best;
}

/* Two of the first n_pages pages become one; the freed one is then the newest in use, and empty. */
BKVI_NOINLINE void bkvi_halve(bkvi_head *h, uint32_t n_pages) {
    bkvi_block *block = (bkvi_block *)(void *)h->scratch;
    unsigned char keep[BKVI_BLOCK];
    uint32_t i, n = 0, slots[2], pair = bkvi_pick_pair(h, n_pages), level, freed;
    for (i = 0; i < 2; i++) {
        slots[i] = bkvi_page_slot(h, pair + i);
        memcpy(block->mass + i * BKVI_PAGE, bkvi_part(h, BKVI_WEIGHT, slots[i]), 4 * BKVI_PAGE);
        memcpy(block->use + i * BKVI_PAGE, bkvi_part(h, BKVI_USE, slots[i]), 4 * BKVI_PAGE);
        h->sum -= bkvi_sum(h, slots[i], BKVI_PAGE) + bkvi_level(h, pair + i);
    }
    for (i = 0; i < BKVI_BLOCK; i++) {
        keep[i] = n < BKVI_PINS && bkvi_pinned(h, slots[i / BKVI_PAGE] + i % BKVI_PAGE);
        n += keep[i];
        if (block->use[i] >= BKVI_PINNED) block->use[i] = 0.0f;
    }
    bkvi_choose(h, slots, block, keep);
    h->halvings++;
    /* In order, and in place: the n-th survivor comes from place n or later. */
    for (i = n = 0; i < BKVI_BLOCK; i++)
        if (keep[i])
            bkvi_move_slot(h, slots[0] + n++, slots[i / BKVI_PAGE] + i % BKVI_PAGE,
                           block->mass[i] > 1.0f ? block->mass[i] : 1.0f);
    bkvi_clear(h, slots[1], BKVI_PAGE);
    freed = bkvi_place(h, pair + 1);
    level = bkvi_max(bkvi_level(h, pair), bkvi_level(h, pair + 1)) +
            (h->c->cfg.rule == BKV_RULE_WINDOW ? 0 : 1);
    h->sum += bkvi_sum(h, slots[0], BKVI_PAGE) + level;
    bkvi_set_page(h, pair, bkvi_place(h, pair), level);
    for (i = pair + 1; i + 1 < h->used; i++)
        bkvi_set_page(h, i, bkvi_place(h, i + 1), bkvi_level(h, i + 1));
    bkvi_set_page(h, h->used - 1, freed, 0);
}

/* Makes room for a run of tokens next to each other, in the sinks or in the newest page, and says
   at which slot it starts and how many tokens fit. A run never crosses a multiple of 64 slots, so
   that attention over a run sees the same blocks as attention after each of its tokens. */
static uint32_t bkvi_reserve(bkvi_head *h, uint32_t *first_slot) {
    const bkv_cache *c = h->c;
    if (h->sinks < c->sink_slots) {
        *first_slot = h->sinks;
        return bkvi_min(BKVI_PAGE - h->sinks % BKVI_PAGE, c->sink_slots - h->sinks);
    }
    if (h->used == 0 || h->fill == BKVI_PAGE) {
        if (h->used < c->n_pages)
            bkvi_set_page(h, h->used, h->used, 0), h->used++;
        else
            bkvi_halve(h, c->n_pages - c->window_pages);
        h->fill = 0;
    }
    *first_slot = bkvi_page_slot(h, h->used - 1) + h->fill;
    return BKVI_PAGE - h->fill;
}

static const unsigned char *bkvi_at(const bkv_tensor *t, size_t token, size_t head) {
    return (const unsigned char *)t->data + token * t->token_stride + head * t->head_stride;
}

/* Writes tokens first .. first + n - 1 of in = k, v to slots that bkvi_reserve() gave. */
static void bkvi_put_run(bkvi_head *h, uint32_t slot, bkv_tensor *const *in, size_t first,
                         uint32_t n, uint32_t flags) {
    const bkv_cache *c = h->c;
    const bkvi_kernels kernels = bkvi_kernels_of(c->cfg.backend);
    unsigned char *rest;
    uint32_t t;
    int i;
    for (i = BKVI_K; i <= BKVI_V && h->used && h->fill == 0; i++) /* a new page takes the rests */
        if ((rest = bkvi_rest(h, i, slot)) != NULL) memset(rest, 0, BKVI_PAGE * c->each[i]);
    for (t = 0; t < n; t++, slot++) {
        bkvi_putf(bkvi_part(h, BKVI_WEIGHT, slot), 1.0f);
        bkvi_putf(bkvi_part(h, BKVI_USE, slot), flags & BKV_PIN ? BKVI_PINNED : 0.0f);
        bkvi_put32(bkvi_part(h, BKVI_POSITION, slot), (uint32_t)(h->seen + t));
        for (i = 0; i < 2; i++)
            kernels.put(bkvi_part(h, BKVI_K + i, slot), i ? 1 : BKVI_LANES,
                        bkvi_rest(h, BKVI_K + i, slot), bkvi_part(h, BKVI_K_SCALE + i, slot),
                        BKVI_TYPE(c->cfg.kv_type), bkvi_at(in[i], first + t, h->index), in[i]->type,
                        in[i]->elem_stride, BKVI_DIM(i ? c->cfg.value_dim : c->cfg.head_dim),
                        h->scratch);
    }
    h->sum += bkvi_sum(h, slot - n, n);
    h->seen += n;
    *(h->sinks < c->sink_slots ? &h->sinks : &h->fill) += n;
}

/* ---- §9 ATTEND --------------------------------------------------------------------- >>attend
   One mechanism for decode and prefill: `rows` of (token, query head) run over the blocks of a KV
   head: sinks in steps of 64 slots, pages in the order of memory (by age they outran prefetchers:
   1.7x on Zen 4), the two newest last. For each (bkvi_attend in §12): scores of a tile of rows,
   online softmax in base 2 with weights, sum of values. A run's tokens see the last one in part. */
/* The rows that attend works on at once; its scratch, of which a halving needs more. */
typedef struct bkvi_tiles {
    float lanes[BKVI_ROWS * BKVI_LANES];    /* [rows][16] sums of weights, lane by lane */
    float max[BKVI_ROWS], limit[BKVI_ROWS]; /* limit: how much of the last block a row sees */
    float scores[BKVI_TILE_MAX * BKVI_PAGE];    /* of one tile of rows */
    float work[2 * BKVI_DIM_MAX];               /* to rotate in */
    float doubt[BKVI_LANES + 2 * BKVI_DIM_MAX]; /* see bkvi_doubt, ... */
    uint32_t doubted;                           /* ... and of which row it is */
    float *out;                                 /* [rows][v_dim_pad], behind q */
    float q[BKVI_ROWS * 2 * BKVI_DIM_MAX];      /* [rows][dim], scaled; of a tile [dim][rows] */
} bkvi_tiles;
typedef char bkvi_scratch_suffices[sizeof(bkvi_tiles) <= sizeof(bkvi_block) ? 1 : -1];

/* One block as attend sees it, and what to prefetch while at it (NULL: nothing). */
typedef struct bkvi_span {
    const unsigned char *k, *v, *weight, *next_k, *next_v;
    const unsigned char *k_scale, *v_scale, *k_rest, *v_rest; /* or NULL */
    unsigned char *use;                                       /* NULL: an old block, it stays */
    uint32_t slots, rests, last; /* last: is it the last block? */
} bkvi_span;

/* First slot and number of slots of block b. */
static uint32_t bkvi_block_slot(const bkvi_head *h, uint32_t b, uint32_t *n_slots) {
    uint32_t n_sinks = bkvi_round_up(h->sinks, BKVI_PAGE) / BKVI_PAGE, newest, second;
    if (b < n_sinks) {
        *n_slots = bkvi_min(h->sinks - b * BKVI_PAGE, BKVI_PAGE);
        return b * BKVI_PAGE;
    }
    b -= n_sinks;
    *n_slots = b + 1 == h->used ? h->fill : (uint32_t)BKVI_PAGE;
    if (b + 2 >= h->used) return bkvi_page_slot(h, b);
    newest = bkvi_place(h, h->used - 1), second = bkvi_place(h, h->used - 2);
    b += b >= bkvi_min(newest, second);
    b += b >= bkvi_max(newest, second);
    return h->c->sink_slots + BKVI_PAGE * b;
}

/* ---- §10 PUBLIC FUNCTIONS ---------------------------------------------------------- >>public */
/* Resolves every default and computes the layout; c->mem is left to the caller. */
static bkv_result bkvi_plan(const bkv_config *cfg, bkv_cache *c) {
    bkv_config *r = &c->cfg;
    uint32_t sinks, pages, window, i;
    uint64_t end = 0;
    memset(c, 0, sizeof *c);
    *r = *cfg;
    if (!r->n_q_heads) r->n_q_heads = r->n_kv_heads;
    if (r->n_kv_heads < 1 || r->n_kv_heads > 4096 || r->n_q_heads % r->n_kv_heads ||
        r->n_q_heads / r->n_kv_heads > 16)
        return BKV_E_HEADS;
    c->group = r->n_q_heads / r->n_kv_heads;
    if (!r->value_dim) r->value_dim = r->head_dim;
    if (r->head_dim < 1 || r->head_dim > 512 || r->value_dim < 1 || r->value_dim > 512 ||
        BKVI_DIM(r->head_dim) != r->head_dim || BKVI_DIM(r->value_dim) != r->value_dim)
        return BKV_E_HEAD_DIM;
    if (!r->kv_type) r->kv_type = BKV_F16;
    if (r->kv_type < BKV_F32 || r->kv_type > BKV_I4 || r->kv_type != BKVI_TYPE(r->kv_type))
        return BKV_E_KV_TYPE;
    c->elem_bytes = bkvi_type_bytes(r->kv_type);
    if (r->budget > 1u << 24) return BKV_E_BUDGET;
    c->slots = r->budget / BKVI_LANES * BKVI_LANES;
    sinks = r->sinks == BKV_NONE ? 0 : r->sinks ? r->sinks : 4;
    window = r->window == BKV_NONE ? 0 : r->window;
    if (sinks > c->slots || window > c->slots) return BKV_E_BUDGET;
    pages = (c->slots - bkvi_round_up(sinks, BKVI_LANES)) / BKVI_PAGE;
    window = bkvi_round_up(window, BKVI_PAGE) / BKVI_PAGE;
    if (!r->window && pages > 2) /* of few slots halved pages need every one */
        window = c->slots < BKVI_FEW ? 1 : bkvi_min(r->budget / 4 / BKVI_PAGE, pages - 2);
    if (pages < window + 2) return BKV_E_BUDGET;
    c->n_pages = pages, c->window_pages = window;
    c->sink_slots = c->slots - pages * BKVI_PAGE;
    r->sinks = c->sink_slots ? c->sink_slots : BKV_NONE;
    r->window = window ? window * BKVI_PAGE : BKV_NONE;
    if (!r->rule) r->rule = BKV_RULE_SAMPLE;
    if (!r->importance)
        r->importance = BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY | BKV_IMPORTANCE_USE;
    if (!r->rounds) r->rounds = 1;
    if (r->rule > BKV_RULE_WINDOW || (r->importance > 7 && r->importance != BKV_NONE) ||
        (r->rounds > 64 && r->rounds != BKV_NONE))
        return BKV_E_RULE;
    if (r->temp == 0.0f) r->temp = 0.1f;
    if (r->scale == 0.0f) r->scale = (float)(1.0 / bkvi_root((float)r->head_dim));
    /* Written so that NaN fails. The bounds keep every logit below 2^127 for inputs below 2^55. */
    if (!(r->temp >= 1e-6f && r->temp <= 1e6f) || !(r->scale >= 1e-6f && r->scale <= 8.0f) ||
        !(r->scale * r->temp <= 8.0f) ||
        !(r->softcap == 0.0f || (r->softcap >= 1.0f && r->softcap <= 100.0f)))
        return BKV_E_PARAM;
    if (!r->n_threads) r->n_threads = 1;
    if (r->n_threads > 1024) return BKV_E_THREADS;
    if (!(r->backend = bkvi_pick_backend(r->backend))) return BKV_E_BACKEND;
    i = r->kv_type == BKV_I4 ? bkvi_min(pages / 4, bkvi_min(window + 1, 4)) : 1;
    if (r->kv_type >= BKV_I8 && c->slots >= BKVI_FEW) /* beyond the window a page has none */
        c->rests = bkvi_min(c->sink_slots, BKVI_LANES) + BKVI_PAGE * bkvi_max(i, 1);
    for (i = 0; i < BKVI_END; i++, end = (end + 63) & ~(uint64_t)63) {
        const uint32_t scale = r->kv_type >= BKV_I8 ? 2 : 0, es = (uint32_t)c->elem_bytes;
        const uint32_t k = bkvi_units(BKVI_TYPE(c->cfg.kv_type), r->head_dim);
        const uint32_t v = bkvi_units(BKVI_TYPE(c->cfg.kv_type), bkvi_v_dim(c));
        const uint32_t n = c->slots, query = 4 * bkvi_round_up(r->head_dim, BKVI_LANES);
        const uint32_t each[] = {4, 8, 4, 4, 4, query, scale, scale, k, v, k * es, v * es};
        const uint32_t count[] = {16, pages, n, n, n, c->group, n, n, c->rests, c->rests, n, n};
        c->at[i] = (size_t)end, c->each[i] = each[i];
        end += (uint64_t)each[i] * count[i];
    }
    c->at[BKVI_END] = c->head_bytes = (size_t)end;
    c->scratch_bytes = 4 * BKVI_BLOCK * ((size_t)bkvi_max(r->head_dim, bkvi_v_dim(c)) + 1) +
                       offsetof(bkvi_block, panels); /* of these as much as a halving needs */
    end = BKVI_HEADER_BYTES + r->n_kv_heads * end;
    c->state_bytes = (size_t)end;
    end += 64 + (uint64_t)r->n_threads * c->scratch_bytes; /* 64: to align the scratch anywhere */
    c->bytes = (size_t)end;
    return end <= SIZE_MAX ? BKV_OK : BKV_E_SIZE;
}

/* The header: magic, version, then the words of the config, from which bkvi_plan() comes to the
   same layout. The backend is left out, as it makes no difference to the bytes. */
typedef char bkvi_config_is_words[offsetof(bkv_config, seed) == BKVI_CONFIG_BYTES ? 1 : -1];
static void bkvi_header_put(const bkv_cache *c, unsigned char *to) {
    bkv_config cfg = c->cfg;
    cfg.backend = BKV_BACKEND_AUTO;
    memset(to, 0, BKVI_HEADER_BYTES);
    bkvi_put32(to, BKVI_MAGIC), bkvi_put32(to + 4, BKVI_STATE_VERSION);
    memcpy(to + 8, &cfg, BKVI_CONFIG_BYTES);
    bkvi_put64(to + 8 + BKVI_CONFIG_BYTES, cfg.seed);
}

/* A cache from the header of a state, which may ask for what this build or CPU has not. */
static bkv_result bkvi_header_get(const unsigned char *mem, const uint32_t *n_threads,
                                  uint32_t backend, bkv_cache *made) {
    const uint32_t magic = bkvi_get32(mem);
    bkv_config cfg;
    bkv_result r;
    size_t i;
    if (magic != BKVI_MAGIC && magic != BKVI_MAGIC_SWAPPED) return BKV_E_STATE;
    if (magic != BKVI_MAGIC || bkvi_get32(mem + 4) != BKVI_STATE_VERSION) return BKV_E_VERSION;
    for (i = 8 + sizeof cfg; i < BKVI_HEADER_BYTES; i++)
        if (mem[i]) return BKV_E_STATE;
    memcpy(&cfg, mem + 8, sizeof cfg);
    cfg.seed = bkvi_get64(mem + 8 + BKVI_CONFIG_BYTES);
    if (cfg.backend != BKV_BACKEND_AUTO) return BKV_E_STATE;
    cfg.backend = backend;
    if (n_threads) cfg.n_threads = *n_threads;
    r = bkvi_plan(&cfg, made);
    return r == BKV_OK || r == BKV_E_BACKEND || r == BKV_E_HEAD_DIM || r == BKV_E_KV_TYPE ||
                   r == BKV_E_THREADS
               ? r
               : BKV_E_STATE;
}

/* What attend and append rely on: counters in bounds, equal in all heads; a place for each page. */
static int bkvi_head_sound(const bkv_cache *c, uint32_t head) {
    bkvi_head h = bkvi_head_get(c, head, 0);
    unsigned char taken[512]; /* a bit each for 4096 places at a time */
    uint32_t i, base, n_bits = 8 * sizeof taken;
    if (h.sinks > c->sink_slots || h.used > c->n_pages || h.fill > BKVI_PAGE) return 0;
    if (h.used ? h.fill == 0 || h.sinks != c->sink_slots : h.fill != 0) return 0;
    if (h.seen != bkvi_held(&h) + BKVI_PAGE * h.halvings || h.halvings > h.seen ||
        (h.halvings && h.used < c->n_pages))
        return 0;
    for (base = 0; base < h.used; base += n_bits) {
        memset(taken, 0, sizeof taken);
        for (i = 0; i < h.used; i++) {
            uint32_t place = bkvi_place(&h, i), bit = place - base;
            if (place >= h.used) return 0;
            if (bit >= n_bits) continue; /* or below base */
            if (taken[bit / 8] >> bit % 8 & 1) return 0;
            taken[bit / 8] = (unsigned char)(taken[bit / 8] | 1u << bit % 8);
        }
    }
    for (i = BKVI_COUNTER_BYTES + 4; i < BKVI_ERROR_AT; i++)
        if (h.mem[i]) return 0;
    return bkvi_same(h.mem, bkvi_head_mem(c, 0), BKVI_COUNTER_BYTES);
}

BALANCEKV_API bkv_config bkv_config_default(uint32_t n_q_heads, uint32_t n_kv_heads,
                                            uint32_t head_dim, uint32_t budget) {
    bkv_cache c;
    bkv_config cfg;
    memset(&cfg, 0, sizeof cfg);
    cfg.n_q_heads = n_q_heads, cfg.n_kv_heads = n_kv_heads;
    cfg.head_dim = head_dim, cfg.budget = budget;
    if (bkvi_plan(&cfg, &c) == BKV_OK) cfg = c.cfg, cfg.backend = BKV_BACKEND_AUTO;
    return cfg;
}

BALANCEKV_API bkv_result bkv_check(const bkv_config *cfg) {
    bkv_cache c;
    return cfg ? bkvi_plan(cfg, &c) : BKV_E_NULL;
}
BALANCEKV_API size_t bkv_size(const bkv_config *cfg) {
    bkv_cache c;
    return cfg && bkvi_plan(cfg, &c) == BKV_OK ? c.bytes : 0;
}

BALANCEKV_API bkv_result bkv_init(bkv_cache *c, const bkv_config *cfg, void *mem,
                                  size_t mem_bytes) {
    bkv_cache made;
    bkv_result r;
    if (!c || !cfg || !mem) return BKV_E_NULL;
    if ((r = bkvi_plan(cfg, &made)) != BKV_OK) return r;
    if (mem_bytes < made.bytes) return BKV_E_MEMORY;
    made.mem = (unsigned char *)mem;
    *c = made;
    return bkv_reset(c);
}

BALANCEKV_API bkv_result bkv_attach(bkv_cache *c, void *mem, size_t mem_bytes, uint32_t backend) {
    bkv_cache made;
    bkv_result r;
    uint32_t head;
    if (!c || !mem) return BKV_E_NULL;
    if (mem_bytes < BKVI_HEADER_BYTES) return BKV_E_MEMORY;
    if ((r = bkvi_header_get((const unsigned char *)mem, NULL, backend, &made)) != BKV_OK) return r;
    if (mem_bytes < made.bytes) return BKV_E_MEMORY;
    made.mem = (unsigned char *)mem;
    for (head = 0; head < made.cfg.n_kv_heads; head++)
        if (!bkvi_head_sound(&made, head)) return BKV_E_STATE;
    *c = made;
    return BKV_OK;
}

BALANCEKV_API bkv_result bkv_reset(bkv_cache *c) {
    if (!c || !c->mem) return BKV_E_NULL;
    memset(c->mem, 0, c->state_bytes);
    bkvi_header_put(c, c->mem);
    return BKV_OK;
}

BALANCEKV_API bkv_tensor bkv_dense(const void *data, uint32_t type) {
    bkv_tensor t = {data, type, 0, 0, 0};
    return t;
}

/* Fills in the strides of 0, then checks that no two elements overlap and that the extent fits. */
static bkv_result bkvi_check_tensor(bkv_tensor *t, size_t n_tokens, size_t n_heads, size_t dim) {
    size_t stride[3], steps[3], extent = bkvi_type_bytes(t->type), i, j, n;
    if (t->type < BKV_F32 || t->type > BKV_BF16) return BKV_E_TYPE;
    if (!t->elem_stride) t->elem_stride = extent;
    if (!t->head_stride && t->elem_stride > SIZE_MAX / dim) return BKV_E_SIZE;
    if (!t->head_stride) t->head_stride = dim * t->elem_stride;
    if (!t->token_stride && t->head_stride > SIZE_MAX / n_heads) return BKV_E_SIZE;
    if (!t->token_stride) t->token_stride = n_heads * t->head_stride;
    steps[0] = dim - 1, stride[0] = t->elem_stride;
    steps[1] = n_heads - 1, stride[1] = t->head_stride;
    steps[2] = n_tokens - 1, stride[2] = t->token_stride;
    for (n = 0; n < 3; n++, steps[i] = 0) { /* axes by stride; extent: of all inside the present */
        for (i = 0, j = 1; j < 3; j++)
            if (!steps[i] || (steps[j] && stride[j] < stride[i])) i = j;
        if (steps[i] && stride[i] < extent) return BKV_E_STRIDE;
        if (steps[i] > ((size_t)PTRDIFF_MAX - extent) / stride[i]) return BKV_E_SIZE;
        extent += steps[i] * stride[i];
    }
    return BKV_OK;
}

/* Checks tensor i of k, v and q in this way; with `values` every element of it. */
static bkv_result bkvi_check_input(const bkv_cache *c, bkv_tensor *t, int i, size_t n_tokens,
                                   int values) {
    const uint32_t heads = i == 2 ? c->cfg.n_q_heads : c->cfg.n_kv_heads;
    const uint32_t dim = BKVI_DIM(i == 1 ? c->cfg.value_dim : c->cfg.head_dim);
    const float limit = i < 2 && c->cfg.kv_type == BKV_F16 ? 65520.0f : BKVI_HUGE;
    const bkvi_kernels kernels = bkvi_kernels_of(c->cfg.backend);
    size_t token;
    uint32_t head;
    if (!values) return bkvi_check_tensor(t, n_tokens, heads, dim);
    for (token = 0; token < n_tokens; token++)
        for (head = 0; head < heads; head++)
            if (!kernels.scan(bkvi_at(t, token, head), t->type, t->elem_stride, dim, limit))
                return BKV_E_VALUE;
    return BKV_OK;
}

/* append (no q), attend (no k and v) and prefill. Values are checked last; every thread looks at
   those of every head, so that all threads come to the same verdict. */
static bkv_result bkvi_feed(bkv_cache *c, bkv_tensor *k, bkv_tensor *v, bkv_tensor *q, float *out,
                            float *max, float *sum, size_t n_tokens, uint32_t flags, uint32_t ith,
                            uint32_t nth) {
    bkv_tensor *const in[3] = {k, v, q};
    uint32_t head, end, slot;
    bkv_result r;
    int i;
    if (!c || !c->mem || (q && !out)) return BKV_E_NULL;
    for (i = 0; i < 3; i++)
        if (in[i] && !in[i]->data) return BKV_E_NULL;
    if (!n_tokens) return BKV_E_COUNT;
    if (flags & ~(uint32_t)(BKV_PIN | BKV_DRAFT)) return BKV_E_FLAGS;
    if (ith >= nth || nth > c->cfg.n_threads) return BKV_E_THREADS;
    for (i = 0; i < 6; i++)
        if (in[i % 3] && (r = bkvi_check_input(c, in[i % 3], i % 3, n_tokens, i > 2)) != BKV_OK)
            return r;
    if (!k && bkvi_get64(bkvi_head_mem(c, 0)) == 0) return BKV_E_EMPTY;
    end = c->cfg.n_kv_heads * (ith + 1) / nth; /* of share ith; at most 2^22 / nth */
    for (head = c->cfg.n_kv_heads * ith / nth; head < end; head++) {
        bkvi_head h = bkvi_head_get(c, head, ith);
        bkvi_queries run = {q, out, max, sum, 0, 1};
        for (; run.first < n_tokens; run.first += run.n) {
            if (k) {
                run.n = bkvi_reserve(&h, &slot);
                if (run.n > n_tokens - run.first) run.n = (uint32_t)(n_tokens - run.first);
                bkvi_put_run(&h, slot, in, run.first, run.n, flags);
                h.drafts = flags & BKV_DRAFT ? bkvi_min(h.drafts, 1u << 30) + run.n : 0;
            }
            if (q) bkvi_kernels_of(c->cfg.backend).attend(&h, &run);
        }
        if (k) bkvi_head_put(&h);
    }
    return BKV_OK;
}
BALANCEKV_API bkv_result bkv_append(bkv_cache *c, bkv_tensor k, bkv_tensor v, size_t n_tokens,
                                    uint32_t flags, uint32_t ith, uint32_t nth) {
    return bkvi_feed(c, &k, &v, NULL, NULL, NULL, NULL, n_tokens, flags, ith, nth);
}
BALANCEKV_API bkv_result bkv_attend(bkv_cache *c, bkv_tensor q, float *out, uint32_t ith,
                                    uint32_t nth) {
    return bkvi_feed(c, NULL, NULL, &q, out, NULL, NULL, 1, 0, ith, nth);
}
BALANCEKV_API bkv_result bkv_attend_partial(bkv_cache *c, bkv_tensor q, float *out, float *max,
                                            float *sum, uint32_t ith, uint32_t nth) {
    if (!max || !sum) return BKV_E_NULL;
    return bkvi_feed(c, NULL, NULL, &q, out, max, sum, 1, 0, ith, nth);
}
BALANCEKV_API bkv_result bkv_prefill(bkv_cache *c, bkv_tensor k, bkv_tensor v, bkv_tensor q,
                                     float *out, size_t n_tokens, uint32_t flags, uint32_t ith,
                                     uint32_t nth) {
    return bkvi_feed(c, &k, &v, &q, out, NULL, NULL, n_tokens, flags, ith, nth);
}

/* Takes back the newest n tokens of a head, one at a time. */
static void bkvi_take_back(bkvi_head *h, uint32_t n) {
    static const unsigned char zero = 0;
    unsigned char *rest;
    int i;
    h->drafts = h->drafts > n ? h->drafts - n : 0;
    for (h->seen -= n; n; n--) {
        uint32_t slot = bkvi_slot_of(h, bkvi_held(h) - 1);
        h->sum -= bkvi_sum(h, slot, 1);
        bkvi_clear(h, slot, 1);
        for (i = BKVI_K; i <= BKVI_V; i++)
            if ((rest = bkvi_rest(h, i, slot)) != NULL)
                bkvi_copy(rest, i == BKVI_K ? BKVI_LANES : 1, &zero, 0,
                          (uint32_t)h->c->each[i - BKVI_K + BKVI_K_REST], 1);
        if (!h->used)
            h->sinks--;
        else if (--h->fill == 0) {
            bkvi_set_page(h, --h->used, 0, 0);
            h->fill = h->used ? BKVI_PAGE : 0;
        }
    }
    bkvi_head_put(h);
}
BALANCEKV_API bkv_result bkv_truncate(bkv_cache *c, uint64_t n_tokens) {
    bkvi_head h;
    uint32_t head;
    if (!c || !c->mem) return BKV_E_NULL;
    h = bkvi_head_get(c, 0, 0);
    if (n_tokens > h.seen) return BKV_E_ROLLBACK;
    if ((h.halvings || (c->rests && n_tokens > c->sink_slots)) && h.seen - n_tokens >= h.fill)
        return BKV_E_ROLLBACK; /* not within the newest page, which is never empty */
    for (head = 0; head < c->cfg.n_kv_heads; head++) {
        h = bkvi_head_get(c, head, 0);
        bkvi_take_back(&h, (uint32_t)(h.seen - n_tokens));
    }
    return BKV_OK;
}

/* The pages of a head into places that there still are, rests where those that are left take turns;
   then its parts to where the new layout has them, at or below where they were. */
BKVI_NOINLINE void bkvi_move_head(const bkvi_head *h, const bkv_cache *to) {
    const bkv_cache *c = h->c;
    unsigned char *taken = (unsigned char *)h->scratch; /* a bit for each of <= 2^18 */
    uint32_t i, j, next = 0;
    memset(taken, 0, c->n_pages / 8 + 1);
    for (i = 0; i < h->used; i++) {
        uint32_t place = bkvi_place(h, i);
        taken[place / 8] = (unsigned char)(taken[place / 8] | 1u << place % 8);
    }
    for (i = 0; i < h->used; i++) {
        uint32_t from = bkvi_page_slot(h, i);
        if (bkvi_place(h, i) < to->n_pages) continue;
        while (taken[next / 8] >> next % 8 & 1) next++;
        bkvi_set_page(h, i, next++, bkvi_level(h, i));
        for (j = 0; j < BKVI_PAGE; j++)
            bkvi_move_slot(h, bkvi_page_slot(h, i) + j, from + j, bkvi_weight(h, from + j));
        bkvi_clear(h, from, BKVI_PAGE);
    }
    for (i = BKVI_K_REST; i <= BKVI_V_REST && to->rests < c->rests; i++) {
        const size_t each = c->each[i], page = BKVI_PAGE * each, all = c->rests / BKVI_PAGE * page;
        unsigned char *rests = h->mem + c->at[i] + c->rests % BKVI_PAGE * each;
        memcpy(taken, rests, all);
        memset(rests, 0, all);
        for (j = h->used; j > 0 && j + to->rests / BKVI_PAGE > h->used; j--)
            memcpy(rests + (h->halvings + j) % (to->rests / BKVI_PAGE) * page,
                   taken + (h->halvings + j) % (c->rests / BKVI_PAGE) * page, page);
    }
    for (i = 0; i < BKVI_END; i++)
        memmove(bkvi_head_mem(to, h->index) + to->at[i], h->mem + c->at[i],
                to->at[i + 1] - to->at[i]);
}
BALANCEKV_API bkv_result bkv_shrink(bkv_cache *c, uint32_t budget) {
    bkv_cache made;
    bkv_config cfg;
    uint32_t head, pages;
    if (!c || !c->mem) return BKV_E_NULL;
    if (budget > c->cfg.budget || budget < c->sink_slots) return BKV_E_BUDGET;
    pages = bkvi_min((budget - c->sink_slots) / BKVI_PAGE, c->n_pages);
    cfg = c->cfg;
    cfg.budget = c->sink_slots + pages * BKVI_PAGE;
    if (pages < 2) return BKV_E_BUDGET;
    pages = bkvi_min(c->window_pages, pages - 2);
    cfg.window = pages ? pages * BKVI_PAGE : BKV_NONE;
    if (bkvi_plan(&cfg, &made) != BKV_OK) return BKV_E_BUDGET;
    made.mem = c->mem;
    for (head = 0; head < c->cfg.n_kv_heads; head++) {
        bkvi_head h = bkvi_head_get(c, head, 0);
        while (h.used > made.n_pages) { /* all pages are in use, one of them partly */
            bkvi_halve(&h, h.used - (made.window_pages + 1));
            bkvi_set_page(&h, --h.used, 0, 0);
        }
        bkvi_head_put(&h);
        bkvi_move_head(&h, &made);
    }
    *c = made;
    bkvi_header_put(c, c->mem);
    return BKV_OK;
}

BALANCEKV_API uint32_t bkv_budget_for_bytes(const bkv_config *cfg, size_t bytes) {
    bkv_cache c;
    bkv_config tried;
    bkv_result r;
    uint32_t best = 0, step;
    if (!cfg) return 0;
    tried = *cfg;
    for (step = 1u << 24; step >= BKVI_LANES; step /= 2) { /* too small a budget is no reason */
        tried.budget = best + step;
        r = bkvi_plan(&tried, &c);
        if (tried.budget <= 1u << 24 && (r == BKV_E_BUDGET || (r == BKV_OK && c.bytes <= bytes)))
            best += step;
    }
    tried.budget = best;
    return bkvi_plan(&tried, &c) == BKV_OK && c.bytes <= bytes ? best : 0;
}

/* ---- saved states: the bytes of the state in little-endian order, and a checksum ---- */
static void bkvi_swap(unsigned char *p, size_t bytes, size_t unit) {
    const uint16_t one = 1;
    size_t i, j;
    if (*(const unsigned char *)&one == 1) return;
    for (i = 0; i < bytes; i += unit)
        for (j = 0; j < unit / 2; j++) {
            unsigned char byte = p[i + j];
            p[i + j] = p[i + unit - 1 - j];
            p[i + unit - 1 - j] = byte;
        }
}
static void bkvi_swap_heads(const bkv_cache *c, unsigned char *p) {
    uint32_t head;
    for (head = 0, p += BKVI_HEADER_BYTES; head < c->cfg.n_kv_heads; head++, p += c->head_bytes) {
        bkvi_swap(p, c->at[BKVI_K_SCALE], 4);
        bkvi_swap(p + c->at[BKVI_K_SCALE], c->at[BKVI_K_REST] - c->at[BKVI_K_SCALE], 2);
        bkvi_swap(p + c->at[BKVI_K], c->head_bytes - c->at[BKVI_K], c->elem_bytes); /* not rests */
    }
}
static uint64_t bkvi_checksum(uint64_t sum, const unsigned char *p, size_t bytes) {
    for (; bytes; bytes -= 8, p += 8) {
        uint64_t x = 0;
        int i;
        for (i = 8; i-- > 0;) x = x << 8 | p[i];
        sum = bkvi_mix(sum ^ x) + BKVI_GOLDEN;
    }
    return sum;
}
static void bkvi_put_sum(unsigned char *header, uint64_t sum) {
    uint32_t i;
    for (i = 0; i < 8; i++) header[BKVI_SUM_AT + i] = (unsigned char)(sum >> 8 * i);
}

BALANCEKV_API bkv_result bkv_save(const bkv_cache *c, void *out, size_t out_bytes) {
    unsigned char *p = (unsigned char *)out;
    if (!c || !c->mem || !out) return BKV_E_NULL;
    if (out_bytes < c->state_bytes) return BKV_E_MEMORY;
    memcpy(p, c->mem, c->state_bytes);
    bkvi_swap(p, BKVI_HEADER_BYTES, 4);
    bkvi_swap_heads(c, p);
    bkvi_put_sum(p, bkvi_checksum(0, p, c->state_bytes));
    return BKV_OK;
}

/* Checks the bytes of a saved state as such and plans its cache. */
static bkv_result bkvi_check_saved(const void *from, size_t bytes, uint32_t n_threads,
                                   uint32_t backend, bkv_cache *made) {
    const unsigned char *saved = (const unsigned char *)from;
    unsigned char header[BKVI_HEADER_BYTES];
    uint64_t check;
    bkv_result r;
    if (!saved) return BKV_E_NULL;
    if (bytes < sizeof header) return BKV_E_STATE;
    memcpy(header, saved, sizeof header);
    bkvi_put_sum(header, 0);
    check = bkvi_checksum(0, header, sizeof header);
    bkvi_swap(header, sizeof header, 4);
    if ((r = bkvi_header_get(header, &n_threads, backend, made)) != BKV_OK) return r;
    if (bytes < made->state_bytes) return BKV_E_STATE;
    bkvi_put_sum(header, bkvi_checksum(check, saved + BKVI_HEADER_BYTES,
                                       made->state_bytes - BKVI_HEADER_BYTES));
    return bkvi_same(header + BKVI_SUM_AT, saved + BKVI_SUM_AT, 8) ? BKV_OK : BKV_E_STATE;
}
BALANCEKV_API size_t bkv_load_size(const void *saved, size_t saved_bytes, uint32_t n_threads) {
    bkv_cache made;
    bkv_result r = bkvi_check_saved(saved, saved_bytes, n_threads, BKV_BACKEND_AUTO, &made);
    return r == BKV_OK ? made.bytes : 0;
}
BALANCEKV_API bkv_result bkv_load(bkv_cache *c, const void *saved, size_t saved_bytes, void *mem,
                                  size_t mem_bytes, uint32_t n_threads, uint32_t backend) {
    bkv_cache made;
    bkv_result r;
    if (!c || !mem) return BKV_E_NULL;
    if ((r = bkvi_check_saved(saved, saved_bytes, n_threads, backend, &made)) != BKV_OK) return r;
    if (mem_bytes < made.bytes) return BKV_E_MEMORY;
    made.mem = (unsigned char *)mem;
    memcpy(mem, saved, made.state_bytes);
    bkvi_swap_heads(&made, made.mem);
    bkvi_header_put(&made, made.mem);
    if ((r = bkv_validate(&made)) == BKV_OK) *c = made;
    return r;
}

static int bkvi_head_valid(const bkv_cache *c, uint32_t head) {
    const uint32_t type = c->cfg.kv_type, es = (uint32_t)c->elem_bytes;
    const float limit = type == BKV_F16 ? 65520.0f : 2.0f * BKVI_HUGE; /* bf16 may round up to it */
    const bkvi_kernels kernels = bkvi_kernels_of(c->cfg.backend);
    bkvi_head h = bkvi_head_get(c, head, 0);
    uint32_t i, part, held = 0, sum = bkvi_sum(&h, 0, c->slots);
    uint64_t next = 0;
    for (i = 0; i < c->n_pages; i++) {
        sum += bkvi_level(&h, i);
        if (bkvi_level(&h, i) > h.halvings || (i >= h.used && bkvi_place(&h, i))) return 0;
    }
    if (sum != h.sum || h.drafts > h.seen ||
        !kernels.scan(h.mem + BKVI_ERROR_AT, BKV_F32, 4, 1, BKVI_HUGE))
        return 0;
    for (i = 0; i < bkvi_held(&h); i++) { /* positions rise, but for those beyond 2^32 */
        uint32_t slot = bkvi_slot_of(&h, i);
        uint64_t position = bkvi_get32(bkvi_part(&h, BKVI_POSITION, slot));
        if (h.seen >> 32 == 0 && (position < next || position >= h.seen)) return 0;
        if (!(bkvi_weight(&h, slot) >= 1.0f)) return 0;
        next = position + 1;
    }
    for (i = 0; i < c->slots; i++) {
        float w = bkvi_weight(&h, i), use = bkvi_getf(bkvi_part(&h, BKVI_USE, i));
        if (!(w >= 1.0f && w <= 2.0f * (float)h.seen) &&
            (bkvi_bits(w) || bkvi_bits(use) || bkvi_get32(bkvi_part(&h, BKVI_POSITION, i))))
            return 0;
        if (!(use >= 0.0f && use <= 4294967296.0f) && use != BKVI_PINNED) return 0;
        held += w > 0.0f;
        for (part = BKVI_K; part <= BKVI_V && es > 1; part++) /* of keys a sixteenth of a panel */
            if (!kernels.scan(h.mem + c->at[part] + i * c->each[part], type, es,
                              (uint32_t)c->each[part] / es, limit))
                return 0;
    }
    for (part = BKVI_K_SCALE; part <= BKVI_V_SCALE && es == 1; part++)
        if (!kernels.scan(h.mem + c->at[part], BKV_BF16, 2, c->slots, BKVI_HUGE / 4)) return 0;
    return held == bkvi_held(&h) && /* rotated queries may be sqrt(512) times as large */
           kernels.scan(h.mem + c->at[BKVI_QUERIES], BKV_F32, 4,
                        c->group * (uint32_t)c->each[BKVI_QUERIES] / 4, 32.0f * BKVI_HUGE);
}
BALANCEKV_API bkv_result bkv_validate(const bkv_cache *c) {
    unsigned char header[BKVI_HEADER_BYTES];
    uint32_t head;
    if (!c || !c->mem) return BKV_E_NULL;
    bkvi_header_put(c, header);
    if (!bkvi_same(header, c->mem, sizeof header)) return BKV_E_STATE;
    for (head = 0; head < c->cfg.n_kv_heads; head++)
        if (!bkvi_head_sound(c, head) || !bkvi_head_valid(c, head)) return BKV_E_STATE;
    return BKV_OK;
}

/* The natural logarithm of x >= 1, within 1e-6: bit by bit, in integers. */
static float bkvi_log(float x) {
    uint32_t u = bkvi_bits(x), log2 = (u >> 23) - 127, i;
    uint64_t m = (uint64_t)((u & 0x7FFFFFu) | 0x800000u) << 8;
    for (i = 0; i < 24; i++) {
        m = m * m >> 31;
        log2 = log2 << 1 | (uint32_t)(m >> 32);
        m >>= m >> 32;
    }
    return (float)((double)log2 * (0.69314718055994530942 / 16777216.0));
}

BALANCEKV_API bkv_result bkv_export(bkv_cache *c, uint32_t head, bkv_rows *rows) {
    size_t size[3]; /* of a row of k, v and mask */
    unsigned char *scratch;
    bkvi_kernels kernels;
    bkvi_head h;
    uint32_t row;
    float *x, w;
    int i;
    if (!c || !c->mem || !rows) return BKV_E_NULL;
    if (head >= c->cfg.n_kv_heads) return BKV_E_INDEX;
    if (rows->type < BKV_F32 || rows->type > BKV_BF16 ||
        (rows->mask && rows->mask_type != BKV_F32 && rows->mask_type != BKV_F16))
        return BKV_E_TYPE;
    if (rows->n_rows < c->slots) return BKV_E_COUNT;
    void *const out[3] = {rows->k, rows->v, rows->mask};
    const uint32_t type[3] = {rows->type, rows->type, rows->mask_type};
    const uint32_t dim[3] = {c->cfg.head_dim, c->cfg.value_dim, 1};
    size_t stride[3] = {rows->k_stride, rows->v_stride, 0};
    for (i = 0; i < 3; i++) {
        size[i] = dim[i] * bkvi_type_bytes(type[i]);
        if (!stride[i]) stride[i] = size[i];
        if (stride[i] < size[i]) return BKV_E_STRIDE;
    }
    h = bkvi_head_get(c, head, 0);
    kernels = bkvi_kernels_of(c->cfg.backend);
    scratch = (unsigned char *)h.scratch, x = h.scratch + 2 * BKVI_DIM_MAX;
    rows->first = 0, rows->n = rows->n_rows;
    if (rows->seen && rows->seen <= h.seen && rows->halvings == h.halvings &&
        (!c->rests || h.seen - rows->seen < h.fill)) { /* a page loses its rests */
        rows->n = (uint32_t)(h.seen - rows->seen); /* in the newest page, or nothing was halved */
        rows->first = rows->n ? bkvi_slot_of(&h, bkvi_held(&h) - rows->n) : 0;
    }
    for (row = rows->first; row < rows->first + rows->n; row++) {
        w = row < c->slots ? bkvi_weight(&h, row) : 0.0f;
        for (i = 0; i < 3; i++) {
            if (!out[i]) continue;
            memset(scratch, 0, size[i]);
            if (i == 2) /* -Inf */
                bkvi_put32(scratch, type[2] == BKV_F32 ? 0xFF800000u : 0xFC00FC00u);
            if (w > 0.0f) {
                if (i == 2)
                    *x = bkvi_log(w);
                else
                    kernels.fetch(x, bkvi_part(&h, BKVI_K + i, row), BKVI_TYPE(c->cfg.kv_type),
                                  (i ? 1 : BKVI_LANES) * c->elem_bytes, i ? bkvi_v_dim(c) : dim[0],
                                  bkvi_part(&h, BKVI_K_SCALE + i, row),
                                  bkvi_rest(&h, BKVI_K + i, row));
                if (!kernels.scan((unsigned char *)x, BKV_F32, 4, dim[i],
                                  type[i] == BKV_F16 ? 65520.0f : 2.0f * BKVI_HUGE))
                    return BKV_E_VALUE;
                kernels.put(scratch, 1, NULL, NULL, type[i], (unsigned char *)x, BKV_F32, 4, dim[i],
                            NULL);
            }
            memcpy((unsigned char *)out[i] + row * stride[i], scratch, size[i]);
        }
    }
    rows->seen = h.seen, rows->halvings = h.halvings;
    return BKV_OK;
}

BALANCEKV_API bkv_result bkv_select(const bkv_config *cfg, void *mem, size_t mem_bytes,
                                    bkv_tensor k, bkv_tensor v, size_t n_tokens, uint32_t *index,
                                    float *weight, uint32_t *n_kept) {
    bkv_cache c;
    bkv_token_info info;
    bkv_result r;
    uint32_t head, i;
    if (!index || !weight || !n_kept) return BKV_E_NULL;
    if ((r = bkv_init(&c, cfg, mem, mem_bytes)) != BKV_OK) return r;
    if ((r = bkv_append(&c, k, v, n_tokens, 0, 0, 1)) != BKV_OK) return r;
    for (head = 0; head < c.cfg.n_kv_heads; head++)
        for (i = 0; bkv_token(&c, head, i, &info) == BKV_OK; i++) {
            index[(size_t)head * cfg->budget + i] = (uint32_t)info.position;
            weight[(size_t)head * cfg->budget + i] = info.weight;
            *n_kept = i + 1;
        }
    return BKV_OK;
}

BALANCEKV_API bkv_result bkv_token(const bkv_cache *c, uint32_t head, uint32_t i,
                                   bkv_token_info *info) {
    bkvi_head h;
    uint32_t slot;
    if (!c || !c->mem || !info) return BKV_E_NULL;
    if (head >= c->cfg.n_kv_heads) return BKV_E_INDEX;
    h = bkvi_head_get(c, head, 0);
    if (i >= bkvi_held(&h)) return BKV_E_INDEX;
    memset(info, 0, sizeof *info);
    slot = bkvi_slot_of(&h, i);
    info->kind = i < h.sinks                                        ? BKV_KIND_SINK
                 : bkvi_held(&h) - i <= c->window_pages * BKVI_PAGE ? BKV_KIND_WINDOW
                                                                    : BKV_KIND_PAGE;
    if (i >= h.sinks) info->level = bkvi_level(&h, (i - h.sinks) / BKVI_PAGE);
    info->position = bkvi_get32(bkvi_part(&h, BKVI_POSITION, slot));
    info->weight = bkvi_weight(&h, slot);
    info->use = bkvi_getf(bkvi_part(&h, BKVI_USE, slot));
    if (info->use >= BKVI_PINNED) info->use = 0.0f;
    info->pinned = bkvi_pinned(&h, slot);
    return BKV_OK;
}

BALANCEKV_API bkv_result bkv_error(const bkv_cache *c, uint32_t head, float *error) {
    if (!c || !c->mem || !error) return BKV_E_NULL;
    if (head >= c->cfg.n_kv_heads) return BKV_E_INDEX;
    *error = bkvi_getf(bkvi_head_mem(c, head) + BKVI_ERROR_AT);
    return BKV_OK;
}

BALANCEKV_API bkv_result bkv_stats(const bkv_cache *c, bkv_stats_info *info) {
    uint32_t head, i;
    if (!c || !c->mem || !info) return BKV_E_NULL;
    memset(info, 0, sizeof *info);
    for (head = 0; head < c->cfg.n_kv_heads; head++) {
        bkvi_head h = bkvi_head_get(c, head, 0);
        info->tokens_seen = h.seen; /* the same for every head, as are the next two */
        info->tokens_held = bkvi_held(&h);
        info->room = c->slots - bkvi_held(&h); /* until the rests are another page's */
        if (c->rests)
            info->room = bkvi_min(info->room, BKVI_PAGE + c->sink_slots - h.sinks - h.fill);
        info->halvings += h.halvings;
        info->error += bkvi_getf(h.mem + BKVI_ERROR_AT) / (float)c->cfg.n_kv_heads;
        for (i = 0; i < h.used; i++) info->max_level = bkvi_max(info->max_level, bkvi_level(&h, i));
        for (i = 0; i < c->slots; i++)
            if (bkvi_weight(&h, i) > info->max_weight) info->max_weight = bkvi_weight(&h, i);
    }
    info->slots = c->slots, info->sinks = c->sink_slots, info->n_pages = c->n_pages;
    info->window = c->window_pages * BKVI_PAGE;
    info->backend = c->cfg.backend, info->rule = c->cfg.rule;
    info->bytes = c->bytes, info->state_bytes = c->state_bytes;
    return BKV_OK;
}

BALANCEKV_API const char *bkv_result_string(bkv_result r) {
    switch (r) {
#define BKV_X(name, value, text)                                                                   \
    case name: return text;
        BKV_RESULTS(BKV_X)
#undef BKV_X
    default: return "unknown result";
    }
}
BALANCEKV_API const char *bkv_version(void) { return BKV_VERSION; }
BALANCEKV_API const char *bkv_backend_name(uint32_t backend) {
    static const char names[][7] = {"auto", "scalar", "avx2", "avx512", "neon"};
    return backend <= BKV_BACKEND_NEON ? names[backend] : "?";
}

/* The passes: the file reads its end once per backend but the widest, compiled in place below. */
#if BKVI_HAVE_SCALAR && BKVI_WIDEST != BALANCEKV_SIMD_SCALAR
#define BKVI_PASS BALANCEKV_SIMD_SCALAR
#include BALANCEKV_HEADER_NAME
#endif
#if BKVI_HAVE_AVX2 && BKVI_WIDEST != BALANCEKV_SIMD_AVX2
#define BKVI_PASS BALANCEKV_SIMD_AVX2
#include BALANCEKV_HEADER_NAME
#endif
#define BKVI_PASS BKVI_WIDEST

#endif /* BALANCEKV_IMPLEMENTATION */
#endif /* !BKVI_PASS */

#ifdef BKVI_PASS
/* ---- §11 VEC -------------------------------------------------------------------------- >>vec
   bkvi_vec, a register of BKVI_WIDTH float lanes (1, 4, 8 or 16), and operations bkvi_v(name) on
   it, read once per pass; + - * / are the compiler's. All data of §12 comes in sixteens and every
   loop steps by whole registers, so that no result depends on the width. A product must never flow
   into an addition other than through bkvi_v(fma): compilers may fuse the two.
     load, store                       lanes from and to floats
     load_f32, store_f32               the same at any address: of the state or a caller
     load_f16, _bf16, _i8, store_f16   the same, converted; to nearest even
     fused(x, y, z)                    x * y + z, rounded once; fma() is that, or BALANCEKV_FMA=0
     fma_at(c, i, inside, x, y)        c[i] * x + y, i a constant; may read up to c[i | 3]; by the
                                       multiply-add itself if `inside`
     sqrt(a)                           to nearest
     max(a, b), pick_gt(a, b, x, y)    per lane a > b ? a : b, a > b ? x : y
     any_gt(a, b), fold(a, add)        some lane a > b; the largest lane, or (add) their sum
     pow2(r)                           2^n for lanes r = 1.5 * 2^23 + n, n <= 127; 0 if n = -127
     zip(a, b)                         a0 b0 a1 b1 .. in a, the rest in b */
#define bkvi_v(op) BKVI_FN(bkvi_v_##op)
#define bkvi_k(name) BKVI_FN(bkvi_##name)
#define bkvi_vec BKVI_FN(bkvi_vec)
#define bkvi_words BKVI_FN(bkvi_words)
#define BKVI_WIDTH ((uint32_t)(sizeof(bkvi_vec) / sizeof(float)))
#define BKVI_REGS ((int)(BKVI_LANES / BKVI_WIDTH)) /* registers that hold sixteen lanes */
#define BKVI_TILES BKVI_UNROLL /* loops over the registers of a tile */

#if BKVI_PASS == BALANCEKV_SIMD_AVX2
BKVI_TARGET("avx2,fma,f16c")
#elif BKVI_PASS == BALANCEKV_SIMD_AVX512 && !BALANCEKV_SIMDE
BKVI_TARGET("avx512f,avx2,fma,f16c")
#endif

#define BKVI_OP(name, arguments, result)                                                           \
    BKVI_INLINE bkvi_vec bkvi_v(name) arguments { return (bkvi_vec)(result); }
#define BKVI_STORE(name, statement)                                                                \
    BKVI_INLINE void bkvi_v(name)(void *p, bkvi_vec x) { statement; }
#define BKVI_4 (bkvi_vec a, bkvi_vec b, bkvi_vec x, bkvi_vec y)
#if BALANCEKV_SIMDE /* prefixed names: simde_vdupq_n_f32, simde_mm512_set1_ps */
#define BKVI_I(name) simde_##name
#elif BKVI_PASS == BALANCEKV_SIMD_AVX512
#define BKVI_I(name) _##name
#else
#define BKVI_I(name) name
#endif
#if BKVI_PASS == BALANCEKV_SIMD_SCALAR
#define BKVI_FN(name) name##_scalar
typedef float bkvi_vec;
#undef BKVI_TILES
#define BKVI_TILES /* nothing to keep in registers */
BKVI_OP(set, (float x), x)
BKVI_OP(load, (const float *p), *p)
BKVI_OP(load_f32, (const void *p), bkvi_getf((const unsigned char *)p))
BKVI_OP(load_f16, (const void *p), bkvi_from_f16(bkvi_get16((const unsigned char *)p)))
BKVI_OP(load_bf16, (const void *p),
        bkvi_float((uint32_t)bkvi_get16((const unsigned char *)p) << 16))
BKVI_OP(load_i8, (const void *p), (float)*(const int8_t *)p)
BKVI_OP(fused, (bkvi_vec x, bkvi_vec y, bkvi_vec z), bkvi_fma(x, y, z))
BKVI_OP(sqrt, (bkvi_vec x), bkvi_sqrt(x))
BKVI_OP(max, (bkvi_vec a, bkvi_vec b), a > b ? a : b)
BKVI_OP(pick_gt, BKVI_4, a > b ? x : y)
BKVI_OP(pow2, (bkvi_vec r), bkvi_float((bkvi_bits(r) << 23) + 0x3F800000u))
BKVI_INLINE int bkvi_v(any_gt)(bkvi_vec a, bkvi_vec b) { return a > b; }
BKVI_INLINE void bkvi_v(store)(float *p, bkvi_vec x) { *p = x; }
BKVI_STORE(store_f32, bkvi_putf((unsigned char *)p, x))
BKVI_STORE(store_f16, bkvi_put16((unsigned char *)p, bkvi_to_f16(x)))
BKVI_INLINE void bkvi_v(zip)(bkvi_vec *a, bkvi_vec *b) { (void)a, (void)b; }

#elif BKVI_PASS == BALANCEKV_SIMD_AVX2
#define BKVI_FN(name) name##_avx2
typedef __m256 bkvi_vec;
BKVI_OP(set, (float x), _mm256_set1_ps(x))
BKVI_OP(load, (const void *p), _mm256_loadu_ps((const float *)p))
BKVI_OP(load_f16, (const void *p), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)))
BKVI_OP(load_bf16, (const void *p),
        _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16)))
BKVI_OP(load_i8, (const void *p),
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))))
BKVI_OP(fused, (bkvi_vec x, bkvi_vec y, bkvi_vec z), _mm256_fmadd_ps(x, y, z))
BKVI_OP(sqrt, (bkvi_vec x), _mm256_sqrt_ps(x))
BKVI_OP(max, (bkvi_vec a, bkvi_vec b), _mm256_max_ps(a, b))
BKVI_OP(pick_gt, BKVI_4, _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)))
BKVI_INLINE int bkvi_v(any_gt)(bkvi_vec a, bkvi_vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
BKVI_STORE(store, _mm256_storeu_ps((float *)p, x))
BKVI_STORE(store_f16, _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, 0)))
BKVI_INLINE void bkvi_v(zip)(bkvi_vec *a, bkvi_vec *b) {
    __m256 low = _mm256_unpacklo_ps(*a, *b), high = _mm256_unpackhi_ps(*a, *b);
    *a = _mm256_permute2f128_ps(low, high, 0x20);
    *b = _mm256_permute2f128_ps(low, high, 0x31);
}

#elif BKVI_PASS == BALANCEKV_SIMD_AVX512
#define BKVI_FN(name) name##_avx512
typedef BKVI_I(_m512) bkvi_vec;
BKVI_OP(set, (float x), BKVI_I(mm512_set1_ps)(x))
BKVI_OP(load, (const void *p), BKVI_I(mm512_loadu_ps)(p))
#if !BALANCEKV_SIMDE
BKVI_OP(load_f16, (const void *p), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)))
BKVI_OP(load_bf16, (const void *p),
        _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16)))
BKVI_OP(load_i8, (const void *p),
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))))
BKVI_STORE(store_f16,
           _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph((__mmask16)0xFFFF, x, 0)))
BKVI_OP(fused, (bkvi_vec x, bkvi_vec y, bkvi_vec z), _mm512_fmadd_ps(x, y, z))
BKVI_OP(sqrt, (bkvi_vec x), _mm512_sqrt_ps(x))
#endif
BKVI_OP(max, (bkvi_vec a, bkvi_vec b), BKVI_I(mm512_max_ps)(a, b))
BKVI_OP(pick_gt, BKVI_4,
        BKVI_I(mm512_mask_blend_ps)(BKVI_I(mm512_cmp_ps_mask)(a, b, 30 /* > */), y, x))
BKVI_INLINE int bkvi_v(any_gt)(bkvi_vec a, bkvi_vec b) {
    return BKVI_I(mm512_cmp_ps_mask)(a, b, 30) != 0;
}
BKVI_STORE(store, BKVI_I(mm512_storeu_ps)(p, x))
BKVI_INLINE void bkvi_v(zip)(bkvi_vec *a, bkvi_vec *b) {
    const BKVI_I(_m512i) low = BKVI_I(mm512_setr_epi32)(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                                          6, 22, 7, 23),
                          eight = BKVI_I(mm512_set1_epi32)(8);
    bkvi_vec x = BKVI_I(mm512_permutex2var_ps)(*a, low, *b);
    *b = BKVI_I(mm512_permutex2var_ps)(*a, BKVI_I(mm512_add_epi32)(low, eight), *b);
    *a = x;
}

#else /* NEON. Loads and stores by bytes: the only ones that ask for no alignment in C. */
#define BKVI_FN(name) name##_neon
typedef float bkvi_vec __attribute__((vector_size(16)));
#define BKVI_F(x) ((BKVI_I(float32x4_t))(x)) /* SIMDe's may be integers (WASM) */
BKVI_OP(set, (float x), BKVI_I(vdupq_n_f32)(x))
BKVI_OP(load, (const void *p), BKVI_I(vreinterpretq_f32_u8)(BKVI_I(vld1q_u8)((const uint8_t *)p)))
#if !BALANCEKV_SIMDE
BKVI_OP(load_f16, (const void *p), vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p))))
BKVI_OP(load_bf16, (const void *p),
        vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p)), 16)))
BKVI_OP(load_i8, (const void *p),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(
            vreinterpret_s8_u32(vdup_n_u32(bkvi_get32((const unsigned char *)p))))))))
BKVI_STORE(store_f16, vst1_u8((uint8_t *)p, vreinterpret_u8_f16(vcvt_f16_f32(x))))
BKVI_OP(sqrt, (bkvi_vec x), vsqrtq_f32(x))
BKVI_OP(fused, (bkvi_vec x, bkvi_vec y, bkvi_vec z), vfmaq_f32(z, x, y))
#endif
BKVI_OP(max, (bkvi_vec a, bkvi_vec b), BKVI_I(vmaxq_f32)(BKVI_F(a), BKVI_F(b)))
BKVI_OP(pick_gt, BKVI_4,
        BKVI_I(vbslq_f32)(BKVI_I(vcgtq_f32)(BKVI_F(a), BKVI_F(b)), BKVI_F(x), BKVI_F(y)))
BKVI_INLINE int bkvi_v(any_gt)(bkvi_vec a, bkvi_vec b) {
    return BKVI_I(vmaxvq_u32)(BKVI_I(vcgtq_f32)(BKVI_F(a), BKVI_F(b))) != 0;
}
BKVI_STORE(store, BKVI_I(vst1q_u8)((uint8_t *)p, BKVI_I(vreinterpretq_u8_f32)(BKVI_F(x))))
BKVI_INLINE void bkvi_v(zip)(bkvi_vec *a, bkvi_vec *b) {
    bkvi_vec low = (bkvi_vec)BKVI_I(vzip1q_f32)(BKVI_F(*a), BKVI_F(*b));
    *b = (bkvi_vec)BKVI_I(vzip2q_f32)(BKVI_F(*a), BKVI_F(*b));
    *a = low;
}
#endif

#if BKVI_PASS != BALANCEKV_SIMD_SCALAR
typedef uint32_t bkvi_words __attribute__((vector_size(sizeof(bkvi_vec))));
BKVI_OP(load_f32, (const void *p), bkvi_v(load)(p))
BKVI_STORE(store_f32, bkvi_v(store)(p, x))
BKVI_OP(pow2, (bkvi_vec r), ((bkvi_words)r << 23) + 0x3F800000u)
#endif
#if BALANCEKV_SIMDE && BKVI_PASS != BALANCEKV_SIMD_SCALAR
/* What SIMDe 0.7 lacks, or rounds twice, on the compiler's own vectors. */
typedef uint16_t bkvi_halves __attribute__((vector_size(sizeof(bkvi_vec) / 2)));
typedef int8_t bkvi_bytes __attribute__((vector_size(sizeof(bkvi_vec) / 4)));
BKVI_INLINE bkvi_words bkvi_v(widen)(const void *p) {
    bkvi_halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, bkvi_words);
}
BKVI_OP(load_bf16, (const void *p), bkvi_v(widen)(p) << 16)
BKVI_INLINE bkvi_vec bkvi_v(load_i8)(const void *p) {
    bkvi_bytes x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, bkvi_vec);
}
BKVI_INLINE bkvi_vec bkvi_v(load_f16)(const void *p) { /* times 2^112; Inf and NaN keep theirs */
    bkvi_words all = bkvi_v(widen)(p) << 13, low = all & 0x0FFFE000u;
    bkvi_vec x = (bkvi_vec)low * 5.192296858534827628530496329e33f;
    return (bkvi_vec)((bkvi_words)x | ((bkvi_words)(x >= 65536.0f) & 0x7F800000u) |
                      (all ^ low) << 3);
}
BKVI_INLINE void bkvi_v(store_f16)(void *p, bkvi_vec x) {
    bkvi_halves h;
    for (uint32_t i = 0; i < BKVI_WIDTH; i++) h[i] = bkvi_to_f16(x[i]);
    memcpy(p, &h, sizeof h);
}
BKVI_INLINE bkvi_vec bkvi_v(sqrt)(bkvi_vec x) {
    for (uint32_t i = 0; i < BKVI_WIDTH; i++) x[i] = bkvi_sqrt(x[i]);
    return x;
}
#if BKVI_HAVE_NEON && (defined(SIMDE_X86_FMA_NATIVE) || defined(SIMDE_POWER_ALTIVEC_P6_NATIVE) ||  \
                       (defined(SIMDE_ARM_NEON_A32V7_NATIVE) && defined(BKVI_ARCH_ARM64)))
BKVI_OP(fused, (bkvi_vec x, bkvi_vec y, bkvi_vec z),
        simde_vfmaq_f32(BKVI_F(z), BKVI_F(x), BKVI_F(y)))
#else
BKVI_INLINE bkvi_vec bkvi_v(fused)(bkvi_vec x, bkvi_vec y, bkvi_vec z) {
    for (uint32_t i = 0; i < BKVI_WIDTH; i++) z[i] = bkvi_fma(x[i], y[i], z[i]);
    return z;
}
#endif
#endif
#undef BKVI_F

BKVI_INLINE bkvi_vec bkvi_v(fma)(bkvi_vec x, bkvi_vec y, bkvi_vec z) {
#if BALANCEKV_FMA
    return bkvi_v(fused)(x, y, z);
#else
    bkvi_vec product = x * y;
    BKVI_ROUND(product);
    return product + z;
#endif
}
BKVI_INLINE bkvi_vec bkvi_v(fma_at)(const float *c, const int i, int inside, bkvi_vec x,
                                    bkvi_vec y) {
#if BKVI_PASS == BALANCEKV_SIMD_NEON && BALANCEKV_FMA && !BALANCEKV_SIMDE
    bkvi_vec four = bkvi_v(load)(c + i / 4 * 4);
    return i % 4 == 0   ? vfmaq_laneq_f32(y, x, four, 0) /* a lane: a constant, even to -O0 */
           : i % 4 == 1 ? vfmaq_laneq_f32(y, x, four, 1)
           : i % 4 == 2 ? vfmaq_laneq_f32(y, x, four, 2)
                        : vfmaq_laneq_f32(y, x, four, 3);
#elif BKVI_PASS == BALANCEKV_SIMD_AVX512 && BALANCEKV_FMA && !BALANCEKV_SIMDE
    if (inside) { /* Zen 4 broadcasts where it converts: 85 % of the FMA peak, with this 98 */
        __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(y) : "v"(x), "m"(c[i]));
        return y;
    }
#endif
    (void)inside;
    return bkvi_v(fma)(bkvi_v(set)(c[i]), x, y);
}

BKVI_INLINE float bkvi_v(fold)(bkvi_vec x, const int add) {
    float lanes[16];
    uint32_t n;
    BKVI_UNROLL for (n = 1; n < BKVI_WIDTH; n *= 2) {
        bkvi_vec y = x;
        bkvi_v(zip)(&x, &y);
        x = add ? (bkvi_vec)(x + y) : bkvi_v(max)(x, y);
    }
    bkvi_v(store)(lanes, x);
    return lanes[0];
}

/* Register tiles are `rows` by at most BKVI_VECS(rows) sixteens. */
#if BKVI_PASS == BALANCEKV_SIMD_SCALAR || BKVI_SMALL
#define BKVI_VECS(rows) 1
#elif BKVI_PASS == BALANCEKV_SIMD_AVX512
#define BKVI_VECS(rows) 4
#elif BALANCEKV_SIMDE /* 16 registers of 4 lanes, on most of its CPUs */
#define BKVI_VECS(rows) ((rows) == 1 ? 2 : 1)
#else /* 16 registers of 8 lanes, or 32 of 4 */
#define BKVI_VECS(rows) ((rows) == 1 ? 4 : (rows) < (BKVI_WIDTH == 8 ? 4 : 3) ? 2 : 1)
#endif

/* ---- §12 KERNELS ------------------------------------------------------------------ >>kernels
   Written once over §11. `const int` parameters are constants at every call: one loop per case. */
static const float bkvi_k(count)[16] = {0,  -1, -2,  -3,  -4,  -5,  -6,  -7,
                                        -8, -9, -10, -11, -12, -13, -14, -15};

/* The low or the high digits of bytes, see bkvi_units; exact. */
BKVI_INLINE bkvi_vec bkvi_v(load_i4)(const void *p, uint32_t high) {
    const bkvi_vec magic = bkvi_v(set)(12582912.0f); /* 1.5 * 2^23: adding it rounds to integers */
    bkvi_vec x = bkvi_v(load_i8)(p), y = bkvi_v(fma)(x, bkvi_v(set)(1.0f / 16.0f), magic) - magic;
    return high ? y : bkvi_v(fma)(y, bkvi_v(set)(-16.0f), x);
}
/* A register of elements of a tensor or cache type, or BKVI_HIGH. */
BKVI_INLINE bkvi_vec bkvi_v(get)(const int type, const void *p) {
    return type == BKV_F32                ? bkvi_v(load_f32)(p)
           : type == BKV_F16              ? bkvi_v(load_f16)(p)
           : type == BKV_BF16             ? bkvi_v(load_bf16)(p)
           : bkvi_is_i4((uint32_t)type) ? bkvi_v(load_i4)(p, type != BKV_I4)
                                          : bkvi_v(load_i8)(p);
}

/* Elements i .. i+15 of a caller's row of n as floats, zeros behind its end, any stride. */
BKVI_NOINLINE void bkvi_k(row)(float *to, const unsigned char *p, uint32_t type, size_t stride,
                               uint32_t i, uint32_t n) {
    unsigned char part[64];
    size_t bytes = bkvi_type_bytes(type), lane;
    uint32_t count = bkvi_min(BKVI_LANES, n - i);
    p += (size_t)i * stride;
    if (stride != bytes || count < BKVI_LANES) {
        memset(part, 0, sizeof part);
        bkvi_copy(part, bytes, p, stride, count, bytes);
        p = part;
    }
    for (lane = 0; lane < BKVI_LANES; lane += BKVI_WIDTH)
        bkvi_v(store)(to + lane, bkvi_v(get)((int)type, p + lane * bytes));
}

/* 1 if every |x| < limit; NaN is not. */
static int bkvi_k(scan)(const unsigned char *p, uint32_t type, size_t stride, uint32_t n,
                        float limit) {
    bkvi_vec zero = bkvi_v(set)(0.0f), one = bkvi_v(set)(1.0f), bad = zero;
    float part[16];
    uint32_t i, lane;
    for (i = 0; i < n; i += BKVI_LANES) {
        bkvi_k(row)(part, p, type, stride, i, n);
        for (lane = 0; lane < BKVI_LANES; lane += BKVI_WIDTH) {
            bkvi_vec x = bkvi_v(load)(part + lane), size = bkvi_v(max)(x, zero - x);
            bad = bkvi_v(max)(bad, bkvi_v(pick_gt)(bkvi_v(set)(limit), size, zero, one));
        }
    }
    return !bkvi_v(any_gt)(bad, zero);
}

/* ---- integers ---- */
/* Rotates x[n] in place: cut into powers of two, the largest first, each multiplied by the
   orthonormal Hadamard matrix of its size, its own inverse. Every round adds and subtracts halves
   and writes the results in turns, so that all are alike. x has room for 2 * BKVI_DIM_MAX. */
BKVI_NOINLINE void bkvi_k(rotate)(float *x, uint32_t n) {
    uint32_t size, half, round, i;
    for (; n; x += size, n -= size) {
        float *work = x + BKVI_DIM_MAX, norm = 1.0f;
        for (size = 1; size <= n / 2;) size *= 2;
        for (i = size; i > 1; i /= 4) norm *= i == 2 ? 0.707106781f : 0.5f;
        for (round = 1, half = size / 2; round < size; round *= 2) {
            const float factor = round == half ? norm : 1.0f;
            for (i = 0; i < half && half < BKVI_WIDTH; i++) {
                work[2 * i] = (x[i] + x[half + i]) * factor;
                work[2 * i + 1] = (x[i] - x[half + i]) * factor;
            }
            for (i = 0; i < half && half >= BKVI_WIDTH; i += BKVI_WIDTH) {
                bkvi_vec a = bkvi_v(load)(x + i), b = bkvi_v(load)(x + half + i);
                bkvi_vec sum = (a + b) * bkvi_v(set)(factor);
                b = (a - b) * bkvi_v(set)(factor);
                bkvi_v(zip)(&sum, &b);
                bkvi_v(store)(work + 2 * i, sum);
                bkvi_v(store)(work + 2 * i + BKVI_WIDTH, b);
            }
            memcpy(x, work, size * sizeof *x);
        }
    }
}

/* x becomes round(x / scale) + 1.5 * 2^23, whose low byte is what is stored; BKVI_DIM_MAX behind
   it, the same of 128 (of 4 bits 14) times the rest; of 4 bits, both 16 times the second half of x
   plus the first. scale = max(|x|, 1e-28) / 127 (7), rounded up to bf16, so nothing is clipped. */
BKVI_NOINLINE void bkvi_k(quantise)(float *x, unsigned char *scale, uint32_t n, uint32_t type) {
    const float most = bkvi_is_i4(type) ? 7.0f : 127.0f;
    const bkvi_vec magic = bkvi_v(set)(12582912.0f), zero = bkvi_v(set)(0.0f);
    bkvi_vec largest = bkvi_v(set)(1.0e-28f), inverse;
    uint32_t i, j, bits;
    for (i = 0; i < n; i += BKVI_WIDTH) {
        bkvi_vec a = bkvi_v(load)(x + i);
        largest = bkvi_v(max)(largest, bkvi_v(max)(a, zero - a));
    }
    bits = (bkvi_bits(bkvi_v(fold)(largest, 0) / most) + 0xFFFFu) >> 16;
    bkvi_put16(scale, (uint16_t)bits);
    inverse = bkvi_v(set)(1.0f / bkvi_float(bits << 16));
    for (i = 0; i < n; i += BKVI_WIDTH) {
        bkvi_vec a = bkvi_v(load)(x + i), q = bkvi_v(fma)(a, inverse, magic);
        a = bkvi_v(fma)(a, inverse, magic - q);
        bkvi_v(store)(x + i, q);
        bkvi_v(store)(x + BKVI_DIM_MAX + i, bkvi_v(fma)(a, bkvi_v(set)(bkvi_parts(type)), magic));
    }
    for (j = 0; j <= BKVI_DIM_MAX; j += BKVI_DIM_MAX, x += BKVI_DIM_MAX)
        for (i = 0; i < n / 2 && bkvi_is_i4(type); i += BKVI_WIDTH)
            bkvi_v(store)(x + i, bkvi_v(fma)(bkvi_v(load)(x + n / 2 + i) - magic,
                                             bkvi_v(set)(16.0f), bkvi_v(load)(x + i)));
}

/* Stores a caller's row, units `step` apart: 1 for a value (then padded with zeros), 16 for a key.
   Integers: `rest` likewise, and the scale; a row that is `work` itself is rotated already. */
static void bkvi_k(put)(unsigned char *dst, size_t step, unsigned char *rest, unsigned char *scale,
                        uint32_t kv_type, const unsigned char *src, uint32_t type, size_t stride,
                        uint32_t n, float *work) {
    size_t bytes = bkvi_type_bytes(kv_type);
    uint32_t i, lane;
    if (bkvi_is_int(kv_type)) {
        const uint32_t padded = bkvi_padded(kv_type, n), whole = step == 1 ? padded : n;
        const uint32_t units = bkvi_units(kv_type, whole);
        if (src != (unsigned char *)work) {
            memset(work, 0, padded * sizeof *work);
            for (i = 0; i < n; i += BKVI_LANES) bkvi_k(row)(work + i, src, type, stride, i, n);
            bkvi_k(rotate)(work, whole);
        }
        bkvi_k(quantise)(work, scale, padded, kv_type);
        for (i = 0; i < units; i++) {
            dst[i * step] = (unsigned char)bkvi_bits(work[i]);
            if (rest) rest[i * step] = (unsigned char)bkvi_bits(work[BKVI_DIM_MAX + i]);
        }
        return;
    }
    for (i = 0; i < n; i += BKVI_LANES) {
        float part[16];
        unsigned char *to = (unsigned char *)part; /* converted in place, front to back */
        bkvi_k(row)(part, src, type, stride, i, n);
        for (lane = 0; lane < BKVI_LANES && kv_type == BKV_BF16; lane++)
            bkvi_put16(to + 2 * lane, bkvi_to_bf16(part[lane]));
        for (lane = 0; lane < BKVI_LANES && kv_type == BKV_F16; lane += BKVI_WIDTH)
            bkvi_v(store_f16)(to + 2 * lane, bkvi_v(load)(part + lane));
        bkvi_copy(dst + i * step * bytes, step * bytes, to, bytes,
                  step == 1 ? (uint32_t)BKVI_LANES : bkvi_min(BKVI_LANES, n - i), bytes);
    }
}

/* A stored row as floats; integers scaled and rotated back. */
static void bkvi_k(fetch)(float *x, const unsigned char *src, uint32_t type, size_t stride,
                          uint32_t n, const unsigned char *scale, const unsigned char *rest) {
    const uint32_t units = bkvi_units(type, n);
    const float step = bkvi_is_int(type) ? bkvi_float((uint32_t)bkvi_get16(scale) << 16) : 1.0f;
    const bkvi_vec part = bkvi_v(set)(step * (1.0f / bkvi_parts(type)));
    float more[16] = {0};
    uint32_t i, lane;
    for (i = 0; i < n; i += BKVI_LANES) {
        const uint32_t high = bkvi_high(type, i, units), at = i - high * units;
        bkvi_k(row)(x + i, src, type + high, stride, at, units);
        if (rest) bkvi_k(row)(more, rest, type + high, stride, at, units);
        for (lane = 0; lane < BKVI_LANES && bkvi_is_int(type); lane += BKVI_WIDTH)
            bkvi_v(store)(x + i + lane,
                          bkvi_v(fma)(bkvi_v(load)(more + lane), part, /* + what is exact */
                                      bkvi_v(load)(x + i + lane) * bkvi_v(set)(step)));
    }
    if (bkvi_is_int(type)) bkvi_k(rotate)(x, n);
}

/* 2^t of four registers side by side, as one alone would wait for its own results: within 1 ulp;
   exactly 0 below 2^-125, so that no denormal arises. t <= 127. Our minimax fit, of degree 6. */
BKVI_ONCE void bkvi_k(exp2)(bkvi_vec *t) {
    static const float c[6] = {1.339993090e-3f, 9.618489072e-3f, 5.550328642e-2f,
                               2.402264625e-1f, 6.931471825e-1f, 1.0f};
    const bkvi_vec magic = bkvi_v(set)(12582912.0f); /* 1.5 * 2^23: adding it rounds to integers */
    bkvi_vec n[4], f[4], p[4];
    int i, k;
    BKVI_FOUR for (k = 0; k < 4; k++) {
        t[k] = bkvi_v(pick_gt)(t[k], bkvi_v(set)(-125.0f), t[k], bkvi_v(set)(-127.0f));
        n[k] = t[k] + magic;
        f[k] = t[k] - (n[k] - magic);
        p[k] = bkvi_v(set)(1.534581243e-4f);
    }
    BKVI_FOUR for (i = 0; i < 6; i++) BKVI_FOUR for (k = 0; k < 4; k++) p[k] =
        bkvi_v(fma)(p[k], f[k], bkvi_v(set)(c[i]));
    BKVI_FOUR for (k = 0; k < 4; k++) t[k] = p[k] * bkvi_v(pow2)(n[k]);
}

/* n floats x, a multiple of 64, become 2^(x - shift) times weights, by whose sums lanes grow. */
BKVI_ONCE void bkvi_k(raise)(float *x, uint32_t n, float shift, const unsigned char *weight,
                             float *lanes) {
    bkvi_vec minus = bkvi_v(set)(shift), t[4], sum[BKVI_REGS];
    uint32_t i, k;
    BKVI_TILES for (k = 0; k < BKVI_REGS; k++) sum[k] = bkvi_v(load)(lanes + k * BKVI_WIDTH);
    for (i = 0; i < n; i += 4 * BKVI_WIDTH) {
        BKVI_FOUR for (k = 0; k < 4; k++) t[k] = bkvi_v(load)(x + i + k * BKVI_WIDTH) - minus;
        bkvi_k(exp2)(t);
        BKVI_FOUR for (k = 0; k < 4; k++, weight += 4 * BKVI_WIDTH) {
            const uint32_t lane = (BKVI_WIDTH > 1 ? k : i + k) % BKVI_REGS;
            const bkvi_vec w = bkvi_v(load_f32)(weight);
            sum[lane] = bkvi_v(fma)(t[k], w, sum[lane]);
            bkvi_v(store)(x + i + k * BKVI_WIDTH, t[k] * w);
        }
    }
    BKVI_TILES for (k = 0; k < BKVI_REGS; k++) bkvi_v(store)(lanes + k * BKVI_WIDTH, sum[k]);
}

/* ---- register tile ---- */
/* The one register tile: acc[r][v] += sum over i of coefficient (r, i) * vector (i, v), for `rows`
   rows of `vecs` sixteens. x: (i, v) at i * step + v * apart, in elements of the cache; the
   coefficients of step i: c[i * c_step + r], or c[r * c_row + i] if c_row (then n is rounded up to
   a multiple of 4); acc: rows `acc_row` floats apart, set to 0 if `fresh`; high: of 4 bits, which
   digits. ahead: memory to prefetch at the pace of x, or NULL (small builds do not). */
BKVI_INLINE void bkvi_k(tile_fma)(const int type, uint32_t high, const int rows, const int vecs,
                                  const unsigned char *x, size_t step, size_t apart, uint32_t n,
                                  const float *c, const size_t c_row, size_t c_step,
                                  const int fresh, float *acc_mem, size_t acc_row,
                                  const unsigned char *ahead) {
    const size_t es = bkvi_type_bytes((uint32_t)type);
    const int regs = vecs * BKVI_REGS, steps = c_row ? 4 : 1;
    const int by_row = regs <= rows || BKVI_WIDTH == 16; /* the side that is held in registers */
    const int waits = BKVI_CLANG_X86 && (BKVI_WIDTH == 8 || (BKVI_WIDTH == 16 && rows == 4));
    const int inside = type == BKV_F32 ? 1 : type < BKV_I8 ? 2 : rows; /* chosen on Zen 4 */
    bkvi_vec acc[96], a[16];
    uint32_t i;
    int t, s; /* accumulator t: row t / regs, register t % regs */
#define BKVI_ACC (acc_mem + (size_t)(t / regs) * acc_row + (size_t)(t % regs) * BKVI_WIDTH)
    BKVI_TILES for (t = 0; t < rows * regs; t++) acc[t] =
        fresh ? bkvi_v(set)(0.0f) : bkvi_v(load)(BKVI_ACC);
    for (i = 0; i < n; i += (uint32_t)steps, c += c_row ? 4 : c_step) {
        BKVI_TILES for (s = 0; s < steps; s++, x += step * es) {
            if (ahead && !BKVI_SMALL) {
                BKVI_TILES for (t = 0; t < (vecs * (int)es + 3) / 4; t++)
                    __builtin_prefetch(ahead + 64 * t, 0, 2); /* into the second level */
                ahead += (size_t)vecs * BKVI_LANES * es;
            }
            BKVI_TILES for (t = 0; t < rows * regs; t++) {
                const int r = by_row ? t / regs : t % rows, v = by_row ? t % regs : t / rows;
                if (r == 0) {
                    const size_t sixteen = (size_t)(v / BKVI_REGS), reg = (size_t)(v % BKVI_REGS);
                    const size_t at = sixteen * apart + reg * BKVI_WIDTH;
                    a[v] = bkvi_is_i4((uint32_t)type) ? bkvi_v(load_i4)(x + at, high)
                                                      : bkvi_v(get)(type, x + at * es);
                    if (BKVI_ARCH_X86 && !BALANCEKV_SIMDE && type == BKV_F32 && rows > 1 && !waits)
                        BKVI_ROUND(a[v]); /* or gcc loads it anew for every FMA: 20-25 % */
                }
                acc[r * regs + v] = bkvi_v(fma_at)(c + (size_t)r * c_row, c_row ? s : r, r < inside,
                                                   a[v], acc[r * regs + v]);
                if (waits) BKVI_WAIT(x, acc[r * regs + v]); /* or it spills a sum: half the speed */
            }
        }
    }
    BKVI_TILES for (t = 0; t < rows * regs; t++) bkvi_v(store)(BKVI_ACC, acc[t]);
#undef BKVI_ACC
}

/* ---- kernel matrix ---- */
/* 16 x 16 elements of the cache, rows `stride` elements apart, turned: to[j][i] = from[i][j], rows
   `apart`. A square of whole registers takes log2(width) rounds of zips. */
BKVI_NOINLINE void bkvi_k(turn)(float *to, size_t apart, const unsigned char *from, size_t stride,
                                uint32_t type) {
    enum { SIDE = BKVI_WIDTH, HALF = SIDE / 2 };
    const size_t es = bkvi_type_bytes(type);
    uint32_t i, j;
    int k, round;
    for (i = 0; i < BKVI_LANES; i += SIDE)
        for (j = 0; j < BKVI_LANES; j += SIDE) {
            bkvi_vec x[SIDE + 1], y[SIDE + 1];
            BKVI_UNROLL for (k = 0; k < SIDE; k++) x[k] =
                bkvi_v(get)((int)type, from + ((i + (size_t)k) * stride + j) * es);
            BKVI_UNROLL for (round = 1; round < SIDE; round *= 2) {
                BKVI_UNROLL for (k = 0; k < HALF; k++) {
                    y[2 * k] = x[k], y[2 * k + 1] = x[k + HALF];
                    bkvi_v(zip)(&y[2 * k], &y[2 * k + 1]);
                }
                BKVI_UNROLL for (k = 0; k < SIDE; k++) x[k] = y[k];
            }
            BKVI_UNROLL for (k = 0; k < SIDE; k++)
                bkvi_v(store)(to + (j + (size_t)k) * apart + i, x[k]);
        }
}

/* Sum of sixteen, in the order i + i+8, i+4, i+2, i+1; of n, a multiple of 16; and the largest. */
static float bkvi_k(over_lanes)(const float *lanes) {
    bkvi_vec x[BKVI_REGS];
    uint32_t i, n;
    BKVI_TILES for (i = 0; i < BKVI_REGS; i++) x[i] = bkvi_v(load)(lanes + i * BKVI_WIDTH);
    BKVI_TILES for (n = BKVI_REGS / 2; n; n /= 2)
        BKVI_TILES for (i = 0; i < n; i++) x[i] = x[i] + x[i + n];
    return bkvi_v(fold)(x[0], 1);
}
BKVI_NOINLINE float bkvi_k(total)(const float *x, uint32_t n) {
    float lanes[16];
    uint32_t lane, i;
    for (lane = 0; lane < BKVI_LANES; lane += BKVI_WIDTH) {
        bkvi_vec all = bkvi_v(load)(x + lane);
        for (i = BKVI_LANES; i < n; i += BKVI_LANES) all = all + bkvi_v(load)(x + i + lane);
        bkvi_v(store)(lanes + lane, all);
    }
    return bkvi_k(over_lanes)(lanes);
}
static float bkvi_k(largest)(const float *x) {
    bkvi_vec most = bkvi_v(load)(x);
    uint32_t i;
    for (i = BKVI_WIDTH; i < BKVI_BLOCK; i += BKVI_WIDTH)
        most = bkvi_v(max)(most, bkvi_v(load)(x + i));
    return bkvi_v(fold)(most, 0);
}

/* The block's keys or values as f32 panels, `stride` floats apart, minus their mean (sums: panels,
   then lanes as over_lanes), sixteen dimensions at a time; returns the largest squared norm. */
BKVI_NOINLINE float bkvi_k(pack)(const bkvi_head *h, const uint32_t *slots, bkvi_block *block,
                                 int values, uint32_t dim, size_t stride) {
    const uint32_t type = BKVI_TYPE(h->c->cfg.kv_type), units = bkvi_units(type, dim);
    const size_t es = bkvi_type_bytes(type);
    float *sums = block->tile, *turned = sums + 256, *mean = block->mean;
    uint32_t i, j, p, n, lane;
    memset(block->norm, 0, sizeof block->norm);
    for (i = 0; i < dim; i += BKVI_LANES, mean += BKVI_LANES) {
        const uint32_t high = bkvi_high(type, i, units), view = type + high, at = i - high * units;
        float *first = block->panels + (size_t)i * BKVI_LANES, *to = first;
        n = bkvi_min(BKVI_LANES, dim - i) * BKVI_LANES;
        memset(sums, 0, 256 * sizeof *sums);
        for (p = 0; p < 8; p++, to += stride) {
            const uint32_t slot = slots[p / 4] + p % 4 * BKVI_LANES;
            const unsigned char *from = bkvi_part(h, BKVI_K + values, slot);
            const unsigned char *scale = bkvi_part(h, BKVI_K_SCALE + values, slot);
            if (values) bkvi_k(turn)(to, BKVI_LANES, from + at * es, units, view);
            for (j = 0; j < n && (!values || bkvi_is_int(type)); j += BKVI_WIDTH) {
                bkvi_vec x = values ? bkvi_v(load)(to + j)
                                    : bkvi_v(get)((int)view, from + (at * BKVI_LANES + j) * es);
                if (bkvi_is_int(type)) x = x * bkvi_v(load_bf16)(scale + j % BKVI_LANES * 2);
                bkvi_v(store)(to + j, x);
            }
        }
        for (j = 0; j < n; j += BKVI_WIDTH) {
            bkvi_vec sum = bkvi_v(set)(0.0f);
            BKVI_UNROLL for (p = 0; p < 8; p++) sum = sum + bkvi_v(load)(first + p * stride + j);
            bkvi_v(store)(sums + j, sum);
        }
        bkvi_k(turn)(turned, BKVI_LANES, (const unsigned char *)sums, BKVI_LANES, BKV_F32);
        for (j = 128; j >= BKVI_LANES; j /= 2)
            for (lane = 0; lane < j; lane += BKVI_WIDTH)
                bkvi_v(store)(turned + lane,
                              bkvi_v(load)(turned + lane) + bkvi_v(load)(turned + j + lane));
        for (j = 0; j < BKVI_LANES; j++) mean[j] = turned[j] * (1.0f / (float)BKVI_BLOCK);
        for (lane = 0; lane < BKVI_BLOCK; lane += BKVI_WIDTH) {
            bkvi_vec x, sum = bkvi_v(load)(block->norm + lane);
            to = first + lane / BKVI_LANES * stride + lane % BKVI_LANES;
            for (j = 0; j < n; j += BKVI_LANES) {
                x = bkvi_v(load)(to + j) - bkvi_v(set)(mean[j / BKVI_LANES]);
                bkvi_v(store)(to + j, x);
                sum = bkvi_v(fma)(x, x, sum);
            }
            bkvi_v(store)(block->norm + lane, sum);
        }
    }
    return bkvi_k(largest)(block->norm);
}

/* ---- importance (§1) ---- */
/* to[j] += sum of c[i * c_step] * x(i, j), j < width; sixteens at i * step + j / 16 * apart. */
BKVI_NOINLINE void bkvi_k(sums)(float *to, uint32_t width, const float *x, size_t step,
                                size_t apart, uint32_t n, const float *c, size_t c_step) {
    uint32_t i;
    for (i = 0; i < width / BKVI_LANES; i += BKVI_VECS(1))
        bkvi_k(tile_fma)(BKV_F32, 0, 1, BKVI_VECS(1), (const unsigned char *)(x + i * apart), step,
                         apart, n, c, 0, c_step, 0, to + i * BKVI_LANES, BKVI_BLOCK, NULL);
}

/* Never inline, as value(). */
BKVI_NOINLINE void bkvi_k(scaled)(float *to, const void *x, uint32_t n, float factor) {
    const unsigned char *from = (const unsigned char *)x;
    uint32_t i;
    for (i = 0; i < n; i += BKVI_WIDTH, from += 4 * BKVI_WIDTH)
        bkvi_v(store)(to + i, bkvi_v(load_f32)(from) * bkvi_v(set)(factor));
}

/* <key, vector> * scale of every token: to[128]. */
static void bkvi_k(against)(bkvi_block *block, uint32_t dim, size_t stride, const void *vector,
                            float scale, float *to) {
    bkvi_k(scaled)(block->matrix, vector, dim, scale);
    memset(to, 0, BKVI_BLOCK * sizeof *to);
    bkvi_k(sums)(to, BKVI_BLOCK, block->panels, BKVI_LANES, stride, dim, block->matrix, 1);
}

/* to += share of x in its sum; x is used up. */
BKVI_NOINLINE void bkvi_k(add_share)(float *to, float *x, const float *value_norm, float share) {
    float sum;
    uint32_t i;
    for (i = 0; i < BKVI_BLOCK && value_norm; i += BKVI_WIDTH)
        bkvi_v(store)(x + i, bkvi_v(load)(x + i) * bkvi_v(sqrt)(bkvi_v(load)(value_norm + i)));
    sum = bkvi_k(total)(x, BKVI_BLOCK);
    for (i = 0; i < BKVI_BLOCK && sum > 0.0f; i += BKVI_WIDTH)
        bkvi_v(store)(to + i, bkvi_v(fma)(bkvi_v(load)(x + i), bkvi_v(set)(share / sum),
                                          bkvi_v(load)(to + i)));
}

/* Importance by keys. Expected: the mean over the group of the share of attention within the block
   that the queries' means give a token; the keys are centred, which no softmax notices. Unlike the
   others: w e^(-10 cos(key, mean key)). */
BKVI_NOINLINE void bkvi_k(foresee)(const bkvi_head *h, bkvi_block *block, uint32_t importance,
                                   uint32_t dim, size_t stride) {
    const unsigned char *weight = (const unsigned char *)block->weight;
    float *mean = block->mean, *work = block->matrix;
    float *logit = block->score, *unlike = block->unlike;
    bkvi_vec m, zero = bkvi_v(set)(0.0f);
    uint32_t head, i, padded = bkvi_round_up(dim, BKVI_LANES);
    memset(block->expected, 0, sizeof block->expected);
    memset(block->tile, 0, BKVI_LANES * sizeof(float)); /* raise adds to them; nobody reads them */
    for (head = 0; head < h->c->group && importance & BKV_IMPORTANCE_QUERY; head++) {
        bkvi_k(against)(block, dim, stride, bkvi_part(h, BKVI_QUERIES, head),
                        h->c->cfg.scale * BKVI_LOG2E, logit);
        bkvi_k(raise)(logit, BKVI_BLOCK, bkvi_k(largest)(logit), weight, block->tile);
        bkvi_k(add_share)(block->expected, logit, NULL, 1.0f);
    }
    if (!(importance & BKV_IMPORTANCE_KEY)) return;
    bkvi_k(against)(block, dim, stride, mean, 1.0f, unlike);
    for (i = 0; i < padded; i += BKVI_WIDTH)
        bkvi_v(store)(work + i, bkvi_v(load)(mean + i) * bkvi_v(load)(mean + i));
    m = bkvi_v(set)(bkvi_k(total)(work, padded));
    for (i = 0; i < BKVI_BLOCK; i += BKVI_WIDTH) {
        bkvi_vec dot = bkvi_v(load)(unlike + i), norm = bkvi_v(load)(block->norm + i) + dot, cosine;
        dot = dot + m; /* of the key as it was; so is its norm */
        norm = bkvi_v(sqrt)((norm + dot) * m);
        cosine = dot / bkvi_v(pick_gt)(norm, zero, norm, bkvi_v(set)(1.0f));
        bkvi_v(store)(unlike + i, cosine * bkvi_v(set)(-10.0f * BKVI_LOG2E));
    }
    bkvi_k(raise)(unlike, BKVI_BLOCK, 0.0f, weight, block->tile);
}

/* Products of the 16 rows of panel i with panels first .. end-1 become entries of the kernel. Keys:
   2^(product * a - b), at most 1 but for rounding; values: times (product + b) f_i f_j a. */
BKVI_NOINLINE void bkvi_k(entries)(bkvi_block *block, int values, uint32_t i, uint32_t first,
                                   uint32_t end, float a, float b) {
    const bkvi_vec zero = bkvi_v(set)(0.0f), shift = bkvi_v(set)(values ? b : -b);
    uint32_t row, j;
    int k;
    for (row = 0; row < BKVI_LANES; row += 4)
        for (j = first * BKVI_LANES; j < end * BKVI_LANES; j += BKVI_WIDTH) {
            const float *product = block->tile + row * BKVI_PAGE + (j - first * BKVI_LANES);
            const uint32_t at = (i * BKVI_LANES + row) * BKVI_BLOCK + j;
            float *to = (values ? block->matrix : block->kernel) + at;
            const float *factor = block->factor + i * BKVI_LANES + row;
            bkvi_vec x[4], col = bkvi_v(load)(block->factor + j);
            BKVI_FOUR for (k = 0; k < 4; k++) {
                x[k] = bkvi_v(load)(product + k * BKVI_PAGE);
                if (values) {
                    x[k] = (x[k] + shift) * bkvi_v(set)(factor[k] * a) * col;
                    x[k] = x[k] * bkvi_v(load)(block->kernel + at + k * BKVI_BLOCK);
                } else {
                    x[k] = bkvi_v(fma)(x[k], bkvi_v(set)(a), shift);
                    x[k] = bkvi_v(pick_gt)(x[k], zero, zero, x[k]);
                }
            }
            if (!values) bkvi_k(exp2)(x);
            BKVI_FOUR for (k = 0; k < 4; k++) bkvi_v(store)(to + k * BKVI_BLOCK, x[k]);
        }
}

/* The 16 rows of panel i, in tiles of 5, 5 and 6: more than the 8 sums in flight that hide the
   latency of an FMA on 16 registers; or, small or in 16 registers of 4 lanes, by twos. */
BKVI_INLINE void bkvi_k(rows)(bkvi_block *block, const int vecs, uint32_t i, uint32_t first,
                              uint32_t dim, size_t stride) {
    const unsigned char *x = (const unsigned char *)(block->panels + first * stride);
    const float *c = block->panels + i * stride;
    uint32_t row;
#define BKVI_PRODUCTS(rows)                                                                        \
    bkvi_k(tile_fma)(BKV_F32, 0, rows, vecs, x, BKVI_LANES, stride, dim, c + row, 0, BKVI_LANES,   \
                     1, block->tile + row * BKVI_PAGE, BKVI_PAGE, NULL)
    if (BKVI_SMALL) memset(block->tile, 0, 4 * BKVI_LANES * BKVI_PAGE);
    for (row = 0; row < BKVI_LANES && BKVI_SMALL; row++)
        bkvi_k(sums)(block->tile + row * BKVI_PAGE, BKVI_LANES, (const float *)(const void *)x,
                     BKVI_LANES, stride, dim, c + row, BKVI_LANES);
    for (; row < BKVI_LANES && BALANCEKV_SIMDE; row += 2) BKVI_PRODUCTS(2);
    if (row) return;
    for (; row < 10; row += 5) BKVI_PRODUCTS(5);
    BKVI_PRODUCTS(6);
#undef BKVI_PRODUCTS
}

/* The upper triangle of the products, by groups of panels, and their entries; then mirrored. */
BKVI_NOINLINE void bkvi_k(products)(bkvi_block *block, int values, uint32_t dim, size_t stride,
                                    float a, float b) {
    float *matrix = values ? block->matrix : block->kernel;
    uint32_t group, end, i, j;
    for (group = 0; group < 8; group = end) {
        end = group + BKVI_VECS(6);
        for (i = 0; i < end; i++) {
            uint32_t first = bkvi_max(group, i), vecs = end - first;
            if (vecs == 1) bkvi_k(rows)(block, 1, i, first, dim, stride);
            if (BKVI_VECS(6) == 4 && vecs == 2) bkvi_k(rows)(block, 2, i, first, dim, stride);
            if (BKVI_VECS(6) == 4 && vecs == 3) bkvi_k(rows)(block, 3, i, first, dim, stride);
            if (BKVI_VECS(6) == 4 && vecs == 4) bkvi_k(rows)(block, 4, i, first, dim, stride);
            bkvi_k(entries)(block, values, i, first, end, a, b);
            for (j = bkvi_max(first, i + 1); j < end; j++)
                bkvi_k(turn)(matrix + (j * BKVI_BLOCK + i) * BKVI_LANES, BKVI_BLOCK,
                             (unsigned char *)(matrix + (i * BKVI_BLOCK + j) * BKVI_LANES),
                             BKVI_BLOCK, BKV_F32);
        }
    }
}

static void bkvi_k(gram)(const bkvi_head *h, const uint32_t *slots, bkvi_block *block) {
    const bkv_config *cfg = &h->c->cfg;
    const uint32_t dim = BKVI_DIM(cfg->head_dim), v_dim = bkvi_v_dim(h->c);
    const uint32_t importance = cfg->importance == BKV_NONE ? 0 : cfg->importance;
    const float scale = cfg->scale * cfg->temp * BKVI_LOG2E;
    float *use = block->use, *score = block->score, constant, largest;
    const float *told = importance & BKV_IMPORTANCE_KEY ? block->unlike : block->weight;
    uint32_t i;
    if (importance & BKV_IMPORTANCE_QUERY) told = block->expected;
    /* One row more than needed: panels a multiple of 4 KiB apart would share cache sets. */
    const size_t stride = ((size_t)dim + 1) * BKVI_LANES;
    const size_t v_stride = ((size_t)v_dim + 1) * BKVI_LANES;
    largest = bkvi_k(pack)(h, slots, block, 0, dim, stride);
    bkvi_k(foresee)(h, block, importance, dim, stride);
    bkvi_k(products)(block, 0, dim, stride, scale, largest * scale);
    largest = bkvi_k(pack)(h, slots, block, 1, v_dim, v_stride);
    /* Scores, and the factor of each token in the kernel; the norms are those of the values now. */
    for (i = 0; i < BKVI_BLOCK; i += BKVI_WIDTH) {
        bkvi_vec w = bkvi_v(load)(block->weight + i);
        bkvi_v(store)(block->factor + i, bkvi_v(sqrt)(w * bkvi_v(load)(told + i)));
        bkvi_v(store)(use + i, bkvi_v(sqrt)(bkvi_v(load)(use + i)));
    }
    memset(score, 0, sizeof block->score);
    if (importance & BKV_IMPORTANCE_KEY) bkvi_k(add_share)(score, block->unlike, block->norm, 1.0f);
    if (importance & BKV_IMPORTANCE_QUERY)
        bkvi_k(add_share)(score, block->expected, block->norm, 1.0f);
    if (importance & BKV_IMPORTANCE_USE) bkvi_k(add_share)(score, use, block->norm, 2.0f);
    bkvi_k(add_share)(score, block->weight, NULL, 0.1f);
    constant = bkvi_k(total)(block->norm, BKVI_BLOCK) * (1.0f / 4096.0f);
    constant = constant > 1e-37f ? constant : 1.0f;
    /* All entries at most about 1 (e^10 by KEY without QUERY), whatever the size of the values. */
    bkvi_k(products)(block, 1, v_dim, v_stride, 1.0f / (largest + constant), constant);
}

/* ---- exchanges ---- */
/* Rounds of exchanges: each token that stays, unless for certain, makes way for that one whose
   coming makes the error sum_i (keep_i / chance_i - 1) phi_i shortest, if that is shorter. */
static void bkvi_k(exchange)(bkvi_block *block, uint32_t rounds, unsigned char *keep) {
    /* Products with the error, all negative; the step of a token that changes sides; what that
       adds by itself, negative (from those that stay: too much). */
    float *f = block->tile, *step = f + BKVI_BLOCK, *own = step + BKVI_BLOCK;
    float *error = own + BKVI_BLOCK;
    const bkvi_vec zero = bkvi_v(set)(0.0f), never = bkvi_v(set)(-3e38f);
    bkvi_vec x, y;
    uint32_t i, j;
    for (i = 0; i < BKVI_BLOCK; i++) { /* step: 0 if there is no choice */
        const float p = block->chance[i], w = p > 0.0f && p < 1.0f ? 1.0f / p : 0.0f;
        step[i] = keep[i] ? -w : w;
        error[i] = !keep[i] ? 1.0f : w > 0.0f ? 1.0f - w : 0.0f;
        own[i] = step[i] > 0.0f ? -(w * w * block->matrix[i * (BKVI_BLOCK + 1)]) : -3e38f;
    }
    memset(f, 0, BKVI_BLOCK * sizeof *f);
    bkvi_k(sums)(f, BKVI_BLOCK, block->matrix, BKVI_BLOCK, BKVI_LANES, BKVI_BLOCK, error, 1);
    for (; rounds; rounds--)
        for (i = 0; i < BKVI_BLOCK; i++) {
            const float *row = block->matrix + (size_t)i * BKVI_BLOCK, *other;
            const float own_i = step[i] * step[i] * row[i];
            const bkvi_vec away = bkvi_v(set)(-step[i]);
            const bkvi_vec least = bkvi_v(fma)(away, bkvi_v(set)(f[i] + f[i]), bkvi_v(set)(own_i));
            bkvi_vec most = least, at = zero, here = bkvi_v(load)(bkvi_k(count));
            if (!(step[i] < 0.0f)) continue;
            for (j = 0; j < BKVI_BLOCK; j += BKVI_WIDTH) { /* at: -(place of the most) */
                x = bkvi_v(fma)(away, bkvi_v(load)(row + j), bkvi_v(load)(f + j));
                x = bkvi_v(fma)(bkvi_v(load)(step + j), x + x, bkvi_v(load)(own + j));
                at = bkvi_v(pick_gt)(x, most, here, at);
                most = bkvi_v(max)(most, x);
                here = here - bkvi_v(set)((float)BKVI_WIDTH);
            }
            if (!bkvi_v(any_gt)(most, least)) continue;
            x = bkvi_v(set)(bkvi_v(fold)(most, 0));
            j = (uint32_t)-bkvi_v(fold)(bkvi_v(pick_gt)(x, most, never, at), 0);
            other = block->matrix + (size_t)j * BKVI_BLOCK;
            y = bkvi_v(set)(-step[j]);
            keep[i] = 0, keep[j] = 1;
            step[i] = -step[i], step[j] = -step[j];
            own[i] = -own_i, own[j] = -3e38f;
            for (j = 0; j < BKVI_BLOCK; j += BKVI_WIDTH) {
                x = bkvi_v(fma)(away, bkvi_v(load)(row + j), bkvi_v(load)(f + j));
                bkvi_v(store)(f + j, bkvi_v(fma)(y, bkvi_v(load)(other + j), x));
            }
        }
}

/* ---- refit ---- */
/* A value's dimensions first .. first + n - 1 as floats; integers scaled, but still rotated. As
   total(): never inline, or a product on its way to memory may be fused with a later addition. */
BKVI_NOINLINE void bkvi_k(value)(const bkvi_head *h, float *to, uint32_t slot, uint32_t first,
                                 uint32_t n) {
    const uint32_t type = BKVI_TYPE(h->c->cfg.kv_type), units = bkvi_units(type, bkvi_v_dim(h->c));
    const unsigned char *row = bkvi_part(h, BKVI_V, slot);
    uint32_t i, scale = 0x3F80, high = bkvi_high(type, first, units); /* scale: 1 as bf16 */
    const unsigned char *from = row + (first - high * units) * h->c->elem_bytes;
    if (bkvi_is_int(type)) scale = bkvi_get16(bkvi_part(h, BKVI_V_SCALE, slot));
    for (i = 0; i < n; i += BKVI_WIDTH, from += BKVI_WIDTH * h->c->elem_bytes) {
        if (bkvi_is_i4(type) && first + i == units) from = row, high = 1;
        bkvi_v(store)(to + i, bkvi_v(get)((int)(type + high), from) *
                                  bkvi_v(set)(bkvi_float(scale << 16)));
    }
}

/* Four rows of `to`, 64 floats apart: += sum of c[i] * x(i, j), each with its row of c. */
BKVI_NOINLINE void bkvi_k(contribute)(float *to, uint32_t width, const float *x, uint32_t n,
                                      const float *c) {
    const int rows = BKVI_TILE_ROWS, vecs = BKVI_VECS(BKVI_TILE_ROWS);
    uint32_t r, j;
    for (r = 0; r < 4; r += BKVI_TILE_ROWS, to += rows * BKVI_PAGE, c += rows * BKVI_BLOCK)
        for (j = 0; j < width; j += (uint32_t)vecs * BKVI_LANES) /* or a few beyond */
            bkvi_k(tile_fma)(BKV_F32, 0, rows, vecs, (const unsigned char *)(x + j), BKVI_PAGE,
                             BKVI_LANES, n, c, BKVI_BLOCK, 0, 0, to + j, BKVI_PAGE, NULL);
}

/* Regression: what the tokens that go leave unanswered moves the values of those that stay, unless
   for certain. Of token j the part s_j v_j is missing, s the scores; token i takes over d_i:
       d_i = -1/2 (sum_j H_ij (s_j - r_i) v_j + sum_k H_ik d_k),    v_i -= chance_i d_i,
   one token after the other, k over those before it. H is the third power of the keys' kernel, 1
   on its diagonal, times factors; r_i, by how much weights are short near token i, is no error of
   the quotient that attention is. Half steps are its ridge. */
static void bkvi_k(refit)(const bkvi_head *h, const uint32_t *slots, bkvi_block *block) {
    const uint32_t v_dim = bkvi_v_dim(h->c), type = BKVI_TYPE(h->c->cfg.kv_type);
    const float limit = type == BKV_F16 ? 65520.0f : BKVI_HUGE / 32.0f;
    float *v = block->matrix, *among = v + BKVI_BLOCK * BKVI_PAGE; /* 64 dimensions; H_ik */
    float *row = block->kernel, *d = row + BKVI_PAGE * BKVI_BLOCK; /* H_ij (s_j - r_i) */
    float *h_i = block->tile, *moved = block->panels;              /* new values */
    unsigned char takes[BKVI_PAGE] = {0}; /* n tokens, in order */
    uint32_t i, j, k, n = 0, first;
    bkvi_vec x, minus_r;
    for (i = 0; i < BKVI_BLOCK; i++)
        if (block->score[i] < 0.0f) takes[n++] = (unsigned char)i;
    for (k = 0; k < n; k++, row += BKVI_BLOCK) { /* row k is read by now: k <= takes[k] */
        const float *from = block->kernel + (i = takes[k]) * BKVI_BLOCK;
        const bkvi_vec a = bkvi_v(set)(1.0f / (from[i] + 1e-6f)); /* so that nothing is too large */
        const bkvi_vec b = bkvi_v(set)(-0.5f / (block->factor[i] + 1e-12f));
        for (j = 0; j < BKVI_BLOCK; j += BKVI_WIDTH) {
            x = bkvi_v(load)(from + j) * a;
            x = x * x * (x * (bkvi_v(load)(block->factor + j) * b));
            bkvi_v(store)(h_i + j, x);
            bkvi_v(store)(row + j, x * bkvi_v(load)(block->score + j));
        }
        minus_r = bkvi_v(set)(bkvi_k(total)(row, BKVI_BLOCK) /
                              (1e-30f - bkvi_k(total)(h_i, BKVI_BLOCK)));
        for (j = 0; j < BKVI_BLOCK; j += BKVI_WIDTH)
            bkvi_v(store)(row + j, bkvi_v(fma)(bkvi_v(load)(h_i + j), minus_r,
                                               bkvi_v(load)(row + j)));
        for (j = 0; j < k; j++) among[k * BKVI_BLOCK + j] = h_i[takes[j]];
    }
    for (first = 0; first < v_dim; first += BKVI_PAGE) {
        const uint32_t width = bkvi_min(BKVI_PAGE, v_dim - first);
        for (i = 0; i < BKVI_BLOCK; i++)
            bkvi_k(value)(h, v + i * BKVI_PAGE, slots[i / BKVI_PAGE] + i % BKVI_PAGE, first, width);
        memset(d, 0, BKVI_PAGE * BKVI_PAGE * sizeof *d);
        for (k = 0, row = block->kernel; k < n; k++, row += BKVI_BLOCK) {
            const uint32_t before = BKVI_VECS(1) == 1 ? 0 : k / 4 * 4; /* four take at a time */
            const float *c = among + k * BKVI_BLOCK, *old = v + takes[k] * BKVI_PAGE;
            const bkvi_vec p = bkvi_v(set)(-block->chance[takes[k]]);
            float *d_k = d + k * BKVI_PAGE, *to = moved + k * v_dim + first;
            if (BKVI_VECS(1) == 1)
                bkvi_k(sums)(d_k, width, v, BKVI_PAGE, BKVI_LANES, BKVI_BLOCK, row, 1);
            else if (k == before) {
                bkvi_k(contribute)(d_k, width, v, BKVI_BLOCK, row);
                bkvi_k(contribute)(d_k, width, d, k, c);
            }
            bkvi_k(sums)(d_k, width, d + before * BKVI_PAGE, BKVI_PAGE, BKVI_LANES, k - before,
                         c + before, 1);
            for (j = 0; j < width; j += BKVI_WIDTH)
                bkvi_v(store)(to + j, bkvi_v(fma)(bkvi_v(load)(d_k + j), p, bkvi_v(load)(old + j)));
        }
    }
    for (k = 0; k < n; k++) {
        const uint32_t slot = slots[takes[k] / BKVI_PAGE] + takes[k] % BKVI_PAGE;
        memcpy(v, moved + k * v_dim, v_dim * sizeof *v);
        if (bkvi_k(scan)((unsigned char *)v, BKV_F32, 4, v_dim, limit))
            bkvi_k(put)(bkvi_part(h, BKVI_V, slot), 1, NULL, bkvi_part(h, BKVI_V_SCALE, slot), type,
                        (unsigned char *)v, BKV_F32, 4, v_dim, v);
    }
}

/* ---- attend ---- */
/* 64 numbers times those of a page of bf16. */
BKVI_INLINE void bkvi_k(times)(float *x, const unsigned char *scale) {
    uint32_t i;
    for (i = 0; i < BKVI_PAGE; i += BKVI_WIDTH, scale += 2 * BKVI_WIDTH)
        bkvi_v(store)(x + i, bkvi_v(load)(x + i) * bkvi_v(load_bf16)(scale));
}

/* What a row's error is estimated from: sums over the tokens of c, lane by lane, then of c v and
   c v^2, where c = s^2 (1 - 1 / w), s the weights that softmax has come to. Adds a block's. */
BKVI_NOINLINE void bkvi_k(doubt)(float *sums, const float *s, const bkvi_span *span,
                                 const bkv_cache *c) {
    const uint32_t v_dim_pad = bkvi_v_dim(c), type = BKVI_TYPE(c->cfg.kv_type);
    const uint32_t units = bkvi_units(type, v_dim_pad);
    bkvi_vec x, y, one = bkvi_v(set)(1.0f), most = one, first, second;
    float by[BKVI_PAGE], *to = sums + BKVI_LANES;
    uint32_t i, j, scale = 0x3F80; /* 1 as bf16 */
    for (i = 0; i < BKVI_PAGE; i += BKVI_WIDTH)
        most = bkvi_v(max)(most, bkvi_v(load_f32)(span->weight + 4 * (size_t)i));
    if (!bkvi_v(any_gt)(most, one)) return;
    for (i = 0; i < BKVI_PAGE; i += BKVI_WIDTH) {
        float *lanes = sums + i % BKVI_LANES;
        x = bkvi_v(load)(s + i);
        y = x - x / bkvi_v(load_f32)(span->weight + 4 * (size_t)i);
        bkvi_v(store)(by + i, x * y);
        bkvi_v(store)(lanes, bkvi_v(fma)(x, y, bkvi_v(load)(lanes)));
    }
    for (j = 0; j < v_dim_pad; j += BKVI_WIDTH, to += BKVI_WIDTH) {
        const uint32_t high = bkvi_high(type, j, units);
        const unsigned char *v = span->v + (j - high * units) * c->elem_bytes;
        first = bkvi_v(load)(to), second = bkvi_v(load)(to + v_dim_pad);
        for (i = 0; i < BKVI_PAGE; i++, v += c->each[BKVI_V]) {
            if (span->v_scale) scale = bkvi_get16(span->v_scale + 2 * (size_t)i);
            x = bkvi_v(get)((int)(type + high), v);
            x = x * bkvi_v(set)(bkvi_float(scale << 16));
            y = bkvi_v(set)(by[i]);
            first = bkvi_v(fma)(x, y, first);
            second = bkvi_v(fma)(x * y, x, second);
        }
        bkvi_v(store)(to, first);
        bkvi_v(store)(to + v_dim_pad, second);
    }
}

/* The running mean of a KV head's error learns from a row: values and weights summed up, doubts. */
BKVI_NOINLINE void bkvi_k(settle)(unsigned char *error, const float *out, float sum, float *doubt,
                                  uint32_t v_dim_pad) {
    const bkvi_vec factor = bkvi_v(set)(1.0f / sum), zero = bkvi_v(set)(0.0f);
    const bkvi_vec all = bkvi_v(set)(bkvi_k(over_lanes)(doubt));
    const bkvi_vec old = bkvi_v(set)(bkvi_getf(error));
    float *first = doubt + BKVI_LANES, *second = first + v_dim_pad;
    bkvi_vec x, y;
    uint32_t i;
    for (i = 0; i < v_dim_pad; i += BKVI_WIDTH) { /* c (v - out)^2, and out^2 */
        x = bkvi_v(load)(out + i) * factor, y = bkvi_v(load)(first + i);
        y = bkvi_v(fma)(x, all, zero - (y + y));
        bkvi_v(store)(second + i, bkvi_v(fma)(x, y, bkvi_v(load)(second + i)));
        bkvi_v(store)(first + i, x * x);
    }
    sum = bkvi_k(total)(second, v_dim_pad) / bkvi_k(total)(first, v_dim_pad) / sum / sum;
    if (!(sum > 0.0f && sum < BKVI_HUGE)) return; /* nothing was left to chance, or out is 0 */
    x = bkvi_v(sqrt)(bkvi_v(set)(sum));
    y = bkvi_v(set)(bkvi_getf(error) > 0.0f ? 0.0625f : 1.0f);
    bkvi_putf(error, bkvi_v(fold)(bkvi_v(fma)(x - old, y, old), 0));
}

/* Scores of a row that are to be scaled, capped or masked. */
static void bkvi_k(prepare)(float *s, const unsigned char *scale, float cap, float limit) {
    const bkvi_vec one = bkvi_v(set)(1.0f), top = bkvi_v(set)(126.0f);
    bkvi_vec x, t[4];
    uint32_t i, k;
    if (scale) bkvi_k(times)(s, scale);
    /* c tanh(z / c) log2 e with tanh(y) = 1 - 2 / (1 + e^2y); queries carry 2 log2(e) / c. */
    for (i = 0; i < BKVI_PAGE && cap > 0.0f; i += 4 * BKVI_WIDTH) {
        BKVI_FOUR for (k = 0; k < 4; k++) t[k] = bkvi_v(load)(s + i + k * BKVI_WIDTH);
        BKVI_FOUR for (k = 0; k < 4; k++) t[k] = bkvi_v(pick_gt)(t[k], top, top, t[k]);
        bkvi_k(exp2)(t);
        BKVI_FOUR for (k = 0; k < 4; k++) {
            BKVI_ROUND(t[k]); /* fusing would change no bit, but check_symbols.py would report it */
            x = one - bkvi_v(set)(2.0f) / (one + t[k]);
            bkvi_v(store)(s + i + k * BKVI_WIDTH, x * bkvi_v(set)(cap * BKVI_LOG2E));
        }
    }
    if (limit < (float)BKVI_PAGE) for (i = 0; i < BKVI_PAGE; i += BKVI_WIDTH) {
        x = bkvi_v(set)((float)(i - i % BKVI_LANES) - limit);
        bkvi_v(store)(s + i, bkvi_v(pick_gt)(bkvi_v(load)(bkvi_k(count) + i % BKVI_LANES), x,
                                             bkvi_v(load)(s + i), bkvi_v(set)(BKVI_MASKED)));
    }
}

/* The maximum of row r rises: what was summed so far shrinks. */
static void bkvi_k(rise)(bkvi_tiles *t, uint32_t r, float max, uint32_t v_dim_pad) {
    float *out = t->out + (size_t)r * v_dim_pad, *lanes = t->lanes + r * BKVI_LANES;
    bkvi_vec shrink[4];
    uint32_t i;
    for (i = 0; i < 4; i++) shrink[i] = bkvi_v(set)(t->max[r] - max);
    bkvi_k(exp2)(shrink);
    t->max[r] = max;
    for (i = 0; i < BKVI_LANES; i += BKVI_WIDTH)
        bkvi_v(store)(lanes + i, bkvi_v(load)(lanes + i) * shrink[0]);
    for (i = 0; i < v_dim_pad; i += BKVI_WIDTH)
        bkvi_v(store)(out + i, bkvi_v(load)(out + i) * shrink[0]);
    for (i = 0; i < BKVI_LANES + 2 * v_dim_pad && r == t->doubted; i += BKVI_WIDTH)
        bkvi_v(store)(t->doubt + i, bkvi_v(load)(t->doubt + i) * shrink[0] * shrink[0]);
}

/* Online softmax of a tile: scores become weights relative to the rows' maxima so far. */
BKVI_NOINLINE void bkvi_k(soften)(bkvi_tiles *t, const bkvi_span *span, uint32_t first,
                                  uint32_t rows, const bkv_cache *c) {
    float *s = t->scores;
    bkvi_vec x;
    uint32_t i, r;
    for (r = first; r < first + rows; r++, s += BKVI_PAGE) {
        const float limit = span->last ? t->limit[r] : (float)span->slots;
        const bkvi_vec old = bkvi_v(set)(t->max[r]);
        if (span->k_scale || c->cfg.softcap > 0.0f || limit < (float)BKVI_PAGE)
            bkvi_k(prepare)(s, span->k_scale, c->cfg.softcap, limit);
        for (x = old, i = 0; i < BKVI_PAGE; i += BKVI_WIDTH)
            x = bkvi_v(max)(x, bkvi_v(load)(s + i));
        if (bkvi_v(any_gt)(x, old)) bkvi_k(rise)(t, r, bkvi_v(fold)(x, 0), bkvi_v_dim(c));
    }
    for (r = 0; r < rows; r++) /* no call (but of small builds): constants stay in registers */
        bkvi_k(raise)(t->scores + r * BKVI_PAGE, BKVI_PAGE, t->max[first + r], span->weight,
                      t->lanes + (first + r) * BKVI_LANES);
    for (r = first, s = t->scores; r < first + rows; r++, s += BKVI_PAGE) {
        if (span->use) { /* it grows by the squared share of attention that a token just had */
            const float share = 1.0f / bkvi_k(over_lanes)(t->lanes + r * BKVI_LANES);
            for (i = 0; i < BKVI_PAGE; i += BKVI_WIDTH) {
                unsigned char *use = span->use + 4 * (size_t)i;
                x = bkvi_v(load)(s + i) * bkvi_v(set)(share);
                bkvi_v(store_f32)(use, bkvi_v(fma)(x, x, bkvi_v(load_f32)(use)));
            }
        }
        if (r == t->doubted) bkvi_k(doubt)(t->doubt, s, span, c);
        if (span->v_scale) bkvi_k(times)(s, span->v_scale);
    }
}

/* A tile of rows over one block: scores, softmax, sum of values. Meanwhile keys and values of the
   next one come to the second level of the cache, line by line: a run of prefetches would stall.
   What rounding left is a product of its own, as are the high digits of 4 bits. */
BKVI_INLINE void bkvi_k(attend_tile)(const int type, const int rows, const bkv_cache *c,
                                     bkvi_tiles *t, const bkvi_span *span, uint32_t first) {
    const uint32_t dim = BKVI_DIM(c->cfg.head_dim), v_dim_pad = bkvi_v_dim(c);
    const uint32_t k_units = bkvi_units((uint32_t)type, dim), all = (uint32_t)rows * BKVI_PAGE;
    const uint32_t v_units = bkvi_units((uint32_t)type, v_dim_pad), digits = type < BKV_I4 ? 1 : 2;
    const size_t es = bkvi_type_bytes((uint32_t)type), panel = (size_t)k_units * BKVI_LANES;
    const float *q = t->q + (size_t)first * dim, rest = 1.0f / bkvi_parts((uint32_t)type);
    const unsigned char *x, *next;
    uint32_t i, high, slots, from, n;
#define BKVI_SCORES(vecs)                                                                          \
    for (; vecs <= BKVI_VECS(rows) && (i + vecs - 1) * BKVI_LANES < slots; i += vecs)              \
    bkvi_k(tile_fma)(type, high, rows, vecs, x + i * panel * es, BKVI_LANES, panel, n,             \
                     q + from * (size_t)rows, 0, (size_t)rows, type < BKV_I8,                      \
                     t->scores + (size_t)i * BKVI_LANES, BKVI_PAGE,                                \
                     next ? next + i * panel * es : NULL)
#define BKVI_VALUES(vecs)                                                                          \
    for (; vecs <= BKVI_VECS(rows) && i + vecs <= v_units / BKVI_LANES; i += vecs)                 \
    bkvi_k(tile_fma)(type, high, rows, vecs, x + (size_t)i * BKVI_LANES * es, v_units, BKVI_LANES, \
                     slots, t->scores, BKVI_PAGE, 0, 0, out + (size_t)i * BKVI_LANES, v_dim_pad,   \
                     next ? next + (size_t)i * BKVI_LANES * BKVI_PAGE * es : NULL)
    if (type >= BKV_I8) memset(t->scores, 0, all * sizeof(float));
    for (x = span->k_rest ? span->k_rest : span->k; x; x = x == span->k ? NULL : span->k) {
        if (type >= BKV_I8 && span->k_rest && x == span->k)
            bkvi_k(scaled)(t->scores, t->scores, all, rest);
        slots = x == span->k ? span->slots : span->rests;
        for (high = 0; high < digits; high++) {
            from = high ? bkvi_min(k_units, dim) : 0, n = bkvi_min(k_units, dim - from);
            next = high ? NULL : span->next_k;
            i = 0;
            BKVI_SCORES(4); BKVI_SCORES(2); BKVI_SCORES(1);
        }
    }
    bkvi_k(soften)(t, span, first, (uint32_t)rows, c);
    for (x = span->v; x; x = x == span->v ? span->v_rest : NULL) {
        if (type >= BKV_I8 && x != span->v) bkvi_k(scaled)(t->scores, t->scores, all, rest);
        slots = x == span->v ? span->slots : span->rests;
        for (high = 0; high < digits; high++) {
            float *out = t->out + (size_t)first * v_dim_pad + high * v_units;
            next = high ? NULL : span->next_v;
            i = 0;
            BKVI_VALUES(4); BKVI_VALUES(2); BKVI_VALUES(1);
        }
    }
#undef BKVI_SCORES
#undef BKVI_VALUES
}

/* One function per type and row count, so that each has the registers to itself. */
#if BKVI_SMALL
#define BKVI_EACH_ROWS(X, type) X(type, 1)
#else
#define BKVI_EACH_ROWS(X, type) X(type, 1) X(type, 2) X(type, 3) X(type, 4)
#endif
#ifdef BALANCEKV_KV_TYPE
#define BKVI_EACH_TILE(X) BKVI_EACH_ROWS(X, BALANCEKV_KV_TYPE)
#else
#define BKVI_EACH_TILE(X)                                                                          \
    BKVI_EACH_ROWS(X, 1) BKVI_EACH_ROWS(X, 2) BKVI_EACH_ROWS(X, 3) BKVI_EACH_ROWS(X, 4)            \
    BKVI_EACH_ROWS(X, 5)
#endif
#define BKVI_X(type, rows)                                                                         \
    BKVI_NOINLINE void BKVI_FN(bkvi_attend_##type##_##rows)(                                       \
        const bkv_cache *c, bkvi_tiles *t, const bkvi_span *span, uint32_t first) {                \
        bkvi_k(attend_tile)(type, rows, c, t, span, first);                                        \
    }
BKVI_EACH_TILE(BKVI_X)
#undef BKVI_X

/* One scaled query, elements `width` apart, rotated if `turn`; its mean, if any, learns. */
BKVI_NOINLINE void bkvi_k(load_query)(float *to, uint32_t width, unsigned char *mean,
                                      const unsigned char *row, const bkv_tensor *q, uint32_t dim,
                                      float scale, float *work, int turn) {
    uint32_t i;
    for (i = 0; i < dim; i += BKVI_LANES)
        bkvi_k(row)(work + i, row, q->type, q->elem_stride, i, dim);
    if (turn) bkvi_k(rotate)(work, dim);
    for (i = 0; i < dim; i += BKVI_WIDTH) {
        bkvi_vec x = bkvi_v(load)(work + i);
        if (mean) {
            bkvi_vec m = bkvi_v(load_f32)(mean + 4 * (size_t)i);
            m = bkvi_v(fma)(x - m, bkvi_v(set)(BKVI_LEARN), m);
            bkvi_v(store_f32)(mean + 4 * (size_t)i, m);
        }
        bkvi_v(store)(work + i, x * bkvi_v(set)(scale));
    }
    for (i = 0; i < dim; i++, to += width) *to = work[i];
}

static void bkvi_k(attend)(const bkvi_head *h, const bkvi_queries *run) {
    const bkv_cache *c = h->c;
    const uint32_t dim = BKVI_DIM(c->cfg.head_dim), v_dim_pad = bkvi_v_dim(c), group = c->group;
    const uint32_t n_blocks = bkvi_round_up(h->sinks, BKVI_PAGE) / BKVI_PAGE + h->used;
    const float softcap = c->cfg.softcap;
    const float scale = c->cfg.scale * (softcap > 0.0f ? 2.0f * BKVI_LOG2E / softcap : BKVI_LOG2E);
    bkvi_tiles *t = (bkvi_tiles *)(void *)h->scratch;
    float *work = bkvi_is_int(c->cfg.kv_type) ? t->work : NULL;
    const uint32_t last_fill = h->used ? h->fill : (h->sinks - 1) % BKVI_PAGE + 1;
    uint32_t begin, b, r, i, doubted = 0xFFFFFFFFu; /* row whose error is estimated */
    if (h->halvings && h->fill == BKVI_PAGE && !h->drafts) /* the last token; heads take turns */
        doubted = (run->n - 1) * group + (uint32_t)(h->halvings % group);
    t->out = t->q + (size_t)BKVI_ROWS * dim;
    /* Row r: token r / group, query head r % group of this KV head. */
    for (begin = 0; begin < run->n * group; begin += BKVI_ROWS) {
        uint32_t n = bkvi_min(BKVI_ROWS, run->n * group - begin), tile_rows, size;
        uint32_t slots, slot = bkvi_block_slot(h, 0, &slots);
        const unsigned char *k = bkvi_part(h, BKVI_K, slot), *v = bkvi_part(h, BKVI_V, slot);
        /* Behind the last block of the last rows comes the next KV head, if there is one. */
        const size_t beyond =
            begin + n < run->n * group || h->index + 1 == c->cfg.n_kv_heads ? 0 : c->head_bytes;
        /* Tiles of equal size, at most BKVI_TILE_ROWS rows; the queries of a tile side by side. */
        size = (n + BKVI_TILE_ROWS - 1) / BKVI_TILE_ROWS;
        size = BKVI_SMALL ? 1 : (n + size - 1) / size;
        for (r = 0; r < n; r++) {
            uint32_t token = (begin + r) / group, member = (begin + r) % group;
            uint32_t tile = r / size * size, width = bkvi_min(size, n - tile);
            t->limit[r] = (float)(last_fill - run->n + 1 + token);
            t->max[r] = BKVI_LOWEST;
            bkvi_k(load_query)(t->q + (size_t)tile * dim + (r - tile), width,
                               h->drafts ? NULL : bkvi_part(h, BKVI_QUERIES, member),
                               bkvi_at(run->q, run->first + token, h->index * group + member),
                               run->q, dim, scale, t->work, work != NULL);
        }
        memset(t->out, 0, (size_t)n * v_dim_pad * sizeof *t->out);
        memset(t->lanes, 0, (size_t)n * BKVI_LANES * sizeof *t->lanes);
        memset(t->doubt, 0, (BKVI_LANES + 2 * (size_t)v_dim_pad) * sizeof *t->doubt);
        t->doubted = doubted - begin;
        for (b = 0; b < n_blocks; b++) {
            bkvi_span span;
            span.slots = slots, span.last = b + 1 == n_blocks;
            span.k = k, span.v = v, span.weight = bkvi_part(h, BKVI_WEIGHT, slot);
            span.use = b + 2 < n_blocks || h->drafts ? NULL : bkvi_part(h, BKVI_USE, slot);
            span.k_scale = work ? bkvi_part(h, BKVI_K_SCALE, slot) : NULL;
            span.v_scale = work ? bkvi_part(h, BKVI_V_SCALE, slot) : NULL;
            span.k_rest = work ? bkvi_rest(h, BKVI_K, slot) : NULL;
            span.v_rest = work ? bkvi_rest(h, BKVI_V, slot) : NULL;
            span.rests = bkvi_min(span.slots, slot < c->sink_slots ? BKVI_LANES : BKVI_PAGE);
            slot = span.last ? 0 : bkvi_block_slot(h, b + 1, &slots);
            k = bkvi_part(h, BKVI_K, slot), v = bkvi_part(h, BKVI_V, slot);
            span.next_k = k + span.last * beyond, span.next_v = v + span.last * beyond;
            for (r = 0; r < n; r += tile_rows) {
                tile_rows = bkvi_min(size, n - r);
                if (BKVI_SMALL || r || (span.last && !beyond)) span.next_k = span.next_v = NULL;
                switch (BKVI_TYPE(c->cfg.kv_type) * 8 + tile_rows) {
#define BKVI_X(type, rows)                                                                         \
    case (type)*8 + (rows): BKVI_FN(bkvi_attend_##type##_##rows)(c, t, &span, r); break;
                    BKVI_EACH_TILE(BKVI_X)
#undef BKVI_X
                default: break;
                }
            }
        }

        for (r = 0; r < n; r++) {
            size_t head = (size_t)h->index * group + (begin + r) % group, v_dim = c->cfg.value_dim;
            size_t token = run->first + (begin + r) / group;
            float *row = t->out + (size_t)r * v_dim_pad;
            const float sum = bkvi_k(over_lanes)(t->lanes + r * BKVI_LANES);
            const bkvi_vec factor = bkvi_v(set)(run->max ? 1.0f : 1.0f / sum);
            if (run->max) {
                run->max[head] = t->max[r] == 0.0f ? 0.0f : t->max[r] * BKVI_LN2; /* never -0 */
                run->sum[head] = sum;
            }
            if (r == t->doubted)
                bkvi_k(settle)(h->mem + BKVI_ERROR_AT, row, sum, t->doubt, v_dim_pad);
            if (work) {
                memcpy(work, row, v_dim_pad * sizeof *row);
                bkvi_k(rotate)(row = work, v_dim_pad);
            }
            for (i = 0; i < v_dim_pad; i += BKVI_WIDTH) { /* + 0: -0 gives 0 */
                bkvi_vec x = bkvi_v(load)(row + i);
                bkvi_v(store)(row + i, bkvi_v(fma)(x, factor, bkvi_v(set)(0.0f)));
            }
            memcpy(run->out + (token * c->cfg.n_q_heads + head) * v_dim, row, v_dim * sizeof *row);
        }
    }
}

static bkvi_kernels bkvi_k(kernels)(void) { /* assigned: an initialiser would be data */
    bkvi_kernels k;
    k.scan = bkvi_k(scan), k.put = bkvi_k(put), k.fetch = bkvi_k(fetch), k.gram = bkvi_k(gram);
    k.exchange = bkvi_k(exchange), k.refit = bkvi_k(refit), k.attend = bkvi_k(attend);
    return k;
}

#if BKVI_PASS == BALANCEKV_SIMD_AVX2 || (BKVI_PASS == BALANCEKV_SIMD_AVX512 && !BALANCEKV_SIMDE)
BKVI_TARGET_END
#endif
#if BKVI_PASS == BKVI_WIDEST /* behind all passes, which were of other backends */
static bkvi_kernels bkvi_kernels_of(uint32_t backend) {
#if BKVI_HAVE_SCALAR && BKVI_WIDEST != BALANCEKV_SIMD_SCALAR
    if (backend == BKV_BACKEND_SCALAR) return bkvi_kernels_scalar();
#endif
#if BKVI_HAVE_AVX2 && BKVI_WIDEST != BALANCEKV_SIMD_AVX2
    if (backend == BKV_BACKEND_AVX2) return bkvi_kernels_avx2();
#endif
    (void)backend;
    return bkvi_k(kernels)();
}

/* No macro BKVI_* survives the #include. */
#undef BKVI_ARCH_X86
#undef BKVI_ARCH_ARM64
#undef BKVI_DIM
#undef BKVI_TYPE
#undef BKVI_HAVE_SCALAR
#undef BKVI_HAVE_AVX2
#undef BKVI_HAVE_AVX512
#undef BKVI_HAVE_NEON
#undef BKVI_WIDEST
#undef BKVI_INLINE
#undef BKVI_NOINLINE
#undef BKVI_ONCE
#undef BKVI_FOUR
#undef BKVI_UNROLL
#undef BKVI_CLANG_X86
#undef BKVI_WAIT
#undef BKVI_PRAGMA
#undef BKVI_TARGET
#undef BKVI_TARGET_END
#undef BKVI_ROUND
#undef BKVI_SMALL
#undef BKVI_HARDWARE_FMA
#ifdef BKVI_BARE
#undef memcpy
#undef memset
#undef memmove
#undef BKVI_BARE
#endif
#endif
#undef bkvi_v
#undef bkvi_k
#undef bkvi_vec
#undef bkvi_words
#undef BKVI_OP
#undef BKVI_STORE
#undef BKVI_I
#undef BKVI_4
#undef BKVI_WIDTH
#undef BKVI_REGS
#undef BKVI_FN
#undef BKVI_EACH_TILE
#undef BKVI_EACH_ROWS
#undef BKVI_TILES
#undef BKVI_VECS
#undef BKVI_PASS
#endif /* BKVI_PASS */

/* ---- §13 LICENCE ------------------------------------------------------------------ >>licence
   SPDX-License-Identifier: MIT OR Unlicense, as you choose; both texts are in LICENSE.
   Copyright (c) 2026 the balancekv.h authors. */
