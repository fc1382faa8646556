#!/usr/bin/env python3
"""Golden vectors for tests/test_golden.c: a model of the cache in float64, written from
tests/golden/README.md, the manual (balancekv.h, section 1) and arXiv 2502.07861, sharing nothing
with the C code.

    gen_golden.py             write tests/golden/cases.h
    gen_golden.py --check     make the cases anew and compare them with the stored file
    gen_golden.py --seeds     print the first usable data seed of each case

The inputs are not stored: both sides make them from a counter, as small integers over a power of
two, so that f32, f16 and bf16 hold them exactly. The model works in double and the library in f32,
hence a decision that hangs on rounding may fall either way. Every decision of `sample` is
therefore measured, and a case in which one comes closer to its threshold than MARGIN, relative
to the largest term of the comparison, is refused: it needs another data seed. So is one in which
the rounding of a refitted value to integers hangs on less than ROUNDING of its largest element.
"""
import math
import os
import re
import sys

import numpy as np

OUTPUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "cases.h")
MARGIN = 1e-5
ROUNDING = 1e-6  # of refitted values to integers: there are thousands of them
N_QUERIES = 2  # per checkpoint
PAGE, PINS, FEW = 64, 32, 512
SAMPLE, WINDOW = "sample", "window"
KEY, QUERY, USE = 1, 2, 4
I8, I4 = 4, 5
LEARN = 0.01  # the share of a query in the running mean
NONE = 0xFFFFFFFF
M64 = (1 << 64) - 1
G = 0x9E3779B97F4A7C15  # the increment of splitmix64

# One row per case; a 0 is the library's default, as in bkv_config. `data` is the seed of the
# inputs, `seed` that of the halvings; `every`: after how many tokens the cache attends (0: only at
# the checkpoints); every `pin`-th token is pinned; `integers`: how they are stored, the
# number of BKV_I8 or BKV_I4, 0: as they are; `at` are the stream lengths at which it is
# examined.
FIELDS = ("rule importance rounds n_q_heads n_kv_heads head_dim value_dim budget sinks window "
          "temp scale softcap seed data every pin integers at").split()
CASES = [dict(zip(FIELDS, row)) for row in [
    (SAMPLE,  0,     0,    4, 2, 8, 16, 272, 4, 64, 0, 0, 0, 14, 2, 1, 0, 0, (340, 700)),
    (SAMPLE,  0,     0,    3, 1, 16, 8, 350, 0, 0, 0, 1, 20, 15, 1, 1, 0, 0, (400, 900)),
    (SAMPLE,  3,     0,    3, 1, 16, 24, 480, 20, 128, 0, 0, 0, 12, 1, 2, 0, 0, (500, 1100)),
    (SAMPLE,  QUERY, 0,    2, 1, 24, 24, 272, NONE, 100, 0.5, 0.25, 0, G, 1, 3, 0, 0, (321, 700)),
    (SAMPLE,  USE,   0,    2, 1, 16, 16, 208, 4, NONE, 0, 1, 5, 21, 1, 1, 0, 0, (209, 500)),
    (SAMPLE,  KEY,   3,    1, 1, 16, 16, 208, 4, 64, 0, 0, 0, 22, 1, 0, 0, 0, (272, 800)),
    (SAMPLE,  NONE,  0,    2, 2, 8, 8, 208, 4, NONE, 1, 0, 0, 23, 1, 0, 0, 0, (209, 270)),
    (SAMPLE,  6,     2,    3, 1, 16, 24, 272, 4, 64, 0, 1, 0, 24, 1, 1, 0, 0, (300, 700)),
    (SAMPLE,  7,     NONE, 2, 1, 16, 16, 272, 4, 64, 0, 1, 0, 25, 1, 1, 0, 0, (300, 900)),
    (SAMPLE,  5,     NONE, 1, 1, 16, 16, 336, 4, 0, 0, 2, 0, 26, 1, 1, 0, 0, (400, 1500)),
    (SAMPLE,  0,     0,    1, 1, 8, 100, 144, 4, NONE, 0, 2, 0, 27, 1, 1, 0, 0, (200, 700)),
    (SAMPLE,  0,     0,    2, 1, 16, 16, 400, 4, 64, 0, 1, 0, 28, 1, 1, 2, 0, (450, 1200)),
    (SAMPLE,  KEY,   0,    1, 1, 16, 8, 400, 4, 64, 0, 1, 0, 29, 1, 0, 5, 0, (450, 1200)),
    (WINDOW,  0,     0,    3, 1, 24, 8, 350, 4, 64, 0, 0, 5, 19, 1, 0, 0, 0, (337, 640)),
    (SAMPLE,  0,     0,    4, 2, 8, 16, 592, 4, 0, 0, 0, 0, 30, 19, 1, 0, I8, (640, 1000)),
    (SAMPLE,  7,     0,    3, 1, 16, 24, 350, 40, 64, 0, 1, 20, 31, 4, 1, 3, I8, (400, 590)),
    (WINDOW,  0,     0,    2, 1, 24, 8, 208, NONE, NONE, 0, 1, 0, 32, 1, 1, 0, I8, (193, 640)),
    (SAMPLE,  0,     0,    3, 1, 20, 24, 272, 20, 0, 0, 1, 0, 33, 1, 1, 0, I4, (300, 450)),
    (SAMPLE,  0,     0,    4, 2, 24, 8, 560, 20, 64, 0, 0, 20, 34, 1, 1, 3, I4, (600, 700)),
    (SAMPLE,  0,     0,    2, 1, 24, 24, 848, 4, 64, 0, 0, 0, 35, 3, 1, 0, I4, (840, 1000)),
]]


