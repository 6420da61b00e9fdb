"""Every kind of model: plain llama.cpp agrees with the reference, and so does the engine with LM-Infinite."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge import Llama, LMInfConfig, UnsupportedModelError
from parity import TOLERANCE, assert_close, evaluated, expected, pieces, stream_of
from reference import FULL_ATTENTION, Attention, TokenStream, Transformer
from test_parity import EngineAndReference, attentions, memory_options
from tiny_families import ALIBI, FAMILIES, N_SWA, REFUSED, SLIDING_AND_FULL
from tiny_models import TinyModel, random_tokens, write_tiny_model
from tiny_others import write_other_model

if TYPE_CHECKING:
    from conftest import OpenLlama

PLAIN_TOLERANCE = 1e-4
"""Largest logit difference allowed between llama.cpp without LM-Infinite and the reference."""

SEMANTICS = {
    "clamp-at-window": Attention(4, 16, 16),
    "blocks": Attention(4, 24, 20, 5),
    "window-inside-sliding-one": Attention(9, N_SWA - 4, 40, 16),
    "kept": Attention(4, 16, 40, 8, "kept"),
}


def _cases(semantics: list[str]) -> pytest.MarkDecorator:
    """Families times semantics, without what has no meaning: ALiBi's distances have no order to keep."""
    pairs = [(family, name) for family in FAMILIES for name in semantics]
    valid = [(family, name) for family, name in pairs if not (family in ALIBI and name == "kept")]
    return pytest.mark.parametrize(("family", "name"), valid, indirect=["family"])


all_cases = _cases(list(SEMANTICS))
one_case_each = _cases(["blocks"])

CACHE_TYPES = ["f16", "q8_0", "q4_0"]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, model_files: Path) -> TinyModel:
    """Each kind of model in turn."""
    return _written(model_files, request.param)


@cache
def _written(folder: Path, name: str) -> TinyModel:
    return write_tiny_model(folder / f"{name}.gguf", FAMILIES[name], seed=1)


class TestWithoutLMInfinite:
    def test_llama_cpp_agrees_with_the_reference(self, open_llama: OpenLlama, family: TinyModel) -> None:
        tokens = tuple(random_tokens(60, seed=81))
        assert len(tokens) > 4 * N_SWA
        with open_llama(family, FULL_ATTENTION) as llm:
            logits = np.concatenate([llm.eval(tokens[:7]), llm.eval(tokens[7:50]), llm.eval(tokens[50:])])
        assert_close(logits, expected(family, FULL_ATTENTION, tokens), PLAIN_TOLERANCE)

    @pytest.mark.parametrize("family", ["phi3"], indirect=True)
    @pytest.mark.parametrize("n_ctx", [256, 512])
    def test_the_context_decides_between_short_and_long_factors(
        self, open_llama: OpenLlama, family: TinyModel, n_ctx: int
    ) -> None:
        tokens = random_tokens(60, seed=82)
        with open_llama(family, FULL_ATTENTION, n_ctx=n_ctx) as llm:
            assert_close(llm.eval(tokens), TokenStream(family.transformer, n_ctx=n_ctx).eval(tokens), PLAIN_TOLERANCE)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["llama4"], indirect=True)
    def test_chunks_end_and_the_temperature_rises(self, open_llama: OpenLlama, family: TinyModel) -> None:
        tokens = random_tokens(8192 + 20, seed=83)
        with open_llama(family, FULL_ATTENTION, n_ubatch=512) as llm:
            llm.eval(tokens[:-40])
            logits = llm.eval(tokens[-40:])
        assert_close(logits, TokenStream(family.transformer).eval(tokens)[-40:])


