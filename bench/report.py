#!/usr/bin/env python3
"""Markdown of what bench/speed printed, so that no figure is typed by hand:

    build/bench/speed --peers --json >speed.json 2>speed.log
    report.py bars speed.json MORE..    the bars the project set itself, and what was measured; a
                                        column more for each file of another
                                        compiler or CPU
    report.py summary speed.json        the most telling rows of the next two
    report.py shares speed.json         share of the machine's limit
    report.py peers speed.json          other implementations, in multiples of our time
    report.py growth speed.json         time of a token against the length of the stream
    report.py machine speed.json        CPU, compiler, limits, date
    report.py front speed.json          what README.md shows: pictures, summary, machine
    report.py update TEXT FOLDER        writes tables of FOLDER/*.json between the marks of a text:
                                        <!-- shares speed --> .. <!-- end --> from speed.json, and
                                        shares.svg above it if that is beside the text; names of
                                        more files may follow that of the first

The .log beside the .json has the machine, and the errors of ours and the peers.
"""
import collections
import json
import math
import os
import re
import sys
from statistics import median

FAMILIES = {"ggml flash, as in llama.cpp": ("ggml_flash_llama",),
            "ggml, best path": ("ggml",),
            "OpenBLAS, best route": ("openblas_",),
            "naive C, -Ofast": ("naive",),
            "numkong": ("numkong",),
            "torch SDPA": ("torch_",),
            "BalanceKV reference, 4k tokens": ("reference_4k",)}
VARIANTS = {"weights": "with weights", "softcap": "with a softcap",
            "partial": "as (max, sum) partials"}
ERROR = re.compile(r"^    (\S+) .* error (\S+) \(tolerance \S+\)(?:, ours (\S+))?$")
ROW = re.compile(r"^(\w+) +(\d+) +(\d+) +(\d+)  (\S+(?: \S+)?) +(\w+) +[\d.]+ \w+"
                 r"(?: +[\d.]+ % of (\w+))?(?:  error (\S+))?$")


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def name_of(row):
    """What a row of the output is about, without the backend."""
    words = [row["case"]]
    if row["d"]:
        words += ["d %d" % row["d"], "group %d" % row["group"]]
    return " ".join(words + ["n %d" % row["n"], row["type"]])


def chosen(rows):
    """Of rows that differ only in n: for attend and prefill the one next to 4096. Those with a
    draft, and of the kernel matrix alone, are there for bars_of()."""
    group = collections.defaultdict(list)
    for r in rows:
        if r["type"] in ("f16 draft", "f32 gram"):
            continue
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


def log_of(path):
    path = os.path.splitext(path)[0] + ".log"
    if not os.path.exists(path):
        sys.exit("report.py: no %s; keep what bench/speed prints on stderr" % path)
    with open(path, encoding="utf-8") as f:
        return [line.rsplit("\r\033[K", 1)[-1].rstrip("\n") for line in f]


def details(path):
    """(case, d, group, n, type) -> {"of": limit, "ours": error, peer: error}"""
    found, here = {}, {}
    for line in log_of(path):
        row, error = ROW.match(line), ERROR.match(line)
        if row:
            case, d, group, n, kind, backend, limit, ours = row.groups()
            here = found.setdefault((case, int(d), int(group), int(n), kind), {})
            here["of", backend] = limit
            here["ours"] = ours
        elif error:
            here[error[1]] = error[2]
    return found


def key_of(r):
    return r["case"], r["d"], r["group"], r["n"], r["type"]


def duration(ns):
    for unit in ("ns", "us", "ms", "s"):
        if ns < 999.5 or unit == "s":
            return ("%.0f" if ns >= 99.95 else "%.1f" if ns >= 9.995 else "%.2f") % ns + " " + unit
        ns /= 1000


def table(head, lines):
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def machine(path):
    lines = log_of(path)
    words = {key: [line.split(": ", 1)[1] for line in lines if line.startswith(key + ": ")]
             for key in ("cpu", "compiler", "limit", "peers")}
    version = next((line for line in lines if line.startswith("balancekv ")), "balancekv")
    found = {}
    for x in words["limit"]: # several runs may stand one behind the other
        name, value, unit = re.match(r"(.*?) +([\d.]+) (\S+)$", x).groups()
        found.setdefault(name + " %s " + unit, []).append(float(value))
    best = {name: "%.0f" % max(v) if max(v) < 1.1 * median(v) else "%.0f to %.0f" % (min(v), max(v))
            for name, v in found.items()}
    out = "%s. %s; %s. Limits of one core: %s.\n" % (
        version, re.sub(", load.*", "", words["cpu"][0]), words["compiler"][0],
        ", ".join(name % x for name, x in best.items()))
    if words["peers"]:
        out += "Peers: %s.\n" % "; ".join(dict.fromkeys(words["peers"]))
    return out


