#!/bin/sh
# Builds balancekv.h as a shared library for balancekv.py. Needs a C compiler, nothing else.
# Environment: CC, CFLAGS; BUILD_DIR, the folder of the library (default: build/python).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
build=${BUILD_DIR:-$root/build/python}
mkdir -p "$build"
# The header is its own source file; the library gets every backend and chooses at run time.
# shellcheck disable=SC2086 # CC and CFLAGS are meant to split
${CC:-cc} -std=c99 -O2 ${CFLAGS:-} -shared -fPIC -I"$root" -DBALANCEKV_IMPLEMENTATION \
    -x c "$root/balancekv.h" -o "$build/libbalancekv.so"
echo "$build/libbalancekv.so"
