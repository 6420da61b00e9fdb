"""Decoding speed at two positions of a stream, and what eviction, sink placement and a rebase cost a single token.

    python benchmarks/latency.py novel.txt

Two contexts, one at position 2,500 and one at 30,000, decode in turns in one process: their ratio does not depend on
what else the machine does. Prints the tables of docs/measurements.md; about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens


class Decoded(NamedTuple):
    """One decoded token: seconds, whether its block began with it, whether it waited for a rebase."""

    seconds: float
    block_start: bool
    rebase: bool


class Stream:
    """A context that reads a text in a circle, in large pieces or token by token."""

    def __init__(self, path: Path, tokens: list[int], cache_type: str, n_rebase: int = 0) -> None:
        self.llm = Llama(
            path,
            lminf=LMInfConfig(),
            cache_type_k=cache_type,
            cache_type_v=cache_type,
            _n_rebase=n_rebase,
        )
        config = self.llm.config
        assert config is not None and config.n_block is not None
        self.n_block = config.n_block
        self._tokens = cycle(tokens)

    def skip_to(self, position: int) -> None:
        """Reads up to a position at full speed."""
        n = position - self.llm.n_past
        if n > 0:
            self.llm.logprobs([next(self._tokens) for _ in range(n)])

    def jump_to(self, position: int) -> None:
        """Goes to a position without reading all the way, then reads on until the window is full again."""
        self.skip_to(64)
        n_window = 2 * self.n_block + 2304
        if not self.llm._context.test_set_position(position - n_window):
            raise SystemExit(f"cannot go to position {position}")
        self.skip_to(position)

    def decode(self, n_tokens: int) -> list[Decoded]:
        """Reads token by token, as generation does."""
        result = []
        n_rebases = self.llm.memory_stats().n_rebases
        for _ in range(n_tokens):
            position = self.llm.n_past
            token = next(self._tokens)
            clock = time.perf_counter()
            self.llm.eval([token])
            seconds = time.perf_counter() - clock
            rebased = self.llm.memory_stats().n_rebases
            result.append(Decoded(seconds, position % self.n_block == 0, rebased > n_rebases))
            n_rebases = rebased
        return result


def seconds(decoded: list[Decoded]) -> npt.NDArray[np.float64]:
    """The times alone."""
    return np.array([d.seconds for d in decoded])


def compare_positions(
    path: Path, tokens: list[int], cache_type: str, near: int, far: int, rounds: int, jump: bool
) -> list[str]:
    """One row: speed at both positions, and the latency of single tokens."""
    streams = [Stream(path, tokens, cache_type) for _ in range(2)]
    streams[0].skip_to(near)
    if jump:
        streams[1].jump_to(far)
    else:
        streams[1].skip_to(far)
    for stream in streams:
        stream.decode(4)  # warm-up
    ratios = []
    all_decoded: list[list[Decoded]] = [[], []]
    for i in range(rounds):
        medians = [0.0, 0.0]
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            decoded = streams[k].decode(32)
            all_decoded[k] += decoded
            medians[k] = float(np.median(seconds(decoded)))
        ratios.append(medians[0] / medians[1])
    times = seconds(all_decoded[1])
    p50 = float(np.median(times))
    placed = seconds([d for d in all_decoded[1] if d.block_start])
    for stream in streams:
        stream.llm.close()
    return [
        cache_type,
        f"{1 / np.median(seconds(all_decoded[0])):.1f}",
        f"{1 / p50:.1f}",
        f"{np.median(ratios):.3f}",
        f"{p50 * 1e3:.1f}",
        f"{np.percentile(times, 99) * 1e3:.1f}",
        f"{times.max() * 1e3:.1f}",
        f"{np.median(placed) / p50:.3f}",
        f"{placed.max() / p50:.2f}",
    ]


def measure_rebase(path: Path, tokens: list[int], cache_type: str, repetitions: int) -> list[str]:
    """One row: the token that waits for a rebase, relative to the median token around it."""
    stream = Stream(path, tokens, cache_type, n_rebase=1)  # as often as the engine allows
    ratios: list[float] = []
    costs: list[float] = []
    # the first rebase, in steps: it tells at which physical position the next ones will come
    limit = 0
    while stream.llm.memory_stats().n_rebases == 0:
        limit = stream.llm.memory_stats().pos_physical
        stream.skip_to(stream.llm.n_past + 64)
    while len(ratios) < repetitions:
        stream.skip_to(stream.llm.n_past + limit - stream.llm.memory_stats().pos_physical - 64)
        decoded = stream.decode(192)
        waited = [d.seconds for d in decoded if d.rebase]
        if waited:
            p50 = float(np.median(seconds([d for d in decoded if not d.rebase])))
            ratios.append(waited[0] / p50)
            costs.append(waited[0] - p50)
    stream.llm.close()
    return [cache_type, f"{np.median(costs) * 1e3:.1f}", f"{np.median(ratios):.2f}", f"{max(ratios):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--near", type=int, default=2500)
    parser.add_argument("--far", type=int, default=30000)
    parser.add_argument("--rounds", type=int, default=20, help="of 32 tokens at each position")
    parser.add_argument("--jump", action="store_true", help="fill the window at the far position only")
    parser.add_argument("--rebases", type=int, default=5)
    parser.add_argument("--cache-types", nargs="+", default=["f16", "q8_0", "q4_0"])
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, 16384)
    speed, rebase = [], []
    for cache_type in args.cache_types:
        speed.append(compare_positions(path, tokens, cache_type, args.near, args.far, args.rounds, args.jump))
        print(speed[-1], flush=True)
    for cache_type in ["f32", *args.cache_types]:
        rebase.append(measure_rebase(path, tokens, cache_type, args.rebases))
        print(rebase[-1], flush=True)

    near, far = f"{args.near:,}", f"{args.far:,}"
    print(
        markdown_table(
            ["cache", f"tokens/s at {near}", f"at {far}", "ratio", "p50, ms", "p99, ms", "max, ms",
             "block start / p50, median", "largest"],
            speed,
        )
    )  # fmt: skip
    print()
    print(markdown_table(["cache", "a rebase costs, ms", "token with rebase / p50, median", "largest"], rebase))


if __name__ == "__main__":
    main()
