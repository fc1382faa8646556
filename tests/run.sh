#!/bin/sh
# Runs every test, from any folder:  sh tests/run.sh
# Sets up Meson, NumPy and others in build/venv where they are missing; installs nothing elsewhere.
# Without them (no network) a plain compiler does what it can. Ends with what ran on which backend,
# what was left out and why, and the line "N passed, N failed".
# Environment: CC; BKV_EXPECT=scalar,avx2,.. names backends that the native runs must have besides
# those this CPU reports; BKV_LLM, the folder that examples/llm/setup.sh has made; CI=true counts
# everything left out as a failure, and emulates more CPUs, which takes ten minutes more.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
logs=build/logs
mkdir -p "$logs" || exit 1
PATH=$root/build/venv/bin:$PATH
passed=0 failed=0 ran='' left_out=''

have() { command -v "$1" >/dev/null 2>&1; }

mention() { # what, why: left out, and CI may leave it out, too
    left_out="$left_out  $1: $2
"
}

leave_out() { # what, why
    mention "$1" "$2"
    [ "${CI:-}" != true ] || failed=$((failed + 1))
}

# Runs a command and adds its last line "N passed, N failed". A command that prints none, or that
# fails although nothing it counted did, counts as one test.
step() { # name, command...
    name=$1 log=$logs/$(echo "$1" | tr -cs 'A-Za-z0-9\n' _).log start=$(date +%s) code=0
    shift
    printf '%-34s' "$name"
    "$@" >"$log" 2>&1 </dev/null || code=$?
    counts=$(sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p' "$log" | tail -n 1)
    [ -n "$counts" ] || counts="$((code == 0)) 0"
    good=${counts% *} bad=${counts#* }
    [ "$code" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1
    echo "$good passed, $bad failed ($(($(date +%s) - start)) s)"
    if [ "$bad" -gt 0 ]; then
        tail -n 40 "$log" | sed 's/^/    /'
        echo "    all of it: $log"
    fi
    passed=$((passed + good)) failed=$((failed + bad))
    targets=$(sed -n 's/^\([a-z0-9-]*\) left out: /  tests\/matrix.sh \1: /p' "$log")
    [ -z "$targets" ] || left_out="$left_out$targets
"
    backends=$(sed -n 's/^backends whose hash was compared: //p' "$log")
    [ -z "$backends" ] || ran="$ran  $name: $backends
"
}

# A Meson run in lines of ours: the tests, the backends, the sum. A test without a line of its own
# counts as one, so does an expected backend whose hash nobody compared.
summary='
import json, re, sys
total, backends = [0, 0], []
for line in open(sys.argv[1], encoding="utf-8"):
    test = json.loads(line)
    name, ok = re.split("[ /:]+", test["name"])[-1], test["result"] == "OK"
    if test["result"] == "SKIP": # it says why; run.sh mentions what is missing
        print("%-20s SKIP  %s" % (name, (test.get("stdout") or "").strip()))
        continue
    counts = re.findall(r"^(\d+) passed, (\d+) failed$", test.get("stdout") or "", re.M)
    good, bad = map(int, counts[-1]) if counts else (int(ok), 0)
    bad = max(bad, int(not ok))
    if bad:
        print("%s\n%s" % (test.get("stdout") or "", test.get("stderr") or ""))
    print("%-20s %-8s %6.1f s  %d passed, %d failed"
          % (name, test["result"], test["duration"], good, bad))
    total = [total[0] + good, total[1] + bad]
    if name.startswith("hash-") and not bad:
        backends.append(name[5:])
for name in set(sys.argv[2].split(",")) - set(backends):
    print("the hash of backend %s was not compared" % name)
    total[1] += 1
print("backends whose hash was compared: " + " ".join(backends))
print("%d passed, %d failed" % tuple(total))
sys.exit(total[1] > 0)
'

# Configures if anything changed, builds, tests.
meson_run() { # folder, expected backends, options for meson setup, arguments of meson test
    setup="Meson $(meson --version), CC=$CC, $3"
    if [ "$(cat "$1/setup" 2>/dev/null)" != "$setup" ]; then
        rm -rf "$1/build.ninja" "$1/meson-private" "$1/meson-info" "$1/setup"
        # shellcheck disable=SC2086 # options are meant to split
        meson setup "$1" -Dwerror=true $3 && echo "$setup" >"$1/setup" || return 1
    fi
    rm -f "$1/meson-logs/testlog.json"
    [ -n "$4" ] || meson compile -C "$1" || return 1 # else what these tests need
    # shellcheck disable=SC2086
    BKV_EXPECT=$2 meson test -C "$1" --quiet $4
    python3 -c "$summary" "$1/meson-logs/testlog.json" "$2"
}

# Makes a program of one C file.
built() { # folder, compiler and its flags, C file
    program=$1/$(basename "$3" .c)
    mkdir -p "$1" && $2 -std=c99 -I. "$3" -o "$program" -lm -lpthread -ldl
}
built_run() { # the same, then what starts the program, and its arguments
    built "$1" "$2" "$3" && shift 3 && "$@"
}
plain() { built build/plain "$CC -O2" "$1"; } # without Meson
plain_test() { # C file
    plain "$1" && "$program"
}

plain_hashes() {
    plain bench/hash.c || return 1
    for backend in $(echo "$native" | tr , ' '); do
        "$program" --backend "$backend" --expect "$(cat bench/hash.golden)" || return 1
    done
    echo "backends whose hash was compared: $native"
}

plain_speed() {
    plain bench/speed.c && python3 tests/test_speed.py "$program"
}

# What this CPU has, found without the header's own detection, which is to be tested.
cpu_has() {
    for flag; do grep -qw -- "$flag" /proc/cpuinfo 2>/dev/null || return 1; done
}
machine=$(uname -m)
case $machine in
x86_64 | amd64)
    native=scalar
    ! cpu_has avx2 fma f16c || native=$native,avx2
    ! cpu_has avx512f || native=$native,avx512
    ;;
aarch64 | arm64) native=neon ;;
*) native=scalar ;;
esac
native=$native${BKV_EXPECT:+,$BKV_EXPECT}

