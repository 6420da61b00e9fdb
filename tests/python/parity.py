"""What tests of parity share: texts, the reference's logits for them, and the comparison."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reference import Attention, FloatArray, TokenStream
from tiny_models import TinyModel, random_tokens

if TYPE_CHECKING:
    from lminf_edge import Llama

TOLERANCE = 1e-3
"""Largest logit difference allowed with F32 weights and an F32 cache. A wrong mask, clamp or block moves the logits of
every position by more than ten times this (test_reference.py)."""

FLASH_TOLERANCE = 2e-2
"""The same with flash attention, for which llama.cpp rounds an F32 cache to F16."""

WINDOWS_PER_STREAM = 20


def stream_of(attention: Attention) -> tuple[int, ...]:
    """Random tokens, 20 windows of them and never fewer than 200."""
    assert attention.n_window is not None
    return tuple(random_tokens(max(200, WINDOWS_PER_STREAM * attention.n_window), seed=21))


@cache
def expected(model: TinyModel, attention: Attention, tokens: tuple[int, ...]) -> FloatArray:
    """The reference's logits for a text from its beginning."""
    return TokenStream(model.transformer, attention).eval(tokens)


def pieces(tokens: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The text in pieces of very different lengths."""
    rng = np.random.default_rng(22)
    start = 0
    while start < len(tokens):
        n_tokens = int(rng.choice([1, 2, 3, 13, 64, 65, 150]))
        yield tokens[start : start + n_tokens]
        start += n_tokens


def evaluated(llm: Llama, tokens: tuple[int, ...], seq_id: int = 0) -> npt.NDArray[np.float32]:
    """Logits of tokens given to llama.cpp in one batch, for any sequence."""
    logits = np.empty((len(tokens), llm.n_vocab), np.float32)
    llm._context.eval(np.array(tokens, np.int32), logits, seq_id)
    return logits


def assert_close(logits: npt.NDArray[np.float32], reference: FloatArray, tolerance: float = TOLERANCE) -> None:
    assert logits.shape == reference.shape
    difference = np.abs(logits - reference).max(axis=1)
    worst = int(difference.argmax())
    first = int((difference > tolerance).argmax())
    assert difference[worst] <= tolerance, (
        f"first beyond {tolerance} at token {first} ({difference[first]:.2g}), "
        f"worst at token {worst} ({difference[worst]:.2g}), {np.mean(difference > tolerance):.0%} of all tokens"
    )
