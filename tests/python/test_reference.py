"""The reference says what docs/semantics.md says, on examples small enough to check by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import FULL_ATTENTION, Attention, Chunks, Rope, SlidingWindow, TokenStream, Transformer
from reference.rotation import rotation
from tiny_models import HEAD_32, TIED, TinyModel, random_tokens, write_tiny_model


def visible_keys(attention: Attention, query: int) -> list[int]:
    keys = np.arange(query + 5)
    visible: list[int] = keys[attention.is_visible(np.array(query), keys)].tolist()
    return visible


def sink_positions(attention: Attention, query: int) -> list[int]:
    positions: list[int] = attention.effective_position(np.array(query), np.arange(attention.n_sink)).tolist()
    return positions


class TestVisibility:
    @pytest.mark.parametrize(
        ("query", "keys"),
        [(0, [0]), (1, [0, 1]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 3, 4, 5]), (9, [0, 1, 7, 8, 9])],
    )
    def test_a_query_sees_the_sink_tokens_and_its_window(self, query: int, keys: list[int]) -> None:
        assert visible_keys(Attention(n_sink=2, n_window=3), query) == keys

    def test_without_sink_tokens_there_is_only_the_window(self) -> None:
        assert visible_keys(Attention(n_sink=0, n_window=3), 9) == [7, 8, 9]

    def test_a_window_of_one_is_the_token_itself(self) -> None:
        assert visible_keys(Attention(n_sink=1, n_window=1), 9) == [0, 9]

    def test_full_attention_sees_the_whole_past(self) -> None:
        assert visible_keys(FULL_ATTENTION, 4) == [0, 1, 2, 3, 4]


class TestEffectivePosition:
    @pytest.mark.parametrize(
        ("query", "positions"),
        [(8, [0, 1, 2]), (9, [1, 1, 2]), (10, [2, 2, 2]), (11, [3, 3, 3]), (20, [12, 12, 12])],
    )
    def test_the_clamp_gathers_far_sink_tokens_at_one_distance(self, query: int, positions: list[int]) -> None:
        assert sink_positions(Attention(n_sink=3, n_window=4, n_clamp=8), query) == positions

    @pytest.mark.parametrize(
        ("query", "positions"),
        [(7, [0, 1, 2]), (8, [3, 3, 3]), (11, [3, 3, 3]), (12, [7, 7, 7]), (20, [15, 15, 15]), (23, [15, 15, 15])],
    )
    def test_one_block_of_queries_shares_one_placement(self, query: int, positions: list[int]) -> None:
        assert sink_positions(Attention(n_sink=3, n_window=4, n_clamp=8, n_block=4), query) == positions

    @pytest.mark.parametrize(
        ("query", "positions"),
        [(7, [0, 1, 2]), (8, [3, 4, 5]), (11, [3, 4, 5]), (12, [7, 8, 9]), (23, [15, 16, 17])],
    )
    def test_kept_order_moves_all_sink_tokens_alike(self, query: int, positions: list[int]) -> None:
        kept = Attention(n_sink=3, n_window=4, n_clamp=8, n_block=4, sink_order="kept")
        assert sink_positions(kept, query) == positions

    def test_the_end_of_a_block_sees_far_sink_tokens_at_exactly_the_limit(self) -> None:
        attention = Attention(n_sink=4, n_window=16, n_clamp=10, n_block=5)
        distances = attention.rope_distance(np.arange(40, 45)[:, None], np.arange(4)[None, :])
        assert distances.tolist() == [[6] * 4, [7] * 4, [8] * 4, [9] * 4, [10] * 4]

    def test_window_keys_keep_their_true_distance(self) -> None:
        attention = Attention(n_sink=2, n_window=8, n_clamp=4, n_block=2)
        assert attention.rope_distance(np.array(50), np.arange(43, 51)).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]

    def test_without_a_clamp_every_key_keeps_its_true_distance(self) -> None:
        assert Attention(n_sink=2, n_window=8).rope_distance(np.array(50), np.arange(2)).tolist() == [50, 49]

    @given(
        n_sink=st.integers(0, 20),
        n_window=st.integers(1, 40),
        n_clamp=st.integers(1, 40),
        block=st.integers(0, 39),
        query=st.integers(0, 2**40),
    )
    def test_no_query_sees_a_distance_beyond_the_larger_of_clamp_and_window(
        self, n_sink: int, n_window: int, n_clamp: int, block: int, query: int
    ) -> None:
        attention = Attention(n_sink, n_window, n_clamp, n_block=1 + block % n_clamp)
        keys = np.unique(np.maximum(0, np.concatenate([np.arange(n_sink), np.arange(query - n_window, query + 1)])))
        seen = keys[attention.is_visible(np.array(query), keys)]
        distances = attention.rope_distance(np.array(query), seen)
        assert distances.min() >= 0
        assert distances.max() <= max(n_clamp, n_window - 1)

    def test_the_bias_distance_ends_at_the_limit_whatever_the_block(self) -> None:
        attention = Attention(n_sink=2, n_window=12, n_clamp=8, n_block=4)
        assert attention.bias_distance(np.array(20), np.array([0, 1, 9, 12, 13, 20])).tolist() == [8, 8, 8, 8, 7, 0]

    def test_the_attention_temperature_stops_rising_at_the_limit(self) -> None:
        assert Attention(n_window=4, n_clamp=8).temperature_position(np.array([0, 7, 8, 9])).tolist() == [0, 7, 8, 8]
        assert FULL_ATTENTION.temperature_position(np.array([0, 1000])).tolist() == [0, 1000]

    @pytest.mark.parametrize(
        ("n_window", "n_clamp", "n_ctx"),
        [(16, 16, 16), (16, 8, 16), (16, 99, 99), (16, 2000, 1024), (None, None, 1024)],
    )
    def test_the_distances_that_are_seen_decide_the_context_length(
        self, n_window: int | None, n_clamp: int | None, n_ctx: int
    ) -> None:
        assert Attention(4, n_window, n_clamp).n_ctx(1024) == n_ctx


class TestLayersOfTheirOwn:
    @pytest.mark.parametrize(
        ("view", "keys"), [(SlidingWindow(3), [7, 8, 9]), (Chunks(4), [8, 9]), (Chunks(10), list(range(10)))]
    )
    def test_a_layer_sees_what_the_model_says_at_true_distances(
        self, view: SlidingWindow | Chunks, keys: list[int]
    ) -> None:
        positions = np.arange(14)
        assert positions[view.is_visible(np.array(9), positions)].tolist() == keys
        assert view.rope_distance(np.array(9), np.array(2)) == 7


class TestRotation:
    def test_pairs_are_neighbours_or_half_the_rotated_part_apart(self) -> None:
        normal, neox = (rotation(Rope(4, order=order), 6) for order in ("normal", "neox"))
        assert list(zip(normal.first, normal.second, strict=True)) == [(0, 1), (2, 3), (4, 5)]
        assert list(zip(neox.first, neox.second, strict=True)) == [(0, 2), (1, 3), (4, 5)]

    def test_what_is_not_rotated_does_not_turn(self) -> None:
        turned = rotation(Rope(4, base=100.0, scale=0.5, offset=2), 6).turn(np.array([3]))
        np.testing.assert_allclose(turned[0], np.exp(1j * np.array([1.5, 0.15, 0.0])))

    def test_yarn_leaves_fast_pairs_alone_and_interpolates_slow_ones(self) -> None:
        yarn, plain = rotation(Rope(64, scale=0.25, yarn=True, n_ctx_orig=4096), 64), rotation(Rope(64), 64)
        ratio = yarn.frequencies / plain.frequencies
        assert ratio[0] == 1.0
        assert ratio[-1] == 0.25
        assert (np.diff(ratio) <= 0.0).all()
        np.testing.assert_allclose(yarn.magnitudes, 1.0 + 0.1 * np.log(4.0))

    def test_factors_divide_the_angles(self) -> None:
        np.testing.assert_allclose(rotation(Rope(4, base=100.0), 4, np.array([2.0, 5.0])).frequencies, [0.5, 0.02])

    @pytest.mark.parametrize(
        ("n_head", "slopes"), [(4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]), (3, [1 / 16, 1 / 256, 1 / 4])]
    )
    def test_alibi_slopes(self, head_32: TinyModel, n_head: int, slopes: list[float]) -> None:
        architecture = replace(head_32.shape.architecture, n_head=n_head, max_alibi_bias=8.0)
        np.testing.assert_allclose(Transformer(head_32.weights, architecture).alibi_slopes(), slopes)


class TestTokenStream:
    def test_attention_is_the_textbook_formula(self, head_32: TinyModel) -> None:
        """One layer of attention, key by key with rotation matrices, gives the same hidden state."""
        attention = Attention(n_sink=2, n_window=4, n_clamp=5, n_block=2)
        one_layer = {name: tensor for name, tensor in head_32.weights.items() if not name.startswith("blk.1.")}
        model = TinyModel(head_32.path, replace(head_32.shape, n_layer=1), one_layer).transformer
        tokens = random_tokens(12, seed=3)

        embedded, rotation, n_head, head_size = model.embed(tokens), model.rotation(0), 4, 32
        queries = rotation.pairs(model.queries(0, embedded))
        key_components, values = model.keys_values(0, embedded)
        keys = rotation.pairs(key_components)
        attended = np.zeros((len(tokens), n_head, head_size))
        for query, head in np.ndindex(len(tokens), n_head):
            kv_head = head // 2
            seen = visible_keys(attention, query)
            at = attention.effective_position(np.array(query), np.array(seen))
            turned_query = rotated(queries[query, head], query, rotation.frequencies)
            scores = [
                turned_query @ rotated(keys[key, kv_head], position, rotation.frequencies) / np.sqrt(head_size)
                for key, position in zip(seen, at, strict=True)
            ]
            weights = np.exp(scores) / np.exp(scores).sum()
            attended[query, head] = weights @ values[seen, kv_head]
        expected = model.logits(model.after_attention(0, embedded, attended.reshape(len(tokens), -1)))

        np.testing.assert_allclose(TokenStream(model, attention).eval(tokens), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("sink_order", ["clamped", "kept"])
    def test_a_window_and_clamp_beyond_the_text_are_full_attention(self, head_32: TinyModel, sink_order: Any) -> None:
        tokens = random_tokens(60, seed=4)
        attention = Attention(n_sink=4, n_window=60, n_clamp=63, n_block=8, sink_order=sink_order)
        full = TokenStream(head_32.transformer).eval(tokens)
        np.testing.assert_allclose(TokenStream(head_32.transformer, attention).eval(tokens), full, rtol=0, atol=1e-12)

    def test_splitting_a_text_changes_nothing(self, head_32: TinyModel) -> None:
        attention = Attention(n_sink=4, n_window=8, n_clamp=10, n_block=3)
        tokens = random_tokens(50, seed=5)
        stream = TokenStream(head_32.transformer, attention)
        parts = np.concatenate([stream.eval(part) for part in (tokens[:1], tokens[1:8], tokens[8:])])
        whole = TokenStream(head_32.transformer, attention).eval(tokens)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)

    def test_only_relative_positions_count_once_all_sink_tokens_are_far(self, head_32: TinyModel) -> None:
        attention = Attention(n_sink=4, n_window=8, n_clamp=10, n_block=5)
        near, far = (
            continued_at(head_32, attention, position, random_tokens(20, seed=6)) for position in (100, 5 * 2**40)
        )
        np.testing.assert_allclose(near, far, rtol=0, atol=1e-12)

    def test_a_stream_moved_on_sees_its_sink_tokens_and_nothing_else(self, head_32: TinyModel) -> None:
        """The same as a stream whose window has only just begun: nothing between sink tokens and position 100."""
        attention = Attention(n_sink=4, n_window=8, n_clamp=10)
        tokens = random_tokens(20, seed=6)
        stream = TokenStream(head_32.transformer, attention)
        stream.eval(random_tokens(100, seed=7))
        stream.forget(4, 100)
        np.testing.assert_allclose(
            stream.eval(tokens), continued_at(head_32, attention, 100, tokens), rtol=0, atol=1e-12
        )

    def test_a_tail_taken_back_leaves_no_trace(self, head_32: TinyModel) -> None:
        attention = Attention(n_sink=4, n_window=8, n_clamp=10, n_block=3)
        text, other, tail = random_tokens(30, seed=8), random_tokens(7, seed=9), random_tokens(20, seed=10)
        stream = TokenStream(head_32.transformer, attention)
        stream.eval(text)
        stream.eval(other)
        stream.remove_tail(30)
        again = stream.eval(tail)
        straight = TokenStream(head_32.transformer, attention).eval(text + tail)[30:]
        np.testing.assert_allclose(again, straight, rtol=0, atol=1e-12)


class TestTinyModels:
    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param({"n_window": 65}, id="window+1"),
            pytest.param({"n_window": 63}, id="window-1"),
            pytest.param({"n_clamp": 65}, id="clamp+1"),
            pytest.param({"n_clamp": 63}, id="clamp-1"),
            pytest.param({"n_block": 1}, id="no-blocks"),
            pytest.param({"n_block": 5}, id="block+1"),
            pytest.param({"n_clamp": None}, id="mask-only"),
            pytest.param({"n_sink": 5}, id="sink+1"),
            pytest.param({"n_sink": 3}, id="sink-1"),
            pytest.param({"n_clamp": 68, "sink_order": "kept"}, id="kept-order"),
        ],
    )
    def test_wrong_semantics_move_the_logits_at_every_position(
        self, tiny_model: TinyModel, wrong: dict[str, Any]
    ) -> None:
        """By ten times the tolerance of the parity tests, so that those cannot pass by luck."""
        right = Attention(n_sink=4, n_window=64, n_clamp=64, n_block=4)
        tokens = random_tokens(640, seed=11)
        expected = TokenStream(tiny_model.transformer, right).eval(tokens)
        got = TokenStream(tiny_model.transformer, replace(right, **wrong)).eval(tokens)
        assert np.abs(got - expected).max(axis=1)[128:].min() > 0.01

    @pytest.mark.parametrize("weight_type", ["f32", "f16"])
    def test_the_same_seed_writes_the_same_bytes(self, tmp_path: Path, weight_type: str) -> None:
        first, second, other = (
            write_tiny_model(tmp_path / f"{i}.gguf", TIED, seed=seed, weight_type=weight_type).path.read_bytes()
            for i, seed in enumerate((1, 1, 2))
        )
        assert first == second
        assert first != other

    def test_the_weights_are_those_of_the_file(self, tmp_path: Path) -> None:
        model = write_tiny_model(tmp_path / "half.gguf", HEAD_32, seed=1, weight_type="f16")
        matrix = model.weights["blk.0.attn_q.weight"]
        assert np.array_equal(matrix, matrix.astype(np.float16).astype(np.float32))


def rotated(
    pairs: npt.NDArray[np.complex128], position: int, frequencies: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Components of a head after RoPE, each pair turned by its rotation matrix."""
    turned = []
    for pair, angle in zip(pairs, position * frequencies, strict=True):
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turned.append(rotation @ [pair.real, pair.imag])
    return np.concatenate(turned)


def continued_at(model: TinyModel, attention: Attention, position: int, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Logits of tokens from the given position on, after 100 tokens of which only the sink tokens remain."""
    stream = TokenStream(model.transformer, attention)
    stream.eval(random_tokens(100, seed=7))
    stream.move_to(position)
    return stream.eval(tokens)
