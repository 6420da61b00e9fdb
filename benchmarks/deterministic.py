"""Which types of weights give a token the same bits alone and among others, and what `deterministic=True` costs.

    python benchmarks/deterministic.py types
    python benchmarks/deterministic.py speed --types q4_1 q8_0 f16 --models gemma.gguf

Models of each type are made of the default model. `types` tries products out on this machine (a few minutes); `speed`
reads a prompt and writes with and without the option in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median

from dequantize import write_f32_model
from lminf_edge import Llama, LMInfConfig
from lminf_edge._library import _core
from quantize import FILE_TYPES, quantize_model
from tables import markdown_table, open_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("types", "speed"))
    parser.add_argument("--types", nargs="*", choices=FILE_TYPES, default=list(FILE_TYPES), help="of weights")
    parser.add_argument("--models", nargs="*", default=[], help="further GGUF files, as they are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        models = chain(models_of_types(Path(folder), args.types), map(open_model_path, args.models))
        if args.what == "types":
            print_types(models)
        else:
            print_speed(models, args.threads, args.rounds)


def models_of_types(folder: Path, types: list[str]) -> Iterator[Path]:
    """The default model with weights of each type, in a file named after it that is gone when the next one is there."""
    f32 = write_f32_model(open_model_path(None), folder / "source.gguf")
    for name in types:
        path = quantize_model(f32, folder / f"{name}.gguf", name)
        yield path
        path.unlink()


def print_types(models: Iterable[Path]) -> None:
    rows: dict[str, list[str]] = {}
    for path in models:
        alone = _core.Model(str(path)).weights()
        together = _core.Model(str(path), deterministic=True).weights(deterministic=True)
        with_option = {name: same_bits for name, _, _, same_bits in together}
        for name, buffer_type, _, same_bits in alone:
            rows[name] = [name, buffer_type, yes_or_no(same_bits), yes_or_no(with_option[name])]
    print(markdown_table(("weights", "kept in", "same bits", "deterministic"), [rows[name] for name in sorted(rows)]))


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def print_speed(models: Iterable[Path], n_threads: int, n_rounds: int) -> None:
    rows = []
    for path in models:
        prompts: dict[bool, list[float]] = {False: [], True: []}
        steps: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(n_rounds):
            for deterministic in (False, True):
                prompt, step = seconds(path, n_threads, deterministic)
                prompts[deterministic].append(prompt)
                steps[deterministic].append(step)
        price = [f"{median(took[True]) / median(took[False]):.2f}" for took in (prompts, steps)]
        rows.append([path.stem, *price])
        print(*rows[-1], flush=True)
    print(markdown_table(("weights", "a prompt takes, times", "a token takes, times"), rows))


def seconds(
    path: Path, n_threads: int, deterministic: bool, n_prompt: int = 512, n_drawn: int = 48
) -> tuple[float, float]:
    """Of a token of a prompt, and of a drawn one, medians of the micro-batches and of the tokens."""
    with Llama(path, lminf=LMInfConfig(n_window=1024), n_threads=n_threads, deterministic=deterministic, seed=0) as llm:
        tokens = [1 + i % 1000 for i in range(n_prompt)]
        pieces = []
        for start in range(0, n_prompt, 128):
            begin = time.perf_counter()
            llm.logprobs(tokens[start : start + 128])
            pieces.append((time.perf_counter() - begin) / 128)
        drawn = []
        begin = time.perf_counter()
        for _ in llm.generate(max_tokens=n_drawn, temperature=0, stop_at_end=False):
            drawn.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return median(pieces), median(drawn)


if __name__ == "__main__":
    main()
