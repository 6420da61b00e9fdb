"""Against the same llama.cpp without our patch: feature off, nothing changes; on, only rounding before it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lminf_edge import Llama, LMInfConfig
from stock import stock_logits
from tiny_models import TinyModel, random_tokens

N_TOKENS = 300
PASSAGE = (
    "The sea had been calm for three days, and the captain, who trusted nothing that lasted, walked from one end of "
    "the deck to the other and looked at the sky. "
)


def passage_tokens(model: Path) -> list[int]:
    with Llama(model) as llm:
        return llm.tokenize(PASSAGE * 20)[:N_TOKENS]


def our_logits(
    model: Path | str, tokens: list[int], lminf: LMInfConfig | None, *, cache_type: str, flash_attn: bool
) -> npt.NDArray[np.float32]:
    with Llama(
        model,
        lminf=lminf,
        n_ctx=None if lminf else 512,
        n_batch=128,
        n_ubatch=64,
        n_threads=1,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attn=flash_attn,
    ) as llm:
        return llm.eval(tokens)


def their_logits(model: Path | str, tokens: list[int], *, cache_type: str, flash_attn: bool) -> npt.NDArray[np.float32]:
    # like ours, which hands out the logits of one micro-batch at a time
    return stock_logits(
        model, tokens, n_ctx=512, n_batch=64, n_ubatch=64, type_k=cache_type, type_v=cache_type, flash_attn=flash_attn
    )


@pytest.mark.parametrize(("cache_type", "flash_attn"), [("f32", False), ("f16", True), ("q8_0", True)])
class TestFeatureOff:
    def test_logits_of_the_real_model_are_bit_identical(
        self, default_model: Path, cache_type: str, flash_attn: bool
    ) -> None:
        tokens = passage_tokens(default_model)
        ours = our_logits(default_model, tokens, None, cache_type=cache_type, flash_attn=flash_attn)
        theirs = their_logits(default_model, tokens, cache_type=cache_type, flash_attn=flash_attn)
        assert np.array_equal(ours, theirs)

    def test_logits_of_a_tiny_model_are_bit_identical(
        self, head_64: TinyModel, cache_type: str, flash_attn: bool
    ) -> None:
        tokens = random_tokens(N_TOKENS, seed=5)
        ours = our_logits(head_64.path, tokens, None, cache_type=cache_type, flash_attn=flash_attn)
        theirs = their_logits(head_64.path, tokens, cache_type=cache_type, flash_attn=flash_attn)
        assert np.array_equal(ours, theirs)


class TestNothingMaskedOrClamped:
    def test_tiny_models_differ_by_rounding_only(self, tiny_model: TinyModel) -> None:
        tokens = random_tokens(200, seed=6)
        ours = our_logits(tiny_model.path, tokens, LMInfConfig(n_window=256), cache_type="f32", flash_attn=False)
        theirs = their_logits(tiny_model.path, tokens, cache_type="f32", flash_attn=False)
        assert np.abs(ours - theirs).max() <= 1e-4

    def test_the_real_model_in_f32_differs_by_rounding_only(
        self, default_model_f32: Path, record_property: Callable[[str, object], None]
    ) -> None:
        tokens = passage_tokens(default_model_f32)
        ours = our_logits(default_model_f32, tokens, LMInfConfig(), cache_type="f32", flash_attn=False)
        theirs = their_logits(default_model_f32, tokens, cache_type="f32", flash_attn=False)
        difference = float(np.abs(ours - theirs).max())
        record_property("largest_logit_difference", difference)
        assert difference <= 1e-3  # logits of up to 30; log-probabilities follow below
        assert np.abs(log_softmax(ours) - log_softmax(theirs)).max() <= 1e-3


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf).astype(np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
