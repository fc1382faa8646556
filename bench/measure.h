/* measure.h - clock, memory, random data, and races: contenders take turns in short samples, and
   the best sample of each counts. What disturbs the machine then disturbs all of them, and ratios
   within a race hold where absolute times do not. */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Zeroed, on huge pages where the system has them, and touched. */
static void *allocate(size_t bytes) {
    const size_t unit = (size_t)2 << 20;
    void *p = NULL;
    bytes = (bytes + unit - 1) / unit * unit;
    if (posix_memalign(&p, unit, bytes)) {
        fprintf(stderr, "speed: out of memory (%zu MiB more are needed); try --quick\n",
                bytes >> 20);
        exit(1);
    }
    madvise(p, bytes, MADV_HUGEPAGE);
    memset(p, 0, bytes);
    return p;
}

/* Nearly normal, variance 1: the sum of four 16-bit numbers of one splitmix64 output. */
static void fill_normal(float *x, size_t n, uint64_t seed) {
    size_t i;
    for (i = 0; i < n; i++) {
        uint64_t z = (seed << 40) + (uint64_t)(i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        x[i] = ((float)(z & 0xFFFF) + (float)(z >> 16 & 0xFFFF) + (float)(z >> 32 & 0xFFFF) +
                (float)(z >> 48) - 131070.0f) *
               2.6429e-5f; /* sqrt(3) / 65536 */
    }
}

typedef struct contender {
    char name[40];
    double (*sample)(void *self, size_t repeats); /* ns of that many operations */
    void *self;
    int warm; /* have the data of a sample in the cache again, if it is short */
    size_t repeats;
    double best, spent; /* ns of one operation; of all samples */
    unsigned samples;
} contender;

/* How long a race lasts: rounds of one sample each. A contender whose samples are not short leaves
   early, with no fewer than `fewest`. */
typedef struct race_rules {
    unsigned rounds, fewest;
    double sample_ns, most_ns;
} race_rules;

static void race_sample(contender *c, const race_rules *rules) {
    double ns;
    if (c->warm && c->best < 10.0 * rules->sample_ns) c->sample(c->self, 1);
    ns = c->sample(c->self, c->repeats);
    c->spent += ns;
    ns /= (double)c->repeats;
    if (!c->samples || ns < c->best) c->best = ns;
    c->samples++;
}

static void race(contender *list, size_t n, const race_rules *rules) {
    size_t i;
    unsigned round;
    for (i = 0; i < n; i++) { /* first calls are slow: the second one says how many make a sample */
        contender *c = &list[i];
        double ns;
        ns = c->sample(c->self, 1);
        if (ns < 10.0 * rules->sample_ns) ns = c->sample(c->self, 1);
        c->best = ns;
        c->repeats = ns < rules->sample_ns ? (size_t)(rules->sample_ns / (ns + 1.0)) + 1 : 1;
        c->samples = 0;
        c->spent = 0.0;
    }
    for (round = 0; round < rules->rounds; round++)
        for (i = 0; i < n; i++)
            if (list[i].samples < rules->fewest || list[i].spent < rules->most_ns)
                race_sample(&list[i], rules);
}

#endif
