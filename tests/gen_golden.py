#!/usr/bin/env python3
"""Golden vectors for tests/test_golden.c: a model of the cache in float64, written from the manual
(balancekv.h, section 1) and arXiv 2502.07861, sharing nothing with the C code.

    gen_golden.py             write tests/golden/cases.h
    gen_golden.py --check     make the cases anew and compare them with the stored file
    gen_golden.py --seeds     print the first usable data seed of each case

The inputs are not stored: both sides make them from a counter, as small integers over a power of
two, so that f32, f16 and bf16 hold them exactly. The model works in double and the library in f32,
hence a decision that hangs on rounding may fall either way. Every decision of `walk` and `pair` is
therefore measured, and a case in which one comes closer to its threshold than MARGIN, relative to
the largest term of the comparison, is refused: it needs another data seed.
"""
import math
import os
import re
import sys

import numpy as np

OUTPUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "cases.h")
MARGIN = 1e-4
N_QUERIES = 2  # per checkpoint
PAGE = 64
WALK, PAIR, UNIFORM, STRIDE, WINDOW = 1, 2, 3, 4, 5
NONE = 0xFFFFFFFF
M64 = (1 << 64) - 1
G = 0x9E3779B97F4A7C15  # the increment of splitmix64

# One row per case; a 0 is the library's default, as in bkv_config. `data` is the seed of the
# inputs, `seed` that of the halvings; `at` are the stream lengths at which the cache is examined.
# The budgets 208 and 272 are for pairs of unequal weights: the first pair of a block (where
# nothing but chance decides), and later ones.
FIELDS = ("rule n_q_heads n_kv_heads head_dim value_dim budget sinks window "
          "gamma temp scale softcap seed data at").split()
