#!/bin/sh
# Regenerates the tables and pictures of bench/QUALITY.md:
#     sh bench/quality.sh [-w] [FOLDER...] [-- OTHER...]
# A FOLDER is a trace (k.npy, q.npy, v.npy) or holds traces; default: examples/trace. Results go to
# OUT and this run's tables to standard output; with -w they replace those of QUALITY.md. First
# layers, for the published figure, are the traces whose name ends in layer00. OTHER recordings have
# the table wide and, one behind the other by layer, growth.
# Environment: OUT (default build/quality); CC; SEEDS (default 1,2,3,4,5; the table theory has the
# first, growth the first two); THREADS (default 2); ONLY (default all), names of tables as in
# 'stream storage'; LENGTHS (default none), tokens of the table growth, as in '8192 16384'.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=${OUT:-$root/build/quality}
write=false
if [ "${1:-}" = -w ]; then
    write=true
    shift
fi
[ $# -gt 0 ] || set -- "$root/examples/trace"

traces='' first='' others='' layers='' to=traces
for folder; do
    [ "$folder" != -- ] || to=others
    for trace in "$folder" "$folder"/*; do
        [ -f "$trace/k.npy" ] || continue
        case $to,$trace in
        *layer00) first=$first,$trace ;;
        traces,*) traces=$traces,$trace ;;
        *)
            others=$others,$trace
            layers="$layers $(echo "${trace##*layer}" | tr -cd 0-9)"
            ;;
        esac
    done
done
if [ -z "$traces$first$others" ]; then
    echo "quality.sh: no trace (a folder with q.npy, k.npy and v.npy) in: $*" >&2
    exit 2
fi

pictures=true
python3 -c 'import matplotlib' 2>/dev/null || {
    pictures=false
    echo 'quality.sh: tables only, no pictures: python3 -m pip install matplotlib' >&2
}
mkdir -p "$out"
new=$(mktemp -d) # of this run; what is finished is kept, also if the rest fails
leave() {
    for json in "$new"/*.json; do [ ! -f "$json" ] || mv "$json" "$out"; done
    rm -rf "$new"
}
trap leave EXIT
trap 'exit 130' INT TERM
${CC:-cc} -std=c99 -O3 -march=native -ffp-contract=fast -I"$root" -I"$root/examples" \
    "$root/bench/quality.c" "$root/bench/exact.c" "$root/bench/slots.c" "$root/bench/baselines.c" \
    "$root/bench/oneshot.c" "$root/bench/pool.c" "$root/bench/theory.c" "$root/bench/pages.c" \
    -DPLOT_PY="\"$root/bench/plot.py\"" -o "$out/quality" -lm -lpthread

run() { # name, traces separated by commas, options; the name's table is of all runs of that name
    name=$1 list=${2#,}
    shift 2
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    [ -n "$list" ] || return 0
    "$out/quality" --trace "$list" --threads "${THREADS:-2}" --json "$@" >>"$new/$name"
}
keep() {
    for file in "$new"/*; do
        case $file in *.json) ;; *) [ ! -f "$file" ] || mv "$file" "$file.json" ;; esac
    done
}
seeds=${SEEDS:-1,2,3,4,5}
two=$(echo "$seeds" | cut -d, -f1,2)
run stream "$traces" --seed "$seeds" --method balancekv,balancekv:rounds=none,\
balancekv:importance=1,walk,pair,uniform,stride,window,streamingllm,knorm,keydiff,h2o,tova,expected
run theory "$traces" --seed "${seeds%%,*}" --every 4 --method \
balancekv,walk,algorithm1,algorithm1:sinks=4:window=170,hybrid
run oneshot "$traces" --protocol oneshot --seed "$seeds" --method balancekv,\
balancekv:importance=1,balancekv:importance=1:window=none,balancekv:importance=none,walk,uniform,\
window,streamingllm,knorm,keydiff,expected,h2o,tova,snapkv,pyramidkv,kvcrush-random,kvcrush-mean,\
kvcrush-alternate,uniform-once,published,published-both,snapkv-ahead
run shrunk "$traces" --protocol oneshot --seed "$seeds" --method \
shrunk,shrunk:importance=3,shrunk:importance=1:window=none,snapkv
run first "$first" --protocol oneshot --budget 1/2 --seed "$seeds" --method uniform-once,\
published:block=256:temp=0.1,published:block=128:temp=1,published-both:block=128:temp=1
run wide "$others" --seed "$seeds" --every 4 --method \
balancekv,balancekv:importance=1,walk,pair,window,knorm,keydiff,h2o,tova,expected
# The slots of i8 are what bkv_budget_for_bytes() gives for the bytes of the others (head_dim 64).
run storage "$traces" --seed "$seeds" --budget 256,512,1024,2048 \
    --method balancekv:kv_type=f16
for x in i8=464,880,1824,3728 i4=736,1488,3200,6624; do # equal bytes
    run storage "$traces" --seed "$seeds" --budget "${x#*=}" \
        --method "balancekv:kv_type=${x%=*}"
done
settings=balancekv
for x in temp=0.03 temp=0.3 temp=1 importance=1 importance=2 importance=4 importance=6 \
    importance=none rounds=none rounds=1 rounds=4 sinks=none sinks=128 window=64 window=128 \
    window=256 window=320; do
    settings=$settings,balancekv:$x
done
run settings "$traces" --seed "$seeds" --every 16 --method "$settings"
keep
set -f
for layer in $(echo "$layers" | tr ' ' '\n' | sort -u); do
    one='' back='' ifs=$IFS IFS=,
    for trace in ${others#,}; do
        [ "${trace##*layer}" = "$layer" ] || continue
        one=${one:+$one+}$trace back=$trace${back:++$back}
    done
    IFS=$ifs
    [ "$one" = "$back" ] || one=$one,$back
    for n in ${LENGTHS:-}; do
        run growth "$one" --seed "$two" --tokens "$n" --every $(((n + 1023) / 1024)) \
            --budget 1024 --method balancekv,uniform,window,knorm,expected
    done
done
set +f
keep

for name in stream oneshot; do
    ! $pictures || [ ! -f "$new/$name.json" ] || {
        python3 "$root/bench/plot.py" quality "$new/$name.json" >"$out/quality-$name.svg"
        ! $write || cp "$out/quality-$name.svg" "$root/bench/"
    }
done
if $write; then
    python3 "$root/bench/tables.py" update "$root/bench/QUALITY.md" "$new"
else
    for table in "means stream" "traces stream" "means wide" "storage storage" \
        "settings settings" "tokens growth" "means theory" "means oneshot" "traces oneshot" \
        "means shrunk" "ratio first"; do
        [ ! -f "$new/${table#* }.json" ] || {
            printf '\n%s\n\n' "$table"
            python3 "$root/bench/tables.py" "${table% *}" "$new/${table#* }.json"
        }
    done
fi