def shares(path):
    rows, more = chosen(read(path)), details(path)
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    cells = {}
    for r in rows:
        share = r["share_of_limit"]
        cells.setdefault(name_of(r), {})[r["backend"]] = "%s%s" % (
            duration(r["ns"]), ", %.0f %% of %s" % (100 * share, more.get(key_of(r), {}).get(
                ("of", r["backend"]), "the limit")) if share else "")
    return table(["case"] + backends,
                 [[name] + [c.get(b, "") for b in backends] for name, c in cells.items()])


def cell_of(r, found):
    """Our time and error."""
    return duration(r["ns"]) + (" (%.0e)" % float(found["ours"]) if found.get("ours") else "")


def peer_cells(r, found, families):
    cells = []
    for f in families:
        ratio, peer = family_best(r, FAMILIES[f])
        error = " (%.0e)" % float(found[peer]) if found.get("ours") and peer in found else ""
        cells.append("%.1f" % ratio + error if ratio else "")
    return cells


def used_families(rows):
    return [f for f in FAMILIES if any(family_ratio(r, FAMILIES[f]) for r in rows)]


def peers(path):
    rows = [r for r in best_rows(chosen(read(path))) if r["ratio_to"] and r["case"] != "threads"]
    more, families = details(path), used_families(rows)
    rows = [r for r in rows if any(family_ratio(r, FAMILIES[f]) for f in families)]
    return table(["times our time (relative error)", "ours"] + families,
                 [["%s, %s" % (name_of(r), r["backend"]), cell_of(r, more.get(key_of(r), {}))] +
                  peer_cells(r, more.get(key_of(r), {}), families) for r in rows])


def summary(path):
    rows = [r for r in best_rows(chosen(read(path)))
            if r["type"] in ("f32", "f32 unmoved") and r["case"] == "halve" or
            r["type"] == "f16" and r["case"] in ("attend_hot", "attend_cold", "prefill") or
            r["type"] == "f16 1/16" and r["n"] == 65536]
    more, families = details(path), used_families(rows)
    lines = []
    for r in rows:
        found = more.get(key_of(r), {})
        lines.append([name_of(r), cell_of(r, found), "%.0f %% of %s" % (
            100 * (r["share_of_limit"] or 0), found.get(("of", r["backend"])) or "the limit")] +
            peer_cells(r, found, families))
    return table(["fastest backend", "time (relative error)", "share of limit"] + families, lines)


def growth(path):
    rows = [r for r in best_rows(read(path)) if r["case"] == "growth"]
    more, lines = details(path), []
    for r in rows:
        fixed = r["type"] == "f16"
        flash, best = (family_ratio(r, FAMILIES[f]) for f in list(FAMILIES)[:2])
        lines.append(["d %d, group %d" % (r["d"], r["group"]), str(r["n"]),
                      "2048" if fixed else "n / 16", duration(r["ns"]),
                      "%.0f" % flash if flash else "", "%.0f" % best if best else ""])
    return table(["shape", "tokens so far", "budget", "append + attend",
                  "x: ggml flash on all tokens, as in llama.cpp", "x: ggml, best path"], lines)


