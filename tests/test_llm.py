#!/usr/bin/env python3
"""examples/llm/bkv-llm: usage: test_llm.py BKV_LLM [MODEL]

On tiny models of random weights, made here: the logits against llama.cpp's own, for every
architecture; every command; every kind of bad input. On MODEL, a real one: its logits, and what
small caches do to its perplexity. Without MODEL that part is left out, and says so.
"""
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile

import tiny_gguf
from bad_config import ROOT, Tally

METHODS = ["balancekv", "sample", "walk", "uniform", "window", "pair", "stride", "keydiff", "full"]
TEXT = os.path.join(ROOT, "balancekv.h")
PROSE = os.path.join(ROOT, "tests", "prose.txt")


def run(program, *options, stdin=""):
    """On one thread if the options do not say: ggml's threads spin when others have the CPU."""
    threads = [] if not options or "--threads" in options else ["--threads", 1]
    options = [*options[:1], *threads, *options[1:]]
    return subprocess.run([program, *map(str, options)], input=stdin.encode(), check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(tally, label, ran):
    """The JSON objects that a good run prints."""
    if not tally.check(ran.returncode == 0, label + " runs", ran.stderr.decode()):
        return [{}]
    return [json.loads(line) for line in ran.stdout.decode().splitlines()]


def measure(tally, program, command, model, *options):
    label = "%s %s" % (command, " ".join(map(str, options)))
    return lines(tally, label, run(program, command, "--model", model, "--json", "--text", TEXT,
                                   *options))


# ---- against llama.cpp -------------------------------------------------------------------------
def tiny_models(folder):
    """Name and path of one model per thing that models differ in."""
    for name, arch, options in (("llama", "llama", {}), ("qwen2", "qwen2", {}),
                                ("qwen3", "qwen3", {"dim": 24, "kv_heads": 1}),
                                ("scaled", "llama", {"seed": 2})):
        keys, tensors = tiny_gguf.model(arch, **options)
        if name == "scaled":
            keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"] = "linear", 2.0
            tensors["rope_freqs.weight"] = ((8,), [1 + 0.5 * i for i in range(8)])
        path = os.path.join(folder, name + ".gguf")
        tiny_gguf.write(path, keys, tensors)
        yield name, path


def check_logits(tally, program, folder):
    """Full attention does what llama.cpp does, to the bit; a cache of balancekv.h that keeps
    everything in f32 agrees with exact attention over f32 to rounding."""
    for name, model in tiny_models(folder):
        for chunk in (100, 1):
            got = measure(tally, program, "check", model, "--ctx", 250, "--chunk", chunk,
                          "--method", "full")[0]
            tally.check(got.get("max_diff") == 0, "%s in steps of %d: the logits of llama.cpp"
                        % (name, chunk), str(got))
            got = measure(tally, program, "check", model, "--ctx", 250, "--chunk", chunk,
                          "--set", "kv_type=f32")[0]
            tally.check(got.get("rel_diff_exact", 1) < 3e-6 and got["other_token_exact"] == 0,
                        "%s in steps of %d: exact caches are exact" % (name, chunk), str(got))
            tally.check(got.get("own_rel_diff", 0) > 1e-4, "the yardstick is one", str(got))


# ---- commands ----------------------------------------------------------------------------------
def check_ppl(tally, program, model):
    ctx, seen = 1024, {}
    for method in METHODS:
        got = measure(tally, program, "ppl", model, "--ctx", ctx, "--windows", 2,
                      "--method", method, "--budget", 256)[0]
        seen[method] = got.get("ppl")
        tally.check(got.get("tokens") == ctx and got["windows"] == 2 and
                    abs(math.exp(got["nll"]) / got["ppl"] - 1) < 1e-4, "ppl counts", str(got))
        full = 2 * 2 * 2 * 16 * ctx * 2  # layers, heads, k and v, elements, tokens, bytes
        tally.check(got["bytes_kv_full"] == full and
                    (got["bytes_kv"] == full) == (method == "full") and
                    (method == "full" or got["bytes_kv"] < full / 2), "ppl tells bytes", str(got))
    tally.check(len(set(seen.values())) >= len(METHODS) - 1, "methods differ, but the default one",
                str(seen))
    exact = measure(tally, program, "ppl", model, "--ctx", ctx, "--windows", 2)[0]
    tally.check(abs(exact.get("ppl", 0) / seen["full"] - 1) < 1e-3, "budget 0 is exact", str(exact))
    two = measure(tally, program, "ppl", model, "--ctx", ctx, "--windows", 2, "--budget", 256,
                  "--threads", 2)[0]
    tally.check(two.get("ppl") == seen["balancekv"], "threads change nothing", str(two))
    slots = {}
    for kind in ("f32", "f16", "i8", "i4"):
        for method in ("balancekv", "window", "keydiff"):
            share = measure(tally, program, "ppl", model, "--ctx", ctx, "--windows", 1, "--share",
                            "1/2", "--set", "kv_type=" + kind, "--method", method)[0]
            slots[kind, method] = share.get("budget", 0)
            tally.check(share.get("kv_type") == kind and
                        0.45 < share["bytes_kv"] / share["bytes_kv_full"] <= 0.5,
                        "--share of %s in %s" % (method, kind), str(share))
    tally.check(all(1.2 * slots["f32", x] < slots["f16", x] < slots["i8", x] / 1.2
                    for x in ("balancekv", "window", "keydiff")) and
                1.5 * slots["i8", "keydiff"] < slots["i4", "keydiff"],
                "smaller types give more slots", str(slots))
    plain = run(program, "ppl", "--model", model, "--text", TEXT, "--ctx", 64, "--windows", 1)
    tally.check(re.fullmatch(r"balancekv in f16, budget 0, ctx 64, caches .* ppl [\d.]+, .*\n",
                             plain.stdout.decode()), "ppl as text", plain.stdout.decode())
    endless = run(program, "ppl", "--model", model, "--text", TEXT, "--ctx", 512, "--endless",
                  "--budget", 256, "--windows", 20)
    memory = re.findall(r"([\d.]+) MB resident", endless.stderr.decode())
    tally.check(len(memory) == 20 and float(memory[-1]) - float(memory[1]) < 0.2,
                "an endless run takes no memory", str(memory))


def check_passkey(tally, program, model):
    got = measure(tally, program, "passkey", model, "--ctx", "256,512", "--depths", 3, "--seeds", 2,
                  "--budget", 192, "--each")
    sums = [x for x in got if "cases" in x]
    tally.check(len(got) == 14 and [x["ctx"] for x in sums] == [256, 512] and
                all(x["cases"] == 6 and x["found"] == 0 and 2 < x["nll_per_digit"] < 50
                    for x in sums), "passkey: a random model finds nothing", str(sums))
    one = [x["nll_per_digit"] for x in got[7:13]]
    # One depth alone: the same key at the same place, without the prefix of the others.
    filler = lines(tally, "passkey of the filler",
                   run(program, "passkey", "--model", model, "--ctx", 300, "--depths", 1, "--json"))
    tally.check(len(set(one)) == 6 and filler[0]["cases"] == 1, "passkey: cases differ", str(one))


def read_npy(path):
    with open(path, "rb") as f:
        data = f.read()
    header = data[10:10 + struct.unpack_from("<H", data, 8)[0]].decode()
    shape = tuple(map(int, re.search(r"\((\d+), (\d+), (\d+)\)", header).groups()))
    count = shape[0] * shape[1] * shape[2]
    return shape, struct.unpack_from("<%de" % count, data, len(data) - 2 * count)


def check_dump(tally, program, model, folder):
    out = os.path.join(folder, "trace")
    ran = run(program, "dump", "--model", model, "--text", TEXT, "--ctx", 200, "--layers", "0,1",
              "--out", out, "--chunk", 64)
    tally.check(ran.returncode == 0 and not ran.stderr, "dump runs", ran.stderr.decode())
    for layer in ("_layer00", "_layer01"):
        shapes = {name: read_npy(os.path.join(out + layer, name + ".npy")) for name in "qkv"}
        tally.check([shapes[x][0] for x in "qkv"] == [(200, 4, 16), (200, 2, 16), (200, 2, 16)] and
                    all(0.1 < max(map(abs, x)) < 100 for _, x in shapes.values()),
                    "dump writes what it says", str([x[0] for x in shapes.values()]))
    # The stream program reads it: one format.
    more = os.path.join(folder, "more")
    run(program, "dump", "--model", model, "--text", TEXT, "--ctx", 201, "--layers", "1", "--out",
        more)
    long, short = (read_npy(os.path.join(x + "_layer01", "k.npy"))[1] for x in (more, out))
    tally.check(all(abs(a - b) <= 4e-3 * (1 + abs(a)) for a, b in zip(long, short)),
                "steps of a dump do not matter")


def check_speed(tally, program, model):
    got = measure(tally, program, "speed", model, "--ctx", 640, "--budget", 256)[0]
    tally.check(0 < got.get("ms_best", 0) <= got["ms_median"] and
                got["ms_best"] <= got["ms_with_halving"] and 0 < got["halving_share"] < 1 and
                abs(got["full_ms_best"] / got["ms_best"] / got["ratio_best"] - 1) < 0.05,
                "speed compares", str(got))


def check_generate(tally, program, model, folder):
    def say(*options, stdin=""):
        return run(program, "generate", "--model", model, "--n", 40, *options, stdin=stdin)
    prompt = "Once upon a time\n"
    path = os.path.join(folder, "prompt.txt")
    with open(path, "w", encoding="utf-8") as f:
        f.write(prompt)
    told = [say("--prompt", prompt), say("--text", path), say(stdin=prompt)]
    tally.check(all(x.returncode == 0 and x.stdout == told[0].stdout for x in told) and
                len(told[0].stdout) >= 1, "a prompt may come from three places",
                str([x.stderr for x in told]))
    tally.check(re.search(rb"answer: [1-9]\d* tokens, [\d.]+", told[0].stderr),
                "generate tells its speed", str(told[0].stderr))
    got = lines(tally, "generate as JSON", say("--prompt", prompt, "--json"))[0]
    tally.check(got.get("prompt_tokens") == len(prompt) and got["tokens"] <= 40 and
                got["tokens_per_s"] > 0, "generate counts", str(got))
    other = [say("--prompt", prompt, "--temp", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    tally.check(other[0] == other[1] != other[2], "sampling follows the seed", str(other))
    # Twice the trained text through a small cache, the memory does not move.
    long = lines(tally, "long generate", say("--prompt", prompt * 20, "--n", 1500, "--budget", 256,
                                             "--temp", 2, "--json"))[0]
    tally.check(long.get("resident_after", 1 << 40) - long.get("resident_before", 0) < 200000,
                "memory stays", str(long))
    tally.check(got.get("estimated_error") == 0 < long.get("estimated_error", 0) < 2 and
                b"estimated error of attention: 0.0000]" in told[0].stderr,
                "the estimated error: 0 as long as all is kept", str(long))
    stopped = say("--prompt", prompt, "--ctx", 30, "--budget", 256, "--temp", 1)
    tally.check(b"[stopped at --ctx 30]" in stopped.stderr or b"answer: 1" in stopped.stderr,
                "generate stops at --ctx", str(stopped.stderr))


def check_chat(tally, program, model, folder):
    def chat(*turns, model=model, budget=256):
        ran = run(program, "chat", "--model", model, "--n", 12, "--budget", budget,
                  "--temp", 1, "--ctx", 700, stdin="\n".join(turns) + "\n")
        tally.check(ran.returncode == 0, "chat runs", ran.stderr.decode())
        return ran
    plain = chat("hello", "again", "/quit", "not read")
    undone = chat("hello", "something else", "/undo", "again")
    answers = re.findall(rb"prompt: (\d+) tokens", plain.stderr)
    tally.check(len(answers) == 2, "two turns, two answers", str(plain.stderr))
    # Without the turn that was taken back the conversation is the same one.
    first = chat("hello").stdout
    second = plain.stdout[len(first):]
    tally.check(plain.stdout.startswith(first) and undone.stdout.startswith(first) and
                undone.stdout.endswith(second) and second, "/undo takes the turn back",
                "%r %r" % (plain.stdout, undone.stdout))
    tally.check(b"[nothing to take back]" in chat("/undo").stderr, "/undo at the start")
    full = chat(*["many words " * 8] * 12)
    tally.check(b"has reached --ctx 700" in full.stderr, "a chat that is full says so")
    check_saved_chat(tally, chat, first, second, folder)


def check_saved_chat(tally, chat, first, second, folder):
    """Of two turns, saved after the first one."""
    path = os.path.join(folder, "saved.chat")
    saved = chat("hello", "/save " + path)
    loaded = chat("something else", "/load " + path, "again", "/undo", "/undo")
    tally.check(saved.stdout == first and loaded.stdout.endswith(second) and
                b"saved.chat: loaded]" in loaded.stderr and b"[taken back]" in loaded.stderr and
                b"[nothing to take back]" in loaded.stderr, "/load goes on where /save was",
                "%r %r" % (saved, loaded))
    with open(path, "rb") as f:
        data = f.read()
    for name, content in (("short", data[:-1]), ("start", data[:40]), ("empty", b""),
                          ("flipped", data[:-999] + bytes([data[-999] ^ 4]) + data[-998:]),
                          ("long", data.replace(b"\n5\nhello", b"\n99999999\nhello")),
                          ("behind", re.sub(rb"(?<=^bkv-llm chat 1\n)(\d+) \d+", rb"\1 9999",
                                            data)),
                          ("model", re.sub(rb"(?<=^bkv-llm chat 1\n)\d+", b"1", data))):
        with open(path, "wb") as f:
            f.write(content)
        ran = chat("hello", "/load " + path, "again")
        tally.check(b"loaded]" not in ran.stderr and ran.stdout == first + second,
                    "/load of a bad file, %s, changes nothing" % name, str(ran))
    with open(path, "wb") as f:
        f.write(data)
    tally.check(b"saved with other options]" in chat("/load " + path, budget=320).stderr,
                "/load with another budget")
    said = chat("/load", "/save " + folder, "/load " + folder + "/none").stderr
    tally.check(said.count(b"/save FILE") == 2 and b"Is a directory]" in said and
                b"none: No such file" in said, "/save and /load say what is wrong", str(said))


# ---- bad input ---------------------------------------------------------------------------------
def bad_models(folder):
    """What is wrong, path, what the message must say."""
    def write(name, keys=None, tensors=None, arch="llama"):
        good_keys, good_tensors = tiny_gguf.model(arch)
        good_keys.update(keys or {})
        good_tensors.update(tensors or {})
        path = os.path.join(folder, name + ".gguf")
        tiny_gguf.write(path, {k: v for k, v in good_keys.items() if v is not None},
                        {k: v for k, v in good_tensors.items() if v is not None})
        return path
    good = write("good")
    with open(good, "rb") as f:
        data = f.read()
    for name, content, text in (("text", b"hello, world\n" * 9, "is not a GGUF file"),
                                ("empty", b"", "is not a GGUF file"),
                                ("header", data[:20], "truncated or damaged"),
                                ("keys", data[:2000], "truncated or damaged"),
                                ("tensors", data[:-5000], "is truncated"),
                                ("noise", data[:24] + bytes(range(256)) * 9,
                                 "truncated or damaged")):
        path = os.path.join(folder, name + ".gguf")
        with open(path, "wb") as f:
            f.write(content)
        yield name, path, text
    yield "missing", os.path.join(folder, "no.gguf"), "no such model"
    yield "folder", folder, "is not a GGUF file"
    yield "architecture", write("arch", {"general.architecture": "gpt2"}), \
        "architecture 'gpt2' is not supported; give a GGUF of llama, qwen2 or qwen3"
    yield "no architecture", write("none", {"general.architecture": None}), "architecture ''"
    yield "experts", write("moe", {"llama.expert_count": 8}), "mixture of experts"
    yield "RoPE", write("yarn", {"llama.rope.scaling.type": "yarn"}), "RoPE scaling 'yarn'"
    yield "no layers", write("nokey", {"llama.block_count": None}), \
        "lacks the key llama.block_count"
    yield "0 layers", write("zero", {"llama.block_count": 0}), "no layers"
    yield "heads per layer", write("heads", {"llama.attention.head_count": [4, 4]}), \
        "llama.attention.head_count is not one 32-bit number"
    yield "unknown tensor", write("extra", None, {"blk.0.attn_output.bias": ((64,), [0.0] * 64)}), \
        "1 of its 21 tensors are unknown"
    yield "no tensor", write("less", None, {"blk.1.ffn_up.weight": None}), \
        "no tensor blk.1.ffn_up.weight"
    yield "shape", write("shape", None, {"blk.1.ffn_up.weight": ((64, 95), [0.0] * 64 * 95)}), \
        "blk.1.ffn_up.weight has another shape"
    yield "group", write("group", {"llama.attention.head_count_kv": 3}, {
        "blk.%d.attn_%s.weight" % (i, x): ((64, 48), [0.0] * 64 * 48)
        for i in range(2) for x in "kv"}), "n_q_heads"
    yield "vocabulary", write("vocab", {"tokenizer.ggml.tokens": None}), "vocabulary"


def bad_options(folder):
    ppl = ["ppl", "--text", TEXT]
    short = os.path.join(folder, "short.txt")
    with open(short, "w", encoding="utf-8") as f:
        f.write("short")
    yield [], "no command"
    yield ["talk"], "unknown command 'talk'"
    yield ppl + ["--ctx", "many"], "--ctx: 'many' is not a number"
    yield ppl + ["--ctx", "4096"], "trained on 2048 tokens"
    yield ppl + ["--ctx", "0"], "--ctx: '0' is not"
    yield ppl + ["--ctx", "8"], "too short"
    yield ppl + ["--ctx"], "--ctx needs a value"
    yield ["ppl", "--text", short, "--ctx", "64"], "5 tokens are too short for --ctx 64"
    yield ["ppl", "--text", folder + "/none", "--ctx", "64"], "No such file"
    yield ["ppl", "--ctx", "64"], "needs --text FILE"
    yield ppl + ["--ctx", "64", "--budget", "100"], \
        "above 2^24; give more, or 0 for all tokens"
    yield ppl + ["--ctx", "64", "--budget", "-5"], "--budget: '-5' is not"
    yield ppl + ["--ctx", "64", "--share", "0.01"], "--share 0.01 of 64 tokens is too small"
    yield ppl + ["--share", "0.5", "--budget", "512"], "give one of them"
    yield ppl + ["--share", "1/0"], "--share: '0' is not"
    yield ppl + ["--share", "3/2"], "--share: 3/2 is not"
    yield ppl + ["--method", "best"], "--method: 'best' is none of balancekv, sample, window"
    yield ppl + ["--set", "temp"], "is not KEY=VALUE"
    yield ppl + ["--set", "tmp=1"], "--set: 'tmp=1' is none of"
    yield ppl + ["--set", "kv_type=f8"], \
        "--set kv_type: 'f8' is none of f32, f16, bf16, i8, i4"
    yield ppl + ["--ctx", "64", "--budget", "512", "--set", "temp=-1"], "temp"
    yield ppl + ["--threads", "0"], "--threads: '0' is not"
    yield ppl + ["--unpack", "int4"], "--unpack: 'int4' is none of"
    yield ppl + ["--best"], "unknown option '--best'"
    yield ["generate", "--prompt", ""], "the prompt is empty"
    yield ["generate", "--prompt", "x" * 2048], "2048 tokens, but the model was trained on 2048"
    yield ["generate", "--prompt", "x" * 100, "--ctx", "100"], "100 tokens, as many as --ctx 100"
    yield ["passkey", "--ctx", "40"], "too short for a pass key"
    yield ["passkey", "--ctx", "512", "--text", short], "too short"
    yield ["dump", "--text", TEXT, "--ctx", "64"], "dump needs --layers"
    yield ["dump", "--text", TEXT, "--ctx", "64", "--layers", "2", "--out", folder + "/x"], \
        "'2' is no layer; there are 0 to 1"
    yield ["dump", "--text", TEXT, "--ctx", "64", "--layers", "1", "--out", "/no/such"], \
        "No such file"
    yield ["speed", "--text", TEXT, "--ctx", "64"], "speed needs --ctx 256"


def check_bad_input(tally, program, folder):
    def refused(label, ran, text):
        said = ran.stderr.decode().splitlines()
        tally.check(ran.returncode == 2 and len(said) == 1 and said[0].startswith("bkv-llm: ") and
                    text in said[0] and not ran.stdout, "bad input, %s: exit 2 and '%s'"
                    % (label, text), "exit code %d\n%s%s" % (ran.returncode, ran.stderr.decode(),
                                                             ran.stdout.decode()))
    for label, model, text in bad_models(folder):
        refused(label, run(program, "ppl", "--model", model, "--text", TEXT, "--ctx", 64), text)
    good = os.path.join(folder, "good.gguf")
    for options, text in bad_options(folder):
        refused(" ".join(options)[:60],
                run(program, *options[:1], *(["--model", good] if options else []), *options[1:]),
                text)
    refused("no model", run(program, "ppl"), "--model M.gguf is missing")
    for script, options, text in (
            ("texts.sh", [], "sh examples/llm/texts.sh FOLDER"),
            ("texts.sh", [os.path.join(ROOT, "new", "folder")],
             "is inside the source tree; give a folder outside"),
            ("measure.sh", [], "sh examples/llm/measure.sh TEXT.."),
            ("measure.sh", ["/no/such.txt"], "no /no/such.txt; examples/llm/texts.sh makes")):
        ran = subprocess.run(["sh", os.path.join(ROOT, "examples", "llm", script)] + options,
                             check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        tally.check(ran.returncode == 2 and text in ran.stdout.decode(),
                    "bad input, %s %s: exit 2 and '%s'" % (script, " ".join(options), text),
                    "exit code %d\n%s" % (ran.returncode, ran.stdout.decode()))
    tally.check(not os.path.exists(os.path.join(ROOT, "new")), "texts.sh makes nothing in the tree")


def check_tables(tally, folder):
    """measure.sh: methods without a type of their own store TYPE; nothing else tells runs apart."""
    log = os.path.join(folder, "log.jsonl")
    with open(log, "w", encoding="utf-8") as f:
        for run_of, stored, rise in (("full 1", "f16", 0), ("balancekv 1/4", "i8", 0.01),
                                     ("balancekv 1/4", "i4", 0.02)):
            f.write(json.dumps({"run": "ppl 512 a %s 1 1 10 %s" % (run_of, stored), "text": "a",
                                "command": "ppl", "ctx": 512, "ppl": 10 * (1 + rise),
                                "nll": math.log(10 * (1 + rise))}) + "\n")
    said = subprocess.run(
        ["sh", os.path.join(ROOT, "examples", "llm", "measure.sh"), "a"], check=False,
        env=dict(os.environ, LOG=log, WHAT="", CTX="512", SHARES="1/4", TYPE="i8",
                 METHODS="balancekv balancekv@i4 balancekv@f16"), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True).stdout
    tally.check([line for line in said.splitlines() if "| a |" in line] ==
                ["| balancekv | a | +1.00 % |", "| balancekv@i4 | a | +2.00 % |"],
                "measure.sh: a method with a type of its own", said)


# ---- the real model ----------------------------------------------------------------------------
def check_real(tally, program, model):
    got = measure(tally, program, "check", model, "--ctx", 128, "--method", "full")[0]
    tally.check(got.get("max_diff") == 0, "real model: the logits of llama.cpp", str(got))
    got = measure(tally, program, "check", model, "--ctx", 128)[0]
    # Its weights are quantised, so are its activations: any difference grows to that of their
    # rounding, also between llama.cpp and itself.
    tally.check(got.get("rel_diff", 1) < 1.5 * got.get("own_rel_diff", 0) and
                got["rel_diff_exact"] < 1.5 * got["own_rel_diff"],
                "real model: exact caches are as near as llama.cpp is to itself", str(got))
    ppl = {}
    for name, options in (("full", ["--method", "full"]), ("exact", []),
                          ("unpacked", ["--unpack", "f16"]), ("small", ["--budget", 256])):
        ppl[name] = measure(tally, program, "ppl", model, "--ctx", 1024, "--text", PROSE,
                            *options)[0].get("ppl", 0)
    print("perplexity over 512 of 1024 tokens:", ppl)
    tally.check(1 < ppl["full"] < 30 and all(
        abs(ppl[x] / ppl["full"] - 1) < 0.01 for x in ("exact", "unpacked")),
                "real model: it reads English, and neither budget 0 nor unpacking changes that",
                str(ppl))
    tally.check(ppl["full"] * 0.99 < ppl["small"] < ppl["full"] * 1.25,
                "real model: a quarter of the slots", str(ppl))
    said = run(program, "generate", "--model", model, "--prompt", "The capital of France is",
               "--n", 8, "--budget", 256)
    tally.check(b"Paris" in said.stdout, "real model: it knows Paris", str(said.stdout))


def main():
    program, model = sys.argv[1], (sys.argv[2:] + [""])[0]
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        check_logits(tally, program, folder)
        tiny = os.path.join(folder, "llama.gguf")
        check_ppl(tally, program, tiny)
        check_passkey(tally, program, tiny)
        check_dump(tally, program, tiny, folder)
        check_speed(tally, program, tiny)
        check_generate(tally, program, tiny, folder)
        check_chat(tally, program, tiny, folder)
        check_bad_input(tally, program, folder)
        check_tables(tally, folder)
    if os.path.exists(model):
        check_real(tally, program, model)
    else:
        print("LEFT OUT: the real model: %s is not there; examples/llm/setup.sh gets it" % model)
    tally.done()


if __name__ == "__main__":
    main()
