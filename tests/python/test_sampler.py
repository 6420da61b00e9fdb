"""A token is drawn as llama.cpp's samplers draw it from the whole vocabulary, whatever is left out on the way."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lminf_edge import ContextError, Llama, LMInfConfig, lib_path
from lminf_edge.sampling import SamplingOptions
from tiny_models import TinyModel

Logits = npt.NDArray[np.float32]

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Candidates(ctypes.Structure):
    """llama_token_data_array."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class ChainParams(ctypes.Structure):
    """llama_sampler_chain_params."""

    _fields_ = (("no_perf", ctypes.c_bool),)


class ReferenceSampler:
    """llama.cpp's chain, given every token of the vocabulary."""

    def __init__(self, options: SamplingOptions, n_vocab: int, seed: int) -> None:
        (library,) = (path for path in lib_path().iterdir() if path.stem == "libllama")
        self._library = ctypes.CDLL(str(library))
        self._bias = options.logit_bias
        self._chain = self._made("chain_init", ChainParams(True))
        penalties = (options.repeat_penalty, options.frequency_penalty, options.presence_penalty)
        self._add("penalties", n_vocab, options.penalty_last_n, *map(ctypes.c_float, penalties))
        if options.temperature == 0:
            self._add("greedy")
            return
        self._add("top_k", options.top_k)
        self._add("top_p", ctypes.c_float(options.top_p), ctypes.c_size_t(1))
        self._add("min_p", ctypes.c_float(options.min_p), ctypes.c_size_t(1))
        self._add("temp", ctypes.c_float(options.temperature))
        self._add("dist", ctypes.c_uint32(seed))

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        function = self._library[f"llama_sampler_{name}"]
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))

    def _add(self, name: str, *arguments: Any) -> None:
        self._library.llama_sampler_chain_add(self._chain, self._made(f"init_{name}", *arguments))

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._library.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Logits) -> int:
        rows = np.zeros(logits.size, CANDIDATE)
        rows["id"] = np.arange(logits.size)
        rows["logit"] = logits
        for token, bias in self._bias.items():
            rows["logit"][token] += np.float32(bias)
        array = Candidates(rows.ctypes.data, rows.size, -1, False)
        self._library.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(rows["id"][array.selected])
        self.accept([token])
        return token


@pytest.fixture(scope="module")
def large(default_model: Path) -> Iterator[Llama]:
    """A vocabulary of 49,152 tokens."""
    with Llama(default_model, lminf=LMInfConfig(n_window=64), n_threads=1) as llm:
        llm.eval([1])
        yield llm


@pytest.fixture(scope="module")
def small(head_32: TinyModel) -> Iterator[Llama]:
    """A vocabulary of 264 tokens."""
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=1) as llm:
        llm.eval([1])
        yield llm


def set_logits(llm: Llama, logits: Logits) -> None:
    llm._context.set_state(llm._context.get_state(), logits)


