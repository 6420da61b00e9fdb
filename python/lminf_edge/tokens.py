"""Token ids, from what callers pass to what llama.cpp reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lminf_edge.errors import ConfigError

TokenSequence = Sequence[int] | npt.NDArray[np.integer]
"""Token ids: a sequence of integers or a one-dimensional integer array."""

TokenArray = npt.NDArray[np.int32]
"""Token ids as llama.cpp reads them: one-dimensional and C-contiguous."""


def as_token_array(tokens: TokenSequence, n_vocab: int, *, allow_empty: bool = False) -> TokenArray:
    """Checks and converts token ids; llama.cpp itself would read outside its tables.

    Args:
        tokens: Token ids.
        n_vocab: Size of the vocabulary.
        allow_empty: Whether no token at all is right.

    Returns:
        The same ids, int32 [n_tokens].

    Raises:
        ConfigError: There are no tokens, or one is outside the vocabulary.
        TypeError: These are no integers, or not a one-dimensional sequence of them.
    """
    if isinstance(tokens, str | bytes):
        raise TypeError(f"tokens must be token ids, not {type(tokens).__name__}: see Llama.tokenize()")
    array = np.asarray(tokens)
    if array.size == 0 and array.ndim == 1:
        if not allow_empty:
            raise ConfigError("tokens is empty: at least one token is needed")
        return np.empty(0, np.int32)
    too_big_for_numpy = array.dtype == object and all(isinstance(token, int) for token in array.flat)
    if array.ndim != 1 or not (array.dtype.kind in "iu" or too_big_for_numpy):
        raise TypeError(f"tokens must be a one-dimensional sequence of integers, not {array.dtype} {list(array.shape)}")
    outside = np.flatnonzero((array < 0) | (array >= n_vocab))
    if outside.size:
        index = outside[0]
        raise ConfigError(f"token {array[index]} at index {index} is outside the vocabulary (0 to {n_vocab - 1})")
    return np.ascontiguousarray(array, np.int32)
