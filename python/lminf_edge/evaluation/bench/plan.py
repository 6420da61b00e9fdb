"""What `bench` measures, from its settings: which method with which cache at which depths."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lminf_edge._checks import check_choice, check_int, check_optional_int
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.bench.step_bytes import StepBytes
from lminf_edge.evaluation.methods import MethodSetup, Pass
from lminf_edge.evaluation.reader import ReaderOptions
from lminf_edge.llama import N_CTX_MAX

RECOMPUTE = "recompute"
"""The method that reads its whole window again for each token: the paper's slow baseline."""

PEERS = ("attention-sinks",)
"""Other programs that can be measured beside."""

ENDLESS_METHODS = ("endless", "absolute", "middle")
"""Methods that go on at any position as they would at another one."""

N_DECODE_MAX = LMInfConfig.n_rollback - 2
"""A turn is taken back after it."""

N_RECOMPUTED = 3
"""Rounds in which `RECOMPUTE` takes part: each of its tokens takes as long as reading a window."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What `bench` measures.

    Attributes:
        setup: Model, methods, types of cache, window.
        recompute: Measure a sliding window with re-computation, too.
        depths: Where decoding is measured, in tokens so far.
        near: A depth at which only methods without end are measured, to compare the far one with.
        far: A position far beyond the others for methods without end. None: none.
        rounds: How often each method has its turn.
        n_decode: Tokens of a turn, unless they take too long.
        n_read: Deeper plain contexts, and stores of middle tokens, are filled by copying what was read up to here.
        prompts: Lengths of prompts.
        prompt_rounds: How often each prompt is read.
        n_latency: Tokens that are timed one by one. 0: none.
        peer: One of `PEERS`. None: none.
        peer_python: Python interpreter in which the peer is installed. None: this one.

    Raises:
        ConfigError: A value is out of range.
    """

    setup: MethodSetup
    recompute: bool
    depths: tuple[int, ...]
    near: int
    far: int | None
    rounds: int
    n_decode: int
    n_read: int
    prompts: tuple[int, ...]
    prompt_rounds: int
    n_latency: int
    peer: str | None = None
    peer_python: str | None = None

    def __post_init__(self) -> None:
        if "middle" in self.setup.methods and self.setup.middle.path is not None:
            raise ConfigError("store_path: every depth has a store of its own here, in memory")
        for name in ("depths", "prompts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: a number is there twice")
        if not self.depths:
            raise ConfigError("depths: at least one is needed")
        for depth in self.depths:
            check_int("depths", depth, 0, N_CTX_MAX - 256)
        for length in self.prompts:
            check_int("prompts", length, 1, N_CTX_MAX - 256)
        check_int("near", self.near, 1, N_CTX_MAX)
        check_optional_int("far", self.far, 1, 2**50)
        check_int("rounds", self.rounds, 1)
        check_int("n_decode", self.n_decode, 1, N_DECODE_MAX)
        check_int("n_read", self.n_read, 1)
        check_int("prompt_rounds", self.prompt_rounds, 1)
        check_int("n_latency", self.n_latency, 0)
        if self.peer is not None:
            check_choice("peer", self.peer, PEERS)
        elif self.peer_python is not None:
            raise ConfigError("peer_python: there is no peer to run")

    @property
    def n_shift(self) -> int:
        """Cells of the context that is shifted."""
        n_shift = self.setup.n_window if self.setup.n_shift is None else self.setup.n_shift
        return -(-n_shift // 256) * 256

    @property
    def n_used_by_shift(self) -> int:
        """Cells in use when the context shift has its turns: in the middle of its cycle."""
        n_middle = (3 * self.n_shift + self.setup.n_sink) // 4
        return max(n_middle - self.n_decode // 2, self.setup.n_sink + 1)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A method at a depth.

    Attributes:
        method: Its name.
        cache_type: Type of cached keys and values.
        depth: Tokens so far.
        filled: How it gets there: "read"; "copied": what was read is repeated, in a plain context or in a store of
            middle tokens; "positioned": it goes on there and reads a window; "anew": it reads all it sees for each
            token.
        same_at: Further depths for which the measurement holds, because the method is the same there.
    """

    method: str
    cache_type: str
    depth: int
    filled: str
    same_at: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}, {self.cache_type}, depth {self.depth:,}"


def decode_places(settings: BenchSettings, cache_type: str) -> list[Place]:
    """Where decoding is measured with one type of cache, in ascending order of depth for each method."""
    setup = settings.setup
    places: list[Place] = []
    for method in setup.methods:
        if method in ENDLESS_METHODS:
            more = {settings.near} if settings.far is None else {settings.near, settings.far}
            places += [
                _endless_place(settings, method, cache_type, depth) for depth in sorted({*settings.depths, *more})
            ]
        elif method == "full":
            for depth in sorted(settings.depths):
                filled = "read" if depth <= settings.n_read else "copied"
                places.append(Place(method=method, cache_type=cache_type, depth=depth, filled=filled))
        else:
            places += _same_place(method, cache_type, settings.depths, settings.n_shift, "positioned")
    if settings.recompute:
        places += _same_place(RECOMPUTE, cache_type, settings.depths, setup.n_window, "anew")
    return places


def peer_place(settings: BenchSettings) -> Place | None:
    """Where the peer decodes: beyond its window, at the largest depth."""
    if settings.peer is None:
        return None
    n_full = settings.setup.n_window + settings.setup.n_sink
    places = _same_place(settings.peer, "f32", settings.depths, n_full, "read")
    return places[0] if places else None


def model_options(settings: BenchSettings, place: Place) -> ReaderOptions:
    """How the model is opened for a place."""
    setup = settings.setup
    if place.method == RECOMPUTE:
        return setup.reader_options(Pass(method="full", cache_type=place.cache_type), setup.n_window)
    return setup.reader_options(
        Pass(method=place.method, cache_type=place.cache_type), place.depth + settings.n_decode + 1
    )


def bytes_per_token(settings: BenchSettings, place: Place, step: StepBytes) -> int | None:
    """What decoding must read there, in the middle of a turn. None for re-computation, which does not decode."""
    setup = settings.setup
    n_past = place.depth + settings.n_decode // 2 + 2
    if place.method == RECOMPUTE:
        return None
    if place.method == "full":
        return step.at(n_past, n_past)
    if place.method == "shift":
        n_used = settings.n_used_by_shift + settings.n_decode // 2 + 2
        return step.at(n_used, n_used)
    n_visible = min(n_past, setup.n_window) + min(setup.n_sink, max(0, n_past - setup.n_window))
    return step.at(n_visible, n_past)


def at_each_depth(place: Place) -> list[Place]:
    """The place, and those that are the same."""
    return [place, *(replace(place, depth=depth, same_at=()) for depth in place.same_at)]


def _endless_place(settings: BenchSettings, method: str, cache_type: str, depth: int) -> Place:
    setup = settings.setup
    n_begin = setup.n_sink + 64
    n_cells = setup.n_window + LMInfConfig.n_rollback + setup.n_ubatch
    n_read, otherwise = n_begin + n_cells, "positioned"
    if method == "middle":
        n_read, otherwise = max(n_read, settings.n_read), "copied"
    return Place(method=method, cache_type=cache_type, depth=depth, filled="read" if depth <= n_read else otherwise)


def _same_place(method: str, cache_type: str, depths: tuple[int, ...], n_first: int, filled: str) -> list[Place]:
    """One place for all depths from n_first on."""
    beyond = sorted((depth for depth in depths if depth >= n_first), reverse=True)
    if not beyond:
        return []
    return [Place(method=method, cache_type=cache_type, depth=beyond[0], filled=filled, same_at=tuple(beyond[1:]))]
