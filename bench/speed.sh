#!/bin/sh
# Measures everything anew and writes it where it is shown:  sh bench/speed.sh [--peers[=DIR]]
#     bench/results/speed.json, speed.log     what bench/speed printed
#     bench/growth.svg, shares.svg, peers.svg pictures of it
#     README.md, bench/README.md              the tables between their marks
# Needs build/bench/speed, matplotlib (tests/requirements.txt), and a quiet machine: with all peers
# for a quarter to three quarters of an hour.
# Environment: RUN, a command before each part, e.g. RUN='chrt -f 1'; LENGTHS, the tokens of attend
# in memory; PEER_LENGTHS, those of them with peers. A second compiler gets a column of the bars:
#     CC=clang-16 meson setup build-clang && ninja -C build-clang
#     BUILD=build-clang NAME=speed-clang sh bench/speed.sh
set -eu
cd "$(dirname "$0")/.."
program=${BUILD:-build}/bench/speed
name=${NAME:-speed}
if [ ! -x $program ]; then
    echo "speed.sh: no $program; first: meson setup build && ninja -C build" >&2
    exit 1
fi
case $# in
0) ;;
1) case $1 in --peers | --peers=?*) ;; *)
    echo "speed.sh: unknown option '$1'; it takes --peers[=DIR]" >&2
    exit 2
    ;;
    esac ;;
*)
    echo 'speed.sh: it takes --peers[=DIR], and nothing else' >&2
    exit 2
    ;;
esac
PYTHONPATH=bench python3 -c 'import plot' || exit 1 # it says what is missing: now, not at the end
mkdir -p bench/results
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

part() { # command.., of a part that is a share of the whole
    echo "speed.sh: $*"
    "$@" --json >>"$new/speed.json" 2>>"$new/speed.log" || {
        tail -n 3 "$new/speed.log" >&2
        exit 1
    }
}
shapes='d64,g3 d128,g4 d64,g7 d128,g2'
# shellcheck disable=SC2086
for case in $($program --list | cut -d ' ' -f 1); do
    case $case in
    attend_hot | prefill) # in parts of a minute or two
        for shape in $shapes; do
            part ${RUN:-} $program --case $case --filter "$(echo $shape | tr , ' ') " "$@"
        done
        ;;
    attend_cold)
        for shape in $shapes; do
            for n in ${LENGTHS:-1024 4096 16384 65536}; do
                filter="$(echo $shape | tr , ' ') n$n "
                case " ${PEER_LENGTHS:-$n} " in
                *" $n "*) part ${RUN:-} $program --case $case --filter "$filter" "$@" ;;
                *) part ${RUN:-} $program --case $case --filter "$filter" ;;
                esac
            done
        done
        ;;
    growth) # n0: the fixed budget, all lengths in one race
        for n in 0 4096 16384 65536 262144; do
            part ${RUN:-} $program --case $case --filter " n$n " "$@"
        done
        ;;
    *) part ${RUN:-} $program --case $case "$@" ;;
    esac
done
mv "$new/speed.json" "bench/results/$name.json"
sed "s|${HOME:-/nowhere}/|~/|g" "$new/speed.log" >"bench/results/$name.log"
for picture in growth shares peers; do
    case $picture$# in
    peers0) ;; # none were there
    *)
        [ "$name" != speed ] ||
            python3 bench/plot.py $picture bench/results/speed.json >bench/$picture.svg
        ;;
    esac
done
for text in README.md bench/README.md; do
    python3 bench/report.py update $text bench/results
done
echo 'speed.sh: written; look at git diff'
