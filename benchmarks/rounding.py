"""How far log-probabilities move when only the order of sums changes: batch invariance; ours against plain llama.cpp.

    python benchmarks/rounding.py novel.txt

Prints the table of docs/measurements.md; about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dequantize import write_f32_model
from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens

Logprobs = npt.NDArray[np.float32]


def logprobs(path: Path, tokens: list[int], lminf: LMInfConfig | None, n_ubatch: int, cache_type: str) -> Logprobs:
    """Log-probabilities of a text read in micro-batches of one size."""
    with Llama(
        path,
        lminf=lminf,
        n_ctx=None if lminf else len(tokens),
        n_ubatch=n_ubatch,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attn=cache_type != "f32",
    ) as llm:
        return llm.logprobs(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--n-window", type=int, default=1024)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, args.tokens)
    short = tokens[: args.n_window]
    windowed = LMInfConfig(n_window=args.n_window)
    rows: list[list[str]] = []

    def compare(name: str, weights: str, cache_type: str, a: Logprobs, b: Logprobs) -> None:
        difference = np.abs(a - b)
        loss = f"{-a.mean():.4f} / {-b.mean():.4f}"
        rows.append([name, weights, cache_type, f"{difference.max():.1e}", f"{difference.mean():.1e}", loss])
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        f32 = write_f32_model(path, Path(folder, "f32.gguf"))
        for weights, model, cache_type in (("F32", f32, "f32"), ("as distributed", path, "f16")):
            ours = {n: logprobs(model, tokens, windowed, n, cache_type) for n in (512, 64, 1)}
            for n in (64, 1):
                compare(f"micro-batches of 512 and of {n}", weights, cache_type, ours[512], ours[n])
            plain = logprobs(model, short, None, 512, cache_type)
            unmasked = logprobs(model, short, windowed, 512, cache_type)
            compare("ours and plain, nothing masked yet", weights, cache_type, unmasked, plain)
            other = logprobs(model, short, None, 1, cache_type)
            compare("plain llama.cpp, micro-batches of 512 and of 1", weights, cache_type, plain, other)
    print(markdown_table(["compared", "weights", "cache", "largest difference", "mean", "loss"], rows))


if __name__ == "__main__":
    main()
