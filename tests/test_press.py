#!/usr/bin/env python3
"""examples/python/press.py on a small random model with the shape of those of transformers.

    test_press.py [--there]

Needs torch: this Python's, or that of bench/peers.sh; without, it says so and checks nothing.
--there: only whether there is one, as exit code.
"""
import importlib.util
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

PEERS = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")),
                     "balancekv-peers", "venv", "bin", "python")
if not importlib.util.find_spec("torch"):
    if os.path.exists(PEERS) and not sys.executable.startswith(os.path.dirname(PEERS)):
        sys.exit(subprocess.call([PEERS] + sys.argv))
    print("left out: the press (no torch; bench/peers.sh installs one)\n0 passed, 0 failed")
    sys.exit("--there" in sys.argv)
if "--there" in sys.argv:
    sys.exit(0)

import torch
from torch import nn

from bad_config import Tally
from test_python import load

Q_HEADS, KV_HEADS, DIM, HIDDEN, LAYERS, PROMPT = 6, 2, 16, 48, 2, 700
BATCH, NONE = 8, 0xFFFFFFFF


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def angles(positions):
    half = positions[:, None] / 100 ** torch.linspace(0, 1, DIM // 2)
    return torch.cat((half, half), -1)


class Attention(nn.Module):
    """As in LlamaAttention, but the heads come out as they are."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim, self.scaling = layer_idx, DIM, DIM ** -0.5
        self.config = SimpleNamespace(num_attention_heads=Q_HEADS)
        self.q_proj = nn.Linear(HIDDEN, Q_HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None,
                past_key_values=None):
        q, k, v = (projection(hidden_states).unflatten(-1, (-1, DIM)).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        layer = past_key_values.layers[self.layer_idx]
        layer.keys, layer.values = torch.cat((layer.keys, k), 2), torch.cat((layer.values, v), 2)
        n, seen = q.shape[2], layer.keys.shape[2]
        if attention_mask is None:
            attention_mask = torch.full((n, seen), -torch.inf).triu(seen - n + 1)
        k, v = (x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (layer.keys, layer.values))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask,
                                                         scale=self.scaling)
        return out.transpose(1, 2), None


class Model(nn.Module):
    """The layers see the same input and answer side by side, so that each can be checked alone."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for i in range(LAYERS):
            layer = nn.Module()
            layer.self_attn = Attention(i)
            self.model.layers.append(layer)

    def forward(self, x, cache, position):
        turn = angles(position + torch.arange(x.shape[1]))[None]
        return torch.stack([
            layer.self_attn(hidden_states=x, position_embeddings=(turn.cos(), turn.sin()),
                            past_key_values=cache)[0] for layer in self.model.layers])


def new_cache(batch=1):
    empty = torch.zeros(batch, KV_HEADS, 0, DIM)
    return SimpleNamespace(layers=[SimpleNamespace(keys=empty, values=empty)
                                   for _ in range(LAYERS)])


def error(out, exact):
    return float((out - exact).norm() / exact.norm())


def check_compression(tally, press, model):
    x, y = torch.randn(BATCH, PROMPT, HIDDEN) * 3, torch.randn(BATCH, 2, HIDDEN) * 3
    full, small, drawn = new_cache(BATCH), new_cache(BATCH), new_cache(BATCH)
    prompt = model(x, full, 0)
    with press(compression_ratio=0.5)(model):
        tally.check(torch.equal(model(x, small, 0), prompt), "the prompt's own output is exact")
        kept = small.layers[0].keys.shape[2]
        tally.check(PROMPT // 2 - 128 < kept <= PROMPT // 2, "the cache has half the tokens",
                    str(kept))
        inside = model(y[:, :1], small, PROMPT)
    tally.check(small.layers[0].keys.shape[2] == kept + 1, "what follows is not compressed")
    outside = model(y[:, 1:], small, PROMPT + 1)
    exact = model(y, full, PROMPT)
    ours = error(torch.cat((inside, outside), 2), exact)
    with press(compression_ratio=0.5, importance=NONE, rounds=NONE)(model):
        model(x, drawn, 0)
    by_lot = error(model(y, drawn, PROMPT), exact)
    tally.check(0 < ours < 0.65 * by_lot, "the answer is nearer than that of tokens drawn by lot",
                "%s, %s" % (ours, by_lot))

    # Two tokens at once see each other causally.
    for layer in small.layers:
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
    both = model(y, small, PROMPT)
    tally.check(error(both, torch.cat((inside, outside), 2)) < 1e-5, "two tokens, one call")

    weights = small.layers[0].balancekv_log_weight.exp()
    tally.check(weights.min() > 0.999 and abs(weights.sum(-1) / PROMPT - 1).max() < 0.3,
                "the weights stand for the prompt", str(weights.sum(-1)))
    for layer in small.layers:
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        del layer.balancekv_log_weight
    tally.check(error(model(y, small, PROMPT), exact) > ours, "they are worth something")


def check_library(tally, press, model, library):
    """What the model computes from the compressed cache is what bkv_attend() computes."""
    x, y = torch.randn(1, PROMPT, HIDDEN), torch.randn(1, 1, HIDDEN)
    cache, full = new_cache(), new_cache()
    with press(compression_ratio=0.5, window=128)(model):
        model(x, cache, 0)
    out = model(y, cache, PROMPT)
    seen = []
    hooks = [module.q_proj.register_forward_hook(lambda _, __, q: seen.append(q))
             for module in (layer.self_attn for layer in model.model.layers)]
    model(torch.cat((x, y), 1), full, 0)
    for hook in hooks:
        hook.remove()
    turn = angles(torch.arange(PROMPT + 1))[:, None]
    for i, layer in enumerate(full.layers):
        k, v = (t[0].transpose(0, 1).numpy() for t in (layer.keys, layer.values))
        q = rotate(seen[i][0].unflatten(-1, (-1, DIM)), turn.cos(), turn.sin()).numpy()
        stream = library.Cache(Q_HEADS, KV_HEADS, DIM, PROMPT // 2, kv_type="f32", seed=i,
                               window=128)
        stream.prefill(k[:PROMPT], v[:PROMPT], q[:PROMPT])
        # Its last step must find the window's oldest page free, or it would halve once more.
        held = stream.stats()["tokens_held"]
        stream.append(k[PROMPT], v[PROMPT])
        tally.check(stream.stats()["tokens_held"] == held + 1, "no halving between the two")
        wanted = torch.from_numpy(stream.attend(q[PROMPT]))
        tally.check(error(out[i, 0, 0], wanted) < 1e-4, "layer %d: as bkv_attend() has it" % i,
                    str(error(out[i, 0, 0], wanted)))


def check_edges(tally, press, model):
    x, y = torch.randn(1, PROMPT, HIDDEN), torch.randn(1, 1, HIDDEN)
    full, same = new_cache(), new_cache()
    model(x, full, 0)
    with press(compression_ratio=0)(model):
        model(x, same, 0)
    tally.check(torch.equal(model(y, same, PROMPT), model(y, full, PROMPT)), "ratio 0 does nothing")
    for ratio in (1, -0.1):
        try:
            press(compression_ratio=ratio)
            said = ""
        except ValueError as fault:
            said = str(fault)
        tally.check("not in [0, 1)" in said, "a ratio of %s is refused" % ratio, said)
    try:
        with press(compression_ratio=0.9)(model):
            model(x[:, :300], new_cache(), 0)
        said = ""
    except ValueError as fault:
        said = str(fault)
    tally.check("budget is smaller" in said, "too small a budget is refused", said)
    try:
        cached = torch.zeros(1, KV_HEADS, PROMPT, DIM)
        press().compress(nn.Identity(), x, cached, cached, None, {"position_embeddings": None})
        said = ""
    except NotImplementedError as fault:
        said = str(fault)
    tally.check("has neither q_proj" in said, "a layer without q_proj is refused", said)


@torch.no_grad()
def main():
    print("torch %s" % torch.__version__)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        library = load(folder)
        press, model = importlib.import_module("press").BalanceKVPress, Model()
        check_compression(tally, press, model)
        check_library(tally, press, model, library)
        check_edges(tally, press, model)
    tally.done()


if __name__ == "__main__":
    main()
