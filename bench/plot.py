#!/usr/bin/env python3
"""Pictures (SVG, to standard output) of what the programs of bench/ print with --json.

    plot.py quality FILE        error against bytes, a line for each method
    plot.py growth FILE         time of a token against the length of the stream
    plot.py shares FILE         share of the machine's limit, a bar for each backend
    plot.py peers FILE          time of other implementations in multiples of ours
"""
import collections
import io
import os
import sys
from statistics import mean

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from report import FAMILIES, best_rows, chosen, family_ratio, name_of, read  # noqa: E402

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
except ImportError:
    sys.exit("plot.py: no matplotlib; to install it: python3 -m pip install matplotlib")

# Text stays text, and the same rows give the same bytes.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "balancekv", "font.size": 9,
                            "axes.axisbelow": True, "axes.grid": True, "grid.color": "#dddddd"})
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
SHAPES = "os^DXvP"


def canvas(title, height):
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(title, weight="bold")
    return figure, figure.subplots()


def logarithmic(axis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(
        lambda x, _: "%g" % x if x < 1e6 else "%gM" % (x / 1e6)))
    axis.set_minor_locator(NullLocator())


def line_chart(title, x_name, y_name, lines):
    """lines: {name: [(x, y), ..]}; log-log, the legend in the order of the right ends."""
    figure, axes = canvas(title, 5.4)
    axes.set(xscale="log", yscale="log", xlabel=x_name, ylabel=y_name)
    for i, (name, points) in enumerate(lines.items()):
        turn, colour = i // len(COLOURS) % len(DASHES), i % len(COLOURS)
        axes.plot(*zip(*points), label=name, color=COLOURS[colour], linestyle=DASHES[turn],
                  linewidth=3 if name.split(",")[0] == "balancekv" else 1.5)
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    handles = sorted(axes.lines, key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def row_chart(title, x_name, names):
    """Rows with their names on the left, the first on top; the caller draws at y = 0, 1, .."""
    figure, axes = canvas(title, 1.4 + 0.19 * len(names))
    axes.set(xlabel=x_name, ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def legend_above(axes):
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=4, frameon=False)


def quality(path):
    rows = read(path)
    points = collections.defaultdict(list)
    for r in rows:
        share = r["budget"]
        if r["protocol"] == "oneshot":  # budgets differ from trace to trace, shares do not
            share = round((r["tokens"] - 512) / (r["budget"] - 512))
        points[r["method"], share].append((r["bytes"] / 1024, r["rel_err"]))
    lines = collections.defaultdict(list)
    for (method, _), values in points.items():
        lines[method].append(tuple(map(mean, zip(*values))))
    traces = len({r["trace"] for r in rows})
    return line_chart("%s: mean relative error of %d traces" % (rows[0]["protocol"], traces),
                      "KiB of state per layer", "error", {m: sorted(p) for m, p in lines.items()})


def growth(path):
    rows = [r for r in best_rows(read(path)) if r["case"] == "growth" and r["d"] == 64]
    lines = collections.defaultdict(list)
    for r in rows:
        fixed = r["type"] == "f16"
        lines["balancekv, %s slots" % (2048 if fixed else "n / 16")].append((r["n"], r["ns"] / 1e3))
        for family in list(FAMILIES)[:2]:
            ratio = family_ratio(r, FAMILIES[family])
            if ratio:
                lines[family].append((r["n"], ratio * r["ns"] / 1e3))
    return line_chart("Time of a token: append and attend, 3 KV heads, 9 query heads, d 64",
                      "tokens so far", "us a token", {k: sorted(v) for k, v in lines.items()})


def shares(path):
    rows = [r for r in chosen(read(path)) if r["share_of_limit"]]
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    names = list(dict.fromkeys(map(name_of, rows)))
    figure, axes = row_chart("Share of the machine's limit", "of peak multiply-adds, or of read "
                             "bandwidth if that is the larger share", names)
    height = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        own = [r for r in rows if r["backend"] == backend]
        axes.barh([names.index(name_of(r)) - 0.4 + (i + 0.5) * height for r in own],
                  [r["share_of_limit"] for r in own], height, color=COLOURS[i], label=backend,
                  clip_on=False) # all are inside; to clip each is a twentieth of the file
    axes.set_xlim(0, max(1, *axes.get_xlim()))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    legend_above(axes)
    return figure


def peers(path):
    rows = [r for r in best_rows(chosen(read(path)))
            if any(family_ratio(r, p) for p in FAMILIES.values())]
    if not rows:
        sys.exit("plot.py: %s has no peers; it was made without --peers" % path)
    figure, axes = row_chart("Other implementations", "times our time (fastest backend)",
                             list(map(name_of, rows)))
    axes.set_xscale("log")
    for (family, prefixes), colour, shape in zip(FAMILIES.items(), COLOURS, SHAPES):
        points = [(family_ratio(r, prefixes), y) for y, r in enumerate(rows)
                  if family_ratio(r, prefixes)]
        if points:
            axes.plot(*zip(*points), shape, color=colour, label=family)
    axes.axvline(1, color="black", linewidth=0.8)
    logarithmic(axes.xaxis)
    legend_above(axes)
    return figure


COMMANDS = {"quality": quality, "growth": growth, "shares": shares, "peers": peers}


def svg(command, path):
    text = io.StringIO()
    COMMANDS[command](path).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def main(args):
    if len(args) != 2 or args[0] not in COMMANDS:
        sys.exit(__doc__)
    print(svg(*args), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
