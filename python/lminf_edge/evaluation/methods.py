"""The ways to read on beyond a window that are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from lminf_edge._checks import check_choice, check_optional_int
from lminf_edge._params import N_UBATCH
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.reader import ReaderOptions
from lminf_edge.middle import MiddleConfig

METHODS = {
    "endless": "sink tokens, window and clamp: LM-Infinite",
    "full": "llama.cpp with full attention, until its context is full",
    "absolute": "sink tokens and window at absolute positions, without the clamp",
    "shift": "llama.cpp's context shift: the first tokens are kept, half of the others discarded",
    "middle": "LM-Infinite with middle tokens: questions and answers recall what has left the window",
}
"""Names and what they mean."""

WITHOUT_STORE = tuple(name for name in METHODS if name != "middle")
"""Those that keep nothing beside the cache."""

NO_CLAMP = 2**28
"""Distances of sink tokens up to this are their true ones: the largest n_clamp that the engine takes."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way to read, with one type of cache.

    Attributes:
        method: One of `METHODS`.
        cache_type: Type of cached keys and values.
    """

    method: str
    cache_type: str

    @property
    def name(self) -> str:
        """For people, and for files."""
        return f"{self.method}-{self.cache_type}"


@dataclass(frozen=True, kw_only=True)
class MethodSetup:
    """What is compared, on which model. The window is the same for all methods that have one.

    Attributes:
        model: Path of the GGUF file.
        methods: Some of `METHODS`.
        cache_types: Types of cached keys and values, each for each method.
        n_sink: Sink tokens; also the first tokens that a context shift keeps.
        n_window: Local window.
        n_clamp: Largest RoPE distance. None: n_window.
        n_block: Positions between placements of the sink tokens. None: 64, at most n_clamp.
        n_shift: Context length at which the context shift discards half; a multiple of 256, rounded up. None: n_window.
        n_threads: Threads. None: the usable physical cores.
        n_gpu_layers: Layers to keep on a GPU.
        n_ubatch: Tokens of a micro-batch.
        middle: The store of the method "middle".

    Raises:
        ConfigError: There is no such method, or a parameter is out of range.
    """

    model: str
    methods: tuple[str, ...]
    cache_types: tuple[str, ...]
    n_sink: int
    n_window: int
    n_clamp: int | None = None
    n_block: int | None = None
    n_shift: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int = 0
    n_ubatch: int = N_UBATCH
    middle: MiddleConfig = field(default_factory=MiddleConfig)

    def __post_init__(self) -> None:
        check_names("methods", self.methods, tuple(METHODS))
        check_names("cache_types", self.cache_types, None)
        check_optional_int("n_shift", self.n_shift, 1)
        if self.middle.path is not None and "middle" in self.methods and len(self.cache_types) > 1:
            raise ConfigError("middle.path: a file is the store of one type of cache: name one type, or no file")
        self.config()

    def passes(self) -> list[Pass]:
        """Every method with every cache type."""
        return [Pass(method=method, cache_type=kind) for method, kind in product(self.methods, self.cache_types)]

    def config(self) -> LMInfConfig:
        """The parameters of LM-Infinite."""
        return LMInfConfig(n_sink=self.n_sink, n_window=self.n_window, n_clamp=self.n_clamp, n_block=self.n_block)

    def reader_options(self, of: Pass, n_tokens: int) -> ReaderOptions:
        """How the model is opened for a pass.

        Args:
            of: The pass.
            n_tokens: Length of a plain context that is to hold the whole text; other methods do not need it.
        """
        lminf: LMInfConfig | None = None
        n_ctx: int | None = None
        n_keep: int | None = None
        if of.method == "endless":
            lminf = self.config()
        elif of.method == "middle":
            lminf = replace(self.config(), middle=self.middle)
        elif of.method == "absolute":
            lminf = LMInfConfig(n_sink=self.n_sink, n_window=self.n_window, n_clamp=NO_CLAMP, n_block=64)
        elif of.method == "full":
            n_ctx = n_tokens
        else:
            n_ctx = self.n_window if self.n_shift is None else self.n_shift
            n_keep = self.n_sink
        return ReaderOptions(
            model_path=Path(self.model),
            lminf=lminf,
            n_ctx=n_ctx,
            n_keep=n_keep,
            n_ubatch=self.n_ubatch,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            cache_type=of.cache_type,
        )


def check_names(option: str, names: Sequence[str], allowed: tuple[str, ...] | None) -> None:
    """Raises ConfigError unless these are different names, at least one, all allowed."""
    if not names:
        raise ConfigError(f"{option}: at least one is needed")
    for name in _repeated(names):
        raise ConfigError(f"{option}: {name!r} is there twice")
    if allowed is not None:
        for name in names:
            check_choice(option, name, allowed)


def _repeated(names: Sequence[str]) -> Iterator[str]:
    yield from (name for index, name in enumerate(names) if name in names[:index])
