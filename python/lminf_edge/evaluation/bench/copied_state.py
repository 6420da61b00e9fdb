"""Plain contexts of any depth without reading a text of that length: what was read is repeated.

Reading 32,768 tokens with full attention takes an hour on two cores, and how long one more token takes depends on how
many keys and values there are, not on what is in them. So a short text is read, and its keys and values are repeated in
a saved state of llama.cpp (`llama_kv_cache::state_write_meta()` and `state_write_data()` in `src/llama-kv-cache.cpp`):

    magic number, sequence
    for each cache: number of streams (1), number of cells
        for each cell: position, number of sequences (1), sequence
        whether values are transposed, number of layers
        for each layer: type of keys, bytes of a row, rows
        for each layer: type of values, bytes of a row, rows
            (transposed: type, bytes of an element, elements of a row; then the cells' values of each element)
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lminf_edge.errors import UnsupportedModelError

_Bytes = bytes | memoryview

_N_HEADER = 8


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Keys or values of one layer.

    Attributes:
        header: What stands before the rows: their type and size.
        size: Bytes of one cell's row, or of one element of it.
        n_parts: 1 for rows one after the other; elements of a row where values are transposed.
        data: The rows of all cells, or for each element that of all cells.
    """

    header: bytes
    size: int
    n_parts: int
    data: memoryview

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell."""
        return self.size * self.n_parts


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """What a saved sequence holds of one cache.

    Attributes:
        positions: Position of each cell.
        transposed: Whether values are transposed.
        keys: Of each layer.
        values: Of each layer that has some.
    """

    positions: list[int]
    transposed: bool
    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]

    @property
    def cell_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return sum(rows.cell_bytes for rows in (*self.keys, *self.values))


def parse_state(state: bytes) -> list[CacheState]:
    """The caches in a sequence that a plain context saved.

    Raises:
        UnsupportedModelError: The state has something else in it, such as a recurrent layer.
    """
    reader = _Reader(state)
    reader.take(_N_HEADER)
    caches = []
    while not reader.at_end:
        caches.append(_parse_cache(reader))
    return caches


def repeated_state(state: bytes, n_tokens: int) -> bytes:
    """The state of a longer sequence, in which the keys and values of a shorter one are repeated.

    Args:
        state: Of a sequence whose positions begin at 0, from a plain context.
        n_tokens: Length of the new sequence.

    Returns:
        A state of n_tokens cells; caches that hold only the end of a sequence (sliding windows) have as many as before.

    Raises:
        UnsupportedModelError: The state has something else in it than caches.
    """
    caches = parse_state(state)
    n_read = max(cache.positions[-1] for cache in caches) + 1
    written = io.BytesIO()
    written.write(state[:_N_HEADER])
    for cache in caches:
        if len(cache.positions) == n_read:
            _write_cache(written.write, cache, list(range(n_tokens)))
        else:
            _write_cache(written.write, cache, [position + n_tokens - n_read for position in cache.positions])
    return written.getvalue()


class _Reader:
    """Goes through a state from its beginning."""

    def __init__(self, state: bytes) -> None:
        self._rest = memoryview(state)

    @property
    def at_end(self) -> bool:
        return not self._rest

    def take(self, n_bytes: int) -> memoryview:
        if not 0 <= n_bytes <= len(self._rest):
            raise _unknown_format()
        taken, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return taken

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))


def _unknown_format() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the context of this model cannot be filled by copying: it holds more than keys and values"
    )


def _parse_cache(reader: _Reader) -> CacheState:
    n_streams, n_cells = reader.numbers("<II")
    if n_streams != 1 or n_cells < 1:
        raise _unknown_format()
    cells = np.frombuffer(reader.take(12 * n_cells), "<i4").reshape(n_cells, 3)
    if (cells[:, 1:] != (1, 0)).any() or (np.diff(cells[:, 0]) != 1).any():
        raise _unknown_format()
    transposed, n_layers = reader.numbers("<II")
    if transposed > 1 or n_layers > 4096:
        raise _unknown_format()
    keys = [_parse_rows(reader, n_cells, False) for _ in range(n_layers)]
    values = [_parse_rows(reader, n_cells, bool(transposed)) for _ in range(n_layers)]
    return CacheState(
        positions=cells[:, 0].tolist(), transposed=bool(transposed), keys=tuple(keys), values=tuple(values)
    )


def _parse_rows(reader: _Reader, n_cells: int, transposed: bool) -> Rows:
    if transposed:
        header = reader.take(12)
        _, size, n_parts = struct.unpack("<iII", header)
    else:
        header = reader.take(12)
        _, size = struct.unpack("<iQ", header)
        n_parts = 1
    return Rows(header=bytes(header), size=size, n_parts=n_parts, data=reader.take(size * n_parts * n_cells))


def _write_cache(write: Callable[[_Bytes], object], cache: CacheState, positions: list[int]) -> None:
    n_cells = len(positions)
    cells = np.zeros((n_cells, 3), "<i4")
    cells[:, 0], cells[:, 1] = positions, 1
    write(struct.pack("<II", 1, n_cells))
    write(cells.tobytes())
    write(struct.pack("<II", int(cache.transposed), len(cache.keys)))
    for rows in (*cache.keys, *cache.values):
        write(rows.header)
        n_part = len(rows.data) // rows.n_parts
        for part in range(rows.n_parts):
            _write_repeated(write, rows.data[part * n_part : (part + 1) * n_part], rows.size * n_cells)


def _write_repeated(write: Callable[[_Bytes], object], data: memoryview, n_bytes: int) -> None:
    for _ in range(n_bytes // len(data)):
        write(data)
    write(data[: n_bytes % len(data)])
