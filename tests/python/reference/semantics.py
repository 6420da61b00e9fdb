"""What a query sees, and at which distance: LM-Infinite in full-attention layers, the model's own mask in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from reference.arrays import BoolArray, IntArray


class View(Protocol):
    """What the queries of one layer see. Shapes of `query` and `key` positions broadcast."""

    def is_visible(self, query: IntArray, key: IntArray) -> BoolArray:
        """Whether the query at position `query` sees the key at position `key`."""
        ...

    def rope_distance(self, query: IntArray, key: IntArray) -> IntArray:
        """RoPE distance at which the query sees the key."""
        ...

    def bias_distance(self, query: IntArray, key: IntArray) -> IntArray:
        """Distance that ALiBi multiplies with a head's slope."""
        ...


@dataclass(frozen=True)
class Attention:
    """LM-Infinite. The symbols are the paper's, `n_block` is the sink refresh granularity B.

    Attributes:
        n_sink: S, the first S tokens of a sequence are always visible.
        n_window: W, key j is in the local window of query p iff p - j < W. None: full attention.
        n_clamp: L, the largest RoPE distance to a sink token. None: mask only, every key at its true distance.
        n_block: B, the clamp counts from the last position of the query's block of B positions.
        sink_order: "clamped": all far sink tokens share one distance; "kept": they keep their distances to each other.
    """

    n_sink: int = 0
    n_window: int | None = None
    n_clamp: int | None = None
    n_block: int = 1
    sink_order: Literal["clamped", "kept"] = "clamped"

    def is_visible(self, query: IntArray, key: IntArray) -> BoolArray:
        """Whether the query at position `query` sees the key at position `key`; the shapes broadcast."""
        causal = key <= query
        if self.n_window is None:
            return causal
        return causal & ((key < self.n_sink) | (query - key < self.n_window))

    def effective_position(self, query: IntArray, key: IntArray) -> IntArray:
        """Position that RoPE uses for the key as this query sees it; the shapes broadcast."""
        query, key = np.broadcast_arrays(query, key)
        if self.n_clamp is None:
            return key
        block_end = query // self.n_block * self.n_block + self.n_block - 1
        if self.sink_order == "kept":
            sink_position = key + np.maximum(0, block_end - self.n_clamp)
        else:
            sink_position = np.maximum(key, block_end - self.n_clamp)
        return np.where(key < self.n_sink, sink_position, key)

    def rope_distance(self, query: IntArray, key: IntArray) -> IntArray:
        """RoPE distance at which the query sees the key; the shapes broadcast."""
        return query - self.effective_position(query, key)

    def bias_distance(self, query: IntArray, key: IntArray) -> IntArray:
        """Distance that ALiBi uses, at most L whatever the block; the shapes broadcast."""
        distance: IntArray = query - key
        return distance if self.n_clamp is None else np.minimum(distance, self.n_clamp)

    def temperature_position(self, query: IntArray) -> IntArray:
        """Position from which the attention temperature of a query follows: no text seems longer than L."""
        return query if self.n_clamp is None else np.minimum(query, self.n_clamp)

    def n_ctx(self, n_ctx_train: int) -> int:
        """Context length by which a model with long and short RoPE factors chooses: the distances that it can see."""
        if self.n_window is None or self.n_clamp is None:
            return n_ctx_train
        return max(self.n_window, min(self.n_clamp, n_ctx_train))


FULL_ATTENTION = Attention()


@dataclass(frozen=True)
class _TrueDistances:
    """Layers that LM-Infinite leaves alone."""

    def rope_distance(self, query: IntArray, key: IntArray) -> IntArray:
        return query - key

    def bias_distance(self, query: IntArray, key: IntArray) -> IntArray:
        return query - key


@dataclass(frozen=True)
class SlidingWindow(_TrueDistances):
    """A sliding-window layer of the model's own: the last n_swa positions, the query's included."""

    n_swa: int

    def is_visible(self, query: IntArray, key: IntArray) -> BoolArray:
        return (key <= query) & (query - key < self.n_swa)


@dataclass(frozen=True)
class Chunks(_TrueDistances):
    """A layer in which a query sees the positions of its own chunk."""

    n_chunk: int

    def is_visible(self, query: IntArray, key: IntArray) -> BoolArray:
        same_chunk: BoolArray = query // self.n_chunk == key // self.n_chunk
        return (key <= query) & same_chunk
