"""What a bug report should tell: the installation, the machine, and whether the engine works on it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lminf_edge._library import _core, lib_path
from lminf_edge._params import batch_sizes, to_params
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError, LMInfError, UnsupportedModelError
from lminf_edge.llama import Llama
from lminf_edge.middle import MiddleConfig
from lminf_edge.models import cache_path, cached_default_model
from lminf_edge.records import by_layer
from lminf_edge.system import default_n_threads, human_bytes

_CONFIG = LMInfConfig(n_sink=4, n_window=48, n_block=16)
_N_TOKENS = 120
_TOLERANCE = 0.25
"""Nats. With the default model rounding makes mean differences up to 0.07, and missing sink tokens one of 0.8."""

_ENVIRONMENT = ("LMINF_", "LLAMA_CPP_LIB_PATH", "GGML_", "OMP_", "GOMP_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True, kw_only=True)
class Installation:
    """The package and the machine.

    Attributes:
        lminf_edge: Version of this package.
        patch_id: Hash of the llama.cpp source and patch that the engine was built from.
        llama_cpp: Version of that llama.cpp.
        python: Version and implementation.
        system: Operating system, its release, and the processor's architecture.
        library: Folder of the llama.cpp libraries.
        backends: ggml's backends.
        devices: What these can compute on, with descriptions.
        features: What ggml was compiled for and has found, such as CPU features.
        gpu_offload: Layers can be kept on a GPU.
        n_threads: Threads that are used unless told otherwise.
        cache: Folder for downloaded models.
        default_model: Path of the default model. None: it was not downloaded yet.
        environment: Environment variables that the engine looks at.
    """

    lminf_edge: str
    patch_id: str
    llama_cpp: str
    python: str
    system: str
    library: str
    backends: list[str]
    devices: list[str]
    features: list[str]
    gpu_offload: bool
    n_threads: int
    cache: str
    default_model: str | None
    environment: dict[str, str]


def describe_installation() -> Installation:
    """What is installed here. Loads no model and fetches nothing."""
    default_model = cached_default_model()
    return Installation(
        lminf_edge=version("lminf-edge"),
        patch_id=_core.patch_id(),
        llama_cpp=_core.llama_cpp_version(),
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        library=str(lib_path()),
        backends=_core.backends(),
        devices=_core.devices(),
        features=_features(_core.system_info()),
        gpu_offload=_core.supports_gpu_offload(),
        n_threads=default_n_threads(),
        cache=str(cache_path()),
        default_model=None if default_model is None else str(default_model),
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)},
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """A part of the self-test.

    Attributes:
        name: What should be so.
        passed: It is so.
        detail: The measured figures, or the error.
        seconds: How long it took.
    """

    name: str
    passed: bool
    detail: str
    seconds: float


def self_test(model_path: Path, text: str, n_threads: int | None = None) -> Iterator[Check]:
    """Checks on this machine that the engine computes what it should; a few seconds with the default model.

    Args:
        model_path: A GGUF file.
        text: Some hundred words in a language that the model knows.
        n_threads: See `Llama`.

    Returns:
        An iterator over the checks, each done when it is asked for. It ends after one that could not be done.
    """
    test = _SelfTest(model_path, text, n_threads)
    for name, check in (
        ("The model loads", test.load),
        ("Its cache fits into memory", test.count_memory),
        ("Within the window it computes what llama.cpp computes", test.compare_with_full_attention),
        ("Beyond the window, pieces of any size give the same", test.compare_pieces),
        ("Memory is constant", test.compare_memory),
        ("It writes", test.write),
    ):
        start = time.perf_counter()
        try:
            passed, detail = check()
        except LMInfError as error:
            yield Check(name=name, passed=False, detail=str(error), seconds=time.perf_counter() - start)
            return
        yield Check(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - start)


class _SelfTest:
    """Each method returns whether it passed, and the figures."""

    def __init__(self, model_path: Path, text: str, n_threads: int | None) -> None:
        self._path = model_path
        self._open: Callable[..., Llama] = lambda **options: Llama(model_path, n_threads=n_threads, **options)
        self._text = text
        self._tokens: list[int] = []

    def load(self) -> tuple[bool, str]:
        self._llm = self._open(lminf=_CONFIG)
        self._tokens = self._llm.tokenize(self._text)[:_N_TOKENS]
        self._kv_bytes = self._llm.memory_stats().kv_bytes
        attention = by_layer(self._llm.memory_stats().attention)
        return len(self._tokens) == _N_TOKENS, f"{self._llm.description}; attention: {attention}"

    def count_memory(self) -> tuple[bool, str]:
        available = _core.available_memory()
        cache, store = _default_sizes(self._path)
        detail = f"{human_bytes(cache)} with the defaults"
        if store is not None:
            where = "" if available is None or store <= available else ", which does not fit: only in a file"
            detail += f"; a store of {MiddleConfig().max_tokens:,} middle tokens would take {human_bytes(store)}{where}"
        if available is not None:
            detail += f"; {human_bytes(available)} are available"
        return available is None or cache <= available, detail

    def compare_with_full_attention(self) -> tuple[bool, str]:
        assert _CONFIG.n_window is not None
        beginning = self._tokens[: _CONFIG.n_window]
        with self._open(n_ctx=_N_TOKENS) as plain:
            expected = plain.logprobs(beginning)
        self._logprobs = self._llm.logprobs(self._tokens)
        return _agree(self._logprobs[: len(expected)], expected)

    def compare_pieces(self) -> tuple[bool, str]:
        with self._open(lminf=_CONFIG, n_ubatch=7) as other:
            logprobs = other.logprobs(self._tokens)
            weights = other._model.weights()
        passed, detail = _agree(logprobs, self._logprobs)
        if np.array_equal(logprobs, self._logprobs):
            detail = "bit for bit"
        if others := [f"{name} ({buffer_type})" for name, buffer_type, _, same_bits in weights if not same_bits]:
            detail += f"; with weights of type {', '.join(others)} bit for bit only where deterministic=True"
        return passed, detail

    def compare_memory(self) -> tuple[bool, str]:
        stats = self._llm.memory_stats()
        evicted = _N_TOKENS - _CONFIG.n_sink - (_CONFIG.n_window or 0)
        passed = stats.kv_bytes == self._kv_bytes and stats.n_cells_used <= stats.n_cells and stats.n_evicted == evicted
        return passed, f"{stats.n_past} tokens read, {stats.n_evicted} of them evicted, {stats.kv_bytes:,} bytes"

    def write(self) -> tuple[bool, str]:
        steps = list(self._llm.generate(max_tokens=16, temperature=0.0, stop_at_end=False))
        self._llm.close()
        return len(steps) == 16, f"{steps[-1].tokens_per_second:.1f} tokens/s"


def _default_sizes(model_path: Path) -> tuple[int, int | None]:
    """Bytes of the cache and of a store of middle tokens, None where there can be none. Nothing is allocated."""
    model = _core.Model(str(model_path), use_mmap=False, no_alloc=True)
    batch, ubatch = batch_sizes(None, None)

    def context(config: LMInfConfig) -> _core.Context:
        return _core.Context(model, lminf=to_params(config, 0), n_batch=batch, n_ubatch=ubatch)

    cache = context(LMInfConfig()).stats().n_bytes
    try:
        return cache, context(LMInfConfig(middle=MiddleConfig())).middle_stats().n_bytes_full
    except (ConfigError, UnsupportedModelError):
        return cache, None


def _agree(values: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> tuple[bool, str]:
    difference = float(np.abs(values - expected).mean())
    return difference < _TOLERANCE, f"mean difference of {len(values)} log probabilities: {difference:.4f} nats"


def _features(system_info: str) -> list[str]:
    """What is on in "CPU : AVX2 = 1 | AVX512 = 0 | Metal : EMBED_LIBRARY = 1 | ", with its number if that is not 1."""
    features = []
    for part in system_info.split("|"):
        name, _, value = (piece.strip() for piece in part.rpartition(":")[2].partition("="))
        if name and value not in ("0", ""):
            features.append(name if value == "1" else f"{name}={value}")
    return features
