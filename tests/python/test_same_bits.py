"""Logits of the default model (Q4_1 weights) have the same bits however its text came to be read.

Products with these weights do not depend on the batch, and attention of our own depends on the query and on what it
sees alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluation.texts import python_documentation

WINDOW = LMInfConfig(n_window=128, n_rollback=40)
N_READ = 420
"""Tokens: the window is left three times over."""

CACHES = [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0")]


@pytest.fixture(scope="module", params=CACHES, ids="-".join)
def cache(request: pytest.FixtureRequest) -> dict[str, Any]:
    type_k, type_v = request.param
    return {"cache_type_k": type_k, "cache_type_v": type_v}


@pytest.fixture(scope="module")
def tokens(default_model: Path) -> list[int]:
    with Llama(default_model) as llm:
        return llm.tokenize(python_documentation()[:4000])[: N_READ + 60]


@pytest.fixture(scope="module")
def one_by_one(default_model: Path, cache: dict[str, Any], tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits of the last 20 tokens, each of all tokens having been a micro-batch of its own, in one thread."""
    with Llama(default_model, lminf=WINDOW, n_ubatch=1, n_threads=1, **cache) as llm:
        llm.eval(tokens[: N_READ - 20])
        return llm.eval(tokens[N_READ - 20 : N_READ])


@pytest.fixture
def llm(default_model: Path, cache: dict[str, Any]) -> Iterator[Llama]:
    with Llama(default_model, lminf=WINDOW, n_ubatch=64, n_threads=2, **cache) as llm:
        yield llm


def last_20(llm: Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    return llm.eval(tokens[llm.n_past : N_READ])[-20:]


@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(7, 1), (64, 2), (256, 2)])
def test_however_it_is_cut_and_whoever_computes(
    default_model: Path,
    cache: dict[str, Any],
    tokens: list[int],
    one_by_one: npt.NDArray[np.float32],
    n_ubatch: int,
    n_threads: int,
) -> None:
    with Llama(default_model, lminf=WINDOW, n_ubatch=n_ubatch, n_threads=n_threads, **cache) as llm:
        assert np.array_equal(last_20(llm, tokens), one_by_one)


def test_taken_back_and_read_again(llm: Llama, tokens: list[int], one_by_one: npt.NDArray[np.float32]) -> None:
    llm.eval(tokens[:390])
    llm.eval(tokens[N_READ : N_READ + 17])
    llm.truncate(370)
    assert np.array_equal(last_20(llm, tokens), one_by_one)


def test_saved_and_restored(
    llm: Llama,
    default_model: Path,
    cache: dict[str, Any],
    tokens: list[int],
    one_by_one: npt.NDArray[np.float32],
    tmp_path: Path,
) -> None:
    llm.eval(tokens[:395])
    llm.save_state(tmp_path / "state")
    with Llama(default_model, lminf=WINDOW, n_ubatch=64, n_threads=1, **cache) as other:
        other.eval(tokens[30:150])  # its cells lie elsewhere
        other.load_state(tmp_path / "state")
        assert np.array_equal(last_20(other, tokens), one_by_one)


def test_beside_others(
    default_model: Path, cache: dict[str, Any], tokens: list[int], one_by_one: npt.NDArray[np.float32]
) -> None:
    """One token of each of two sequences at a time, the other one being older."""
    with Llama(default_model, lminf=WINDOW, n_ubatch=64, n_threads=2, _n_seq_max=2, **cache) as llm:
        logits = np.empty((2, llm.n_vocab), np.float32)
        llm.eval(tokens[: N_READ - 20])
        for start in range(0, 150, 50):
            some = np.array(tokens[start : start + 50], np.int32)
            llm._context.eval_batch(some, np.ones(50, np.int32), np.empty((50, llm.n_vocab), np.float32))
        for i in range(20):
            pair = np.array([tokens[N_READ - 20 + i], tokens[200 + i]], np.int32)
            llm._context.eval_batch(pair, np.array([0, 1], np.int32), logits)
            assert np.array_equal(logits[0], one_by_one[i])


def test_the_same_prompt_twice_is_answered_alike(llm: Llama) -> None:
    """The second call reuses what the first has read, the third begins anew."""
    prompt = "The river rose in the night, and in the morning"
    texts: list[str] = []
    for _ in range(3):
        if len(texts) == 2:
            llm.reset()
        texts.append(llm.create_completion(prompt, max_tokens=40, temperature=0)["choices"][0]["text"])
    assert texts[0] == texts[1] == texts[2]
