#!/bin/sh
# What README says was tested: the counts that take too long for every run. Any folder:
#     sh tests/long.sh
# Two programs at a time (LONG_JOBS), LONG_OPERATIONS of fuzzing in all (10 million). Everything that
# they print goes to build/long/*.log (tail -f shows how far they are); at the end a table for README.
# Fails if one of them did.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
out=build/long
parts='1 2 3 4 5 6' # of the fuzzing: its seeds
operations=${LONG_OPERATIONS:-10000000}

if [ "${1:-}" = --job ]; then
    case $2 in
    trust) BKV_LONG=1 $out/test_trust ;;
    *) $out/fuzz_ops --random $(((operations + 5) / 6)) "$2" ;;
    esac >"$out/$2.log" 2>&1 || {
        echo "FAILED: $out/$2.log"
        tail -n 8 "$out/$2.log"
        exit 1
    }
    exit
fi

mkdir -p $out && rm -f $out/*.log || exit 1
for source in test_trust fuzz_ops; do
    ${CC:-cc} -std=c99 -O3 -march=native -DREPLAY -I. tests/$source.c -o $out/$source -lm -lpthread ||
        exit 1
done
start=$(date +%s) code=0
for job in trust $parts; do echo $job; done |
    xargs -P "${LONG_JOBS:-2}" -I '{}' sh tests/long.sh --job '{}' || code=1

echo '| how many | what | where |'
echo '|---|---|---|'
awk '
    function row(n, what, where) { # 1000000 becomes 1,000,000
        while (n ~ /[0-9][0-9][0-9][0-9](,|$)/) sub(/[0-9][0-9][0-9](,|$)/, ",&", n)
        print "| " n " | " what " | " where " |"
    }
    / operations without a finding$/ { operations += $1; next }
    /^ok / { if (what) row(n, what, "test_trust.c, " $2); what = "" }
    /^(f16|i8|i4): / { row($2, substr($0, length($1 $2) + 3), "test_trust.c, soak, " substr($1, 1, length($1) - 1)) }
    /^[0-9]+ [^po]/ && !what { n = $1; $1 = ""; what = substr($0, 2) }
    END { row(operations "", "operations of fuzzing without a finding", "fuzz_ops.c") }
    ' $out/*.log
echo "$((($(date +%s) - start) / 60)) minutes; $(tail -n 1 $out/trust.log)"
[ $code -eq 0 ]
