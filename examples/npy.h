/* npy.h - reads recorded traces: q.npy, k.npy and v.npy as np.save() writes them.

   Trusts nothing in a file: every size is checked against the file's own before it is used. All
   functions return 1, or 0 with one line in err[NPY_ERROR] that says what to do. Needs libm. */
#ifndef NPY_H
#define NPY_H

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NPY_ERROR 1024

typedef struct npy_array {
    float *data; /* [shape[0]][shape[1]][shape[2]], of malloc() */
    size_t shape[3];
} npy_array;

typedef struct npy_trace {
    npy_array q, k, v; /* [n][n_q_heads][head_dim], [n][n_kv_heads][head_dim or value_dim] */
    size_t n, n_q_heads, n_kv_heads, head_dim, value_dim;
} npy_trace;

static int npy_fail(char *err, const char *path, const char *format, ...) {
    va_list args;
    int used = snprintf(err, NPY_ERROR, "%s: ", path);
    if (used > 0 && used < NPY_ERROR) {
        va_start(args, format);
        vsnprintf(err + used, NPY_ERROR - (size_t)used, format, args);
        va_end(args);
    }
    return 0;
}

/* The whole file and a closing 0, or NULL. */
static unsigned char *npy_read_file(const char *path, size_t *size, char *err) {
    unsigned char *bytes = NULL;
    long end = -1;
    FILE *f = fopen(path, "rb");
    if (!f) {
        npy_fail(err, path, "%s; a trace folder holds q.npy, k.npy and v.npy", strerror(errno));
        return NULL;
    }
    if (!fseek(f, 0, SEEK_END)) end = ftell(f);
    if (end >= 0 && !fseek(f, 0, SEEK_SET)) bytes = (unsigned char *)malloc((size_t)end + 1);
    if (bytes && fread(bytes, 1, (size_t)end, f) == (size_t)end) {
        bytes[end] = 0;
        *size = (size_t)end;
    } else {
        npy_fail(err, path, "cannot be read into memory; is it a plain file?");
        free(bytes);
        bytes = NULL;
    }
    fclose(f);
    return bytes;
}

/* What stands after 'key': in the header, a Python dict; "" if it is not there. */
static const char *npy_value(const char *header, const char *key) {
    const char *p = strstr(header, key);
    if (!p) return "";
    p += strlen(key);
    p += strspn(p, " ");
    if (*p++ != ':') return "";
    return p + strspn(p, " ");
}

/* "(4096, 3, 64)": returns the number of dimensions, -1 if it is no tuple of sizes. */
static int npy_shape(const char *p, size_t shape[3]) {
    int rank = 0;
    if (*p++ != '(') return -1;
    for (;;) {
        size_t x = 0;
        p += strspn(p, " ,");
        if (*p == ')') return rank;
        if (*p < '0' || *p > '9') return -1;
        for (; *p >= '0' && *p <= '9'; p++) {
            size_t digit = (size_t)(*p - '0');
            x = x > (SIZE_MAX - digit) / 10 ? SIZE_MAX : x * 10 + digit; /* too large anyway */
        }
        if (rank < 3) shape[rank] = x;
        rank++;
    }
}

