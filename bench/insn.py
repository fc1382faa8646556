#!/usr/bin/env python3
"""Counts instructions (valgrind's callgrind) of the fixed work of bench/insn.c and compares them
with bench/insn.json: a regression gate that a noisy machine cannot fool. More than 2 % more or fewer
fail; fewer, so that the baseline is never loose.

    insn.py [--header FILE]     compare; the last line is "N passed, N failed"
    insn.py --update            store the counts of this compiler
    insn.py --why-not           print why it cannot compare here; nothing if it can

Counts are of one compiler: the baseline holds some for each it knows. They leave out the C library,
whose memcpy depends on the CPU. valgrind has no AVX-512, so the backends are scalar and AVX2.
Environment: CC.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BASELINE = os.path.join(HERE, "insn.json")
TOLERANCE = 0.02
BACKENDS = ("scalar", "avx2")
CC = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "cc")


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compiler():
    """Name, version and target: what the counts depend on."""
    macros = output(*CC.split(), "-dM", "-E", "-xc", os.devnull)
    macro = dict(re.findall(r"^#define (\w+) (.*)$", macros, re.M))
    name = "clang" if "__clang__" in macro else "gcc"
    version = "%s.%s.%s" % (tuple(macro["__clang_%s__" % part] for part in
                                  ("major", "minor", "patchlevel")) if name == "clang" else
                            (macro["__GNUC__"], macro["__GNUC_MINOR__"],
                             macro["__GNUC_PATCHLEVEL__"]))
    return "%s %s %s" % (name, version, "x86_64" if "__x86_64__" in macro else "other")


def own_cost(path, program):
    """Sum of a callgrind file over the functions of the program itself."""
    total, own, inclusive, names = 0, False, False, {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            match = re.match(r"ob=\((\d+)\)(?: (.*))?", line)
            if match:
                if match[2]:
                    names[match[1]] = match[2].strip()
                own = os.path.basename(names[match[1]]) == program
            match = re.match(r"cob=\((\d+)\) (.*)", line)
            if match:
                names[match[1]] = match[2].strip()
            if re.match(r"[+\-*\d]", line):
                if own and not inclusive:
                    total += int(line.split()[1])
                inclusive = False
            elif line.startswith("calls="):
                inclusive = True  # the next line is the cost of the callee
    return total


def count(header):
    """{scenario, backend: instructions}"""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "insn")
        shutil.copy(header, os.path.join(folder, "balancekv.h"))
        output(*CC.split(), "-std=c99", "-O2", "-I", folder, os.path.join(HERE, "insn.c"),
               "-o", program)
        for name in output(program).splitlines():
            for backend in BACKENDS:
                out = os.path.join(folder, "out")
                output("valgrind", "--tool=callgrind", "--toggle-collect=work",
                       "--callgrind-out-file=" + out, program, name, backend)
                counts["%s, %s" % (name, backend)] = own_cost(out, "insn")
    return counts


def compare(counts, known):
    """Prints both, and gives the numbers of good and bad."""
    bad = 0
    for name in sorted(set(counts) | set(known)):
        now, then = counts.get(name, 0), known.get(name, 0)
        change = now / then - 1 if now and then else float("inf")
        verdict = "ok"
        if not abs(change) <= TOLERANCE:
            bad += 1
            verdict = ("MORE" if change > 0 else "FEWER: store it with bench/insn.py --update")
        print("%-34s %11d %11d  %+6.2f %%  %s" % (name, then, now, 100 * change, verdict))
    return len(set(counts) | set(known)) - bad, bad


def main(args):
    header = os.path.join(HERE, "..", "balancekv.h")
    if args[:1] == ["--header"] and len(args) == 2:
        header = args[1]
    elif args not in ([], ["--update"], ["--why-not"]):
        sys.exit(__doc__)
    with open(BASELINE, encoding="utf-8") as f:
        baseline = json.load(f)
    key = compiler()
    if "--why-not" in args:
        if not shutil.which("valgrind"):
            print("no valgrind")
        elif key not in baseline:
            print("no counts of %s in bench/insn.json, only of %s" % (key, ", ".join(baseline)))
        return 0
    if "--update" in args:
        baseline[key] = count(header)
        with open(BASELINE, "w", encoding="utf-8") as f:
            json.dump(baseline, f, indent=1, sort_keys=True)
            f.write("\n")
        print("stored %d counts of %s" % (len(baseline[key]), key))
        return 0
    if key not in baseline:
        sys.exit("insn.py: no counts of %s in bench/insn.json; --update stores them" % key)
    print("%-34s %11s %11s" % (key, "stored", "now"))
    good, bad = compare(count(header), baseline[key])
    print("%d passed, %d failed" % (good, bad))
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
