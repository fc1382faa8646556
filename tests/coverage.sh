#!/bin/sh
# Which lines and branches of balancekv.h the core tests reach. Any folder:  sh tests/coverage.sh
# Needs gcc, gcov and Python. Prints the share per section and in all, and every line that nothing
# reached; at least 95 % of lines and branches make it pass. COVERAGE_JOBS: programs at a time.
#
# What is counted: of §4 to §10 every line and branch once; of §11 and §12, which are compiled once
# per backend, each once per backend that this CPU has: what AVX2 reaches is not reached for AVX-512.
# Nothing is inlined (-Dalways_inline), as every inlined copy would count anew, with the branches that
# its constants rule out.
#
# Out of reach on x86-64: BKV_E_SIZE of a plan (it takes a size_t of 32 bits), bkvi_swap (a big-endian
# machine), CPUs without AVX2; in the scalar block what §12 does across the lanes of one vector; the
# default of a switch that has every case.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 1
out=build/coverage
bar=95

program() { # name: builds and runs one of the tests, what gcov has to say goes into its folder
    dir=$out/$1 define='' arguments=''
    [ "$1" != fuzz_ops ] || { define=-DREPLAY arguments='tests/corpus/*'; }
    rm -rf "$dir" && mkdir -p "$dir" || return 1
    # shellcheck disable=SC2086 # options and arguments are meant to split
    {
        gcc -std=c99 -O0 --coverage -Dalways_inline=unused $define -I. "tests/$1.c" \
            -o "$dir/program" -lm -lpthread &&
            BKV_QUICK=1 "$dir/program" $arguments &&
            gcov --json-format --branch-probabilities --stdout "$dir/program-$1.gcda" \
                >"$dir/gcov.json"
    } >"$dir/log" 2>&1
}

# Lines and branches by (function, line): a function of §11 or §12 has its backend in its name.
# A branch is one way out of a condition, in the order in which gcov lists them.
summary='
import bisect, collections, json, re, sys
bar, backends, paths = float(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
source = open("balancekv.h", encoding="utf-8").read().splitlines()
starts = [(n, m[1]) for n, text in enumerate(source, 1)
          for m in [re.search(r"---- (§\d+) [A-Z]", text)] if m]
absent = {"scalar", "avx2", "avx512", "neon"} - set(backends)
lines, branches = collections.Counter(), {}
for path in paths:
    for file in json.load(open(path))["files"]:
        if not file["file"].endswith("balancekv.h"):
            continue
        for line in file["lines"]:
            key = line["line_number"], line.get("function_name", "")
            if key[1].rsplit("_", 1)[-1] in absent:
                continue
            lines[key] += line["count"]
            ways = [way["count"] for way in line["branches"]]
            before = branches.setdefault(key, [0] * len(ways))
            assert len(before) == len(ways), "%s: another shape in another program" % (key,)
            branches[key] = [a + b for a, b in zip(before, ways)]

def section(line):
    return starts[bisect.bisect(starts, (line, "~")) - 1][1]

table = collections.defaultdict(lambda: [0, 0, 0, 0])
for key in lines:
    for row in (table[section(key[0])], table["all"]):
        row[0] += lines[key] > 0
        row[1] += 1
        row[2] += sum(n > 0 for n in branches[key])
        row[3] += len(branches[key])
print("Backends: %s%s" % (" ".join(backends),
                          "; not of this CPU: " + " ".join(sorted(absent)) if absent else ""))
missing = collections.defaultdict(list)
for (line, function), count in sorted(lines.items()):
    if count == 0:
        missing[line].append(function)
print("\nLines that nothing reached:" if missing else "\nEvery line was reached.")
for line, functions in missing.items():
    print("%5d  %-70.70s  %s" % (line, source[line - 1].strip(), " ".join(functions)))
print("\nBranches never taken (way/ways out of the line):")
half = collections.defaultdict(list)
for (line, function), ways in sorted(branches.items()):
    never = [i + 1 for i, n in enumerate(ways) if n == 0]
    if never and lines[line, function]:
        half[line].append("%s %s/%d" % (function, ",".join(map(str, never)), len(ways)))
for line, places in half.items():
    print("%5d  %-70.70s  %s" % (line, source[line - 1].strip(), " ".join(places)))

def share(part, whole):
    return 100 * part / whole if whole else 100

print("\nsection   lines           branches")
for name in sorted(table, key=lambda s: int(s[1:]) if s[1:].isdigit() else 99):
    a, b, c, d = table[name]
    print("%-8s %5d/%-5d %5.1f %% %5d/%-5d %5.1f %%" % (name, a, b, share(a, b), c, d, share(c, d)))
a, b, c, d = table["all"]
good = [share(a, b) >= bar, share(c, d) >= bar]
print("lines %.2f %%, branches %.2f %%, at least %g %% wanted" % (share(a, b), share(c, d), bar))
print("%d passed, %d failed" % (sum(good), 2 - sum(good)))
sys.exit(not all(good))
'

if [ "${1:-}" = --program ]; then
    program "$2"
    exit
fi
mkdir -p $out || exit 1
gcc -std=c99 -O0 -I. bench/hash.c -o $out/hash || exit 1
backends=$($out/hash --backend none 2>&1 | sed -n 's/^backends here: auto //p')
set -- test_stream test_golden test_convert test_kernels test_attend test_trust test_api fuzz_ops
for name; do echo "$name"; done |
    xargs -P "${COVERAGE_JOBS:-2}" -I '{}' sh tests/coverage.sh --program '{}' || {
    for name; do [ -s $out/"$name"/gcov.json ] || tail -n 8 $out/"$name"/log; done
    exit 1
}
for name; do
    shift
    set -- "$@" $out/"$name"/gcov.json
done
python3 -c "$summary" $bar "$backends" "$@"