class TestParity:
    @all_cases
    @pytest.mark.parametrize("n_ubatch", [7, 64])
    def test_a_stream_of_twenty_windows(
        self, open_llama: OpenLlama, family: TinyModel, name: str, n_ubatch: int
    ) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(family, SEMANTICS[name], n_ubatch=n_ubatch) as llm:
            logits = np.concatenate([llm.eval(piece) for piece in pieces(tokens)])
        assert_close(logits, expected(family, SEMANTICS[name], tokens))

    @one_case_each
    def test_token_by_token(self, open_llama: OpenLlama, family: TinyModel, name: str) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(family, SEMANTICS[name], n_ubatch=1) as llm:
            assert_close(llm.eval(tokens), expected(family, SEMANTICS[name], tokens))

    @one_case_each
    def test_through_rebases(self, open_llama: OpenLlama, family: TinyModel, name: str) -> None:
        tokens = stream_of(SEMANTICS[name])
        with open_llama(family, SEMANTICS[name], n_ubatch=16, _n_rebase=1) as llm:
            logits = llm.eval(tokens)
        assert_close(logits, expected(family, SEMANTICS[name], tokens))

    @one_case_each
    def test_far_from_the_beginning(self, open_llama: OpenLlama, family: TinyModel, name: str) -> None:
        """Across a multiple of 8192, where chunks of llama4 end."""
        position = 30_000 * 8192 - 70
        beginning, tokens = random_tokens(100, seed=84), random_tokens(200, seed=85)
        reference = TokenStream(family.transformer, SEMANTICS[name])
        reference.eval(beginning)
        reference.move_to(position)
        with open_llama(family, SEMANTICS[name], n_ubatch=16) as llm:
            llm.eval(beginning)
            assert llm._context.test_set_position(position)
            assert_close(llm.eval(tokens), reference.eval(tokens))

    @one_case_each
    def test_two_sequences_take_turns(self, open_llama: OpenLlama, family: TinyModel, name: str) -> None:
        texts = [tuple(random_tokens(n_tokens, seed=n_tokens)) for n_tokens in (240, 150)]
        with open_llama(family, SEMANTICS[name], _n_seq_max=2) as llm:
            turns = [
                (seq_id, start) for start in range(0, 240, 30) for seq_id in range(2) if start < len(texts[seq_id])
            ]
            logits = {turn: evaluated(llm, texts[turn[0]][turn[1] : turn[1] + 30], turn[0]) for turn in turns}
        for seq_id, text in enumerate(texts):
            parts = [logits[seq_id, start] for start in range(0, len(text), 30)]
            assert_close(np.concatenate(parts), expected(family, SEMANTICS[name], text))

    @pytest.mark.parametrize("family", ["phi3"], indirect=True)
    @pytest.mark.parametrize("n_clamp", [256, 257, 1000])
    def test_the_clamp_decides_between_short_and_long_factors(
        self, open_llama: OpenLlama, family: TinyModel, n_clamp: int
    ) -> None:
        """Not the cells that the engine needs: long factors for a clamp beyond the original context of 256."""
        attention = Attention(4, 16, n_clamp, 8)
        tokens = tuple(random_tokens(400, seed=86))
        with open_llama(family, attention) as llm:
            assert_close(llm.eval(tokens), expected(family, attention, tokens))


def has_recurrent_layers(model: TinyModel) -> bool:
    return any(map(model.transformer.is_recurrent, range(len(model.shape.architecture.layers))))


class TestRemoving:
    @one_case_each
    @pytest.mark.parametrize("n_removed", [1, 8])
    def test_a_tail_taken_back_leaves_no_trace(
        self, open_llama: OpenLlama, family: TinyModel, name: str, n_removed: int
    ) -> None:
        text, tail = tuple(random_tokens(200, seed=87)), tuple(random_tokens(60, seed=88))
        n_kept = len(text) - n_removed
        with open_llama(family, SEMANTICS[name], n_ubatch=16, n_rollback=8) as llm:
            llm.eval(text)
            if has_recurrent_layers(family):  # refused, and nothing has changed
                assert not llm._context.seq_rm(0, n_kept)
                n_kept = len(text)
            else:
                assert llm._context.seq_rm(0, n_kept)
            assert llm.n_past == n_kept
            logits = llm.eval(tail)
        assert_close(logits, expected(family, SEMANTICS[name], text[:n_kept] + tail)[n_kept:])

    @one_case_each
    def test_the_oldest_part_of_the_window(self, open_llama: OpenLlama, family: TinyModel, name: str) -> None:
        attention = SEMANTICS[name]
        text, tail = random_tokens(200, seed=89), random_tokens(60, seed=90)
        reference = TokenStream(family.transformer, attention)
        reference.eval(text)
        reference.forget(attention.n_sink, 195)
        with open_llama(family, attention, n_ubatch=16) as llm:
            llm.eval(text)
            assert llm._context.seq_rm(0, attention.n_sink, 195)
            assert_close(llm.eval(tail), reference.eval(tail))


class TestAnything:
    @given(data=st.data())
    @settings(max_examples=100)
    def test_any_history(self, open_llama: OpenLlama, model_files: Path, data: st.DataObject) -> None:
        """Two sequences of any kind of model that grow, lose their end or oldest part, jump and begin anew."""
        model = _written(model_files, data.draw(st.sampled_from(sorted(FAMILIES)), "family"))
        attention = data.draw(attentions())
        if model.shape.architecture.max_alibi_bias:
            attention = replace(attention, sink_order="clamped")
        options = data.draw(memory_options())
        with open_llama(model, attention, n_batch=64, _n_seq_max=2, **options) as llm:
            pairs = [EngineAndReference(llm, seq_id, model, attention) for seq_id in range(2)]
            for step in range(data.draw(st.integers(2, 8), "n_steps")):
                pair = data.draw(st.sampled_from(pairs), "pair")
                change = data.draw(st.sampled_from((pair.cut, pair.forget, pair.jump, pair.begin_anew, None)), "change")
                if change is not None:
                    change(data)
                pair.append_and_compare(tuple(random_tokens(data.draw(st.integers(1, 64), "n_tokens"), seed=step)))


