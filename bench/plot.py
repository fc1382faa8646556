#!/usr/bin/env python3
"""Pictures (SVG, to standard output) of what the programs of bench/ print with --json.

    plot.py quality FILE        error against bytes, a line for each method
"""
import collections
import json
import math
import sys
from statistics import mean
from xml.sax.saxutils import escape

LEFT, TOP, WIDTH, HEIGHT, LABELS = 62, 44, 560, 400, 190
STYLE = """<style>
text { font: 12px sans-serif; fill: #333; } .title { font-size: 14px; font-weight: bold; }
.num { text-anchor: middle; } .right { text-anchor: end; } .grid { stroke: #ddd; }
.line { fill: none; stroke-width: 1.6; } .own { stroke-width: 3; }
</style>
"""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
           "#bcbd22", "#17becf")


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


class LogAxis:
    """Maps values to start..end; marks at 1, 2, 5 of each decade."""

    def __init__(self, values, start, end):
        self.low, self.high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
        self.start, self.end = start, end

    def at(self, x):
        share = (math.log(x) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def marks(self):
        decades = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)))
        every = (m * 10.0 ** d for d in decades for m in (1, 2, 5))
        return [x for x in every if self.low <= math.log(x) <= self.high]


def line_chart(title, x_name, y_name, lines):
    """lines: {name: [(x, y), ..]}; log-log, each line labelled at its right end."""
    points = [p for line in lines.values() for p in line]
    xs = LogAxis([p[0] for p in points], LEFT, LEFT + WIDTH)
    ys = LogAxis([p[1] for p in points], TOP + HEIGHT, TOP)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d">\n' %
           (LEFT + WIDTH + LABELS, TOP + HEIGHT + 52), STYLE,
           '<rect width="100%" height="100%" fill="#fff"/>\n']

    def text(x, y, kind, words):
        out.append('<text class="%s" x="%.1f" y="%.1f">%s</text>\n' % (kind, x, y, escape(words)))

    text(LEFT, 18, "title", title)
    text(LEFT - 50, 36, "left", y_name)
    text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "num", x_name)
    for x in xs.marks():
        out.append('<path class="grid" d="M%.1f %dv%d"/>\n' % (xs.at(x), TOP, HEIGHT))
        text(xs.at(x), TOP + HEIGHT + 18, "num", "%g" % x)
    for y in ys.marks():
        out.append('<path class="grid" d="M%d %.1fh%d"/>\n' % (LEFT, ys.at(y), WIDTH))
        text(LEFT - 8, ys.at(y) + 4, "right", "%g" % y)
    last = -1e9
    ends = sorted(lines, key=lambda name: ys.at(lines[name][-1][1]))
    for name in ends:
        colour = COLOURS[list(lines).index(name) % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if list(lines).index(name) >= len(COLOURS) else ""
        path = "L".join("%.1f %.1f" % (xs.at(x), ys.at(y)) for x, y in lines[name])
        out.append('<path class="line%s" stroke="%s"%s d="M%s"/>\n' %
                   (" own" if name == "balancekv" else "", colour, dash, path))
        y = max(ys.at(lines[name][-1][1]), last + 14)  # labels keep clear of each other
        last = y
        x = xs.at(lines[name][-1][0])
        out.append('<path stroke="%s" fill="none" d="M%.1f %.1fL%d %.1f"/>\n' %
                   (colour, x, ys.at(lines[name][-1][1]), LEFT + WIDTH + 8, y))
        text(LEFT + WIDTH + 12, y + 4, "left", name)
    out.append("</svg>\n")
    return "".join(out)


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
    lines = {m: sorted(p) for m, p in lines.items()}
    traces = len({r["trace"] for r in rows})
    return line_chart("%s: mean relative error of %d traces" % (rows[0]["protocol"], traces),
                      "KiB of state per layer", "error", lines)


COMMANDS = {"quality": quality}


def main(args):
    if len(args) != 2 or args[0] not in COMMANDS:
        sys.exit(__doc__)
    print(COMMANDS[args[0]](args[1]), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
