#!/bin/sh
# One header, every CPU: compiles bench/hash and core tests for each target, without a warning, and
# runs them where an emulator exists.  sh tests/matrix.sh [--write] [--resume] [TARGET...]
# Targets are the rows below; tests/cross/NAME.ini holds the tools of each. Every row must give
# bench/hash.golden on the backend it names, and bench/hash-nofma.golden where it says "both".
# Rows that run tests save a state, too, which this machine loads and goes on with (tests/saved.c).
# Ends with a table (--write: into tests/MATRIX.md) and the line "N passed, N failed"; a row whose
# tools are missing is left out, and a failure under CI=true. --resume keeps the rows that passed
# since bench/hash.golden has changed; the table says of which header. MATRIX_JOBS: rows at a time.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
out=build/matrix
mkdir -p $out/include || exit 1
[ -e $out/include/simde ] || ln -s /usr/include/simde $out/include/simde 2>/dev/null
[ ! -d build/venv/bin ] || PATH=$root/build/venv/bin:$PATH

# name | tests/cross/*.ini, or a compiler | backend | classes | tests | flags | environment
# classes: fma, or both. tests: run hash and tests, hash only, link (nothing runs it here), or bare:
# there is no C library, examples/freestanding.c prints its check sum.
# A Cortex-A53 is ARMv8.0. Of qemu's x86 CPUs qemu64 has SSE alone, IvyBridge AVX without AVX2 and
# FMA, Haswell no AVX-512, and what one lacks it refuses: dispatch must see that.
rows() {
    cat <<'ROWS'
gcc-11          | gcc-11          | avx2   | fma  | run     | |
gcc-12          | gcc-12          | avx2   | both | run     | |
clang-14        | clang-14        | avx2   | fma  | run     | |
clang-16        | clang-16        | avx2   | both | run     | |
clang-19        | clang-19        | avx2   | fma  | run     | |
zig             | zig-native      | scalar | fma  | hash    | |
x86-64-simde    | gcc             | neon   | both | run     | -DBALANCEKV_SIMDE -mavx2 -mfma -mf16c |
x86-64-simde-512| gcc             | avx512 | fma  | run     | -DBALANCEKV_SIMDE -DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX512 -mavx2 -mfma -Wno-psabi |
x86-64-nofma    | gcc             | avx2   | both | hash    | -std=gnu17 -march=native |
x86-64-qemu64   | x86_64          | auto   | fma  | hash    | | QEMU_CPU=qemu64 BKV_EXPECT_BACKENDS=scalar
x86-64-ivybridge| x86_64          | auto   | fma  | hash    | | QEMU_CPU=IvyBridge BKV_EXPECT_BACKENDS=scalar
x86-64-haswell  | x86_64          | avx2   | fma  | hash    | | QEMU_CPU=Haswell BKV_EXPECT_BACKENDS=scalar,avx2
i686            | i686            | scalar | both | run     | |
aarch64         | aarch64         | neon   | both | run     | | QEMU_CPU=max
aarch64-a53     | aarch64         | neon   | fma  | hash    | | QEMU_CPU=cortex-a53
aarch64-simde   | aarch64         | neon   | fma  | hash    | -DBALANCEKV_SIMDE |
armhf           | armhf           | scalar | both | hash    | |
armhf-vfpv4     | armhf           | scalar | fma  | run     | -mfpu=neon-vfpv4 |
riscv64         | riscv64         | scalar | both | run     | |
riscv64-simde   | riscv64         | neon   | fma  | hash    | -DBALANCEKV_SIMDE |
ppc64le         | ppc64le         | scalar | fma  | run     | |
ppc64le-simde   | ppc64le         | neon   | fma  | hash    | -DBALANCEKV_SIMDE |
s390x           | s390x           | scalar | fma  | run     | |
wasm32          | wasm32          | scalar | both | hash    | |
wasm32-simd     | wasm32-simd     | neon   | both | hash    | -DBALANCEKV_SIMDE |
windows-x86_64  | windows-x86_64  | avx2   | fma  | hash    | | WINEDEBUG=-all
windows-aarch64 | windows-aarch64 | neon   | fma  | link    | |
macos-aarch64   | macos-aarch64   | neon   | fma  | link    | |
android-aarch64 | android-aarch64 | neon   | fma  | bare    | -ffreestanding -nostdlib -static |
ROWS
}

