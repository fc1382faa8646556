#!/usr/bin/env python3
"""How near the NEON inner loops of balancekv.h come to the FMLA limit of a core, by LLVM's
scheduling models: no ARM hardware needed, and no promise about it.

    neon_mca.py [--min 95] [--compiler "clang-16 --target=aarch64-linux-gnu"] [--mca llvm-mca-16]

The header is compiled for AArch64 as it is. Of every kernel the innermost loops with FMLA are taken
out of the assembly and run through llvm-mca, and so is the limit of each: the same numbers of FMLA
and of conversions of 16-bit storage, independent of each other and without a load. Exit code 1 if a
loop that converts nothing is below --min percent of its limit on any core; 77 if a tool is missing.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

CORES = "cortex-a76", "cortex-x2", "neoverse-n2", "neoverse-v2"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = {"bkvi_products_neon": "kernel matrix", "bkvi_attend_1_4_neon": "attend f32, 4 rows",
           "bkvi_attend_1_3_neon": "attend f32, 3 rows", "bkvi_attend_2_4_neon": "attend f16, 4 rows",
           "bkvi_attend_2_3_neon": "attend f16, 3 rows"}
CONVERT = re.compile(r"\b(fcvtl2?|ushll2?|shll2?|sshll2?|scvtf)\b")


def assembly(compiler):
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "header.c")
        with open(source, "w", encoding="utf-8") as file:
            file.write('#define BALANCEKV_IMPLEMENTATION\n#include "balancekv.h"\n')
        return subprocess.run(
            shlex.split(compiler) + ["-O2", "-S", "-I" + ROOT, "-I/usr/aarch64-linux-gnu/include",
                                     source, "-o", "-"],
            check=True, capture_output=True, text=True).stdout


def inner_loops(text, function):
    """Bodies of the innermost loops of a function that hold at least eight FMLA."""
    lines = text[text.index("\n%s:" % function):].splitlines()[1:]
    lines = lines[:next(i for i, line in enumerate(lines) if ".size" in line)]
    label = {m.group(1): i for i, m in enumerate(re.match(r"(\.L\w+):", x) for x in lines) if m}
    loops = []
    for end, line in enumerate(lines):
        branch = re.search(r"\b(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)$", line.split("//")[0].rstrip())
        if branch and label.get(branch.group(1), end) < end:
            loops.append((label[branch.group(1)], end + 1))
    for begin, end in loops:
        body = [x for x in lines[begin:end] if re.match(r"\s+[a-z]", x)]
        inside = any(begin < b < end for b, _ in loops)
        if not inside and sum("fmla" in x for x in body) >= 8:
            yield [x.split("//")[0] for x in body]


def cycles(mca, core, body):
    """Cycles per turn in the steady state."""
    def total(turns):
        run = subprocess.run([mca, "-mtriple=aarch64", "-mcpu=" + core, "-iterations=%d" % turns],
                             input="\n".join(body) + "\n", capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        return int(re.search(r"Total Cycles:\s+(\d+)", run.stdout).group(1))
    return (total(300) - total(100)) / 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--min", type=float, default=95)
    parser.add_argument("--compiler", default="clang-16 --target=aarch64-linux-gnu")
    parser.add_argument("--mca", default="llvm-mca-16")
    options = parser.parse_args()
    for tool in options.compiler.split()[0], options.mca:
        if not shutil.which(tool):
            print("%s is not installed" % tool)
            sys.exit(77)
    text, low = assembly(options.compiler), 0
    print("%-20s %4s %8s  FMLA per cycle, share of the limit: %s"
          % ("loop", "FMLA", "converts", ", ".join(CORES)))
    for function, name in KERNELS.items():
        for body in inner_loops(text, function):
            fmla = sum("fmla" in line for line in body)
            converts = [m.group(1) for m in map(CONVERT.search, body) if m]
            ideal = ["fmla v%d.4s, v30.4s, v31.s[0]" % (i % 24) for i in range(fmla)]
            ideal += ["%s v%d.4s, v29.%s" % (c, 25 + i % 4, "8h" if c.endswith("2") else "4h")
                      for i, c in enumerate(converts)]
            shares, rates = [], []
            for core in CORES:
                turn = cycles(options.mca, core, body)
                rates.append("%.2f" % (fmla / turn))
                shares.append(100 * cycles(options.mca, core, ideal) / turn)
            good = converts or min(shares) >= options.min
            low += not good
            print("%-20s %4d %8d  %s%s" % (name, fmla, len(converts), "  ".join(
                "%s %5.1f %%" % x for x in zip(rates, shares)), "" if good else "  below"))
    sys.exit(low > 0)


if __name__ == "__main__":
    main()
