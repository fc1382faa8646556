#!/usr/bin/env python3
"""build/web/balancekv.html, as examples/web/build.sh makes it, in headless Chromium: the errors that
stand on the page at the end of the stream are those that examples/run.sh prints, to every digit.

Needs Chromium, a C compiler and Python's standard library.
"""
import base64
import collections
import csv
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
import zlib

from bad_config import ROOT, Tally

PAGE = os.path.join(ROOT, "build", "web", "balancekv.html")
BUDGET = 512
BROWSERS = "chromium", "chromium-browser", "google-chrome"
COLOURS = {"sinks": (0xc2, 0x41, 0x0c), "window": (0x0f, 0x8a, 0x5f),
           "new pages": (0xb4, 0xcb, 0xf8)}  # of page.html, on a light screen


class Browser:
    """A page in Chromium, told what to do through two pipes: JSON, each message ended by a zero."""

    def __init__(self, home):
        program = next(filter(None, map(shutil.which, BROWSERS)))
        theirs, self.to = os.pipe()
        self.source, ours = os.pipe()
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []  # which root cannot have
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&%d 4>&%d' % (theirs, ours), "sh", program, "--headless",
             "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
             "--user-data-dir=" + home] + sandbox,
            pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self.sent, self.rest, self.session, self.exceptions = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")

    def call(self, method, **parameters):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.source, 1 << 20)
                if not more:
                    raise OSError("Chromium has gone")
                self.rest += more
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.exceptions.append(json.dumps(answer["params"]))
            if answer.get("id") == self.sent:
                return answer["result"]

    def open(self, fragment, width, height, theme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 640)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Page.navigate", url="about:blank")  # else only the fragment would change
        self.call("Page.navigate", url="file://%s#%s" % (PAGE, fragment))
        self.wait("document.readyState === 'complete'")

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"] \
            .get("value")

    def wait(self, expression, seconds=300):
        """True as soon as the expression is, False if that takes too long."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def picture(self):
        """Of the figure, left and lower part: enough, and a PNG is slow to read without a library."""
        clip = {"x": 0, "y": 600, "width": 500, "height": 700, "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip)["data"])

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(60)


def printed_errors(folder):
    """Method to the error that the ordinary build prints."""
    table = os.path.join(folder, "table.csv")
    subprocess.run(["sh", "examples/run.sh", "--csv", table, "--budget", str(BUDGET)], cwd=ROOT,
                   env=dict(os.environ, BUILD_DIR=folder), stdout=subprocess.DEVNULL, check=True)
    with open(table, newline="", encoding="utf-8") as f:
        return {x["method"]: x["rel_err"] for x in csv.DictReader(f)}


def check_file(tally):
    with open(PAGE, encoding="utf-8") as f:
        text = f.read()
    tally.check(len(text) < 4 << 20, "the page stays below 4 MiB", str(len(text)))
    code = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.S)
    tally.check(len(code) < 40000, "the trace and the module are the bulk of it", str(len(code)))
    foreign = re.findall(r"\b(?:src|import|fetch|url|XMLHttpRequest)\b\s*[=(]?.{0,40}", code)
    tally.check(not foreign, "the page loads nothing", "\n".join(foreign))


def check_controls(tally, browser):
    def tokens():
        return browser.value("at")

    def press(name):
        browser.value("document.getElementById('%s').click()" % name)

    browser.open("budget=512&speed=200", 1000, 1300)
    tally.check(browser.wait("at > 200", 60), "the stream starts by itself")
    press("go")
    paused = tokens()
    time.sleep(0.5)
    shown = browser.value("document.getElementById('seen').textContent")
    tally.check(200 < paused == tokens() == int(shown), "pause pauses", shown)
    press("go")
    tally.check(tokens() >= paused and browser.wait("at > %d" % (paused + 100), 60),
                "and continue continues")
    before = tokens()
    browser.value("budget.value = 1024, budget.dispatchEvent(new Event('change'))")
    tally.check(tokens() < before and browser.wait("at > 100", 60), "another budget starts anew")
    before = tokens()
    press("again")
    tally.check(tokens() < before and browser.wait("at > 10", 60), "so does restart")


def check_errors(tally, browser, printed):
    browser.open("budget=%d&speed=1000000" % BUDGET, 1000, 1300)
    if not tally.check(browser.wait("document.documentElement.dataset.done === '4096'"),
                       "the stream ends", str(browser.value("at"))):
        return
    for element, method in (("error", "balancekv"), ("rival", "window")):
        value = browser.value("+document.getElementById('%s').dataset.value" % element)
        text = browser.value("document.getElementById('%s').textContent" % element)
        tally.check("%.6g" % value == printed[method], "%s: the page shows what stream prints" % method,
                    "%r, %s" % (value, printed[method]))
        percent = "%.3g %%" % (100 * float(printed[method]))
        tally.check(text.replace(".0 %", " %").endswith(percent), "and says so", text + ", " + percent)


def pixels(data):
    """The pixels of an 8-bit RGB or RGBA PNG and how often each occurs."""
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


def check_picture(tally, browser):
    counts = pixels(browser.picture())
    for name, colour in COLOURS.items():
        tally.check(counts[colour] > 300, "the picture shows the %s" % name, str(counts[colour]))
    shades = sum(1 for (r, g, b), n in counts.items() if b > r + 40 and b > g + 20 and n > 50)
    tally.check(shades > 8, "and tokens of many weights", str(shades))
    browser.call("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": "dark"}])
    time.sleep(0.5)
    night = pixels(browser.picture())
    tally.check(night[0x0d, 0x11, 0x17] > 10000 and night[0xff, 0xff, 0xff] < 1000,
                "a dark screen gets a dark page", str(night.most_common(2)))


def check_phone(tally, browser):
    browser.open("budget=256&speed=1000", 390, 844)
    browser.wait("at > 300", 60)
    wide = browser.value("document.documentElement.scrollWidth")
    tally.check(wide == 390, "the page fits a phone", str(wide))


def main():
    tally = Tally()
    check_file(tally)
    with tempfile.TemporaryDirectory() as folder:
        printed = printed_errors(folder)
        browser = Browser(os.path.join(folder, "home"))
        try:
            check_controls(tally, browser)
            check_errors(tally, browser, printed)
            check_picture(tally, browser)
            check_phone(tally, browser)
            tally.check_none("an exception in the page", browser.exceptions)
        finally:
            browser.close()
    tally.done()


if __name__ == "__main__":
    main()
