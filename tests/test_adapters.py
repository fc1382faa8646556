#!/usr/bin/env python3
"""The C adapters: examples/llama2c, whose diff must apply and change nothing but memory while the
tokens fit, and examples/tap.c.

    test_adapters.py

Needs a C compiler and `patch`.
"""
import array
import os
import random
import re
import shutil
import subprocess
import tempfile

from bad_config import ROOT, WARNINGS, Tally, compilers

MAX_ADDED = 20  # lines: what the diff is to show
SHAPE = {"dim": 48, "hidden": 64, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab": 200,
         "seq_len": 600}
BUDGET = 256  # of the diff
TOKENS = 1000  # more than the plain cache holds


def run(command, folder):
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, check=False)


def write_model(path, shared=True, **changed):
    """A random checkpoint of llama2.c, version 0."""
    s = {**SHAPE, **changed}
    head_dim = s["dim"] // s["n_heads"]
    square, small = s["dim"] ** 2, s["dim"] * head_dim * s["n_kv_heads"]
    wide, draw = s["dim"] * s["hidden"], random.Random(3)

    def noise(n, scale):
        return array.array("f", (draw.gauss(0, scale) for _ in range(n)))

    def ones(n):
        return array.array("f", [1.0]) * n

    layers, spread = s["n_layers"], 2 * s["dim"] ** -0.5
    parts = [noise(s["vocab"] * s["dim"], 1), ones(layers * s["dim"])]
    parts += [noise(layers * n, spread) for n in (square, small, small, square)]
    parts += [ones(layers * s["dim"])] + [noise(layers * wide, spread) for _ in range(3)]
    parts += [ones(s["dim"]), array.array("f", bytes(4 * s["seq_len"] * head_dim))]
    if not shared:
        parts.append(noise(s["vocab"] * s["dim"], 1))
    with open(path, "wb") as file:
        array.array("i", [s["dim"], s["hidden"], layers, s["n_heads"], s["n_kv_heads"],
                          s["vocab"] if shared else -s["vocab"], s["seq_len"]]).tofile(file)
        for part in parts:
            part.tofile(file)
    return path


def build(tally, compiler, name, source, folder):
    program = os.path.join(folder, name)
    built = run([compiler, "-std=c99", "-O2", "-I" + ROOT] + WARNINGS + [source, "-o", program,
                                                                        "-lm"], folder)
    tally.check(built.returncode == 0 and not built.stderr, name + " builds clean", built.stderr)
    return program


def decode(tally, program, model, steps):
    """[(token, logit)] and the bytes of the cache."""
    ran = run([program, model, str(steps)], os.path.dirname(program))
    rows = [line.split() for line in ran.stdout.splitlines()]
    cache = re.search(r"cache: (\d+) bytes", ran.stdout)
    good = ran.returncode == 0 and cache and len(rows) == steps + 1
    if not tally.check(good, "%s decodes %d tokens" % (os.path.basename(program), steps),
                       ran.stderr):
        return [], 0
    return [(int(token), float(logit)) for _, token, logit in rows[:-1]], int(cache[1])


def check_llama2c(tally, compiler, folder):
    here = os.path.join(ROOT, "examples", "llama2c")
    diff = os.path.join(here, "balancekv.diff")
    with open(diff, encoding="utf-8") as file:
        added = re.findall(r"(?m)^\+(?!\+\+)", file.read())
    tally.check(0 < len(added) <= MAX_ADDED, "the diff adds at most %d lines" % MAX_ADDED,
                str(len(added)))
    patched = run(["patch", "--fuzz=0", "-o", "bounded.c", os.path.join(here, "plain.c"), diff],
                  folder)
    if not tally.check(patched.returncode == 0 and "offset" not in patched.stdout,
                       "the diff applies as it stands", patched.stdout + patched.stderr):
        return
    plain = build(tally, compiler, "plain", os.path.join(here, "plain.c"), folder)
    bounded = build(tally, compiler, "bounded", os.path.join(folder, "bounded.c"), folder)
    if not os.path.exists(plain) or not os.path.exists(bounded):
        return
    for name, model in (
            ("shared", write_model(os.path.join(folder, "shared.bin"))),
            ("own", write_model(os.path.join(folder, "own.bin"), shared=False))):
        full, full_bytes = decode(tally, plain, model, SHAPE["seq_len"])
        ours, our_bytes = decode(tally, bounded, model, TOKENS)
        tally.check(len(set(full)) > 30, name + ": the model says something", str(full[:5]))
        fitting = list(zip(full, ours))[:BUDGET - 64]
        tally.check(len(fitting) == BUDGET - 64 and
                    all(a[0] == b[0] and abs(a[1] - b[1]) < 1e-3 for a, b in fitting),
                    name + ": the same while the tokens fit the budget", str(fitting[-3:]))
        tally.check(full != ours[:len(full)], name + ": an estimate beyond it")
        tally.check(full_bytes == 2 * 4 * SHAPE["n_layers"] * SHAPE["seq_len"] * SHAPE["dim"] // 3
                    and 0 < our_bytes, name + ": the bytes of the caches",
                    "%d %d" % (full_bytes, our_bytes))
        longer, longer_bytes = decode(tally, bounded, model, 2 * TOKENS)
        tally.check(longer[:TOKENS] == ours and longer_bytes == our_bytes,
                    name + ": twice the tokens need no more")
    ran = run([plain, model, str(SHAPE["seq_len"] + 1)], folder)
    tally.check(ran.returncode == 1 and "the cache is full" in ran.stderr,
                "the plain cache ends where it ends", ran.stderr)
    for label, path, text in (
            ("no file", os.path.join(folder, "none.bin"), "cannot be read"),
            ("no model", diff, "no model of llama2.c"),
            ("odd heads", write_model(os.path.join(folder, "odd.bin"), n_kv_heads=4),
             "no model of llama2.c"),
            ("cut", None, "too short")):
        if path is None:
            path = os.path.join(folder, "cut.bin")
            with open(model, "rb") as whole, open(path, "wb") as cut:
                cut.write(whole.read()[:-4])
        for program in (plain, bounded):
            ran = run([program, path, "1"], folder)
            tally.check(ran.returncode == 1 and text in ran.stderr, "%s is refused" % label,
                        ran.stderr)


def check_tap(tally, compiler, folder):
    program = build(tally, compiler, "tap", os.path.join(ROOT, "examples", "tap.c"), folder)
    ran = run([program], folder)
    tally.check(ran.returncode == 0 and re.fullmatch(
        r"1920 tokens seen, \d+ held: the tap and dense arrays give the same bits\n", ran.stdout),
        "the tap gives what dense arrays give", ran.stdout + ran.stderr)
    # It would notice: with the strides of another layout it must say so.
    with open(os.path.join(ROOT, "examples", "tap.c"), encoding="utf-8") as file:
        text = file.read()
    wrong = text.replace("sizeof rt->v[0], sizeof rt->v[0][0]}", "sizeof rt->v[1] / 2, "
                         "sizeof rt->v[0][0]}")
    path = os.path.join(folder, "wrong.c")
    with open(path, "w", encoding="utf-8") as file:
        file.write(wrong)
    ran = run([build(tally, compiler, "wrong", path, folder)], folder)
    tally.check(wrong != text and ran.returncode == 1, "a wrong stride is noticed", ran.stdout)


def main():
    tally = Tally()
    compiler = compilers()[0]
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        if shutil.which("patch"):
            check_llama2c(tally, compiler, folder)
        else:
            print("left out: patch (not installed), and so examples/llama2c")
        check_tap(tally, compiler, folder)
    tally.done()


if __name__ == "__main__":
    main()
