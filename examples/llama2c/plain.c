/* plain.c - a decode loop as in llama2.c, with a cache that holds every token: what
   balancekv.diff then changes. Reads llama2.c's checkpoints (version 0), decodes greedily from
   token 1, prints position, token and logit of every step, then the bytes of the cache.
   Build and run: cc -std=c99 -O2 -I. examples/llama2c/plain.c -o plain -lm && ./plain MODEL STEPS
   The changed one: patch -o bounded.c examples/llama2c/plain.c examples/llama2c/balancekv.diff */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct model {
    uint32_t dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len; /* the file begins so */
    uint32_t head_dim, kv_dim;
    const float *embedding, *norm_att, *wq, *wk, *wv, *wo, *norm_ffn, *w1, *w2, *w3, *norm_out;
    const float *classifier;
    float *x, *y, *q, *k, *v, *out, *gate, *up, *logits; /* of the present token */
    float *k_cache, *v_cache; /* [n_layers][seq_len][kv_dim] */
    float *scores;            /* [seq_len] */
    size_t cache_bytes;
} model;

static void fail(const char *text) {
    fprintf(stderr, "llama2c: %s\n", text);
    exit(1);
}

static void *get(size_t bytes) {
    void *p = calloc(bytes, 1);
    if (!p) fail("no memory");
    return p;
}

static float *floats(uint32_t n) {
    return (float *)get(n * sizeof(float));
}

/* ---- the model ------------------------------------------------------------------------------- */
static const float *take(const float **next, const float *end, uint64_t n) {
    const float *p = *next;
    if (n > (size_t)(end - p)) fail("the file is too short for its model");
    *next += n;
    return p;
}

static void load(model *m, const char *path) {
    FILE *f = fopen(path, "rb");
    long bytes;
    if (!f || fseek(f, 0, SEEK_END) || (bytes = ftell(f)) < 28 || fseek(f, 0, SEEK_SET))
        fail("the model cannot be read");
    if (fread(m, 4, 7, f) != 7) fail("the model cannot be read");
    int shared = m->vocab < 1u << 31; /* a negative number: with a classifier of its own */
    if (!shared) m->vocab = 0u - m->vocab;
    for (int i = 0; i < 7; i++)
        if ((&m->dim)[i] < 1 || (&m->dim)[i] > 1 << 20) fail("this is no model of llama2.c");
    if (m->dim % m->n_heads || m->n_heads % m->n_kv_heads || m->dim / m->n_heads % 2)
        fail("this is no model of llama2.c");
    uint64_t d = m->dim, L = m->n_layers;
    m->head_dim = m->dim / m->n_heads;
    m->kv_dim = m->head_dim * m->n_kv_heads;

    size_t n = (size_t)(bytes - 28) / 4;
    float *weights = (float *)get(n * 4 + 4);
    if (fread(weights, 4, n, f) != n) fail("the model cannot be read");
    fclose(f);
    const float *p = weights, *end = weights + n;
    m->embedding = take(&p, end, (uint64_t)m->vocab * d);
    m->norm_att = take(&p, end, L * d);
    m->wq = take(&p, end, L * d * d);
    m->wk = take(&p, end, L * d * m->kv_dim);
    m->wv = take(&p, end, L * d * m->kv_dim);
    m->wo = take(&p, end, L * d * d);
    m->norm_ffn = take(&p, end, L * d);
    m->w1 = take(&p, end, L * d * m->hidden);
    m->w2 = take(&p, end, L * d * m->hidden);
    m->w3 = take(&p, end, L * d * m->hidden);
    m->norm_out = take(&p, end, d);
    take(&p, end, (uint64_t)m->seq_len * m->head_dim); /* tables of RoPE, computed here instead */
    m->classifier = shared ? m->embedding : take(&p, end, (uint64_t)m->vocab * d);

    m->x = floats(m->dim), m->y = floats(m->dim), m->q = floats(m->dim), m->out = floats(m->dim);
    m->k = floats(m->kv_dim), m->v = floats(m->kv_dim);
    m->gate = floats(m->hidden), m->up = floats(m->hidden), m->logits = floats(m->vocab);
}

static void normalize(float *y, const float *x, const float *weight, uint32_t n) {
    float sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += x[i] * x[i];
    sum = 1.0f / sqrtf(sum / (float)n + 1e-5f);
    for (uint32_t i = 0; i < n; i++) y[i] = weight[i] * (sum * x[i]);
}

/* y[rows] = w[rows][n] x[n] */
static void multiply(float *y, const float *w, const float *x, uint32_t rows,
                     uint32_t n) {
    for (uint32_t r = 0; r < rows; r++, w += n) {
        float sum = 0;
        for (uint32_t i = 0; i < n; i++) sum += w[i] * x[i];
        y[r] = sum;
    }
}