if [ -z "${CC:-}" ]; then
    CC=cc
    ! have gcc || CC=gcc
fi
native_cc=$CC
export CC

compiles() { # language, header
    echo "#include <$2>" | $CC -fsyntax-only -x "$1" - 2>/dev/null
}
if ! compiles c stdio.h; then
    echo "run.sh: '$CC' does not compile C: install gcc or clang, and the headers of the C library" \
        '(Debian: gcc libc6-dev), or set CC' >&2
    exit 1
fi
compiles c++ memory || leave_out 'C++' "'$CC' does not compile it (Debian: g++)"

echo "The logs of all steps are in $logs. A step that fails shows the end of its log here."
numpy_there() { python3 -c 'import numpy' 2>/dev/null; }
no_tools='not installed'
if ! have meson || ! have ninja || ! have conan || ! numpy_there ||
    ! python3 -c 'import matplotlib, wasmtime, ziglang' 2>/dev/null; then
    echo 'Setting up Meson, NumPy, Matplotlib, Conan, Zig and Wasmtime in build/venv ..'
    if ! have python3; then
        no_tools='no python3'
    elif ! python3 -m venv --system-site-packages build/venv >"$logs/venv.log" 2>&1; then
        no_tools='python3 makes no virtual environment (Debian: python3-venv)'
    elif ! build/venv/bin/pip install -r tests/requirements.txt >"$logs/venv.log" 2>&1; then
        no_tools="pip could not install them, see $logs/venv.log"
    fi
    [ "$no_tools" = 'not installed' ] || echo "  not all of them: $no_tools"
    hash -r # dash would go on with the python3 it found before
fi

