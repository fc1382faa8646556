/* talk.c - generate and chat. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "program.h"

/* Text that grows. */
typedef struct string {
    char *text;
    size_t size, room;
} string;

static void add_text(string *s, const char *text, size_t size) {
    if (s->size + size + 1 > s->room) {
        s->room = 2 * (s->size + size + 1);
        s->text = (char *)realloc(s->text, s->room);
        if (!s->text) die("out of memory: %zu bytes", s->room);
    }
    memcpy(s->text + s->size, text, size);
    s->size += size;
    s->text[s->size] = 0;
}

/* Bytes of the UTF-8 character at p; 0: none is there. */
static size_t utf8(const unsigned char *p, size_t left) {
    size_t n = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4, i;
    if (p[0] > 0xf4 || n > left) return 0;
    for (i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
        (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    return n;
}

static void print_json_string(const string *s) {
    size_t i, n;
    putchar('"');
    for (i = 0; i < s->size; i += n ? n : 1) {
        const unsigned char *p = (const unsigned char *)s->text + i;
        n = utf8(p, s->size - i);
        if (!n)
            fputs("\\ufffd", stdout);
        else if (*p == '"' || *p == '\\')
            printf("\\%c", *p);
        else if (*p < 32)
            printf("\\u%04x", *p);
        else
            fwrite(p, 1, n, stdout);
    }
    putchar('"');
}

/* The likeliest token, or one drawn at the given temperature. */
static int32_t choose(const program *p, const float *logits, uint32_t position) {
    uint32_t i, n = p->model.n_vocab;
    int32_t best = 0;
    double sum = 0, u;
    for (i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = (int32_t)i;
    if (!(p->opt.temp > 0)) return best;
    for (i = 0; i < n; i++) sum += exp((double)(logits[i] - logits[best]) / p->opt.temp);
    u = (double)(mix(mix(p->opt.seed) + position) >> 11) / 9007199254740992.0 * sum;
    for (i = 0; i < n; i++) {
        u -= exp((double)(logits[i] - logits[best]) / p->opt.temp);
        if (u < 0) return (int32_t)i;
    }
    return best;
}

typedef struct answer {
    string text;
    uint32_t position, n_prompt, n_tokens; /* position: of the next token of the sequence */
    double prompt_seconds, seconds;
    size_t resident_before, resident_after; /* of the process, without and with the new tokens */
    int32_t end; /* the token by which the model ended; -1: a limit did */
} answer;

/* Feeds a prompt and takes what the model says to it: --n tokens at most, up to position n_ctx. */
static answer ask(program *p, const int32_t *prompt, uint32_t n_prompt, uint32_t position,
                  uint32_t n_ctx, int stream) {
    answer a;
    const float *logits;
    char piece[256];
    double start = now();
    memset(&a, 0, sizeof a);
    add_text(&a.text, "", 0);
    feed(p, prompt, n_prompt - 1, position, 0, NULL, NULL);
    a.position = position + n_prompt;
    logits = step(p, prompt[n_prompt - 1], a.position - 1);
    a.n_prompt = n_prompt;
    a.prompt_seconds = now() - start;
    a.resident_before = resident_bytes();
    a.end = -1;
    for (start = now(); a.n_tokens < p->opt.n && a.position < n_ctx && a.end < 0; a.n_tokens++) {
        int32_t token = choose(p, logits, a.position);
        int32_t n = llama_token_to_piece(p->vocab, token, piece, sizeof piece, 0, false);
        if (llama_vocab_is_eog(p->vocab, token))
            a.end = token;
        else if (n > 0) {
            add_text(&a.text, piece, (size_t)n);
            if (stream) fwrite(piece, 1, (size_t)n, stdout);
            if (stream) fflush(stdout);
        }
        /* The last one too, so that a conversation can go on behind it. */
        logits = step(p, token, a.position++);
    }
    a.seconds = now() - start;
    a.resident_after = resident_bytes();
    return a;
}

static void print_speed(const program *p, const answer *a) {
    fprintf(stderr,
            "\n[prompt: %u tokens, %.1f tokens/s; answer: %u tokens, %.1f tokens/s; caches: "
            "%.2f MB, of f16 for all %u tokens: %.2f MB; estimated error of attention: %.4f]\n",
            (unsigned)a->n_prompt, a->n_prompt / a->prompt_seconds, (unsigned)a->n_tokens,
            a->n_tokens / a->seconds, (double)llm_attention_bytes(p->attention) * 1e-6,
            (unsigned)a->position, (double)llm_full_bytes(&p->model.shape, a->position) * 1e-6,
            llm_attention_error(p->attention));
}

void command_generate(program *p) {
    uint32_t n, n_ctx = p->opt.ctx[0];
    size_t size = p->opt.prompt ? strlen(p->opt.prompt) : 0;
    char *text = p->opt.prompt ? NULL : read_text(p->opt.text, &size);
    int32_t *tokens = tokenize(p, text ? text : p->opt.prompt, size, 1, &n);
    answer a;
    free(text);
    if (!n) die("the prompt is empty; give --prompt TEXT, --text FILE or standard input");
    if (n >= p->model.n_trained)
        die("the prompt has %u tokens, but the model was trained on %u: positions beyond them mean "
            "nothing to it; shorten the prompt",
            (unsigned)n, (unsigned)p->model.n_trained);
    if (n >= n_ctx)
        die("the prompt has %u tokens, as many as --ctx %u or more; shorten it or raise --ctx",
            (unsigned)n, (unsigned)n_ctx);
    if (!p->opt.attention.bkv.budget && p->opt.n < n_ctx - n) n_ctx = n + p->opt.n; /* no more */
    open_run(p, n_ctx, p->opt.seed);
    a = ask(p, tokens, n, 0, n_ctx, !p->opt.json);
    if (p->opt.json) {
        print_setting(p, n_ctx);
        printf("\"prompt_tokens\": %u, \"tokens\": %u, \"prompt_tokens_per_s\": %.2f, "
               "\"tokens_per_s\": %.2f, \"estimated_error\": %.5f, \"resident_before\": %zu, "
               "\"resident_after\": %zu, \"text\": ",
               (unsigned)n, (unsigned)a.n_tokens, n / a.prompt_seconds, a.n_tokens / a.seconds,
               llm_attention_error(p->attention), a.resident_before, a.resident_after);
        print_json_string(&a.text);
        puts("}");
    } else {
        print_speed(p, &a);
        if (a.position == p->opt.ctx[0])
            fprintf(stderr, "[stopped at --ctx %u]\n", (unsigned)a.position);
    }
    free(a.text.text);
    free(tokens);
}

/* ---- chat ------------------------------------------------------------------------------------ */

typedef struct chat {
    struct llama_chat_message *messages; /* user, assistant, user .. */
    size_t n;
    size_t fed;        /* bytes of the formatted conversation that the caches have seen */
    uint32_t position; /* tokens that they have seen */
} chat;

/* The conversation in the model's own form. */
static string format(const program *p, const chat *c, int answer_next) {
    string s = {NULL, 0, 0};
    const char *form = llama_model_chat_template(p->vocab_model, NULL);
    int32_t size =
        form ? llama_chat_apply_template(form, c->messages, c->n, answer_next, NULL, 0) : -1;
    if (size < 0) die("%s: has no chat template that llama.cpp knows; use generate", p->opt.model);
    s.text = (char *)allocate((size_t)size + 1);
    s.size = (size_t)size;
    llama_chat_apply_template(form, c->messages, c->n, answer_next, s.text, size + 1);
    return s;
}

static void say(chat *c, const char *role, const char *content) {
    char *copy = (char *)allocate(strlen(content) + 1);
    strcpy(copy, content);
    c->messages =
        (struct llama_chat_message *)realloc(c->messages, (c->n + 1) * sizeof *c->messages);
    if (!c->messages) die("out of memory");
    c->messages[c->n].role = role;
    c->messages[c->n++].content = copy;
}

static void unsay(chat *c, size_t n) {
    while (c->n > n) free((void *)(uintptr_t)c->messages[--c->n].content);
}

/* One turn; 0 if it does not fit any more. */
static int turn(program *p, chat *c, const char *line) {
    uint32_t n, n_ctx = p->opt.ctx[0];
    int32_t *tokens;
    string s;
    answer a;
    char end[256];
    int32_t n_end;
    say(c, "user", line);
    s = format(p, c, 1);
    tokens = tokenize(p, s.text + c->fed, s.size - c->fed, 1, &n);
    if (c->position + n >= n_ctx) {
        unsay(c, c->n - 1);
        free(tokens);
        free(s.text);
        return 0;
    }
    a = ask(p, tokens, n, c->position, n_ctx, 1);
    c->position = a.position;
    /* The next turn starts behind the answer, or behind the token that ended it. */
    c->fed = s.size + a.text.size;
    free(s.text);
    say(c, "assistant", a.text.text);
    s = format(p, c, 0);
    n_end = a.end < 0 ? 0 : llama_token_to_piece(p->vocab, a.end, end, sizeof end, 0, true);
    if (n_end > 0 && c->fed + (size_t)n_end <= s.size &&
        !memcmp(s.text + c->fed, end, (size_t)n_end))
        c->fed += (size_t)n_end;
    if (c->fed > s.size) c->fed = s.size; /* a template that trims */
    free(s.text);
    free(tokens);
    print_speed(p, &a);
    free(a.text.text);
    return 1;
}

/* A file of a chat: this line; the model's bytes, fed, position, n; for each message its bytes and
   itself; the caches. */
static const char magic[] = "bkv-llm chat 1\n";

static int save(const program *p, const chat *c, const char *path, char *err) {
    FILE *f = fopen(path, "wb");
    size_t i;
    int ok;
    if (!f) return llm_fail(err, "%s", strerror(errno));
    fprintf(f, "%s%zu %zu %u %zu\n", magic, p->model.file_bytes, c->fed, (unsigned)c->position,
            c->n);
    for (i = 0; i < c->n; i++)
        fprintf(f, "%zu\n%s\n", strlen(c->messages[i].content), c->messages[i].content);
    ok = llm_attention_write(p->attention, f, err);
    if (fclose(f) && ok) ok = llm_fail(err, "%s", strerror(errno));
    return ok;
}

/* A message of a file that may hold anything; NULL: it is none. */
static char *read_message(FILE *f) {
    size_t size;
    char *text;
    if (fscanf(f, "%zu", &size) != 1 || size > 1 << 24 || fgetc(f) != '\n') return NULL;
    text = (char *)allocate(size + 1);
    text[fread(text, 1, size, f)] = 0;
    if (strlen(text) == size && fgetc(f) == '\n') return text;
    free(text);
    return NULL;
}

/* *c is empty; if this fails its messages mean nothing, the caches are as they were. */
static int load(program *p, chat *c, const char *path, char *err) {
    FILE *f = fopen(path, "rb");
    char start[sizeof magic] = "", *text;
    size_t bytes = 0, n = 0;
    unsigned position = 0;
    string s;
    int ok;
    if (!f) return llm_fail(err, "%s", strerror(errno));
    ok = fread(start, 1, sizeof magic - 1, f) == sizeof magic - 1 && !strcmp(start, magic) &&
         fscanf(f, "%zu %zu %u %zu", &bytes, &c->fed, &position, &n) == 4 && fgetc(f) == '\n';
    if (ok && bytes != p->model.file_bytes) {
        fclose(f);
        return llm_fail(err, "of another model");
    }
    while (ok && c->n < n && (text = read_message(f))) {
        say(c, c->n % 2 ? "assistant" : "user", text);
        free(text);
    }
    c->position = position;
    s = format(p, c, 0);
    if (!ok || c->n != n || c->fed > s.size)
        ok = llm_fail(err, "not a chat of this program, or damaged");
    free(s.text);
    if (ok) ok = llm_attention_read(p->attention, f, err);
    fclose(f);
    return ok;
}

void command_chat(program *p) {
    chat now_ = {NULL, 0, 0, 0}, before = now_;
    string line = {NULL, 0, 0};
    char err[LLM_ERROR];
    void *undo;
    int can_undo = 0, c;
    open_run(p, p->opt.ctx[0], p->opt.seed);
    undo = allocate(llm_attention_bytes(p->attention));
    free(format(p, &now_, 0).text); /* is there a template? */
    fputs("[/undo takes the last turn back, /save FILE and /load FILE keep the chat, /quit ends]\n",
          stderr);
    do {
        fputs("> ", stderr);
        line.size = 0;
        add_text(&line, "", 0);
        while ((c = getchar()) != EOF && c != '\n') {
            char byte = (char)c;
            add_text(&line, &byte, 1);
        }
        if (!strcmp(line.text, "/undo")) {
            if (can_undo) {
                /* The state of the caches is bytes: what was copied can be put back. */
                llm_attention_restore(p->attention, undo);
                unsay(&now_, before.n);
                now_.fed = before.fed;
                now_.position = before.position;
            }
            fputs(can_undo ? "[taken back]\n" : "[nothing to take back]\n", stderr);
            can_undo = 0;
        } else if (!strcmp(line.text, "/save") || !strcmp(line.text, "/load")) {
            fputs("[/save FILE or /load FILE]\n", stderr);
        } else if (!strncmp(line.text, "/save ", 6)) {
            int ok = save(p, &now_, line.text + 6, err);
            fprintf(stderr, "[%s: %s]\n", line.text + 6, ok ? "saved" : err);
        } else if (!strncmp(line.text, "/load ", 6)) {
            chat loaded = {NULL, 0, 0, 0};
            int ok = load(p, &loaded, line.text + 6, err);
            fprintf(stderr, "[%s: %s]\n", line.text + 6, ok ? "loaded" : err);
            unsay(ok ? &now_ : &loaded, 0);
            free(ok ? now_.messages : loaded.messages);
            if (ok) now_ = loaded, can_undo = 0;
        } else if (line.size && strcmp(line.text, "/quit")) {
            int saved = llm_attention_save(p->attention, undo);
            before = now_;
            can_undo = turn(p, &now_, line.text);
            if (!can_undo)
                fprintf(stderr, "[the conversation has reached --ctx %u: start a new one]\n",
                        (unsigned)p->opt.ctx[0]);
            can_undo &= saved;
        }
    } while (c != EOF && strcmp(line.text, "/quit"));
    unsay(&now_, 0);
    free(now_.messages);
    free(line.text);
    free(undo);
}
