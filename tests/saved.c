/* A state saved on one machine goes on, on another, bit for bit (tests/matrix.sh: s390x, which is
   big-endian, to this one).

       saved write FILE       a cache of 500 tokens, saved
       saved read FILE        loads it; with 100 tokens more it must be the cache that never left */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIM = 33, HEADS = 2, BEFORE = 500, AFTER = 100 };

static void require(int good, const char *what) {
    if (!good) {
        printf("%s\n0 passed, 1 failed\n", what);
        exit(1);
    }
}

/* Tokens first .. first + n - 1, and attention after each. */
static void go_on(bkv_cache *c, uint32_t first, uint32_t n, float *out) {
    for (uint32_t t = first; t < first + n; t++) {
        float x[HEADS * DIM];
        bkv_tensor tensor = bkv_dense(x, BKV_F32);
        for (uint32_t i = 0; i < HEADS * DIM; i++)
            x[i] = (float)((t * 2654435761u + i * 40503u * (t % 7 + 1)) >> 8 & 0xFFFF) / 32768 - 1;
        require(bkv_append(c, tensor, tensor, 1, 0, 0, 1) == BKV_OK, "append");
        require(bkv_attend(c, tensor, out, 0, 1) == BKV_OK, "attend");
    }
}

int main(int argc, char **argv) {
    bkv_config cfg = bkv_config_default(HEADS, HEADS, DIM, 256);
    size_t bytes = bkv_size(&cfg), n;
    bkv_cache here, there;
    bkv_stats_info s;
    float out[2][HEADS * DIM];
    unsigned char *saved = (unsigned char *)malloc(bytes), *second = (unsigned char *)malloc(bytes);
    FILE *file;
    require(argc == 3 && saved && second, "saved write|read FILE");
    require(bkv_init(&here, &cfg, malloc(bytes), bytes) == BKV_OK, "init");
    go_on(&here, 0, BEFORE, out[0]);
    bkv_stats(&here, &s);
    require(bkv_save(&here, saved, bytes) == BKV_OK, "save");
    file = fopen(argv[2], strcmp(argv[1], "write") ? "rb" : "wb");
    require(file != NULL, "file");
    if (strcmp(argv[1], "write") == 0) {
        require(fwrite(saved, 1, s.state_bytes, file) == s.state_bytes && !fclose(file), "write");
        return 0;
    }
    n = fread(second, 1, bytes, file);
    require(n == s.state_bytes && memcmp(saved, second, n) == 0, "other bytes saved there");
    require(bkv_load(&there, second, n, malloc(bytes), bytes, 1, 0) == BKV_OK, "load");
    go_on(&here, BEFORE, AFTER, out[0]);
    go_on(&there, BEFORE, AFTER, out[1]);
    require(memcmp(out[0], out[1], sizeof out[0]) == 0, "other outputs");
    require(memcmp(here.mem, there.mem, s.state_bytes) == 0, "another state");
    printf("1 passed, 0 failed\n");
    return 0;
}
