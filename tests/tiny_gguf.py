"""Writes tiny models of random weights as GGUF files: all that bkv-llm and llama.cpp want of one.

Bytes are the tokens, so that any text can be fed; each architecture has what makes it special.
"""
import random
import struct

U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokens():
    """The 256 characters by which GPT-2 vocabularies write the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """Type and bytes of a value: int, float, str, a list of these, or signed ints as bytes."""
    if isinstance(x, bytes):
        return ARRAY, struct.pack("<IQ", I32, len(x) // 4) + x
    if isinstance(x, list):
        kinds = [value(item) for item in x]
        return ARRAY, struct.pack("<IQ", kinds[0][0], len(x)) + b"".join(b for _, b in kinds)
    if isinstance(x, str):
        return STRING, string(x)
    if isinstance(x, float):
        return F32, struct.pack("<f", x)
    return U32, struct.pack("<I", x)


def write(path, keys, tensors):
    """tensors: {name: (shape, fastest axis first, list of floats)}"""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for name, x in keys.items():
        kind, data = value(x)
        out += string(name) + struct.pack("<I", kind) + data
    offset, blobs = 0, []
    for name, (shape, floats) in tensors.items():
        out += string(name) + struct.pack("<I%dQ" % len(shape), len(shape), *shape)
        out += struct.pack("<IQ", 0, offset)  # f32
        blob = struct.pack("<%df" % len(floats), *floats)
        blob += bytes(-len(blob) % 32)
        offset += len(blob)
        blobs.append(blob)
    out += bytes(-len(out) % 32) + b"".join(blobs)
    with open(path, "wb") as f:
        f.write(out)


def model(arch="llama", layers=2, embd=64, q_heads=4, kv_heads=2, dim=16, ff=96, trained=2048,
          seed=1):
    """Keys and tensors of a model, to be changed and written."""
    draw = random.Random(seed)
    tokens = byte_tokens() + SPECIAL
    keys = {
        "general.architecture": arch,
        arch + ".block_count": layers,
        arch + ".context_length": trained,
        arch + ".embedding_length": embd,
        arch + ".feed_forward_length": ff,
        arch + ".attention.head_count": q_heads,
        arch + ".attention.head_count_kv": kv_heads,
        arch + ".attention.layer_norm_rms_epsilon": 1e-5,
        arch + ".attention.key_length": dim,
        arch + ".attention.value_length": dim,
        arch + ".rope.dimension_count": dim,
        arch + ".rope.freq_base": 10000.0,
        arch + ".vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": struct.pack("<%di" % len(tokens),
                                                 *[1] * 256, *[3] * len(SPECIAL)),
        "tokenizer.ggml.merges": ["\u0120 \u0120"],  # never used: the result is no token
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": CHAT,
    }
    tensors = {}

    def matrix(name, n_in, n_out, gain=1.0):
        tensors[name + ".weight"] = ((n_in, n_out), [draw.gauss(0, gain * n_in ** -0.5)
                                                     for _ in range(n_in * n_out)])

    def vector(name, n, mean):
        tensors[name] = ((n,), [mean + draw.gauss(0, 0.2) for _ in range(n)])

    matrix("token_embd", embd, len(tokens), embd ** 0.5)
    vector("output_norm.weight", embd, 1)
    if arch == "qwen2":  # the others use the embedding for the output
        matrix("output", embd, len(tokens), 3)
    for i in range(layers):
        block = "blk.%d." % i
        vector(block + "attn_norm.weight", embd, 1)
        vector(block + "ffn_norm.weight", embd, 1)
        for name, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads)):
            matrix(block + "attn_" + name, embd, heads * dim, 2)
            if arch == "qwen2":
                vector(block + "attn_%s.bias" % name, heads * dim, 0)
            if arch == "qwen3" and name != "v":
                vector(block + "attn_%s_norm.weight" % name, dim, 2)
        matrix(block + "attn_output", q_heads * dim, embd)
        matrix(block + "ffn_gate", embd, ff)
        matrix(block + "ffn_up", embd, ff)
        matrix(block + "ffn_down", ff, embd)
    return keys, tensors
