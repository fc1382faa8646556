#!/usr/bin/env python3
"""Code bytes and the largest stack frame of balancekv.h, for a table of README.

    sizes.py [CROSS_FILE_NAME...]       default: those of tests/cross whose compiler is there

Bytes of .text and .rodata of the header alone, nothing of it removed by a linker; `pinned` is
head_dim 64, f16 and one backend.
"""
import os
import re
import shutil
import sys
import tempfile

from bad_config import IMPLEMENTATION, ROOT, compile_text, run
from check_symbols import INCLUDE, largest_frame

PINNED = ["-DBALANCEKV_HEAD_DIM=64", "-DBALANCEKV_KV_TYPE=BALANCEKV_F16", "-DBALANCEKV_DISPATCH=0"]
# name, cross file or None, more flags, backend
ROWS = [("x86-64", None, [], "all"),
        ("x86-64", None, ["-DBALANCEKV_DISPATCH=0", "-DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX2", "-mavx2",
                          "-mfma", "-mf16c"], "avx2"),
        ("aarch64", "aarch64", [], "neon"), ("armhf", "armhf", ["-mfpu=neon-vfpv4"], "scalar"),
        ("thumb, Cortex-M7", "armhf", ["-mthumb", "-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16"], "scalar"),
        ("riscv64", "riscv64", [], "scalar"), ("ppc64le", "ppc64le", [], "scalar"),
        ("s390x", "s390x", [], "scalar"), ("i686", "i686", [], "all")]


def compiler(cross):
    """The compiler of a cross file, as a list of words."""
    if cross is None:
        return ["gcc"]
    with open("%s/tests/cross/%s.ini" % (ROOT, cross), encoding="utf-8") as file:
        return re.findall(r"'([^']*)'", re.search(r"(?m)^c = (.*)$", file.read()).group(1))


def measure(command, flags, directory):
    """(bytes of code, largest frame)"""
    path = os.path.join(directory, "header.o")
    result = compile_text(command[0], command[1:] + ["-std=c99", "-fstack-usage", "-c", "-o", path]
                          + IMPLEMENTATION + flags, INCLUDE)
    if result.returncode:
        sys.exit(result.stdout)
    lines = [line.split() for line in run(["size", "-A", path]).stdout.splitlines()]
    size = sum(int(line[1]) for line in lines if line and re.match(r"\.(text|rodata)", line[0]))
    return size, largest_frame(path[:-1] + "su")[0]


def main():
    print("| target | compiler | backend | pinned -Os | pinned -O2 | everything -Os | everything -O2 "
          "| largest frame |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name, cross, flags, backend in ROWS:
            command = compiler(cross)
            if not shutil.which(command[0]) or (sys.argv[1:] and cross not in sys.argv[1:]):
                continue
            cells = [measure(command, flags + pinned + [level], directory)
                     for pinned in ([] if backend == "all" else PINNED, [])
                     for level in ("-Os", "-O2")]
            if backend == "all":
                cells[:2] = [None, None]
            version = run([command[0], "-dumpversion"]).stdout.strip()
            print("| %s | gcc %s | %s | %s | %d |" % (
                name, version, backend,
                " | ".join(cell and "{:,}".format(cell[0]) or "-" for cell in cells),
                max(cell[1] for cell in cells if cell)))


if __name__ == "__main__":
    main()
