#!/bin/sh
# Makes build/web/balancekv.html, one file to be opened from anywhere: sh examples/web/build.sh
# Needs clang with wasm-ld, or else Python 3, to fetch the compiler of ziglang into build/venv.
# Environment: WASM_CC, a compiler to take instead.
set -eu
cd "$(dirname -- "$0")/../.."
mkdir -p build/web
options='-std=c99 -O2 -mbulk-memory -msimd128 -Wall -Wextra -Wconversion -Wshadow -ffreestanding -nostdlib'

try() { # compiler and its options
    # shellcheck disable=SC2086 # options are meant to split
    "$@" $options -Wl,--no-entry,--strip-all -I. examples/web/web.c -o build/web/web.wasm
}

if [ -n "${WASM_CC:-}" ]; then
    # shellcheck disable=SC2086
    try $WASM_CC
elif ! try clang --target=wasm32 2>build/web/clang.log; then
    [ -x build/venv/bin/python ] || python3 -m venv build/venv
    build/venv/bin/python -m ziglang version >/dev/null 2>&1 ||
        build/venv/bin/python -m pip install --quiet ziglang==0.17.1
    try build/venv/bin/python -m ziglang cc --target=wasm32-freestanding
fi

# A line @file@ of the page becomes that file in base64.
while IFS= read -r line; do
    case $line in
    @*@) base64 <"$(echo "$line" | tr -d @)" | tr -d '\n' && echo ;;
    *) printf '%s\n' "$line" ;;
    esac
done <examples/web/page.html >build/web/balancekv.html
echo "$(wc -c <build/web/web.wasm) bytes of WebAssembly, $(wc -c <build/web/balancekv.html) in build/web/balancekv.html"
