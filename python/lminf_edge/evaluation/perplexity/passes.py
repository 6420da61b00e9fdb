"""What several methods that read the same text have in common: their processes, and what is made of their losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lminf_edge.evaluation.context_shift import ShiftingSequence
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.perplexity.settings import FRESH, PplSettings
from lminf_edge.evaluation.reader import ReaderStatus, StreamReader, read_part
from lminf_edge.evaluation.results import ResultLog
from lminf_edge.evaluation.statistics import slope_interval, stream_interval
from lminf_edge.llama import Llama
from lminf_edge.tokens import TokenArray

Losses = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class PassState:
    """A pass in its process, and what is known of it."""

    of: Pass
    reader: StreamReader
    status: ReaderStatus
    ends: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    is_full: bool = False

    def add(self, end: int, loss: float, count: int) -> None:
        """A bucket that ends at `end` was read: mean loss of `count` tokens."""
        self.ends.append(end)
        self.losses.append(loss)
        self.counts.append(count)

    def names(self) -> dict[str, str]:
        """The fields of a record that say which pass it is of."""
        return {"method": self.of.method, "cache_type": self.of.cache_type}


@contextmanager
def open_passes(settings: PplSettings, n_train: int) -> Iterator[list[PassState]]:
    """Every pass with a process of its own."""
    setup = settings.setup
    n_full = 2 * n_train if settings.full_tokens is None else settings.full_tokens
    if settings.n_tokens is not None:
        n_full = min(n_full, settings.n_tokens)
    with ExitStack() as stack:
        states = []
        for each in settings.passes():
            method = Pass(method="endless", cache_type=each.cache_type) if each.method == FRESH else each
            reader = stack.enter_context(StreamReader(setup.reader_options(method, n_full)))
            states.append(PassState(of=each, reader=reader, status=reader.status))
        yield states


def write_differences(log: ResultLog, of: Pass, losses: dict[Pass, Losses], begin: int, end: int) -> None:
    """A pass compared with those that it should be compared with."""
    for other in _references(of, losses):
        n = min(len(losses[of]), len(losses[other]))
        difference = losses[of][:n].astype(np.float64) - losses[other][:n]
        log.add(
            "ppl.difference",
            method=of.method,
            cache_type=of.cache_type,
            of={"method": other.method, "cache_type": other.cache_type},
            begin=begin,
            end=begin + n,
            difference=vars(stream_interval(difference)),
            ratio=float(losses[of][:n].mean(dtype=np.float64) / losses[other][:n].mean(dtype=np.float64)),
        )


def _references(of: Pass, losses: dict[Pass, Losses]) -> list[Pass]:
    """A method is compared with itself with the first cache type, and with LM-Infinite; that one with a fresh start."""
    first = next((each.cache_type for each in losses if each.method == of.method), of.cache_type)
    first = "f16" if Pass(method=of.method, cache_type="f16") in losses else first
    other = FRESH if of.method == "endless" else "endless"
    wanted = [Pass(method=of.method, cache_type=first), Pass(method=other, cache_type=of.cache_type)]
    return [each for each in wanted if each != of and each in losses and of.method != FRESH]


def summarise(passes: list[PassState], log: ResultLog, slope_begin: int) -> None:
    """Writes the loss of each whole pass, and how it changes by position from `slope_begin` on."""
    for state in passes:
        losses, counts, ends = np.array(state.losses), np.array(state.counts), np.array(state.ends)
        if not counts.size:
            continue
        loss = float(np.average(losses, weights=counts))
        whole = (ends - counts >= slope_begin) & (counts == counts.max())
        slope = slope_interval(ends[whole] / 1e6, losses[whole]) if whole.sum() >= 3 else None
        log.add(
            "ppl.summary",
            **state.names(),
            n_tokens=int(counts.sum()),
            loss=loss,
            perplexity=math.exp(loss),
            slope=None if slope is None else vars(slope),
            slope_begin=slope_begin,
        )


def score_part(
    llm: Llama, before: TokenArray | None, tokens: TokenArray, following: int | None
) -> Iterator[ReaderStatus]:
    """Scores a part of a text: behind what was read, or behind `before` alone."""
    if before is not None:
        llm.reset()
        for _ in read_unscored(llm, before):
            pass
    if isinstance(llm._sequence, ShiftingSequence):
        llm._sequence.rearrange()
    yield from read_part(llm, tokens, following)


def read_unscored(llm: Llama, tokens: TokenArray) -> Iterator[None]:
    """Appends tokens."""
    if tokens.size:
        with llm._sequence.exclusive():
            llm._sequence.append(tokens)
    yield


def save_state(llm: Llama, path: Path) -> Iterator[None]:
    """Saves the sequence."""
    llm.save_state(path)
    yield


def load_state(llm: Llama, path: Path, n_past: int) -> Iterator[None]:
    """Goes on with a saved sequence of n_past tokens."""
    llm.load_state(path)
    if isinstance(llm._sequence, ShiftingSequence):
        llm._sequence.resume_at(n_past)
    yield
