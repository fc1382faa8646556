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

/* ---- a halving, by the rules of tests/golden/README.md and in their words ---- */
void naive_centre(const float *x, float *mean, float *centred, size_t d) {
    size_t i, j;
    for (j = 0; j < d; j++) mean[j] = 0.0f;
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j < d; j++) mean[j] += x[i * d + j];
    for (j = 0; j < d; j++) mean[j] /= BLOCK;
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j < d; j++) centred[i * d + j] = x[i * d + j] - mean[j];
}

void naive_gram(const float *x, float *gram, size_t d) {
    size_t i, j, a;
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j <= i; j++) {
            float dot = 0.0f;
            for (a = 0; a < d; a++) dot += x[i * d + a] * x[j * d + a];
            gram[i * BLOCK + j] = dot;
        }
}

static void add_share(float *score, const float *x) {
    float sum = 0.0f;
    size_t i;
    for (i = 0; i < BLOCK; i++) sum += x[i];
    for (i = 0; i < BLOCK; i++) score[i] += x[i] / sum;
}

/* f_i, and importance: chances are in proportion to it. */
static void weigh(naive_block *b, float *score) {
    float unlike[BLOCK], mean = 0.0f;
    size_t i, j;
    for (i = 0; i < BLOCK; i++) score[i] = 0.1f / BLOCK;
    if (!b->moves) return;
    for (j = 0; j < b->d; j++) mean += b->mean[j] * b->mean[j];
    for (i = 0; i < BLOCK; i++) {
        float dot = mean, norm = 0.0f;
        for (j = 0; j < b->d; j++) {
            dot += b->k_centred[i * b->d + j] * b->mean[j];
            norm += b->k[i * b->d + j] * b->k[i * b->d + j];
        }
        unlike[i] = expf(-10.0f * dot / sqrtf(norm * mean)) * b->norm[i];
    }
    add_share(score, b->norm);
    add_share(score, unlike);
}

/* In proportion to the scores, 64 in all, those above 1 become 1. */
static void to_chances(const float *score, float *chance) {
    size_t i, certain = 0, before;
    for (i = 0; i < BLOCK; i++) chance[i] = 0.0f;
    do {
        double sum = 0.0; /* in float the chances of equal scores would not add up to 1 */
        before = certain;
        for (i = 0; i < BLOCK; i++) sum += chance[i] < 1.0f ? (double)score[i] : 0.0;
        for (i = 0; i < BLOCK; i++)
            if (chance[i] < 1.0f) {
                chance[i] = fminf((float)((double)score[i] * (double)(PAGE - before) / sum), 1.0f);
                certain += chance[i] >= 1.0f;
            }
    } while (certain > before);
}

/* Pivotal sampling. */
static void draw(const float *chance, const float *u, unsigned char *keep) {
    size_t i, held = 0, kept = 0;
    float a = 0.0f; /* chance of the token held; 0: none is */
    for (i = 0; i < BLOCK; i++) {
        float p = chance[i];
        keep[i] = p >= 1.0f;
        if (keep[i]) continue;
        if (a <= 0.0f) {
            held = i, a = p;
        } else if (a + p < 1.0f) {
            if (*u++ * (a + p) >= a) held = i;
            a += p;
        } else {
            size_t stays = *u++ * (2.0f - a - p) < 1.0f - p ? held : i;
            keep[stays] = 1;
            held = stays == i ? held : i;
            a += p - 1.0f;
        }
    }
    for (i = 0; i < BLOCK; i++) kept += keep[i];
    if (a > 0.0f && kept < PAGE) keep[held] = 1;
}

/* One round of exchanges; K is symmetric. */
static void exchange(naive_block *b) {
    const float *k = b->vv, *up = b->inverse;
    float f[BLOCK], own[BLOCK], fall[BLOCK], *y = b->lack;
    size_t i, j;
    for (i = 0; i < BLOCK; i++) {
        f[i] = 0.0f;
        for (j = 0; j < BLOCK; j++) f[i] += k[i * BLOCK + j] * y[j];
        own[i] = b->keep[i] ? 1e30f : up[i] * up[i] * k[i * (BLOCK + 1)]; /* who may come */
    }
    for (i = 0; i < BLOCK; i++) {
        const float *row = k + i * BLOCK, *other;
        const float alone = up[i] * up[i] * row[i], at_first = 2.0f * up[i] * f[i] + alone;
        float least = 0.0f;
        if (!b->keep[i] || b->chance[i] >= 1.0f) continue;
        for (j = 0; j < BLOCK; j++)
            fall[j] = at_first + own[j] - 2.0f * up[j] * (f[j] + up[i] * row[j]);
        for (j = 0; j < BLOCK; j++) least = fall[j] < least ? fall[j] : least;
        if (least >= 0.0f) continue;
        for (j = 0; fall[j] > least;) j++;
        other = k + j * BLOCK;
        b->keep[i] = 0, b->keep[j] = 1;
        y[i] = 1.0f, y[j] = 1.0f - up[j];
        own[i] = alone, own[j] = 1e30f;
        for (size_t a = 0; a < BLOCK; a++) f[a] += up[i] * row[a] - up[j] * other[a];
    }
}