def bars_of(path):
    """Lines of (bar, wanted, measured, met, beside it): of bars against others the share of the
    limit at which they would be met, of those in memory what the time in the cache would be."""
    rows = read(path)

    def find(case, **want):
        want["case"] = case
        return [r for r in rows
                if all(r[k] in v if isinstance(v, tuple) else r[k] == v for k, v in want.items())]

    def share(case, **want):
        return [r["share_of_limit"] for r in find(case, **want)]

    def ratios(case, family, **want):
        """Per row, of the faster backend: (ratio, share of the limit)."""
        if not isinstance(family, tuple):
            family = FAMILIES.get(family, (family,))
        found = [(family_ratio(r, family), r["share_of_limit"])
                 for r in best_rows(find(case, **want))]
        return [x for x in found if x[0]]

    there = [r["backend"] for r in rows]
    wide = next((b for b in ("avx512", "avx2", "neon") if b in there), "scalar")
    lines = []

    def percent(values):
        ends = ["%.0f %%" % (100 * x) for x in (min(values), max(values))]
        return " .. ".join(dict.fromkeys(ends))

    def bar(text, wanted, values, form="%.2f", most=False, beside=""):
        if not values:
            lines.append([text, wanted, "not measured", "", ""])
            return
        worst = max(values) if most else min(values)
        limit = float(re.search(r"[\d.e-]+", wanted)[0])
        limit /= 100 if "%" in wanted else 1
        met = worst <= limit if most else worst >= limit
        shown = " .. ".join(dict.fromkeys(form % x for x in (min(values), max(values))))
        lines.append([text, wanted, percent(values) if "%" in wanted else shown,
                      "yes" if met else "no", beside])

    def against(text, wanted, found, form="%.2f"):
        """Times another system: found as of ratios()."""
        takes = [wanted / x * share for x, share in found if share]
        bar(text, ">= %g" % wanted, [x for x, _ in found], form,
            beside="met at " + percent(takes) if takes else "")

    def cold(text, wanted, **want):
        """In memory; beside it the share that the time in the cache would be."""
        free = []
        for r in find("attend_cold", backend=wide, **want):
            free += [r["share_of_limit"] * r["ns"] / hot["ns"] for hot in find(
                "attend_hot", backend=wide, **{k: r[k] for k in ("type", "d", "group", "n")})]
        bar(text, wanted, share("attend_cold", backend=wide, **want),
            beside="in the cache " + percent(free) if free else "")

    halvings = (("f32", ""), ("f32 unmoved", ", no values moved"),
                ("f32 gram", ", kernel matrix alone"))
    for backend in dict.fromkeys((wide, "avx2")):
        for d, w in zip((64, 128), (65, 65) if backend == "avx2" else (70, 72)):
            for kind, what in halvings:
                bar("halving d %d%s, %s, of FMA peak" % (d, what, backend), ">= %d %%" % w,
                    share("halve", backend=backend, d=d, type=kind))
    for family, wanted in (("openblas_ssyrk", (1.8, 1.6)), ("naive", (4.5, 3.5)),
                           ("reference_4k", (7, 7)), ("reference_32k", (15, 15))):
        for d, w in zip((64, 128), wanted):
            for kind, what in halvings[:2]:
                against("halving d %d%s, times %s" % (d, what, family), w,
                        ratios("halve", family, d=d, type=kind))
    bar("attend f16 in cache, group >= 3, %s, of FMA peak" % wide, ">= 80 %",
        share("attend_hot", backend=wide, type="f16", group=(3, 4, 7), n=(1024, 4096)))
    for variant in ("weights", "softcap", "partial"):
        bar("the same, %s" % VARIANTS[variant], ">= 80 %",
            share("attend_hot", backend=wide, type="f16 " + variant, group=(3, 4, 7)))
    learning = [x for x, _ in ratios("attend_hot", "plain", type="f16 draft")]
    bar("attend in cache with learning, over without, median", "<= 1.02",
        [median(learning)] if learning else [], "%.3f", most=True,
        beside="single rows %.3f .. %.3f" % (min(learning), max(learning)) if learning else "")
    for kind in dict.fromkeys(r["type"] for r in find("attend_cold") if " " not in r["type"]):
        cold("attend cold %s, group <= 4, of read (or FMA)" % kind, ">= 90 %", group=(2, 3, 4),
             type=kind)
    cold("attend cold f16 with weights, a softcap, as partials", ">= 90 %", group=(2, 3, 4),
         type=tuple("f16 " + v for v in VARIANTS))
    flash, best = list(FAMILIES)[:2]
    against("attend cold f16, times ggml flash as in llama.cpp", 6,
            ratios("attend_cold", flash, type="f16"))
    for group, w in ((2, 2.4), (3, 3.3), (4, 3.5), (7, 5)):
        for where in ("cold", "hot"):
            against("attend %s f16 group %d, times ggml's best path" % (where, group), w,
                    ratios("attend_" + where, best, type="f16", group=group))
    errors = [found for (case, _, _, _, kind), found in details(path).items()
              if case == "attend_cold" and kind == "f16"]
    bar("attend cold f16: our relative error", "<= 1e-3",
        [float(f["ours"]) for f in errors if f.get("ours")], "%.1e", most=True)
    theirs = [float(f["ggml_flash_llama"]) for f in errors if "ggml_flash_llama" in f]
    if theirs:
        lines.append(["the same of ggml flash", "",
                      "%.1e .. %.1e" % (min(theirs), max(theirs)), "", ""])
    against("prefill f16, times the better of ggml and torch SDPA", 2,
            ratios("prefill", ("ggml", "torch")))
    for first, where in ((2048, "from where it is full"),
                         (1024, "from 1k, where it is half full,")):
        fixed = [r["ns"] for r in find("growth", backend=wide, type="f16") if r["n"] >= first]
        bar("growth, budget 2048, %s to 1M tokens: max/min" % where, "<= 1.2",
            [max(fixed) / min(fixed)] if fixed else [], most=True)
    for d in (64, 128):
        against("growth at 1/16 of the keys, d %d, n from 4k, times ggml flash on all" % d, 70,
                ratios("growth", flash, d=d, type="f16 1/16"), "%.0f")
    for r in best_rows(find("worst_append")): # bench/speed counts, and fails if there are more
        lines.append(["worst append d %d" % r["d"], "one halving per KV head",
                      "one; %.2f times its time in a cache by itself" % (
                          1 / r["ratio_to"]["halvings"]), "yes", ""])
    for d in (64, 128):
        ends = sorted(find("append", backend=wide, d=d), key=lambda r: r["n"])
        bar("append d %d, after 1M tokens over after 1k" % d, "<= 1.15",
            [ends[-1]["ns"] / ends[0]["ns"]] if len(ends) > 1 else [], most=True)
    for kind, where in (("f16", "in the cache"), ("f16 cold", "in memory")):
        against("two threads over one, %s" % where, 1.9, ratios("threads", "one_thread", type=kind))
    return lines


