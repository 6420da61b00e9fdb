"""What `deterministic=True` costs, for weights of several types.

    python benchmarks/deterministic.py --types q4_1 q8_0 f16 --models gemma.gguf

Models of these types are made of the default model. Each reads a prompt and writes, with and without the option in
turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

from dequantize import write_f32_model
from lminf_edge import Llama, LMInfConfig
from quantize import FILE_TYPES, quantize_model
from tables import markdown_table, open_model_path

N_PIECE = 128
"""Tokens of the prompt that are timed together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="*", choices=FILE_TYPES, default=["q4_1", "q8_0", "f16"], help="of weights")
    parser.add_argument("--models", nargs="*", default=[], help="further GGUF files, as they are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in chain(models_of_types(Path(folder), args.types), map(open_model_path, args.models)):
            rows.append([path.stem, *prices(path, args.threads, args.rounds)])
            print(*rows[-1], flush=True)
    print(markdown_table(("weights", "a prompt", "a written token"), rows))


def models_of_types(folder: Path, types: list[str]) -> Iterator[Path]:
    """The default model with weights of each type, in a file named after it that is gone when the next one is there."""
    f32 = write_f32_model(open_model_path(None), folder / "source.gguf")
    for name in types:
        path = quantize_model(f32, folder / f"{name}.gguf", name)
        yield path
        path.unlink()


def prices(path: Path, n_threads: int, n_rounds: int) -> list[str]:
    """Times of a token of a prompt, and of a written one, with the option, as multiples of those without it."""
    took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(n_rounds):
        for deterministic in took:
            took[deterministic].append(seconds(path, n_threads, deterministic))
    prompts, steps = ([median(times[i] for times in took[on]) for on in took] for i in range(2))
    return [f"{with_option / without:.2f}" for without, with_option in (prompts, steps)]


def seconds(path: Path, n_threads: int, deterministic: bool) -> tuple[float, float]:
    """Of a token of a prompt, and of a written one: medians of the pieces and of the tokens."""
    config = LMInfConfig(n_window=1024)
    with Llama(path, lminf=config, n_threads=n_threads, deterministic=deterministic, seed=0) as llm:
        pieces, written = [], []
        for start in range(0, 4 * N_PIECE, N_PIECE):
            begin = time.perf_counter()
            llm.logprobs([1 + i for i in range(start, start + N_PIECE)])
            pieces.append((time.perf_counter() - begin) / N_PIECE)
        begin = time.perf_counter()
        for _ in llm.generate(max_tokens=48, temperature=0, stop_at_end=False):
            written.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return median(pieces), median(written)


if __name__ == "__main__":
    main()
