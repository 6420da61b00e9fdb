"""What a full window costs a decode step: with attention of our own, with llama.cpp's, and at an empty context.

    python benchmarks/decode_step.py novel.txt --threads 1

Three contexts of each cache type decode in turns, `--rounds` times: two with a full window, one of them with
LMINF_ATTENTION=stock, and one at the beginning of a text. Prints medians of the ratios of a round, with the least and
the most.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens


def open_with(attention: str, path: Path, n_window: int, **options: Any) -> Llama:
    os.environ["LMINF_ATTENTION"] = attention
    try:
        return Llama(path, lminf=LMInfConfig(n_window=n_window), **options)
    finally:
        del os.environ["LMINF_ATTENTION"]


def decode(llm: Llama, n_tokens: int) -> float:
    """Seconds of processor time of a token; they are taken back."""
    n_past = llm.n_past
    begin = time.process_time()
    for _ in range(n_tokens):
        llm.eval([5])
    seconds = (time.process_time() - begin) / n_tokens
    llm.truncate(n_past)
    return seconds


def ratio(a: list[float], b: list[float]) -> str:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--n-window", type=int, default=2048)
    parser.add_argument("--cache-types", default="f16,q8_0,q4_0,q8_0/q4_0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode", type=int, default=8, help="tokens of a round")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, args.n_window + 100)
    rows = []
    for types in args.cache_types.split(","):
        type_k, type_v = (types.split("/") * 2)[:2]
        options = {"cache_type_k": type_k, "cache_type_v": type_v, "n_threads": args.threads}
        with (
            open_with("lminf", path, args.n_window, **options) as ours,
            open_with("stock", path, args.n_window, **options) as stock,
            open_with("lminf", path, args.n_window, **options) as empty,
        ):
            for llm in (ours, stock):
                llm.logprobs(tokens)
            empty.eval(tokens[:8])
            times: list[list[float]] = [[], [], []]
            for _ in range(args.rounds):
                for llm, seconds in zip((ours, stock, empty), times, strict=True):
                    seconds.append(decode(llm, args.decode))
        rows.append([types, ratio(times[0], times[2]), ratio(times[1], times[2]), ratio(times[1], times[0])])
    print(
        markdown_table(["keys, values", "full / empty, ours", "full / empty, llama.cpp's", "llama.cpp's / ours"], rows)
    )


if __name__ == "__main__":
    main()
