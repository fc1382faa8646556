/* freestanding.c - no C library, no heap, no operating system: 300 tokens of one layer go through a
   cache in a static array of BKV_SIZE bytes. Prints the check sum of all outputs, which is the same
   on every machine. As an ordinary program:
       cc -std=c99 -O2 -I. examples/freestanding.c -o freestanding && ./freestanding
   Bare, on a Cortex-M7, on AArch64 and on x86-64, each in its emulator: sh examples/freestanding.sh */
#define BALANCEKV_STATIC
#define BALANCEKV_HEAD_DIM 64
#define BALANCEKV_KV_TYPE BALANCEKV_F16
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

enum { Q_HEADS = 3, KV_HEADS = 1, DIM = BALANCEKV_HEAD_DIM, BUDGET = 208, TOKENS = 300 };

static unsigned char memory[BKV_SIZE(Q_HEADS, KV_HEADS, DIM, BUDGET, BKV_F16)];
static float k[KV_HEADS * DIM], v[KV_HEADS * DIM], q[Q_HEADS * DIM], out[Q_HEADS * DIM];

static void model(float *x, size_t n) { /* stands in for yours: noise in [-1, 1) */
    static uint32_t state = 1;
    for (; n--; state = state * 1664525u + 1013904223u)
        *x++ = (float)(state >> 9) / 4194304.0f - 1.0f;
}

/* FNV-1a over the bits of every output; 0 if a call failed. */
static uint32_t check_sum(void) {
    uint32_t sum = 2166136261u;
    bkv_config cfg = bkv_config_default(Q_HEADS, KV_HEADS, DIM, BUDGET);
    bkv_cache cache;
    bkv_result r = bkv_init(&cache, &cfg, memory, sizeof memory);
    for (int t = 0; t < TOKENS; t++) {
        model(k, KV_HEADS * DIM);
        model(v, KV_HEADS * DIM);
        model(q, Q_HEADS * DIM);
        if (r == BKV_OK)
            r = bkv_append(&cache, bkv_dense(k, BKV_F32), bkv_dense(v, BKV_F32), 1, 0, 0, 1);
        if (r == BKV_OK) r = bkv_attend(&cache, bkv_dense(q, BKV_F32), out, 0, 1);
        for (int i = 0; i < Q_HEADS * DIM; i++) {
            union {
                float number;
                uint32_t bits;
            } x = {out[i]};
            sum = (sum ^ x.bits) * 16777619u;
        }
    }
    return r == BKV_OK ? sum : 0;
}

static char line[] = "check sum 00000000\n";
static int run(void) { /* returns the exit code */
    uint32_t sum = check_sum();
    for (int i = 0; i < 8; i++) line[17 - i] = "0123456789abcdef"[sum >> 4 * i & 15];
    return sum == 0;
}

#if __STDC_HOSTED__
#include <stdio.h>
int main(void) {
    int code = run();
    fputs(line, stdout);
    return code;
}
#else

/* All that is called here; bkv_shrink() would want memmove, too. Left alone, a compiler sees what
   the loops do and makes them calls. */
#define BYTE_BY_BYTE __asm__ volatile("")
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    unsigned char *t = (unsigned char *)to;
    const unsigned char *f = (const unsigned char *)from;
    for (; n; n--, *t++ = *f++) BYTE_BY_BYTE;
    return to;
}
void *memset(void *to, int value, size_t n) {
    unsigned char *t = (unsigned char *)to;
    for (; n; n--, *t++ = (unsigned char)value) BYTE_BY_BYTE;
    return to;
}
int memcmp(const void *a, const void *b, size_t n) {
    const unsigned char *x = (const unsigned char *)a, *y = (const unsigned char *)b;
    for (; n > 1 && *x == *y; n--) x++, y++;
    return n ? *x - *y : 0;
}

#if defined(__thumb__) /* Cortex-M7: starts at reset, speaks through a debugger (semihosting) */
static void ask_debugger(uint32_t what, const void *argument) {
    register uint32_t r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}
static void reset(void) { /* the emulator has loaded .data and cleared .bss; a board's would here */
    uint32_t exit_code[2] = {0x20026 /* ended by itself */, 0};
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: switches the FPU on */
    __asm__ volatile("dsb\n\tisb");
    exit_code[1] = (uint32_t)run();
    ask_debugger(0x04, line);      /* SYS_WRITE0 */
    ask_debugger(0x20, exit_code); /* SYS_EXIT_EXTENDED */
}
extern char stack_top[];
__attribute__((section(".vectors"), used)) static const struct {
    char *stack;
    void (*reset)(void);
} vectors = {stack_top, reset};

#else /* Linux without its libraries */
#if defined(__aarch64__)
enum { WRITE = 64, EXIT = 93 };
static void ask_linux(long call, long a, const void *b, long c) {
    register long x8 __asm__("x8") = call, x0 __asm__("x0") = a, x2 __asm__("x2") = c;
    register const void *x1 __asm__("x1") = b;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
}
#else
enum { WRITE = 1, EXIT = 60 };
static void ask_linux(long call, long a, const void *b, long c) {
    __asm__ volatile("syscall" : "+a"(call) : "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
}
/* Entered by a jump, so the stack is not where a called function expects it. */
__attribute__((force_align_arg_pointer))
#endif
void _start(void);
void _start(void) {
    int code = run();
    ask_linux(WRITE, 1, line, sizeof line - 1);
    ask_linux(EXIT, code, 0, 0);
}
#endif
#endif
