#!/bin/sh
# The release checklist, run:  sh tests/release.sh [--no-tests]
# Every item is done and ticked; the archive for packagers is in build/release/ at the end. Publishes
# nothing: the last lines say what is left to do by hand. Takes as long as .ci/run, and a quarter of
# an hour; needs root, for tests/fresh.sh. --no-tests leaves out .ci/run, which must have run before.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
out=$root/build/release
PATH=$root/build/venv/bin:$PATH # of tests/run.sh
rm -rf "$out" && mkdir -p "$out" || exit 1
version=$(sed -n 's/^#define BKV_VERSION "\(.*\)"$/\1/p' balancekv.h)
name=balancekv-$version
missed=0

item() { # what, command...
    what=$1 log=$out/$(echo "$1" | tr -cs 'A-Za-z0-9\n' _).log
    shift
    if "$@" >"$log" 2>&1 </dev/null; then
        echo "[x] $what"
    else
        echo "[ ] $what"
        tail -n 20 "$log" | sed 's/^/        /'
        missed=$((missed + 1))
    fi
}

nothing_left() { # nothing but commits, nothing forgotten
    changed=$(git status --porcelain) && echo "$changed" && [ -z "$changed" ]
}

# Header, Meson, CHANGELOG and recipes agree; also form, contents, links.
versions() { python3 tests/check_header.py; }

dated() {
    grep -n "^## $version " CHANGELOG.md
    grep -Eq "^## $version \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$" CHANGELOG.md
}

tag_is_free() {
    at=$(git rev-parse -q --verify "refs/tags/v$version^{commit}") || return 0
    echo "v$version is $at" && [ "$at" = "$(git rev-parse HEAD)" ]
}

archive() {
    git archive --format=tar --prefix="$name/" HEAD >"$out/$name.tar" &&
        gzip -n9 "$out/$name.tar" && (cd "$out" && sha256sum "$name.tar.gz" >"$name.sha256")
}

# A stranger's first minute: the archive, a compiler, no git.
first_minute() {
    (cd "$out" && gzip -dc "$name.tar.gz" | tar xf -) &&
        start=$(date +%s) && sh "$out/$name/examples/run.sh" --svg "$out/survivors.svg" &&
        seconds=$(($(date +%s) - start)) && echo "$seconds s" && [ "$seconds" -le 60 ]
}

packaged() { # along every route: none may be left out here, but vcpkg may run in plain CMake
    python3 "$out/$name/tests/test_packaging.py" >"$out/routes.log" || cat "$out/routes.log"
    tail -n 1 "$out/routes.log" | grep -q ' 0 failed$' && ! grep '^left out: packaging' "$out/routes.log"
}

# Every row, all of this header.
matrix() {
    blob=$(git rev-parse HEAD:balancekv.h | cut -c 1-7)
    sed -n 's/^| .* \([0-9a-f]\{7\}\) |$/\1/p' tests/MATRIX.md | sort | uniq -c | tee "$out/matrix"
    [ "$(wc -l <"$out/matrix")" -eq 1 ] && grep -q " $blob$" "$out/matrix"
}

everything() { .ci/run && [ -z "$(git status --porcelain)" ]; }

echo "balancekv.h $version"
item 'everything is committed' nothing_left
item 'the versions agree: header, Meson, CHANGELOG, recipes' versions
item 'CHANGELOG.md gives the version a date' dated
item "the tag v$version is free, or here" tag_is_free
item 'an archive is made' archive
item 'its main job runs within 60 s' first_minute
[ "${1:-}" = --no-tests ] || item 'every test passes, as in CI, and leaves the tree clean' everything
item 'tests/MATRIX.md is of this header: sh tests/matrix.sh --write' matrix
item 'it can be consumed along every route' packaged
item 'a new user on a fresh Debian gets along' sh tests/fresh.sh
rm -rf "${out:?}/$name"

echo
if [ "$missed" -gt 0 ]; then
    echo "$missed not done; logs: $out"
    exit 1
fi
cat <<END
All done. By hand: tests/long.sh, tests/mutate.py --markdown, tests/sizes.py and the benchmarks, into
README.md; read it once as a stranger; then
    git tag -a v$version -m "balancekv.h $version" && git push --tags
and publish $out/$name.tar.gz with its checksum.
END
