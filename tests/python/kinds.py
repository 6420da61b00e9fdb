"""How closely the engine follows the reference, for each kind of model: docs/kinds.md.

`python tests/python/kinds.py` measures and writes the page. The figures are this machine's; test_families.py holds the
bounds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lminf_edge import Llama, LMInfConfig
from parity import expected, pieces, stream_of
from reference import FULL_ATTENTION, Attention
from tiny_families import FAMILIES, KINDS
from tiny_models import TinyModel, random_tokens, write_tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kinds.md"
SEMANTICS = Attention(n_sink=4, n_window=24, n_clamp=20, n_block=5)
CACHE_TYPES = ("f16", "q8_0", "q4_0")
N_ROLLBACK = 8

INTRODUCTION = f"""\
# Kinds of models

Tiny models with random weights, one or more of each kind, against a float64 reference written from the formulas. A
stream of 20 windows with {SEMANTICS}, written by `python tests/python/kinds.py`;
`tests/python/test_families.py` holds the bounds, also for other semantics, sequences, rebases and far positions.

- *largest difference*: of any logit to the reference's, F32 weights and cache, in pieces and micro-batches of 7
  (limit 1e-3);
- *batches*: largest difference between micro-batches of 1 and of 64;
- *removed tail*: the last {N_ROLLBACK} tokens are taken back and others follow: largest difference to never having
  had them;
- *cache types*: median over the tokens of the logits' root mean square error, as a multiple of plain llama.cpp's on
  short texts with the same cache type and flash attention. Mixtures of experts are sent elsewhere by rounding and
  vary more.

"""


def open_model(model: TinyModel, attention: Attention, n_ubatch: int, cache_type: str = "f32") -> Llama:
    config = None
    if attention != FULL_ATTENTION:
        config = LMInfConfig(
            n_sink=attention.n_sink,
            n_window=attention.n_window,
            n_clamp=attention.n_clamp,
            n_block=attention.n_block,
            n_rollback=N_ROLLBACK,
        )
    return Llama(
        model.path,
        lminf=config,
        n_ubatch=n_ubatch,
        n_threads=1,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attn=cache_type != "f32",
    )


def largest_difference(model: TinyModel, tokens: tuple[int, ...]) -> float:
    with open_model(model, SEMANTICS, 7) as llm:
        logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
    return float(np.abs(logits - expected(model, SEMANTICS, tokens)).max())


def between_batches(model: TinyModel, tokens: tuple[int, ...]) -> float:
    with open_model(model, SEMANTICS, 1) as one, open_model(model, SEMANTICS, 64) as many:
        return float(np.abs(one.eval(tokens) - many.eval(tokens)).max())


def after_removal(model: TinyModel, tokens: tuple[int, ...]) -> str:
    tail = tuple(random_tokens(60, seed=88))
    n_kept = len(tokens) - N_ROLLBACK
    with open_model(model, SEMANTICS, 16) as llm:
        llm.eval(tokens)
        if not llm._context.seq_rm(0, n_kept):
            return "refused"
        logits = llm.eval(tail)
    return f"{np.abs(logits - expected(model, SEMANTICS, tokens[:n_kept] + tail)[n_kept:]).max():.1e}"


def rounding(model: TinyModel, tokens: tuple[int, ...], cache_type: str) -> str:
    def error(attention: Attention, texts: list[tuple[int, ...]]) -> float:
        errors = []
        with open_model(model, attention, 16, cache_type) as llm:
            for text in texts:
                llm.reset()
                errors.append(llm.eval(text) - expected(model, attention, text))
        return float(np.median(np.sqrt(np.mean(np.concatenate(errors) ** 2, axis=1))))

    short_texts = [tokens[start : start + 60] for start in range(0, len(tokens), 60)]
    return f"{error(SEMANTICS, [tokens]) / error(FULL_ATTENTION, short_texts):.2f}"


def main() -> None:
    header = ["kind", "model", "largest difference", "batches", "removed tail", *CACHE_TYPES]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    tokens = stream_of(SEMANTICS)
    with tempfile.TemporaryDirectory() as folder:
        for kind, names in KINDS.items():
            for name in names:
                model = write_tiny_model(Path(folder) / f"{name}.gguf", FAMILIES[name], seed=1)
                row = [
                    kind,
                    name,
                    f"{largest_difference(model, tokens):.1e}",
                    f"{between_batches(model, tokens):.1e}",
                    after_removal(model, tokens),
                    *(rounding(model, tokens, cache_type) for cache_type in CACHE_TYPES),
                ]
                print(row, flush=True)
                lines.append("| " + " | ".join(row) + " |")
    PAGE.write_text(INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
