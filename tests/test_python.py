#!/usr/bin/env python3
"""examples/python: the shared library, what balancekv.py makes of it, and what it refuses.

    test_python.py

Needs a C compiler and NumPy.
"""
import ctypes
import doctest
import importlib
import os
import re
import subprocess
import sys
import tempfile

import numpy as np

from bad_config import ROOT, Tally, compile_text, run

CC = os.environ.get("CC", "cc")
Q_HEADS, KV_HEADS, DIM, VALUE_DIM, BUDGET = 6, 2, 32, 24, 384
SIZES = '#include "balancekv.h"\n#include <stdio.h>\nint main(void) {%s return 0; }\n'


def load(folder):
    """The module, on a library built into the folder."""
    script = os.path.join(ROOT, "examples", "python", "build.sh")
    built = subprocess.run(["sh", script], env={**os.environ, "BUILD_DIR": folder, "CC": CC},
                           stdout=subprocess.PIPE, universal_newlines=True, check=True)
    os.environ["BALANCEKV_LIBRARY"] = built.stdout.strip()
    sys.path.insert(0, os.path.join(ROOT, "examples", "python"))
    return importlib.import_module("balancekv")


def numbers(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def attention(q, k, v, weights):
    """Softmax attention of one position in double. weights: [n_kv_heads, n]."""
    out = []
    for head, query in enumerate(q.astype(np.float64)):
        kv_head = head * k.shape[1] // len(q)
        logits = k[:, kv_head].astype(np.float64) @ query / np.sqrt(len(query))
        p = weights[kv_head] * np.exp(logits)
        out.append(p @ v[:, kv_head].astype(np.float64) / p.sum())
    return np.array(out)


def check_structures(tally, module, folder):
    """The structures read out of the header are those that the compiler makes of it."""
    kinds = vars(module.types)
    tally.check({"config", "tensor", "cache", "token_info", "stats_info"} <= set(kinds),
                "all structures are found", str(list(kinds)))
    prints = "".join('printf("%%zu ", sizeof(bkv_%s));' % name + "".join(
        'printf("%%zu ", offsetof(bkv_%s, %s));' % (name, field) for field, _ in kind._fields_)
        for name, kind in kinds.items())
    program = os.path.join(folder, "sizes")
    built = compile_text(CC, ["-o", program], SIZES % prints)
    ours = [number for kind in kinds.values() for number in [ctypes.sizeof(kind)] + [
        getattr(kind, field).offset for field, _ in kind._fields_]]
    theirs = run([program]).stdout.split() if built.returncode == 0 else []
    tally.check(list(map(int, theirs)) == ours, "sizes and offsets agree", built.stdout)


def check_results(tally, module):
    k, v = numbers(1000, KV_HEADS, DIM), numbers(1000, KV_HEADS, VALUE_DIM, seed=2)
    q = numbers(1000, Q_HEADS, DIM, seed=3)

    def make(**fields):
        return module.Cache(Q_HEADS, KV_HEADS, DIM, BUDGET, value_dim=VALUE_DIM, kv_type="f32",
                            seed=5, **fields)

    cache = make()
    tally.check(cache.config["window"] and cache.config["kv_type"] == module.C.F32,
                "the configuration shows its defaults", str(cache.config))
    first = cache.prefill(k[:300], v[:300], q[:300])
    exact = attention(q[299], k[:300], v[:300], np.ones((KV_HEADS, 300)))
    tally.check(first.shape == (300, Q_HEADS, VALUE_DIM) and first.dtype == np.float32 and
                abs(first[-1] - exact).max() < 2e-5, "exact while the tokens fit")
    cache.prefill(k[300:], v[300:], q[300:])
    stats = cache.stats()
    tally.check(stats["tokens_seen"] == 1000 and stats["tokens_held"] <= BUDGET and
                stats["halvings"] > 0, "a budget is kept", str(stats))

    still = make(importance="use")  # no values move
    still.prefill(k, v, q)
    tokens = [still.tokens(head) for head in range(KV_HEADS)]
    kept = np.stack([t["position"].astype(int) for t in tokens])
    weights = np.stack([t["weight"] for t in tokens])
    rows = [x[kept, np.arange(KV_HEADS)[:, None]].swapaxes(0, 1) for x in (k, v)]
    wanted = attention(q[0], *rows, weights)
    tally.check(abs(still.attend(q[0]) - wanted).max() < 2e-5,
                "attention is what tokens and weights say")
    for name, of in (("moved", cache), ("still", still)):
        rows = [of.rows(head) for head in range(KV_HEADS)]
        held, log_weights = of.stats()["tokens_held"], np.stack([row[2] for row in rows])
        kinds = [x.shape + (x.dtype,) for row in rows for x in row]
        tally.check(kinds == KV_HEADS * [(held, DIM, np.float32), (held, VALUE_DIM, np.float32),
                                         (held, np.float32)], "rows: one a token", str(kinds))
        wanted = attention(q[0], *(np.stack([row[i] for row in rows], 1) for i in range(2)),
                           np.exp(log_weights.astype(np.float64)))
        tally.check(abs(of.attend(q[0]) - wanted).max() < 2e-5,
                    "attention is what the rows say: values " + name)
        for head, (keys, values, log_weight) in enumerate(rows):
            # Keys never move: by them rows find their tokens.
            tokens = of.tokens(head)
            at = {key.tobytes(): i for i, key in enumerate(k[tokens["position"].astype(int), head])}
            tokens = tokens[[at.pop(key.tobytes()) for key in keys]]
            tally.check(not at and abs(np.exp(log_weight) / tokens["weight"] - 1).max() < 2e-6,
                        "rows hold keys and weights of tokens()")
            same = (values == v[tokens["position"].astype(int), head]).all(1)
            tally.check(same[tokens["kind"] != module.C.KIND_PAGE].all() and
                        same.all() == (of is still), "the cache's own values: " + name)
    twin = cache.copy()
    out = cache.attend(q[0])
    tally.check((twin.attend(q[0]) == out).all(), "a copy gives the same bits")
    before = cache.stats()
    twin.append(k[0], v[0])
    tally.check(cache.stats() == before and twin.stats()["tokens_seen"] == 1001,
                "and is a cache of its own")

    other = make()
    outs = []
    for t in range(1000):
        other.append(k[t], v[t])
        outs.append(other.attend(q[t]))
    whole = make()
    tally.check((np.array(outs) == whole.prefill(k, v, q)).all(), "one by one as in a chunk")
    for name, arrays in (
            ("strides", (np.repeat(k, 2, axis=2)[..., ::2], np.asfortranarray(v), q[:, :, ::-1])),
            ("transposed values", (k, v.transpose(1, 2, 0).copy().transpose(2, 0, 1), q))):
        expected = make().prefill(*map(np.ascontiguousarray, arrays))
        tally.check(not arrays[1].flags.c_contiguous and
                    (make().prefill(*arrays) == expected).all(), name + " change nothing")
    half = [x.astype(np.float16) for x in (k, v, q)]
    tally.check((make().prefill(*half) == make().prefill(*(x.astype(np.float32) for x in half)))
                .all(), "float16 is read as such")
    pinned = make()
    pinned.append(k[:200], v[:200])
    pinned.append(k[200:210], v[200:210], pin=True)
    pinned.prefill(k[210:], v[210:], q[210:])
    held = pinned.tokens(0)
    tally.check(set(range(200, 210)) <= set(held["position"][held["weight"] == 1]) and
                not set(range(200, 210)) <= set(kept[0]), "pinned tokens stay as they are")
    twin = pinned.copy()
    room = twin.stats()["room"]
    twin.append(k[:room], v[:room])
    twin.truncate(1000)
    tally.check(room > 0 and twin.save() == pinned.save(), "truncate takes back what was appended")
    loaded = module.Cache.load(pinned.save())
    tally.check(loaded.stats()["tokens_seen"] == 1000 and
                (loaded.attend(q[0]) == pinned.attend(q[0])).all(), "load goes on from save")
    loaded.shrink(BUDGET - 64)
    tally.check(loaded.stats()["slots"] <= BUDGET - 64, "shrink lowers the budget")
    for kind, bound in (("i8", 0.05), ("i4", 0.3)):
        small = module.Cache(Q_HEADS, KV_HEADS, DIM, BUDGET, value_dim=VALUE_DIM, kv_type=kind)
        off = abs(small.prefill(k[:300], v[:300], q[:300])[-1] - exact).max()
        tally.check(small.stats()["bytes"] < cache.stats()["bytes"] and off < bound,
                    "storage %s by its name" % kind, str(off))
    words = module.Cache(Q_HEADS, KV_HEADS, DIM, np.int64(BUDGET), rule="window", importance="key")
    tally.check((words.config["rule"], words.config["importance"], words.config["budget"]) ==
                (module.C.RULE_WINDOW, module.C.IMPORTANCE_KEY, BUDGET), "rules by their names")
    other.reset()
    tally.check(other.stats()["tokens_seen"] == 0, "reset empties")


def check_refusals(tally, module):
    cache = module.Cache(Q_HEADS, KV_HEADS, DIM, BUDGET)
    k, q = numbers(5, KV_HEADS, DIM), numbers(Q_HEADS, DIM)
    nan = k.copy()
    nan[3, 1, 2] = np.nan
    before = cache._memory.tobytes()
    filled = cache.copy()
    filled.append(k, k)
    for kind, text, call in (
            (TypeError, "k: list, need a NumPy array", lambda: cache.append([1.0], k)),
            (TypeError, "v: dtype float64, need float32 or float16",
             lambda: cache.append(k, k.astype(np.float64))),
            (TypeError, "k: dtype >f4", lambda: cache.append(k.astype(">f4"), k)),
            (ValueError, "k: shape (5, 2, 31), need (n_tokens, 2, 32) or (2, 32)",
             lambda: cache.append(k[..., 1:], k)),
            (ValueError, "v: shape (4, 2, 32), need (5, 2, 32)", lambda: cache.append(k, k[1:])),
            (ValueError, "k: shape (32,)", lambda: cache.append(k[0, 0], k)),
            (ValueError, "q: shape (5, 2, 32), need (1, 6, 32) or", lambda: cache.attend(k)),
            (module.Error, "n_tokens must be at least 1", lambda: cache.append(k[:0], k[:0])),
            (module.Error, "holds NaN", lambda: cache.append(nan, k)),
            (module.Error, "no token yet", lambda: cache.attend(q)),
            (module.Error, "head or token index", lambda: filled.tokens(KV_HEADS)),
            (module.Error, "budget is smaller", lambda: module.Cache(1, 1, 8, 10)),
            (module.Error, "kv_type must be", lambda: module.Cache(1, 1, 8, 256, kv_type=31)),
            (ValueError, "kv_type: 'rule_window' is none of f32, f16, bf16, i8, i4",
             lambda: module.Cache(1, 1, 8, 256, kv_type="rule_window")),
            (ValueError, "rule: 'f16' is none of sample, window",
             lambda: module.Cache(1, 1, 8, 256, rule="f16")),
            (ValueError, "importance: 'sample' is none of key, query, use",
             lambda: module.Cache(1, 1, 8, 256, importance="sample")),
            (TypeError, "saved: str, need bytes", lambda: module.Cache.load("x")),
            (module.Error, "not a balancekv state", lambda: module.Cache.load(b"x" * 999)),
            (module.Error, "damaged", lambda: module.Cache.load(
                filled.save()[:-1] + bytes([filled.save()[-1] ^ 1]))),
            (TypeError, "no field windows in bkv_config", lambda: module.Cache(1, 1, 8, 256,
                                                                               windows=1)),
            (ValueError, "head_dim: -1 is out of range", lambda: module.Cache(1, 1, -1, 256)),
            (ValueError, "seed: 18446744073709551616 is", lambda: module.Cache(1, 1, 8, 256,
                                                                               seed=1 << 64)),
            (TypeError, "budget: 512.5, need a whole number", lambda: module.Cache(1, 1, 8, 512.5)),
            (TypeError, "budget: '512', need a whole", lambda: module.Cache(1, 1, 8, "512")),
            (TypeError, "budget: None, need a whole", lambda: module.Cache(1, 1, 8, None)),
            (TypeError, "scale: '1', need a number", lambda: module.Cache(1, 1, 8, 256, scale="1")),
            (ValueError, "budget: 4294967552 is out of range", lambda: cache.shrink(2**32 + 256)),
            (ValueError, "budget: -1 is out of range", lambda: cache.shrink(-1)),
            (TypeError, "budget: 300.0, need a whole number", lambda: cache.shrink(300.0)),
            (ValueError, "n_tokens: 18446744073709551616 is", lambda: cache.truncate(1 << 64)),
            (TypeError, "n_tokens: None, need a whole number", lambda: cache.truncate(None)),
            (ValueError, "head: 4294967296 is out of range", lambda: filled.tokens(1 << 32)),
            (module.Error, "head or token index", lambda: filled.rows(KV_HEADS)),
            (TypeError, "head: None, need a whole number", lambda: filled.rows(None)),
            (TypeError, "head: 'a', need a whole number", lambda: cache.tokens("a"))):
        try:
            call()
            said = "nothing"
        except (TypeError, ValueError) as fault:
            said = str(fault) if type(fault) is kind else repr(fault)
        tally.check(text in said, "refused: " + text, said)
    tally.check(cache._memory.tobytes() == before, "what is refused changes nothing")


def check_missing(tally):
    """Without the library the import says what to do."""
    code = subprocess.run([sys.executable, "-B", "-c", "import balancekv"],
                          cwd=os.path.join(ROOT, "examples", "python"), stderr=subprocess.PIPE,
                          env={**os.environ, "BALANCEKV_LIBRARY": "/no/such/library"},
                          universal_newlines=True, check=False)
    tally.check(code.returncode and "run examples/python/build.sh" in code.stderr,
                "without a library the import says what to do", code.stderr)


def check_readme(tally):
    """The session that README.md shows."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        session = re.search(r"(?m)(?:^    >>> .*\n(?:    .*\n)*)", file.read())
    if tally.check(session, "README shows a session in Python"):
        said = []
        example = doctest.DocTestParser().get_doctest(session[0], {}, "README.md", None, 0)
        failed, tried = doctest.DocTestRunner().run(example, out=said.append)
        tally.check(tried >= 5 and not failed, "README's session in Python", "".join(said))


def main():
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        module = load(folder)
        tally.check(module.version in run(["head", "-n", "1", "balancekv.h"]).stdout, "the version")
        check_structures(tally, module, folder)
        check_results(tally, module)
        check_refusals(tally, module)
        check_missing(tally)
        check_readme(tally)
    tally.done()


if __name__ == "__main__":
    main()
