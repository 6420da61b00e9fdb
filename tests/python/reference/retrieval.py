"""Middle tokens that a query looks up (Han et al., arXiv 2308.16137, section 4), by sorting everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from reference.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Retrieval:
    """Which stored tokens take part in a query's softmax, beside those that it sees.

    Attributes:
        k: Tokens for each query head, or for each KV head.
        distance: RoPE distance at which they are seen.
        per: Whose tokens are chosen together. The query heads of a KV head share those whose weight, relative to all
            that its head sees anyway, is largest in any of them.
        first_layer: Layers before it look nothing up.
        max_tokens: Only the newest ones are stored.
    """

    k: int
    distance: int
    per: Literal["kv_head", "head"] = "kv_head"
    first_layer: int = 0
    max_tokens: int = 65536

    def is_stored(self, query: IntArray, key: IntArray) -> BoolArray:
        """Whether the key at position `key` is stored for the query at position `query`; the shapes broadcast."""
        return (key < query) & (query - key < self.max_tokens)

    def is_near(self, query: IntArray, key: IntArray, visible: BoolArray, n_sink: int) -> BoolArray:
        """What a query that recalls sees of what it would see otherwise.

        Recalled tokens stand at one distance: nothing of the window that is farther away may stand behind them. It is
        looked up like older tokens, once there are any.
        """
        has_older = (self.is_stored(query, key) & ~visible & (key >= n_sink)).any(axis=1, keepdims=True)
        near: BoolArray = (key < n_sink) | (query - key < self.distance) | ~has_older
        return near

    def chosen(self, far: FloatArray, seen: FloatArray, candidate: BoolArray, *, gated: bool) -> BoolArray:
        """What the heads look up.

        Args:
            far: [n, n_head_kv, group, keys] scores of all keys at the distance.
            seen: [n, n_head_kv, group] log-sum-exp of the scores of what is seen anyway.
            candidate: [n, keys] keys that can be looked up.
            gated: Only keys that weigh more than all that is seen anyway.

        Returns:
            Booleans of the shape of `far`.
        """
        rank = far if self.per == "head" else (far - seen[..., None]).max(axis=2, keepdims=True)
        rank = np.where(candidate[:, None, None, :], rank, -np.inf)
        order = np.argsort(-rank, axis=-1, kind="stable")[..., : self.k]
        is_best = np.zeros(rank.shape, bool)
        np.put_along_axis(is_best, order, True, axis=-1)
        chosen: BoolArray = is_best & np.isfinite(rank) & np.ones(far.shape, bool)
        return chosen & (far > seen[..., None]) if gated else chosen
