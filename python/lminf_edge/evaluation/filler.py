"""Text around something that is to be found again, in tokens, so that its length is exact."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import numpy.typing as npt

from lminf_edge._library import _core
from lminf_edge.tokens import TokenArray

_SENTENCE_END = re.compile(rb"[.!?][\"'\)\]*_]*\s*$|\n\s*$")


class Filler:
    """A text that can be had at any length: it begins again at its end.

    Attributes:
        tokens: Token ids of the whole text, int32 [n].
        starts: Where sentences begin, indices of tokens in ascending order; 0 at least.
    """

    def __init__(self, vocabulary: _core.Model, text: str) -> None:
        """Splits a text into tokens.

        Args:
            vocabulary: The model whose tokens these are; its weights are not needed.
            text: The text, not empty.
        """
        self.tokens: TokenArray = vocabulary.tokenize(text.encode(errors="replace"), False, False)
        self.starts = _sentence_starts(vocabulary, self.tokens)

    def part(self, n_tokens: int, first: int) -> TokenArray:
        """Some consecutive tokens.

        Args:
            n_tokens: How many, int32 [n_tokens] is what comes back.
            first: Index of the first one.
        """
        return np.resize(np.roll(self.tokens, -first), n_tokens)

    def gap(self, n_tokens: int, first: int, wanted: int) -> int:
        """Where in such a part something can be put: the gap between sentences that is nearest, or one of its ends.

        Args:
            n_tokens: Of `part`.
            first: Of `part`.
            wanted: Tokens of the part that should be before it.

        Returns:
            Tokens of the part that are before it.
        """
        size = self.tokens.size
        in_first_round = np.sort((self.starts - first) % size)
        rounds = np.arange(max(0, wanted // size - 1), wanted // size + 2)
        gaps = (rounds[:, np.newaxis] * size + in_first_round).ravel()
        gaps = np.concatenate([[0, n_tokens], gaps[gaps < n_tokens]])
        return int(gaps[np.argmin(np.abs(gaps - wanted))])


def _sentence_starts(vocabulary: _core.Model, tokens: TokenArray) -> npt.NDArray[np.int64]:
    @cache
    def kind(token: int) -> tuple[bool, bool, bool]:
        piece = vocabulary.token_to_piece(token, False)
        return bool(_SENTENCE_END.search(piece)), piece[:1].isspace(), piece[-1:].isspace()

    starts = [0]
    for index in range(1, tokens.size):
        ends_sentence, _, ends_word = kind(int(tokens[index - 1]))
        if ends_sentence and (ends_word or kind(int(tokens[index]))[1]):
            starts.append(index)
    return np.array(starts, np.int64)