warnings='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'

ini() { # file, key: the list or word as shell words
    sed -n "s/^$2 = //p" "$1" | tr -d "[],'"
}

fail() {
    echo "FAILED: $*"
    [ ! -s "$log" ] || tail -n 8 "$log"
    exit 1
}

row() { # the fields of one row; prints its lines of the table
    name=$1 tools=$2 backend=$3 classes=$4 tests=$5 flags=$6 environment=$7
    log=$out/$name.log start=$(date +%s) wrapper=''
    : >"$log"
    if [ -f "tests/cross/$tools.ini" ]; then
        compiler=$(ini "tests/cross/$tools.ini" c) wrapper=$(ini "tests/cross/$tools.ini" exe_wrapper)
    else
        compiler=$tools
    fi
    for tool in "${compiler%% *}" "${wrapper%% *}"; do
        [ -z "$tool" ] || command -v "$tool" >/dev/null || { echo "left out: no $tool"; exit 2; }
    done
    case "$compiler $wrapper" in
    *ziglang*) python3 -c 'import ziglang' 2>/dev/null || { echo 'left out: no ziglang'; exit 2; } ;;
    esac
    case "$wrapper" in
    *wasi*) python3 -c 'import wasmtime' 2>/dev/null || { echo 'left out: no wasmtime'; exit 2; } ;;
    esac
    case "$flags" in
    *SIMDE*) [ -d $out/include/simde/arm ] || { echo 'left out: no libsimde-dev'; exit 2; } ;;
    esac
    build() { # source, program, more flags
        # shellcheck disable=SC2086
        $compiler -std=c99 -O2 $warnings -isystem $out/include $flags $3 -I. "$1" -o "$2" $libm \
            >"$log" 2>&1 || fail "$name: $1 does not compile cleanly"
    }
    run() {
        # shellcheck disable=SC2086
        env WINEPREFIX="$root/$out/wine" $environment BKV_QUICK=1 BKV_EXPECT= $wrapper "$@" \
            >"$log" 2>&1
    }
    libm='' hashes='' passed=''
    here="${CC:-cc} -std=c99 -O2 -I."
    if [ "$tests" = bare ]; then
        classes=''
        build examples/freestanding.c "$out/$name.exe" ''
        $here examples/freestanding.c -o "$out/$name-here.exe" >"$log" 2>&1 &&
            run "$out/$name.exe" && [ "$(cat "$log")" = "$("$out/$name-here.exe")" ] ||
            fail "$name: examples/freestanding.c"
        hashes="$(cat "$log") "
    fi
    for class in fma nofma; do
        [ $class = "$classes" ] || [ "$classes" = both ] || continue
        golden=bench/hash.golden class_flags=''
        [ $class = fma ] || golden=bench/hash-nofma.golden class_flags=-DBALANCEKV_FMA=0
        build bench/hash.c "$out/$name-$class.exe" "$class_flags"
        if [ "$tests" = link ]; then
            hashes='compiled and linked, not run '
            continue
        fi
        expect=$(printf '%s' "$environment" | sed -n 's/.*BKV_EXPECT_BACKENDS=\([a-z0-9,]*\).*/\1/p')
        if [ -n "$expect" ]; then
            run "$out/$name-$class.exe" --backend none
            listed=$(sed -n 's/^backends here: auto //p' "$log" | tr ' ' ,)
            [ "$listed" = "$expect" ] || fail "$name: backends $listed, not $expect"
            for other in scalar avx2 avx512 neon; do # the others: an error, and no instruction
                case ,$expect, in *,$other,*) continue ;; esac
                code=0
                run "$out/$name-$class.exe" --backend $other || code=$?
                [ $code -eq 2 ] || fail "$name: backend $other ends with $code"
            done
        fi
        run "$out/$name-$class.exe" --backend "$backend" --expect "$(cat $golden)" ||
            fail "$name: hash of backend $backend, class $class"
        hashes="$hashes$(tail -n 1 "$log" | tr -d '\r') "
    done
    if [ "$tests" = run ]; then
        libm=-lm
        for test in kernels golden convert; do
            build tests/test_$test.c "$out/$name-$test.exe" -lpthread
            run "$out/$name-$test.exe" || fail "$name: test_$test"
            passed="$passed$test $(tail -n 1 "$log" | sed 's/ passed.*//') "
        done
        # A state that was saved there goes on here.
        build tests/saved.c "$out/$name-saved.exe" ''
        run "$out/$name-saved.exe" write "$out/$name.state" || fail "$name: cannot save a state"
        $here tests/saved.c -o "$out/$name-here.exe" >"$log" 2>&1 &&
            "$out/$name-here.exe" read "$out/$name.state" >"$log" 2>&1 ||
            fail "$name: the state that it saved does not go on here"
        passed="${passed}saved 1 "
        case "$flags" in
        *SIMDE*) # what measures it compiles, too
            build bench/backends.c "$out/$name-part.o" '-c -DPART_SIMDE'
            build bench/backends.c "$out/$name-backends.exe" "$out/$name-part.o"
            ;;
        esac
    fi
    # In $out, as zig for macOS leaves an empty a.o where it is asked.
    version=$(cd $out && $compiler --version 2>/dev/null | sed -n 1p | sed 's/(.*) *//')
    header=$(git hash-object balancekv.h 2>/dev/null | cut -c 1-7)
    echo "| $name | $version | $backend | $hashes| ${passed:--} | $(($(date +%s) - start)) | $header |"
}

