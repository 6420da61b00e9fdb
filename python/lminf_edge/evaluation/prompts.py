"""Prompts that one model answers one after the other; what neighbours have in common is read once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lminf_edge.errors import StateError
from lminf_edge.evaluation.context_shift import ShiftingLlama
from lminf_edge.evaluation.reader import has_store
from lminf_edge.llama import Llama
from lminf_edge.tokens import TokenArray

_N_PIECE = 2048
"""Tokens that are read between two messages."""

_N_SHARED_MIN = 256
"""A common beginning that is shorter is read again: that takes no longer than keeping it."""


class Prompt(Protocol):
    """Something to answer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Fields of its record that tell it from the other prompts of a run."""

    @property
    def n_tokens(self) -> int:
        """Its length."""

    @property
    def n_question(self) -> int:
        """Tokens at its end that ask: those that recall, where a method does."""

    def in_window(self, n_window: int) -> bool | None:
        """Whether a local window at its end holds all that an answer needs. None: nobody knows where that is."""

    def tokens(self) -> TokenArray:
        """Its token ids, int32 [n_tokens]."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a prompt has in common with its neighbours.

    Attributes:
        n_kept: Tokens at its beginning that were kept when the one before it was answered.
        n_next: Tokens at its beginning that the next one begins with, too: to be kept for that.
        state: File for a saved state, which is needed where the model cannot go back in its sequence.
    """

    n_kept: int = 0
    n_next: int = 0
    state: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model made of a prompt.

    Attributes:
        text: The answer's text.
        seconds: Time that reading and answering took, without what had been read before.
        n_kept: Tokens at the prompt's beginning that the next prompt need not read again.
    """

    text: str
    seconds: float
    n_kept: int = 0


def n_shared(prompt: TokenArray, other: TokenArray, n_questions: tuple[int, int], n_ubatch: int) -> int:
    """How much of two prompts is read once: never a token of a question, and whole micro-batches.

    So each of them is read in the same micro-batches as if it were the only one, and the answers are the same.

    Args:
        prompt: Token ids.
        other: Those of the next prompt.
        n_questions: Tokens at the end of each that ask.
        n_ubatch: Tokens of a micro-batch.

    Returns:
        Tokens from the beginning. 0: too few to be worth it.
    """
    texts = [tokens[: max(0, len(tokens) - n)] for tokens, n in zip((prompt, other), n_questions, strict=True)]
    n_both = min(map(len, texts))
    different = np.flatnonzero(texts[0][:n_both] != texts[1][:n_both])
    n_common = int(different[0]) if different.size else n_both
    if not len(texts[0]) == len(texts[1]) == n_common:
        n_common -= n_common % n_ubatch
    return n_common if n_common >= _N_SHARED_MIN else 0


def answer_prompt(
    llm: Llama, tokens: TokenArray, n_question: int, max_tokens: int, one_line: bool, shared: Shared
) -> Iterator[int | Answer]:
    """Reads a prompt and takes the most probable token again and again.

    Args:
        llm: The model. If anything was kept, its sequence is still as the prompt before has left it.
        tokens: The prompt, int32 [n], n at least 1.
        n_question: Its last tokens, which recall middle tokens with the answer if the model stores any.
        max_tokens: Tokens of the answer at most.
        one_line: Stop behind the first line that is not empty.
        shared: What it has in common with its neighbours.

    Yields:
        How many more tokens of the prompt are read; at the end the answer.
    """
    start = time.perf_counter()
    n_kept, n_text = shared.n_kept, max(0, len(tokens) - max(1, n_question))
    _go_back(llm, shared)
    yield n_kept
    n_next = shared.n_next if shared.n_next >= n_kept else 0
    yield from _read(llm, tokens, n_kept, n_next)
    if n_next and _needs_state(llm, len(tokens) + max_tokens - n_next):
        assert shared.state is not None
        llm.save_state(shared.state)
    n_shifts = _n_shifts(llm)
    yield from _read(llm, tokens, max(n_kept, n_next), n_text)
    text = ""
    for step in llm.generate(tokens[n_text:], max_tokens=max_tokens, temperature=0, recall=has_store(llm)):
        text += step.text
        if one_line and "\n" in text.lstrip():
            break
    text = text.strip()
    yield len(tokens) - n_text
    yield Answer(
        text=text.partition("\n")[0].rstrip() if one_line else text,
        seconds=time.perf_counter() - start,
        n_kept=n_next if _n_shifts(llm) == n_shifts else 0,
    )


def _go_back(llm: Llama, shared: Shared) -> None:
    """Leaves what was kept of the sequence, and nothing else."""
    try:
        llm.truncate(shared.n_kept)
    except StateError:  # LM-Infinite: more was read since than can be taken back
        assert shared.state is not None
        llm.load_state(shared.state)


def _needs_state(llm: Llama, n_behind: int) -> bool:
    """Whether a model may be unable to take so many tokens back."""
    return llm.config is not None and n_behind > llm.config.n_rollback


def _n_shifts(llm: Llama) -> int:
    """Beyond a context shift there is no way back."""
    return llm.n_shifts if isinstance(llm, ShiftingLlama) else 0


def _read(llm: Llama, tokens: TokenArray, begin: int, end: int) -> Iterator[int]:
    """Reads tokens [begin, end) in whole micro-batches; tells after some of them how many."""
    n_piece = max(1, _N_PIECE // llm._n_ubatch) * llm._n_ubatch
    for at in range(begin, end, n_piece):
        piece = tokens[at : min(at + n_piece, end)]
        list(llm.generate(piece, max_tokens=0))
        yield len(piece)
