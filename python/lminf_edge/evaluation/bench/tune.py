"""Which number of threads, micro-batch and types of cache are fastest here: the defaults, or others by more than noise.

One option after the other (a search along coordinates): its values have their turns at a full window, in one process
with one copy of the weights, in changing order. A value takes the place of the default only if it is faster within the
rounds, beyond chance and by a difference that matters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lminf_edge._checks import check_choice, check_int
from lminf_edge._library import _core
from lminf_edge._params import batch_sizes, cache_type_pair, to_params
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError, ContextError, UnsupportedModelError
from lminf_edge.evaluation.bench.spread import Spread, spread_of
from lminf_edge.evaluation.bench.work import Tokens, circle
from lminf_edge.evaluation.statistics import Estimate, mean_interval
from lminf_edge.evaluation.texts import python_documentation, tokenize_text
from lminf_edge.system import default_n_threads, usable_cpus
from lminf_edge.threads import ThreadPlan, seconds_of_others

LEAST_GAIN = 0.03
"""Smaller differences are not worth an option, however certain they are."""

N_ROUNDS_MIN = 3
"""Fewer rounds do not tell how much they differ."""

N_TOKENS = 8192
"""Of the text that is read in a circle."""

Progress = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What can be chosen; the names are those of `Llama`."""

    n_threads: int
    n_ubatch: int
    cache_type_k: str
    cache_type_v: str


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What is tried.

    Attributes:
        model: Path of the GGUF file.
        config: Sink tokens and window.
        n_gpu_layers: Layers to keep on a GPU.
        n_threads: Numbers of threads. The default is always among them, as with the other two.
        n_ubatch: Tokens of a micro-batch.
        cache_types: Types of cached keys and values: one for both, or "q8_0/q4_0".
        rounds: How often each value has its turn.
        n_decode: Tokens that are decoded in a turn.
        n_prompt: Tokens that are read in a turn.

    Raises:
        ConfigError: A value is out of range.
    """

    model: str
    config: LMInfConfig
    n_gpu_layers: int = 0
    n_threads: tuple[int, ...]
    n_ubatch: tuple[int, ...] = (64, 128, 256, 512)
    cache_types: tuple[str, ...] = ("f16", "q8_0", "q8_0/q4_0", "q4_0")
    rounds: int = 7
    n_decode: int = 16
    n_prompt: int = 512

    def __post_init__(self) -> None:
        check_int("rounds", self.rounds, N_ROUNDS_MIN)
        check_int("n_decode", self.n_decode, 1)
        check_int("n_prompt", self.n_prompt, 1)
        for name in ("n_threads", "n_ubatch"):
            for value in getattr(self, name):
                check_int(name, value, 1)
        for name in self.cache_types:
            for cache_type in cache_type_pair(name):
                check_choice("cache_types", cache_type, _core.cache_types())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A value that was tried.

    Attributes:
        option: "threads", "micro-batch" or "cache".
        choice: What was measured.
        goal: What decides about this option: "decode" or "prompt".
        decode: Decoded tokens per second, at a full window. None if it could not be measured.
        prompt: Read tokens per second, likewise.
        kv_bytes: Bytes of keys and values.
        gain: Speed relative to the value that was chosen before, within a round: mean and 95 % interval. None: it is
            that value.
        chosen: It takes that one's place.
        error: Why it could not be measured.
    """

    option: str
    choice: Choice
    goal: str
    decode: Spread | None = None
    prompt: Spread | None = None
    kv_bytes: int = 0
    gain: Estimate | None = None
    chosen: bool = False
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What was tried, and what came out.

    Attributes:
        default: What `Llama` uses unless told otherwise.
        choice: What is best: the default where nothing is better by more than noise.
        trials: All that was tried, in this order.
        n_taken: Cores that other processes used meanwhile, on average. None: the system does not say.
    """

    default: Choice
    choice: Choice
    trials: tuple[Trial, ...]
    n_taken: float | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What to pass to `Llama`: those options that are not as by default."""
        default = asdict(self.default)
        return {name: value for name, value in asdict(self.choice).items() if value != default[name]}


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Tokens per second."""

    decode: float
    prompt: float


def thread_numbers(n_cores: int) -> tuple[int, ...]:
    """Numbers of threads to try on so many cores: each of a few, else powers of two and all."""
    if n_cores <= 4:
        return tuple(range(1, n_cores + 1))
    return (*(2**i for i in range(n_cores.bit_length()) if 2**i < n_cores), n_cores)


def tune(settings: TuneSettings, on_progress: Progress = lambda _: None) -> TuneResult:
    """Tries what the settings say.

    Args:
        settings: What to try.
        on_progress: Called with what is being done now.

    Raises:
        LMInfError: As for `Llama`, with the defaults.
    """
    model = _core.Model(settings.model, n_gpu_layers=settings.n_gpu_layers)
    text = tokenize_text(settings.model, python_documentation()[: 8 * N_TOKENS]).tokens
    bench = _Bench(settings, model, np.asarray(text[:N_TOKENS], np.int32), on_progress)
    default = Choice(
        n_threads=default_n_threads(), n_ubatch=batch_sizes(None, None)[1], cache_type_k="f16", cache_type_v="f16"
    )
    choice, trials = default, []
    begin, before = time.monotonic(), seconds_of_others(usable_cpus())
    types = [cache_type_pair(name) for name in settings.cache_types]
    options: tuple[tuple[str, str, list[dict[str, Any]]], ...] = (
        ("threads", "decode", [{"n_threads": n} for n in settings.n_threads]),
        ("micro-batch", "prompt", [{"n_ubatch": n} for n in settings.n_ubatch]),
        ("cache", "decode", [{"cache_type_k": key, "cache_type_v": value} for key, value in types]),
    )
    for option, goal, values in options:
        others = [replace(choice, **value) for value in values]
        measured = bench.measure(option, goal, [choice, *(other for other in others if other != choice)])
        trials += measured
        choice = next((trial.choice for trial in measured if trial.chosen), choice)
    after, elapsed = seconds_of_others(usable_cpus()), time.monotonic() - begin
    n_taken = None if before is None or after is None else max(0.0, after - before) / elapsed
    return TuneResult(default=default, choice=choice, trials=tuple(trials), n_taken=n_taken)


def faster(reference: Sequence[float], other: Sequence[float]) -> Estimate:
    """Speed of one thing relative to another, measured in the same rounds: mean and 95 % interval (Student's t).

    Args:
        reference: Tokens per second of the one that is compared with, in each round.
        other: Those of the other.
    """
    interval = mean_interval(np.log(np.asarray(other) / np.asarray(reference)))
    return Estimate(mean=math.exp(interval.mean), low=math.exp(interval.low), high=math.exp(interval.high))


def best_of(gains: Sequence[Estimate | None]) -> int | None:
    """Which one is faster than the reference beyond noise, and most so. None: none is."""
    better = [i for i, gain in enumerate(gains) if gain is not None and gain.low > 1 and gain.mean > 1 + LEAST_GAIN]
    return max(better, key=lambda i: gains[i].mean, default=None)  # type: ignore[union-attr]


class _Bench:
    """Contexts that have turns."""

    def __init__(self, settings: TuneSettings, model: _core.Model, tokens: Tokens, on_progress: Progress) -> None:
        self._settings = settings
        self._model = model
        self._tokens = tokens
        self._on_progress = on_progress

    def measure(self, option: str, goal: str, choices: Sequence[Choice]) -> list[Trial]:
        """Measures in turns. The first choice is what the others are compared with."""
        settings = self._settings
        stations: dict[Choice, _Station] = {}
        errors: dict[Choice, str] = {}
        try:
            for choice in choices:
                self._on_progress(f"{option}: filling the window, {_words(choice)}")
                try:
                    stations[choice] = self._station(choice, stations)
                except (ConfigError, ContextError, UnsupportedModelError) as error:
                    if choice == choices[0]:
                        raise
                    errors[choice] = str(error)
            turns: dict[Choice, list[_Turn]] = {choice: [] for choice in stations}
            for number in range(settings.rounds):
                order = list(stations) if number % 2 == 0 else list(reversed(stations))
                for choice in order:
                    self._on_progress(f"{option}: round {number + 1} of {settings.rounds}, {_words(choice)}")
                    turns[choice].append(stations[choice].turn(choice, settings.n_decode, settings.n_prompt))
            sizes = {choice: station.kv_bytes for choice, station in stations.items()}
        finally:
            for station in set(stations.values()):
                station.close()
        speeds = {choice: [getattr(turn, goal) for turn in each] for choice, each in turns.items()}
        gains = [
            faster(speeds[choices[0]], speeds[choice]) if choice in speeds and choice != choices[0] else None
            for choice in choices
        ]
        best = best_of(gains)
        return [
            Trial(option=option, choice=choice, goal=goal, error=errors[choice])
            if choice in errors
            else Trial(
                option=option,
                choice=choice,
                goal=goal,
                decode=spread_of([turn.decode for turn in turns[choice]]),
                prompt=spread_of([turn.prompt for turn in turns[choice]]),
                kv_bytes=sizes[choice],
                gain=gains[i],
                chosen=i == best,
            )
            for i, choice in enumerate(choices)
        ]

    def _station(self, choice: Choice, others: dict[Choice, _Station]) -> _Station:
        """A context for a choice: another one's, if only the number of threads is different."""
        for other, station in others.items():
            if replace(other, n_threads=choice.n_threads) == choice:
                return station
        return _Station(self._model, self._settings, choice, self._tokens)


class _Station:
    """A context with a full window."""

    def __init__(self, model: _core.Model, settings: TuneSettings, choice: Choice, tokens: Tokens) -> None:
        n_batch, n_ubatch = batch_sizes(None, choice.n_ubatch)
        self._context = _core.Context(
            model,
            lminf=to_params(settings.config, 0),
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=choice.n_threads,
            n_threads_batch=choice.n_threads,
            cache_type_k=choice.cache_type_k,
            cache_type_v=choice.cache_type_v,
        )
        self._tokens = tokens
        self._n_batch = n_batch
        params = self._context.params
        assert params is not None
        threads = ThreadPlan(None, None)  # filling is not measured
        while self._context.n_past() < params.n_sink + params.n_window:
            self._context.set_n_threads(*threads.now())
            self._read(n_ubatch)
        self.turn(choice, 2, 2)  # one that does not count

    @property
    def kv_bytes(self) -> int:
        return self._context.stats().n_bytes

    def turn(self, choice: Choice, n_decode: int, n_prompt: int) -> _Turn:
        """Reads on, then decodes: at a full window each costs the same wherever it is."""
        self._context.set_n_threads(choice.n_threads, choice.n_threads)
        with _timed() as prompt:
            self._read(n_prompt)
        with _timed() as decode:
            for _ in range(n_decode):
                self._read(1)
        return _Turn(decode=n_decode / decode[0], prompt=n_prompt / prompt[0])

    def _read(self, n_tokens: int) -> None:
        begin = self._context.n_past()
        for start in range(begin, begin + n_tokens, self._n_batch):
            self._context.decode(circle(self._tokens, start, min(self._n_batch, begin + n_tokens - start)))

    def close(self) -> None:
        self._context.close()


@contextmanager
def _timed() -> Iterator[list[float]]:
    seconds: list[float] = []
    begin = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - begin)


def _words(choice: Choice) -> str:
    return f"{choice.n_threads} threads, micro-batch {choice.n_ubatch}, {cache_name(choice)}"


def cache_name(choice: Choice) -> str:
    """Types of keys and values as `cache_type_pair` takes them."""
    types = choice.cache_type_k, choice.cache_type_v
    return types[0] if types[0] == types[1] else "/".join(types)