class TooClose(Exception):
    """A decision that rounding could turn."""


# ---- random numbers and inputs -----------------------------------------------------------------
def mix(z):
    """The finaliser of splitmix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def halving_numbers(seed, head, t):
    """u_0 .. u_127 of halving t of a KV head: multiples of 2^-24."""
    key = mix((mix((seed + G * (head + 1)) & M64) + G * (t + 1)) & M64)
    return [(mix((key + G * (i + 1)) & M64) >> 40) / 2**24 for i in range(2 * PAGE)]


def noise(data, tensor, token, head, dim):
    """[dim] integers -64 .. 63; test_golden.c makes the same ones."""
    first = ((tensor << 20 | token) << 4 | head) << 9
    return np.array([(mix((data + G * (first + i + 1)) & M64) >> 57) - 64 for i in range(dim)])


def key_of(case, token, head):  # the offset gives a block's keys a mean that centring must remove
    dim = case["head_dim"]
    return (noise(case["data"], 0, token, head, dim)
            + noise(case["data"], 3, 0, head, dim) // 2) / 64.0


def value_of(case, token, head):
    return noise(case["data"], 1, token, head, case["value_dim"]) / 64.0


def query_of(case, token, head):  # the offset gives the queries a mean, too
    dim = case["head_dim"]
    return (noise(case["data"], 2, token, head, dim)
            + noise(case["data"], 4, 0, head, dim)) / 64.0


# ---- storage as integers ------------------------------------------------------------------------
def rotate(x):
    """x in powers of two, the largest first, times their Hadamard matrices, in f32."""
    x, at = x.astype(np.float32), 0
    for size in (1 << bit for bit in range(9, -1, -1)):
        if not len(x) & size:
            continue
        part, half = x[at:at + size], size // 2
        while half:
            pairs = part.reshape(-1, 2, half)
            part = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).ravel()
            half //= 2
        x[at:at + size] = part * np.float32(math.sqrt(1 / size))
        at += size
    return x


def stored(x, integers, is_value, margins=None):
    """What is held of a key or value, padding included: without the rest, and with it. Of a value
    that a refit has moved the library's x is not quite this one, so the roundings are decisions."""
    most, parts, whole = (7, 14, 32) if integers == I4 else (127, 128, 16)
    y = rotate(np.concatenate([x, np.zeros(-len(x) % whole if is_value else 0)]))
    least = np.maximum(np.abs(y).max(), np.float32(1e-28)) / np.float32(most)
    bits = (np.array([least], np.float32).view(np.uint32) + 0xFFFF) & 0xFFFF0000  # up to bf16
    below, step = np.array([bits - 0x10000, bits], np.uint32).view(np.float32)[:, 0]
    steps = y.astype(float) * float(np.float32(1) / step)
    q = np.rint(steps)
    if margins is not None:
        decide(float(below), float(least), least, margins, ROUNDING)
        decide(float(least), float(step), least, margins, ROUNDING)
        decide(np.abs(steps - q).max(), 0.5, most, margins, ROUNDING)
    rest = np.rint((steps - q).astype(np.float32).astype(float) * parts)
    return [rotate(z * float(step)).astype(float) for z in (q, q + rest / parts)]


