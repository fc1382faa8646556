#!/usr/bin/env python3
"""Code bytes and the largest stack frame of balancekv.h on each target, for the table of README.

    sizes.py [TARGET...]       default: all rows below; one without compiler fails under CI=true

Bytes of .text and .rodata. `object`: of the header alone, all public functions. `program`: what of it
stays in a program that calls bkv_init, bkv_append and bkv_attend, linked with --gc-sections; neither the
program's own code nor what is needed of libgcc and the C library. `pinned`: head_dim 64 and f16. `run`:
examples/freestanding.c, at -Os, here or in an emulator, gave the check sum that it gives on this machine.
A frame of more than 1 KiB fails, and so does a program or an object that outgrows its limit.
"""
import os
import re
import shutil
import sys
import tempfile

from bad_config import IMPLEMENTATION, ROOT, Tally, compile_text, run
from check_symbols import FRAME, INCLUDE, largest_frame

PINNED = ["-DBALANCEKV_HEAD_DIM=64", "-DBALANCEKV_KV_TYPE=BALANCEKV_F16"]
ONE = ["-DBALANCEKV_DISPATCH=0"]
USER = INCLUDE + """
bkv_result use(bkv_cache *c, const bkv_config *cfg, void *mem, size_t n, bkv_tensor *t, float *out);
bkv_result use(bkv_cache *c, const bkv_config *cfg, void *mem, size_t n, bkv_tensor *t, float *out) {
    bkv_result r = bkv_init(c, cfg, mem, n);
    if (r == BKV_OK) r = bkv_append(c, t[0], t[1], 1, 0, 0, 1);
    return r == BKV_OK ? bkv_attend(c, t[2], out, 0, 1) : r;
}
"""
SECTIONS = ["-ffunction-sections", "-fdata-sections"]
LINK = "-nostdlib -static -Wl,--gc-sections,-e,use,--unresolved-symbols=ignore-all".split()
ANY = 1 << 20
with open("/proc/cpuinfo", encoding="utf-8") as cpu:
    CPU_HAS_AVX512 = "avx512f" in cpu.read()
# target, file in tests/cross or None, more flags, backends; pinned program and object, -Os, at most
ROWS = [("x86-64", None, [], "scalar, AVX2, AVX-512", ANY, ANY),
        ("x86-64, AVX-512", None, ONE + ["-march=skylake-avx512"], "AVX-512", ANY, ANY),
        ("x86-64, AVX2", None, ONE + ["-mavx2", "-mfma", "-mf16c"], "AVX2", ANY, ANY),
        ("i686", "i686", [], "scalar, AVX2", ANY, ANY),
        ("aarch64", "aarch64", ONE, "NEON", ANY, 24 << 10),
        ("armhf", "armhf", ONE + ["-mfpu=neon-vfpv4"], "scalar", ANY, ANY),
        ("thumb", "armhf", ONE + "-mthumb -mcpu=cortex-m7 -mfpu=fpv5-d16 -Wl,--no-warn-mismatch".split(),
         "scalar", 12 << 10, ANY),
        ("riscv64", "riscv64", ONE, "scalar", ANY, ANY),
        ("ppc64le", "ppc64le", ONE, "scalar", ANY, ANY),
        ("s390x", "s390x", ONE, "scalar", ANY, ANY)]


def tools(cross, key):
    """Compiler (c) or emulator (exe_wrapper) in a cross file, as a list of words."""
    if cross is None:
        return ["gcc"] if key == "c" else []
    with open("%s/tests/cross/%s.ini" % (ROOT, cross), encoding="utf-8") as file:
        return re.findall(r"'([^']*)'", re.search(r"(?m)^%s = (.*)$" % key, file.read()).group(1))


def build(command, flags, text, path):
    result = compile_text(command[0], command[1:] + ["-std=c99", "-o", path] + flags, text)
    if result.returncode:
        sys.exit("%s %s\n%s" % (" ".join(command), " ".join(flags), result.stdout))


def code_bytes(path):
    lines = [line.split() for line in run(["size", "-A", path]).stdout.splitlines()]
    return sum(int(line[1]) for line in lines if line and re.match(r"\.(text|rodata)", line[0]))


def measure(command, flags, directory):
    """Bytes of the header alone, and its largest frame."""
    path = os.path.join(directory, "header.o")
    build(command, flags + IMPLEMENTATION + SECTIONS + ["-fstack-usage", "-c"], INCLUDE, path)
    return code_bytes(path), largest_frame(path[:-1] + "su")


def measure_program(command, flags, directory):
    """What of header.o stays in a program of USER."""
    user, path = os.path.join(directory, "user.o"), os.path.join(directory, "program")
    build(command, flags + ["-c"], USER, user)
    result = run(command + flags + LINK + ["-o", path, user, os.path.join(directory, "header.o")])
    if result.returncode:
        sys.exit(result.stdout)
    return code_bytes(path) - code_bytes(user)


def check_sum(command, flags, wrapper, directory):
    """What examples/freestanding.c prints, or None where nothing can run it."""
    path = os.path.join(directory, "program")
    result = run(command + ["-std=c99", "-Os", "-I.", "-o", path, "examples/freestanding.c"] + flags)
    if result.returncode or not all(shutil.which(word) for word in wrapper[:1]):
        return None
    if any("avx512" in flag for flag in flags) and not CPU_HAS_AVX512:
        return None
    return run(wrapper + [path]).stdout


def row(tally, target, cross, flags, backends, program_limit, object_limit, want, directory):
    command, sizes, programs, frames = tools(cross, "c"), [], [], []
    for more in PINNED + ["-Os"], PINNED + ["-O2"], ["-Os"], ["-O2"]:
        size, frame = measure(command, flags + more, directory)
        sizes.append(size)
        frames.append(frame)
        if more[1:]:
            programs.append(measure_program(command, flags + more, directory))
    tally.check(programs[0] <= program_limit, "%s: a program of %d bytes" % (target, programs[0]))
    tally.check(sizes[0] <= object_limit, "%s: an object of %d bytes" % (target, sizes[0]))
    cells = ["{:,}".format(number) for number in programs + sizes]
    size, function = max(frames)
    tally.check(size <= FRAME, "%s: the frame of %s has %d bytes" % (target, function, size))
    got = check_sum(command, flags, tools(cross, "exe_wrapper"), directory)
    tally.check(got in (None, want), "%s: %s, not %s" % (target, got, want))
    version = run([command[0], "-dumpversion"]).stdout.strip()
    print("| %s | gcc %s | %s | %s | %d | %s |" % (target, version, backends, " | ".join(cells), size,
                                                 "run" if got else "compiled"), flush=True)


def main():
    tally = Tally()
    print("| target | compiler | backends | pinned program, -Os | -O2 | pinned object, -Os | -O2 "
          "| object, -Os | -O2 | largest frame | |\n|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        want = check_sum(["gcc"], [], [], directory)
        for target, cross, *rest in ROWS:
            if sys.argv[1:] and target not in sys.argv[1:]:
                continue
            compiler = tools(cross, "c")[0]
            if shutil.which(compiler):
                row(tally, target, cross, *rest, want, directory)
            elif tally.check(os.environ.get("CI") != "true", "no %s for %s" % (compiler, target)):
                print("left out: %s, no %s" % (target, compiler))
    tally.done()


if __name__ == "__main__":
    main()
