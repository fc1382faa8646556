#!/usr/bin/env python3
"""build/web/balancekv.html, as examples/web/build.sh makes it, in headless Chromium: the errors that
stand on the page at the end of the stream are those that examples/run.sh prints, to every digit.

Needs Chromium, a C compiler and Python's standard library.
"""
import collections
import csv
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib

from bad_config import ROOT, Tally

PAGE = os.path.join(ROOT, "build", "web", "balancekv.html")
BUDGETS = 256, 512
BROWSERS = "chromium", "chromium-browser", "google-chrome"
COLOURS = {"sinks": (0xc2, 0x41, 0x0c), "window": (0x0f, 0x8a, 0x5f), "curve": (0x1d, 0x4e, 0xd8),
           "new pages": (0xb4, 0xcb, 0xf8)}  # of page.html, on a light screen


def run(command, **more):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, check=False, timeout=600, **more)


def show(arguments, fragment, home):
    """Opens the page and waits in the browser's own time, which passes as fast as it can."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + home,
               "--enable-logging=stderr", "--virtual-time-budget=60000"]
    command += ["--no-sandbox"] if os.getuid() == 0 else []  # which root cannot have
    return run(command + arguments + ["file://%s#%s" % (PAGE, fragment)])


def printed_errors(folder):
    """(method, budget) to the error that the ordinary build prints."""
    table = os.path.join(folder, "table.csv")
    run(["sh", "examples/run.sh", "--csv", table, "--budget", ",".join(map(str, BUDGETS))],
        env=dict(os.environ, BUILD_DIR=folder))
    with open(table, newline="", encoding="utf-8") as f:
        return {(x["method"], int(x["budget"])): x["rel_err"] for x in csv.DictReader(f)}


def check_file(tally):
    with open(PAGE, encoding="utf-8") as f:
        text = f.read()
    tally.check(len(text) < 4 << 20, "the page stays below 4 MiB", str(len(text)))
    code = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.S)
    tally.check(len(code) < 40000, "the trace and the module are the bulk of it", str(len(code)))
    foreign = re.findall(r"\b(?:src|import|fetch|url|XMLHttpRequest)\b\s*[=(]?.{0,40}", code)
    tally.check(not foreign, "the page loads nothing", "\n".join(foreign))


def check_errors(tally, budget, printed, home):
    shown = show(["--dump-dom"], "budget=%d&speed=1000000" % budget, home)
    tally.check("Uncaught" not in shown.stderr, "no exception", shown.stderr)
    if not tally.check('data-done="4096"' in shown.stdout, "the stream of %d ends" % budget,
                       shown.stderr):
        return
    for element, method in (("error", "balancekv"), ("rival", "window")):
        value = re.search(r'id="%s" data-value="([^"]+)">([^<]*)<' % element, shown.stdout)
        want = printed[method, budget]
        tally.check(value and "%.6g" % float(value[1]) == want,
                    "%s, %d slots: the page shows what stream prints" % (method, budget),
                    "%s, %s" % (value and value[1], want))
        percent = "%.3g" % (100 * float(want))
        tally.check(value and percent in value[2].replace(".0 %", " %"), "and says so",
                    "%s, %s" % (value and value[2], percent))


def pixels(path):
    """The pixels of an 8-bit RGB or RGBA PNG and how often each occurs."""
    with open(path, "rb") as f:
        data = f.read()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    size, packed, at = {2: 3, 6: 4}[colour], b"", 8
    assert depth == 8
    while at < len(data):
        length, = struct.unpack(">I", data[at:at + 4])
        packed += data[at + 8:at + 8 + length] if data[at + 4:at + 8] == b"IDAT" else b""
        at += 12 + length
    raw, counts, above = zlib.decompress(packed), collections.Counter(), bytes(width * size)
    for y in range(height):
        start = y * (width * size + 1)
        line, method = bytearray(raw[start + 1:start + 1 + width * size]), raw[start]
        for i in range(width * size if method else 0):
            a, b = line[i - size] if i >= size else 0, above[i]
            c = above[i - size] if i >= size else 0
            nearest = min((a, b, c), key=lambda x: abs(a + b - c - x))
            line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[method]) & 255
        counts.update(zip(line[0::size], line[1::size], line[2::size]))
        above = line
    return counts


def check_picture(tally, folder, home):
    path = os.path.join(folder, "page.png")
    show(["--screenshot=" + path, "--window-size=900,1300", "--blink-settings=preferredColorScheme=1"],
         "budget=512&speed=1000000", home)
    if not tally.check(os.path.exists(path), "there is a picture of the page"):
        return
    counts = pixels(path)
    for name, colour in COLOURS.items():
        tally.check(counts[colour] > 500, "the picture shows the %s" % name, str(counts[colour]))
    shades = sum(1 for (r, g, b), n in counts.items() if b > r + 40 and b > g + 20 and n > 50)
    tally.check(shades > 8, "and tokens of many weights", str(shades))


def main():
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        home, printed = os.path.join(folder, "home"), printed_errors(folder)
        check_file(tally)
        for budget in BUDGETS:
            check_errors(tally, budget, printed, home)
        check_picture(tally, folder, home)
    tally.done()


if __name__ == "__main__":
    main()
