"""Many sequences in one context: mixed in one batch, copied, kept, cleared; each as if it were alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import OpenLlama
from lminf_edge import ConfigError, Llama, StateError
from parity import assert_close, evaluated, expected
from reference import FULL_ATTENTION, Attention, TokenStream
from tiny_models import TinyModel, random_tokens

ATTENTION = Attention(n_sink=4, n_window=24, n_clamp=20, n_block=5)
N_SEQUENCES = 8


def eval_batch(llm: Llama, tokens: list[int], seq_ids: list[int]) -> npt.NDArray[np.float32]:
    logits = np.empty((len(tokens), llm.n_vocab), np.float32)
    llm._context.eval_batch(np.array(tokens, np.int32), np.array(seq_ids, np.int32), logits)
    return logits


class TestOneBatch:
    @given(data=st.data())
    @settings(max_examples=15)
    def test_eight_sequences_of_any_ages_in_any_order(
        self, open_llama: OpenLlama, head_32: TinyModel, data: st.DataObject
    ) -> None:
        """Sequences that began at very different times; their tokens stand in one batch in any order."""
        texts = [tuple(random_tokens(300, seed=seq_id)) for seq_id in range(N_SEQUENCES)]
        ages = data.draw(st.lists(st.integers(0, 200), min_size=N_SEQUENCES, max_size=N_SEQUENCES), "ages")
        n_ubatch = data.draw(st.sampled_from((1, 8, 40)), "n_ubatch")
        with open_llama(head_32, ATTENTION, n_ubatch=n_ubatch, n_batch=256, _n_seq_max=N_SEQUENCES) as llm:
            for seq_id, age in enumerate(ages):
                if age:
                    evaluated(llm, texts[seq_id][:age], seq_id)
            n_past = list(ages)
            for _ in range(data.draw(st.integers(1, 4), "n_batches")):
                order = data.draw(st.lists(st.integers(0, N_SEQUENCES - 1), min_size=1, max_size=60), "order")
                positions = []
                for seq_id in order:
                    positions.append(min(n_past[seq_id], 299))
                    n_past[seq_id] += 1
                if max(n_past) >= 300:
                    break
                tokens = [texts[seq_id][position] for seq_id, position in zip(order, positions, strict=True)]
                logits = eval_batch(llm, tokens, order)
                references = [
                    expected(head_32, ATTENTION, texts[seq_id])[position]
                    for seq_id, position in zip(order, positions, strict=True)
                ]
                assert_close(logits, np.stack(references))

    def test_a_batch_for_a_sequence_that_there_is_not(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, _n_seq_max=2) as llm:
            with pytest.raises(ValueError, match="seq_id = 2"):
                eval_batch(llm, [1, 2], [0, 2])
            assert llm.n_past == 0

    def test_an_array_that_would_be_converted_is_refused(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        """The logits would end in a copy that nobody sees."""
        with open_llama(head_32, ATTENTION, _n_seq_max=2) as llm:
            tokens, shape = np.array([1, 2], np.int32), (2, llm.n_vocab)
            for out in (np.empty(shape), np.empty(shape, np.float32, order="F")):
                with pytest.raises(TypeError):
                    llm._context.eval_batch(tokens, tokens * 0, out)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                llm._context.eval_batch(tokens, np.zeros(2), np.empty(shape, np.float32))  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                llm._context.set_state(b"", np.zeros(llm.n_vocab))  # type: ignore[arg-type]
            assert llm.n_past == 0


class TestCopies:
    @pytest.mark.parametrize("attention", [ATTENTION, FULL_ATTENTION])
    def test_a_copy_does_not_keep_the_logits_of_what_it_replaces(
        self, open_llama: OpenLlama, head_32: TinyModel, attention: Attention
    ) -> None:
        with open_llama(head_32, attention, _n_seq_max=2) as llm:
            evaluated(llm, (1, 2, 3), 0)
            evaluated(llm, (4, 5), 1)
            llm._context.seq_cp(0, 1)
            with pytest.raises(StateError, match="no logits"):
                llm._context.last_logits(1)
            last = evaluated(llm, (6,), 0)[-1]
            llm._context.seq_cp(0, 1)
            np.testing.assert_array_equal(llm._context.last_logits(0), last)

    @pytest.mark.parametrize("attention", [ATTENTION, FULL_ATTENTION])
    def test_a_copy_of_nothing_is_refused(
        self, open_llama: OpenLlama, head_32: TinyModel, attention: Attention
    ) -> None:
        with open_llama(head_32, attention, _n_seq_max=2) as llm:
            evaluated(llm, (1, 2, 3), 1)
            for source in (-1, 2, 1000):
                with pytest.raises(ConfigError, match=f"seq_id = {source}"):
                    llm._context.seq_cp(source, 1)
            assert llm._context.n_past(1) == 3

    def test_llama_cpp_copies_whole_sequences_only(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        text = tuple(random_tokens(20, seed=3))
        with open_llama(head_32, FULL_ATTENTION, _n_seq_max=2) as llm:
            evaluated(llm, text, 0)
            for p0, p1 in ((1, -1), (-1, 19), (5, 10)):
                with pytest.raises(ConfigError, match="whole sequences"):
                    llm._context.seq_cp(0, 1, p0, p1)
            assert llm._context.n_past(1) == 0
            llm._context.seq_cp(0, 1, 0, 20)
            np.testing.assert_allclose(evaluated(llm, (7, 8), 1), evaluated(llm, (7, 8), 0), atol=1e-5)

    @pytest.mark.parametrize("n_past", [2, 20, 150])
    def test_a_copy_goes_on_as_the_sequence_itself(
        self, open_llama: OpenLlama, head_32: TinyModel, n_past: int
    ) -> None:
        text = tuple(random_tokens(n_past, seed=31))
        tails = [tuple(random_tokens(90, seed=32 + seq_id)) for seq_id in range(3)]
        with open_llama(head_32, ATTENTION, _n_seq_max=3) as llm:
            evaluated(llm, tails[0], 2)  # what a copy replaces
            evaluated(llm, text, 0)
            for target in (1, 2):
                llm._context.seq_cp(0, target)
                assert llm._context.stats(target).n_past == n_past
            for seq_id, tail in enumerate(tails):
                assert_close(evaluated(llm, tail, seq_id), expected(head_32, ATTENTION, text + tail)[n_past:])

    def test_a_copy_of_the_beginning(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        text, tail = tuple(random_tokens(150, seed=41)), tuple(random_tokens(90, seed=42))
        with open_llama(head_32, ATTENTION, n_rollback=10, _n_seq_max=2) as llm:
            evaluated(llm, text, 0)
            llm._context.seq_cp(0, 1, 0, 60)  # its window is gone: nothing happens
            assert llm._context.stats(1).n_past == 0
            llm._context.seq_cp(0, 1, 0, 145)
            assert_close(evaluated(llm, tail, 1), expected(head_32, ATTENTION, text[:145] + tail)[145:])
            assert_close(evaluated(llm, tail, 0), expected(head_32, ATTENTION, text + tail)[150:])

    def test_what_was_forgotten_stays_forgotten_in_a_copy(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        text, tail = random_tokens(100, seed=43), random_tokens(60, seed=44)
        reference = TokenStream(head_32.transformer, ATTENTION)
        reference.eval(text)
        reference.forget(4, 95)
        with open_llama(head_32, ATTENTION, _n_seq_max=2) as llm:
            evaluated(llm, tuple(text), 0)
            assert llm._context.seq_rm(0, 4, 95)
            llm._context.seq_cp(0, 1)
            assert_close(evaluated(llm, tuple(tail), 1), reference.eval(tail))


class TestKeepAndClear:
    def test_one_sequence_is_kept(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        texts = [tuple(random_tokens(160, seed=51 + seq_id)) for seq_id in range(3)]
        with open_llama(head_32, ATTENTION, _n_seq_max=3) as llm:
            for seq_id, text in enumerate(texts):
                evaluated(llm, text[:100], seq_id)
            llm._context.seq_keep(1)
            assert [llm._context.stats(seq_id).n_past for seq_id in range(3)] == [0, 100, 0]
            assert_close(evaluated(llm, texts[1][100:], 1), expected(head_32, ATTENTION, texts[1])[100:])
            assert_close(evaluated(llm, texts[2], 0), expected(head_32, ATTENTION, texts[2]))

    def test_all_are_cleared(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        text = tuple(random_tokens(120, seed=55))
        with open_llama(head_32, ATTENTION, _n_seq_max=2) as llm:
            evaluated(llm, text, 0)
            evaluated(llm, text[:50], 1)
            llm._context.clear()
            for seq_id in range(2):
                assert_close(evaluated(llm, text, seq_id), expected(head_32, ATTENTION, text))
