#!/usr/bin/env python3
"""Joins recordings of one layer into one long stream, as if their texts stood one behind the other.

    join.py --theta 100000 OUT TRACE TRACE..

Keys and queries are recorded after RoPE, each text from position 0 on; here those of the second and
later ones are turned on to the place where they now stand, so that nothing is near but what is.
Elements 2i and 2i + 1 are a pair, as in llama.cpp's llama models; --halves: i and i + d / 2 are.
"""
import argparse
import os

import numpy as np


def turned(x, start, theta, halves):
    """x [n, heads, d] as if its first token stood `start` later."""
    d = x.shape[2]
    angle = start * theta ** (-np.arange(0, d, 2) / d)
    first, second = (slice(0, d // 2), slice(d // 2, d)) if halves else (slice(0, d, 2),
                                                                         slice(1, d, 2))
    y = np.empty(x.shape, np.float64)
    y[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    y[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return y.astype(x.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--theta", type=float, required=True, help="rope_theta of the model")
    parser.add_argument("--halves", action="store_true", help="pairs are i and i + d / 2")
    parser.add_argument("out")
    parser.add_argument("traces", nargs="+")
    args = parser.parse_args()
    os.makedirs(args.out)
    for name in "qkv":
        parts, start = [], 0
        for trace in args.traces:
            x = np.load(os.path.join(trace, name + ".npy"))
            parts.append(x if name == "v" else turned(x, start, args.theta, args.halves))
            start += len(x)
        np.save(os.path.join(args.out, name + ".npy"), np.concatenate(parts))


if __name__ == "__main__":
    main()