if [ "${1:-}" = --row ]; then
    IFS='|' read -r name tools backend classes tests flags environment <<LINE
$(rows | grep "^$2 *|")
LINE
    trim() { printf '%s' "$1" | sed 's/^ *//; s/ *$//'; }
    row "$(trim "$name")" "$(trim "$tools")" "$(trim "$backend")" "$(trim "$classes")" \
        "$(trim "$tests")" "$(trim "$flags")" "$(trim "${environment:-}")"
    exit
fi

write='' resume=''
[ "${1:-}" != --write ] || { write=1; shift; }
[ "${1:-}" != --resume ] || { resume=1; shift; }
[ $# -gt 0 ] || set -- $(rows | sed 's/ *|.*//')
for name; do
    rows | grep -q "^$name *|" || {
        echo "matrix.sh: no target $name; there are:" $(rows | sed 's/ *|.*//') >&2
        exit 2
    }
done
for name; do
    [ -n "$resume" ] && [ $out/$name.row -nt bench/hash.golden ] && [ "$(cat $out/$name.code)" = 0 ] ||
        echo "$name"
done | xargs -r -P "${MATRIX_JOBS:-2}" -I '{}' sh -c \
    'sh tests/matrix.sh --row "$1" >build/matrix/"$1".row 2>&1; echo $? >build/matrix/"$1".code
     sed 1q build/matrix/"$1".row' - '{}'

passed=0 failed=0 left=0 table=$out/table.md
cat >$table <<HEAD
# One header, every CPU

\`sh tests/matrix.sh --write\` of $(date +%Y-%m-%d). Everything compiles without a warning at
\`$warnings\`. Hashes are of all outputs
and state bytes of bench/hash; the second, where there is one, is that of the class BALANCEKV_FMA=0.
saved: a state that was saved there was loaded on x86-64 and went on, bit for bit.

| target | compiler | backend | hash | tests passed, BKV_QUICK=1 | seconds | git blob of the header |
|---|---|---|---|---|---|---|
HEAD
for name; do
    case $(cat $out/$name.code) in
    0) passed=$((passed + 1)) && cat $out/$name.row >>$table ;;
    2) left=$((left + 1)) && echo "$name $(cat $out/$name.row)" ;;
    *) failed=$((failed + 1)) && cat $out/$name.row ;;
    esac
done
cat >>$table <<'FOOT'

The header refuses by its own `#error`: tcc, which has no vectors; NEON of ARMv7, which flushes denormals,
through SIMDe; x87 arithmetic (tests/bad_config.py). Android's C library is not to be had here: its row has
none, and the check sum is that of the same program on x86-64.
FOOT
echo
cat $table
[ -z "$write" ] || cp $table tests/MATRIX.md
[ "${CI:-}" != true ] || failed=$((failed + left))
echo "backends whose hash was compared: $(sed -n 's/^| \([a-z0-9_-]*\) | [^|]* | \([a-z0-9]*\) | [0-9a-f]\{16\}.*/\1:\2/p' \
    $table | tr '\n' ' ')"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
