/* outside.h - the peers as contenders: those of the shared object, called; those of Python, asked:
   a process of its own answers with its time. None of them is needed to build or run. */
#ifndef BENCH_OUTSIDE_H
#define BENCH_OUTSIDE_H

#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "measure.h"
#include "peers.h"

/* ---- the shared object ---- */
typedef struct called {
    const peer *p;
    void *state;
    size_t copies, at;
} called;

static double sample_called(void *self, size_t repeats) {
    called *c = (called *)self;
    double start = now_ns();
    for (; repeats; repeats--) {
        c->p->run(c->state, c->at);
        c->at = c->at + 1 < c->copies ? c->at + 1 : 0;
    }
    return now_ns() - start;
}

static const peer_list *load_peers(const char *directory) {
    const peer_list *(*get)(void);
    char path[4096];
    void *object, *symbol;
    snprintf(path, sizeof path, "%s/libpeers.so", directory);
    unsetenv("OPENBLAS_CORETYPE"); /* a preset one may be slower than what it would choose */
    object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!object) return NULL;
#define TEXT(x) TEXT_OF(x)
#define TEXT_OF(x) #x
    symbol = dlsym(object, TEXT(PEERS_SYMBOL));
    if (!symbol) return NULL;
    memcpy(&get, &symbol, sizeof get); /* C has no cast from an object to a function */
    return get();
}

/* ---- Python ---- */
static struct {
    pid_t process;
    FILE *to, *from;
    char about[128], file[4096];
} python;

/* Sends a command and gives the answer; NULL if the process is gone. */
static const char *ask(const char *command) {
    static char answer[256];
    fprintf(python.to, "%s\n", command);
    if (fflush(python.to) || !fgets(answer, sizeof answer, python.from)) return NULL;
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
}

/* 1 if there is a Python with torch in the folder of the peers. */
static int start_python(const char *directory, const char *script, const char *reference) {
    char program[4096];
    int to[2], from[2];
    const char *tmp = getenv("TMPDIR");
    snprintf(program, sizeof program, "%s/venv/bin/python", directory);
    if (access(program, X_OK) || access(script, R_OK) || pipe(to) || pipe(from)) return 0;
    signal(SIGPIPE, SIG_IGN);
    python.process = fork();
    if (python.process == 0) {
        dup2(to[0], 0);
        dup2(from[1], 1);
        close(to[1]);
        close(from[0]);
        if (!freopen("/dev/null", "w", stderr)) _exit(127);
        setenv("THP_MEM_ALLOC_ENABLE", "1", 1); /* torch asks for huge pages, as all do here */
        execl(program, program, script, reference, (char *)NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    python.to = fdopen(to[1], "w");
    python.from = fdopen(from[0], "r");
    snprintf(python.file, sizeof python.file, "%s/balancekv-peers-%ld", tmp ? tmp : "/tmp",
             (long)getpid());
    if (!fgets(python.about, sizeof python.about, python.from)) return 0;
    python.about[strcspn(python.about, "\n")] = '\0';
    return 1;
}

static void stop_python(void) {
    if (!python.to) return;
    fclose(python.to);
    fclose(python.from);
    waitpid(python.process, NULL, 0);
}

/* Here `self` is the peer's name. */
static double sample_python(void *self, size_t repeats) {
    char command[128];
    const char *answer;
    snprintf(command, sizeof command, "run %s %zu", (const char *)self, repeats);
    answer = ask(command);
    if (!answer) {
        fprintf(stderr, "speed: the Python peer %s stopped\n", (const char *)self);
        exit(1);
    }
    return strtod(answer, NULL);
}

/* 1 if it is ready. Arrays of a halving are not sent. */
static int open_python(const char *name, const peer_task *t) {
    char command[8192];
    int sent = 1;
    const char *answer;
    if (t->k) {
        size_t kv = t->n * t->n_kv_heads * t->dim, q = t->n_queries * t->n_q_heads * t->dim;
        FILE *f = fopen(python.file, "wb");
        sent = f && fwrite(t->k, sizeof(float), kv, f) == kv &&
               fwrite(t->v, sizeof(float), kv, f) == kv && fwrite(t->q, sizeof(float), q, f) == q;
        if (f && fclose(f)) sent = 0;
    }
    snprintf(command, sizeof command, "open %s %s %zu %zu %zu %zu %zu %zu %s", name, t->work,
             t->n_q_heads, t->n_kv_heads, t->dim, t->n, t->n_queries, t->copies,
             t->k ? python.file : "");
    answer = sent ? ask(command) : NULL;
    if (t->k) unlink(python.file);
    return answer && strcmp(answer, "ok") == 0;
}

/* The last output: n floats, to be freed; NULL if there are not as many. */
static float *result_of_python(const char *name, size_t n) {
    char command[8192];
    float *x = (float *)allocate(n * sizeof *x);
    const char *answer;
    FILE *f;
    size_t got = 0;
    snprintf(command, sizeof command, "result %s %s", name, python.file);
    answer = ask(command);
    f = answer ? fopen(python.file, "rb") : NULL;
    if (f) {
        got = fread(x, sizeof *x, n, f);
        fclose(f);
        unlink(python.file);
    }
    if (got == n) return x;
    free(x);
    return NULL;
}

static void close_python(const char *name) {
    char command[128];
    snprintf(command, sizeof command, "close %s", name);
    ask(command);
}

#endif
