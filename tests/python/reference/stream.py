"""One sequence of tokens, evaluated with everything that it ever said at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from reference.architecture import AttentionTemperature
from reference.arrays import BoolArray, ComplexArray, FloatArray, IntArray
from reference.retrieval import Retrieval
from reference.semantics import FULL_ATTENTION, Attention, View
from reference.transformer import Transformer, softcapped, softmax

_QUERIES_AT_ONCE = 96

Recall = bool | Literal["gated"]


class TokenStream:
    """One sequence. Every key and value that was not forgotten on purpose is kept for good.

    Args:
        transformer: The model.
        attention: What the queries of full-attention layers see, and where.
        n_ctx: Context length by which long or short RoPE factors are chosen. None: what `attention` asks for.
        retrieval: What tokens look up when they are to.
    """

    def __init__(
        self,
        transformer: Transformer,
        attention: Attention = FULL_ATTENTION,
        n_ctx: int | None = None,
        retrieval: Retrieval | None = None,
    ) -> None:
        self._retrieval = retrieval
        self._transformer = transformer
        self._attention = attention
        n_ctx = n_ctx or attention.n_ctx(transformer.architecture.n_ctx_train)
        self._past = {
            layer: _Inputs(transformer, layer) if transformer.is_recurrent(layer) else _Keys(transformer, layer, n_ctx)
            for layer in range(transformer.n_layer)
            if transformer.architecture.layers[layer].source is None
        }
        self._recall: Recall = False
        self.n_past = 0

    def eval(self, tokens: Sequence[int], recall: Recall = False) -> FloatArray:
        """Appends tokens and returns the logits [n_tokens, n_vocab] after each of them."""
        self._recall = recall
        positions = np.arange(self.n_past, self.n_past + len(tokens))
        self.n_past += len(tokens)

        hidden = self._transformer.embed(tokens)
        for layer, kind in enumerate(self._transformer.architecture.layers):
            past = self._past[layer if kind.source is None else kind.source]
            if isinstance(past, _Inputs):
                mixed = past.recur(hidden, positions)
            else:
                if kind.source is None:
                    past.append(hidden, positions)
                mixed = self._attend(layer, past, hidden, positions)
            hidden = self._transformer.after_attention(layer, hidden, mixed)
        return self._transformer.logits(hidden)

    def forget(self, start: int, end: int) -> None:
        """No query sees the keys at positions [start, end) any more. Recurrent layers remember."""
        for past in self._past.values():
            if isinstance(past, _Keys):
                past.forget(start, end)

    def move_to(self, position: int) -> None:
        """Forgets all but the sink tokens and goes on at the given position."""
        for past in self._past.values():
            if isinstance(past, _Keys):
                past.remove(self._attention.n_sink, self.n_past)
        self.n_past = position

    def remove_tail(self, position: int) -> None:
        """Takes back the tokens from the given position on."""
        for past in self._past.values():
            past.remove(position, self.n_past)
        self.n_past = position

    def _attend(self, layer: int, past: _Keys, hidden: FloatArray, positions: IntArray) -> FloatArray:
        """Attention of the queries of the residual stream [n, n_embd] over the past: [n, n_head * value size]."""
        kind = self._transformer.architecture.layers[layer]
        queries = past.rotation.pairs(self._transformer.queries(layer, hidden)) * self._transformer.scale(layer)
        if kind.temperature is not None:
            queries *= _temperature(kind.temperature, self._attention.temperature_position(positions))[:, None, None]
        starts = range(_QUERIES_AT_ONCE, len(positions), _QUERIES_AT_ONCE)
        return np.concatenate(
            [
                self._attend_some(layer, past, kind.view or self._attention, some_queries, some_positions)
                for some_queries, some_positions in zip(
                    np.split(queries, starts), np.split(positions, starts), strict=True
                )
            ]
        )

    def _attend_some(
        self, layer: int, past: _Keys, view: View, queries: ComplexArray, positions: IntArray
    ) -> FloatArray:
        """Softmax attention of scaled queries [n, n_head, head_size / 2] over the keys that the view shows them."""
        query, key = positions[:, None], past.positions[None, :]
        visible = view.is_visible(query, key) & ~past.is_forgotten
        retrieval = self._retrieval if self._recall and view is self._attention else None
        if retrieval is not None and layer < retrieval.first_layer:
            retrieval = None
        if retrieval is not None and self._recall != "gated":
            visible &= retrieval.is_near(query, key, visible, self._attention.n_sink)
        # Rows of indices of the visible keys, filled up with invisible ones to the longest row.
        seen = np.argsort(~visible, axis=1, kind="stable")[:, : visible.sum(axis=1).max()]
        is_seen = np.take_along_axis(visible, seen, axis=1)[:, None, None, :]

        turned = past.rotation.turn(view.rope_distance(query, past.positions[seen]))
        keys = np.conj(past.keys[seen]) * turned[:, :, None, :]
        grouped = queries.reshape(len(queries), keys.shape[2], -1, queries.shape[-1])
        scores = softcapped(
            (grouped @ keys.transpose(0, 2, 3, 1)).real, self._transformer.architecture.attention_softcap
        )
        if self._transformer.architecture.max_alibi_bias:
            slopes = self._transformer.alibi_slopes().reshape(grouped.shape[1:3])
            scores -= slopes[:, :, None] * view.bias_distance(query, past.positions[seen])[:, None, None, :]
        scores = np.where(is_seen, scores, -np.inf)
        if retrieval is not None:
            far = self._far_scores(past, grouped, retrieval.distance)
            stored = retrieval.is_stored(query, key) & ~visible & (key >= self._attention.n_sink)
            total = np.logaddexp.reduce(scores, axis=-1)
            chosen = retrieval.chosen(far, total, stored, gated=self._recall == "gated")
            weights = softmax(np.concatenate([scores, np.where(chosen, far, -np.inf)], axis=-1))
            near, looked_up = np.split(weights, [seen.shape[1]], axis=-1)
            recalled: FloatArray = near @ past.values[seen].transpose(0, 2, 1, 3)
            recalled += looked_up @ past.values.transpose(1, 0, 2)
            return recalled.reshape(len(queries), -1)
        weights = _shares(scores, self._transformer.attention_sinks(layer))
        attended: FloatArray = weights @ past.values[seen].transpose(0, 2, 1, 3)
        return attended.reshape(len(queries), -1)

    def _far_scores(self, past: _Keys, grouped: ComplexArray, distance: int) -> FloatArray:
        """[n, n_head_kv, group, keys] scores of all keys as if they stood at one distance."""
        keys = np.conj(past.keys) * past.rotation.turn(np.array(distance))
        return softcapped((grouped @ keys.transpose(1, 2, 0)).real, self._transformer.architecture.attention_softcap)


class _Keys:
    """Un-rotated keys, as pairs, and values of one layer."""

    def __init__(self, transformer: Transformer, layer: int, n_ctx: int) -> None:
        self._transformer = transformer
        self._layer = layer
        self.rotation = transformer.rotation(layer, n_ctx)
        self.positions: IntArray = np.zeros(0, np.int64)
        self.is_forgotten: BoolArray = np.zeros(0, np.bool_)
        keys, values = transformer.keys_values(layer, transformer.embed([0]))
        self.keys, self.values = self.rotation.pairs(keys)[:0], values[:0]

    def append(self, hidden: FloatArray, positions: IntArray) -> None:
        keys, values = self._transformer.keys_values(self._layer, hidden)
        self.positions = np.concatenate([self.positions, positions])
        self.is_forgotten = np.concatenate([self.is_forgotten, np.zeros(len(positions), np.bool_)])
        self.keys = np.concatenate([self.keys, self.rotation.pairs(keys)])
        self.values = np.concatenate([self.values, values])

    def remove(self, start: int, end: int) -> None:
        kept = (self.positions < start) | (self.positions >= end)
        self.positions, self.keys, self.values = self.positions[kept], self.keys[kept], self.values[kept]
        self.is_forgotten = self.is_forgotten[kept]

    def forget(self, start: int, end: int) -> None:
        self.is_forgotten |= (self.positions >= start) & (self.positions < end)


class _Inputs:
    """All that a recurrent layer was ever given: it starts anew from the first token each time."""

    def __init__(self, transformer: Transformer, layer: int) -> None:
        self._transformer = transformer
        self._layer = layer
        self._positions: IntArray = np.zeros(0, np.int64)
        self._hidden = transformer.embed([0])[:0]

    def recur(self, hidden: FloatArray, positions: IntArray) -> FloatArray:
        """Appends tokens and returns what the layer mixes for them, [n, n_inner]."""
        self._positions = np.concatenate([self._positions, positions])
        self._hidden = np.concatenate([self._hidden, hidden])
        return self._transformer.recur(self._layer, self._hidden)[-len(hidden) :]

    def remove(self, start: int, end: int) -> None:
        kept = (self._positions < start) | (self._positions >= end)
        self._positions, self._hidden = self._positions[kept], self._hidden[kept]


def _shares(scores: FloatArray, sinks: FloatArray | None) -> FloatArray:
    """Softmax of scores [n, n_head_kv, group, keys], shared with a learned score for each head if there is one."""
    if sinks is None:
        return softmax(scores)
    column = np.broadcast_to(sinks.reshape(scores.shape[1:3])[..., None], (*scores.shape[:3], 1))
    return softmax(np.concatenate([scores, column], axis=-1))[..., :-1]


def _temperature(temperature: AttentionTemperature, position: IntArray) -> FloatArray:
    floors = np.floor((position + temperature.offset) / temperature.n_floor)
    factors: FloatArray = 1.0 + temperature.scale * np.log(1.0 + floors)
    return factors
