/* Conversions of keys, values and queries, through the public functions alone: of a single token
   the softmax is 1, so attend() gives its value back bit for bit, and with a one-hot query the
   largest logit is one element of its key, up to the rounding of a logit. Every pattern of the
   16-bit types and every rounding tie is tried; integers, rows of them, are held against test.h. */
#include "test.h"

enum { LANES = 17, GROUP = 16, VALUE_DIM = 512 }; /* one full vector and a rest; whole rows */

/* Patterns of an input type. */
typedef struct list {
    uint32_t *bits;
    size_t n;
} list;

static int acceptable(uint32_t bits, uint32_t type, uint32_t kv_type) {
    double x = fabs(decode(bits, type));
    return x < (kv_type == BKV_F16 ? 65520.0 : ldexp(1, 55)); /* false for NaN */
}

static void add(list *l, float x) { memcpy(&l->bits[l->n++], &x, 4); }

/* Around the middle of each two neighbours of the type: both sides, the tie, and the neighbour. */
static void add_ties(list *l, uint32_t type, uint32_t end) {
    for (uint32_t b = 0; b + 1 < end; b++) {
        float low = (float)decode(b, type), tie = (float)((low + decode(b + 1, type)) / 2);
        if (decode(b + 1, type) > 65504 && type == BKV_F16) /* the tie would become infinite */
            continue;
        for (int sign = -1; sign <= 1; sign += 2) {
            float s = (float)sign;
            add(l, s * low);
            add(l, s * nextafterf(tie, 0));
            add(l, s * tie);
            add(l, s * nextafterf(tie, INFINITY));
        }
    }
}

/* All that kv_type accepts of 16-bit types; of f32 a sample, and what is hard to round. */
static list inputs(uint32_t type, uint32_t kv_type) {
    list l = {(uint32_t *)checked(malloc(4u * 600000u)), 0};
    if (type != BKV_F32) {
        for (uint32_t b = 0; b < 65536; b++)
            if (acceptable(b, type, kv_type)) l.bits[l.n++] = b;
        return l;
    }
    if (kv_type == BKV_F16) {
        add_ties(&l, BKV_F16, 0x7C00);
        for (int sign = -1; sign <= 1;
             sign += 2) /* the largest numbers that round to a finite one */
            for (float x = 65504; x < 65520; x = nextafterf(x, INFINITY)) add(&l, (float)sign * x);
    } else if (kv_type == BKV_BF16) {
        add_ties(&l, BKV_BF16, (127 + 55) << 7);
    }
    add(&l, nextafterf(0, 1));
    add(&l, -nextafterf(0, 1));
    for (int i = 0; i < 50000; i++) {
        uint32_t bits = random_bits();
        if (acceptable(bits, BKV_F32, kv_type)) l.bits[l.n++] = bits;
    }
    if (kv_type != BKV_F16) {
        add(&l, nextafterf(36028797018963968.0f, 0));
        add(&l, -nextafterf(36028797018963968.0f, 0));
    }
    return l;
}

static list sampled(list l) {
    size_t kept = 0;
    if (!test_quick()) return l;
    for (size_t i = 0; i < l.n; i += 1 + random_below(31)) l.bits[kept++] = l.bits[i];
    l.n = kept;
    return l;
}

/* What a cache should hold of n numbers of a list from `first` on, a key or a value. */
static void expected(double *row, const list *l, size_t first, size_t n, uint32_t type,
                     uint32_t kv_type, int is_value) {
    for (size_t i = 0; i < n; i++) row[i] = decode(l->bits[(first + i) % l->n], type);
    round_row(row, n, kv_type, is_value, 1);
}

static bkv_config config(uint32_t n_kv, uint32_t group, uint32_t head_dim, uint32_t value_dim,
                         uint32_t kv_type, uint32_t backend) {
    bkv_config cfg = bkv_config_default(n_kv * group, n_kv, head_dim, 512);
    cfg.value_dim = value_dim;
    cfg.kv_type = kv_type;
    cfg.backend = backend;
    cfg.sinks = cfg.window = BKV_NONE;
    cfg.scale = 1;
    return cfg;
}

