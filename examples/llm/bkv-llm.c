/* bkv-llm.c - a language model whose attention is kept by balancekv.h. */
#include <string.h>

#include "program.h"

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(program *);
    } commands[] = {{"generate", command_generate}, {"chat", command_chat},
                    {"ppl", command_ppl},           {"passkey", command_passkey},
                    {"speed", command_speed},       {"check", command_check},
                    {"dump", command_dump}};
    size_t i, n = sizeof commands / sizeof *commands;
    program p;
    memset(&p, 0, sizeof p);
    parse_options(&p.opt, argc, argv);
    for (i = 0; i < n && strcmp(p.opt.command, commands[i].name); i++) continue;
    if (i == n)
        die("unknown command '%s'; take generate, chat, ppl, passkey, speed, check or dump",
            p.opt.command);
    open_model(&p);
    commands[i].run(&p);
    close_run(&p);
    llama_model_free(p.vocab_model);
    llm_model_free(&p.model);
    return 0;
}
