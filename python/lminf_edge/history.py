"""Which tokens a sequence is made of, as far as that is worth remembering."""

from __future__ import annotations

from array import array

import numpy as np

from lminf_edge.tokens import TokenArray

N_HISTORY = 2**20
"""A sequence that grows beyond this many tokens (4 MiB) is no longer recorded: it may be without end."""


class TokenHistory:
    """The tokens of a sequence from its beginning, to find what a new prompt has in common with it."""

    def __init__(self, n_max: int = N_HISTORY) -> None:
        """The record of an empty sequence.

        Args:
            n_max: Longest sequence that is recorded, in tokens.
        """
        self._n_max = n_max
        self._tokens: array[int] | None = array("i")
        self._is_whole = True

    def append(self, tokens: TokenArray) -> None:
        """Tokens were appended to the sequence."""
        if self._tokens is None:
            return
        if len(self._tokens) + tokens.size > self._n_max:
            self._tokens = None
            return
        self._tokens.frombytes(tokens.tobytes())

    def truncate(self, n_past: int) -> None:
        """The sequence was cut down to its first n_past tokens."""
        if n_past == 0:
            self._tokens = array("i")
            self._is_whole = True
        elif self._tokens is not None:
            del self._tokens[n_past:]

    def forget(self) -> None:
        """Something in the middle was removed: what the sequence is made of is not a beginning of any prompt."""
        self._is_whole = False

    def token_at(self, position: int) -> int | None:
        """The token at a position, whether it was removed from the middle or not; None if it is not recorded."""
        is_recorded = self._tokens is not None and position < len(self._tokens)
        return self._tokens[position] if self._tokens is not None and is_recorded else None

    def save(self) -> bytes | None:
        """The tokens as 32-bit integers; None if they are not recorded, or not what the sequence is made of."""
        return None if self._tokens is None or not self._is_whole else self._tokens.tobytes()

    def load(self, tokens: bytes | None) -> None:
        """Takes over what `save` returned."""
        self._tokens = None if tokens is None else array("i", tokens)
        self._is_whole = tokens is not None

    def n_common(self, tokens: TokenArray, n_past: int) -> int:
        """Length of the common beginning of some tokens and the sequence.

        Args:
            tokens: Token ids.
            n_past: Length of the sequence. If it is not what was recorded, nothing is known to be common.
        """
        if self._tokens is None or not self._is_whole or len(self._tokens) != n_past:
            return 0
        n = min(n_past, tokens.size)
        different = np.flatnonzero(np.frombuffer(self._tokens, np.int32, n) != tokens[:n]) if n else np.empty(0)
        return int(different[0]) if different.size else n
