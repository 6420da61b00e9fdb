"""What a long pinned prompt costs: memory and speed with thousands of sink tokens.

    python benchmarks/pinned_prompt.py novel.txt --threads 1

A context with `--n-sink` sink tokens and a full window, and one of plain llama.cpp with as many tokens in sight,
decode in turns, `--rounds` times. Prints bytes of keys and values, and the ratio of the times of a token (median,
least, most).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens


def decode(llm: Llama, token: int, n_tokens: int) -> float:
    """Seconds of a token; they are taken back."""
    n_past = llm.n_past
    begin = time.perf_counter()
    for _ in range(n_tokens):
        llm.eval([token])
    seconds = (time.perf_counter() - begin) / n_tokens
    llm.truncate(n_past)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--n-sink", type=int, default=2000)
    parser.add_argument("--n-window", type=int, default=2048)
    parser.add_argument("--cache-types", default="f16,q8_0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode", type=int, default=16, help="tokens of a round")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    n_seen = args.n_sink + args.n_window
    tokens = text_tokens(path, args.text, n_seen + args.n_window)
    rows = []
    for cache_type in args.cache_types.split(","):
        cache = {"cache_type_k": cache_type, "cache_type_v": cache_type, "n_threads": args.threads}
        config = LMInfConfig(n_sink=args.n_sink, n_window=args.n_window)
        with Llama(path, lminf=config, **cache) as pinned, Llama(path, n_ctx=n_seen + 64, **cache) as plain:
            pinned.logprobs(tokens)
            plain.logprobs(tokens[:n_seen])
            ratios = [decode(pinned, 5, args.decode) / decode(plain, 5, args.decode) for _ in range(args.rounds)]
            n_bytes = pinned.memory_stats().kv_bytes
            n_originals = 4 * elements_of_a_key(plain, cache_type) * args.n_sink
            stats = plain.memory_stats()
            n_cells = (n_bytes - n_originals) / stats.kv_bytes * stats.n_cells
            median = f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            rows.append([cache_type, f"{n_bytes / 1e6:.1f}", f"{n_cells / n_seen:.3f}", median])
    print(markdown_table(["cache", "MB with originals", "cells / tokens in sight", "time of a token / plain"], rows))


def elements_of_a_key(plain: Llama, cache_type: str) -> float:
    """Numbers in the keys of a token, all layers together: half of what its keys and values have."""
    per_element = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}[cache_type]
    stats = plain.memory_stats()
    return stats.kv_bytes / stats.n_cells / per_element / 2


if __name__ == "__main__":
    main()
