#!/usr/bin/env python3
"""bench/capacity: its numbers are bkv_size()'s and arithmetic, its text is its JSON.

    test_capacity.py PROGRAM
"""
import json
import os
import subprocess
import sys
import tempfile

from bad_config import ROOT, Tally, compile_text, run

SIZE = """#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"
#include <stdio.h>
int main(void) {
    bkv_config cfg = bkv_config_default(9, 3, 64, 1024);
    printf("%zu", bkv_size(&cfg));
    return 0;
}
"""


def main():
    tally, program = Tally(), os.path.abspath(sys.argv[1])

    def output(*options):
        return subprocess.run([program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, check=False)

    rows = [json.loads(line) for line in output("--json").stdout.splitlines()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    tally.check(len(models) >= 15 and len(rows) == 8 * len(models), "three lengths, five budgets",
                "%d models, %d rows" % (len(models), len(rows)))
    full = {(r["model"], r["full_tokens"]): r["bytes"] for r in rows if "full_tokens" in r}
    ours = {(r["model"], r["budget"]): r["bytes"] for r in rows if "budget" in r}
    for row in rows:
        tally.check(row["sessions"] == {str(gb): (gb << 30) // row["bytes"] for gb in (8, 64, 512)},
                    "sessions are memory / bytes", str(row))
    tally.check(full["SmolLM2-135M", 8192] == 30 * 8192 * 2 * 3 * 64 * 2, "a full cache by hand")
    tally.check(full["Gemma-3-1B", 32768] == (4 * 32768 + 22 * 512) * 2 * 256 * 2,
                "layers of a sliding window keep the window")
    with tempfile.TemporaryDirectory() as folder:
        size = os.path.join(folder, "size")
        built = compile_text(os.environ.get("CC", "cc"), ["-o", size], SIZE)
        tally.check(built.returncode == 0, "a program that asks bkv_size()", built.stdout)
        tally.check(ours["SmolLM2-135M", 1024] == 30 * int(run([size]).stdout),
                    "ours is bkv_size() of every layer")
    for model in models:
        bytes_of = [ours[model, budget] for budget in (512, 1024, 2048, 4096, 8192)]
        tally.check(bytes_of == sorted(set(bytes_of)), model + ": bytes grow with the budget")

    text = [line.split() for line in output().stdout.splitlines()]
    wide = [line for line in text if line and line[0] in models]
    tally.check(len(wide) == 4 * len(models), "four tables", str(len(wide)))
    for line, model in zip(wide, models):
        wanted = [full[model, n] for n in (8192, 32768, 131072)] + [
            ours[model, n] for n in (512, 1024, 2048, 4096, 8192)]
        tally.check(line[1:] == ["%.1f" % (n / 2 ** 20) for n in wanted], model + ": the text",
                    str(line))
    with open(ROOT + "/README.md", encoding="utf-8") as file:
        section = file.read().split("\n## Capacity\n", maxsplit=1)[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.split("|")[1:2] and line[2:3].isalpha()]
    rows = ["| " + " | ".join(line) + " |" for line in wide[:len(models)]]
    kinds, more, slots = ("f32", "f16", "i8", "i4"), {}, {}
    for kind in kinds:
        text = [line.split() for line in output("--type", kind).stdout.splitlines()]
        wide = [line for line in text if line and line[0] in models]
        rows += ["| %s, %s | " % (line[0], kind) + " | ".join(line[1:]) + " |" for line in wide]
        ran = [json.loads(x) for x in output("--json", "--type", kind).stdout.splitlines()]
        more[kind] = {(r["model"], r["budget"]): r["bytes"] for r in ran if "budget" in r}
        slots[kind] = {(r["model"], r["budget"]): r["slots_for_f16"] for r in ran if "budget" in r}
        tally.check(kind == "f16" or [line[1:] for line in wide[4 * len(models):]] == [
            [str(slots[kind][model, n]) for n in (512, 1024, 2048, 4096, 8192)]
            for model in models], "slots of %s in the bytes of f16: the text" % kind)
    tally.check(len(shown) >= 5, "README shows some models")
    for line in shown:
        tally.check(line in rows, "README has what is printed", line + "\n" + "\n".join(
            row for row in rows if row.split("|")[1] == line.split("|")[1]))
    tally.check(more["f16"] == ours and all(slots["f16"][key] == key[1] for key in ours),
                "the default is f16")
    for large, small in zip(kinds, kinds[1:]):
        tally.check(all(more[large][key] > more[small][key] and
                        slots[large][key] < slots[small][key] for key in ours),
                    "%s weighs more than %s" % (large, small))
    for options, text in ((["--type"], "--type needs a value; --help explains it"),
                          (["--type", "f31"], "--type: 'f31' is none of: f32 f16 bf16 i8 i4"),
                          (["--budget"], "unknown option '--budget'; --help lists them"),
                          (["--json", "512"], "unknown option '512'; --help lists them")):
        ran = output(*options)
        tally.check((ran.returncode, ran.stderr) == (2, "capacity: %s\n" % text),
                    "%s is refused" % options, ran.stderr)
    tally.check("usage" in output("--help").stdout, "--help helps")
    tally.done()


if __name__ == "__main__":
    main()
