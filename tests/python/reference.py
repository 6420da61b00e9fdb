"""A llama-architecture transformer with LM-Infinite attention, in NumPy and double precision.

Written from the formulas (Han et al., arXiv 2308.16137; docs/semantics.md) and sharing no code with the engine: the
tests compare the two. It keeps every key, un-rotated, and asks for each query which keys it sees and at which distance;
nothing is ever evicted, placed or rebased.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

_QUERIES_AT_ONCE = 96


@dataclass(frozen=True)
class Attention:
    """Which keys a query sees, and where. The symbols are the paper's, `n_block` is the sink refresh granularity B.

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


FULL_ATTENTION = Attention()


class Transformer:
    """Weights of a llama-architecture model and the formulas that need no other token.

    Args:
        weights: Matrices [n_out, n_in] and norm vectors by GGUF tensor name; without "output.weight" the token
            embeddings are the output head.
        n_head: Query heads.
        n_head_kv: Key and value heads; each serves n_head / n_head_kv query heads.
        rope_freq_base: RoPE base: pair i of a head turns by position * base**(-2i / head_size).
        rms_norm_eps: Added to the mean square in RMSNorm.
    """

    def __init__(
        self,
        weights: Mapping[str, npt.NDArray[Any]],
        *,
        n_head: int,
        n_head_kv: int,
        rope_freq_base: float,
        rms_norm_eps: float,
    ) -> None:
        self._weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
        self.n_head = n_head
        self.n_head_kv = n_head_kv
        self.rms_norm_eps = rms_norm_eps
        self.n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blk."))
        self.head_size = len(self._weights["blk.0.attn_k.weight"]) // n_head_kv
        self.n_vocab = len(self._weights["token_embd.weight"])
        self.rope_frequencies = rope_freq_base ** (-np.arange(0, self.head_size, 2) / self.head_size)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """[n_tokens, n_embd] token embeddings."""
        embedded: FloatArray = self._weights["token_embd.weight"][np.asarray(tokens)]
        return embedded

    def queries_keys_values(self, layer: int, hidden: FloatArray) -> tuple[ComplexArray, ComplexArray, FloatArray]:
        """Un-rotated queries and keys, each pair of neighbouring components as one complex number, and values.

        Returns:
            [n, n_head, head_size / 2], [n, n_head_kv, head_size / 2] and [n, n_head_kv, head_size].
        """
        hidden = self._rms_norm(hidden, self._block(layer, "attn_norm"))
        queries, keys, values = (
            (hidden @ self._block(layer, name).T).reshape(len(hidden), -1, self.head_size)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        return _as_pairs(queries), _as_pairs(keys), values

    def after_attention(self, layer: int, hidden: FloatArray, attended: FloatArray) -> FloatArray:
        """The rest of a layer: output projection, and SwiGLU, each added to the residual stream [n, n_embd]."""
        hidden = hidden + attended @ self._block(layer, "attn_output").T
        normed = self._rms_norm(hidden, self._block(layer, "ffn_norm"))
        gate = normed @ self._block(layer, "ffn_gate").T
        up = normed @ self._block(layer, "ffn_up").T
        hidden += (gate / (1.0 + np.exp(-gate)) * up) @ self._block(layer, "ffn_down").T
        return hidden

    def logits(self, hidden: FloatArray) -> FloatArray:
        """[n, n_vocab] logits."""
        head = self._weights.get("output.weight", self._weights["token_embd.weight"])
        logits: FloatArray = self._rms_norm(hidden, self._weights["output_norm.weight"]) @ head.T
        return logits

    def _block(self, layer: int, name: str) -> FloatArray:
        return self._weights[f"blk.{layer}.{name}.weight"]

    def _rms_norm(self, hidden: FloatArray, weight: FloatArray) -> FloatArray:
        mean_square = np.mean(hidden**2, axis=-1, keepdims=True)
        normed: FloatArray = hidden / np.sqrt(mean_square + self.rms_norm_eps) * weight
        return normed


class TokenStream:
    """One sequence. Every key and value that was not forgotten on purpose is kept for good.

    Args:
        transformer: The model.
        attention: Which keys a query sees, and where.
    """

    def __init__(self, transformer: Transformer, attention: Attention = FULL_ATTENTION) -> None:
        self._transformer = transformer
        self._attention = attention
        self._positions: IntArray = np.zeros(0, np.int64)
        key_shape = (0, transformer.n_head_kv, transformer.head_size // 2)
        value_shape = (0, transformer.n_head_kv, transformer.head_size)
        self._keys: list[ComplexArray] = [np.zeros(key_shape, np.complex128) for _ in range(transformer.n_layer)]
        self._values: list[FloatArray] = [np.zeros(value_shape) for _ in range(transformer.n_layer)]
        self.n_past = 0

    def eval(self, tokens: Sequence[int]) -> FloatArray:
        """Appends tokens and returns the logits [n_tokens, n_vocab] after each of them."""
        positions = np.arange(self.n_past, self.n_past + len(tokens))
        self.n_past += len(tokens)
        self._positions = np.concatenate([self._positions, positions])

        hidden = self._transformer.embed(tokens)
        for layer in range(self._transformer.n_layer):
            queries, keys, values = self._transformer.queries_keys_values(layer, hidden)
            self._keys[layer] = np.concatenate([self._keys[layer], keys])
            self._values[layer] = np.concatenate([self._values[layer], values])
            starts = range(_QUERIES_AT_ONCE, len(tokens), _QUERIES_AT_ONCE)
            attended = [
                self._attend(layer, some_queries, some_positions)
                for some_queries, some_positions in zip(
                    np.split(queries, starts), np.split(positions, starts), strict=True
                )
            ]
            hidden = self._transformer.after_attention(layer, hidden, np.concatenate(attended))
        return self._transformer.logits(hidden)

    def forget(self, start: int, end: int) -> None:
        """Removes the keys at positions [start, end); the others stay where they are."""
        kept = (self._positions < start) | (self._positions >= end)
        self._positions = self._positions[kept]
        self._keys = [keys[kept] for keys in self._keys]
        self._values = [values[kept] for values in self._values]

    def move_to(self, position: int) -> None:
        """Forgets all but the sink tokens and goes on at the given position."""
        self.forget(self._attention.n_sink, self.n_past)
        self.n_past = position

    def remove_tail(self, position: int) -> None:
        """Takes back the tokens from the given position on."""
        self.forget(position, self.n_past)
        self.n_past = position

    def _attend(self, layer: int, queries: ComplexArray, positions: IntArray) -> FloatArray:
        """Softmax attention of queries [n, n_head, head_size / 2] over the keys they see: [n, n_head * head_size]."""
        visible = self._attention.is_visible(positions[:, None], self._positions[None, :])
        # Rows of indices of the visible keys, filled up with invisible ones to the longest row.
        seen = np.argsort(~visible, axis=1, kind="stable")[:, : visible.sum(axis=1).max()]
        is_seen = np.take_along_axis(visible, seen, axis=1)

        turned = self._turn(self._attention.rope_distance(positions[:, None], self._positions[seen]))
        keys = np.conj(self._keys[layer][seen]) * turned[:, :, None, :]
        grouped = queries.reshape(len(queries), self._transformer.n_head_kv, -1, queries.shape[-1])
        scores = (grouped @ keys.transpose(0, 2, 3, 1)).real / np.sqrt(self._transformer.head_size)
        weights = _softmax(np.where(is_seen[:, None, None, :], scores, -np.inf))
        attended: FloatArray = weights @ self._values[layer][seen].transpose(0, 2, 1, 3)
        return attended.reshape(len(queries), -1)

    def _turn(self, distance: IntArray) -> ComplexArray:
        """[..., head_size / 2] factors by which RoPE turns each product of a query pair with a key pair."""
        distances, inverse = np.unique(distance, return_inverse=True)
        turns: ComplexArray = np.exp(1j * distances[:, None] * self._transformer.rope_frequencies)
        return turns[inverse.reshape(distance.shape)]


def _as_pairs(heads: FloatArray) -> ComplexArray:
    """Components 2i and 2i + 1 as real and imaginary part: the pairs that llama.cpp's "normal" RoPE turns."""
    pairs: ComplexArray = heads[..., 0::2] + 1j * heads[..., 1::2]
    return pairs


def _softmax(scores: FloatArray) -> FloatArray:
    exponentials: FloatArray = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials
