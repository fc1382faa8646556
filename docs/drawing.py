#!/usr/bin/env python3
"""Draws docs/cache.svg: the slots of a KV head, and one halving.

    python3 docs/drawing.py [--check]     --check: is the file what this would draw?
"""
import os
import sys

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cache.svg")
STYLE = """<style>
text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2328}
.soft{fill:#59636e}.mid{text-anchor:middle}.right{text-anchor:end}.head{font-weight:600}.line{stroke:#59636e;fill:none}
.back{fill:#ffffff}.box{fill:#f2f4f7;stroke:#8c959f}.sink{fill:#c2410c}.page{fill:#1d4ed8}
.window{fill:#0f8a5f}.gone{fill:none;stroke:#8c959f;stroke-dasharray:2 2}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.line{stroke:#9198a1}
.back{fill:#0d1117}.box{fill:#161b22;stroke:#6e7681}.sink{fill:#fb923c}.page{fill:#79b0ff}
.window{fill:#3ddc97}.gone{stroke:#6e7681}}
</style>"""
WIDTH, HEIGHT, LEFT, PAGE, GAP, ROW = 880, 390, 40, 92, 10, 44
COLUMNS = 8  # tokens drawn of a page; it has 64
# Oldest first: what a page is, and of it the heights of the tokens drawn, by their weights.
BEFORE = [("level 3", [4, 0, 3, 4, 0, 2, 4, 3]), ("level 1", [2, 1, 2, 0, 1, 2, 1, 1]),
          ("level 1", [1, 2, 1, 1, 2, 0, 1, 2]), ("level 0", [0] * 8)]
CHOSEN = (1, 2)  # the pages halved
AFTER = ("level 2", [3, 1, 2, 3, 1, 3, 0, 2])


class Drawing:
    def __init__(self):
        self.parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" '
                      'height="%d" role="img"><title>The slots of a KV head, and one halving</title>'
                      % (WIDTH, HEIGHT, WIDTH, HEIGHT), STYLE,
                      '<rect class="back" width="%d" height="%d"/>' % (WIDTH, HEIGHT)]

    def text(self, x, y, words, style=""):
        self.parts.append('<text x="%g" y="%g" class="%s">%s</text>' % (x, y, style, words))

    def box(self, x, y, width, style, height=ROW):
        self.parts.append('<rect class="%s" x="%g" y="%g" width="%g" height="%g" rx="3"/>'
                          % (style, x, y, width, height))

    def line(self, path):
        self.parts.append('<path class="line" d="%s"/>' % path)

    def arrow(self, x, top, bottom):
        self.line("M%g %gV%gm-4 -6l4 6l4 -6" % (x, top, bottom))

    def page(self, x, y, weights, style="page", kept=None):
        """A page: a bar for each token, as high as the logarithm of its weight."""
        self.box(x, y, PAGE, "box")
        for i, weight in enumerate(weights):
            height = 8 + 7 * weight
            self.box(x + 6 + i * (PAGE - 8) / COLUMNS, y + ROW - 4 - height, 7,
                     style if kept is None or kept[i] else "gone", height)


def draw():
    d = Drawing()
    d.text(LEFT, 30, "One KV head: a row of slots that never grows", "head")
    y, x = 62, LEFT
    edges = []
    for label, weights, style in (
            [("", [0] * 8, "sink")] + [(name, w, "page") for name, w in BEFORE] +
            [("", [0] * 8, "window"), ("", [0] * 8, "window")]):
        d.page(x, y, weights, style)
        if label:
            d.text(x + PAGE / 2, y - 8, label, "soft mid")
        edges.append(x)
        x += PAGE + GAP
    for first, last, label in ((0, 0, "sinks, exact"), (1, 4, "pages of 64 tokens, oldest first"),
                               (5, 6, "window, exact")):
        start, end = edges[first], edges[last] + PAGE
        d.line("M%g %gv6H%gv-6" % (start, y + ROW + 6, end))
        d.text((start + end) / 2, y + ROW + 28, label, "mid")
    d.text(x, y + ROW / 2, "&#8592; a new", "soft")
    d.text(x, y + ROW / 2 + 16, "token", "soft")

    y = 218
    d.text(LEFT, y - 34, "No slot is free: one halving", "head")
    pair = [edges[page] for page in CHOSEN]
    for x, page, kept in zip(pair, CHOSEN, ([1, 0, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0])):
        d.page(x, y - 16, BEFORE[page][1], "page", kept)
    words = ("two neighbours of the lowest level, the oldest such;",
             "64 of their 128 tokens stay: drawn by importance,",
             "then balanced so that the errors of the draw cancel")
    for i, line in enumerate(words):
        d.text(pair[1] + PAGE + 24, y + 18 * i, line, "soft")
    middle = pair[0] + PAGE + GAP / 2
    d.arrow(middle, y + ROW - 10, y + ROW + 16)
    x, y = middle - PAGE / 2, y + ROW + 32
    d.page(x, y, AFTER[1])
    d.text(x - 10, y + 26, AFTER[0], "soft right")
    d.box(pair[1] + PAGE / 2 + 40, y, PAGE, "gone")
    d.text(pair[1] + PAGE + 40, y + 26, "free again", "soft mid")
    for i, line in enumerate(("a bar is a token, its height the logarithm",
                              "of its weight: the tokens it stands for")):
        d.text(pair[1] + 2 * PAGE + 24, y + 18 + 18 * i, line, "soft")
    d.text(LEFT, HEIGHT - 18, "out = &#931; w e&#738; v / &#931; w e&#738;,  s = &#10216;q, k&#10217; "
           "&#183; scale: softmax attention over the kept tokens, weights in both sums", "")
    return "\n".join(d.parts + ["</svg>"]) + "\n"


def main():
    if sys.argv[1:] == ["--check"]:
        with open(PATH, encoding="utf-8") as file:
            sys.exit(file.read() != draw() and "docs/cache.svg is not what docs/drawing.py draws")
    if sys.argv[1:]:
        sys.exit(__doc__.strip())
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(draw())


if __name__ == "__main__":
    main()
