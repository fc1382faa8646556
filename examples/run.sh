#!/bin/sh
# Builds examples/stream.c and runs it on the recorded trace beside it. Needs a C compiler, nothing
# else. Arguments go to the program: sh examples/run.sh --help
# Environment: CC, CFLAGS; BUILD_DIR, the folder of the program and the picture.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

cc=
for candidate in "${CC:-}" cc gcc clang; do
    # CC may hold options behind the name of the compiler.
    if [ -n "$candidate" ] && command -v "${candidate%% *}" >/dev/null 2>&1; then
        cc=$candidate
        break
    fi
    [ -z "$candidate" ] || [ "$candidate" != "${CC:-}" ] ||
        echo "run.sh: CC=$CC is not there; looking for cc, gcc, clang" >&2
done
if [ -z "$cc" ]; then
    echo "run.sh: no C compiler: install gcc or clang (Debian: gcc libc6-dev), or set CC" >&2
    exit 1
fi

build=${BUILD_DIR:-$root/build/examples-run}
if ! mkdir -p "$build" 2>/dev/null || [ ! -w "$build" ]; then
    build=$(mktemp -d "${TMPDIR:-/tmp}/balancekv.XXXXXX")
fi
build=$(CDPATH='' cd -- "$build" && pwd)

# Built anew if a source is newer than the program, or if the compiler is another one.
command="$cc -std=c99 -O2 ${CFLAGS:-}"
newer=$(find "$root/balancekv.h" "$root/examples/stream.c" "$root/examples/npy.h" \
    -newer "$build/stream" 2>/dev/null) || newer=all
if [ -n "$newer" ] || [ "$(cat "$build/stream.built-by" 2>/dev/null)" != "$command" ]; then
    # shellcheck disable=SC2086 # the command is meant to split
    if ! $command -I"$root" "$root/examples/stream.c" -o "$build/stream.$$" -lm; then
        echo "run.sh: '$command' could not build examples/stream.c" >&2
        echo '#include <stdio.h>' | $command -fsyntax-only -x c - 2>/dev/null ||
            echo 'run.sh: the headers of the C library are missing (Debian: libc6-dev)' >&2
        exit 1
    fi
    mv -f "$build/stream.$$" "$build/stream"
    echo "$command" >"$build/stream.built-by"
fi

# Of several folders or pictures the last one counts, so the caller's win.
exec "$build/stream" "$root/examples/trace" --svg "$build/survivors.svg" "$@"