def random_logits(llm: Llama, seed: int, scale: float) -> Logits:
    return np.random.default_rng(seed).normal(0, scale, llm.n_vocab).astype(np.float32)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "greedy": {"temperature": 0.0},
    "the best": {"top_k": 1},
    "many": {"top_k": 500, "temperature": 2.0, "min_p": 0.0, "top_p": 1.0},
    "more than there are": {"top_k": 100_000, "top_p": 0.5},
    "all": {"top_k": 0, "min_p": 0.001},
    "penalties": {"repeat_penalty": 3.0, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "greedy penalties": {"repeat_penalty": 3.0, "temperature": 0.0, "penalty_last_n": 3},
    "negative penalties": {"presence_penalty": -20.0, "temperature": 2.0, "penalty_last_n": 12},
    "no penalties": {"repeat_penalty": 3.0, "penalty_last_n": 0},
    "bias": {"logit_bias": {3: 11.0, 7: 12.0, 100: -100.0, 200: 10.5}, "temperature": 1.5},
    "greedy bias": {"logit_bias": {3: 30.0, 9: -30.0}, "temperature": 0.0},
    "bias and penalties": {"logit_bias": {3: 12.0, 5: 12.0}, "repeat_penalty": 1.5, "top_k": 5, "temperature": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocabulary", ["small", "large"])
def test_what_is_drawn_is_what_llama_cpp_draws(request: pytest.FixtureRequest, vocabulary: str, name: str) -> None:
    llm: Llama = request.getfixturevalue(vocabulary)
    options = SamplingOptions(**OPTIONS[name])
    sampler, reference = options.sampler(llm._model, 5), ReferenceSampler(options, llm.n_vocab, 5)
    prompt = [int(token) for token in np.argsort(-random_logits(llm, 0, 3.0))[:20]]
    sampler.accept(np.array(prompt, np.int32))
    reference.accept(prompt)
    for seed in range(40):
        logits = random_logits(llm, seed % 4, 3.0)  # the same again, so that penalties matter
        set_logits(llm, logits)
        assert sampler.sample(llm._context)[0] == reference.sample(logits)


def test_of_equal_logits_the_greedy_choice_is_the_first(large: Llama) -> None:
    logits = np.zeros(large.n_vocab, np.float32)
    logits[[700, 5000, 40_000]] = 1.0
    set_logits(large, logits)
    for bias, expected in (({}, 700), ({600: 1.0}, 600), ({800: 1.0}, 700), ({700: -1.0}, 5000)):
        sampler = SamplingOptions(temperature=0, logit_bias=bias).sampler(large._model, 0)
        assert sampler.sample(large._context)[0] == expected


def test_tokens_that_are_impossible_are_not_drawn(large: Llama) -> None:
    logits = np.full(large.n_vocab, -np.inf, np.float32)
    logits[[30, 40_000]] = 0.0
    set_logits(large, logits)
    for options in ({"temperature": 5.0}, {"temperature": 0.0}, {"top_k": 0}):
        sampler = SamplingOptions(**options).sampler(large._model, 0)
        assert {sampler.sample(large._context)[0] for _ in range(20)} <= {30, 40_000}


@pytest.mark.parametrize("n_top", [0, 1, 20, 3000, 100_000])
def test_the_most_probable_tokens_are_in_order(large: Llama, n_top: int) -> None:
    logits = random_logits(large, 1, 4.0)
    set_logits(large, logits)
    shifted = logits.astype(np.float64) - logits.max()
    expected = shifted - np.log(np.exp(shifted).sum())
    token, logprob, top = SamplingOptions().sampler(large._model, 0).sample(large._context, n_top)
    assert logprob == pytest.approx(expected[token], abs=1e-5)
    assert [token for token, _ in top] == np.argsort(-logits, kind="stable")[:n_top].tolist()
    np.testing.assert_allclose([logprob for _, logprob in top], expected[[token for token, _ in top]], atol=1e-5)


def test_no_probability_is_computed_that_nobody_asked_for(large: Llama) -> None:
    set_logits(large, random_logits(large, 1, 4.0))
    _, logprob, top = SamplingOptions().sampler(large._model, 0).sample(large._context)
    assert math.isnan(logprob)
    assert top == []


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 0}, {"logit_bias": {100: 5.0}}])
@pytest.mark.parametrize("position", [0, 100, 31_000, 49_151])
def test_logits_that_are_no_numbers_are_refused_and_nothing_is_drawn(
    large: Llama, options: dict[str, Any], position: int
) -> None:
    logits = random_logits(large, 2, 3.0)
    sampler = SamplingOptions(**options).sampler(large._model, 3)
    other = SamplingOptions(**options).sampler(large._model, 3)
    broken = logits.copy()
    broken[position] = np.nan
    set_logits(large, broken)
    with pytest.raises(ContextError, match="not numbers"):
        sampler.sample(large._context)
    set_logits(large, logits)
    for _ in range(5):
        assert sampler.sample(large._context)[0] == other.sample(large._context)[0]
