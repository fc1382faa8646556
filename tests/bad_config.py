#!/usr/bin/env python3
"""Compile-time switches: each wrong value must stop the compiler with the header's own #error, each
legal combination must compile without a warning, in every standard, with every compiler found.

    bad_config.py [COMPILER...]      default: those found among gcc, clang, clang-14, clang-16

check_header.py and check_symbols.py take the helpers below from here.
"""
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True  # leave no __pycache__ among the sources

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ERROR = "balancekv.h:"  # how each #error of the header begins
WARNINGS = ("-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef "
            "-Wunused-function -Werror").split()
IMPLEMENTATION = ["-DBALANCEKV_IMPLEMENTATION"]
STATIC = IMPLEMENTATION + ["-DBALANCEKV_STATIC"]
USER = '#include "balancekv.h"\nint main(void) { return bkv_version() == 0; }\n'


class Tally:
    """Counts checks; prints the failed ones, and at the end the line that tests/run.sh adds up."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, good, text, detail=""):
        if good:
            self.passed += 1
        else:
            self.failed += 1
            print("FAILED: %s" % text)
            print("".join("    %s\n" % line for line in detail.splitlines()[:8]), end="")
        return good

    def check_none(self, fault, places):
        return self.check(not places, fault, "\n".join(places))

    def done(self):
        print("%d passed, %d failed" % (self.passed, self.failed))
        sys.exit(self.failed != 0)


def compilers():
    """Those named on the command line, else those found; the same binary only once."""
    names = sys.argv[1:] or ["gcc", "clang", "clang-14", "clang-16"]
    found = {os.path.realpath(path): name for name in reversed(names)
             for path in [shutil.which(name)] if path}
    if not found or (sys.argv[1:] and len(found) < len(names)):
        sys.exit("no such compiler: %s" % " ".join(names))
    used = [name for name in names if name in found.values()]
    print("compilers: %s" % ", ".join("%s (%s)" % (c, version(c)) for c in used))
    return used


def version(compiler):
    return run([compiler, "--version"]).stdout.splitlines()[0]


def run(command, text=""):
    """Runs a command in the project's root; `text` is its standard input."""
    return subprocess.run(command, cwd=ROOT, input=text, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, check=False)


def compile_text(compiler, flags, text):
    """Compiles C (or, with a C++ standard among the flags, C++) from text."""
    language = "c++" if any("++" in flag for flag in flags) else "c"
    return run([compiler, "-I."] + flags + ["-x", language, "-"], text)


def knows_cxx(compiler):
    """Whether it compiles C++, too, library included; says so if not."""
    there = not run([compiler, "-fsyntax-only", "-x", "c++", "-"], "#include <memory>\n").returncode
    if not there:
        print("left out: C++: '%s' does not compile it (Debian: g++)" % compiler)
    return there


def on_x86():
    return platform.machine() in ("x86_64", "AMD64")


