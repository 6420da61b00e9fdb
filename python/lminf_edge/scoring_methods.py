"""The methods of `Llama` that read a text and say what the model expects of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lminf_edge.middle import Recall
from lminf_edge.sequence import ModelSequence
from lminf_edge.tokens import TokenArray, TokenSequence


class ScoringModel(Protocol):
    """What `ScoringMethods` needs of a `Llama`."""

    _sequence: ModelSequence
    _n_ubatch: int

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""

    def iter_logprobs(self, tokens: TokenSequence, *, recall: Recall = False) -> Iterator[npt.NDArray[np.float32]]:
        """Probabilities of tokens, micro-batch by micro-batch."""

    def _iter_logprobs(
        self, tokens: TokenSequence, following: int | None, recall: Recall = False
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The same, with that of a token that follows."""

    def _to_tokens(self, tokens: TokenSequence, allow_empty: bool = False) -> TokenArray:
        """Token ids as an array, once they are checked."""

    def _recall_mode(self, recall: Recall) -> int:
        """The extension's number of a way to recall, if there is a store."""


class ScoringMethods:
    """Logits, and probabilities of tokens. Each call appends its tokens to the sequence."""

    def eval(self: ScoringModel, tokens: TokenSequence, *, recall: Recall = False) -> npt.NDArray[np.float32]:
        """Appends tokens to the sequence and returns what the model expects after each of them.

        The result has n_tokens * n_vocab * 4 bytes; `logprobs` needs no memory that grows with the text.

        Args:
            tokens: Token ids, any number from 1.
            recall: Whether these tokens look up middle tokens, which `LMInfConfig.middle` has stored. "gated": only
                such that weigh more than all that is seen anyway, for reading.

        Returns:
            Logits, float32 [n_tokens, n_vocab]. Row i belongs to the token that follows tokens[i].

        Raises:
            ConfigError: There are no tokens, or one is outside the vocabulary. Nothing was appended.
            ContextError: A plain context has no room for all of them. Nothing was appended.
            StateError: The object is closed, or another thread computes with it.
        """
        checked, mode = self._to_tokens(tokens), self._recall_mode(recall)
        with self._sequence.exclusive(), self._sequence.recording(checked) as context:
            self._sequence.check_room(checked.size)
            logits = np.empty((checked.size, self.n_vocab), np.float32)
            for begin in range(0, checked.size, self._n_ubatch):
                end = begin + self._n_ubatch
                context.eval(checked[begin:end], logits[begin:end], recall=mode)
        return logits

    def logprobs(self: ScoringModel, tokens: TokenSequence, *, recall: Recall = False) -> npt.NDArray[np.float32]:
        """Appends tokens to the sequence and returns how probable each was after those before it.

        The first token only conditions the others, whatever the sequence held before: it is appended, but not scored.
        Never more than one micro-batch of logits is in memory.

        Args:
            tokens: Token ids, any number from 1.
            recall: See `eval`.

        Returns:
            Natural-log probabilities, float32 [n_tokens - 1]. Entry i belongs to tokens[i + 1].

        Raises:
            ConfigError, ContextError, StateError: As for `eval`.
        """
        return np.concatenate(list(self.iter_logprobs(tokens, recall=recall)))

    def iter_logprobs(
        self: ScoringModel, tokens: TokenSequence, *, recall: Recall = False
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Does what `logprobs` does, micro-batch by micro-batch, for a caller that wants to watch.

        Args:
            tokens: Token ids, any number from 1. They are checked now and appended as the result is iterated over.
            recall: See `eval`.

        Returns:
            An iterator over consecutive pieces of what `logprobs` returns, one for each micro-batch.

        Raises:
            ConfigError, ContextError, StateError: As for `eval`.
        """
        return self._iter_logprobs(tokens, None, recall)

    def _iter_logprobs(
        self: ScoringModel, tokens: TokenSequence, following: int | None, recall: Recall = False
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The same; a token that follows the text is scored, too, but not appended."""
        checked, mode = self._to_tokens(tokens), self._recall_mode(recall)
        self._sequence.check_room(checked.size)
        targets = checked[1:] if following is None else np.append(checked[1:], self._to_tokens([following]))
        return _score_micro_batches(self, checked, targets, mode)


def _score_micro_batches(
    model: ScoringModel, tokens: TokenArray, targets: TokenArray, recall: int
) -> Iterator[npt.NDArray[np.float32]]:
    for begin in range(0, tokens.size, model._n_ubatch):
        end = begin + model._n_ubatch
        scores = np.empty(targets[begin:end].size, np.float32)
        with model._sequence.exclusive(), model._sequence.recording(tokens[begin:end]) as context:
            context.score(tokens[begin:end], targets[begin:end], scores, recall=recall)
        yield scores
