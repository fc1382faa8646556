#!/usr/bin/env python3
"""Pictures (SVG, to standard output) of what the programs of bench/ print with --json.

    plot.py quality FILE        error against bytes, a line for each method
    plot.py speed FILE          the three that follow, one above the other
    plot.py growth FILE         time of a token against the length of the stream
    plot.py shares FILE         share of the machine's limit, a bar for each backend
    plot.py peers FILE          time of other implementations in multiples of ours
"""
import collections
import json
import math
import re
import sys
from statistics import mean
from xml.sax.saxutils import escape

LEFT, TOP, WIDTH, HEIGHT, LABELS = 62, 44, 560, 400, 190
STYLE = """<style>
text { font: 12px sans-serif; fill: #333; } .title { font-size: 14px; font-weight: bold; }
.num { text-anchor: middle; } .right { text-anchor: end; } .grid { stroke: #ddd; }
.line { fill: none; stroke-width: 1.6; } .own { stroke-width: 3; }
.lead { stroke-dasharray: 1 3; }
</style>
"""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


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
        text(xs.at(x), TOP + HEIGHT + 18, "num", "%g" % x if x < 1e6 else "%gM" % (x / 1e6))
    for y in ys.marks():
        out.append('<path class="grid" d="M%d %.1fh%d"/>\n' % (LEFT, ys.at(y), WIDTH))
        text(LEFT - 8, ys.at(y) + 4, "right", "%g" % y)
    ends = sorted(lines, key=lambda name: ys.at(lines[name][-1][1]))
    labels = [ys.at(lines[name][-1][1]) for name in ends]  # kept clear of each other, and inside
    for i in range(1, len(labels)):
        labels[i] = max(labels[i], labels[i - 1] + 13)
    labels[-1] = min(labels[-1], TOP + HEIGHT + 40)
    for i in reversed(range(len(labels) - 1)):
        labels[i] = min(labels[i], labels[i + 1] - 13)
    for name, y in zip(ends, labels):
        turn, i = divmod(list(lines).index(name), len(COLOURS))
        colour, dash = COLOURS[i], ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[turn]
        path = "L".join("%.1f %.1f" % (xs.at(x), ys.at(y)) for x, y in lines[name])
        out.append('<path class="line%s" stroke="%s"%s d="M%s"/>\n' %
                   (" own" if name.split(",")[0] == "balancekv" else "", colour, dash, path))
        x = xs.at(lines[name][-1][0])
        out.append('<path class="lead" stroke="%s" d="M%.1f %.1fL%d %.1f"/>\n' %
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


# ---- speed ----
SHAPES = ("M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0", "M-3.6 -3.6H3.6V3.6H-3.6Z", "M0 -4.6L4.6 3.6H-4.6Z",
          "M0 -5L5 0L0 5L-5 0Z", "M-4 -4L4 4M4 -4L-4 4", "M0 5L-5 -3.6H5Z", "M-5 0H5M0 -5V5")
FAMILIES = {"ggml flash, as in llama.cpp": ("ggml_flash_llama",),
            "ggml, best path": ("ggml",),
            "OpenBLAS, best route": ("openblas_",),
            "naive C, -Ofast": ("naive",),
            "numkong": ("numkong",),
            "torch SDPA": ("torch_",),
            "BalanceKV reference, 4k tokens": ("reference_4k",)}


def name_of(row):
    """What a row of the output is about, without the backend."""
    words = [row["case"]]
    if row["d"]:
        words += ["d %d" % row["d"], "group %d" % row["group"]]
    return " ".join(words + ["n %d" % row["n"], row["type"]])


def chosen(rows):
    """Of rows that differ only in n: for attend and prefill the one next to 4096."""
    group = collections.defaultdict(list)
    for r in rows:
        more = 0 if r["case"].startswith(("attend", "prefill")) else r["n"]
        group[r["case"], r["backend"], r["d"], r["group"], r["type"], more].append(r)
    return [min(g, key=lambda r: abs(math.log(r["n"] / 4096))) for g in group.values()]


def best_rows(rows):
    """The fastest backend of each row."""
    best = {}
    for r in rows:
        if name_of(r) not in best or r["ns"] < best[name_of(r)]["ns"]:
            best[name_of(r)] = r
    return list(best.values())


def family_best(row, prefixes):
    """(ratio, name) of the fastest peer whose name starts so; (None, None) if there is none."""
    return min(((x, peer) for peer, x in row["ratio_to"].items() if peer.startswith(prefixes)),
               default=(None, None))


def family_ratio(row, prefixes):
    return family_best(row, prefixes)[0]


def chart(title, x_name, names, series, axis, marks, draw):
    """Horizontal rows: names on the left, a legend on top. draw(i, y): the marks of row i."""
    left, step, top = 270, 20, TOP + 16 * ((len(series) + 1) // 2)
    height = step * len(names)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d">\n' %
           (axis.end + 40, top + height + 52), STYLE,
           '<rect width="100%" height="100%" fill="#fff"/>\n',
           '<text class="title" x="12" y="18">%s</text>\n' % escape(title)]
    for i, s in enumerate(series):
        x, y = 20 + 330 * (i % 2), 38 + 16 * (i // 2)
        out.append(point(x, y, i) + '<text x="%d" y="%d">%s</text>\n' % (x + 12, y + 4, escape(s)))
    for x, text in marks:
        out.append('<path class="grid" d="M%.1f %dv%d"/>\n' % (axis.at(x), top, height))
        out.append('<text class="num" x="%.1f" y="%d">%s</text>\n' %
                   (axis.at(x), top + height + 18, text))
    out.append('<text class="num" x="%.1f" y="%d">%s</text>\n' %
               ((axis.start + axis.end) / 2, top + height + 40, escape(x_name)))
    for i, name in enumerate(names):
        y = top + step * (i + 0.5)
        out.append('<text class="right" x="%d" y="%.1f">%s</text>\n' %
                   (left - 8, y + 4, escape(name)))
        out.append(draw(i, y))
    return "".join(out) + "</svg>\n"


def point(x, y, series):
    """Colour and shape both tell the series."""
    return '<path transform="translate(%.1f %.1f)" fill="%s" stroke="%s" d="%s"/>' % (
        x, y, COLOURS[series % 7], COLOURS[series % 7], SHAPES[series % 7])


class Percent:
    """Maps 0..1 to start..end."""
    start, end = 270, 770

    def at(self, x):
        return self.start + x * (self.end - self.start)


def shares(path):
    rows = [r for r in chosen(read(path)) if r["share_of_limit"]]
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    value = {(name_of(r), r["backend"]): r["share_of_limit"] for r in rows}
    names = list(dict.fromkeys(map(name_of, rows)))
    axis, width = Percent(), 14 / len(backends)

    def draw(i, y):
        out = ""
        for j, backend in enumerate(backends):
            x = value.get((names[i], backend))
            if x:
                out += '<rect x="%d" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>' % (
                    axis.start, y - 7 + j * width, axis.at(x) - axis.start, width, COLOURS[j])
        return out + "\n"

    return chart("Share of the machine's limit",
                 "of peak multiply-adds, or of read bandwidth if that is the larger share", names,
                 backends, axis, [(x / 10, "%d %%" % (10 * x)) for x in range(0, 11, 2)], draw)


def peers(path):
    rows = [r for r in best_rows(chosen(read(path)))
            if any(family_ratio(r, p) for p in FAMILIES.values())]
    if not rows:
        sys.exit("plot.py: %s has no peers; it was made without --peers" % path)
    ratios = [[family_ratio(r, p) for p in FAMILIES.values()] for r in rows]
    axis = LogAxis([1] + [x for line in ratios for x in line if x], 270, 770)

    def draw(i, y):
        return "".join(point(axis.at(x), y, j) for j, x in enumerate(ratios[i]) if x) + "\n"

    return chart("Other implementations", "times our time (fastest backend)",
                 list(map(name_of, rows)), list(FAMILIES), axis,
                 [(x, "%g" % x) for x in axis.marks()], draw)


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


def speed(path):
    out, y, width = [], 0, 0
    pictures = [growth(path), shares(path)]
    if any(family_ratio(r, p) for r in read(path) for p in FAMILIES.values()):
        pictures.append(peers(path))
    for picture in pictures:
        size = re.search(r'width="(\d+)" height="(\d+)"', picture)
        out.append(picture.replace("<svg ", '<svg y="%d" ' % y, 1))
        width, y = max(width, int(size[1])), y + int(size[2])
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d">\n'
            '<rect width="100%%" height="100%%" fill="#fff"/>\n%s</svg>\n' %
            (width, y, "".join(out)))


COMMANDS = {"quality": quality, "speed": speed, "growth": growth, "shares": shares, "peers": peers}


def main(args):
    if len(args) != 2 or args[0] not in COMMANDS:
        sys.exit(__doc__)
    print(COMMANDS[args[0]](args[1]), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