def backend_flags():
    """For BALANCEKV_DISPATCH=0: the switch and the -m flags of each backend of this machine."""
    if on_x86():
        return [["-DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX2", "-mavx2", "-mfma", "-mf16c"],
                ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX512", "-march=skylake-avx512"]]
    if platform.machine() in ("aarch64", "arm64"):
        return [["-DBALANCEKV_SIMD=BALANCEKV_SIMD_NEON"]]
    return []


# ---- wrong values ------------------------------------------------------------------------------
WRONG = ["-DBALANCEKV_SIMD=", "-DBALANCEKV_HEAD_DIM=", "-DBALANCEKV_KV_TYPE=",
         "-DBALANCEKV_SIMD=0", "-DBALANCEKV_SIMD=7", "-DBALANCEKV_SIMD=-1",
         "-DBALANCEKV_SIMD=BALANCEKV_SIMD_AXV2", "-DBALANCEKV_SIMD=AVX2",
         "-DBALANCEKV_SIMDE=2", "-DBALANCEKV_SIMDE=-1",
         "-DBALANCEKV_FMA=2", "-DBALANCEKV_FMA=-1", "-DBALANCEKV_DISPATCH=2", "-DBALANCEKV_DISPATCH=-1",
         "-DBALANCEKV_HEAD_DIM=0", "-DBALANCEKV_HEAD_DIM=513", "-DBALANCEKV_HEAD_DIM=-1",
         "-DBALANCEKV_KV_TYPE=0", "-DBALANCEKV_KV_TYPE=7", "-DBALANCEKV_KV_TYPE=BALANCEKV_F61",
         "-ffast-math", "-Ofast"]
X86_ONLY = ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX2", "-DBALANCEKV_SIMD=BALANCEKV_SIMD_AVX512"]
ARM_ONLY = ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_NEON"]
CROSS = "aarch64-linux-gnu-gcc"
# Not what a switch may say, but a target that would give other bits, or a compiler without vectors:
# compiler, machine on which it is this, flags.
TARGETS = [("gcc", on_x86, ["-mfpmath=387"]), ("tcc", lambda: True, []),
           ("arm-linux-gnueabihf-gcc", lambda: True, ["-mfpu=neon-vfpv4", "-DBALANCEKV_SIMDE"])]


def check_wrong(compiler, flags):
    """What to tell the tally: (good, text, detail)."""
    result = compile_text(compiler, ["-fsyntax-only"] + IMPLEMENTATION + flags, USER)
    said = re.search(r"error: (#error )?\"?%s" % ERROR, result.stdout)
    return (result.returncode != 0 and said,
            "%s %s must fail with the header's #error" % (compiler, " ".join(flags)),
            result.stdout)


# ---- legal combinations ------------------------------------------------------------------------
STANDARDS_C = ["-std=c99", "-std=c11", "-std=gnu17"]
STANDARDS = STANDARDS_C + ["-std=c++11", "-std=c++20"]


def legal():
    """Flag lists: every value of every switch, and the combinations that users will build."""
    yield []
    yield IMPLEMENTATION
    yield STATIC
    yield STATIC + ["-DBALANCEKV_HEAD_DIM=64", "-DBALANCEKV_KV_TYPE=BALANCEKV_F16"]
    for dim in (1, 80, 512):
        yield IMPLEMENTATION + ["-DBALANCEKV_HEAD_DIM=%d" % dim]
    for kv_type in ("F32", "F16", "BF16", "I8", "I4"):
        yield IMPLEMENTATION + ["-DBALANCEKV_KV_TYPE=BALANCEKV_" + kv_type]
    yield IMPLEMENTATION + ["-DBALANCEKV_API=__attribute__((visibility(\"default\"))) extern"]
    yield IMPLEMENTATION + ["-DBALANCEKV_HEADER_NAME=\"balancekv.h\""]
    yield IMPLEMENTATION + ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_AUTO"]
    yield IMPLEMENTATION + ["-DBALANCEKV_DISPATCH=0"]
    for implementation in (IMPLEMENTATION, STATIC):
        yield implementation + ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR"]
        yield implementation + ["-DBALANCEKV_SIMD=BALANCEKV_SIMD_SCALAR", "-DBALANCEKV_DISPATCH=0"]
        for flags in backend_flags():
            yield implementation + flags[:1]
            yield implementation + flags + ["-DBALANCEKV_DISPATCH=0"]
    yield IMPLEMENTATION + ["-DBALANCEKV_FMA=0"]
    if os.path.exists("/usr/include/simde/arm/neon.h"):
        yield IMPLEMENTATION + ["-DBALANCEKV_SIMDE"]
    yield IMPLEMENTATION + ["-ffast-math", "-DBALANCEKV_ALLOW_FAST_MATH"]


def effort(standard, flags):
    """How far to compile: gcc finds unused functions only in a whole compilation, and both find
    what needs data flow only when they optimise. Once in C and once in C++ is enough."""
    if standard in ("-std=c99", "-std=c++11") and flags in (IMPLEMENTATION, STATIC):
        return ["-O2", "-S", "-o", os.devnull]
    if standard == "-std=c99":
        return ["-O0", "-S", "-o", os.devnull]
    return ["-fsyntax-only"]


def check_legal(compiler, flags):
    """What to tell the tally: (good, text, detail)."""
    result = compile_text(compiler, WARNINGS + flags, USER)
    return (result.returncode == 0 and not result.stdout,
            "%s %s must compile without a warning" % (compiler, " ".join(flags)),
            result.stdout)


def main():
    tally = Tally()
    jobs = []
    for compiler in compilers():
        for wrong in WRONG + (ARM_ONLY if on_x86() else X86_ONLY):
            jobs.append((check_wrong, compiler, [wrong]))
        for standard in STANDARDS if knows_cxx(compiler) else STANDARDS_C:
            for flags in legal():
                jobs.append((check_legal, compiler, effort(standard, flags) + [standard] + flags))
        for simd in "SCALAR", "AVX2": # SIMDe has neither
            jobs.append((check_wrong, compiler,
                         ["-DBALANCEKV_SIMDE", "-DBALANCEKV_SIMD=BALANCEKV_SIMD_" + simd]))
    if on_x86() and shutil.which(CROSS):
        jobs += [(check_wrong, CROSS, [wrong]) for wrong in X86_ONLY]
    else:
        print("left out: wrong backends on AArch64 (no %s)" % CROSS)
    for compiler, here, flags in TARGETS:
        if here() and shutil.which(compiler):
            jobs.append((check_wrong, compiler, flags))
        else:
            print("left out: %s %s" % (compiler, " ".join(flags)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for verdict in pool.map(lambda job: job[0](*job[1:]), jobs):
            tally.check(*verdict)
    tally.done()


if __name__ == "__main__":
    main()
