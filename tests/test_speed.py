#!/usr/bin/env python3
"""Tests of bench/speed and of the scripts around it: test_speed.py PROGRAM. Not of any time."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.dom.minidom

BENCH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bench")
sys.path.insert(0, BENCH)
import insn  # noqa: E402
import report  # noqa: E402

try:
    import plot
except SystemExit as why:  # no matplotlib
    plot, no_plot = None, str(why)

FIELDS = {"case": str, "backend": str, "d": int, "group": int, "n": int, "type": str, "ns": float,
          "share_of_limit": (float, type(None)), "ratio_to": dict}
CASES = ["halve", "attend_hot", "attend_cold", "prefill", "append", "growth", "worst_append",
         "threads", "exp"]
PROGRAM = os.path.abspath(sys.argv[1])
counts = [0, 0]


def check(good, what):
    counts[not good] += 1
    if not good:
        print("FAILED:", what)


def run(*args):
    return subprocess.run([PROGRAM, *args], capture_output=True, text=True)


def plausible(row):
    """Nothing is faster than the limit of the machine; where a quick look says so: in full."""
    def possible(r):
        return r["share_of_limit"] is None or 0 < r["share_of_limit"] < 1.5
    if possible(row):
        return True
    full = run("--json", "--case", row["case"], "--backend", row["backend"], "--filter",
               "d%d g%d " % (row["d"], row["group"])).stdout.splitlines()
    same = [r for r in map(json.loads, full) if r["type"] == row["type"]]
    same = [r for r in same if r["n"] == row["n"]] or same # the quick n may be none of the full ones
    return same != [] and all(map(possible, same))


def rows_of(text):
    """Of JSON lines, each checked to be one."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            check(False, "not JSON: " + line)
            continue
        check(list(row) == list(FIELDS) and
              all(isinstance(row[k], t) for k, t in FIELDS.items()), "fields of " + line)
        check(0 < row["ns"] < 1e10 and plausible(row), "numbers of " + line)
        check(all(isinstance(x, float) and x > 0 for x in row["ratio_to"].values()),
              "ratios of " + line)
        rows.append(row)
    return rows


def test_usage():
    for args, words in ((["--case", "halves"], CASES), (["--case", "exp,nonsense"], CASES),
                        (["--backend", "mmx"], ["scalar"]), (["--nonsense"], ["--case", "--list"]),
                        (["--case"], ["no value"]), (["--peers="], ["--peers"]),
                        (["exp"], ["--case"])):
        r = run(*args)
        check(r.returncode == 2, "exit code of %s: %d" % (args, r.returncode))
        check(r.stdout == "" and r.stderr.count("\n") == 1, "one line for %s" % args)
        check(all(w in r.stderr for w in words), "%s says what to do: %s" % (args, r.stderr))
    r = run("--quick", "--json", "--case", "exp", "--filter", "d63")
    check(r.returncode == 2 and r.stdout == "" and "'d63'" in r.stderr.splitlines()[-1],
          "a filter that nothing passes: %d, %s" % (r.returncode, r.stderr))
    r = run("--quick", "--json", "--case", "exp,halve", "--filter", "exp")
    check(r.returncode == 0 and "no row of halve contains 'exp'" in r.stderr and
          "no row of exp" not in r.stderr, "a filter that one case has no row for: " + r.stderr)
    r = run("--help")
    check(r.returncode == 0 and "--filter TEXT" in r.stdout and all(c in r.stdout for c in CASES),
          "--help: " + r.stdout)
    r = run("--list")
    check([line.split()[0] for line in r.stdout.splitlines()] == CASES, "--list: " + r.stdout)