/* The lower triangle, turned, becomes the upper one, in squares that stay in the cache. */
static void mirror(float *x) {
    size_t i, j, a, c;
    for (i = 0; i < BLOCK; i += 16)
        for (j = 0; j <= i; j += 16)
            for (a = i; a < i + 16; a++)
                for (c = j; c < j + 16 && c < a; c++) x[c * BLOCK + a] = x[a * BLOCK + c];
}

/* From the Gram matrices, of which the lower triangles count, to those who stay. */
void naive_choose(naive_block *b) {
    const float scale = 0.1f / sqrtf((float)b->d);
    float score[BLOCK], most = 0.0f, constant = 0.0f;
    size_t i, j;
    for (i = 0; i < BLOCK; i++) {
        most = fmaxf(most, b->kk[i * (BLOCK + 1)] * scale);
        constant += b->vv[i * (BLOCK + 1)] / (BLOCK * 32);
        b->norm[i] = sqrtf(b->vv[i * (BLOCK + 1)]);
        b->factor[i] = b->moves ? sqrtf(1.0f / BLOCK) : 1.0f;
    }
    for (i = 0; i < BLOCK; i++)
        for (j = 0; j <= i; j++) {
            float e = expf(b->kk[i * BLOCK + j] * scale - most);
            b->kk[i * BLOCK + j] = e;
            b->vv[i * BLOCK + j] =
                e * (b->vv[i * BLOCK + j] + constant) * b->factor[i] * b->factor[j];
        }
    mirror(b->vv);
    if (b->moves) mirror(b->kk);
    weigh(b, score);
    to_chances(score, b->chance);
    draw(b->chance, b->u, b->keep);
    for (i = 0; i < BLOCK; i++) {
        b->inverse[i] = 1.0f / b->chance[i];
        b->lack[i] = b->keep[i] ? 1.0f - b->inverse[i] : 1.0f;
    }
    exchange(b);
}

/* The values that move, and what of all values each takes: H_ij (y_j - r_i). */
void naive_coefficients(naive_block *b) {
    size_t i, j, n = 0;
    for (i = 0; i < BLOCK; i++)
        if (b->keep[i] && b->chance[i] < 1.0f) b->moving[n++] = (unsigned char)i;
    b->n = n;
    for (n = 0; n < b->n; n++) {
        const float *e = b->kk + (i = b->moving[n]) * BLOCK;
        float h[BLOCK], own = e[i] + 1e-6f, sum = 2e-30f, missing = 0.0f;
        for (j = 0; j < BLOCK; j++) {
            float x = e[j] / own;
            h[j] = x * x * x * b->factor[j] / (b->factor[i] + 1e-12f);
            sum += h[j];
            missing += h[j] * b->lack[j];
        }
        for (j = 0; j < BLOCK; j++) b->c[n * BLOCK + j] = h[j] * (b->lack[j] - missing / sum);
        for (j = 0; j < n; j++) b->among[n * PAGE + j] = 0.5f * h[b->moving[j]];
    }
}

/* d_i without what tokens before contribute. */
void naive_product(naive_block *b) {
    size_t i, j, a;
    for (i = 0; i < b->n; i++) {
        float *to = b->step + i * b->d;
        for (a = 0; a < b->d; a++) to[a] = 0.0f;
        for (j = 0; j < BLOCK; j++)
            for (a = 0; a < b->d; a++)
                to[a] -= 0.5f * b->c[i * BLOCK + j] * b->v_centred[j * b->d + a];
    }
}

void naive_solve(naive_block *b) {
    size_t i, j, a;
    for (i = 0; i < b->n; i++)
        for (j = 0; j < i; j++)
            for (a = 0; a < b->d; a++)
                b->step[i * b->d + a] -= b->among[i * PAGE + j] * b->step[j * b->d + a];
}

void naive_keep(naive_block *b) {
    size_t i, j, n = 0, moved = 0;
    for (i = 0; i < BLOCK; i++) {
        int moves;
        if (!b->keep[i]) continue;
        moves = b->moves && b->chance[i] < 1.0f;
        for (j = 0; j < b->d; j++) {
            b->kept_k[n * b->d + j] = b->k[i * b->d + j];
            b->kept_v[n * b->d + j] =
                b->v[i * b->d + j] - (moves ? b->chance[i] * b->step[moved * b->d + j] : 0.0f);
        }
        moved += (size_t)moves;
        b->weight[n++] = b->inverse[i];
    }
}

void naive_exp(const float *x, float *y, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) y[i] = expf(x[i]);
}
