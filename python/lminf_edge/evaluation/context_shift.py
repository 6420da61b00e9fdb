"""llama.cpp's own way to go on when a context is full, to compare with: the context shift.

`llama-cli` and `llama-server` keep the first tokens, discard half of the others and move the rest up by rotating their
stored keys again (`llama_memory_seq_rm`, `llama_memory_seq_add`). This is what they do, on llama.cpp's own code path.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lminf_edge._checks import check_int
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError, StateError
from lminf_edge.llama import Llama
from lminf_edge.records import MemoryStats
from lminf_edge.sequence import ModelSequence
from lminf_edge.threads import ThreadPlan


class ShiftingLlama(Llama):
    """A plain `Llama` whose sequence goes on when its context is full."""

    def __init__(self, model_path: str | os.PathLike[str], *, n_ctx: int, n_keep: int, **options: Any) -> None:
        """Opens a model.

        Args:
            model_path: A GGUF file.
            n_ctx: Length at which half of the context is discarded, in tokens; rounded up to a multiple of 256.
            n_keep: First tokens that are kept.
            **options: Of `Llama`, but for `lminf`.

        Raises:
            ConfigError: There is no room between n_keep and n_ctx for a micro-batch.
            LMInfError: As for `Llama`.
        """
        super().__init__(model_path, n_ctx=n_ctx, **options)
        n_keep = check_int("n_keep", n_keep, 0)
        self._sequence = ShiftingSequence(self._model, self._context, n_keep, self._sequence.threads)

    @property
    def n_shifts(self) -> int:
        """How often the context was shifted."""
        assert isinstance(self._sequence, ShiftingSequence)
        return self._sequence.n_shifts


class ShiftingSequence(ModelSequence):
    """A sequence without end in a context with one.

    Attributes:
        n_keep: First tokens that are kept.
        n_shifts: How often the context was shifted.
    """

    def __init__(self, model: _core.Model, context: _core.Context, n_keep: int, threads: ThreadPlan) -> None:
        """See `ModelSequence`."""
        super().__init__(model, context, None, threads)
        self.n_keep = n_keep
        self.n_shifts = 0
        self._n_cells = context.n_ctx
        self._n_discarded = 0
        self._n_batch = context.n_ubatch
        if self._n_cells - n_keep < context.n_ubatch + 2:
            raise ConfigError(
                f"n_ctx = {self._n_cells}: a context shift needs room for more than a micro-batch "
                f"({context.n_ubatch}) behind the {n_keep} tokens that are kept"
            )

    @property
    def n_past(self) -> int:
        """Position of the next token in the text."""
        return super().n_past + self._n_discarded

    def memory_stats(self) -> MemoryStats:
        """See `ModelSequence`; discarded tokens are evicted ones."""
        stats = super().memory_stats()
        return replace(stats, n_past=stats.n_past + self._n_discarded, n_evicted=self._n_discarded)

    def make_room(self, n_tokens: int) -> None:
        """Discards half of what is not kept if n_tokens do not fit, as llama.cpp's programs do.

        Raises:
            ConfigError: There are more than a context can ever have room for.
        """
        while (n_used := super().n_past) + n_tokens > self._n_cells:
            n_discard = (n_used - self.n_keep) // 2
            if n_discard < 1:
                raise ConfigError(f"{n_tokens} tokens at once do not fit into a context of {self._n_cells}: read fewer")
            self.context.shift(self.n_keep, n_discard)
            self._n_discarded += n_discard
            self.n_shifts += 1
            self._history.forget()

    def truncate(self, n_past: int) -> None:
        """See `ModelSequence`."""
        if n_past and self._n_discarded and n_past < self._n_discarded + self.n_keep:
            raise StateError(f"the first {n_past} tokens are not there any more: the context was shifted")
        super().truncate(n_past - self._n_discarded if n_past else 0)
        if n_past == 0:
            self._n_discarded = 0

    def rearrange(self) -> None:
        """Puts the cells in order, as they are after a saved state is loaded.

        llama.cpp fills holes in a context and sums in the order of its cells: only so does a run that was stopped go on
        with the very figures of one that was not.
        """
        n_past = self.n_past
        with self.exclusive():
            self.load(self.save())
        self.resume_at(n_past)

    def resume_at(self, n_past: int) -> None:
        """Tells how long the text was whose state was just loaded: the context only knows what it holds."""
        self._n_discarded = n_past - super().n_past
