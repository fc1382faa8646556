#!/usr/bin/env python3
"""The programs a newcomer runs first: examples/minimal.c and, through examples/run.sh, stream.c.

Built with every warning, run, and their output checked; then every kind of bad input must give exit
code 2 and one line of its own. Needs a C compiler and Python's standard library.
"""
import csv
import math
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import xml.etree.ElementTree

from bad_config import ROOT, WARNINGS, Tally, compilers

SVG = "{http://www.w3.org/2000/svg}"
N, Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 600, 4, 2, 8, 12  # of the traces made here


def run(command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k != "BUILD_DIR"}
    env.update(environment)
    return subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, check=False)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


# ---- minimal.c ---------------------------------------------------------------------------------
def check_minimal(tally, compiler, folder):
    outputs = set()
    for level in ("-O0", "-O2"):
        program = os.path.join(folder, "minimal" + level)
        built = run([compiler, "-std=c99", level, "-I."] + WARNINGS +
                    ["examples/minimal.c", "-o", program], ROOT)
        if not tally.check(built.returncode == 0 and not built.stderr, "minimal.c builds clean",
                           built.stderr):
            return
        ran = run([program], folder)
        tally.check(ran.returncode == 0, "minimal runs", ran.stderr)
        outputs.add(ran.stdout)
    tally.check(len(outputs) == 1, "minimal prints the same at -O0 and -O2", "\n".join(outputs))
    match = re.fullmatch(r"(\d+) bytes: 5000 tokens, ok\n"
                         r"out\[0\.\.2\] =((?: [+-]\d\.\d+){3})\n", outputs.pop())
    if tally.check(match, "minimal prints bytes and outputs"):
        # An average of values of [-1, 1), over hundreds of tokens: small, but not zero.
        out = [float(x) for x in match[2].split()]
        tally.check(all(0 < abs(x) < 0.5 for x in out), "minimal's outputs are averages", str(out))
        tally.check(0 < int(match[1]) < 5000 * 2 * 2 * 64 * 2 / 4,
                    "minimal needs a fraction of all keys and values")
    lines = [x for x in read(os.path.join(ROOT, "examples", "minimal.c")).splitlines() if x]
    tally.check(len(lines) <= 30, "minimal.c stays short", str(len(lines)))


# ---- the main job ------------------------------------------------------------------------------
def table_of(stdout):
    rows = {}
    for line in stdout.splitlines():
        words = line.replace("%", "").split()
        if len(words) == 9 and words[0] in ("balancekv", "window", "full") and words[2] != "us":
            rows[words[0], int(words[1])] = [float(x) for x in words[2:]]
    return rows