# ---- the rules: which of 128 tokens stay, and with which weights -------------------------------
def scale_of(case):
    return case["scale"] or 1 / math.sqrt(case["head_dim"])


def exponentials(case, k):
    """E_ij, of the keys alone."""
    s = scale_of(case) * (case["temp"] or 0.1)
    k = k - k.mean(axis=0)
    return np.exp(k @ k.T * s - (k * k).sum(axis=1).max() * s)


def kernel(E, v, a, c):
    """K, and |K|: the same with every term of <v, v> taken as positive, for the margins."""
    e = np.outer(a, a) * E
    return e * (v @ v.T + c), e * (np.abs(v) @ np.abs(v).T + c)


def decide(left, right, size, margins, least=MARGIN):
    """left < right, refused if the difference is small against `size`, the largest term."""
    margin = abs(left - right) / size
    if margin < least:
        raise TooClose("margin %.1e" % margin)
    margins.append(margin)
    return left < right


def expected(case, block):
    """e_i of every token, by the mean queries of the group."""
    logits = block.mean_queries @ block.k.T * scale_of(case) + np.log(block.weights)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).mean(axis=0)


def bits_of(case):
    return {0: KEY | QUERY | USE, NONE: 0}.get(case["importance"], case["importance"])


def unlike(case, block):
    """How unlike the others the key of every token is."""
    mean = block.k.mean(axis=0)
    cosine = block.k @ mean / np.linalg.norm(block.k, axis=1) / np.linalg.norm(mean)
    return block.weights * np.exp(-10 * cosine)


def factors(case, block):
    """a_i of every token in the kernel, with the library's factors, which only H notices."""
    w, bits = block.weights / block.weights.max(), bits_of(case)
    told = (expected(case, block) * len(block.mean_queries) if bits & QUERY
            else unlike(case, block) / block.weights.max() if bits & KEY else w)
    return np.sqrt(w * told)


def importance_of(case, block):
    bits = bits_of(case)
    size = np.linalg.norm(block.v - block.v.mean(axis=0), axis=1)
    parts = [(0.1, block.weights)]
    parts += [(2.0, np.sqrt(block.use) * size)] if bits & USE else []
    parts += [(1.0, expected(case, block) * size)] if bits & QUERY else []
    parts += [(1.0, unlike(case, block) * size)] if bits & KEY else []
    return sum(share * x / x.sum() for share, x in parts if x.sum() > 0)


def chances(importance, pinned, margins):
    """In proportion to the importance, 64 in all, none above 1; those of pinned tokens 1."""
    p = np.where(pinned, 1.0, 0.0)
    while True:
        free = p < 1
        p[free] = importance[free] * (PAGE - (~free).sum()) / importance[free].sum()
        certain = np.array([not decide(x, 1.0, 1.0, margins) for x in p[free]])
        if not certain.any():
            return p
        p[np.flatnonzero(free)[certain]] = 1.0


def pivotal(p, u, margins):
    """Which tokens stay: a boolean of each."""
    stay = p >= 1
    carried, a, draws = None, 0.0, iter(u)
    for i in np.flatnonzero(p < 1):
        b = p[i]
        if carried is None:
            carried, a = i, b
            continue
        number = next(draws)
        if abs(a + b - 1) < 1e-12:  # two halves: one stays, none goes on
            kept = carried if decide(number, 1 - b, 1.0, margins) else i
            stay[kept], carried = True, None
        elif decide(a + b, 1.0, 1.0, margins):
            carried, a = carried if decide(number * (a + b), a, a + b, margins) else i, a + b
        else:
            first = decide(number * (2 - a - b), 1 - b, 2 - a - b, margins)
            stay[carried if first else i] = True
            carried, a = i if first else carried, a + b - 1
    if carried is not None:  # its chance is 0 or 1 by now
        stay[carried] = stay.sum() < PAGE
    return stay


