"""Peers that need Python: torch.nn.functional.scaled_dot_product_attention, and the reference of
BalanceKV in PyTorch if the folder of its balanced_walk.py is given. One thread. bench/speed starts
this file and gives it its turn in every round: a command a line on stdin, an answer on stdout.

    open NAME WORK Q_HEADS KV_HEADS DIM N QUERIES COPIES FILE   FILE: k, v, q as raw f32
    run NAME TIMES        answers the nanoseconds of that many calls
    result NAME FILE      writes the last output as raw f32
    close NAME
"""
import os
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.set_grad_enabled(False)
TYPES = {"torch_sdpa_f32": torch.float32, "torch_sdpa_bf16": torch.bfloat16}


def read(path, shapes):
    data = torch.from_file(path, size=os.path.getsize(path) // 4, dtype=torch.float32)
    parts, at = [], 0
    for shape in shapes:
        size = 1
        for n in shape:
            size *= n
        parts.append(data[at:at + size].clone().view(shape))
        at += size
    return parts


class Attention:
    """[copies] of K and V by head; the faster of enable_gqa and heads repeated beforehand."""

    def __init__(self, name, q_heads, kv_heads, dim, n, queries, copies, path):
        k, v, q = read(path, ((n, kv_heads, dim), (n, kv_heads, dim), (queries, q_heads, dim)))
        kind = TYPES[name]
        self.q = q.transpose(0, 1).unsqueeze(0).to(kind).contiguous()
        self.options = {}
        if queries == n:
            self.options["is_causal"] = True
        elif queries > 1:
            self.options["attn_mask"] = torch.ones(queries, n, dtype=torch.bool).tril(n - queries)
        k, v = (x.transpose(0, 1).unsqueeze(0).to(kind).contiguous() for x in (k, v))
        group, times = q_heads // kv_heads, []
        variants = [(k, v, {"enable_gqa": True})]
        if group > 1:
            variants.append((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), {}))
        for a, b, extra in variants:
            self.k, self.v, self.extra, self.at = [a], [b], extra, 0
            self.run(1)
            times.append(min(self.run(1) for _ in range(3)))
        a, b, self.extra = variants[times.index(min(times))]
        self.k = [a.clone() for _ in range(copies)]
        self.v = [b.clone() for _ in range(copies)]

    def run(self, times):
        start = time.perf_counter_ns()
        for _ in range(times):
            self.out = F.scaled_dot_product_attention(
                self.q, self.k[self.at], self.v[self.at], **self.options, **self.extra)
            self.at = (self.at + 1) % len(self.k)
        return time.perf_counter_ns() - start

    def result(self):
        return self.out[0].transpose(0, 1).float().contiguous()


class Walk:
    """The reference halves every block of 128 tokens of all heads once. The result is the number of
    distinct tokens it keeps, head by head: half of them."""

    def __init__(self, name, q_heads, kv_heads, dim, n, queries, copies, path):
        self.k = torch.randn(1, kv_heads, n, dim)
        self.v = torch.randn(1, kv_heads, n, dim)
        self.calls = 0

    def run(self, times):
        from balanced_walk import balanced_walk
        start = time.perf_counter_ns()
        for _ in range(times):
            self.calls += 1
            rng = torch.Generator().manual_seed(self.calls)
            self.kept = balanced_walk(self.k, rng, 4.0, 1.0, 0.0, 1, 128, value=self.v)[0]
        return time.perf_counter_ns() - start

    def result(self):
        return torch.tensor([float(len(set(head.tolist()))) for head in self.kept[0]])


def main():
    reference = sys.argv[1] if len(sys.argv) > 1 else None
    if reference:
        sys.path.insert(0, reference)
    print("torch", torch.__version__, flush=True)
    peers = {}
    for line in sys.stdin:
        verb, name, *rest = line.split()
        answer = "ok"
        if verb == "open":
            numbers = [int(x) for x in rest[1:7]]
            kind = Walk if rest[0] == "halve" else Attention
            peers[name] = kind(name, *numbers, rest[7] if len(rest) > 7 else None)
        elif verb == "run":
            answer = peers[name].run(int(rest[0]))
        elif verb == "result":
            with open(rest[0], "wb") as f:
                f.write(peers[name].result().numpy().tobytes())
        elif verb == "close":
            del peers[name]
        print(answer, flush=True)


if __name__ == "__main__":
    main()
