#!/usr/bin/env python3
"""What a user's own files see: no warning comes from the header, with every warning that the
compiler has; the C++ class of README.md compiles and does what it says.

    check_consumer.py [COMPILER...]      default: those found among gcc, clang, clang-14, clang-16
"""
import os
import re
import tempfile

from bad_config import ROOT, WARNINGS, Tally, compilers, knows_cxx, run

# Not of this header: what compilers say about every C99 header or struct.
SPARED = {
    "-Wpadded": "members stand in the order in which they are read",
    "-Waggregate-return": "bkv_config_default() and bkv_dense() return structures, as they should",
    "-Wtraditional": "C before 1989", "-Wtraditional-conversion": "the same",
    "-Wlong-long": "C before 1999",
    "-Wsystem-headers": "not ours",
    "-Wabi": "says of itself that it does nothing", "-Wchkp": "the same",
}
USER = """#include "balancekv.h"
int main(void) {
    static unsigned char block[64];
    bkv_config cfg = bkv_config_default(1, 1, 16, 256);
    bkv_cache cache;
    bkv_token_info token;
    bkv_stats_info stats;
    bkv_tensor tensor = bkv_dense(block, BKV_F32);
    bkv_result result = bkv_init(&cache, &cfg, block, sizeof block);
    if (result == BKV_OK) result = bkv_append(&cache, tensor, tensor, 1, 0, 0, 1);
    if (result == BKV_OK) result = bkv_token(&cache, 0, 0, &token);
    if (result == BKV_OK) result = bkv_stats(&cache, &stats);
    return result != BKV_OK;
}
"""
# What must be found, or the flags are not what they seem.
BAD = "int bad(int x); int bad(int x) { char c = x; return c; }\n"

OWNER = """#define BALANCEKV_IMPLEMENTATION
%s
#include <cstdio>
#include <utility>
int main() {
    Cache first(bkv_config_default(2, 1, 16, 256));
    float x[32] = {1.0f}, out[32] = {};
    const bkv_tensor row = bkv_dense(x, BKV_F32);
    for (int t = 0; t < 500; t++)
        if (bkv_append(first.get(), row, row, 1, 0, 0, 1) != BKV_OK) return 1;
    Cache second(std::move(first));
    if (bkv_attend(second.get(), row, out, 0, 1) != BKV_OK || out[0] != 1.0f) return 2;
    try {
        Cache third(bkv_config_default(2, 1, 16, 10));
    } catch (const std::invalid_argument &refused) {
        std::puts(refused.what());
        return 0;
    }
    return 3;
}
"""


def all_warnings(compiler, language):
    """Flags that turn on whatever the compiler knows, but for SPARED."""
    if "clang" in run([compiler, "--version"]).stdout:
        return ["-Weverything", "-Wno-padded"]
    text = "".join(run([compiler, "-Q", "--help=warnings," + part]).stdout
                   for part in (language, "common"))
    return sorted(set(re.findall(r"(?m)^  (-W[\w+-]*[\w+])(?=\s)", text)) - set(SPARED))


def check_warnings(tally, compiler, standards):
    for standard in standards:
        language = "c++" if "++" in standard else "c"
        command = [compiler, "-I."] + all_warnings(compiler, language) + [
            "-std=" + standard, "-O1", "-S", "-o", os.devnull, "-x", language, "-"]
        built = run(command, USER)
        tally.check(built.returncode == 0 and not built.stdout,
                    "%s -std=%s: no warning in a user's file" % (compiler, standard), built.stdout)
        if standard in ("c99", "c++11"):
            tally.check("onversion" in run(command, BAD).stdout,
                        "%s -std=%s: there are warnings" % (compiler, standard))


def check_owner(tally, compiler, code, folder):
    program = os.path.join(folder, "owner")
    built = run([compiler, "-I."] + WARNINGS + ["-std=c++11", "-o", program, "-x", "c++", "-",
                                                "-lstdc++"], OWNER % code)
    if tally.check(built.returncode == 0 and not built.stdout,
                   "%s: README's class compiles" % compiler, built.stdout):
        ran = run([program])
        tally.check(ran.returncode == 0 and "budget is smaller" in ran.stdout,
                    "it owns, moves and refuses", "%d %s" % (ran.returncode, ran.stdout))


def main():
    tally = Tally()
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```cpp\n(.*?)```", file.read(), re.S)
    tally.check(len(blocks) == 1 and len(blocks[0].splitlines()) <= 17,
                "README shows one class of C++, and it is short")
    with tempfile.TemporaryDirectory() as folder:
        for compiler in compilers():
            check_warnings(tally, compiler, ("c99", "c11", "gnu17"))
            if knows_cxx(compiler):
                check_warnings(tally, compiler, ("c++11", "c++20"))
                check_owner(tally, compiler, blocks[0], folder)
    tally.done()


if __name__ == "__main__":
    main()
