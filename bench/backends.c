/* Backends side by side in one process, those through SIMDe too: nanoseconds of one attend() and of
   one appended token, halvings included, best of many interleaved rounds, beside the first backend.

       cc -std=c99 -O2 -I. -c -DPART_SIMDE -DBALANCEKV_SIMDE bench/backends.c -o simde.o
       cc -std=c99 -O2 -I. bench/backends.c simde.o -o backends && ./backends

   On x86 the first line wants -mavx2 -mfma -mf16c as well. For WASM, cc is `python3 -m ziglang cc
   -target wasm32-wasi -msimd128 -isystem build/matrix/include` (tests/matrix.sh makes that folder),
   and `python3 tests/wasi.py ./backends` runs it. -DBALANCEKV_FMA=0 in both lines: the other class. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#define BALANCEKV_IMPLEMENTATION
#define BALANCEKV_STATIC
#include "balancekv.h"

/* One file of ours is one copy of the header: with its backends and its functions. */
typedef struct copy {
    uint32_t backends;
    const char *name;
    bkv_result (*init)(bkv_cache *, const bkv_config *, void *, size_t);
    bkv_result (*append)(bkv_cache *, bkv_tensor, bkv_tensor, size_t, uint32_t, uint32_t, uint32_t);
    bkv_result (*attend)(bkv_cache *, bkv_tensor, float *, uint32_t, uint32_t);
} copy;

copy simde_copy(void);

#ifdef PART_SIMDE
copy simde_copy(void) {
    copy c = {bkv_backends(), "simde ", bkv_init, bkv_append, bkv_attend};
    return c;
}
#else
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { HEADS = 2, DIM = 64, SLOTS = 1024, GROUP = 4, TOKENS = 256, ROUNDS = 40, MAX = 8 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void require(bkv_result r) {
    if (r != BKV_OK) {
        fprintf(stderr, "backends: %s\n", bkv_result_string(r));
        exit(1);
    }
}

int main(void) {
    copy own = {bkv_backends(), "", bkv_init, bkv_append, bkv_attend};
    copy copies[2];
    bkv_cache cache[MAX];
    const copy *of[MAX];
    double best_attend[MAX], best_append[MAX];
    static float k[TOKENS * HEADS * DIM], q[HEADS * GROUP * DIM], out[HEADS * GROUP * DIM];
    int n = 0, i, c, round;
    uint32_t b, x = 1;
    copies[0] = own, copies[1] = simde_copy();
    for (i = 0; i < TOKENS * HEADS * DIM; i++) {
        x = x * 1664525u + 1013904223u;
        k[i] = (float)(x >> 8) / 8388608.0f - 1.0f;
    }
    for (i = 0; i < HEADS * GROUP * DIM; i++) q[i] = k[i * 3];
    for (c = 0; c < 2; c++)
        for (b = 1; b < 32 && n < MAX; b++)
            if (copies[c].backends >> b & 1) {
                bkv_config cfg = bkv_config_default(HEADS * GROUP, HEADS, DIM, SLOTS);
                size_t bytes = bkv_size(&cfg);
                cfg.backend = b;
                of[n] = &copies[c];
                best_attend[n] = best_append[n] = 1e30;
                require(copies[c].init(&cache[n], &cfg, malloc(bytes), bytes));
                n++;
            }
    for (round = 0; round < ROUNDS; round++)
        for (i = 0; i < n; i++) {
            bkv_tensor kt = bkv_dense(k, BKV_F32), qt = bkv_dense(q, BKV_F32);
            double t = now(), elapsed;
            require(of[i]->append(&cache[i], kt, kt, TOKENS, 0, 0, 1));
            elapsed = (now() - t) / TOKENS;
            if (round > 4 && elapsed < best_append[i]) best_append[i] = elapsed; /* it is full */
            for (c = 0; c < 4; c++) {
                t = now();
                require(of[i]->attend(&cache[i], qt, out, 0, 1));
                elapsed = now() - t;
                if (elapsed < best_attend[i]) best_attend[i] = elapsed;
            }
        }
    printf("%d heads of %d, f16, group %d, %d slots; BALANCEKV_FMA=%d\n", HEADS, DIM, GROUP, SLOTS,
           BALANCEKV_FMA);
    for (i = 0; i < n; i++)
        printf("%s%-8s attend %9.0f ns, %.2f times the first; append %7.0f ns a token, %.2f times\n",
               of[i]->name, bkv_backend_name(cache[i].cfg.backend), best_attend[i],
               best_attend[0] / best_attend[i], best_append[i], best_append[0] / best_append[i]);
    return 0;
}
#endif