/* Element n of a list, written round and round over a token of a tensor. */
static size_t deal(const tensor *x, const list *l, size_t n) {
    for (size_t h = 0; h < x->n_heads; h++)
        for (size_t i = 0; i < x->dim; i++, n++)
            store_bits(tensor_at(x, 0, h, i), l->bits[n % l->n], x->view.type);
    return n;
}

static void values_of(uint32_t type, uint32_t kv_type, uint32_t backend, const list *l) {
    enum { N_KV = 32 };
    bkv_config cfg = config(N_KV, 1, 1, VALUE_DIM, kv_type, backend);
    bkv_cache c = cache_new(&cfg);
    tensor k = tensor_random(1, N_KV, 1, BKV_F32), q = tensor_random(1, N_KV, 1, BKV_F32);
    tensor v = tensor_new(1, N_KV, VALUE_DIM, type, DENSE, 0);
    float *out = new_floats(N_KV * VALUE_DIM);
    for (size_t first = 0, next; first < l->n; first = next) {
        next = deal(&v, l, first);
        (void)bkv_reset(&c);
        OK(bkv_append(&c, k.view, v.view, 1, 0, 0, 1));
        OK(bkv_attend(&c, q.view, out, 0, 1));
        for (size_t i = 0; i < N_KV * VALUE_DIM; i++) {
            double row[VALUE_DIM];
            if (i % VALUE_DIM == 0) expected(row, l, first + i, VALUE_DIM, type, kv_type, 1);
            float want = (float)row[i % VALUE_DIM] + 0.0f; /* -0 comes out as +0 */
            CHECKF(memcmp(&out[i], &want, 4) == 0, "%s %08x in %s on %s: %.9g, not %.9g",
                   type_name(type), l->bits[(first + i) % l->n], type_name(kv_type),
                   bkv_backend_name(backend), (double)out[i], (double)want);
        }
    }
    free(out);
    tensor_free(&k), tensor_free(&q), tensor_free(&v);
    cache_free(&c);
}

/* A logit is only known to f32 rounding; neighbours of a 16-bit type are much further apart. */
static int same_logit(float got, double want, double largest) {
    double size = fabs(want) + largest;
    return fabs((double)got - want) <= size * ldexp(1, -22) + ldexp(1, -147);
}

/* The query heads of a group are one-hot at neighbouring elements, so that one call reads up to
   GROUP of LANES elements of each key. */
static void keys_of(uint32_t type, uint32_t kv_type, uint32_t backend, const list *l) {
    enum { N_KV = 64 };
    bkv_config cfg = config(N_KV, GROUP, LANES, 1, kv_type, backend);
    bkv_cache c = cache_new(&cfg);
    tensor k = tensor_new(1, N_KV, LANES, type, DENSE, 0), v = tensor_random(1, N_KV, 1, BKV_F32);
    tensor q[2];
    float out[N_KV * GROUP], max[N_KV * GROUP], sum[N_KV * GROUP];
    for (size_t part = 0; part < 2; part++) {
        q[part] = tensor_new(1, N_KV * GROUP, LANES, BKV_F32, DENSE, 0);
        for (size_t h = 0; h < N_KV * GROUP; h++)
            for (size_t i = 0; i < LANES; i++) tensor_set(&q[part], 0, h, i, h % GROUP + part == i);
    }
    for (size_t first = 0, next; first < l->n; first = next) {
        next = deal(&k, l, first);
        (void)bkv_reset(&c);
        OK(bkv_append(&c, k.view, v.view, 1, 0, 0, 1));
        for (size_t part = 0; part < 2; part++) {
            OK(bkv_attend_partial(&c, q[part].view, out, max, sum, 0, 1));
            for (size_t h = 0; h < N_KV * GROUP; h++) {
                size_t n = first + h / GROUP * LANES;
                double row[LANES], want, largest = 0;
                expected(row, l, n, LANES, type, kv_type, 0);
                want = row[h % GROUP + part];
                for (size_t i = 0; i < LANES && kv_type >= BKV_I8; i++) /* a sum over the row */
                    largest = fmax(largest, fabs(row[i]));
                CHECKF(same_logit(max[h], want, largest), "key: %s in %s on %s: %.9g, not %.9g",
                       type_name(type), type_name(kv_type), bkv_backend_name(backend),
                       (double)max[h], want);
                CHECK(sum[h] == 1.0f);
            }
        }
    }
    tensor_free(&k), tensor_free(&v), tensor_free(&q[0]), tensor_free(&q[1]);
    cache_free(&c);
}

