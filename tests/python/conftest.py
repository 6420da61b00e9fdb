"""Models that the tests share, and how they are opened."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

# NumPy reads it when it is imported. Threads that wait for each other make small products slow on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from dequantize import write_f32_model
from llama_cpp_python import LlamaCppPython
from quantize import quantize_model
from reference import FULL_ATTENTION, Attention
from tiny_models import HEAD_32, HEAD_64, TIED, TinyModel, TinyShape, write_tiny_model

if TYPE_CHECKING:
    from lminf_edge import Llama, MiddleConfig

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Where a shell put the tests into the background, SIGINT is ignored, by the programs that they start as well."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class OpenLlama(Protocol):
    """Opens a tiny model in the engine with the semantics given to the reference."""

    def __call__(
        self,
        model: TinyModel,
        attention: Attention,
        *,
        n_ubatch: int = 64,
        cache_type: str = "f32",
        flash_attn: bool = False,
        n_rollback: int = 0,
        middle: MiddleConfig | None = None,
        **options: Any,
    ) -> Llama: ...


@pytest.fixture(scope="session")
def open_llama() -> OpenLlama:
    """Opens a tiny model on one thread; `FULL_ATTENTION` is plain llama.cpp."""
    from lminf_edge import Llama, LMInfConfig

    def open_model(
        model: TinyModel,
        attention: Attention,
        *,
        n_ubatch: int = 64,
        cache_type: str = "f32",
        flash_attn: bool = False,
        n_rollback: int = 0,
        middle: MiddleConfig | None = None,
        **options: Any,
    ) -> Llama:
        config = None
        if attention != FULL_ATTENTION:
            config = LMInfConfig(
                n_sink=attention.n_sink,
                n_window=attention.n_window,
                n_clamp=attention.n_clamp,
                n_block=attention.n_block,
                sink_order=attention.sink_order,
                n_rollback=n_rollback,
                middle=middle,
            )
        return Llama(
            model.path,
            lminf=config,
            n_ubatch=n_ubatch,
            n_threads=1,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
            flash_attn=flash_attn,
            seed=0,
            **options,
        )

    return open_model


@pytest.fixture(scope="session")
def llama_cpp_python(tmp_path_factory: pytest.TempPathFactory) -> LlamaCppPython:
    """The pinned llama-cpp-python in a virtual environment of its own."""
    return LlamaCppPython.install(tmp_path_factory.mktemp("llama-cpp-python"))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model, SmolLM2-135M-Instruct Q4_1: taken from the user's cache or downloaded once."""
    from lminf_edge import models

    return models.default_model_path()


@pytest.fixture(scope="session")
def default_model_f32(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with F32 weights: no rounding of activations to 8 bits hides or makes a difference."""
    return write_f32_model(default_model, tmp_path_factory.mktemp("f32") / "default-f32.gguf")


@pytest.fixture(scope="session")
def default_model_q4_k(default_model_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with Q4_K weights, or a neighbouring type where rows are no multiple of 256."""
    return quantize_model(default_model_f32, tmp_path_factory.mktemp("q4_K") / "default-q4_K.gguf", "q4_K")


@pytest.fixture(scope="session")
def head_32(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Tiny model with F32 weights, grouped-query attention and heads of 32."""
    return _written(tmp_path_factory, "head-32", HEAD_32)


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[Llama]:
    """The default model with a window of 256; its logits are the same bits however a text is cut."""
    from lminf_edge import Llama, LMInfConfig

    with Llama(default_model, lminf=LMInfConfig(n_window=256), deterministic=True, seed=0) as llm:
        yield llm


@pytest.fixture
def tiny(head_32: TinyModel) -> Iterator[Llama]:
    """A tiny random model with a window of 64, nothing rounded, and the same bits however a text is cut."""
    from lminf_edge import Llama, LMInfConfig

    exact: Any = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False, "deterministic": True}
    window = LMInfConfig(n_window=64, n_rollback=16)
    with Llama(head_32.path, lminf=window, n_ubatch=16, n_threads=1, seed=0, **exact) as llm:
        yield llm


@pytest.fixture(scope="session")
def head_64(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Tiny model with F32 weights and heads of 64: a quantised cache is stored Hadamard-rotated."""
    return _written(tmp_path_factory, "head-64", HEAD_64)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Tiny model with F32 weights, four layers, a single KV head and tied embeddings."""
    return _written(tmp_path_factory, "tied", TIED)


@pytest.fixture(scope="session", params=["head_32", "head_64", "tied"])
def tiny_model(request: pytest.FixtureRequest) -> TinyModel:
    """Each of the tiny models in turn."""
    model: TinyModel = request.getfixturevalue(request.param)
    return model


def _written(tmp_path_factory: pytest.TempPathFactory, name: str, shape: TinyShape) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-models") / f"{name}.gguf", shape, seed=1)
