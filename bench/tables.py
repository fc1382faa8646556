#!/usr/bin/env python3
"""Markdown tables from the JSON lines of build/bench/quality.

    tables.py means FILE        method x budget: mean error over the traces, interval over the seeds
    tables.py traces FILE       trace x budget: balancekv, walk and the best other method
    tables.py ratio FILE        a first layer at rate 1/2: balanced against uniform
    tables.py storage FILE      methods at equal bytes, by budget
    tables.py settings FILE     each method's ratio to the first one: geometric mean over the traces
    tables.py tokens FILE       method x tokens
    tables.py update TEXT DIR   writes the tables of DIR/*.json between the marks of a text
"""
import collections
import math
import os
import sys
from statistics import mean, stdev

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from report import main, read, table  # noqa: E402

# 97.5 % quantile of Student's t for 1, 2, .. degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def shares(rows):
    """Oneshot budgets differ from trace to trace; the share of the middle does not."""
    for r in rows:
        r["column"] = r["budget"]
        if r["protocol"] == "oneshot":
            r["column"] = "1/%d" % round((r["tokens"] - 512) / (r["budget"] - 512))
    return list(dict.fromkeys(r["column"] for r in rows))


def interval(values):
    """Half of the 95 % confidence interval of a mean."""
    n = len(values)
    return STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(values) / n ** 0.5 if n > 1 else 0.0


def by_method(rows, column, field="rel_err"):
    """method -> [mean over the traces, for each seed]"""
    of_seed = collections.defaultdict(lambda: collections.defaultdict(list))
    for r in rows:
        if r["column"] == column:
            of_seed[r["method"]][r["seed"]].append(r[field])
    return {m: [mean(v) for v in seeds.values()] for m, seeds in of_seed.items()}


def short(x):
    return ("%.4f" if x < 0.1 else "%.3f" if x < 10 else "%.3g") % x


def means(path):
    rows = read(path)
    columns = shares(rows)
    cells = {c: by_method(rows, c) for c in columns}
    needs = {r["method"]: r["needs"] for r in rows}
    kib = {c: by_method(rows, c, "bytes") for c in columns}
    lines = []
    for m in needs:
        line = ["`%s`" % m]
        for c in columns:
            half = interval(cells[c][m])
            line.append(short(mean(cells[c][m])) + (" ± " + short(half) if half else ""))
        size = " ".join("%.0f" % (mean(kib[c][m]) / 1024) for c in columns)
        lines.append(line + [size, needs[m]])
    traces = len({r["trace"] for r in rows})
    seeds = len({r["seed"] for r in rows})
    return table(["mean of %d traces, %d seeds" % (traces, seeds)] + [str(c) for c in columns] +
                 ["KiB", "needs beside k, v"], lines)


def traces(path):
    rows = read(path)
    columns = shares(rows)
    cells = collections.defaultdict(list)
    for r in rows:
        cells[r["trace"], r["column"], r["method"]].append(r["rel_err"])
    own = {"balancekv", "sample", "walk", "window"}
    others = [m for m in dict.fromkeys(r["method"] for r in rows)
              if m.split(":")[0] not in own and not any(
                  r["held_max"] > r["budget"] or "future" in r["needs"]
                  for r in rows if r["method"] == m)]
    lines = []
    for t in dict.fromkeys(r["trace"] for r in rows):
        line = [t]
        for c in columns:
            best = min(others, key=lambda m: mean(cells[t, c, m]))
            line.append("%s, %s, %s %s" % (short(mean(cells[t, c, "balancekv"])),
                                           short(mean(cells[t, c, "walk"])),
                                           short(mean(cells[t, c, best])), best))
        lines.append(line)
    return table(["balancekv, walk, best other"] + [str(c) for c in columns], lines)


def ratio(path):
    rows = read(path)
    shares(rows)
    lines = []
    for t in dict.fromkeys(r["trace"] for r in rows):
        here = [r for r in rows if r["trace"] == t]
        uniform = {f: mean(r[f] for r in here if r["method"] == "uniform-once")
                   for f in ("rel_err", "rel_err_clamped")}
        for m in dict.fromkeys(r["method"] for r in here):
            line = [t, "`%s`" % m]
            for f in ("rel_err_clamped", "rel_err"):
                x = mean(r[f] for r in here if r["method"] == m)
                line += [short(x), "%.2f" % (x / uniform[f])]
            lines.append(line)
    seeds = len({r["seed"] for r in rows})
    return table(["first layer, rate 1/2, %d seeds" % seeds, "method", "clamped error",
                  "to uniform", "error", "to uniform"], lines)


def storage(path):
    """The budgets of each method in their order: those of the same place have equal bytes."""
    rows, lines, errors = read(path), [], []
    for m in dict.fromkeys(r["method"] for r in rows):
        here = [r for r in rows if r["method"] == m]
        budgets = sorted({r["budget"] for r in here})
        kib, error = ([mean(r[f] for r in here if r["budget"] == b) for b in budgets]
                      for f in ("bytes", "rel_err"))
        errors.append(error)
        for what, form, values in (("state, KiB", "%.0f", [x / 1024 for x in kib]),
                                   ("slots", "%d", budgets), ("error", "%s", map(short, error))):
            lines.append(["`%s`: %s" % (m, what)] + [form % x for x in values])
        if errors[1:]:
            lines.append(["`%s`: error / first" % m] +
                         ["%.2f" % (b / a) if a else "" for a, b in zip(errors[0], error)])
    seeds = len({r["seed"] for r in rows})
    return table(["mean of %d traces, %d seeds" % (len({r["trace"] for r in rows}), seeds)] +
                 [""] * len(errors[0]), lines)


def settings(path):
    rows = read(path)
    columns = list(dict.fromkeys(r["budget"] for r in rows))
    error = collections.defaultdict(list)
    for r in rows:
        error[r["method"], r["trace"], r["budget"]].append(r["rel_err"])
    methods, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("method", "trace"))
    lines = []
    for m in methods:
        line = ["`%s`" % m]
        for c in columns:
            pairs = [(mean(error[m, t, c]), mean(error[methods[0], t, c])) for t in names]
            ratios = [a / b for a, b in pairs if a and b]
            if ratios and m != methods[0]:
                line.append("%.2f (%.2f to %.2f)" % (
                    math.exp(mean(map(math.log, ratios))), min(ratios), max(ratios)))
            else:
                line.append(short(mean(a for a, _ in pairs)))
        lines.append(line)
    return table(["ratio to `%s`, %d traces (least to largest)" % (methods[0], len(names))] +
                 [str(c) for c in columns], lines)


def tokens(path):
    rows = read(path)
    for r in rows:
        r["column"] = r["tokens"]
    columns = sorted({r["column"] for r in rows})
    cells = {c: by_method(rows, c) for c in columns}
    return table(["tokens"] + ["%d" % c if c % 1024 else "%dk" % (c // 1024) for c in columns],
                 [["`%s`" % m] + [short(mean(cells[c][m])) for c in columns]
                  for m in dict.fromkeys(r["method"] for r in rows)])


COMMANDS = {f.__name__: f for f in (means, traces, ratio, storage, settings, tokens)}


if __name__ == "__main__":
    main(sys.argv[1:], COMMANDS, __doc__)
