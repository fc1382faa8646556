#!/bin/sh
# The tables of examples/llm/README.md:  sh examples/llm/measure.sh TEXT..
# Perplexity of the texts (WINDOWS windows of each) and pass keys hidden in them, for every method
# and share of the bytes of a full f16 cache. All methods store TYPE, but those with a type of their
# own behind an @: METHODS="balancekv balancekv@i4". A TEXT `filler` stands for the filler of
# bkv-llm passkey. Every run adds its lines to LOG, and what stands there is not run again: it may be
# stopped at any time; several may share a LOG. When the header's results change, begin another one.
# Prints tables in Markdown of all that LOG has; WHAT= only prints. Hours for everything on one core.
# Environment: METHODS, SHARES, CTX, TYPE, WINDOWS, DEPTHS, SEEDS, WHAT ("ppl passkey"), LOG,
# THREADS, and BKV_LLM, the folder that setup.sh has made.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
program=$root/build/examples/llm/bkv-llm
model=${BKV_LLM:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-llm}/SmolLM2-135M-Instruct.Q4_1.gguf
methods=${METHODS:-balancekv window uniform keydiff walk} shares=${SHARES:-1/2 1/4 1/8}
ctx=${CTX:-4096 8192} windows=${WINDOWS:-1} depths=${DEPTHS:-10} seeds=${SEEDS:-3}
type=${TYPE:-i8} what=${WHAT-ppl passkey} threads=${THREADS:-1}
log=${LOG:-$root/build/llm-measure.jsonl}

[ $# -gt 0 ] || { sed -n '2,9s/^# //p' "$0"; exit 2; }
fail() {
    echo "measure.sh: $*" >&2
    exit 2
}
for text; do
    [ "$text" = filler ] || [ -f "$text" ] || [ -z "$what" ] ||
        fail "no $text; examples/llm/texts.sh makes those of README.md"
done
for file in "$program" "$model"; do
    [ -f "$file" ] || [ -z "$what" ] || fail "no $file; run examples/llm/setup.sh"
done
touch "$log"

once() { # command, tokens, text, method, share, seed, further options
    name=$(basename "$3" .txt | tr " " _)
    command=$1 tokens=$2 text=$3 method=${4%@*} share=$5 seed=$6 stored=$type
    run="$1 $2 $name $method $5 $6 $windows $depths"
    case $4 in *@*) stored=${4##*@} ;; esac
    shift 6
    if [ "$method" = full ]; then stored=f16; else set -- --share "$share" "$@"; fi
    run="$run $stored"
    ! grep -Fq "\"run\": \"$run\"," "$log" || return 0
    [ "$text" = filler ] || set -- --text "$text" "$@"
    # Keys of full attention are looked for by caches that keep everything: no other answers, sooner.
    [ "$command $method" != 'passkey full' ] || method=balancekv
    # Unpacked, as ggml has no fast product of many tokens with weights of this file's type.
    "$program" "$command" --model "$model" --unpack bf16 --threads "$threads" --ctx "$tokens" \
        --set "kv_type=$stored" --method "$method" --seed "$seed" --json "$@" >"$log.$$"
    sed "s|^{|{\"run\": \"$run\", \"text\": \"$name\", \"share\": \"$share\", |" "$log.$$" >>"$log"
    rm "$log.$$"
    echo "done: $run" >&2
}

each() { # tokens, text, method, share
    for seed in $(seq "$seeds"); do
        case ${3%@*}-$seed in
        *-1 | balancekv* | sample* | uniform-* | walk-*) random=1 ;;
        *) random=0 ;; # a seed changes nothing but the keys
        esac
        [ "$2" = filler ] || [ $random = 0 ] ||
            case " $what " in
            *' ppl '*) once ppl "$@" "$seed" --windows "$windows" ;;
            esac
        case " $what " in
        *' passkey '*) once passkey "$@" "$seed" --depths "$depths" --each ;;
        esac
    done
}

[ -z "$what" ] || for n in $ctx; do
    for text; do
        each "$n" "$text" full 1
        for share in $shares; do
            for method in $methods; do
                each "$n" "$text" "$method" "$share"
            done
        done
    done
done

python3 - "$log" "$shares" "$ctx" "$methods" "$type" <<'PYTHON'
import json
import math
import sys

log, shares, ctx, methods = sys.argv[1], *(x.split() for x in sys.argv[2:5])
with open(log, encoding="utf-8") as lines:
    runs = [json.loads(line) for line in lines]


def mean(values):
    return sum(values) / len(values) if values else math.nan


def pick(command, method, share, n):
    """Of the runs, those of a method, or method@type; full stands in run alone."""
    method, _, kind = method.partition("@")
    kind = "f16" if method == "full" else kind or sys.argv[5]
    return [r for r in runs if r["command"] == command and r["ctx"] == int(n) and
            r["run"].split()[3:5] == [method, share] and r["run"].split()[-1] == kind]


def ppl(method, share, n, text):
    """Mean over seeds, and over all texts, of ln(ppl / full), as a percentage of perplexity."""
    full = {r["text"]: r["nll"] for r in pick("ppl", "full", "1", n)}
    rise = {}
    for r in pick("ppl", method, share, n):
        rise.setdefault(r["text"], []).append(r["nll"] - full.get(r["text"], math.nan))
    texts = list(full) if text == "all" else [text]
    if not all(x in rise and x in full for x in texts):
        return ""
    return "%+.2f %%" % (100 * math.expm1(mean([mean(rise[x]) for x in texts])))


def passkey(method, share, n, text):
    """Keys found, of those that full attention finds; nats per digit of all."""
    def cases(*which):
        return {(r["text"], r["seed"], r["depth"]): r for r in pick("passkey", *which)
                if "depth" in r and text == r["text"]}
    full = {k for k, r in cases("full", "1", n).items() if r["found"]}
    mine = cases(method, share, n)
    of = [r["found"] for k, r in mine.items() if k in full]
    return "%d of %d (%.2f)" % (sum(of), len(of), mean([r["nll_per_digit"] for r in mine.values()
                                                        ])) if of else ""


def row(cells):
    print("| " + " | ".join(cells) + " |")


def table(name, cell, command):
    texts = sorted({r["text"] for r in runs if r["command"] == command})
    lengths = [n for n in ctx if any(r["command"] == command and r["ctx"] == int(n) for r in runs)]
    if not lengths:
        return
    print("\n%s, by tokens and share of the bytes\n" % name)
    row(["method", "text"] + ["%s, %s" % (n, s) for n in lengths for s in shares])
    row(["---", "---"] + ["---:"] * (len(lengths) * len(shares)))
    for text in (["all"] if command == "ppl" else []) + texts:
        for method in methods:
            cells = [cell(method, s, n, text) for n in lengths for s in shares]
            if any(cells):
                row([method, text] + cells)
    print()
    for n in lengths:
        full = [r for r in pick(command, "full", "1", n) if command == "ppl" or "depth" in r]
        if command == "ppl":
            print("full attention, %s tokens: %s" % (
                n, ", ".join("%s %.3f" % (r["text"], r["ppl"]) for r in full)))
        for text in sorted({r["text"] for r in full}) if command == "passkey" else []:
            of = [r for r in full if r["text"] == text]
            print("full attention, %s tokens, %s: %d of %d (%.2f)" % (
                n, text, sum(r["found"] for r in of), len(of),
                mean([r["nll_per_digit"] for r in of])))


table("perplexity above full attention", ppl, "ppl")
table("pass keys found, of those that full attention finds (nats per digit)", passkey, "passkey")
PYTHON
