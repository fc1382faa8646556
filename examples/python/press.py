"""A press, as NVIDIA's kvpress calls what compresses the cache of a transformers model after the
prompt; to measure balancekv.h with the tasks and leaderboards made for presses. Needs torch, on the
CPU; kvpress itself is not needed.

    press = BalanceKVPress(compression_ratio=0.75)
    with press(model):
        model(prompt, past_key_values=cache)      # compresses the cache of every layer
    model(question, past_key_values=cache, position_ids=..)     # goes on from the compressed one

Not what the library is for: here the whole prompt is in memory before it is compressed, and the
attention afterwards is the model's own. What is the same: which tokens stay, their weights, and
their values, which halvings have moved (docs/method.md). Weights enter the model's attention as
log(weight), added to the logits: numerator and denominator.
"""
import contextlib

import numpy as np
import torch

import balancekv

_LOG_WEIGHT = "balancekv_log_weight"  # of a layer of the cache: [batch, n_kv_heads, n_kept]


class BalanceKVPress:
    """Further arguments are fields of bkv_config, such as window=256 or importance=.."""

    def __init__(self, compression_ratio=0.5, **fields):
        if not 0 <= compression_ratio < 1:
            raise ValueError("compression_ratio: %s is not in [0, 1)" % compression_ratio)
        self.compression_ratio, self.fields = compression_ratio, fields

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """Keys and values of the tokens that stay, [batch, n_kv_heads, n_kept, head_dim], in the
        order of Cache.rows(); no attention asks for another, as keys carry their positions."""
        del attentions  # never needed
        if self.compression_ratio == 0:
            return keys, values
        n = keys.shape[2]
        if n != hidden_states.shape[1]:
            raise ValueError("only whole prompts are compressed: %d tokens came, %d are cached"
                             % (hidden_states.shape[1], n))
        queries = _queries(module, hidden_states, kwargs["position_embeddings"])
        budget = int(n * (1 - self.compression_ratio))
        kept = [self._stream(module, *sample, budget) for sample in zip(keys, values, queries)]
        kept_keys, kept_values, log_weights = (torch.from_numpy(np.stack(x)).to(keys)
                                               for x in zip(*kept))
        setattr(kwargs["past_key_values"].layers[module.layer_idx], _LOG_WEIGHT, log_weights)
        return kept_keys, kept_values

    def _stream(self, module, keys, values, queries, budget):
        """Keys, values and log weights, [n_kv_heads, n_kept, ..], that a stream of one sample holds
        at its end."""
        keys, values, queries = (x.detach().float().transpose(0, 1).cpu().numpy()
                                 for x in (keys, values, queries))
        fields = {"kv_type": "f32", "seed": module.layer_idx, "value_dim": values.shape[2],
                  **self.fields}
        if getattr(module, "scaling", None):
            fields["scale"] = module.scaling
        cache = balancekv.Cache(queries.shape[1], keys.shape[1], keys.shape[2], budget, **fields)
        cache.prefill(keys, values, queries)
        return [np.stack(x) for x in zip(*map(cache.rows, range(keys.shape[1])))]

    def forward_hook(self, module, args, kwargs, output):
        """After an attention layer has seen the prompt: replaces what its cache holds."""
        del args
        hidden_states = kwargs["hidden_states"]
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if layer.keys.shape[2] == hidden_states.shape[1]:  # nothing was cached before
            layer.keys, layer.values = self.compress(module, hidden_states, layer.keys,
                                                     layer.values, None, kwargs)
        return output

    @contextlib.contextmanager
    def __call__(self, model):
        body = getattr(model.model, "language_model", model.model)
        modules = [layer.self_attn for layer in body.layers
                   if not getattr(layer.self_attn, "is_sliding", False)]
        for module in modules:
            # Stays after the `with`: it acts on nothing but compressed caches.
            if not getattr(module, "balancekv_hooked", False):
                module.register_forward_pre_hook(_add_weights, with_kwargs=True)
                module.balancekv_hooked = True
        hooks = [module.register_forward_hook(self.forward_hook, with_kwargs=True)
                 for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _queries(module, hidden_states, position_embeddings):
    """[batch, n_q_heads, n_tokens, head_dim] after RoPE, as the layer computes them itself."""
    if hasattr(module, "q_proj"):
        q = module.q_proj(hidden_states)
    elif hasattr(module, "qkv_proj"):
        q = module.qkv_proj(hidden_states)
        q = q[..., :module.config.num_attention_heads * module.head_dim]
    else:
        raise NotImplementedError("%s has neither q_proj nor qkv_proj" % type(module).__name__)
    q = q.unflatten(-1, (-1, module.head_dim))
    if hasattr(module, "q_norm"):
        q = module.q_norm(q)
    cos, sin = (x.unsqueeze(2) for x in position_embeddings)
    first, second = q.chunk(2, -1)
    return (q * cos + torch.cat((-second, first), -1) * sin).transpose(1, 2)


def _add_weights(module, args, kwargs):
    """Before attention over a compressed cache: a mask of the log weights, causal at its end."""
    cache = kwargs.get("past_key_values")
    layers = getattr(cache, "layers", [])
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    log_weight = getattr(layer, _LOG_WEIGHT, None)
    past = layer.keys.shape[2] if log_weight is not None else 0
    if past == 0:  # never compressed, or emptied since
        return None
    n = kwargs["hidden_states"].shape[1]
    batch, heads, kept = log_weight.shape
    group = module.config.num_attention_heads // heads
    mask = log_weight.new_zeros(batch, heads * group, n, past + n)
    mask[..., :kept] = log_weight.repeat_interleave(group, 1)[:, :, None]
    mask[..., past:] = torch.full_like(mask[..., past:], torch.finfo(mask.dtype).min).triu(1)
    return args, {**kwargs, "attention_mask": mask}
