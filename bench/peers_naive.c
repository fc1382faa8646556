/* peers_naive.c - the same work as a plain user writes it; bench/peers.sh compiles it with -Ofast
   and -march=native, so that the compiler may vectorise, reorder and call its vector library. */
#include "peers_naive.h"

#include <math.h>

/* One query over one head; k, v [n][d]; s [n] is scratch. */
void naive_attend(const float *k, const float *v, const float *q, float *out, float *s, size_t n,
                  size_t d) {
    size_t i, j;
    for (i = 0; i < n; i++) {
        float dot = 0.0f;
        for (j = 0; j < d; j++) dot += q[j] * k[i * d + j];
        s[i] = dot;
    }
    naive_softmax(s, n, d);
    naive_values(v, s, out, n, d);
}

void naive_softmax(float *s, size_t n, size_t d) {
    float most = -1e30f, sum = 0.0f, scale = 1.0f / sqrtf((float)d);
    size_t i;
    for (i = 0; i < n; i++) most = s[i] > most ? s[i] : most;
    for (i = 0; i < n; i++) {
        s[i] = expf((s[i] - most) * scale);
        sum += s[i];
    }
    for (i = 0; i < n; i++) s[i] /= sum;
}

void naive_values(const float *v, const float *s, float *out, size_t n, size_t d) {
    size_t i, j;
    for (j = 0; j < d; j++) out[j] = 0.0f;
    for (i = 0; i < n; i++)
        for (j = 0; j < d; j++) out[j] += s[i] * v[i * d + j];
}

/* The kernel of the walk below its diagonal. */
void naive_kernel(const float *k, const float *v, float *w, size_t d) {
    float scale = 1.0f / sqrtf((float)d);
    size_t i, j, x;
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j < i; j++) {
            float kk = 0.0f, vv = 0.0f;
            for (x = 0; x < d; x++) {
                kk += k[i * d + x] * k[j * d + x];
                vv += v[i * d + x] * v[j * d + x];
            }
            w[i * BLOCK + j] = expf(kk * scale) * (vv + CONSTANT);
        }
}

/* The same from two Gram matrices that someone else computed. */
void naive_kernel_of(const float *kk, const float *vv, float *w, size_t d) {
    float scale = 1.0f / sqrtf((float)d);
    size_t i, j;
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j < i; j++)
            w[i * BLOCK + j] = expf(kk[i * BLOCK + j] * scale) * (vv[i * BLOCK + j] + CONSTANT);
}
void naive_kernel_of_double(const double *kk, const double *vv, float *w, size_t d) {
    float scale = 1.0f / sqrtf((float)d);
    size_t i, j;
    for (j = 0; j < BLOCK; j++) /* from above the diagonal */
        for (i = j + 1; i < BLOCK; i++)
            w[i * BLOCK + j] =
                expf((float)kk[j * BLOCK + i] * scale) * ((float)vv[j * BLOCK + i] + CONSTANT);
}

void naive_centre(const float *k, float *centred, size_t d) {
    size_t i, x;
    float mean[MAX_DIM] = {0};
    for (i = 0; i < BLOCK; i++)
        for (x = 0; x < d; x++) mean[x] += k[i * d + x];
    for (x = 0; x < d; x++) mean[x] /= BLOCK;
    for (i = 0; i < BLOCK; i++)
        for (x = 0; x < d; x++) centred[i * d + x] = k[i * d + x] - mean[x];
}

void naive_walk(const float *w, const float *bound, float *sign) {
    size_t i, j;
    for (i = 0; i < BLOCK; i++) {
        float sum = 0.0f;
        for (j = 0; j < i; j++) sum += w[i * BLOCK + j] * sign[j];
        sign[i] = sum < bound[i] ? 1.0f : -1.0f;
    }
}

void naive_exp(const float *x, float *y, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) y[i] = expf(x[i]);
}
