#!/bin/sh
# Regenerates every table and picture of bench/QUALITY.md:  sh bench/quality.sh [-w] [FOLDER...]
# A FOLDER is a trace (k.npy, q.npy, v.npy) or holds traces; default: examples/trace. Results go to
# build/quality and the tables to standard output; with -w they replace those of QUALITY.md. First
# layers, for the published figure, are the traces whose name ends in layer00.
# Environment: CC; SEEDS (default 1,2,3,4,5); THREADS (default 2).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=$root/build/quality
write=false
if [ "${1:-}" = -w ]; then
    write=true
    shift
fi
[ $# -gt 0 ] || set -- "$root/examples/trace"

traces='' first=''
for folder; do
    for trace in "$folder" "$folder"/*; do
        [ -f "$trace/k.npy" ] || continue
        case $trace in
        *layer00) first=$first,$trace ;;
        *) traces=$traces,$trace ;;
        esac
    done
done
if [ -z "$traces$first" ]; then
    echo "quality.sh: no trace (a folder with q.npy, k.npy and v.npy) in: $*" >&2
    exit 2
fi

mkdir -p "$out"
${CC:-cc} -std=c99 -O3 -march=native -ffp-contract=fast -I"$root" -I"$root/examples" \
    "$root/bench/quality.c" "$root/bench/exact.c" "$root/bench/slots.c" "$root/bench/baselines.c" \
    "$root/bench/oneshot.c" "$root/bench/pool.c" "$root/bench/theory.c" "$root/bench/pages.c" \
    -DPLOT_PY="\"$root/bench/plot.py\"" -o "$out/quality" -lm -lpthread

run() { # name, traces separated by commas, options
    name=$1 list=${2#,}
    shift 2
    [ -n "$list" ] || return 0
    "$out/quality" --trace "$list" --threads "${THREADS:-2}" --json "$@" >"$out/$name.new"
    mv "$out/$name.new" "$out/$name.json"
}
seeds=${SEEDS:-1,2,3,4,5}
run stream "$traces" --seed "$seeds" --method balancekv,balancekv:rounds=none,walk,\
pair,uniform,stride,window,streamingllm,knorm,keydiff,h2o,tova,expected
run theory "$traces" --seed 1 --every 4 --method \
balancekv,walk,algorithm1,algorithm1:sinks=4:window=170,hybrid
run oneshot "$traces" --protocol oneshot --seed "$seeds" --method balancekv,\
balancekv:importance=1,balancekv:importance=none,walk,uniform,window,\
streamingllm,knorm,keydiff,expected,h2o,tova,snapkv,pyramidkv,kvcrush-random,kvcrush-mean,\
kvcrush-alternate,uniform-once,published,published-both,snapkv-ahead
run first "$first" --protocol oneshot --budget 1/2 --seed "$seeds" --method uniform-once,\
published:block=256:temp=0.1,published:block=128:temp=1,published-both:block=128:temp=1

for name in stream oneshot; do
    [ ! -f "$out/$name.json" ] ||
        python3 "$root/bench/plot.py" quality "$out/$name.json" >"$out/quality-$name.svg"
done
if $write; then
    cp "$out"/quality-*.svg "$root/bench/"
    python3 "$root/bench/tables.py" update "$root/bench/QUALITY.md" "$out"
else
    for table in "means stream" "traces stream" "means theory" "means oneshot" "traces oneshot" \
        "ratio first"; do
        [ ! -f "$out/${table#* }.json" ] || {
            printf '\n%s\n\n' "$table"
            python3 "$root/bench/tables.py" "${table% *}" "$out/${table#* }.json"
        }
    done
fi
