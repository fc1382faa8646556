#!/bin/sh
# Installs and builds what bench/speed --peers compares with, outside the tree:
#
#     sh bench/peers.sh [--torch] [--reference DIR] [FOLDER]
#
# FOLDER: default ${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-peers (then bench/speed finds it by
# itself; else say --peers=FOLDER). May be run again: it does what is missing, and always builds
# bench/peers.c anew. Without network it builds those peers that it already has.
#   ggml       from the source distribution of llama-cpp-python, for this CPU
#   numkong    its source distribution (headers)
#   OpenBLAS   of the system (Debian: libopenblas-dev), else the wheel scipy-openblas32
#   --torch    the torch wheel (3 GB) for scaled_dot_product_attention
#   --reference DIR  the folder of balanced_walk.py, the BalanceKV reference in PyTorch
# Environment: CC, CXX; PEERS_OPENBLAS=system|wheel.
set -u
llama=llama_cpp_python-0.3.36
numkong=numkong-7.8.6
torch='' reference='' folder=''
source=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

fail() {
    echo "peers.sh: $*" >&2
    exit 1
}
usage() {
    echo "peers.sh: $1; usage: sh bench/peers.sh [--torch] [--reference DIR] [FOLDER]" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --torch) torch=yes ;;
    --reference)
        [ $# -gt 1 ] || usage 'no folder after --reference'
        reference=$2
        shift
        [ -f "$reference/balanced_walk.py" ] || usage "no balanced_walk.py in '$reference'"
        reference=$(CDPATH='' cd -- "$reference" && pwd)
        ;;
    -*) usage "unknown option '$1'" ;;
    *)
        [ -z "$folder" ] || usage "two folders: '$folder' and '$1'"
        folder=$1
        ;;
    esac
    shift
done
folder=${folder:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-peers}
mkdir -p "$folder/dl" || fail "cannot write to $folder"
cd "$folder" || exit 1
folder=$(pwd)
PATH=$folder/venv/bin:$PATH
CC=${CC:-cc} CXX=${CXX:-c++}
missing='' defines='' libraries=''

have() { command -v "$1" >/dev/null 2>&1; }
have "$CC" || fail "no C compiler '$CC'; set CC"
have "$CXX" || fail "no C++ compiler '$CXX', which ggml needs; set CXX"
have python3 || fail 'no python3'

# Says what it does, keeps the output in the log, and shows its end if it fails.
: >log
step() { # text, command..
    text=$1 start=$(date +%s)
    shift
    printf '%-44s' "$text .."
    if "$@" >>log 2>&1; then
        echo "done ($(($(date +%s) - start)) s)"
    else
        echo "FAILED; the end of $folder/log:"
        tail -n 5 log | sed 's/^/    /'
        return 1
    fi
}
lack() { missing="$missing $1"; }

make_venv() {
    [ -x venv/bin/pip ] || python3 -m venv venv
}
download() { # name and version of a source distribution
    [ -f "dl/$1.tar.gz" ] || venv/bin/pip download --no-deps --no-binary :all: -d dl \
        "$(echo "$1" | sed 's/-\([0-9.]*\)$/==\1/')" || return 1
    [ -d "$1" ] || tar xzf "dl/$1.tar.gz"
}
install_tools() {
    have cmake && { have ninja || have make; } || venv/bin/pip install cmake ninja
}
build_ggml() {
    ggml=$llama/vendor/llama.cpp/ggml
    [ ! -f ggml-build/src/libggml.a ] || return 0
    # The source distribution leaves this template out.
    [ -f $ggml/ggml.pc.in ] ||
        printf 'prefix=@CMAKE_INSTALL_PREFIX@\nName: ggml\nDescription: ggml\nVersion: 0\n' \
            >$ggml/ggml.pc.in
    generator=
    ! have ninja || generator='-G Ninja'
    # shellcheck disable=SC2086
    cmake -S $ggml -B ggml-build $generator -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON -DGGML_OPENMP=OFF \
        -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF &&
        cmake --build ggml-build -j "$(getconf _NPROCESSORS_ONLN)"
}
link_openblas() { # flags of the compiler
    printf '#include <cblas.h>\nint main(void) { return 0; }\n' >openblas.c
    $CC "$@" openblas.c -o openblas-works && ./openblas-works
}
find_openblas() {
    if [ "${PEERS_OPENBLAS:-system}" = system ] && link_openblas -lopenblas; then
        echo '-DPEERS_OPENBLAS' >openblas.cflags
        echo '-lopenblas' >openblas.libs
        return
    fi
    [ "${PEERS_OPENBLAS:-wheel}" = wheel ] || return 1
    venv/bin/pip install scipy-openblas32 || return 1
    include=$(venv/bin/python -c 'import scipy_openblas32 as b; print(b.get_include_dir())')
    lib=$(venv/bin/python -c 'import scipy_openblas32 as b; print(b.get_lib_dir())')
    echo "-DPEERS_OPENBLAS -DPEERS_BLAS(name)=scipy_##name -isystem $include" >openblas.cflags
    echo "-L$lib -Wl,-rpath,$lib -lscipy_openblas" >openblas.libs
}
build_peers() { # compiles with -O2; plain C, which is to be fast by the compiler alone, with -Ofast
    $CC -std=gnu11 -Ofast -march=native -fPIC -c "$source/peers_naive.c" -o peers_naive.o ||
        return 1
    # gcc 12 cannot compile numkong's bf16 for AVX-512.
    no_bf16=
    ! echo 'int x;' | $CC -mno-avx512bf16 -xc -c - -o /dev/null || no_bf16=-mno-avx512bf16
    # shellcheck disable=SC2086
    $CC -std=gnu11 -O2 -march=native $no_bf16 -fPIC $defines \
        "-DPEERS_ABOUT=\"ggml of $llama, $numkong\"" -c "$source/peers.c" -o peers.o &&
        $CXX -shared -o libpeers.so.new peers.o peers_naive.o $libraries \
            -Wl,--exclude-libs,ALL -Wl,--no-undefined -lm -lpthread -ldl &&
        mv libpeers.so.new libpeers.so && cp "$source/peers_torch.py" .
}

step 'a Python environment of its own' make_venv || fail 'it needs the venv module (python3-venv)'
if step "ggml: source of $llama (75 MB)" download $llama && step 'ggml: cmake' install_tools &&
    step 'ggml: building (2 minutes)' build_ggml; then
    ggml=$folder/$llama/vendor/llama.cpp/ggml
    defines="$defines -DPEERS_GGML -isystem $ggml/include -isystem $ggml/src"
    defines="$defines -isystem $ggml/src/ggml-cpu"
    for part in ggml ggml-cpu ggml-base; do
        libraries="$libraries $folder/ggml-build/src/lib$part.a"
    done
else
    lack ggml
fi
if step "numkong: source of $numkong" download $numkong; then
    defines="$defines -DPEERS_NUMKONG -isystem $folder/$numkong/include"
else
    lack numkong
fi
if step 'OpenBLAS' find_openblas; then
    defines="$defines $(cat openblas.cflags)"
    libraries="$libraries $(cat openblas.libs)"
else
    lack OpenBLAS
fi
step 'the peers' build_peers || fail 'bench/peers.c does not build'
if [ -n "$torch" ]; then
    step 'torch (3 GB, some minutes)' venv/bin/pip install torch numpy || lack torch
fi
if [ -n "$reference" ]; then
    mkdir -p reference && cp "$reference/balanced_walk.py" reference/ || lack reference
fi
if [ -n "$missing" ]; then
    fail "without:$missing. Run it again, with network, to add them."
fi
echo "in $folder; now: build/bench/speed --peers"
