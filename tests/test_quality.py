#!/usr/bin/env python3
"""bench/quality against NumPy: the exact reference, what each baseline keeps and how far its output
is off, on small random traces; then options and bad input.

    test_quality.py PROGRAM
"""
import json
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

import numpy as np

from bad_config import ROOT, Tally

EDGE = 256  # tokens at both ends that every method keeps in the oneshot protocol
Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 16, 20
GROUP, SCALE = Q_HEADS // KV_HEADS, DIM ** -0.5
MASK = (1 << 64) - 1


def make_trace(folder, n, seed, size=1.0):
    """Keys with a mean and drifting directions, so that methods differ."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(9, DIM))
    topic = topics[np.repeat(rng.integers(0, 9, n // 20 + 1), 20)[:n]]
    k = rng.normal(size=(n, KV_HEADS, DIM)) + 1.5 * topic[:, None] + rng.normal(size=DIM)
    q = rng.normal(size=(n, Q_HEADS, DIM)) + topic[:, None]
    v = rng.normal(size=(n, KV_HEADS, VALUE_DIM)) * rng.lognormal(size=(n, KV_HEADS, 1)) / 10
    os.makedirs(folder)
    arrays = {}
    for name, x in (("q", q), ("k", k * size), ("v", v)):
        arrays[name] = x.astype(np.float16)
        np.save(os.path.join(folder, name + ".npy"), arrays[name])
        arrays[name] = arrays[name].astype(np.float64)
    return arrays


class Program:
    def __init__(self, path):
        self.path = path

    def run(self, *args):
        return subprocess.run([self.path, *map(str, args)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, check=False)

    def rows(self, *args):
        ran = self.run(*args, "--json")
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return [json.loads(line) for line in ran.stdout.splitlines()]


# ---- the model: attention ----------------------------------------------------------------------
def softmax_rows(q, k):
    """q [rows, d], k [n, d] -> [rows, n]"""
    e = q @ k.T * SCALE
    e = np.exp(e - e.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def queries_of(t, at, head):
    return t["q"][at, head * GROUP:(head + 1) * GROUP]


def exact(t, at, head):
    return softmax_rows(queries_of(t, at, head), t["k"][:at + 1, head]) @ t["v"][:at + 1, head]


def weighted(t, at, head, kept, numerator, denominator):
    e = queries_of(t, at, head) @ t["k"][kept, head].T * SCALE
    e = np.exp(e - e.max(1, keepdims=True))
    return (e * numerator) @ t["v"][kept, head] / (e * denominator).sum(1, keepdims=True)


def relative_errors(o, exact_o):
    return np.linalg.norm(o - exact_o, axis=1) / np.linalg.norm(exact_o, axis=1)


def clamped_errors(o, exact_o):
    return np.linalg.norm(o - exact_o, axis=1) / np.linalg.norm(np.maximum(exact_o, 1e-8), axis=1)


def check_row(tally, name, row, errors, held):
    errors = np.sort(np.concatenate([e.ravel() for e in errors]))
    want = {"rel_err": errors.mean(), "rel_err_p95": errors[math.ceil(0.95 * len(errors)) - 1]}
    for key, value in want.items():
        tally.check(math.isclose(row[key], value, rel_tol=2e-4), "%s: %s" % (name, key),
                    "%g, NumPy %g" % (row[key], value))
    tally.check(row["held_max"] == held, "%s: tokens held" % name,
                "%d, NumPy %d" % (row["held_max"], held))


# ---- the model: streaming ----------------------------------------------------------------------
def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Stream:
    """One KV head: positions in the cache and one word for each."""

    def __init__(self, method, budget, sinks, window):
        self.method, self.budget, self.sinks, self.window = method, budget, sinks, window
        self.kept, self.word = [], []
        self.mean = self.moment = None

    def scores(self, t, head):
        k, v = t["k"][self.kept, head], t["v"][self.kept, head]
        if self.method == "streamingllm":
            return np.array(self.kept, float)
        if self.method == "knorm":
            return -np.linalg.norm(k, axis=1)
        if self.method == "keydiff":
            return -unit(k) @ unit(unit(k).mean(0))
        if self.method == "expected":
            a = np.stack([k @ m * SCALE + SCALE ** 2 / 2 * np.einsum(
                "ni,ij,nj->n", k, x - np.outer(m, m), k) for m, x in zip(self.mean, self.moment)])
            a = np.exp(a - a.max(1, keepdims=True))
            a = (a / a.sum(1, keepdims=True)).mean(0)
            return (a + 0.01 / len(k)) * np.linalg.norm(v, axis=1)
        return np.array(self.word)  # h2o, tova

    def append(self, t, head, at):
        if len(self.kept) == self.budget:
            scores = self.scores(t, head)
            free = [i for i, p in enumerate(self.kept)
                    if p >= self.sinks and at - p >= self.window]
            for i in sorted(sorted(free, key=lambda i: scores[i])
                            [:64 if self.method == "expected" else 1], reverse=True):
                del self.kept[i], self.word[i]
        self.kept.append(at)
        self.word.append(0.0)

    def observe(self, q, rows, all_rows):
        if self.method == "h2o":
            self.word = list(np.array(self.word) + rows.sum(0))
        if self.method == "tova":
            self.word = list(all_rows)
        if self.method == "expected":
            rate = 1.0 if self.mean is None else 1.0 / min(128, self.seen + 1)
            if self.mean is None:
                self.mean, self.moment, self.seen = 0.0, 0.0, 0
            self.seen += 1
            self.mean = self.mean + (q - self.mean) * rate
            self.moment = self.moment + (q[:, :, None] * q[:, None, :] - self.moment) * rate


def stream_errors(t, method, budget, sinks, window):
    heads = [Stream(method, budget, sinks, window) for _ in range(KV_HEADS)]
    n, errors = len(t["k"]), []
    for at in range(n):
        rows = []
        for h, s in enumerate(heads):
            s.append(t, h, at)
            rows.append(softmax_rows(queries_of(t, at, h), t["k"][s.kept, h]))
        total = np.concatenate(rows).sum(0) if method == "tova" else None
        for h, s in enumerate(heads):
            if at >= n // 2:
                errors.append(relative_errors(rows[h] @ t["v"][s.kept, h], exact(t, at, h)))
            s.observe(queries_of(t, at, h), rows[h], total)
    return errors


def check_streams(tally, program, folder, t):
    n, budget = len(t["k"]), 96
    shares = {"streamingllm": 0, "knorm": 1 / 3, "keydiff": 1 / 3, "h2o": 1 / 2, "tova": 0,
              "expected": 1 / 3}
    methods = list(shares)
    budgets = {m: budget + (64 if m == "expected" else 0) for m in methods}
    for method in methods:
        b = budgets[method]
        row, = program.rows("--trace", folder, "--budget", b, "--method", method)
        window = int(shares[method] * b)
        check_row(tally, method, row, stream_errors(t, method, b, 4, window), b)
        words = 0 if method == "streamingllm" else 1
        state = {"keydiff": 4 * KV_HEADS * DIM, "expected": 4 * Q_HEADS * (DIM + DIM * DIM)}
        tally.check(row["bytes"] == KV_HEADS * b * (2 * (DIM + VALUE_DIM) + 4 + 4 * words) +
                    state.get(method, 0), "%s: bytes" % method, str(row))
        tally.check(row["needs"] == {"h2o": "attention rows", "expected": "queries",
                                     "tova": "attention rows of all heads"}.get(method, "nothing"),
                    "%s: what it needs" % method, str(row))
    row, = program.rows("--trace", folder, "--budget", budget, "--method",
                        "keydiff:sinks=none:window=10")
    check_row(tally, "keydiff with settings", row, stream_errors(t, "keydiff", budget, 0, 10),
              budget)
    for row in program.rows("--trace", folder, "--budget", n, "--method", ",".join(methods)):
        tally.check(row["rel_err"] < 2e-6, "%s is exact with room for all" % row["method"],
                    str(row))


def check_rounding(tally, program, folder, t):
    """Baselines hold f16: every element of K and V is made a tie, some are below 2^-14."""
    os.makedirs(folder)
    ties, stored = {"q": t["q"].astype(np.float32)}, {"q": t["q"]}
    for x in "kv":
        half = (t[x] * np.where(np.arange(t[x].shape[2]) % 5, 1, 2.0 ** -14)).astype(np.float16)
        ties[x] = (half.astype(np.float64) + np.spacing(half).astype(np.float64) / 2).astype(
            np.float32)
        stored[x] = ties[x].astype(np.float16).astype(np.float64)
    for x, a in ties.items():
        np.save(os.path.join(folder, x + ".npy"), a)
        ties[x] = a.astype(np.float64)
    n = len(t["k"])
    row, = program.rows("--trace", folder, "--budget", n, "--method", "streamingllm")
    errors = [relative_errors(exact(stored, at, h), exact(ties, at, h))
              for at in range(n // 2, n) for h in range(KV_HEADS)]
    check_row(tally, "rounding to f16", row, errors, n)


# ---- the model: oneshot ------------------------------------------------------------------------
def draw(seed, head, i):
    x = (seed * 0x9E3779B97F4A7C15 + (head << 40) + i) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) >> 32


def takes(seed, head, number, n, wanted):
    return draw(seed, head, number) / 2 ** 32 * n < wanted


def received(t, head, first, last, end):
    """[GROUP, end]: attention that the prompt's tokens get from queries first..last-1."""
    total = np.zeros((GROUP, end))
    for at in range(first, last):
        rows = softmax_rows(queries_of(t, at, head), t["k"][:at + 1, head])
        total[:, :min(at + 1, end)] += rows[:, :end]
    return total


