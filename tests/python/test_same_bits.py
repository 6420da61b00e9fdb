"""Logits have the same bits however a text came to be read.

With the default model (Q4_1 weights) of themselves: products with these weights do not depend on the batch, and
attention of our own depends on the query and on what it sees alone. With weights of other types where the context is
deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lminf_edge import (
    ConfigError,
    ContextError,
    Llama,
    LMInfConfig,
    MiddleConfig,
    UnsupportedModelError,
)
from lminf_edge._library import _core
from lminf_edge._params import to_params
from lminf_edge.evaluation.texts import python_documentation
from quantize import quantize_model
from tiny_families import FAMILIES
from tiny_models import random_tokens, write_tiny_model
from weight_types import SHAPE

WINDOW = LMInfConfig(n_window=128, n_rollback=40)
N_READ = 420
"""Tokens: the window is left three times over."""


@dataclass(frozen=True)
class Case:
    """A model with some tokens for it, and how it is opened."""

    model: Path
    tokens: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    def open(self, *, n_ubatch: int, n_threads: int, **options: Any) -> Llama:
        options = {"lminf": WINDOW, **self.options, **options}
        return Llama(self.model, n_ubatch=n_ubatch, n_threads=n_threads, seed=0, **options)

    def read(self, *, n_ubatch: int, n_threads: int, **options: Any) -> npt.NDArray[np.float32]:
        """Logits of the last 20 tokens."""
        with self.open(n_ubatch=n_ubatch, n_threads=n_threads, **options) as llm:
            return last_20(llm, self)

    def differs(self) -> bool:
        """Whether the number of tokens that are computed together changes a bit."""
        alone = self.read(n_ubatch=1, n_threads=1)
        return any(not np.array_equal(self.read(n_ubatch=n, n_threads=1), alone) for n in (7, 64))


def last_20(llm: Llama, case: Case) -> npt.NDArray[np.float32]:
    return llm.eval(case.tokens[llm.n_past : N_READ])[-20:]


@pytest.fixture(scope="module")
def tiny_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "f32.gguf", SHAPE, seed=1).path


def tiny_case(tiny_f32: Path, weight_type: str, **options: Any) -> Case:
    path = tiny_f32.with_stem(weight_type)
    if not path.exists():
        quantize_model(tiny_f32, path, weight_type)
    return Case(path, random_tokens(N_READ + 60, seed=2), options)


@pytest.fixture(
    scope="module",
    params=[
        "default f16 f16",
        "default q8_0 q8_0",
        "default q8_0 q4_0",
        "q4_K q8_0 q4_0",
        "f16 f16 f16",
        "f32 f32 f32",
    ],
)
def case(request: pytest.FixtureRequest, default_model: Path, tiny_f32: Path) -> Case:
    weights, type_k, type_v = request.param.split()
    cache = {"cache_type_k": type_k, "cache_type_v": type_v}
    if weights == "default":
        with Llama(default_model) as llm:
            return Case(default_model, llm.tokenize(python_documentation()[:4000])[: N_READ + 60], cache)
    return tiny_case(tiny_f32, weights, deterministic=True, **cache)


@pytest.fixture(scope="module")
def one_by_one(case: Case) -> npt.NDArray[np.float32]:
    """Logits of the last 20 tokens, each of all tokens having been a micro-batch of its own, in one thread."""
    return case.read(n_ubatch=1, n_threads=1)


@pytest.fixture
def llm(case: Case) -> Iterator[Llama]:
    with case.open(n_ubatch=64, n_threads=2) as llm:
        yield llm


@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(2, 1), (7, 1), (64, 2), (256, 1), (256, 2)])
def test_however_it_is_cut_and_whoever_computes(
    case: Case, one_by_one: npt.NDArray[np.float32], n_ubatch: int, n_threads: int
) -> None:
    assert np.array_equal(case.read(n_ubatch=n_ubatch, n_threads=n_threads), one_by_one)


def test_taken_back_and_read_again(llm: Llama, case: Case, one_by_one: npt.NDArray[np.float32]) -> None:
    llm.eval(case.tokens[:390])
    llm.eval(case.tokens[N_READ : N_READ + 17])
    llm.truncate(370)
    assert np.array_equal(last_20(llm, case), one_by_one)


def test_saved_and_restored(llm: Llama, case: Case, one_by_one: npt.NDArray[np.float32], tmp_path: Path) -> None:
    llm.eval(case.tokens[:395])
    llm.save_state(tmp_path / "state")
    with case.open(n_ubatch=64, n_threads=1) as other:
        other.eval(case.tokens[30:150])  # its cells lie elsewhere
        other.load_state(tmp_path / "state")
        assert np.array_equal(last_20(other, case), one_by_one)


def test_beside_others(case: Case, one_by_one: npt.NDArray[np.float32]) -> None:
    """One token of each of two sequences at a time, the other one being older."""
    tokens = case.tokens
    with case.open(n_ubatch=64, n_threads=2, _n_seq_max=2) as llm:
        logits = np.empty((2, llm.n_vocab), np.float32)
        llm.eval(tokens[: N_READ - 20])
        for start in range(0, 150, 50):
            some = np.array(tokens[start : start + 50], np.int32)
            llm._context.eval_batch(some, np.ones(50, np.int32), np.empty((50, llm.n_vocab), np.float32))
        for i in range(20):
            pair = np.array([tokens[N_READ - 20 + i], tokens[200 + i]], np.int32)
            llm._context.eval_batch(pair, np.array([0, 1], np.int32), logits)
            assert np.array_equal(logits[0], one_by_one[i])


def test_copied(case: Case, one_by_one: npt.NDArray[np.float32]) -> None:
    with case.open(n_ubatch=64, n_threads=2, _n_seq_max=2) as llm:
        llm.eval(case.tokens[:390])
        llm._context.seq_cp(0, 1)
        llm.eval(case.tokens[:30])
        logits = np.empty((N_READ - 390, llm.n_vocab), np.float32)
        llm._context.eval(np.array(case.tokens[390:N_READ], np.int32), logits, 1)
        assert np.array_equal(logits[-20:], one_by_one)


@pytest.mark.parametrize("weight_type", ["f32", "f16", "bf16", "q8_0", "q4_0", "q2_K", "q4_K", "q6_K", "iq4_xs"])
def test_what_is_said_of_weights_is_so(tiny_f32: Path, weight_type: str) -> None:
    case = tiny_case(tiny_f32, weight_type)
    ((name, _, n_bytes, same_bits),) = _core.Model(str(case.model)).weights()
    assert name == weight_type
    assert 0 < n_bytes < case.model.stat().st_size
    assert same_bits != case.differs()


@pytest.mark.parametrize(
    "weight_type", ["f32", "f16", "bf16", "q4_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_xs"]
)
def test_a_deterministic_context_has_what_the_weights_alone_have_not(tiny_f32: Path, weight_type: str) -> None:
    if not tiny_case(tiny_f32, weight_type).differs():
        pytest.skip(f"on this processor, products with {weight_type} weights do not depend on the batch")
    case = tiny_case(tiny_f32, weight_type, deterministic=True)
    one_by_one = case.read(n_ubatch=1, n_threads=1)
    for n_ubatch, n_threads in ((7, 1), (64, 2), (256, 2)):
        assert np.array_equal(case.read(n_ubatch=n_ubatch, n_threads=n_threads), one_by_one)
    ((_, _, _, same_bits),) = _core.Model(str(case.model), deterministic=True).weights(deterministic=True)
    assert same_bits


def test_positions_are_rebased_at_the_same_place(tiny_f32: Path) -> None:
    """Every 296 tokens or so, which is no multiple of any micro-batch."""
    case = tiny_case(tiny_f32, "f16", deterministic=True, _n_rebase=1)
    with case.open(n_ubatch=64, n_threads=2) as llm:
        llm.eval(case.tokens[:3])  # what is left of the first stretch is cut differently
        logits = last_20(llm, case)
        assert llm.memory_stats().n_rebases >= 1
    assert np.array_equal(case.read(n_ubatch=1, n_threads=1), logits)
    assert np.array_equal(case.read(n_ubatch=256, n_threads=2), logits)


def test_two_sequences_are_rebased_where_each_would_be(tiny_f32: Path) -> None:
    case = tiny_case(tiny_f32, "f16", deterministic=True, _n_rebase=1)
    one_by_one = case.read(n_ubatch=1, n_threads=1)
    with case.open(n_ubatch=64, n_threads=2, _n_seq_max=2) as llm:
        llm.eval(case.tokens[:280])
        n = N_READ - 280
        tokens = np.array(case.tokens[280:N_READ] + case.tokens[:50], np.int32)
        logits = np.empty((n + 50, llm.n_vocab), np.float32)
        llm._context.eval_batch(tokens, np.array([0] * n + [1] * 50, np.int32), logits)
        assert llm.memory_stats().n_rebases >= 1
    assert np.array_equal(logits[n - 20 : n], one_by_one)


def test_many_sink_tokens_leave_the_blocks_as_they_are(tiny_f32: Path) -> None:
    config = LMInfConfig(n_sink=100, n_window=128)
    case = tiny_case(tiny_f32, "q4_K", deterministic=True, lminf=config)
    with case.open(n_ubatch=7, n_threads=1) as few, case.open(n_ubatch=256, n_threads=1) as many:
        assert few.config == many.config
        assert np.array_equal(last_20(few, case), last_20(many, case))


@pytest.mark.parametrize("kind", ["default", "deterministic"])
def test_the_same_prompt_twice_is_answered_alike(kind: str, request: pytest.FixtureRequest) -> None:
    """The second call reuses what the first has read, the third begins anew; also where the window has moved on."""
    deterministic = kind == "deterministic"
    model: Path = request.getfixturevalue("default_model_q4_k" if deterministic else "default_model")
    long_prompt = python_documentation()[:1500] + "\n\nThe river rose in the night, and in the morning"
    with Llama(model, lminf=WINDOW, n_ubatch=64, n_threads=2, deterministic=deterministic) as llm:
        for prompt in ("The river rose in the night, and in the morning", long_prompt):
            texts: list[str] = []
            for _ in range(3):
                if len(texts) == 2:
                    llm.reset()
                texts.append(llm.create_completion(prompt, max_tokens=40, temperature=0)["choices"][0]["text"])
            assert texts[0] == texts[1] == texts[2]
        assert llm.memory_stats().n_evicted > 100


def test_what_cannot_be_is_refused_by_name(tiny_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = write_tiny_model(tmp_path / "latent.gguf", FAMILIES["deepseek2"], seed=1).path
    store = LMInfConfig(n_window=128, middle=MiddleConfig(layers=(0, None), n_candidates=64))
    refusals: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (tiny_f32, {"lminf": None}, ConfigError, "deterministic = True: needs lminf"),
        (tiny_f32, {"n_gpu_layers": 1}, ConfigError, "n_gpu_layers = 1: must be 0 with deterministic"),
        (tiny_f32, {"deterministic": "yes"}, ConfigError, "deterministic"),
        (tiny_f32, {"lminf": store}, ConfigError, "the 64 candidates depends on the number of threads"),
        (latent, {"lminf": LMInfConfig()}, UnsupportedModelError, "attention is llama.cpp's .latent attention"),
    ]
    for model, options, error, reason in refusals:
        with pytest.raises(error, match=reason):
            Llama(model, **{"lminf": WINDOW, "deterministic": True, "n_threads": 1, **options})
    monkeypatch.setenv("LMINF_ATTENTION", "stock")
    with pytest.raises(UnsupportedModelError, match="LMINF_ATTENTION=stock"):
        Llama(tiny_f32, lminf=WINDOW, deterministic=True, n_threads=1)


def test_repacked_weights_are_refused(tiny_f32: Path) -> None:
    """Those of a program that asks for it when its weights have been loaded already."""
    model = _core.Model(str(tiny_case(tiny_f32, "q4_K").model))
    if model.weights(deterministic=True)[0][3]:
        pytest.skip("this processor has no products that weights are repacked for")
    with pytest.raises(UnsupportedModelError, match=r"q4_K weights in a buffer .* use_extra_bufts = false"):
        _core.Context(model, lminf=to_params(WINDOW, 0, True))


def test_the_environment_decides_for_contexts_with_a_window(tiny_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(tiny_f32, "q4_K")
    monkeypatch.setenv("LMINF_DETERMINISTIC", "1")
    assert not case.differs()
    with Llama(case.model, n_threads=1) as plain:
        assert plain.config is None
    monkeypatch.setenv("LMINF_DETERMINISTIC", "on")
    with pytest.raises(ContextError, match="LMINF_DETERMINISTIC = 'on': must be '0' or '1'"):
        case.open(n_ubatch=64, n_threads=1)


def test_each_layer_says_who_computes_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(family: str, **options: Any) -> tuple[str, ...]:
        path = tmp_path / f"{family}.gguf"
        if not path.exists():
            write_tiny_model(path, FAMILIES[family], seed=1)
        with Llama(path, n_threads=1, **{"lminf": LMInfConfig(n_window=32), **options}) as llm:
            return llm.memory_stats().attention

    own = attention("gemma3")
    assert len(own) == FAMILIES["gemma3"].n_layer
    assert set(own) == {own[0]}
    assert own[0].startswith("own kernel (")
    n_layer = FAMILIES["lfm2"].n_layer
    assert attention("lfm2") == tuple("none" if FAMILIES["lfm2"].is_recurrent(i) else own[0] for i in range(n_layer))
    assert set(attention("deepseek2")) == {"llama.cpp's (latent attention)"}
    assert set(attention("gemma3", lminf=None)) == {"llama.cpp's (full attention)"}
    monkeypatch.setenv("LMINF_ATTENTION", "stock")
    assert set(attention("gemma3")) == {"llama.cpp's (LMINF_ATTENTION=stock)"}