if have meson && have ninja; then
    llm=${BKV_LLM:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-llm}
    [ -f "$llm/built" ] || leave_out 'a language model' "no $llm; run examples/llm/setup.sh"
    [ -f "$llm/built" ] || llm=
    for tool in cmake pkg-config conan; do
        have "$tool" || leave_out "packaging by $tool" "no $tool"
    done
    have make || leave_out 'packaging by cmake and conan' 'no make'
    have patch || leave_out 'the diff of examples/llama2c' 'no patch'
    { have clang-16 && have llvm-mca-16; } || leave_out 'loops of NEON' 'no clang-16 or no llvm-mca-16'
    have vcpkg || mention 'packaging by vcpkg' 'no vcpkg; its port runs in plain CMake'
    python3 tests/test_press.py --there >/dev/null ||
        mention 'the press of examples/python' 'no torch; bench/peers.sh installs one'
    step "native, $CC" meson_run build "$native" "-Dllm=$llm" ''
    numpy_there || leave_out 'golden vectors against the model' "no NumPy: $no_tools"
    why=$(python3 bench/insn.py --why-not 2>&1) || why='bench/insn.py fails'
    if [ -n "$why" ]; then
        leave_out 'instruction counts' "$why"
    else
        step "instruction counts, $CC" python3 bench/insn.py
    fi

    if have clang; then
        CC=clang
        step 'native, clang' meson_run build/clang "$native" '' '--suite core'
        CC=$native_cc
    else
        leave_out 'clang' 'no clang'
    fi

    bare=
    if have arm-none-eabi-gcc && have qemu-system-arm; then
        bare=cortex-m7
    else
        leave_out 'freestanding, Cortex-M7' 'no arm-none-eabi-gcc or no qemu-system-arm'
    fi
    if have aarch64-linux-gnu-gcc && have qemu-aarch64; then
        bare="$bare aarch64"
    else
        leave_out 'freestanding, AArch64' 'no aarch64-linux-gnu-gcc or no qemu-aarch64'
    fi
    [ "$(uname -sm)" != 'Linux x86_64' ] || bare="$bare x86-64"
    # shellcheck disable=SC2086 # names are meant to split
    [ -z "$bare" ] || step "freestanding" sh examples/freestanding.sh $bare

    if ! have chromium && ! have chromium-browser && ! have google-chrome; then
        leave_out 'the web page' 'no Chromium'
    elif ! sh examples/web/build.sh >"$logs/web_build.log" 2>&1; then
        leave_out 'the web page' "not built: $(tail -n 1 "$logs/web_build.log")"
    else
        step 'the web page, in Chromium' python3 tests/test_web.py
    fi

    # From here on it is about the instructions and the memory, not about every size. With sanitizers
    # -O2 compiles three times as long as -O1.
    export BKV_QUICK=1
    step 'address, undefined sanitizers' meson_run build/sanitize "$native" \
        '-Db_sanitize=address,undefined -Doptimization=1 -Dexamples=disabled' '--suite core'

    # The rest needs but one program each. A finding ends it with a failure.
    step 'threads under TSan' built_run build/thread "$CC -g -O1 -fsanitize=thread" \
        tests/test_stream.c build/thread/test_stream ways
    if have clang; then
        step 'trust under MSan' built_run build/memory 'clang -g -O1 -fsanitize=memory' \
            tests/test_trust.c build/memory/test_trust
        step 'fuzz corpus under MSan' built_run build/memory \
            'clang -g -O1 -fsanitize=memory -DREPLAY' tests/fuzz_ops.c \
            build/memory/fuzz_ops tests/corpus/*
    else
        leave_out 'MSan' 'no clang'
    fi
    if have valgrind; then
        step 'random operations under valgrind' built_run build/valgrind "$CC -g -O1 -DREPLAY" \
            tests/fuzz_ops.c valgrind -q --error-exitcode=9 --leak-check=full \
            build/valgrind/fuzz_ops --random 300
    else
        leave_out 'valgrind' 'no valgrind'
    fi
    if have gcc && have gcov; then
        step 'coverage' sh tests/coverage.sh
    else
        leave_out 'coverage' 'no gcc or no gcov'
    fi
    for tool in cppcheck clang-tidy; do
        have $tool || leave_out "analysis by $tool" "no $tool"
    done
    step 'static analysis' sh tests/analyse.sh

    case $machine in
    x86_64 | amd64)
        if ! have aarch64-linux-gnu-gcc || ! have qemu-aarch64; then
            leave_out 'AArch64 under qemu' 'no aarch64-linux-gnu-gcc or no qemu-aarch64'
        else
            for backend in neon scalar; do
                simd=$(echo $backend | tr '[:lower:]' '[:upper:]')
                step "AArch64 under qemu, $backend" meson_run build/aarch64-$backend $backend \
                    "--cross-file tests/cross/aarch64.ini -Dexamples=disabled
                    -Dc_args=-DBALANCEKV_SIMD=BALANCEKV_SIMD_$simd" \
                    "hash-$backend nofma-hash-$backend kernels golden convert"
            done
        fi
        # The others take longer still: sh tests/matrix.sh --write, before a release.
        rows='x86-64-haswell wasm32-simd windows-aarch64 macos-aarch64 android-aarch64'
        slow='x86-64-simde armhf-vfpv4 riscv64 s390x'
        case ,$native, in
        *,avx512,*) slow="x86-64-simde-512 $slow" ;;
        *) rows="x86-64-simde-512 $rows" ;;
        esac
        if [ "${CI:-}" = true ]; then
            rows="$rows $slow"
        else
            mention 'SIMDe and slowly emulated CPUs' "CI only; sh tests/matrix.sh $slow"
        fi
        # shellcheck disable=SC2086 # names are meant to split
        step 'other CPUs, tests/matrix.sh' sh tests/matrix.sh $rows
        ;;
    esac
else
    leave_out 'clang, sanitizers, AArch64, other CPUs, a language model' "no Meson: $no_tools"
    step 'hash' plain_hashes
    export BKV_EXPECT="$native"
    for source in tests/test_*.c; do
        step "$(basename "$source" .c)" plain_test "$source"
    done
    for script in tests/bad_config.py tests/check_*.py tests/test_examples.py \
        tests/test_adapters.py tests/test_packaging.py; do
        if have python3; then
            step "$(basename "$script" .py)" python3 "$script"
            said=$(sed -n 's/^left out: /  /p' "$log")
            [ -z "$said" ] || left_out="$left_out$said
"
        else
            leave_out "$script" 'no python3'
        fi
    done
    ! have python3 || step 'speed' plain_speed
    if numpy_there; then
        step 'golden vectors against the model' python3 tests/gen_golden.py --check
        step 'Python' python3 tests/test_python.py
    else
        leave_out 'golden vectors against the model' "no NumPy: $no_tools"
    fi
fi

echo
echo 'Backends that gave bench/hash.golden:'
printf '%s' "${ran:-  see the logs
}"
echo "Left out:"
printf '%s' "${left_out:-  nothing
}" | sort -u
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
