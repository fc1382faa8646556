#!/bin/sh
# What a new user types, on a Debian that has a C compiler and Python and nothing else: the commands
# of README, every adapter, every way of installing.
#     sh tests/fresh.sh [--tests]            as root; --tests: sh tests/run.sh there, too
# debootstrap makes that Debian in build/fresh (600 MB, kept for the next time); the tree of HEAD is
# copied into it, git is not. Prints a row for each: what, its seconds, what had to be installed
# before. Packages come from the network, and their time is not counted. Ends with the line
# "N passed, N failed".
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
fresh=$root/build/fresh
there=$fresh/root
packages=gcc,g++,libc6-dev,python3-venv # README says so
passed=0 failed=0

fail() {
    echo "fresh.sh: $*" >&2
    exit 1
}
[ "$(id -u)" -eq 0 ] || fail 'chroot needs root'
command -v debootstrap >/dev/null || fail 'no debootstrap (Debian: debootstrap)'
clean() { # never with /proc mounted below
    ! mountpoint -q "$there/proc" || umount "$there/proc" || fail "cannot unmount $there/proc"
    rm -rf "$there"
}
trap clean EXIT
trap 'exit 130' INT TERM
mkdir -p "$fresh" && clean
if [ ! -e "$fresh/made" ]; then
    rm -rf "$fresh/base"
    debootstrap --variant=minbase --include=$packages,ca-certificates bookworm "$fresh/base" \
        >"$fresh/debootstrap.log" 2>&1 || fail "debootstrap failed: $fresh/debootstrap.log"
    touch "$fresh/made"
fi
cp -a "$fresh/base" "$there" && mount -t proc proc "$there/proc" || exit 1
# It trusts whom this machine trusts, and asks the same servers for names.
cp -L /etc/resolv.conf "$there/etc/" && mkdir "$there/root/balancekv" || exit 1
cp -L /etc/ssl/certs/ca-certificates.crt "$there/etc/ssl/certs/" || exit 1
git archive HEAD | tar xf - -C "$there/root/balancekv" || exit 1

inside() { # command, in the tree
    chroot "$there" env -i PATH=/root/tools/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt DEBIAN_FRONTEND=noninteractive \
        sh -c "cd /root/balancekv && $1" </dev/null
}

row() { # what, packages of Debian, or pip: and those of PyPI, command
    log=$fresh/$(echo "$1" | tr -cs 'A-Za-z0-9\n' _).log
    case $2 in
    '') needs=true ;;
    pip:*) needs="python3 -m venv /root/tools && /root/tools/bin/pip install -q ${2#pip:}" ;;
    *) needs="apt-get update -qq && apt-get install -y -qq --no-install-recommends $2" ;;
    esac
    inside "$needs" >"$log" 2>&1
    if inside "date +%s.%N >/tmp/times && { $3
        } && date +%s.%N >>/tmp/times" >>"$log" 2>&1; then
        passed=$((passed + 1))
        result=$(awk 'NR == 1 { start = $1 } END { printf "%.1f", $1 - start }' "$there/tmp/times")
    else
        failed=$((failed + 1)) result=FAILED
    fi
    echo "| $1 | $result | $2 |"
    [ "$result" != FAILED ] || tail -n 20 "$log"
}

echo '| what | seconds | installed for it |'
echo '|---|---|---|'
row 'first table, `sh examples/run.sh`' '' 'sh examples/run.sh'
row 'plain compiler, README'\''s program' '' \
    'cc -std=c99 -O2 -I. examples/minimal.c -o /tmp/minimal && /tmp/minimal'
row 'C++, README'\''s class' '' '{ echo "#define BALANCEKV_IMPLEMENTATION"
    sed -n "/^\`\`\`cpp/,/^\`\`\`/{/^\`\`\`/d;p}" README.md
    echo "int main() { Cache c(bkv_config_default(2, 1, 16, 256)); return bkv_reset(c.get()); }"
    } >/tmp/owner.cc && c++ -std=c++11 -O2 -I. /tmp/owner.cc -o /tmp/owner && /tmp/owner'
row 'strided tap' '' 'cc -std=c99 -O2 -I. examples/tap.c -o /tmp/tap && /tmp/tap'
row 'no C library' '' 'sh examples/freestanding.sh x86-64'
row 'diff of llama2.c, and its test' patch 'patch -o /tmp/bounded.c examples/llama2c/plain.c \
    examples/llama2c/balancekv.diff && cc -std=c99 -O2 -I. /tmp/bounded.c -o /tmp/bounded -lm &&
    python3 tests/test_adapters.py'
row 'Python, the lines of README' python3-numpy \
    'sh examples/python/build.sh && PYTHONPATH=examples/python python3 -m doctest README.md'
row 'Meson, a subproject' 'meson ninja-build' 'cp -r tests/consumer /tmp/app &&
    mkdir /tmp/app/subprojects && cp -r . /tmp/app/subprojects/balancekv && cd /tmp/app &&
    meson setup build && meson compile -C build && build/app'
row 'Meson'\''s install, pkg-config' pkg-config 'meson setup build && meson install -C build --no-rebuild &&
    cc $(pkg-config --cflags balancekv) tests/consumer/app.c -o /tmp/pc && /tmp/pc'
row 'CMake, of what Meson installed' 'cmake make' \
    'cmake -S tests/consumer -B /tmp/cm && cmake --build /tmp/cm && /tmp/cm/app'
row 'Conan' pip:conan \
    'conan profile detect --exist-ok && conan create packaging/conan'
row 'wrap file, port of vcpkg: their tests' '' 'python3 tests/test_packaging.py'
row 'ggml and a model, export through its flash attention' '' \
    'sh examples/llm/setup.sh && build/examples/llm/export'
[ "${1:-}" != --tests ] || row 'tests, `sh tests/run.sh`' '' \
    'rm -rf /root/.cache /root/tools build && sh tests/run.sh'
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