def check_table(tally, ran, csv_path):
    rows = table_of(ran.stdout)
    budgets = [512, 1024, 2048]
    wanted = [(m, b) for b in budgets for m in ("balancekv", "window")] + [("full", 4096)]
    if not tally.check(sorted(rows) == sorted(wanted), "the table has its rows", ran.stdout):
        return
    tally.check(all(math.isfinite(x) and x > 0 for r in rows.values() for x in r),
                "every number of the table is positive", ran.stdout)
    tally.check(0 < rows["full", 4096][2] < 1e-3, "the full cache is exact", ran.stdout)
    for method in ("balancekv", "window"):
        for column, name in ((2, "mean error"), (3, "95th percentile")):
            e = [rows[method, b][column] for b in budgets]
            tally.check(e[0] > e[1] > e[2] > rows["full", 4096][column],
                        "%s: the %s falls with the budget" % (method, name), str(e))
    for budget in budgets:
        ours, window = rows["balancekv", budget], rows["window", budget]
        tally.check(ours[:2] == window[:2], "both methods get the same bytes", str((ours, window)))
        tally.check(ours[6] > 1 and window[6] == 1, "only ours has weights", str((ours, window)))
        better = "BETTER" in re.search(r"- %d slots for [^-]*" % budget, ran.stdout)[0]
        if abs(ours[2] / window[2] - 1) > 0.06:
            tally.check(better == (window[2] < ours[2]), "the words say what the table says",
                        ran.stdout)
    with open(csv_path, newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    tally.check([(x["method"], int(x["budget"])) for x in lines] == wanted, "the CSV has the rows")
    for x in lines:
        row = rows[x["method"], int(x["budget"])]
        tally.check(math.isclose(float(x["rel_err"]), row[2], rel_tol=0.01) and
                    math.isclose(float(x["bytes"]) / 1024, row[0], abs_tol=0.06) and
                    int(x["held"]) <= int(x["budget"]), "the CSV agrees with the table", str(x))
    growth = [[float(x) for x in line.split()[-4:]] for line in ran.stdout.splitlines()
              if re.search("(us per token|KiB needed)  ", line)]
    if tally.check(len(growth) == 4, "time and memory are shown for full and fixed", ran.stdout):
        full_us, full_kib, fixed_us, fixed_kib = growth
        tally.check(min(full_us + fixed_us) > 0, "every time is positive", str(growth))
        tally.check(full_kib == [256, 512, 768, 1024], "the full cache grows", str(full_kib))
        tally.check(len(set(fixed_kib)) == 1, "the fixed one does not", str(fixed_kib))


def marks_of(path):
    """Kind ("k1", ..) to the number of marks in the picture."""
    marks = {}
    for element in xml.etree.ElementTree.parse(path).iter(SVG + "path"):
        kind = element.get("class").split()[0]
        marks[kind] = marks.get(kind, 0) + len(re.findall("[hv]", element.get("d")))
    return marks


def check_picture(tally, path):
    text = read(path)
    tally.check(10000 < len(text) < 1000000, "the picture is no larger than needed", str(len(text)))
    tally.check("http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "") and
                "<script" not in text, "the picture needs nothing from elsewhere")
    try:
        marks = marks_of(path)
    except xml.etree.ElementTree.ParseError as fault:
        tally.check(False, "the picture is well-formed", str(fault))
        return
    # 48 moments: sinks in each, and hundreds of marks between them and the window at the end.
    tally.check(marks.get("k1", 0) >= 48 and marks.get("k3", 0) >= 48 and marks.get("k2", 0) > 2000,
                "the picture shows sinks, window and pages", str(marks))
    words = "".join(xml.etree.ElementTree.parse(path).getroot().itertext())
    tally.check("4096 tokens through 512 slots" in words, "the picture says what it shows")


def check_run_sh(tally, compiler, folder):
    """Returns the program, or None."""
    build = os.path.join(folder, "build")
    script = os.path.join(ROOT, "examples", "run.sh")
    table = os.path.join(folder, "table.csv")
    ran = run(["sh", script, "--csv", table], folder, BUILD_DIR=build, CC=compiler)
    if not tally.check(ran.returncode == 0 and not ran.stderr, "run.sh runs", ran.stderr):
        return None
    check_table(tally, ran, table)
    picture = re.search(r"^picture +(.+)$", ran.stdout, re.M)
    if tally.check(picture and os.path.exists(picture[1]), "run.sh says where the picture is"):
        tally.check(os.path.dirname(picture[1]) == os.path.realpath(build), "it is with the build")
        check_picture(tally, picture[1])

    # The same in a tree of its own, whose path has a blank and whose sources may be touched.
    tree = os.path.join(folder, "a tree")
    shutil.copytree(os.path.join(ROOT, "examples"), os.path.join(tree, "examples"))
    shutil.copy(os.path.join(ROOT, "balancekv.h"), tree)
    program = os.path.join(tree, "build", "examples-run", "stream")
    command, times = ["sh", os.path.join("examples", "run.sh"), "--help"], []
    for touched in (None, None, "balancekv.h", "examples/npy.h", "examples/stream.c"):
        if touched:
            os.utime(os.path.join(tree, touched), (times[-1] + 1, times[-1] + 1))
        ran = run(command, tree, CC=compiler, CFLAGS="-O0")
        tally.check(ran.returncode == 0 and "usage: stream" in ran.stdout,
                    "run.sh passes --help on", ran.stderr)
        times.append(os.stat(program).st_mtime if os.path.exists(program) else 0)
        if touched:  # as if the next change came later
            os.utime(os.path.join(tree, touched), (times[-1] - 1, times[-1] - 1))
        if len(times) > 1:
            tally.check((times[-1] > times[-2]) == bool(touched),
                        "built anew exactly if a source is newer: %s" % touched, str(times))
    with open(os.path.join(tree, "examples", "stream.c"), "a", encoding="utf-8") as f:
        f.write("no C\n")
    ran = run(command, tree, CC=compiler)
    tally.check(ran.returncode == 1 and "could not build" in ran.stderr, "run.sh: broken source")

    tools = os.path.join(folder, "tools")
    os.mkdir(tools)
    for name in ("dirname", "mkdir", "find", "cat"):
        os.symlink(shutil.which(name), os.path.join(tools, name))
    ran = run([shutil.which("sh"), script], folder, PATH=tools, CC="")
    tally.check(ran.returncode == 1 and "no C compiler" in ran.stderr, "run.sh: no compiler",
                ran.stderr)
    return os.path.join(build, "stream")


# ---- traces of a user's own --------------------------------------------------------------------
def npy(data, shape, descr="'<f2'", order="False", version=1, length=None):
    header = "{'descr': %s, 'fortran_order': %s, 'shape': %s, }\n" % (descr, order, shape)
    length = len(header) if length is None else length
    return (b"\x93NUMPY" + bytes([version, 0]) +
            struct.pack("<H" if version == 1 else "<I", length) + header.encode() + data)


def numbers(shape, code="e", seed=1):
    draw, count = random.Random(seed), shape[0] * shape[1] * shape[2]
    return struct.pack("<%d%s" % (count, code), *(draw.gauss(0, 1) for _ in range(count)))


Q, K, V = (N, Q_HEADS, DIM), (N, KV_HEADS, DIM), (N, KV_HEADS, VALUE_DIM)


def write_trace(folder, **changed):
    """A good trace, with some of its files changed; None leaves one out."""
    os.makedirs(folder)
    files = {name: npy(numbers(shape), shape) for name, shape in (("q", Q), ("k", K), ("v", V))}
    files.update(changed)
    for name, content in files.items():
        if content is not None:
            with open(os.path.join(folder, name + ".npy"), "wb") as f:
                f.write(content)
    return folder


def check_good_traces(tally, program, folder):
    def errors(trace, *options):
        ran = run([program, trace, "--budget", "256"] + list(options), folder)
        tally.check(ran.returncode == 0 and not ran.stderr, "stream takes %s %s" % (trace, options),
                    ran.stderr)
        rows = table_of(ran.stdout)
        tally.check(len(rows) == 3, "three rows for one budget", ran.stdout)
        return [rows[key][2:4] for key in sorted(rows)]

    half = write_trace(os.path.join(folder, "half"))
    default = errors(half)
    tally.check(default == errors(half, "--seed", "1", "--rule", "sample", "--type", "f16",
                                  "--backend", "scalar"), "the defaults are those of the help")
    for version in (1, 2, 3):
        # f32 that holds the same numbers.
        widened = {}
        for name, shape in (("q", Q), ("k", K), ("v", V)):
            values = struct.unpack("<%de" % (shape[0] * shape[1] * shape[2]), numbers(shape))
            widened[name] = npy(struct.pack("<%df" % len(values), *values), shape, "'<f4'",
                                version=version)
        trace = write_trace(os.path.join(folder, "single%d" % version), **widened)
        tally.check(errors(trace) == default, "f32 of version %d gives the same" % version)
    for rule in ("sample", "window"):
        balancekv, _, window = errors(half, "--rule", rule)
        tally.check((balancekv == window) == (rule == "window"), "rule %s is used" % rule)
    full = {kind: errors(half, "--type", kind)[1][0] for kind in ("f32", "f16", "bf16", "i8", "i4")}
    tally.check(full["f32"] < 1e-5 and full["f16"] < 1e-5 and 1e-4 < full["bf16"] < 1e-1 and
                1e-4 < full["i8"] < full["i4"] / 2 < 1e-1,
                "storage rounds as its type says", str(full))
    odd = write_trace(os.path.join(folder, "<&>"))
    picture = os.path.join(folder, "own.svg")
    errors(odd, "--svg", picture)
    tally.check(marks_of(picture).get("k2", 0) > 100, "the picture of a user's trace has marks")


# ---- bad input ---------------------------------------------------------------------------------
def with_value(shape, value, code):
    data = bytearray(numbers(shape, code))
    size = struct.calcsize(code)
    struct.pack_into("<" + code, data, len(data) // 2 // size * size, value)
    return bytes(data)


def bad_traces():
    """Mistake and variant, changed files, what the message must say."""
    good = npy(numbers(K), K)
    yield "missing, k", {"k": None}, "k.npy: No such file"
    yield "missing, v", {"v": None}, "v.npy: No such file"
    yield "not npy, empty", {"k": b""}, "k.npy: is not an .npy file"
    yield "not npy, text", {"v": b"key,value\n" * 50}, "v.npy: is not an .npy file"
    yield "version 9", {"k": npy(b"", K, version=9)}, "is .npy version 9"
    yield "data cut", {"k": good[:-1]}, "is truncated: 19199 of 19200 bytes"
    yield "header cut, in the file", {"k": good[:40]}, "truncated inside its header"
    yield "header cut, by its length", {"q": npy(b"", Q, version=2, length=0xffffffff)}, \
        "q.npy: is truncated inside its header"
    yield "damaged header, length 0", {"k": npy(b"", K, length=0)}, "k.npy: has a damaged header"
    yield "damaged header, no shape", {"v": good.replace(b"'shape'", b"'shale'")}, \
        "v.npy: has a damaged header"
    yield "damaged header, open shape", {"q": good.replace(b"(600, 2, 8)", b"(600, 2, 8;")}, \
        "q.npy: has a damaged header"
    yield "bytes behind", {"k": good + b"abc"}, "has 3 bytes behind its data"
    yield "dtype, f64", {"k": npy(numbers(K, "d"), K, "'<f8'")}, "has dtype '<f8'"
    yield "dtype, integers", {"k": npy(numbers(K), K, "'<i2'")}, "has dtype '<i2'"
    yield "dtype, structure", {"k": npy(numbers(K), K, "[('x', '<f2')]")}, "has dtype [('x'"
    yield "big-endian", {"k": npy(numbers(K), K, "'>f2'")}, "is big-endian"
    yield "Fortran order", {"k": npy(numbers(K), K, order="True")}, "is in Fortran order"
    yield "dimensions, 2", {"k": npy(numbers(K), (N, KV_HEADS * DIM))}, "has 2 dimensions"
    yield "dimensions, 4", {"k": npy(numbers(K), (1,) + K)}, "has 4 dimensions"
    yield "no token", {"k": npy(b"", (0, KV_HEADS, DIM))}, "k.npy: is empty"
    yield "too large, 2^62", {"k": npy(b"", (1 << 62, 1 << 62, 8))}, "more elements than memory"
    yield "too large, 2^70", {"k": npy(b"", (1 << 70, 1, 8))}, "more elements than memory"
    shorter = (N - 1, KV_HEADS, DIM)
    yield "tokens", {"k": npy(numbers(shorter), shorter)}, "hold 600, 599 and 600 tokens"
    heads = (N, 4, VALUE_DIM)
    yield "heads of v", {"v": npy(numbers(heads), heads)}, "k has 2 heads and v 4"
    heads = (N, 3, DIM)
    yield "heads of q", {"q": npy(numbers(heads), heads)}, "q has 3 heads"
    wide = (N, Q_HEADS, DIM + 1)
    yield "elements of q", {"q": npy(numbers(wide), wide)}, "q has 9 elements a head and k 8"
    yield "not finite, NaN", {"v": npy(with_value(V, math.nan, "e"), V)}, \
        "v.npy: holds NaN or Inf at [300, 0, 0]"
    yield "not finite, infinity", {"q": npy(with_value(Q, -math.inf, "f"), Q, "'<f4'")}, \
        "q.npy: holds NaN or Inf at [300, 0, 0]"
    yield "too large for f16", {"k": npy(with_value(K, 70000.0, "f"), K, "'<f4'")}, \
        "token 300: K, V or q holds"
    few = {name: (100,) + shape[1:] for name, shape in (("q", Q), ("k", K), ("v", V))}
    yield "100 tokens", {x: npy(numbers(few[x]), few[x]) for x in few}, "holds 100 tokens"
    wide = {name: (256, 1, 520) for name in ("q", "k", "v")}
    yield "head of 520", {x: npy(numbers(wide[x]), wide[x]) for x in wide}, "must be 1..512"
    many = {"q": (256, 34, 2), "k": (256, 2, 2), "v": (256, 2, 2)}
    yield "group of 17", {x: npy(numbers(many[x]), many[x]) for x in many}, "n_q_heads 1..16 times"


BAD_OPTIONS = [
    (["--help-me"], "unknown option '--help-me'"),
    (["-b", "256"], "unknown option '-b'"),
    (["--rule", "best"], "--rule: 'best' is none of:"),
    (["--type", "int8"], "--type: 'int8' is none of:"),
    (["--backend", "gpu"], "--backend: 'gpu' is none of:"),
    (["--seed", "-1"], "--seed: '-1' is not a number"),
    (["--seed", "1x"], "--seed: 'x' follows"),
    (["--seed", "99999999999999999999"], "--seed: '99999999999999999999' is not"),
    (["--seed"], "--seed needs a value"),
    (["--budget", "many"], "--budget: 'many' is not"),
    (["--budget", ""], "--budget: '' is not"),
    (["--budget", "256,"], "--budget: '' is not"),
    (["--budget", "256;512"], "--budget: ';512' follows"),
    (["--budget", "4294967296"], "--budget: '4294967296' is not"),
    (["--budget", ",".join(["256"] * 17)], "--budget: at most 16"),
    (["--budget", "512,100"], "budget 100: budget is smaller than"),
    (["--budget", "0"], "budget 0: budget is smaller than"),
    (["--budget", "16777217"], "budget 16777217: budget is smaller than"),
    (["--svg", "no/such/folder.svg"], "no/such/folder.svg: No such file"),
    (["--csv", "no/such/folder.csv"], "no/such/folder.csv: No such file"),
    (["no/such/trace"], "no/such/trace/q.npy: No such file"),
    (["--backend", "{missing}"], "it has:"),
]


def check_bad_input(tally, program, folder):
    mistakes = {}

    def refused(label, ran, text):
        lines = ran.stderr.splitlines()
        tally.check(ran.returncode == 2 and len(lines) == 1 and lines[0].startswith("stream: ") and
                    text in lines[0], "bad input, %s: exit 2 and '%s'" % (label, text),
                    "exit code %d\n%s%s" % (ran.returncode, ran.stderr, ran.stdout))
        # The file's name alone must not make a message differ.
        message = re.sub(r"^stream: \S*/bad\d+(/\w\.npy)?: ", "", ran.stderr)
        mistakes.setdefault(message, set()).add(label.split(",")[0])

    for number, (label, changed, text) in enumerate(bad_traces()):
        trace = write_trace(os.path.join(folder, "bad%d" % number), **changed)
        ran = run([program, trace, "--budget", "256", "--svg", trace + ".svg"], folder)
        refused(label, ran, text)
        tally.check(not os.path.exists(trace + ".svg"), "%s: no picture" % label)

    good = write_trace(os.path.join(folder, "good"))
    for options, text in BAD_OPTIONS:
        if "{missing}" in options:
            # No CPU has the vectors of both families.
            options = ["--backend", "avx2"]
            if run([program, good, "--budget", "256"] + options, folder).returncode == 0:
                options = ["--backend", "neon"]
        refused(options[0], run([program, good] + options, folder), text)
    for wrong in ("1", "16777217"):
        least = re.search(r"smallest that works here is (\d+)",
                          run([program, good, "--budget", wrong], folder).stderr)
        if tally.check(least, "budget %s: the message names one that works" % wrong):
            for budget, code in ((int(least[1]), 0), (int(least[1]) - 1, 2)):
                ran = run([program, good, "--budget", str(budget)], folder)
                tally.check(ran.returncode == code, "budget %d: exit %d" % (budget, code),
                            ran.stderr)
    tally.check_none("each mistake has a message of its own",
                     [str(labels) for labels in mistakes.values() if len(labels) > 1])


def main():
    tally = Tally()
    compiler = compilers()[0]
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        check_minimal(tally, compiler, folder)
        program = check_run_sh(tally, compiler, folder)
        warned = run([compiler, "-std=c99", "-O2", "-I.", "-fsyntax-only"] + WARNINGS +
                     ["examples/stream.c"], ROOT)
        tally.check(not warned.stderr, "stream.c builds clean", warned.stderr)
        if program:
            check_good_traces(tally, program, folder)
            check_bad_input(tally, program, folder)
    tally.done()


if __name__ == "__main__":
    main()