def exchange(stay, p, K, size, rounds, margins):
    """Rounds of exchanges that shorten sum_ij z_i z_j K_ij."""
    chance = p < 1
    z = np.where(chance, np.where(stay, 1 / p, 0) - 1, 0.0)
    for _ in range(rounds):
        for i in range(2 * PAGE):
            if not (chance[i] and stay[i]):
                continue
            others = np.flatnonzero(chance & ~stay)
            f, terms = K @ z, (size * np.abs(z)).max(axis=1)
            di, dj = -1 / p[i], 1 / p[others]
            change = (2 * di * f[i] + di * di * K[i, i] + 2 * dj * f[others]
                      + dj * dj * K[others, others] + 2 * di * dj * K[i, others])
            largest = max(np.abs(di) * terms[i], di * di * K[i, i])
            each = np.maximum(np.maximum(dj * terms[others], dj * dj * K[others, others]), largest)
            order = np.argsort(change)
            best = order[0]
            if decide(change[best], 0.0, each[best], margins):
                for other in order[1:3]:
                    decide(change[best], change[other], max(each[best], each[other]), margins)
                j = others[best]
                stay[i], stay[j] = False, True
                z[i], z[j] = -1.0, 1 / p[j] - 1
    return stay


def refit(E, v, a, p, stay):
    """Which tokens move, by what a round of coordinate descent leaves of the error z, and how far."""
    H = (E / (np.diag(E) + 1e-6)[:, None])**3 * a / (a + 1e-12)[:, None]
    short, v = np.where(stay, 1 - 1 / p, 1), v - v.mean(axis=0)
    near = H @ short / (H.sum(axis=1) + 2e-30)
    before = short[:, None] * v
    z, moves = before.copy(), np.flatnonzero(stay & (p < 1))
    for i in moves:
        z[i] -= H[i] @ (z - near[i] * v) / 2
    return moves, (p[:, None] * (before - z))[moves]


def sample(case, block, u, margins):
    w = block.weights
    p = chances(importance_of(case, block), block.pinned, margins)
    stay = pivotal(p, u, margins)
    moved = ()
    if case["rounds"] != NONE:
        v = block.v - block.v.mean(axis=0)
        a, E = factors(case, block), exponentials(case, block.k)
        K, size = kernel(E, v, a, (v * v).sum(axis=1).mean() / 32)
        stay = exchange(stay, p, K, size, case["rounds"] or 1, margins)
        if bits_of(case) & (KEY | QUERY):
            moves, more = refit(E, block.v, a, p, stay)
            moved = zip(moves, block.v[moves] + more)
    stay = np.flatnonzero(stay)
    kept = w[stay] / p[stay]
    return stay, np.maximum(kept * min(1, block.seen / kept.sum()), 1), moved


def window(case, block, u, margins):
    return np.arange(PAGE, 2 * PAGE), block.weights[PAGE:], ()


RULES = {f.__name__: f for f in (sample, window)}


# ---- the cache of one KV head ------------------------------------------------------------------
class Block:
    """The 128 tokens of a halving, and what the head has learned."""

    def __init__(self, head, tokens, weights):
        self.k, self.v = np.array(head.keys)[tokens], np.array(head.values)[tokens]
        self.use, self.weights = np.array(head.use)[tokens], weights
        pinned = head.pinned(tokens, weights)
        self.pinned = pinned & (np.cumsum(pinned) <= PINS)
        self.mean_queries, self.seen = head.mean_queries, len(head.keys)