def smooth(x, width):
    padded = np.concatenate([np.zeros(width // 2), x, np.zeros(width // 2)])
    return np.array([padded[i:i + width].mean() for i in range(len(x))])


def best(score, begin, end, keep, window):
    window = min(window, keep)
    order = sorted(range(begin, end - window), key=lambda i: (-score[i], -i))
    return order[:keep - window] + list(range(end - window, end))


def walk_signs(t, head, block, seed, number, gamma, temp):
    k = t["k"][block, head]
    k = k - k.mean(0)
    v = t["v"][block, head]
    kernel = np.exp(np.minimum(k @ k.T * SCALE * temp, 600)) * (v @ v.T + 0.025)
    signs = np.zeros(len(block))
    for i in range(len(block)):
        p = draw(seed, head, number + i) / 2 ** 32
        signs[i] = 1 if p < 0.5 - gamma * (kernel[i] @ signs) else -1
    return signs


def published(t, head, begin, end, keep, seed, both, block=128, gamma=4.0, temp=1.0):
    n, rounds = end - begin, 0
    while n > keep << rounds:
        rounds += 1
    newest = ((keep << rounds) - n) // ((1 << rounds) - 1) if rounds else n
    kept = np.arange(begin, end - newest)
    numerator = np.ones(len(kept))
    for r in range(rounds):
        signs = np.concatenate([walk_signs(t, head, kept[i:i + block], seed,
                                           (2 * r + 1) << 32 | i, gamma, temp)
                                for i in range(0, len(kept), block)])
        half, plus = len(kept) // 2, int((signs > 0).sum())
        left, wanted = {1: plus, -1: len(kept) - plus}, {1: min(plus, half)}
        wanted[-1] = half - wanted[1]
        chosen = []
        for i, s in enumerate(signs):
            if takes(seed, head, (2 * r + 2) << 32 | i, left[s], wanted[s]):
                wanted[s] -= 1
                chosen.append(i)
            left[s] -= 1
        numerator = (numerator * np.where(signs > 0, 2, 1))[chosen]
        kept = kept[chosen]
    denominator = numerator if both else np.full(len(kept), 2.0 ** rounds)
    ones = np.ones(newest)
    return (list(kept) + list(range(end - newest, end)), np.concatenate([numerator, ones]),
            np.concatenate([denominator, ones]))


def kvcrush(t, head, begin, end, keep, seed, anchor, score):
    bits = np.zeros((end, Q_HEADS), int)
    for h in range(KV_HEADS):
        for r, row in enumerate(received(t, h, end - 64, end, end)):
            bits[best(row, begin, end, keep, 0), h * GROUP + r] = 1
    kept = best(score, begin, end, keep - int(0.25 * keep), 64)
    rest = [i for i in range(begin, end) if i not in set(kept)]
    if anchor == "random":
        target = np.array([draw(seed, head, h) & 1 for h in range(Q_HEADS)])
    elif anchor == "mean":
        target = (2 * bits[rest].sum(0) > len(rest)).astype(int)
    else:
        target = np.arange(Q_HEADS) % 2
    rest.sort(key=lambda i: (int((bits[i] != target).sum()), -i))
    extra = int(0.25 * keep)
    return kept + [rest[(2 * i + 1) * len(rest) // (2 * extra)] for i in range(extra)]


def select(t, method, head, begin, end, keep, seed):
    """Positions, weights in the numerator, weights in the denominator."""
    k, v = t["k"][:end, head], t["v"][:end, head]
    if method == "uniform-once":
        kept = []
        for i in range(end - begin):
            if takes(seed, head, i, end - begin - i, keep - len(kept)):
                kept.append(begin + i)
        return kept, np.full(keep, (end - begin) / keep), np.full(keep, (end - begin) / keep)
    if method.startswith("published"):
        settings = dict(x.split("=") for x in method.split(":")[1:])
        return published(t, head, begin, end, keep, seed, method.startswith("published-both"),
                         int(settings.get("block", 128)), temp=float(settings.get("temp", 1)))
    if method in ("walk", "uniform:window=none"):  # what lies before is sinks
        window = 0 if ":" in method else 64  # all but two of the pages
        pages = Pages(method.split(":")[0], keep + begin, begin, window, seed, head, 1.0)
        for at in range(end):
            pages.append(t, at)
        kept, w = pages.tokens()
        return kept[begin:], w[begin:], w[begin:]
    window, score = 0, None
    if method == "streamingllm":
        window, score = keep, np.zeros(end)
    elif method == "knorm":
        score = -np.linalg.norm(k, axis=1)
    elif method == "keydiff":
        score = -unit(k) @ unit(k).mean(0)
    elif method == "h2o":
        window, score = keep // 2, received(t, head, 0, end, end).sum(0)
    elif method == "tova":
        score = sum(received(t, h, end - 1, end, end).sum(0) for h in range(KV_HEADS))
    elif method == "expected":
        q = t["q"][end - 128:end, head * GROUP:(head + 1) * GROUP]
        a = []
        for r in range(GROUP):
            mean, cov = q[:, r].mean(0), np.cov(q[:, r].T, bias=True)
            a.append(k[begin:] @ mean * SCALE + SCALE ** 2 / 2 *
                     np.einsum("ni,ij,nj->n", k[begin:], cov, k[begin:]))
        a = np.exp(a - np.max(a, 1, keepdims=True))
        a = (a / a.sum(1, keepdims=True)).mean(0)
        score = np.concatenate([np.zeros(begin), (a + 0.01 / len(a)) *
                                np.linalg.norm(v[begin:], axis=1)])
    else:
        first = end if method == "snapkv-ahead" else end - 64
        window = 0 if method == "snapkv-ahead" else 64
        score = smooth(received(t, head, first, first + 64, end).sum(0), 5)
    if method.startswith("kvcrush"):
        kept = kvcrush(t, head, begin, end, keep, seed, method.split("-")[1], score)
    else:
        kept = best(score, begin, end, keep, window)
    return kept, np.ones(len(kept)), np.ones(len(kept))


def check_oneshot(tally, program, folder, t, layer, share, methods):
    n, seed = len(t["k"]), 3
    begin, end, keep = EDGE, n - EDGE, (n - 2 * EDGE) // share
    rows = program.rows("--trace", folder, "--protocol", "oneshot", "--budget", "1/%d" % share,
                        "--seed", seed, "--method", methods)
    for row in rows:
        most = keep
        if row["method"] == "pyramidkv":  # a line from 1.95 to 0.05 of the mean over 30 layers
            most = int(1.95 * keep - 1.9 * keep * layer / 29)
        errors, clamped, held, weighted_slots = [], [], 0, 0
        for h in range(KV_HEADS):
            kept, numerator, denominator = select(t, row["method"], h, begin, end, most, seed)
            held = max(held, len(kept) + 2 * EDGE)
            weighted_slots += (len(kept) + 2 * EDGE) * (max(denominator) > 1)
            for at in range(end, n):
                tail = list(range(end, at + 1))
                ones = np.ones(EDGE + len(tail))
                o = weighted(t, at, h, list(range(EDGE)) + tail + list(kept),
                             np.concatenate([ones, numerator]),
                             np.concatenate([ones, denominator]))
                errors.append(relative_errors(o, exact(t, at, h)))
                clamped.append(clamped_errors(o, exact(t, at, h)))
        check_row(tally, "oneshot " + row["method"], row, errors, held)
        tally.check(math.isclose(row["rel_err_clamped"], np.mean(clamped), rel_tol=2e-4),
                    "oneshot %s: the clamped error" % row["method"], str(row))
        slots = KV_HEADS * held
        tally.check(row["bytes"] == slots * (2 * (DIM + VALUE_DIM) + 4) + 4 * weighted_slots,
                    "oneshot %s: bytes" % row["method"], str(row))


# ---- the model: pages ---------------------------------------------------------------------------
def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def page_draw(seed, head, halving, i):
    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden * (head + 1)) & MASK) + golden * (halving + 1)) & MASK)
    return mix((key + golden * (i + 1)) & MASK) >> 40


class Pages:
    """One KV head under a rule of bench/pages.c."""

    def __init__(self, method, budget, sinks, window, seed, head, temp):
        self.method, self.seed, self.head, self.temp = method, seed, head, temp
        slots, sinks = budget // 16 * 16, -(-sinks // 16) * 16
        self.n_pages = (slots - sinks) // 64
        self.window_pages = -(-window // 64)
        self.sinks = slots - 64 * self.n_pages
        self.first, self.pages, self.halvings = [], [], 0  # page: [level, positions, weights]

    def halve(self, t):
        levels = [max(a[0], b[0]) for a, b in zip(self.pages, self.pages[1:])]
        levels = levels[:self.n_pages - self.window_pages - 1]
        i = levels.index(min(levels))
        kept = self.pages[i][1] + self.pages[i + 1][1]
        w = np.array(self.pages[i][2] + self.pages[i + 1][2])
        k, v = t["k"][kept, self.head], t["v"][kept, self.head]
        k = k - k.mean(0)
        e = k @ k.T * SCALE * self.temp
        kernel = np.exp(e - e.diagonal().max()) * (v @ v.T + 0.025) * np.outer(w, w)
        chosen, w = getattr(self, self.method)(kernel, w)
        self.halvings += 1
        self.pages[i:i + 2] = [[levels[i] + 1, [kept[x] for x in chosen], list(w)]]

    def number(self, i):
        return page_draw(self.seed, self.head, self.halvings, i)

    @staticmethod
    def rescaled(chosen, w):
        return chosen, np.maximum(w[chosen] * (w.sum() / w[chosen].sum()), 1)

    def walk(self, kernel, w):
        sign = np.zeros(128)
        for i in range(128):
            f = kernel[i] @ sign / kernel.diagonal().max()
            sign[i] = 1 if self.number(i) / 2 ** 24 < 0.5 - 4 * f else -1
            for x in (1, -1):
                if (sign[:i] == x).sum() == 64:
                    sign[i] = -x
        return self.rescaled(np.flatnonzero(sign > 0), w)

    def uniform(self, _, w):
        order = list(range(128))
        for i in range(64):
            j = i + (self.number(i) * (128 - i) >> 24)
            order[i], order[j] = order[j], order[i]
        return self.rescaled(sorted(order[:64]), w)

    def stride(self, _, w):
        chosen = np.arange(self.number(0) >> 23, 128, 2)
        return chosen, w[::2] + w[1::2]

    def pair(self, kernel, w):
        f, chosen = np.zeros(128), []
        for a in range(0, 128, 2):
            b = a + 1
            if f[a] / w[a] == f[b] / w[b]:
                first = self.number(a // 2) / 2 ** 24 < w[a] / (w[a] + w[b])
            else:
                first = f[a] / w[a] < f[b] / w[b]
            stays, goes = (a, b) if first else (b, a)
            f += w[goes] / w[stays] * kernel[stays] - kernel[goes]
            chosen.append(stays)
        return chosen, w[::2] + w[1::2]

    def append(self, t, at):
        if at < self.sinks:
            self.first.append(at)
            return
        if not self.pages or len(self.pages[-1][1]) == 64:
            if len(self.pages) == self.n_pages:
                self.halve(t)
            self.pages.append([0, [], []])
        self.pages[-1][1].append(at)
        self.pages[-1][2].append(1.0)

    def tokens(self):
        kept = self.first + [i for p in self.pages for i in p[1]]
        return kept, np.array([1.0] * len(self.first) + [w for p in self.pages for w in p[2]])


def check_pages(tally, program, folder, t):
    n = len(t["k"])
    for method, budget, sinks, window, settings in (
            ("walk", 300, 4, 64, ""), ("uniform", 300, 4, 64, ""), ("pair", 300, 4, 64, ""),
            ("stride", 300, 4, 64, ""), ("walk", 400, 30, 0, ":sinks=30:window=none:temp=0.1"),
            ("pair", 400, 30, 0, ":sinks=30:window=none:temp=0.1"), ("walk", 592, 4, 128, "")):
        temp = 0.1 if "temp" in settings else 1.0
        row, = program.rows("--trace", folder, "--budget", budget, "--seed", 5, "--method",
                            method + settings)
        heads = [Pages(method, budget, sinks, window, 5, h, temp) for h in range(KV_HEADS)]
        errors, held = [], 0
        for at in range(n):
            for h, pages in enumerate(heads):
                pages.append(t, at)
                kept, w = pages.tokens()
                held = max(held, len(kept))
                if at >= n // 2:
                    errors.append(relative_errors(weighted(t, at, h, kept, w, w),
                                                  exact(t, at, h)))
        check_row(tally, "%s %d" % (method, budget), row, errors, held)


# ---- the systems with proofs -------------------------------------------------------------------
class Pool:
    """One KV head of algorithm1 or hybrid; a token: [position, group, level, numerator, denominator],
    group -1: exact."""

    def __init__(self, t, head, budget, sinks, window, seed, block):
        self.t, self.head, self.budget, self.block = t, head, budget, block
        self.sinks, self.window, self.seed = sinks, window, seed + (head << 32)
        self.tokens, self.draws, self.waiting, self.failures, self.held = [], 0, {}, 0, 0
        self.parts = []  # hybrid: [centre, n, sum k, sum v, sum k v^T]
        self.wanted = max(1, (budget - sinks - window) // 3 // self.part_slots())

    @staticmethod
    def part_slots():
        return -(-4 * (2 * DIM + VALUE_DIM + DIM * VALUE_DIM + 1) // (2 * (DIM + VALUE_DIM)))

    def draw(self):
        self.draws += 1
        return (mix((self.draws * 0x9E3779B97F4A7C15 + self.seed) & MASK) >> 11) / 2 ** 53

    def halve(self, batch, c, even, centre=None, values=True):
        at = [x[0] for x in batch]
        if not at:
            return
        k, v = self.t["k"][at, self.head], self.t["v"][at, self.head]
        x = (k - (0 if centre is None else centre)) @ (k - (0 if centre is None else centre)).T
        x = x * SCALE
        gram = np.exp(x) if centre is None else np.exp(x) - 1 - x
        if values:
            gram = gram * (v @ v.T + (0 if centre is None else 0.025))
        gram, n, signs = gram / gram.diagonal().max(), len(batch), []
        for i in range(n):
            f = gram[i, :i] @ np.array(signs) if i else 0.0
            self.failures += not even and abs(f) > c
            sign = 1 if self.draw() < 0.5 - f / (2 * c) else -1
            if even and signs.count(1) == n // 2:
                sign = -1
            if even and signs.count(-1) == n - n // 2:
                sign = 1
            signs.append(sign)
        kept = 1 if even or 2 * signs.count(1) <= n else -1
        for x, sign in zip(batch, signs):
            x[2] += 1
            x[3:] = [2 * x[3], 2 * x[4]]
            if sign != kept:
                self.tokens.remove(x)

    def batch(self, group, level, most):
        return sorted(x for x in self.tokens if x[1:3] == [group, level])[:most]

    def leaving(self, at):
        old = at - self.window
        return [x for x in self.tokens if x[0] == old and x[1] == -1 and old >= self.sinks]

    def reduce(self, group, n_tokens):
        level, waiting = 0, self.waiting.setdefault(group, [0] * 32)
        waiting[0] += 1
        if waiting[0] < self.block:
            return
        while True:
            self.halve(self.batch(group, level, self.block), 30 * math.log(n_tokens / 0.01), False,
                       values=group != "all")
            waiting[level] = 0
            level += 1
            waiting[level] += 1
            if waiting[level] < 2:
                return

    def append_algorithm1(self, at):
        self.tokens.append([at, -1, 0, 1.0, 1.0])
        for x in self.leaving(at):
            norm = np.linalg.norm(self.t["v"][x[0], self.head])
            x[1], x[4] = "octave %d" % math.frexp(norm)[1], 0.0
            self.tokens.append([x[0], "all", 0, 0.0, 1.0])
            self.held = max(self.held, len(self.tokens))
            self.reduce(x[1], len(self.t["k"]))
            self.reduce("all", len(self.t["k"]))

    def nearest(self, k):
        far = [np.sum((k - p[0]) ** 2) for p in self.parts]
        return int(np.argmin(far)), min(far)

    def assign(self, x):
        k, v = self.t["k"][x[0], self.head], self.t["v"][x[0], self.head]
        x[1] = self.nearest(k)[0]
        part = self.parts[x[1]]
        part[1:] = [part[1] + 1, part[2] + k - part[0], part[3] + v,
                    part[4] + np.outer(k - part[0], v)]

    def append_hybrid(self, at):
        self.tokens.append([at, -1, 0, 1.0, 1.0])
        for x in self.leaving(at):
            if self.parts:
                self.assign(x)
                continue
            x[1] = 99  # waits
            first = self.batch(99, 0, 64)
            if len(first) < 64:
                continue
            keys = [self.t["k"][y[0], self.head] for y in first]
            self.parts.append([keys[0], 0, 0, 0, 0])
            while len(self.parts) < self.wanted:
                far = [self.nearest(k)[1] for k in keys]
                self.parts.append([keys[int(np.argmax(far))], 0, 0, 0, 0])
            for y in first:
                self.assign(y)
        while len(self.tokens) + self.wanted * self.part_slots() >= self.budget:
            best = []
            for level in range(32):
                for g in range(len(self.parts)):
                    group = self.batch(g, level, 10 ** 6)
                    if len(group) > len(best):
                        best = group
                if len(best) >= 64:
                    break
            self.halve(best[:128], 0.125, True, self.parts[best[0][1]][0])
        self.held = max(self.held, len(self.tokens) + self.wanted * self.part_slots())

    def attend(self, at):
        q = queries_of(self.t, at, self.head)
        kept, group = [x[0] for x in self.tokens], [x[1] for x in self.tokens]
        e = np.exp(q @ self.t["k"][kept, self.head].T * SCALE)
        total, out = np.zeros(GROUP), np.zeros((GROUP, VALUE_DIM))
        for g, (c, n, k, v, kv) in enumerate(self.parts):
            base = np.exp(q @ c * SCALE)
            total += base * (n + q @ np.asarray(k) * SCALE)
            out += base[:, None] * (v + q @ np.asarray(kv) * SCALE)
            here = np.array(group) == g
            x = (q @ self.t["k"][kept, self.head].T - (q @ c)[:, None]) * SCALE
            e[:, here] -= ((1 + x) * base[:, None])[:, here]
        total += e @ [x[4] for x in self.tokens]
        out += (e * [x[3] for x in self.tokens]) @ self.t["v"][kept, self.head]
        return np.where(total[:, None] > 0, out / total[:, None], 0.0)


def check_pools(tally, program, folder, t):
    n = len(t["k"])
    for method, budget, sinks, window, block in (
            ("algorithm1:block=20", 400, 0, 0, 20),
            ("algorithm1:block=14:sinks=3:window=50", 400, 3, 50, 14), ("hybrid", 350, 4, 116, 0),
            ("hybrid:window=none", 330, 4, 0, 0)):
        row, = program.rows("--trace", folder, "--budget", budget, "--seed", 7, "--method", method)
        pools = [Pool(t, h, budget, sinks, window, 7, block) for h in range(KV_HEADS)]
        errors, held = [], 0
        for at in range(n):
            for h, pool in enumerate(pools):
                if method.startswith("hybrid"):
                    pool.append_hybrid(at)
                else:
                    pool.append_algorithm1(at)
                if at >= n // 2:
                    errors.append(relative_errors(pool.attend(at), exact(t, at, h)))
                held = max(held, len(pool.tokens) + (
                    pool.wanted * pool.part_slots() if method.startswith("hybrid") else 0))
        check_row(tally, method, row, errors, held)


def check_theory(tally, program, folder, small):
    row, = program.rows("--trace", folder, "--budget", 2000, "--method", "algorithm1:block=900")
    tally.check(row["rel_err"] < 1e-5 and row["failures"] == 0,
                "algorithm1 is exact while nothing is reduced", str(row))
    row, = program.rows("--trace", folder, "--budget", 1200, "--method", "hybrid")
    tally.check(row["rel_err"] < 1e-5, "hybrid is exact with room for all", str(row))
    for budget in (300, 600):
        row, = program.rows("--trace", folder, "--budget", budget, "--method", "algorithm1")
        tally.check(0.5 * budget < row["held_max"] <= budget, "algorithm1 fills its budget",
                    str(row))
    # Where its series converges fast the hybrid must win, and by much: that is what it is for.
    rows = program.rows("--trace", small, "--budget", 330, "--method", "hybrid,walk", "--seed",
                        "1,2,3")
    error = {m: np.mean([r["rel_err"] for r in rows if r["method"] == m])
             for m in ("hybrid", "walk")}
    tally.check(error["hybrid"] < error["walk"] / 2, "hybrid wins on short keys", str(error))


# ---- tables and pictures -----------------------------------------------------------------------
def script(name, *args):
    ran = subprocess.run([sys.executable, os.path.join(ROOT, "bench", name), *args],
                         stdout=subprocess.PIPE, universal_newlines=True, check=True)
    return ran.stdout


def check_reports(tally, program, folder, work):
    path, text = os.path.join(work, "stream.json"), os.path.join(work, "text.md")
    args = ("--trace", "%s,%s+%s" % (folder, folder, folder), "--budget", "256,320", "--seed",
            "1,2", "--method", "balancekv,walk,knorm,keydiff")
    with open(path, "w", encoding="utf-8") as f:
        f.write(program.run(*args, "--json").stdout)
    rows = program.rows(*args)
    name = os.path.basename(folder)
    tally.check({r["trace"] for r in rows} == {name, name + "+" + name} and
                {r["tokens"] for r in rows} == {700, 1400}, "folders are joined by +")
    means = script("tables.py", "means", path)
    want = [np.mean([r["rel_err"] for r in rows if r["method"] == "walk" and r["seed"] == s and
                     r["budget"] == 256]) for s in (1, 2)]
    half = 12.71 * np.std(want, ddof=1) / 2 ** 0.5  # Student's t, one degree of freedom
    line = next(x for x in means.splitlines() if x.startswith("| `walk`")).split()
    tally.check(abs(float(line[3]) - np.mean(want)) < 1e-3 and abs(float(line[5]) - half) < 1e-3,
                "a mean and its interval", means + str((want, half)))
    table = script("tables.py", "traces", path)
    best = min(("knorm", "keydiff"), key=lambda m: np.mean(
        [r["rel_err"] for r in rows if r["method"] == m and r["trace"] == name and
         r["budget"] == 320]))
    line = next(x for x in table.splitlines() if x.startswith("| %s |" % name))
    tally.check(line.rstrip(" |").endswith(" " + best), "the best other method", table + best)
    error = {(m, t, b): np.mean([r["rel_err"] for r in rows if r["method"] == m and r["budget"] == b
                                 and r["trace"] == t])
             for m in ("balancekv", "walk") for t in (name, name + "+" + name) for b in (256, 320)}
    ratios = [error["walk", t, 256] / error["balancekv", t, 256] for t in (name, name + "+" + name)]
    settings = script("tables.py", "settings", path)
    tally.check("| `walk` | %.2f (%.2f to %.2f) |" % (
        np.exp(np.mean(np.log(ratios))), min(ratios), max(ratios)) in settings,
                "ratios to the first method", settings + str(ratios))
    growth = script("tables.py", "tokens", path)
    line = next(x for x in growth.splitlines() if x.startswith("| `knorm`")).split()
    want = [np.mean([r["rel_err"] for r in rows if r["method"] == "knorm" and r["tokens"] == n])
            for n in (700, 1400)]
    tally.check(growth.startswith("| tokens | 700 | 1400 |") and
                np.allclose([float(line[3]), float(line[5])], want, atol=1e-3),
                "errors by tokens", growth + str(want))
    pair = os.path.join(work, "pair.json")
    with open(pair, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows if r["method"] in ("balancekv", "walk"))
    storage = script("tables.py", "storage", pair).splitlines()
    want = [sum(error["walk", t, b] for t in (name, name + "+" + name)) /
            sum(error["balancekv", t, b] for t in (name, name + "+" + name)) for b in (256, 320)]
    tally.check(storage[-1] == "| `walk`: error / first | %.2f | %.2f |" % tuple(want),
                "two methods at equal bytes", "\n".join(storage) + str(want))
    with open(text, "w", encoding="utf-8") as f:
        f.write("a\n<!-- means stream -->\nold\n<!-- end -->\nb\n"
                "<!-- means none -->x<!-- end -->\n")
    script("tables.py", "update", text, work)
    with open(text, encoding="utf-8") as f:
        tally.check(f.read() == "a\n<!-- means stream -->\n%s<!-- end -->\nb\n"
                    "<!-- means none -->x<!-- end -->\n" % means, "update replaces one table")
    out = os.path.join(work, "quality out")
    os.mkdir(out)
    with open(os.path.join(out, "stream.json"), "w", encoding="utf-8") as f:
        f.write("of an earlier run\n")
    ran = subprocess.run(["sh", os.path.join(ROOT, "bench", "quality.sh"), folder], check=False,
                         env={**os.environ, "OUT": out, "ONLY": "storage", "SEEDS": "1"},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    with open(os.path.join(out, "stream.json"), encoding="utf-8") as f:
        tally.check(ran.returncode == 0 and f.read() == "of an earlier run\n" and
                    ran.stdout.count("| mean of ") == 1 and "kv_type=i8`: error |" in ran.stdout and
                    os.path.getsize(os.path.join(out, "storage.json")) > 0,
                    "quality.sh: one table, and what was there stays", ran.stdout + ran.stderr)
    picture = xml.etree.ElementTree.fromstring(script("plot.py", "quality", path))
    words = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    tally.check(all(m in words for m in ("balancekv", "walk", "knorm", "keydiff")) and
                not any("nan" in e.get("d") for e in picture.iter(
                    "{http://www.w3.org/2000/svg}path")), "a line for each method", str(words))
    with open(text, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({**rows[0], "method": "m%d" % i}) + "\n" for i in range(28))
    tally.check("m27" in script("plot.py", "quality", text), "a line for each of 28 methods")
    drawn = os.path.join(work, "it's a picture.svg")
    ran = subprocess.run([program.path, *args, "--plot", drawn], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, universal_newlines=True, check=False,
                         env=dict(os.environ, PYTHON=sys.executable))
    with open(drawn, encoding="utf-8") as f:
        tally.check(ran.returncode == 0 and f.read() == script("plot.py", "quality", path),
                    "--plot draws what plot.py draws of --json", ran.stderr)
    ran = subprocess.run([program.path, *args, "--plot", drawn], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, universal_newlines=True, check=False,
                         env=dict(os.environ, PYTHON="false"))
    tally.check(ran.returncode == 2 and "no picture" in ran.stderr and "walk" in ran.stdout and
                not os.path.exists(drawn), "no picture: said, and the table stands", ran.stderr)


def check_join(tally, program, work):
    """Recordings of two texts, joined, are one recording of both: RoPE is from its definition."""
    def rope(x, start, halves):
        angle = (start + np.arange(len(x)))[:, None] * 1e4 ** (-np.arange(0, DIM, 2) / DIM)
        turn = np.exp(1j * angle)[:, None]
        if halves:
            z = (x[..., :DIM // 2] + 1j * x[..., DIM // 2:]) * turn
            return np.concatenate((z.real, z.imag), -1)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((z.real, z.imag), -1).reshape(x.shape)

    rng = np.random.default_rng(7)
    for halves in (False, True):
        plain = {"q": rng.normal(size=(300, Q_HEADS, DIM)),
                 "k": rng.normal(size=(300, KV_HEADS, DIM)),
                 "v": rng.normal(size=(300, KV_HEADS, VALUE_DIM))}
        names = [os.path.join(work, "%s%d" % (part, halves)) for part in ("one", "two", "both")]
        for folder, first, last in ((names[0], 0, 180), (names[1], 180, 300)):
            os.makedirs(folder)
            for name, x in plain.items():
                x = x[first:last] if name == "v" else rope(x[first:last], 0, halves)
                np.save(os.path.join(folder, name + ".npy"), x.astype(np.float32))
        script("join.py", "--theta", "10000", *["--halves"] * halves, names[2], *names[:2])
        for name, x in plain.items():
            got = np.load(os.path.join(names[2], name + ".npy"))
            want = x if name == "v" else rope(x, 0, halves)
            tally.check(got.dtype == np.float32 and np.allclose(got, want, atol=1e-5),
                        "join.py, halves %d: %s as of one text" % (halves, name))
        tally.check(program.rows("--trace", names[2], "--budget", 256)[0]["tokens"] == 300,
                    "bench/quality takes it")


def check_shrunk(tally, program, prompt):
    rows = {(r["method"], r["budget"]): r for r in program.rows(
        "--trace", prompt, "--protocol", "oneshot", "--budget", "640,896", "--method",
        "shrunk,balancekv,balancekv:importance=1,balancekv:importance=none,shrunk:rule=window,"
        "window")}
    tally.check(all(r["held_max"] <= b for (_, b), r in rows.items()), "shrunk keeps to the budget")
    for what in ("bytes", "rel_err"):
        tally.check(rows["shrunk:rule=window", 640][what] == rows["window", 640][what],
                    "a window is a window, shrunk or not: " + what, str(rows))
    tally.check(rows["shrunk", 640]["rel_err"] != rows["balancekv", 640]["rel_err"] and
                rows["shrunk", 640]["bytes"] == rows["balancekv", 640]["bytes"],
                "shrunk chooses at the end", str(rows))
    tally.check([rows[m, 640]["needs"] for m in (
        "shrunk", "balancekv", "balancekv:importance=1", "balancekv:importance=none")] ==
                ["queries", "queries", "nothing", "nothing"], "needs, as configured")


# ---- options and bad input ---------------------------------------------------------------------
def strip(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def check_options(tally, program, folder, t):
    base = ("--trace", folder, "--budget", "256,320")
    weighted_ones = "balancekv,walk,uniform,window,pair,stride"
    own, same = program.rows("--trace", folder, "--budget", 256, "--method",
                             "balancekv,window:rule=sample")
    tally.check(own["rel_err"] == same["rel_err"], "the default is rule sample", str((own, same)))
    plain, = program.rows("--trace", folder, "--budget", 256, "--method", "balancekv:importance=none")
    tally.check(own["rel_err"] != plain["rel_err"], "importance is set", str((own, plain)))
    rows = strip(program.rows(*base, "--method", weighted_ones, "--seed", "1,2"))
    tally.check(len(rows) == 24, "one line for each method, budget and seed", str(len(rows)))
    fields = "trace protocol method budget held_max bytes rel_err rel_err_p95 seed".split()
    tally.check(all(list(r)[:9] == fields for r in rows), "the fields, in order", str(rows[0]))
    tally.check(all(r["trace"] == os.path.basename(folder) and r["held_max"] <= r["budget"] and
                    0 < r["rel_err"] < r["rel_err_p95"] for r in rows), "plausible values")
    told = [r for r in rows if r["method"] == "balancekv"]
    tally.check(all(("est_err" in r) == (r["method"] in ("balancekv", "window")) for r in rows),
                "estimates are the header's", str(rows[0]))
    tally.check(all(0 < e < 4 * r["rel_err"] for r in told for e in r["head_est"]) and
                all(math.isclose(r["est_err"], np.mean(r["head_est"]), rel_tol=1e-5) for r in told),
                "estimates are plausible", str(told[0]))
    ratios = [e / x for r in told for e, x in zip(r["head_est"], r["head_err"])]
    said = program.run(*base, "--seed", "1,2").stdout.splitlines()[-1]
    tally.check(said == "estimate within a factor 2: %d of %d" % (
        sum(0.5 < x < 2 for x in ratios), len(ratios)), "estimates are counted", said)
    for option in (("--chunk", 1), ("--chunk", 7), ("--threads", 1), ("--threads", 5)):
        again = program.rows(*base, "--method", weighted_ones, "--seed", "1,2", *option)
        tally.check(strip(again) == rows, "%s %d changes nothing" % option)
    first, second = rows[8:10]
    tally.check(first["rel_err"] != second["rel_err"], "seeds differ", str((first, second)))
    same = program.rows(*base, "--method", "window", "--seed", "1,2")
    tally.check(same[0]["rel_err"] == same[1]["rel_err"] and same[1]["seed"] == 2,
                "a method without randomness has a line for each seed")
    n = len(t["k"])
    for kv_type, bound in (("f32", 1e-5), ("f16", 1e-5), ("bf16", 1e-1), ("i8", 1e-1),
                          ("i4", 3e-1)):
        row, = program.rows("--trace", folder, "--budget", n + 16, "--set", "kv_type=" + kv_type)
        tally.check(row["rel_err"] < bound, "balancekv is exact with room for all", str(row))
    cut, = program.rows("--trace", folder, "--budget", 256, "--tokens", 400)
    tally.check(cut["tokens"] == 400 and cut["held_max"] == 256, "--tokens cuts", str(cut))
    some, = program.rows("--trace", folder, "--budget", 256, "--every", 3, "--method",
                         "streamingllm")
    errors = stream_errors(t, "streamingllm", 256, 4, 0)
    heads = [np.concatenate(errors[i:i + KV_HEADS]) for i in range(0, len(errors), KV_HEADS)]
    tally.check(math.isclose(some["rel_err"], np.mean(heads[::3]), rel_tol=2e-4),
                "--every takes one query in so many", str(some))
    set_all = program.rows(*base, "--method", "walk,knorm:window=20", "--set", "window=64")
    by_hand = program.rows(*base, "--method", "walk:window=64,knorm:window=20")
    tally.check([r["rel_err"] for r in set_all] == [r["rel_err"] for r in by_hand],
                "--set reaches every method, its own settings win")
    table = program.run(*base, "--method", "pair")
    tally.check(table.returncode == 0 and len(table.stdout.splitlines()) == 3 and
                not table.stderr, "without --json a table", table.stdout + table.stderr)
    listing = program.run("--list")
    tally.check("keydiff" in listing.stdout and "arXiv 2404.14469" in listing.stdout,
                "--list has methods and papers", listing.stdout)


def check_bad_input(tally, program, folder, work):
    def bad(name, change):
        path = os.path.join(work, name)
        os.makedirs(path)
        arrays = {x: np.load(os.path.join(folder, x + ".npy")) for x in "qkv"}
        change(arrays)
        for x, a in arrays.items():
            np.save(os.path.join(path, x + ".npy"), a)
        return path

    def put_nan(a):
        a["k"][5, 1, 3] = np.nan

    def drop_heads(a):
        a["q"] = a["q"][:, :5]

    def shorten(a):
        a["v"] = a["v"][:-1]

    def keep_heads(a):
        a.update({x: y[:, :3 if x == "q" else 1] for x, y in a.items()})

    ok = ("--trace", folder)
    cases = {
        "--trace is missing": (),
        "No such file": ("--trace", os.path.join(work, "none")),
        "NaN": ("--trace", bad("nan", put_nan)),
        "multiple": ("--trace", bad("heads", drop_heads)),
        "must agree": ("--trace", bad("short", shorten)),
        "none of: balancekv sample window": (*ok, "--method", "magic"),
        "no stream protocol": (*ok, "--method", "snapkv"),
        "the smallest that works here is": (*ok, "--budget", 64),
        "the smallest that works here is 70": (*ok, "--budget", 64, "--method",
                                               "expected:window=2"),
        "oneshot needs more than 512": (*ok, "--protocol", "oneshot", "--budget", 512),
        "needs --protocol oneshot": (*ok, "--budget", "1/2"),
        "no share like 1/8": (*ok, "--protocol", "oneshot", "--budget", "3/2"),
        "neither stream nor oneshot": (*ok, "--protocol", "batch"),
        "no method here has a setting 'colour'": (*ok, "--set", "colour=1"),
        "there is no setting 'colour'": (*ok, "--method", "pair:colour=1"),
        "not KEY=VALUE": (*ok, "--method", "pair:window"),
        "there is no 'best'": (*ok, "--set", "rule=best"),
        "is not a number of": (*ok, "--seed", "one"),
        "is not a number": (*ok, "--set", "temp=strong"),
        "temp, scale": (*ok, "--set", "temp=-1"),
        "has 700 tokens, not 701": (*ok, "--tokens", 701),
        "No such file or directory; a": ("--trace", folder + "+" + os.path.join(work, "none")),
        "other heads": ("--trace", folder + "+" + bad("few", keep_heads)),
        "too few": (*ok, "--protocol", "oneshot", "--tokens", 512),
        "unknown option '--colour'": (*ok, "--colour", 1),
        "--budget needs a value": (*ok, "--budget"),
        "an item is empty": (*ok, "--method", "pair,"),
        "at most 64 items": (*ok, "--budget", ",".join(["256"] * 65)),
    }
    for message, args in cases.items():
        ran = program.run(*args)
        tally.check(ran.returncode == 2 and message in ran.stderr and not ran.stdout and
                    ran.stderr.startswith("quality: ") and ran.stderr.count("\n") == 1,
                    "%s: exit code 2 and one line" % message, ran.stdout + ran.stderr)


def main():
    tally, program = Tally(), Program(sys.argv.pop(1))
    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "random_layer04")
        t = make_trace(folder, 700, 1)
        check_streams(tally, program, folder, t)
        check_rounding(tally, program, os.path.join(work, "ties"), t)
        prompt = os.path.join(work, "prompt_layer09")
        t_prompt = make_trace(prompt, 912, 2)
        check_oneshot(tally, program, prompt, t_prompt, 9, 4,
                      "streamingllm,knorm,keydiff,h2o,tova,expected,snapkv,snapkv-ahead,pyramidkv,"
                      "kvcrush-random,kvcrush-mean,kvcrush-alternate,uniform-once,published,"
                      "published-both,published:block=100:temp=0.1")
        check_oneshot(tally, program, prompt, t_prompt, 9, 2, "walk,uniform:window=none")
        small = os.path.join(work, "small")
        t_small = make_trace(small, 1000, 3, 0.15)
        check_pages(tally, program, small, t_small)
        check_pools(tally, program, small, t_small)
        check_theory(tally, program, folder, small)
        check_reports(tally, program, folder, work)
        check_join(tally, program, work)
        check_shrunk(tally, program, prompt)
        check_options(tally, program, folder, t)
        check_bad_input(tally, program, folder, work)
    tally.done()


if __name__ == "__main__":
    main()
