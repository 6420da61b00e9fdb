"""What Python adds to a token: the step of `Llama.generate` less what happens in the extension.

    python benchmarks/overhead.py

The calls that compute are `Context.decode` and `Sampler.sample`. Prints, in microseconds, the step of `generate`, the
part of it inside these calls, and the rest, which is Python's: medians over the tokens, and of the rest the 90th
percentile, too. The same for what a completion adds to that. Nothing of the rest depends on the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lminf_edge import Llama, LMInfConfig
from lminf_edge._library import _core
from lminf_edge.sampling import SamplingOptions
from tables import markdown_table, open_model_path

inside = 0.0
"""Seconds in the extension so far."""


def timed(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global inside
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        inside += time.perf_counter() - begin
        return result

    return wrapper


def microseconds(steps: Iterable[Any]) -> list[tuple[float, float]]:
    """Of each step but the first: how long it took, and how much of that was in the extension."""
    result = []
    clock, before = time.perf_counter(), inside
    for _ in steps:
        result.append((1e6 * (time.perf_counter() - clock), 1e6 * (inside - before)))
        clock, before = time.perf_counter(), inside
    return result[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    _core.Context.decode = timed(_core.Context.decode)  # type: ignore[method-assign]
    _core.Sampler.sample = timed(_core.Sampler.sample)  # type: ignore[method-assign]

    path = open_model_path(args.model)
    with Llama(path, lminf=LMInfConfig(), n_threads=args.threads, seed=0) as llm:

        def generate() -> Iterator[Any]:
            llm.reset()
            return llm.generate("Once upon a time", max_tokens=args.tokens, stop_at_end=False)

        def complete() -> Iterator[Any]:
            return llm.create_completion("Once upon a time", max_tokens=args.tokens, stream=True)

        def calls() -> Iterator[None]:
            """The same calls, with nothing around them."""
            llm.reset()
            context, sampler, token = llm._context, SamplingOptions().sampler(llm._model, 0), 5
            for _ in range(args.tokens):
                context.decode(np.array([token], np.int32))
                token, _, _ = sampler.sample(context, 0)
                yield

        measured: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            for name, steps in (("calls alone", calls), ("generate", generate), ("create_completion", complete)):
                measured.setdefault(name, []).extend(microseconds(steps()))
    rows = []
    for name, steps_of in measured.items():
        step, within = np.array(steps_of).T
        rest = step - within
        figures = np.median(step), np.median(within), np.median(rest), np.percentile(rest, 90)
        rows.append([name, *(f"{value:,.0f}" for value in figures), f"{np.median(rest / within):.2%}"])
    header = ["step of", "whole", "in the extension", "Python", "90th percentile", "Python / extension"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
