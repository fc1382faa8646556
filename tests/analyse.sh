#!/bin/sh
# Static analysis of balancekv.h: gcc -fanalyzer, cppcheck, clang-tidy. Any folder:
#     sh tests/analyse.sh
# They read the header through tests/link_a.c and bench/hash.c, switches as below; any finding
# in the header fails. A tool that is missing is left out. Ends with the line "N passed, N failed".
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
out=build/analyse
mkdir -p $out || exit 1
log=$out/log
passed=0 failed=0
scalar='-DBALANCEKV_DISPATCH=0 -DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR'

have() {
    command -v "$1" >/dev/null || { echo "left out: $1, not installed"; return 1; }
}

check() { # what it is, a pattern of findings, command...
    name=$1 pattern=$2 code=0
    shift 2
    "$@" >$log 2>&1 || code=$?
    findings=$(grep -c "balancekv\.h:[0-9].*$pattern" $log)
    echo "$name: $findings findings"
    if [ "$code" -eq 0 ] && [ "$findings" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        tail -n 40 $log
    fi
}

# gcc 12 does not end within minutes and gigabytes unless it looks at fewer states a point, and
# inlining repeats the work. It takes a double whose bits memcpy() reads, and an array that a loop
# fills, for uninitialised: that question is left to the two others.
# shellcheck disable=SC2086 # options are meant to split, here and below
! have gcc || check 'gcc -fanalyzer, scalar' 'warning:' \
    gcc -std=c99 -O0 -Dalways_inline=unused -fanalyzer -Wno-analyzer-use-of-uninitialized-value \
    --param=analyzer-max-enodes-per-program-point=2 --param=analyzer-bb-explosion-factor=2 \
    $scalar -I. -c tests/link_a.c -o $out/link_a.o

# It knows no compiler's macros by itself; the vectors' extensions are beyond it.
for class in 1 0; do
    ! have cppcheck || check "cppcheck, scalar, BALANCEKV_FMA=$class" '' \
        cppcheck --std=c99 --quiet --error-exitcode=1 --enable=warning,portability,performance \
        $scalar -DBALANCEKV_FMA=$class -DBALANCEKV_IMPLEMENTATION -D__x86_64__=1 -D__GNUC__=12 \
        -D__STDC_HOSTED__=1 -D__STDC_VERSION__=199901L -I. tests/link_a.c bench/hash.c
done

# What clang-tidy is not asked for, and why.
checks='-*,bugprone-*,cert-*,clang-analyzer-*'
for excuse in \
    'bugprone-easily-swappable-parameters: (head, n) and the like are of one type by nature' \
    'bugprone-implicit-widening-of-multiplication-result: of small constants; sizes are cast' \
    'bugprone-macro-parentheses: arguments that are parameter lists, lvalues, enumerators' \
    'bugprone-assignment-in-if-condition: if ((r = f()) != BKV_OK) return r;' \
    'bugprone-suspicious-string-compare: if (memcmp(..)) asks whether they differ' \
    'bugprone-sizeof-expression: the lanes of a vector, sizeof of it / sizeof of a float' \
    'clang-analyzer-core.CallAndMessage: kernels of no backend; bkvi_plan never leaves it open'; do
    checks=$checks,-${excuse%%:*}
done
for switches in "$scalar" '-DBALANCEKV_DISPATCH=1' '-DBALANCEKV_DISPATCH=1 -DBALANCEKV_FMA=0'; do
    for file in tests/link_a.c bench/hash.c; do
        ! have clang-tidy || check "clang-tidy, $file $switches" '\(warning\|error\):' \
            clang-tidy --quiet --checks="$checks" --header-filter='balancekv\.h' $file -- \
            -std=c99 -I. $switches
    done
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