/* Element i of little-endian f16 or f32. Returns 0 if it is NaN or Inf. */
static int npy_element(const unsigned char *p, size_t elem_bytes, float *x) {
    uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    if (elem_bytes == 4) {
        bits |= (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        memcpy(x, &bits, 4);
        return (bits & 0x7f800000u) != 0x7f800000u;
    } else {
        int exponent = (int)(bits >> 10 & 31);
        float mantissa = (float)((bits & 1023) + (exponent ? 1024u : 0u));
        float size = ldexpf(mantissa, (exponent ? exponent : 1) - 25);
        *x = bits & 0x8000 ? -size : size;
        return exponent != 31;
    }
}

static int npy_parse(npy_array *a, const char *path, unsigned char *file, size_t size, char *err) {
    size_t start, length, elem_bytes, total, payload, i;
    const char *header, *descr, *order;
    int rank;

    if (size < 12 || memcmp(file, "\x93NUMPY", 6))
        return npy_fail(err, path, "is not an .npy file; write it with np.save()");
    if (file[6] < 1 || file[6] > 3)
        return npy_fail(err, path, "is .npy version %d; write version 1, 2 or 3", file[6]);
    start = file[6] == 1 ? 10 : 12;
    length = (size_t)file[8] | (size_t)file[9] << 8;
    if (start == 12) length |= (size_t)file[10] << 16 | (size_t)file[11] << 24;
    if (length > size - start)
        return npy_fail(err, path, "is truncated inside its header; copy it again");
    if (!length || file[start + length - 1] != '\n')
        return npy_fail(err, path, "has a damaged header; write it with np.save()");
    file[start + length - 1] = 0;
    header = (const char *)file + start;

    descr = npy_value(header, "'descr'");
    elem_bytes = !strncmp(descr, "'<f2'", 5) ? 2 : !strncmp(descr, "'<f4'", 5) ? 4 : 0;
    if (!elem_bytes && descr[0] == '\'' && descr[1] == '>')
        return npy_fail(err, path, "is big-endian; save x.astype('<f2') or x.astype('<f4')");
    if (!elem_bytes)
        return npy_fail(err, path, "has dtype %.*s; save it as float16 or float32",
                        (int)strcspn(descr, ","), descr);
    order = npy_value(header, "'fortran_order'");
    if (!strncmp(order, "True", 4))
        return npy_fail(err, path, "is in Fortran order; save np.ascontiguousarray(x)");
    rank = npy_shape(npy_value(header, "'shape'"), a->shape);
    if (rank < 0 || strncmp(order, "False", 5))
        return npy_fail(err, path, "has a damaged header; write it with np.save()");
    if (rank != 3)
        return npy_fail(err, path, "has %d dimensions instead of tokens, heads, elements", rank);

    payload = size - start - length;
    for (total = elem_bytes, i = 0; i < 3; i++) {
        if (!a->shape[i]) return npy_fail(err, path, "is empty; record at least one token");
        if (total > SIZE_MAX / a->shape[i])
            return npy_fail(err, path, "claims more elements than memory can hold");
        total *= a->shape[i];
    }
    if (payload < total)
        return npy_fail(err, path, "is truncated: %zu of %zu bytes of data; copy it again", payload,
                        total);
    if (payload > total)
        return npy_fail(err, path, "has %zu bytes behind its data; write it with np.save()",
                        payload - total);

    a->data = (float *)malloc(total / elem_bytes * sizeof(float));
    if (!a->data) return npy_fail(err, path, "does not fit into memory; record fewer tokens");
    for (i = 0; i < total / elem_bytes; i++)
        if (!npy_element(file + start + length + i * elem_bytes, elem_bytes, &a->data[i]))
            return npy_fail(err, path, "holds NaN or Inf at [%zu, %zu, %zu]; record it again",
                            i / (a->shape[1] * a->shape[2]), i / a->shape[2] % a->shape[1],
                            i % a->shape[2]);
    return 1;
}

static int npy_load(npy_array *a, const char *dir, const char *name, char *err) {
    char path[NPY_ERROR];
    unsigned char *file;
    size_t size;
    int ok;
    /* Half of it, so that path and message fit into err. */
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= NPY_ERROR / 2)
        return npy_fail(err, name, "the folder's path is too long");
    file = npy_read_file(path, &size, err);
    if (!file) return 0;
    ok = npy_parse(a, path, file, size, err);
    free(file);
    return ok;
}

static void npy_free_trace(npy_trace *t) {
    free(t->q.data);
    free(t->k.data);
    free(t->v.data);
    memset(t, 0, sizeof *t);
}

/* On failure nothing needs to be freed. */
static int npy_load_trace(npy_trace *t, const char *dir, char *err) {
    const size_t *q = t->q.shape, *k = t->k.shape, *v = t->v.shape;
    int ok = 1;
    memset(t, 0, sizeof *t);
    if (!npy_load(&t->q, dir, "q.npy", err) || !npy_load(&t->k, dir, "k.npy", err) ||
        !npy_load(&t->v, dir, "v.npy", err))
        ok = 0;
    else if (q[0] != k[0] || q[0] != v[0])
        ok = npy_fail(err, dir, "q, k and v hold %zu, %zu and %zu tokens; they must agree", q[0],
                      k[0], v[0]);
    else if (k[1] != v[1])
        ok = npy_fail(err, dir, "k has %zu heads and v %zu; they must agree", k[1], v[1]);
    else if (q[1] % k[1])
        ok = npy_fail(err, dir, "q has %zu heads; it must be a multiple of the %zu of k", q[1],
                      k[1]);
    else if (q[2] != k[2])
        ok = npy_fail(err, dir, "q has %zu elements a head and k %zu; they must agree", q[2], k[2]);
    if (!ok) {
        npy_free_trace(t);
        return 0;
    }
    t->n = q[0];
    t->n_q_heads = q[1];
    t->n_kv_heads = k[1];
    t->head_dim = k[2];
    t->value_dim = v[2];
    return 1;
}

#endif /* NPY_H */
