"""What recalling middle tokens costs when decoding: speed with and without, in turns, on one stored text.

    python benchmarks/recall.py novel.txt

Prints a row of docs/results.md; with the default model and 32,768 tokens about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from lminf_edge import Llama, LMInfConfig, MiddleConfig
from tables import markdown_table, open_model_path, text_tokens


def decode_seconds(llm: Llama, n_tokens: int, recall: bool) -> float:
    """Median time of a token; what was decoded is taken back."""
    n_past = llm.n_past
    times = []
    clock = time.perf_counter()
    for _ in llm.generate(max_tokens=n_tokens, temperature=0, stop_at_end=False, recall=recall):
        now = time.perf_counter()
        times.append(now - clock)
        clock = now
    llm.truncate(n_past - 1)
    llm.eval([llm.tokenize(" the", add_bos=False)[0]])
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file; read in a circle if it is too short")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=32768, help="stored tokens")
    parser.add_argument("--n-window", type=int, default=1024)
    parser.add_argument("--cache-type", default="q8_0")
    parser.add_argument("--store-types", nargs="+", default=["q8_0"])
    parser.add_argument("--rounds", type=int, default=6, help="of 16 tokens with and without")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, min(args.tokens, 65536))
    rows = []
    for store_type in args.store_types:
        middle = MiddleConfig(cache_type=store_type, max_tokens=args.tokens + 1024)
        with Llama(
            path,
            lminf=LMInfConfig(n_window=args.n_window, middle=middle),
            n_threads=args.threads,
            cache_type_k=args.cache_type,
            cache_type_v=args.cache_type,
        ) as llm:
            while llm.n_past < args.tokens:
                list(llm.generate(tokens[: args.tokens - llm.n_past], max_tokens=0))
            before = llm.memory_stats().scan_seconds or 0.0
            without, recalling = [], []
            for _ in range(args.rounds):
                without.append(decode_seconds(llm, 16, recall=False))
                recalling.append(decode_seconds(llm, 16, recall=True))
            stats = llm.memory_stats()
        ratios = np.array(without) / np.array(recalling)
        rows.append(
            [
                store_type,
                f"{args.tokens:,}",
                f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})",
                f"{1 / np.median(recalling):.1f}",
                f"{1 / np.median(without):.1f}",
                f"{((stats.scan_seconds or 0.0) - before) / (16 * args.rounds) * 1e3:.1f}",
                f"{(stats.store_bytes or 0) / 1e6:.0f} MB",
            ]
        )
        print(rows[-1], flush=True)
    header = ["store", "tokens", "speed with / without", "tokens/s with", "without", "scan, ms a token", "store"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