CASES = [dict(zip(FIELDS, row)) for row in [
    (WALK,    2, 2,  8,  8, 400, 4,    64,   0.05, 0,   0,    0,  11, 2, (384, 700, 1100)),
    (WALK,    3, 1, 16, 24, 480, 20,   128,  0,    0,   0,    0,  12, 1, (449, 900, 1400)),
    (WALK,    2, 1, 24, 16, 336, NONE, 64,   0.5,  0.5, 0.25, 0,  13, 1, (320, 640, 1000)),
    (PAIR,    4, 2,  8, 16, 400, 4,    64,   0,    0,   0,    0,  14, 2, (400, 700, 1100)),
    (PAIR,    3, 1, 16,  8, 500, 0,    0,    0,    0,   0,    20, 15, 1, (449, 900, 1500)),
    (PAIR,    1, 1, 24, 24, 336, NONE, 100,  0,    0.5, 0.25, 0,  G,  1, (321, 640, 1000)),
    (PAIR,    1, 1, 16, 16, 208, 4,    64,   0,    0,   0,    0,  21, 1, (209, 700, 1300)),
    (PAIR,    2, 1, 16, 16, 272, 4,    64,   0,    0,   0,    0,  21, 1, (273, 2000, 3000)),
    (UNIFORM, 4, 2, 16, 16, 400, 4,    64,   0,    0,   0,    0,  17, 1, (385, 700, 1100)),
    (STRIDE,  2, 2,  8, 24, 400, 4,    NONE, 0,    0,   0,    0,  18, 1, (401, 700, 1100)),
    (WINDOW,  3, 1, 24,  8, 350, 4,    64,   0,    0,   0,    5,  19, 1, (337, 640, 1000)),
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
    """r_0 .. r_127 (24 bits each) of halving t of a KV head; u_i = r_i / 2^24."""
    key = mix((mix((seed + G * (head + 1)) & M64) + G * (t + 1)) & M64)
    return [mix((key + G * (i + 1)) & M64) >> 40 for i in range(2 * PAGE)]


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


def query_of(case, token, head):
    return noise(case["data"], 2, token, head, case["head_dim"]) / 32.0


# ---- the rules: which of 128 tokens stay, and with which weights -------------------------------
def kernel(case, k, v, w):
    """K, and |K|: the same with every term of <v, v> taken as positive, for the margins."""
    s = (case["scale"] or 1 / math.sqrt(case["head_dim"])) * (case["temp"] or 1.0)
    k = k - k.mean(axis=0)
    e = np.outer(w, w) * np.exp(k @ k.T * s - (k * k).sum(axis=1).max() * s)
    return e * (v @ v.T + 0.025), e * (np.abs(v) @ np.abs(v).T + 0.025)


def decide(left, right, size, margins):
    """left < right, refused if the difference is small against `size`, the largest term."""
    margin = abs(left - right) / size
    if margin < MARGIN:
        raise TooClose("margin %.1e" % margin)
    margins.append(margin)
    return left < right


def rescaled(stay, w):
    stay = np.array(sorted(stay))
    return stay, w[stay] * (w.sum() / w[stay].sum())


def walk(case, k, v, w, r, margins):
    gamma = case["gamma"] or 4.0
    K, size = kernel(case, k, v, w)
    K, size = K / K.diagonal().max(), size / K.diagonal().max()
    sign = np.zeros(2 * PAGE)
    for i in range(2 * PAGE):
        plus, minus = (sign == 1).sum(), (sign == -1).sum()
        if PAGE in (plus, minus):
            sign[i] = 1 if minus == PAGE else -1
        else:
            limit = 0.5 - gamma * (K[i, :i] @ sign[:i])
            largest = max(1.0, gamma * size[i, :i].max(initial=0))
            sign[i] = 1 if decide(r[i] / 2**24, limit, largest, margins) else -1
    return rescaled(np.flatnonzero(sign == 1), w)


def pair(case, k, v, w, r, margins):
    K, size = kernel(case, k, v, w)
    f, largest = np.zeros(2 * PAGE), np.zeros(2 * PAGE)
    stay = []
    for t in range(PAGE):
        a, b = 2 * t, 2 * t + 1
        if f[a] / w[a] == f[b] / w[b]:
            first = decide(r[t] / 2**24, w[a] / (w[a] + w[b]), 1.0, margins)
        else:
            first = decide(f[a] / w[a], f[b] / w[b],
                           max(largest[a] / w[a], largest[b] / w[b]), margins)
        keep, drop = (a, b) if first else (b, a)
        f += w[drop] / w[keep] * K[keep] - K[drop]
        largest = np.maximum(largest, np.maximum(w[drop] / w[keep] * size[keep], size[drop]))
        stay.append(keep)
    return np.array(stay), w[0::2] + w[1::2]


def uniform(case, k, v, w, r, margins):
    p = list(range(2 * PAGE))
    for i in range(PAGE):
        j = i + ((r[i] * (2 * PAGE - i)) >> 24)
        p[i], p[j] = p[j], p[i]
    return rescaled(p[:PAGE], w)


def stride(case, k, v, w, r, margins):
    return np.arange(0, 2 * PAGE, 2) + (r[0] >> 23), w[0::2] + w[1::2]


def window(case, k, v, w, r, margins):
    return np.arange(PAGE, 2 * PAGE), w[PAGE:]


RULES = {WALK: walk, PAIR: pair, UNIFORM: uniform, STRIDE: stride, WINDOW: window}


# ---- the cache of one KV head ------------------------------------------------------------------
class Head:
    def __init__(self, case, head, margins):
        self.case, self.head, self.margins = case, head, margins
        slots = case["budget"] // 16 * 16
        sinks = {0: 4, NONE: 0}.get(case["sinks"], case["sinks"])
        self.n_pages = (slots - (sinks + 15) // 16 * 16) // PAGE
        self.n_sinks = slots - self.n_pages * PAGE
        if case["window"] == 0:
            wanted = case["budget"] // 3 // PAGE
            self.n_exact = wanted or (1 if self.n_pages > 2 else 0)
        else:
            self.n_exact = 0 if case["window"] == NONE else -(-case["window"] // PAGE)
        self.keys, self.values = [], []  # of every token ever seen; the pages refer to them
        self.sinks, self.pages, self.halvings = [], [], 0

    def append(self, key, value):
        token = len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        if len(self.sinks) < self.n_sinks:
            self.sinks.append(token)
            return
        if not self.pages or len(self.pages[-1][1]) == PAGE:
            if len(self.pages) == self.n_pages:
                self.halve()
            self.pages.append((0, [], []))
        self.pages[-1][1].append(token)
        self.pages[-1][2].append(1.0)

    def halve(self):
        levels = [level for level, _, _ in self.pages[:self.n_pages - self.n_exact]]
        i = min(range(len(levels) - 1), key=lambda i: max(levels[i], levels[i + 1]))  # the first
        tokens = np.array(self.pages[i][1] + self.pages[i + 1][1])
        weights = np.array(self.pages[i][2] + self.pages[i + 1][2])
        rule = self.case["rule"]
        stay, kept = RULES[rule](self.case, np.array(self.keys)[tokens],
                                 np.array(self.values)[tokens], weights,
                                 halving_numbers(self.case["seed"], self.head, self.halvings),
                                 self.margins)
        level = max(levels[i], levels[i + 1]) + (rule != WINDOW)
        self.pages[i:i + 2] = [(level, list(tokens[stay]), list(kept))]
        self.halvings += 1

    def held(self):
        """Positions and weights, oldest first."""
        return (self.sinks + [t for page in self.pages for t in page[1]],
                [1.0] * len(self.sinks) + [w for page in self.pages for w in page[2]])

    def attend(self, q):
        tokens, w = self.held()
        s = np.array(self.keys)[tokens] @ q * (self.case["scale"] or 1 / math.sqrt(len(q)))
        if self.case["softcap"]:
            s = self.case["softcap"] * np.tanh(s / self.case["softcap"])
        p = np.array(w) * np.exp(s - s.max())
        return p @ np.array(self.values)[tokens] / p.sum()


def run(case):
    """Positions, weights and outputs of all checkpoints, in the order test_golden.c reads them."""
    positions, weights, outputs, margins = [], [], [], []
    heads = [Head(case, h, margins) for h in range(case["n_kv_heads"])]
    group = case["n_q_heads"] // case["n_kv_heads"]
    for token in range(case["at"][-1]):
        for h, head in enumerate(heads):
            head.append(key_of(case, token, h), value_of(case, token, h))
        if token + 1 in case["at"]:
            for head in heads:
                tokens, w = head.held()
                positions += tokens
                weights += w
            for i in range(N_QUERIES):
                for h in range(case["n_q_heads"]):
                    outputs += list(heads[h // group].attend(query_of(case, token + i, h)))
    top = max(level for head in heads for level, _, _ in head.pages)
    print("rule %d: %d + %d halvings, level %d, %s weights, smallest margin %.1e" % (
        case["rule"], heads[0].halvings, heads[-1].halvings, top,
        len(set(weights)), min(margins, default=1)))
    return positions, weights, outputs


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
            ["BKV_RULE_" + RULES[case["rule"]].__name__.upper()]
            + ["BKV_NONE" if case[name] == NONE else "%du" % case[name] for name in FIELDS[1:8]]
            + ["%sf" % float(case[name]) for name in FIELDS[8:12]])
            + ",\n     0x%xu, %du, {%s}},\n" % (
                case["seed"], case["data"], ", ".join("%du" % n for n in case["at"])))
    flat = [[x for r in runs for x in r[i]] for i in range(3)]
    return ("/* Made by gen_golden.py, read by test_golden.c; not to be edited. */\n"
            "#define GOLDEN_QUERIES %du\n#define GOLDEN_CHECKPOINTS %du\n\n"
            "static const golden_case golden_cases[] = {\n%s};\n\n"
            % (N_QUERIES, len(CASES[0]["at"]), "".join(rows))
            + array("static const uint16_t golden_positions[]", flat[0], "%d") + "\n"
            + array("static const double golden_weights[]", flat[1], "%.7g") + "\n"
            + array("static const double golden_outputs[]", flat[2], "%.9g"))


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
        print("    data seed %d" % data)


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
