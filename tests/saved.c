/* A state saved on one machine goes on, on another, bit for bit (tests/matrix.sh: s390x, which is
   big-endian, to this one).

       saved write FILE       caches of 700 tokens, saved
       saved read FILE        loads them; with 100 tokens more each must be that which never left */
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIM = 33, HEADS = 2, BUDGET = 528, BEFORE = 700, AFTER = 100 };

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

/* One cache, whose saved state is written, or read, where the file stands. */
static void check(uint32_t kv_type, int writes, FILE *file) {
    bkv_config cfg = bkv_config_default(HEADS, HEADS, DIM, BUDGET);
    bkv_cache here, there;
    bkv_stats_info s;
    float out[2][HEADS * DIM];
    size_t bytes, n;
    unsigned char *block[4];
    cfg.kv_type = kv_type;
    bytes = bkv_size(&cfg);
    for (int i = 0; i < 4; i++) {
        block[i] = (unsigned char *)malloc(bytes);
        require(block[i] != NULL, "memory");
    }
    require(bkv_init(&here, &cfg, block[0], bytes) == BKV_OK, "init");
    go_on(&here, 0, BEFORE, out[0]);
    bkv_stats(&here, &s);
    require(s.halvings > 0 && bkv_save(&here, block[1], bytes) == BKV_OK, "save");
    if (writes) {
        require(fwrite(block[1], 1, s.state_bytes, file) == s.state_bytes, "write");
    } else {
        n = fread(block[2], 1, s.state_bytes, file);
        require(n == s.state_bytes, "another size saved there");
        require(memcmp(block[1], block[2], n) == 0, "other bytes saved there");
        require(bkv_load(&there, block[2], n, block[3], bytes, 1, 0) == BKV_OK, "load");
        go_on(&here, BEFORE, AFTER, out[0]);
        go_on(&there, BEFORE, AFTER, out[1]);
        require(memcmp(out[0], out[1], sizeof out[0]) == 0, "other outputs");
        require(memcmp(here.mem, there.mem, s.state_bytes) == 0, "another state");
    }
    for (int i = 0; i < 4; i++) free(block[i]);
}

int main(int argc, char **argv) {
    int writes = argc == 3 && strcmp(argv[1], "write") == 0;
    FILE *file = argc == 3 ? fopen(argv[2], writes ? "wb" : "rb") : NULL;
    require(file != NULL, "saved write|read FILE");
    check(BKV_F16, writes, file);
    check(BKV_I4, writes, file); /* scales and rests, too */
    require(!fclose(file), "close");
    if (!writes) printf("1 passed, 0 failed\n");
    return 0;
}