def test_all_cases(folder):
    r = run("--quick", "--json")
    check(r.returncode == 0, "--quick --json: %s" % r.stderr)
    rows = rows_of(r.stdout)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    expected = [c for c in CASES if c != "threads" or os.cpu_count() > 1]
    check(cases == expected, "cases %s" % cases)
    for word in ("cpu: ", "compiler: ", "memory: ", "limit: "):
        check("\n" + word in "\n" + r.stderr, "no '%s' on stderr" % word)
    path = os.path.join(folder, "speed.json")
    for end, text in ((".json", r.stdout), (".log", r.stderr)):
        with open(path[:-5] + end, "w", encoding="utf-8") as f:
            f.write(text)
    for name, command in report.COMMANDS.items():
        check(name == "peers" or len(command(path)) > 100, "table " + name)
    for wide in ("avx512", "avx2", "neon"): # the bars of a machine that has no more
        other = os.path.join(folder, wide + ".json")
        shutil.copy(path[:-5] + ".log", other[:-5] + ".log")
        with open(other, "w", encoding="utf-8") as f:
            f.write("".join(json.dumps(dict(row, backend=wide)) + "\n" for row in rows
                            if row["backend"] == rows[-1]["backend"]))
        lines = {line[0]: line[1:3] for line in report.bars_of(other)}
        wanted, measured = lines["halving d 64, %s, of FMA peak" % wide]
        check(wanted == (">= 65 %" if wide == "avx2" else ">= 70 %") and measured[-1] == "%",
              "bars of %s: %s" % (wide, lines))
    text = os.path.join(folder, "text.md")
    with open(text, "w", encoding="utf-8") as f:
        f.write("a\n<!-- growth speed -->\nold\n<!-- end -->\nb\n")
    report.update(text, folder, report.COMMANDS)
    with open(text, encoding="utf-8") as f:
        new = f.read()
    check(new == "a\n<!-- growth speed -->\n%s<!-- end -->\nb\n" % report.growth(path), "update")
    return path


def test_pictures(path, with_peers):
    """Each mark stands where its row says."""
    if not plot:
        check("\n" not in no_plot and "pip install matplotlib" in no_plot, "plot.py: " + no_plot)
        print("left out: pictures, as there is no matplotlib")
        return
    rows = report.read(path)
    fixed = [r for r in report.best_rows(rows) if r["case"] == "growth" and r["type"] == "f16"]
    line = next(x for x in plot.growth(path).axes[0].lines if "2048" in x.get_label())
    check([list(x) for x in zip(*line.get_data())] == [[r["n"], r["ns"] / 1e3] for r in fixed] and
          len(fixed) > 2, "growth: %s" % (line.get_data(),))
    shown = [r for r in report.chosen(rows) if r["share_of_limit"]]
    axes = plot.shares(path).axes[0]
    check(sorted(x.get_width() for x in axes.patches) ==
          sorted(r["share_of_limit"] for r in shown), "shares: the widths of the bars")
    axes = plot.peers(with_peers).axes[0]
    naive = next(x for x in axes.lines if x.get_label().startswith("naive"))
    check(sorted(naive.get_xdata()) == sorted(
        r["ratio_to"]["naive"] for r in report.best_rows(report.read(with_peers))
        if r["ratio_to"]), "peers")
    for name in ("growth", "shares", "peers"):
        svg = plot.svg(name, with_peers if name == "peers" else path)
        words = [x.firstChild.data for x in xml.dom.minidom.parseString(svg).getElementsByTagName(
            "text")]
        check("exp n 4096 f32" in words or name == "growth", "%s: names as text" % name)
        check(len(svg) < 100000 and svg == plot.svg(name, with_peers if name == "peers" else path),
              "%s: the same bytes twice" % name)


def test_backend():
    rows = rows_of(run("--quick", "--json", "--case", "halve", "--filter", "d64", "--backend",
                       "scalar").stdout)
    check({(r["case"], r["backend"], r["d"]) for r in rows} == {("halve", "scalar", 64)},
          "--backend, --filter")
    r = run("--quick", "--case", "exp")
    check(r.returncode == 0 and "exp" in r.stdout.splitlines()[-1], "the table")
    r = run("--quick", "--case", "exp", "--small-pages")
    check("\nmemory: small pages\n" in r.stdout, "--small-pages: " + r.stdout)


def test_script(folder):
    """bench/speed.sh asks for rows that there are: one for which there is none ends it."""
    shutil.copytree(BENCH, os.path.join(folder, "tree", "bench"))
    shutil.copy(os.path.join(os.path.dirname(BENCH), "README.md"), os.path.join(folder, "tree"))
    stub = os.path.join(folder, "tree", "build", "bench", "speed")
    os.makedirs(os.path.dirname(stub))
    with open(stub, "w", encoding="utf-8") as f:
        f.write('#!/bin/sh\nexec "%s" --rows "$@"\n' % PROGRAM)
    os.chmod(stub, 0o755)
    own = ("BUILD", "LENGTHS", "PEER_LENGTHS", "RUN") # what the script takes from its environment
    env = {name: value for name, value in os.environ.items() if name not in own}
    r = subprocess.run(["sh", os.path.join("bench", "speed.sh")], capture_output=True, text=True,
                       cwd=os.path.join(folder, "tree"), env=dict(env, NAME="rows"))
    check(r.returncode == 0, "speed.sh: " + r.stderr)
    if r.returncode:
        return
    with open(os.path.join(folder, "tree", "bench", "results", "rows.json"), encoding="utf-8") as f:
        named = f.read().splitlines()
    check(len(named) > 100 and len(set(named)) == len(named), "speed.sh: every row once")
    every = run("--rows").stdout.splitlines()
    check(set(named) == set(every), "speed.sh: all rows: %s" % (set(every) ^ set(named)))


