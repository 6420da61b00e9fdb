"""What quantised keys and quantised values cost, apart.

    python benchmarks/cache_types.py novel.txt --threads 1

Loss of the same tokens with each pair of types, against f16; about ten minutes of one core with the default model.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens

PAIRS = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q4_0", "f16"), ("f16", "q4_0"), ("q8_0", "q4_0"))
"""Types of keys and values; the first pair is what the others are compared with."""

N_BLOCK = 64
"""Neighbouring tokens depend on each other: the interval is that of the means of so many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=6144, help="how many are read")
    parser.add_argument("--skip", type=int, default=4096, help="how many of them are not counted")
    parser.add_argument("--n-window", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, args.tokens + 1)
    rows: list[list[str]] = []
    measured: list[npt.NDArray[np.float32]] = []
    for k, v in PAIRS:
        with Llama(
            path,
            lminf=LMInfConfig(n_window=args.n_window),
            n_threads=args.threads,
            cache_type_k=k,
            cache_type_v=v,
        ) as llm:
            measured.append(-llm.logprobs(tokens)[args.skip :])
            n_bytes = llm.memory_stats().kv_bytes
        reference, losses = measured[0], measured[-1]
        means = (losses - reference)[: len(losses) // N_BLOCK * N_BLOCK].reshape(-1, N_BLOCK).mean(axis=1)
        half = 1.96 * means.std(ddof=1) / len(means) ** 0.5
        rows.append(
            [
                k,
                v,
                f"{losses.mean():.4f}",
                f"{means.mean():.4f} ± {half:.4f}",
                f"{100 * (losses.mean() / reference.mean() - 1):.2f} %",
                f"{n_bytes / 1e6:.1f} MB",
            ]
        )
        print(*rows[-1], flush=True)
    print(markdown_table(("keys", "values", "loss", "difference", "relative", "keys and values"), rows))


if __name__ == "__main__":
    main()