def compiler_of(path):
    words = next(x for x in log_of(path) if x.startswith("compiler: ")).split()
    return words[1] + " " + next(w for w in words[2:] if w[0].isdigit()).split(".")[0]


def heading(path):
    """The compiler, and what else the name of the file says: speed-zen5."""
    name = os.path.splitext(os.path.basename(path))[0].partition("-")[2]
    compiler = compiler_of(path)
    return compiler if not name or compiler.startswith(name) else compiler + ", " + name


def bars(path, *others):
    """The first file says which bars; of others only what they measured."""
    more = [dict((line[0], line[2]) for line in bars_of(other)) for other in others]
    return table(["bar", "wanted", heading(path), "met", "beside it"] + list(map(heading, others)),
                 [line + [m.get(line[0], "not measured") for m in more] for line in bars_of(path)])


def front(path):
    return ("![Time of a token against the length of the stream](bench/growth.svg)\n\n%s\n"
            "![Other implementations, in multiples of our time](bench/peers.svg)\n\n"
            "![Share of the machine's limit](bench/shares.svg)\n\n%s" % (
                summary(path), machine(path)))


COMMANDS = {f.__name__: f for f in (machine, summary, shares, peers, growth, bars, front)}


def update(path, folder, commands):
    with open(path, encoding="utf-8") as f:
        text = f.read()

    def fill(match):
        sources = [os.path.join(folder, name + ".json") for name in match[2].split()]
        if not os.path.exists(sources[0]):
            return match[0]
        there = os.path.exists(os.path.join(os.path.dirname(path), match[1] + ".svg"))
        picture = "![%s](%s.svg)\n\n" % (match[1], match[1]) if there else ""
        return "<!-- %s %s -->\n%s%s<!-- end -->" % (
            match[1], match[2], picture, commands[match[1]](*filter(os.path.exists, sources)))

    text = re.sub(r"<!-- (%s) ([\w -]+) -->.*?<!-- end -->" % "|".join(commands), fill, text,
                  flags=re.S)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def main(args, commands, usage):
    if len(args) == 3 and args[0] == "update":
        update(*args[1:], commands)
    elif len(args) == 2 and args[0] in commands or len(args) > 2 and args[0] == "bars":
        for path in args[1:]:
            if not os.path.exists(path):
                sys.exit("%s: no %s" % (os.path.basename(sys.argv[0]), path))
        print(commands[args[0]](*args[1:]), end="")
    else:
        sys.exit(usage)


if __name__ == "__main__":
    main(sys.argv[1:], COMMANDS, __doc__)
