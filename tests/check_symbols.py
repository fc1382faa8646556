#!/usr/bin/env python3
"""What the compiled header gives to a program and takes from it: symbols, data, stack, macros,
and several inclusions and translation units.

    check_symbols.py [COMPILER...]      default: those found among gcc, clang, clang-14, clang-16

Ends with a table of code bytes and the largest stack frame of each configuration.
"""
import os
import re
import tempfile
from itertools import product

from bad_config import (IMPLEMENTATION, STATIC, USER, WARNINGS, Tally, backend_flags,
                        compile_text, compilers, knows_cxx, on_x86, run)

FRAME = 1024
# All that the library may call; the rest is put in by compilers of position-independent code and
# of hardened distributions.
CALLS = {"memcpy", "memset", "memmove", "__memcpy_chk", "__memset_chk", "__memmove_chk",
         "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
CONFIGURATIONS = [("default", [])] + [
    ("one backend: " + flags[0].rpartition("_")[2], flags + ["-DBALANCEKV_DISPATCH=0"])
    for flags in [["-DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR"]] + backend_flags()] + [
    ("default, head_dim 64, f16",
     ["-DBALANCEKV_HEAD_DIM=64", "-DBALANCEKV_KV_TYPE=BALANCEKV_F16"])]
INCLUDE = USER.split("\n", maxsplit=1)[0] + "\n"


# ---- one object --------------------------------------------------------------------------------
def symbols(path):
    """(name, type letter as in nm) of each symbol."""
    lines = run(["nm", path]).stdout.splitlines()
    return [(words[-1], words[-2]) for words in map(str.split, lines)]


def check_object(tally, where, path):
    found = symbols(path)
    tally.check(any(name == "bkv_append" for name, _ in found), where + ": no bkv_append?")
    tally.check_none(where + ": exported, but not bkv_*", [
        name for name, kind in found
        if kind.isupper() and kind != "U" and not name.startswith("bkv_")])
    tally.check_none(where + ": calls", [name for name, kind in found
                                         if kind in "Uvw" and name not in CALLS])
    tally.check_none(where + ": writable data", [name for name, kind in found
                                                 if kind in "bBcCdDsSgG"])
    # Sections show what nm may not name, such as padding or unnamed objects.
    sizes = sections(path)
    tally.check(not sizes["data"] and not sizes["bss"], where + ": .data or .bss", str(sizes))
    return sizes["text"]


def sections(path):
    names, numbers = [line.split() for line in run(["size", path]).stdout.splitlines()[:2]]
    return {name: int(number) for name, number in zip(names, numbers) if number.isdigit()}


def largest_frame(path):
    """(bytes, function) from a .su file; what the compiler cannot bound is over every limit."""
    frames = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            where, size, kind = line.split("\t")
            frames.append((int(size) if kind.strip() != "dynamic" else 1 << 30,
                           where.rpartition(":")[2]))
    return max(frames)


def check_configuration(tally, compiler, level, name, flags, directory):
    """One row of the table."""
    where = "%s %s, %s" % (compiler, level, name)
    path = os.path.join(directory, "header.o")
    result = compile_text(compiler, ["-std=c99", level, "-fstack-usage", "-c", "-o", path]
                          + IMPLEMENTATION + flags, INCLUDE)
    if not tally.check(result.returncode == 0, where + ": does not compile", result.stdout):
        return None
    text = check_object(tally, where, path)
    size, function = largest_frame(path[:-1] + "su")
    tally.check(size <= FRAME, "%s: the frame of %s has %d bytes" % (where, function, size))
    return "%-10s %s  %-28s %7d  %d %s" % (compiler, level, name, text, size, function)


# ---- macros ------------------------------------------------------------------------------------
def macros_left(compiler, flags):
    """Names that the header itself, not what it includes, leaves defined."""
    output = compile_text(compiler, ["-E", "-dD"] + flags, INCLUDE).stdout
    inside, left = False, set()
    for line in output.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        change = re.match(r"#(define|undef) (\w+)", line)
        if marker:
            inside = os.path.basename(marker.group(1)) == "balancekv.h"
        elif change and change.group(1) == "undef":
            left.discard(change.group(2))
        elif change and inside:
            left.add(change.group(2))
    return left


def check_macros(tally, compiler):
    for flags in ([], IMPLEMENTATION, STATIC, IMPLEMENTATION + ["-DBALANCEKV_DISPATCH=0"]):
        left = macros_left(compiler, flags)
        where = "%s %s" % (compiler, " ".join(flags))
        tally.check("BKV_VERSION_MAJOR" in left, where + ": no macros found?")
        tally.check_none(where + ": macros left behind", sorted(
            name for name in left if not re.match(r"(BALANCEKV|BKV)_", name)))


# ---- programs ----------------------------------------------------------------------------------
PINNED = STATIC + ["-DBALANCEKV_HEAD_DIM=16", "-DBALANCEKV_KV_TYPE=BALANCEKV_F16"]
SCALAR = STATIC + ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR"]
PROGRAMS = [  # name, then the flags of each source
    ("one implementation, one user", ("link_a.c", []), ("link_b.c", [])),
    ("a private copy beside a public one", ("link_a.c", []), ("link_b.c", STATIC)),
    ("two private copies", ("link_a.c", STATIC[1:]), ("link_b.c", STATIC)),
    ("a pinned copy beside the full one", ("link_a.c", []), ("link_b.c", PINNED)),
    ("a scalar copy beside the full one", ("link_a.c", []), ("link_b.c", SCALAR)),
    ("included five times", ("include_order.c", ["-std=c99"])),
    ("included five times, in place", ("include_order.c", ["-DBALANCEKV_DISPATCH=0"])),
]
PROGRAMS_CXX = [("C++11", ("include_cpp.cc", ["-std=c++11"])),
                ("C++20", ("include_cpp.cc", ["-std=c++20"]))]


def check_program(tally, compiler, name, sources, directory):
    where = "%s, %s" % (compiler, name)
    program = os.path.join(directory, "program")
    objects = []
    for source, flags in sources: # the same object is compiled once for all programs
        objects.append(os.path.join(directory, re.sub(r"\W", "_", " ".join([compiler, source] + flags))
                                    + ".o"))
        if os.path.exists(objects[-1]):
            continue
        result = run([compiler, "-I.", "-O1", "-c", "-o", objects[-1], "tests/" + source]
                     + WARNINGS + flags)
        if not tally.check(result.returncode == 0, where + ": " + source, result.stdout):
            return
    result = run([compiler, "-o", program] + objects)
    if tally.check(result.returncode == 0, where + ": does not link", result.stdout):
        result = run([program])
        tally.check(result.returncode == 0, where + ": runs with %d" % result.returncode,
                    result.stdout)


# Where -ffp-contract=fast may fuse a product with an addition: the product is exact, so no bit hangs
# on it. Twice a number in settle; an integer times its step in fetch, which bkv_export calls.
EXACT = re.compile(r"bkvi_(settle|fetch)_|bkv_export$")


def check_fused(tally, compiler, directory):
    """In the class BALANCEKV_FMA=0 every product is rounded by itself, whatever the compiler may do.
    Pinned and -O3, as short loops, once unrolled, are where a product comes next to an addition."""
    path = os.path.join(directory, "fused.s")
    avx2, avx512 = ["-mavx2", "-mfma", "-mf16c"], ["-march=skylake-avx512"]
    simds = [("SCALAR", avx2), ("AVX2", avx2), ("AVX512", avx512)] if on_x86() else []
    for simd, kv_type in product(simds, ("I8", "I4")):
        where = "%s, %s, %s" % (compiler, simd[0], kv_type)
        result = compile_text(compiler, simd[1] + [
            "-std=gnu99", "-O3", "-ffp-contract=fast", "-S", "-o", path, "-DBALANCEKV_FMA=0",
            "-DBALANCEKV_DISPATCH=0", "-DBALANCEKV_SIMD=BALANCEKV_SIMD_" + simd[0],
            "-DBALANCEKV_HEAD_DIM=16", "-DBALANCEKV_KV_TYPE=BALANCEKV_" + kv_type]
            + IMPLEMENTATION, INCLUDE)
        fused, name = [], ""
        with open(path, encoding="utf-8") as file:
            for line in file if result.returncode == 0 else []:
                label = re.match(r"(bkvi?_\w+)[.\w]*:", line)
                name = label[1] if label else name
                if re.search(r"\tvfn?m(add|sub)", line) and not EXACT.match(name):
                    fused.append(name + line)
        tally.check(result.returncode == 0, where + ": compiles", result.stdout)
        tally.check_none(where + ": fused where BALANCEKV_FMA=0 rounds", fused)


def main():
    tally = Tally()
    table = []
    with tempfile.TemporaryDirectory() as directory:
        for compiler in compilers():
            check_macros(tally, compiler)
            check_fused(tally, compiler, directory)
            for name, *sources in PROGRAMS + (PROGRAMS_CXX if knows_cxx(compiler) else []):
                check_program(tally, compiler, name, sources, directory)
            for level in ("-O2", "-Os"):
                for name, flags in CONFIGURATIONS:
                    table.append(check_configuration(tally, compiler, level, name, flags,
                                                     directory))
    print("%-10s %s  %-28s %7s  %s" % ("compiler", "   ", "configuration", "bytes",
                                       "largest frame"))
    print("\n".join(filter(None, table)))
    tally.done()


if __name__ == "__main__":
    main()