class Head:
    def __init__(self, case, head, margins):
        self.case, self.head, self.margins = case, head, margins
        slots = case["budget"] // 16 * 16
        sinks = {0: 4, NONE: 0}.get(case["sinks"], case["sinks"])
        self.n_pages = (slots - (sinks + 15) // 16 * 16) // PAGE
        self.n_sinks = slots - self.n_pages * PAGE
        self.few = slots < FEW
        if case["window"] == 0:
            wanted = 1 if self.few else case["budget"] // 4 // PAGE
            self.n_exact = wanted if self.n_pages > 2 else 0
        else:
            self.n_exact = 0 if case["window"] == NONE else -(-case["window"] // PAGE)
        self.keys, self.values, self.use = [], [], []  # of every token ever seen
        self.fine = []  # its key and value while it is in the newest pages, or an early sink
        self.sinks, self.pages, self.halvings = [], [], 0
        group = case["n_q_heads"] // case["n_kv_heads"]
        self.mean_queries = np.zeros((group, case["head_dim"]))

    def append(self, key, value):
        token = len(self.keys)
        if len(self.sinks) < self.n_sinks:
            self.sinks.append(token)
        else:
            if not self.pages or len(self.pages[-1][1]) == PAGE:
                if len(self.pages) == self.n_pages:
                    self.halve()
                self.pages.append((0, [], []))
            self.pages[-1][1].append(token)
            self.pages[-1][2].append(1.0)
        self.fine.append((key, value))
        integers = self.case["integers"]
        if integers:
            (key, fine_key), (value, fine_value) = (
                stored(key, integers, 0), stored(value, integers, 1))
            self.fine[-1] = fine_key, fine_value
        self.keys.append(key)
        self.values.append(value)
        self.use.append(0.0)

    def pinned(self, tokens, weights):
        """Those that were pinned and are still exact."""
        pin = self.case["pin"]
        return np.array([bool(pin) and t % pin == 0 and w == 1 for t, w in zip(tokens, weights)])

    def halve(self):
        levels = [level for level, _, _ in self.pages[:self.n_pages - self.n_exact]]
        pins = [self.pinned(*page[1:]).sum() for page in self.pages]
        i = min(range(len(levels) - 1), key=lambda i: (  # the first of the least
            pins[i] + pins[i + 1] > PINS, max(levels[i], levels[i + 1])))
        tokens = np.array(self.pages[i][1] + self.pages[i + 1][1])
        weights = np.array(self.pages[i][2] + self.pages[i + 1][2])
        rule = self.case["rule"]
        stay, kept, moved = RULES[rule](
            self.case, Block(self, tokens, weights),
            halving_numbers(self.case["seed"], self.head, self.halvings), self.margins)
        assert len(stay) == PAGE
        for place, value in moved:
            if self.case["integers"]:
                value, _ = stored(value, self.case["integers"], 1, self.margins)
            self.values[tokens[place]] = value
        level = max(levels[i], levels[i + 1]) + (rule != WINDOW)
        self.pages[i:i + 2] = [(level, list(tokens[stay]), list(kept))]
        self.halvings += 1

    def held(self):
        """Positions and weights, oldest first."""
        return (self.sinks + [t for page in self.pages for t in page[1]],
                [1.0] * len(self.sinks) + [w for page in self.pages for w in page[2]])

    def attend(self, queries):
        """The outputs of the group's queries; the head learns from them."""
        tokens, w = self.held()
        k, v, w = np.array(self.keys)[tokens], np.array(self.values)[tokens], np.array(w)
        n_fine = max(1, min(4, self.n_pages // 4, self.n_exact + 1))
        n_fine = n_fine if self.case["integers"] == I4 else 1
        newest = [t for page in self.pages[-n_fine:] for t in page[1]]
        fine = () if self.few else set(self.sinks[:16] + newest)
        for i, token in enumerate(tokens):
            if token in fine:
                k[i], v[i] = self.fine[token]
        s = queries @ k.T * scale_of(self.case)
        if self.case["softcap"]:
            s = self.case["softcap"] * np.tanh(s / self.case["softcap"])
        p = w * np.exp(s - s.max(axis=1, keepdims=True))
        self.mean_queries = self.mean_queries + LEARN * (queries - self.mean_queries)
        end = len(tokens)
        for _, page, _ in self.pages[:-3:-1]:  # the newest, then the one before, without it
            begin = end - len(page)
            share = p[:, begin:end] / p[:, :end].sum(axis=1, keepdims=True)
            for token, x in zip(page, (share**2).sum(axis=0)):
                if not self.case["pin"] or token % self.case["pin"]:
                    self.use[token] += x
            end = begin
        return (p @ v / p.sum(axis=1, keepdims=True))[:, :self.case["value_dim"]].ravel()


def run(case):
    """Positions, weights, uses and outputs of all checkpoints, in the order test_golden.c reads
    them. Of the uses only a sum per head, each times its place among the kept tokens."""
    positions, weights, uses, outputs, margins = [], [], [], [], []
    heads = [Head(case, h, margins) for h in range(case["n_kv_heads"])]
    group = case["n_q_heads"] // case["n_kv_heads"]

    def attend(token):
        return [x for h, head in enumerate(heads) for x in head.attend(
            np.array([query_of(case, token, i) for i in range(h * group, (h + 1) * group)]))]

    for token in range(case["at"][-1]):
        for h, head in enumerate(heads):
            head.append(key_of(case, token, h), value_of(case, token, h))
        if case["every"] and token % case["every"] == 0:
            attend(token)
        if token + 1 in case["at"]:
            for head in heads:
                tokens, w = head.held()
                positions += tokens
                weights += w
                pages = [(i, t) for i, t in enumerate(tokens) if i >= head.n_sinks]
                uses.append(sum(i * head.use[t] for i, t in pages))
            for i in range(N_QUERIES):
                outputs += attend(token + i)
    top = max(level for head in heads for level, _, _ in head.pages)
    certain = sum(w == 1 for head in heads for level, _, page in head.pages if level for w in page)
    print("%-7s %10d: %2d halvings a head, level %d, weights up to %.4g, %d of 1 in halved pages, "
          "smallest margin %.1e" % (case["rule"], case["importance"], heads[0].halvings, top,
                                    max(weights), certain, min(margins, default=1)), flush=True)
    return positions, weights, uses, outputs


# ---- the file ----------------------------------------------------------------------------------
def array(declaration, items, form):
    lines, line = [], "   "
    for item in (" " + form % x + "," for x in items):
        if len(line) + len(item) > 100:
            lines.append(line)
            line = "   "
        line += item
    return "%s = {\n%s\n};\n" % (declaration, "\n".join(lines + [line]))


def render():
    runs = [run(case) for case in CASES]
    rows = []
    for case in CASES:
        rows.append("    {" + ", ".join(
            ["BKV_RULE_" + case["rule"].upper()]
            + ["BKV_NONE" if case[name] == NONE else "%du" % case[name] for name in FIELDS[1:10]]
            + ["%sf" % float(case[name]) for name in FIELDS[10:13]])
            + ",\n     0x%xu, %du, %du, %du, %du, {%s}},\n" % (
                case["seed"], case["data"], case["every"], case["pin"], case["integers"],
                ", ".join("%du" % n for n in case["at"])))
    flat = [[x for r in runs for x in r[i]] for i in range(4)]
    return ("/* Made by gen_golden.py, read by test_golden.c; not to be edited. */\n"
            "#define GOLDEN_QUERIES %du\n#define GOLDEN_CHECKPOINTS %du\n\n"
            "static const golden_case golden_cases[] = {\n%s};\n\n"
            % (N_QUERIES, len(CASES[0]["at"]), "".join(rows))
            + array("static const uint16_t golden_positions[]", flat[0], "%d") + "\n"
            + array("static const double golden_weights[]", flat[1], "%.7g") + "\n"
            + array("static const double golden_uses[]", flat[2], "%.9g") + "\n"
            + array("static const double golden_outputs[]", flat[3], "%.9g"))


def differences(stored, made):
    """Places where the texts differ by more than the last printed digit of a number."""
    token = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|\S")
    a, b = token.findall(stored), token.findall(made)
    if len(a) != len(b):
        return ["%d words are stored, %d are made" % (len(a), len(b))]

    def close(x, y):
        return "." in x + y and abs(float(x) - float(y)) <= 2e-7 * abs(float(x)) + 1e-9

    return ["%s is stored, %s is made" % (x, y) for x, y in zip(a, b) if x != y and not close(x, y)]


def first_seeds():
    for case in CASES:
        data = 1
        while True:
            try:
                run(dict(case, data=data))
                break
            except TooClose:
                data += 1
        print("    data seed %d" % data, flush=True)


def main():
    if sys.argv[1:] == ["--seeds"]:
        return first_seeds()
    made = render()
    if sys.argv[1:] == ["--check"]:
        with open(OUTPUT, encoding="ascii") as file:
            wrong = differences(file.read(), made)
        for line in wrong[:10]:
            print(line)
        print("%d passed, %d failed" % (not wrong, bool(wrong)))
        return sys.exit(bool(wrong))
    with open(OUTPUT, "w", encoding="ascii") as file:
        file.write(made)
    print("%s: %d bytes" % (OUTPUT, len(made)))


if __name__ == "__main__":
    main()
