#!/bin/sh
# Builds examples/freestanding.c without a C library for the targets named (default: all whose tools
# are there), runs each in its emulator, and compares the check sum with that of an ordinary build.
#     sh examples/freestanding.sh [cortex-m7] [aarch64] [x86-64]
# Debian: gcc-arm-none-eabi qemu-system-arm, gcc-aarch64-linux-gnu qemu-user. Environment: CC.
set -eu
cd "$(dirname -- "$0")/.."
build=build/freestanding
mkdir -p "$build"
bare='-std=c99 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -ffreestanding -nostdlib -static'
cc=${CC:-cc}

compile() { # compiler and its options
    "$@" -I. examples/freestanding.c -o "$build/$target" -lgcc
}

build_and_run() {
    # shellcheck disable=SC2086 # options are meant to split
    case $target in
    cortex-m7)
        # Flash at 0, memory at 2^29. libgcc: arithmetic that the CPU lacks, 64-bit division.
        compile arm-none-eabi-gcc $bare -Os -mcpu=cortex-m7 -mfpu=fpv5-d16 -mfloat-abi=hard \
            -mthumb -Wl,--section-start=.vectors=0,-Ttext=64,-Tdata=0x20000000,-e,0 \
            -Wl,--defsym=stack_top=0x20100000 &&
            timeout 300 qemu-system-arm -M mps2-an500 -nographic -monitor none -serial null \
                -semihosting-config enable=on,target=native -kernel "$build/$target"
        ;;
    aarch64)
        compile aarch64-linux-gnu-gcc $bare -O2 && qemu-aarch64 "$build/$target"
        ;;
    x86-64) # the SIMD backends would do, too, but their headers want a C library
        compile $cc $bare -O2 -DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR && "$build/$target"
        ;;
    *) echo "no such target: $target" && return 1 ;;
    esac
}

if [ $# -eq 0 ]; then
    ! command -v arm-none-eabi-gcc qemu-system-arm >/dev/null || set -- "$@" cortex-m7
    ! command -v aarch64-linux-gnu-gcc qemu-aarch64 >/dev/null || set -- "$@" aarch64
    [ "$(uname -sm)" != 'Linux x86_64' ] || set -- "$@" x86-64
fi
target=hosted passed=0 failed=0
# shellcheck disable=SC2086
compile $cc -std=c99 -O2
want=$("$build/$target")
printf '%-10s %s\n' "$target" "$want"
for target; do
    if got=$(build_and_run 2>&1) && [ "$got" = "$want" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    printf '%-10s %s\n' "$target" "$got"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
