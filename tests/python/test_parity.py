"""The engine computes what the reference computes, at every position, however the text is cut into micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import FLASH_TOLERANCE, assert_close, evaluated, expected, pieces, stream_of
from reference import FULL_ATTENTION, Attention, TokenStream
from tiny_models import TinyModel, random_tokens

if TYPE_CHECKING:
    from conftest import OpenLlama
    from lminf_edge import Llama

SEMANTICS = {
    "clamp-at-window": Attention(4, 16, 16),
    "clamp-inside-window": Attention(4, 24, 10),
    "clamp-beyond-window": Attention(4, 16, 30),
    "no-sinks": Attention(0, 16, 16),
    "no-sinks-blocks": Attention(0, 16, 16, 4),
    "one-sink-blocks": Attention(1, 32, 32, 8),
    "blocks": Attention(4, 32, 32, 8),
    "blocks-clamp-inside-window": Attention(4, 40, 20, 10),
    "clamp-no-multiple-of-block": Attention(4, 16, 21, 6),
    "block-as-long-as-clamp": Attention(4, 16, 12, 12),
    "block-longer-than-window": Attention(4, 8, 40, 32),
    "many-sinks": Attention(16, 32, 48, 16),
    "more-sinks-than-clamp": Attention(16, 16, 8, 3),
    "more-sinks-than-window": Attention(16, 8, 24, 4),
    "window-of-one": Attention(4, 1, 8, 2),
    "wide-window": Attention(4, 64, 64, 16),
    "kept": Attention(4, 16, 19, 1, "kept"),
    "kept-blocks": Attention(4, 16, 40, 8, "kept"),
    "kept-many-sinks": Attention(16, 16, 31, 5, "kept"),
    "kept-one-sink": Attention(1, 32, 32, 16, "kept"),
}

all_semantics = pytest.mark.parametrize("name", SEMANTICS)
some_semantics = pytest.mark.parametrize("name", ["clamp-at-window", "blocks-clamp-inside-window", "kept-blocks"])


class TestOneStream:
    @all_semantics
    @pytest.mark.parametrize("n_ubatch", [1, 7, 64])
    def test_logits_equal_the_reference(
        self, open_llama: OpenLlama, head_32: TinyModel, name: str, n_ubatch: int
    ) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(head_32, SEMANTICS[name], n_ubatch=n_ubatch) as llm:
            assert_close(llm.eval(tokens), expected(head_32, SEMANTICS[name], tokens))

    @all_semantics
    def test_a_text_in_pieces_of_any_length(self, open_llama: OpenLlama, head_32: TinyModel, name: str) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(head_32, SEMANTICS[name]) as llm:
            logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
        assert_close(logits, expected(head_32, SEMANTICS[name], tokens))

    @some_semantics
    def test_a_batch_of_many_micro_batches(self, open_llama: OpenLlama, head_32: TinyModel, name: str) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(head_32, SEMANTICS[name], n_ubatch=13, n_batch=len(tokens)) as llm:
            assert_close(evaluated(llm, tokens), expected(head_32, SEMANTICS[name], tokens))

    @pytest.mark.parametrize("name", ["blocks", "clamp-inside-window", "kept-blocks", "wide-window"])
    def test_models_of_other_shapes(self, open_llama: OpenLlama, tiny_model: TinyModel, name: str) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(tiny_model, SEMANTICS[name]) as llm:
            logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
        assert_close(logits, expected(tiny_model, SEMANTICS[name], tokens))

    @all_semantics
    @pytest.mark.parametrize("n_ubatch", [1, 64])
    def test_flash_attention(self, open_llama: OpenLlama, head_32: TinyModel, name: str, n_ubatch: int) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(head_32, SEMANTICS[name], n_ubatch=n_ubatch, flash_attn=True) as llm:
            assert_close(llm.eval(tokens), expected(head_32, SEMANTICS[name], tokens), FLASH_TOLERANCE)

    @given(data=st.data())
    @settings(max_examples=60)
    def test_any_configuration(self, open_llama: OpenLlama, head_32: TinyModel, data: st.DataObject) -> None:
        attention = data.draw(attentions())
        tokens = tuple(random_tokens(data.draw(st.integers(1, 400), "n_tokens"), seed=23))
        with open_llama(head_32, attention, **data.draw(memory_options())) as llm:
            logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
        assert_close(logits, expected(head_32, attention, tokens))


class TestManyStreams:
    @some_semantics
    def test_sequences_of_different_ages_take_turns(self, open_llama: OpenLlama, head_32: TinyModel, name: str) -> None:
        texts = [tuple(random_tokens(n_tokens, seed=n_tokens)) for n_tokens in (700, 400, 90)]
        waiting = [list(pieces(text)) for text in texts]
        turns = [seq_id for seq_id, text_pieces in enumerate(waiting) for _ in text_pieces]
        np.random.default_rng(24).shuffle(turns)

        logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in texts]
        with open_llama(head_32, SEMANTICS[name], _n_seq_max=len(texts)) as llm:
            for seq_id in turns:
                logits[seq_id].append(evaluated(llm, waiting[seq_id].pop(0), seq_id))

        for seq_id, text in enumerate(texts):
            assert_close(np.concatenate(logits[seq_id]), expected(head_32, SEMANTICS[name], text))

    def test_a_sequence_begun_anew_leaves_its_neighbour_alone(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        attention = SEMANTICS["blocks"]
        first, second, third = (tuple(random_tokens(150, seed=seed)) for seed in (41, 42, 43))
        with open_llama(head_32, attention, _n_seq_max=2) as llm:
            evaluated(llm, first[:100], 0)
            evaluated(llm, second, 1)
            assert llm._context.seq_rm(1)
            again = evaluated(llm, third, 1)
            rest = evaluated(llm, first[100:], 0)
        assert_close(again, expected(head_32, attention, third))
        assert_close(rest, expected(head_32, attention, first)[100:])


class TestWithoutEnd:
    @pytest.mark.parametrize("name", ["clamp-at-window", "clamp-no-multiple-of-block", "blocks", "kept-blocks"])
    @pytest.mark.parametrize("n_ubatch", [1, 16])
    def test_a_stream_through_rebases(
        self, open_llama: OpenLlama, tiny_model: TinyModel, name: str, n_ubatch: int
    ) -> None:
        tokens = tuple(random_tokens(1500, seed=51))
        with open_llama(tiny_model, SEMANTICS[name], n_ubatch=n_ubatch, _n_rebase=1) as llm:
            logits = llm.eval(tokens)
            stats = llm.memory_stats()
        assert stats.n_rebases >= 2
        assert stats.n_past == len(tokens) > stats.pos_physical
        assert_close(logits, expected(tiny_model, SEMANTICS[name], tokens))

    @pytest.mark.parametrize("position", [10_000, 200_000_000, 2**31 - 100, 2**40 + 3])
    @pytest.mark.parametrize("name", ["clamp-at-window", "clamp-no-multiple-of-block", "many-sinks", "kept-blocks"])
    def test_a_stream_far_from_its_beginning(
        self, open_llama: OpenLlama, head_32: TinyModel, name: str, position: int
    ) -> None:
        beginning, tokens = random_tokens(100, seed=52), stream_of(SEMANTICS[name])
        reference = TokenStream(head_32.transformer, SEMANTICS[name])
        reference.eval(beginning)
        reference.move_to(position)
        with open_llama(head_32, SEMANTICS[name], n_ubatch=16) as llm:
            llm.eval(beginning)
            assert llm._context.test_set_position(position)
            assert_close(llm.eval(tokens), reference.eval(tokens))
            assert llm.n_past == position + len(tokens)

    def test_positions_beyond_32_bits_with_rebases(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        attention, position = SEMANTICS["blocks"], 2**31 - 700
        reference = TokenStream(head_32.transformer, attention)
        tokens = tuple(random_tokens(1500, seed=53))
        reference.eval(tokens[:60])
        reference.move_to(position)
        with open_llama(head_32, attention, n_ubatch=16, _n_rebase=1) as llm:
            llm.eval(tokens[:60])
            assert llm._context.test_set_position(position)
            logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
            assert llm.memory_stats().n_rebases >= 2
        assert_close(logits, reference.eval(tokens))


class TestForgetting:
    @some_semantics
    @pytest.mark.parametrize("n_past", [30, 200])
    def test_the_oldest_part_of_the_window(
        self, open_llama: OpenLlama, head_32: TinyModel, name: str, n_past: int
    ) -> None:
        attention = SEMANTICS[name]
        text, tokens = random_tokens(n_past, seed=61), random_tokens(100, seed=62)
        reference = TokenStream(head_32.transformer, attention)
        reference.eval(text)
        reference.forget(attention.n_sink, n_past - 5)
        with open_llama(head_32, attention, n_ubatch=7) as llm:
            llm.eval(text)
            assert llm._context.seq_rm(0, attention.n_sink, n_past - 5)
            assert llm.n_past == n_past
            assert_close(llm.eval(tokens), reference.eval(tokens))

    @given(data=st.data())
    @settings(max_examples=40)
    def test_any_history(self, open_llama: OpenLlama, head_32: TinyModel, data: st.DataObject) -> None:
        """Sequences that grow, lose their end or the oldest part of their window, jump and begin anew, in any order."""
        attention = data.draw(attentions())
        options = data.draw(memory_options())
        with open_llama(head_32, attention, n_batch=64, _n_seq_max=2, **options) as llm:
            pairs = [EngineAndReference(llm, seq_id, head_32, attention) for seq_id in range(2)]
            for step in range(data.draw(st.integers(2, 12), "n_steps")):
                pair = data.draw(st.sampled_from(pairs), "pair")
                change = data.draw(st.sampled_from((pair.cut, pair.forget, pair.jump, pair.begin_anew, None)), "change")
                if change is not None:
                    change(data)
                pair.append_and_compare(tuple(random_tokens(data.draw(st.integers(1, 64), "n_tokens"), seed=step)))


class EngineAndReference:
    """One sequence of the engine and its reference, changed alike."""

    def __init__(self, llm: Llama, seq_id: int, model: TinyModel, attention: Attention) -> None:
        self._llm = llm
        self._seq_id = seq_id
        self._model = model
        self._attention = attention
        self._reference = TokenStream(model.transformer, attention)
        self._is_recurrent = any(map(model.transformer.is_recurrent, range(len(model.shape.architecture.layers))))
        self._beginning = 0  # no cut goes further back: where the sequence last jumped to
        self._longest = 0  # the rollback slack counts from here

    def append_and_compare(self, tokens: tuple[int, ...]) -> None:
        assert self._llm._context.n_past(self._seq_id) == self._reference.n_past
        assert_close(evaluated(self._llm, tokens, self._seq_id), self._reference.eval(tokens))
        self._longest = max(self._longest, self._reference.n_past)

    def cut(self, data: st.DataObject) -> None:
        """Guaranteed as far back as n_rollback; further where the engine still can."""
        n_rollback = self._llm.config.n_rollback if self._llm.config else 0
        n_kept = self._reference.n_past - data.draw(st.integers(0, n_rollback + 5), "n_removed")
        n_kept = max(n_kept, self._beginning)
        if self._longest - n_kept <= n_rollback and not (self._is_recurrent and n_kept < self._reference.n_past):
            assert self._llm._context.seq_rm(self._seq_id, n_kept)
        elif not self._llm._context.seq_rm(self._seq_id, n_kept):
            return
        self._reference.remove_tail(n_kept)

    def forget(self, data: st.DataObject) -> None:
        n_sink, n_past = self._attention.n_sink, self._reference.n_past
        if n_past > n_sink + 1:
            end = data.draw(st.integers(n_sink + 1, n_past - 1), "end")
            assert self._llm._context.seq_rm(self._seq_id, n_sink, end)
            self._reference.forget(n_sink, end)

    def jump(self, data: st.DataObject) -> None:
        if self._reference.n_past >= self._attention.n_sink:
            # not far: the F32 angles of large physical positions are less exact than the tolerance
            self._beginning = self._longest = self._reference.n_past + data.draw(st.integers(0, 2000), "n_skipped")
            assert self._llm._context.test_set_position(self._beginning, self._seq_id)
            self._reference.move_to(self._beginning)

    def begin_anew(self, _: st.DataObject) -> None:
        assert self._llm._context.seq_rm(self._seq_id)
        self._beginning = self._longest = 0
        self._reference = TokenStream(self._model.transformer, self._attention)


class TestPlainAttention:
    def test_without_lminf_it_is_full_attention(self, open_llama: OpenLlama, tiny_model: TinyModel) -> None:
        tokens = tuple(random_tokens(250, seed=71))
        with open_llama(tiny_model, FULL_ATTENTION) as llm:
            assert_close(llm.eval(tokens), expected(tiny_model, FULL_ATTENTION, tokens), 1e-4)

    def test_kept_order_needs_room_for_sink_tokens_and_window(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with pytest.raises(ValueError, match="n_clamp"):
            open_llama(head_32, Attention(4, 16, 18, 1, "kept"))


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """Any valid semantics with a small window."""
    n_sink, n_window = draw(st.integers(0, 9)), draw(st.integers(1, 30))
    sink_order: Literal["clamped", "kept"] = draw(st.sampled_from(("clamped", "kept")))
    n_clamp = draw(st.integers(max(1, n_sink + n_window - 1) if sink_order == "kept" else 1, 50))
    return Attention(n_sink, n_window, n_clamp, draw(st.integers(1, n_clamp)), sink_order)


def memory_options() -> st.SearchStrategy[dict[str, Any]]:
    """What must not change the logits: micro-batches, rollback slack, frequent or rare rebases."""
    return st.fixed_dictionaries(
        {"n_ubatch": st.integers(1, 40), "n_rollback": st.integers(0, 20), "_n_rebase": st.sampled_from((0, 1))}
    )
