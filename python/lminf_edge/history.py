"""Which tokens a sequence is made of, as far as that is worth remembering."""

from __future__ import annotations

from array import array

import numpy as np

from lminf_edge.tokens import TokenArray

N_HISTORY = 2**20
"""Of a sequence that grows beyond this many tokens (4 MiB) the newest are recorded: it may be without end."""


class TokenHistory:
    """The tokens of a sequence, to find what a new prompt has in common with its beginning, and what repeats in it."""

    def __init__(self, n_max: int = N_HISTORY) -> None:
        """The record of an empty sequence.

        Args:
            n_max: Most tokens that are recorded.
        """
        self._n_max = n_max
        self._begin = 0  # position of the first recorded token
        self._tokens: array[int] = array("i")
        self._is_whole = True

    def append(self, tokens: TokenArray) -> None:
        """Tokens were appended to the sequence."""
        self._tokens.frombytes(tokens.tobytes())
        if len(self._tokens) > self._n_max:
            n_gone = len(self._tokens) - self._n_max // 2  # more than need be: it takes as long as appending them
            del self._tokens[:n_gone]
            self._begin += n_gone
            self._is_whole = False

    def truncate(self, n_past: int) -> None:
        """The sequence was cut down to its first n_past tokens."""
        if n_past < self._begin or n_past == 0:
            self._begin = n_past
            self._is_whole = n_past == 0
        del self._tokens[n_past - self._begin :]

    def forget(self) -> None:
        """Something in the middle was removed: what the sequence is made of is not a beginning of any prompt."""
        self._is_whole = False

    def token_at(self, position: int) -> int | None:
        """The token at a position, whether it was removed from the middle or not; None if it is not recorded."""
        is_recorded = 0 <= position - self._begin < len(self._tokens)
        return self._tokens[position - self._begin] if is_recorded else None

    def newest(self, n: int) -> TokenArray:
        """The last n tokens, or as many as are recorded."""
        return np.array(self._tokens[-n:], np.int32)

    def save(self) -> bytes | None:
        """The tokens as 32-bit integers; None if they are not all recorded, or not what the sequence is made of."""
        return self._tokens.tobytes() if self._is_whole else None

    def load(self, tokens: bytes | None, n_past: int) -> None:
        """Takes over what `save` returned, of a sequence of n_past tokens."""
        self._tokens = array("i", tokens or b"")
        self._begin = n_past - len(self._tokens)
        self._is_whole = tokens is not None

    def n_common(self, tokens: TokenArray, n_past: int) -> int:
        """Length of the common beginning of some tokens and the sequence.

        Args:
            tokens: Token ids.
            n_past: Length of the sequence. If it is not what was recorded, nothing is known to be common.
        """
        if not self._is_whole or len(self._tokens) != n_past:
            return 0
        n = min(n_past, tokens.size)
        different = np.flatnonzero(np.frombuffer(self._tokens, np.int32, n) != tokens[:n]) if n else np.empty(0)
        return int(different[0]) if different.size else n
