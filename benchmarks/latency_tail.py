"""Where the slowest tokens come from: the method, or the machine.

    python benchmarks/latency_tail.py novel.txt --threads 1

Decodes tokens one by one in a full window and, after each, does a fixed piece of other work (hashing), which has no
model, no memory to speak of and nothing to wait for. Of both it tells how much longer than the median the slowest
hundredth takes, in time by the clock and in processor time, and how many of the slow ones were interrupted by the
system. About a minute for 2,000 tokens with the default model. Not for Windows, which does not count interruptions.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import time

import numpy as np
import numpy.typing as npt

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens

WORK = bytes(12_000_000)
"""What is hashed."""

SLOW = 1.2
"""Times the median."""


def now() -> tuple[float, float, int]:
    """Seconds by the clock, seconds of processor time, interruptions by the system."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def row(name: str, steps: npt.NDArray[np.float64]) -> list[str]:
    """Of steps [n, 3]: differences of `now()`."""
    clock, cpu, interrupted = steps.T
    slow = clock > SLOW * np.median(clock)
    return [
        name,
        f"{1e3 * np.median(clock):.2f} ms",
        *(f"{np.percentile(each, 99) / np.median(each):.2f}" for each in (clock, cpu)),
        f"{slow.mean():.1%}",
        f"{(interrupted[slow] > 0).mean():.0%}" if slow.any() else "-",
        f"{(interrupted[~slow] > 0).mean():.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=2000, help="how many are decoded")
    parser.add_argument("--n-window", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    with Llama(path, lminf=LMInfConfig(n_window=args.n_window), n_threads=args.threads) as llm:
        prompt = text_tokens(path, args.text, 2 * args.n_window)
        tokens, others = [], []
        begin = now()
        for _ in llm.generate(prompt, max_tokens=args.tokens, stop_at_end=False):
            tokens.append(np.subtract(now(), begin))
            begin = now()
            hashlib.sha256(WORK).digest()
            others.append(np.subtract(now(), begin))
            begin = now()
    titles = ("", "p50", "p99 / p50", "in processor time", f"over {SLOW} p50", "of these interrupted", "of the others")
    print(markdown_table(titles, [row("tokens", np.array(tokens[1:])), row("hashing", np.array(others[1:]))]))


if __name__ == "__main__":
    main()