static void for_all(void (*run)(uint32_t type, uint32_t kv_type, uint32_t backend, const list *l)) {
    uint32_t backends[8];
    size_t n = test_backends(backends);
    for (size_t t = 0; t < COUNT(test_types); t++) {
        for (size_t s = 0; s < COUNT(storage_types); s++) {
            list l = sampled(inputs(test_types[t], storage_types[s]));
            for (size_t b = 0; b < n; b++) run(test_types[t], storage_types[s], backends[b], &l);
            free(l.bits);
        }
    }
}

static void values(void) { for_all(values_of); }

static void keys(void) { for_all(keys_of); }

/* A query is used as it is: against a key of ones, one element at a time is the logit. */
static void queries(void) {
    enum { N_KV = 512 };
    uint32_t backends[8];
    size_t n = test_backends(backends);
    tensor k = tensor_new(1, N_KV, 1, BKV_F32, DENSE, 0), v = tensor_random(1, N_KV, 1, BKV_F32);
    static float out[N_KV * GROUP], max[N_KV * GROUP], sum[N_KV * GROUP];
    for (size_t h = 0; h < N_KV; h++) tensor_set(&k, 0, h, 0, 1);
    for (size_t t = 0; t < COUNT(test_types); t++) {
        list l = sampled(inputs(test_types[t], BKV_F32));
        for (size_t b = 0; b < n; b++) {
            bkv_config cfg = config(N_KV, GROUP, 1, 1, BKV_F32, backends[b]);
            bkv_cache c = cache_new(&cfg);
            tensor q = tensor_new(1, N_KV * GROUP, 1, test_types[t], DENSE, 0);
            OK(bkv_append(&c, k.view, v.view, 1, 0, 0, 1));
            for (size_t first = 0, next; first < l.n; first = next) {
                next = deal(&q, &l, first);
                OK(bkv_attend_partial(&c, q.view, out, max, sum, 0, 1));
                for (size_t h = 0; h < N_KV * GROUP; h++)
                    CHECK(same_logit(max[h], decode(l.bits[(first + h) % l.n], test_types[t]), 0));
            }
            tensor_free(&q);
            cache_free(&c);
        }
        free(l.bits);
    }
    tensor_free(&k), tensor_free(&v);
}

/* All patterns that a key, a value or a query must not have are refused, each by itself; and the
   accepted ones are not: the two sets meet everywhere. */
static void refusals(void) {
    for (size_t t = 0; t < COUNT(test_types); t++) {
        for (size_t s = 0; s < COUNT(storage_types); s++) {
            uint32_t type = test_types[t], kv_type = storage_types[s];
            bkv_config cfg = config(1, 1, 1, 1, kv_type, BKV_BACKEND_AUTO);
            bkv_cache c = cache_new(&cfg);
            tensor one = tensor_random(1, 1, 1, type);
            tensor x = tensor_new(1, 1, 1, type, DENSE, 0);
            uint32_t step = type != BKV_F32 ? 1 : test_quick() ? 1048573 : 65521, bits = 0;
            float out;
            do {
                int good = acceptable(bits, type, kv_type);
                store_bits(tensor_at(&x, 0, 0, 0), bits, type);
                if (!good || bits % 64 == 0) {
                    bkv_result want = good ? BKV_OK : BKV_E_VALUE;
                    RESULT(bkv_append(&c, x.view, one.view, 1, 0, 0, 1), want);
                    RESULT(bkv_append(&c, one.view, x.view, 1, 0, 0, 1), want);
                    OK(bkv_append(&c, one.view, one.view, 1, 0, 0, 1));
                    RESULT(bkv_attend(&c, x.view, &out, 0, 1),
                           acceptable(bits, type, BKV_F32) ? BKV_OK : BKV_E_VALUE);
                }
                bits += step;
            } while (type == BKV_F32 ? bits >= step : bits < 65536);
            tensor_free(&one), tensor_free(&x);
            cache_free(&c);
        }
    }
}

int main(int argc, char **argv) { TEST_MAIN(T(values), T(keys), T(queries), T(refusals)); }
