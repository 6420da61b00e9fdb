"""The default model: batch invariance, streams through a rebase, streams at far positions, every cache type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluation.texts import python_documentation

WINDOW = LMInfConfig(n_window=256, n_rollback=0)
"""Small: after a thousand tokens every part of the engine has been at work."""


@pytest.fixture(scope="module")
def tokens(default_model: Path) -> list[int]:
    with Llama(default_model) as llm:
        return llm.tokenize(python_documentation()[:40000])


def logprobs_in_micro_batches(
    model: Path, tokens: list[int], n_ubatch: int, *, cache_type: str = "f32", deterministic: bool = False
) -> npt.NDArray[np.float32]:
    with Llama(
        model,
        lminf=WINDOW,
        n_ubatch=n_ubatch,
        n_threads=2,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attn=cache_type != "f32",
        deterministic=deterministic,
    ) as llm:
        return llm.logprobs(tokens)


class TestBatchInvariance:
    def test_f32_weights_and_cache_differ_by_rounding_only(self, default_model_f32: Path, tokens: list[int]) -> None:
        one, some, many = (logprobs_in_micro_batches(default_model_f32, tokens[:700], n) for n in (1, 64, 512))
        assert np.abs(one - some).max() < 1e-3
        assert np.abs(one - many).max() < 1e-3

    @pytest.mark.slow
    def test_4096_tokens_with_f32_weights_and_cache(self, default_model_f32: Path, tokens: list[int]) -> None:
        one, some, many = (logprobs_in_micro_batches(default_model_f32, tokens[:4096], n) for n in (1, 64, 512))
        assert np.abs(one - some).max() < 1e-3
        assert np.abs(one - many).max() < 1e-3

    def test_quantised_weights_have_the_same_bits(self, default_model: Path, tokens: list[int]) -> None:
        some, many = (
            logprobs_in_micro_batches(default_model, tokens[:2048], n, cache_type="f16", deterministic=True)
            for n in (64, 512)
        )
        assert np.array_equal(some, many)


class TestFarStreams:
    def test_a_rebase_does_not_change_the_loss(self, default_model_f32: Path, tokens: list[int]) -> None:
        text = tokens[:3500]
        losses = []
        for n_rebase in (1, 0):
            with Llama(
                default_model_f32,
                lminf=WINDOW,
                n_ubatch=256,
                cache_type_k="q8_0",
                cache_type_v="q8_0",
                _n_rebase=n_rebase,
            ) as llm:
                losses.append(-llm.logprobs(text).mean(dtype=np.float64))
                assert (llm.memory_stats().n_rebases > 1) == (n_rebase == 1)
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    def test_position_200_million_is_like_position_10_000(self, default_model_f32: Path, tokens: list[int]) -> None:
        near, far = (self.loss_from(default_model_f32, tokens[:1500], position) for position in (10_000, 200_000_000))
        assert far == pytest.approx(near, rel=1e-3)

    def test_a_trillion_tokens_away_too(self, default_model_f32: Path, tokens: list[int]) -> None:
        # both positions begin a block
        near, far = (self.loss_from(default_model_f32, tokens[:800], position) for position in (10_048, 10**12))
        assert far == pytest.approx(near, rel=1e-3)

    @staticmethod
    def loss_from(model: Path, tokens: list[int], position: int) -> float:
        """The sink tokens are the text's first; the rest of it begins at a far position.

        The first tokens there see little but sink tokens, and how far away these stand depends on the position in its
        block: they are not counted.
        """
        with Llama(model, lminf=WINDOW, n_ubatch=256) as llm:
            llm.eval(tokens[:4])
            assert llm._context.test_set_position(position)
            losses = -llm.logprobs(tokens[4:])[8:]
            assert llm.n_past == position + len(tokens) - 4
            return float(losses.mean(dtype=np.float64))


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
def test_every_cache_type_reads_past_the_trained_length_without_losing_the_thread(
    default_model: Path, tokens: list[int], cache_type: str
) -> None:
    """Position 8,192 is passed after the sink tokens: the loss is that of a model inside its trained length."""
    with Llama(default_model, lminf=WINDOW, n_ubatch=256, cache_type_k=cache_type, cache_type_v=cache_type) as llm:
        inside = -llm.logprobs(tokens[:1500])[500:].mean()
        llm.reset()
        llm.eval(tokens[:4])
        assert llm._context.test_set_position(20_000)
        beyond = -llm.logprobs(tokens[4:1500])[500:].mean()
    assert beyond < inside + 0.05
