"""Stores of middle tokens of any length without reading a text of that length: rows of what was read are repeated.

How long a token takes to look through a store depends on how many keys are in it, not on what they are. So a sequence
goes on shortly before its depth and reads a window there, and the rows that the store then has are repeated in its
saved state (`lminf_memory::state_write()` in `src/cache/lminf-memory.cpp`, `lminf_kv_cache::state_write()` in
`src/cache/lminf-kv-cache-state.cpp`, `lminf_middle::write()` in `src/middle/lminf-middle.cpp`):

    magic number, sequence
    magic number, version, number of sequences (1), number of parameters, and these
    how many numbers the books have (`lminf_sequence::save()`), and these: the first is the position of the next token,
        the eighth the first position whose row was not overwritten, the ninth the first one that has a row at all
    cells of the window
    number of rows, 0 for a store in memory
    for each layer and each of its KV heads: with a first pass the mean of all keys, their factors and each word of
        their sketches; the rows of all keys, then those of all values; oldest first
    closing mark
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lminf_edge.errors import UnsupportedModelError

_HEADER = struct.Struct("<8xIIII")
_N_BOOKS = struct.Struct("<Q")
_BOOKS = struct.Struct("<9q")
_ROWS = struct.Struct("<QQ")

_MAGIC = 0x464E494C
_VERSION = 3

_N_END = 4
"""Bytes of the closing mark."""

_I_SKIPPED = 8
"""Place in the books of the first position that has a row."""


@dataclass(frozen=True)
class Section:
    """A part of a store in a state.

    Attributes:
        size: Bytes.
        per_token: Of each token; else it is there once.
    """

    size: int
    per_token: bool = True

    def n_bytes(self, n_tokens: int) -> int:
        """Its length."""
        return self.size * (n_tokens if self.per_token else 1)


def with_repeated_rows(state: bytes, sections: Sequence[Section]) -> bytes:
    """The same sequence with a store that has a row for every token before it, or as many as the store can have.

    Args:
        state: Of a sequence that was read from some position on, with its store in memory.
        sections: What its store consists of, in that order.

    Returns:
        Its state if all before that position had been read, too, in which rows are repeated.

    Raises:
        UnsupportedModelError: The state is of another version, or has something else behind the rows, as that of a
            model with sliding or recurrent layers.
    """
    if len(state) < _HEADER.size:
        raise _unknown_format()
    magic, version, n_sequences, n_parameters = _HEADER.unpack_from(state)
    i_books = _HEADER.size + 8 * n_parameters + _N_BOOKS.size
    if (magic, version, n_sequences) != (_MAGIC, _VERSION, 1) or len(state) < i_books + _BOOKS.size:
        raise _unknown_format()
    n_past, *_, n_lost, n_skipped = _BOOKS.unpack_from(state, i_books)
    n_rows, n_wanted = n_past - max(n_lost, n_skipped), n_past - n_lost
    begin = len(state) - _N_END - sum(section.n_bytes(n_rows) for section in sections)
    if n_rows < 1 or begin < _ROWS.size or _ROWS.unpack_from(state, begin - _ROWS.size) != (n_rows, 0):
        raise _unknown_format()
    at = i_books + 8 * _I_SKIPPED
    parts = [state[:at], bytes(8), state[at + 8 : begin - _ROWS.size], _ROWS.pack(n_wanted, 0)]
    n_times, n_more = divmod(n_wanted, n_rows)
    for section in sections:
        rows = state[begin : begin + section.n_bytes(n_rows)]
        parts += [*([rows] * n_times), rows[: n_more * section.size]] if section.per_token else [rows]
        begin += len(rows)
    return b"".join([*parts, state[-_N_END:]])


def _unknown_format() -> UnsupportedModelError:
    return UnsupportedModelError("the store of this model cannot be filled by copying: its state has another format")