def test_missing_peers(folder):
    r = run("--quick", "--json", "--case", "exp", "--peers=" + folder)
    check(r.returncode == 0 and rows_of(r.stdout), "without peers")
    for name in ("ggml", "openblas", "numkong", "torch", "BalanceKV reference"):
        check(any(name in line and "sh bench/peers.sh" in line for line in r.stderr.splitlines()),
              "stderr names %s and how to install it" % name)


def build_peers(folder, changed=("", "")):
    """Plain C only, which needs nothing but the compiler."""
    os.makedirs(folder)
    for name in ("peers.c", "peers.h", "peers_naive.c", "peers_naive.h"):
        shutil.copy(os.path.join(BENCH, name), folder)
    path = os.path.join(folder, "peers_naive.c")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    check(changed[0] in text, "peers_naive.c has " + changed[0])
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(*changed))
    cc = (os.environ.get("CC") or "cc").split()
    return subprocess.run(cc + ["-std=gnu11", "-O2", "-fPIC", "-shared", "peers.c", "peers_naive.c",
                                "-o", "libpeers.so", "-lm"], cwd=folder).returncode == 0


def test_peers(folder):
    good, bad, unmoved = (os.path.join(folder, name) for name in ("good", "bad", "unmoved"))
    check(build_peers(good) and build_peers(bad, ("+ constant)", "- constant)")) and build_peers(
        unmoved, ("(b->lack[j] - missing / sum)", "b->lack[j]")), "peers.c builds")
    r = run("--quick", "--json", "--case", "halve,exp", "--peers=" + good)
    rows = rows_of(r.stdout)
    check(r.returncode == 0 and rows and all(
        ("naive" in row["ratio_to"]) == (row["type"] != "f32 gram") for row in rows),
        "naive is beside every row but those of the kernel matrix alone: " + r.stderr)
    path = os.path.join(folder, "peers.json")
    for end, text in ((".json", r.stdout), (".log", r.stderr)):
        with open(path[:-5] + end, "w", encoding="utf-8") as f:
            f.write(text)
    bars = {line[0]: line for line in report.bars_of(path)}
    row = next(r for r in report.best_rows(rows) if r["d"] == 64 and r["type"] == "f32")
    want = 4.5 / row["ratio_to"]["naive"] * row["share_of_limit"]
    check(bars["halving d 64, times naive"][4] == "met at %.0f %%" % (100 * want),
          "bars: the share at which one is met: %s" % bars["halving d 64, times naive"])
    r = run("--quick", "--json", "--case", "halve", "--peers=" + unmoved)
    check(r.returncode == 1 and all(
        bool(row["ratio_to"]) == (row["type"] == "f32 unmoved") for row in rows_of(r.stdout)),
        "one that moves values elsewhere is left out only where they move: " + r.stderr)
    r = run("--quick", "--json", "--case", "halve", "--peers=" + bad)
    rows = rows_of(r.stdout)
    check(r.returncode == 1 and rows and not any(row["ratio_to"] for row in rows),
          "a peer that computes something else is left out, and the run fails")
    check("naive left out" in r.stderr, "which is said")
    return path


def test_insn():
    known = {"a": 1000000, "b": 5000}
    devnull, stdout = open(os.devnull, "w", encoding="utf-8"), sys.stdout
    sys.stdout = devnull
    results = [insn.compare(c, known) for c in (
        known, dict(known, a=1019000), dict(known, a=1030000), dict(known, a=970000),
        {"a": 1000000}, dict(known, c=1))]
    sys.stdout = stdout
    devnull.close()
    check(results == [(2, 0), (2, 0), (1, 1), (1, 1), (1, 1), (2, 1)], "insn.compare: %s" % results)
    check(insn.compiler().split()[0] in ("gcc", "clang"), "insn.compiler")


with tempfile.TemporaryDirectory() as where:
    test_usage()
    lines = test_all_cases(where)
    test_backend()
    test_missing_peers(where)
    if plot:
        test_script(where)
    else:
        print("left out: speed.sh, which wants matplotlib")
    test_pictures(lines, test_peers(where))
    test_insn()
print("%d passed, %d failed" % tuple(counts))
sys.exit(counts[1] > 0)