static void rotate(float *x, uint32_t n, uint32_t head_dim, uint32_t position) {
    for (uint32_t i = 0; i < n; i += 2) {
        float angle = (float)position * powf(10000.0f, -(float)(i % head_dim) / (float)head_dim);
        float c = cosf(angle), s = sinf(angle), a = x[i], b = x[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

/* ---- the cache ------------------------------------------------------------------------------- */
static void make_cache(model *m) {
    size_t bytes = (size_t)m->n_layers * m->seq_len * m->kv_dim * sizeof(float);
    m->k_cache = (float *)get(bytes);
    m->v_cache = (float *)get(bytes);
    m->scores = floats(m->seq_len);
    m->cache_bytes = 2 * bytes;
}

/* The token's k and v go into the cache; out: the attention of its q over all tokens so far. */
static void attend(model *m, uint32_t layer, uint32_t position) {
    if (position >= m->seq_len) fail("the cache is full");
    float *keys = m->k_cache + (size_t)layer * m->seq_len * m->kv_dim;
    float *values = m->v_cache + (size_t)layer * m->seq_len * m->kv_dim;
    memcpy(keys + (size_t)position * m->kv_dim, m->k, m->kv_dim * sizeof(float));
    memcpy(values + (size_t)position * m->kv_dim, m->v, m->kv_dim * sizeof(float));
    for (uint32_t h = 0; h < m->n_heads; h++) {
        uint32_t kv = h / (m->n_heads / m->n_kv_heads) * m->head_dim;
        float *q = m->q + h * m->head_dim, *out = m->out + h * m->head_dim, max = -HUGE_VALF;
        float sum = 0;
        for (uint32_t t = 0; t <= position; t++) {
            multiply(&m->scores[t], keys + (size_t)t * m->kv_dim + kv, q, 1, m->head_dim);
            m->scores[t] /= sqrtf((float)m->head_dim);
            if (m->scores[t] > max) max = m->scores[t];
        }
        memset(out, 0, m->head_dim * sizeof(float));
        for (uint32_t t = 0; t <= position; t++) {
            float p = expf(m->scores[t] - max), *v = values + (size_t)t * m->kv_dim + kv;
            sum += p;
            for (uint32_t i = 0; i < m->head_dim; i++) out[i] += p * v[i];
        }
        for (uint32_t i = 0; i < m->head_dim; i++) out[i] /= sum;
    }
}

/* ---- decoding -------------------------------------------------------------------------------- */
static void forward(model *m, uint32_t token, uint32_t position) {
    uint32_t d = m->dim, kv = m->kv_dim, h = m->hidden;
    memcpy(m->x, m->embedding + (size_t)token * d, d * sizeof(float));
    for (uint32_t l = 0; l < m->n_layers; l++) {
        normalize(m->y, m->x, m->norm_att + l * d, d);
        multiply(m->q, m->wq + (size_t)l * d * d, m->y, d, d);
        multiply(m->k, m->wk + (size_t)l * d * kv, m->y, kv, d);
        multiply(m->v, m->wv + (size_t)l * d * kv, m->y, kv, d);
        rotate(m->q, d, m->head_dim, position);
        rotate(m->k, kv, m->head_dim, position);
        attend(m, l, position);
        multiply(m->y, m->wo + (size_t)l * d * d, m->out, d, d);
        for (uint32_t i = 0; i < d; i++) m->x[i] += m->y[i];

        normalize(m->y, m->x, m->norm_ffn + l * d, d);
        multiply(m->gate, m->w1 + (size_t)l * d * h, m->y, h, d);
        multiply(m->up, m->w3 + (size_t)l * d * h, m->y, h, d);
        for (uint32_t i = 0; i < h; i++) m->gate[i] *= m->up[i] / (1.0f + expf(-m->gate[i]));
        multiply(m->y, m->w2 + (size_t)l * d * h, m->gate, d, h);
        for (uint32_t i = 0; i < d; i++) m->x[i] += m->y[i];
    }
    normalize(m->x, m->x, m->norm_out, d);
    multiply(m->logits, m->classifier, m->x, m->vocab, d);
}

int main(int argc, char **argv) {
    static model m;
    if (argc != 3) fail("usage: llama2c MODEL STEPS");
    load(&m, argv[1]);
    make_cache(&m);
    uint32_t token = 1, steps = (uint32_t)atoi(argv[2]);
    for (uint32_t position = 0; position < steps; position++) {
        forward(&m, token, position);
        for (uint32_t t = token = 0; t < m.vocab; t++)
            if (m.logits[t] > m.logits[token]) token = t;
        printf("%u %u %.6f\n", position, token, (double)m.logits[token]);
    }
    printf("cache: %zu bytes\n", m.cache_bytes);
    return 0;
}
