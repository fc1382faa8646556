#!/bin/sh
# The tables of examples/llm/README.md:  sh examples/llm/measure.sh TEXT..
# Perplexity of the texts (the longer ones are cut to WINDOWS windows) and pass keys hidden in them,
# for every method and share of the bytes of a full f16 cache. Prints tables in Markdown; every run
# adds a line to LOG, and what stands there is not run again. Hours for everything on one core.
# Environment: METHODS, SHARES, CTX, WINDOWS, DEPTHS, SEEDS, WHAT ("ppl passkey"), LOG, THREADS, and
# BKV_LLM, the folder that setup.sh has made.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
program=$root/build/examples/llm/bkv-llm
model=${BKV_LLM:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-llm}/SmolLM2-135M-Instruct.Q4_1.gguf
methods=${METHODS:-balancekv walk uniform window} shares=${SHARES:-0.5 0.25 0.125}
ctx=${CTX:-4096 8192} windows=${WINDOWS:-1} depths=${DEPTHS:-10} seeds=${SEEDS:-3}
what=${WHAT:-ppl passkey} log=${LOG:-$root/build/llm-measure.jsonl} threads=${THREADS:-1}

[ $# -gt 0 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
for file in "$program" "$model" "$@"; do
    [ -f "$file" ] || { echo "measure.sh: no $file; run examples/llm/setup.sh" >&2; exit 2; }
done
touch "$log"

once() { # command, text, method, share, further options
    run="$*"
    ! grep -Fq "\"run\": \"$run\"," "$log" || return 0
    command=$1 text=$2 method=$3 share=$4
    shift 4
    [ "$method" = full ] || set -- --share "$share" "$@"
    # Unpacked, as ggml has no fast product of many tokens with weights of this file's type.
    "$program" "$command" --model "$model" --unpack bf16 --threads "$threads" --text "$text" \
        --method "$method" --json "$@" >"$log.new"
    sed "s|^{|{\"run\": \"$run\", \"text\": \"$text\", \"share\": $share, |" "$log.new" >>"$log"
    rm "$log.new"
    echo "done: $run" >&2
}

for n in $ctx; do
    for text; do
        for share in 1 $shares; do
            for method in full $methods; do
                [ "$share" = 1 ] && [ "$method" != full ] && continue
                [ "$share" != 1 ] && [ "$method" = full ] && continue
                case " $what " in *' ppl '*)
                    for seed in $(seq "$seeds"); do
                        [ "$method" = full ] && [ "$seed" != 1 ] && continue
                        once ppl "$text" "$method" "$share" --ctx "$n" --windows "$windows" \
                            --seed "$seed"
                    done ;;
                esac
                case " $what " in *' passkey '*)
                    once passkey "$text" "$method" "$share" --ctx "$n" --depths "$depths" \
                        --seeds "$seeds" --each ;;
                esac
            done
        done
    done
done

python3 - "$log" "$shares" "$ctx" "$methods" <<'PYTHON'
import json
import math
import sys

log, shares, ctx, methods = sys.argv[1], *(x.split() for x in sys.argv[2:])
runs = [json.loads(line) for line in open(log, encoding="utf-8")]


def mean(values):
    return sum(values) / len(values) if values else math.nan


def pick(command, method, share, n):
    return [r for r in runs if (r["command"], r["method"], r["share"], r["ctx"]) ==
            (command, method, float(share), int(n))]


def row(cells):
    print("| " + " | ".join(cells) + " |")


def ppl(method, share, n):
    """Mean over the texts of ln(ppl / full), as a percentage of perplexity."""
    full = {r["text"]: r["nll"] for r in pick("ppl", "full", 1, n)}
    rise = [r["nll"] - full[r["text"]] for r in pick("ppl", method, share, n) if r["text"] in full]
    return "%+.1f %%" % (100 * math.expm1(mean(rise))) if rise else ""


def passkey(method, share, n):
    """Keys found, of those that full attention finds; nats per digit of all."""
    def cases(*which):
        return {(r["text"], r["key"], r["depth"]): r for r in pick("passkey", *which)
                if "found" in r and "depth" in r}
    full = {k for k, r in cases("full", 1, n).items() if r["found"]}
    mine = cases(method, share, n)
    of = [r["found"] for k, r in mine.items() if k in full]
    return "%.0f %% (%.2f)" % (100 * mean(of), mean([r["nll_per_digit"] for r in mine.values()])) \
        if of else ""


for name, cell, command in (("perplexity above full attention", ppl, "ppl"),
                            ("pass keys found (nats per digit)", passkey, "passkey")):
    if not any(r["command"] == command for r in runs):
        continue
    print("\n" + name + ", by tokens and share of the bytes\n")
    row(["method"] + ["%s, %s" % (n, s) for n in ctx for s in shares])
    row(["---"] + ["---:"] * (len(ctx) * len(shares)))
    for method in methods:
        row([method] + [cell(method, s, n) for n in ctx for s in shares])
    for n in ctx:
        full = pick(command, "full", 1, n)
        if command == "ppl" and full:
            print("\nfull attention, %s tokens: perplexity %s" %
                  (n, ", ".join("%.3f" % r["ppl"] for r in full)))
        if command == "passkey":
            single = [r for r in full if "depth" in r]
            print("\nfull attention, %s tokens: %d of %d keys found, %.3f nats per digit" %
                  (n, sum(r["found"] for r in single), len(single),
                   mean([r["nll_per_digit"] for r in single])))
PYTHON