class TestCacheTypes:
    @one_case_each
    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    def test_rounding_costs_what_it_costs_llama_cpp(
        self, open_llama: OpenLlama, family: TinyModel, name: str, cache_type: str
    ) -> None:
        """In a stream of 20 windows as in short texts in plain llama.cpp, against the exact logits of either.

        The error of single logits is random, so root mean squares are compared, and their median over the tokens:
        where rounding sends a token to another expert of a mixture, its logits say nothing. Measured, the two differ
        by a tenth, with mixtures of experts by up to two thirds.
        """

        def error(attention: Attention, texts: list[tuple[int, ...]]) -> float:
            with open_llama(family, attention, n_ubatch=16, cache_type=cache_type, flash_attn=True) as llm:
                errors = []
                for text in texts:
                    llm.reset()
                    errors.append(llm.eval(text) - expected(family, attention, text))
            return float(np.median(np.sqrt(np.mean(np.concatenate(errors) ** 2, axis=1))))

        tokens = stream_of(SEMANTICS[name])
        short_texts = [tokens[start : start + 60] for start in range(0, len(tokens), 60)]
        assert error(SEMANTICS[name], [tokens]) < 2 * error(FULL_ATTENTION, short_texts)


class TestSensitivity:
    """No test here passes by luck: what it could get wrong moves the logits by ten times the tolerance."""

    @one_case_each
    @pytest.mark.parametrize(
        "wrong", [{"n_window": 25}, {"n_window": 23}, {"n_sink": 3}, {"n_sink": 5}], ids=lambda wrong: str(wrong)
    )
    def test_a_wrong_mask(self, family: TinyModel, name: str, wrong: dict[str, Any]) -> None:
        assert deviation(family, replace(SEMANTICS[name], **wrong)) > 10 * TOLERANCE

    @one_case_each
    @pytest.mark.parametrize(
        "wrong", [{"n_clamp": 19}, {"n_clamp": 21}, {"n_clamp": None}, {"n_block": 1}], ids=lambda wrong: str(wrong)
    )
    def test_a_wrong_distance(self, family: TinyModel, name: str, wrong: dict[str, Any]) -> None:
        """Where distances count at all: cohere2 and llama4 have full layers without positions; ALiBi has no blocks."""
        architecture = family.shape.architecture
        full = [layer for layer in architecture.layers if layer.view is None]
        blocks_only = set(wrong) == {"n_block"}
        has_distances = any(layer.rope for layer in full) or (architecture.max_alibi_bias > 0 and not blocks_only)
        moved = deviation(family, replace(SEMANTICS[name], **wrong))
        assert moved > 10 * TOLERANCE if has_distances else moved == 0.0

    @pytest.mark.parametrize("family", SLIDING_AND_FULL, indirect=True)
    def test_sliding_layers_are_no_full_ones(self, family: TinyModel) -> None:
        tokens = tuple(random_tokens(100, seed=91))
        layers = tuple(replace(layer, view=None) for layer in family.shape.architecture.layers)
        other = Transformer(family.weights, replace(family.shape.architecture, layers=layers))
        moved = np.abs(TokenStream(other).eval(tokens) - expected(family, FULL_ATTENTION, tokens)).max()
        assert moved > 10 * TOLERANCE if family.shape.arch != "llama4" else moved == 0.0


class TestRefused:
    """Llama() says which model it does not support, and why, before anything is computed."""

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gpt2", "learned"),
            ("mpt-with-positions", "learned"),
            ("dream", "causal|diffusion"),
            ("mamba", "recurrent"),
            ("rwkv6", "recurrent"),
            ("bert", "encoder|causal"),
            ("t5", "encoder"),
        ],
    )
    def test_the_reason_is_named(self, tmp_path: Path, name: str, reason: str) -> None:
        path = tmp_path / f"{name}.gguf"
        if name in REFUSED:
            write_tiny_model(path, REFUSED[name], seed=1)
        else:
            write_other_model(path, name)
        with pytest.raises(UnsupportedModelError, match=reason) as raised:
            Llama(path, lminf=LMInfConfig(n_sink=4, n_window=16))
        assert name.split("-")[0] in str(raised.value)


def deviation(model: TinyModel, wrong: Attention) -> float:
    """Largest difference that wrong semantics make to the logits."""
    tokens = stream_of(SEMANTICS["blocks"])
    right = expected(model, SEMANTICS["blocks"], tokens)
    return float(np.abs(TokenStream(model.transformer, wrong).eval(tokens) - right).max())
