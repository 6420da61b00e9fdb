"""What `bench` lets a model's process do: go to a depth, decode in turns, read prompts, time single tokens.

Decoding is measured with given tokens, the same ones for every method: one token goes through the model, and the logits
after it are there. Drawing a token from them takes as long for every method. With a store of middle tokens, every token
that is decoded recalls.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lminf_edge.errors import StateError, UnsupportedModelError
from lminf_edge.evaluation.bench.copied_state import repeated_state
from lminf_edge.evaluation.bench.copied_store import Section, with_repeated_rows
from lminf_edge.evaluation.context_shift import ShiftingSequence
from lminf_edge.evaluation.reader import has_store
from lminf_edge.llama import Llama
from lminf_edge.middle import N_QUESTION
from lminf_edge.sampling import SamplingOptions
from lminf_edge.sequence import SequenceState

Tokens = npt.NDArray[np.int32]

N_AT_LEAST = 4
"""Tokens of a turn, however long they take."""

STALLS = ("shift", "rebase", "placement", "eviction", "other")
"""What a token may have to wait for. It counts under the first of these that happened."""

_STORE_BLOCKS = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Weights in a block of a store's type, and its bytes."""

_N_WARM_UP = 32
_N_PIECE = 64


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Some tokens decoded one after the other.

    Attributes:
        n_tokens: How many.
        seconds: How long they took together.
        scan_seconds: How much of that went into looking through the store of middle tokens.
    """

    n_tokens: int
    seconds: float
    scan_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a process keeps in memory.

    Attributes:
        kv_bytes: Bytes of keys and values in the cache.
        resident_bytes: Memory of the process that is in RAM, mapped model files and the store included.
        store_bytes: Bytes of the store of middle tokens.
        n_retrievable: Stored tokens that have left the window: what a token looks through that recalls.
        scan_bytes: Bytes of their keys.
    """

    kv_bytes: int
    resident_bytes: int
    store_bytes: int = 0
    n_retrievable: int = 0
    scan_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptTurn:
    """A prompt read from the beginning.

    Attributes:
        seconds: Until all of it was read.
        first_token: Seconds until the first token of an answer was drawn.
    """

    seconds: float
    first_token: float


@dataclass(frozen=True, kw_only=True)
class TimedTokens:
    """Consecutive tokens.

    Attributes:
        seconds: How long each took.
        stalls: What each had to wait for, one of `STALLS`.
    """

    seconds: tuple[float, ...]
    stalls: tuple[str, ...]


def read_to(llm: Llama, tokens: Tokens, depth: int) -> Iterator[int]:
    """Reads a text in a circle until the sequence has a length. Yields its length from time to time."""
    while (n_past := llm.n_past) < depth:
        _append(llm, circle(tokens, n_past, min(llm._n_ubatch, depth - n_past)))
        yield llm.n_past


def jump_to(llm: Llama, tokens: Tokens, depth: int) -> Iterator[int]:
    """Goes to a position of an endless sequence; its window is full there.

    Reads the sink tokens, goes on shortly before the position, and reads as many tokens as there are cells.
    """
    config = llm.config
    assert config is not None and config.n_window is not None
    n_first = config.n_sink + _N_PIECE
    begin = depth - config.n_window - config.n_rollback - llm._n_ubatch
    if begin > n_first:
        yield from read_to(llm, tokens, n_first)
        if not llm._context.test_set_position(begin):
            raise StateError(f"this model's sequence cannot go on at position {begin}")
    yield from read_to(llm, tokens, depth)


def save_read(llm: Llama) -> Iterator[bytes]:
    """The sequence as llama.cpp saves it, to be copied elsewhere."""
    with llm._sequence.exclusive():
        yield llm._sequence.save().cells


def copy_to(llm: Llama, state: bytes, depth: int) -> Iterator[int]:
    """Fills a plain context with what another one read, repeated."""
    with llm._sequence.exclusive():
        llm._sequence.load(SequenceState(cells=repeated_state(state, depth), logits=None, history=None))
    yield llm.n_past


def store_row_bytes(llm: Llama) -> Iterator[int]:
    """Bytes of a token in the store of middle tokens."""
    yield llm._context.middle_stats().n_bytes_token


def copy_store_to(llm: Llama, tokens: Tokens, depth: int) -> Iterator[int]:
    """Goes to a position of a sequence with a store, which then has a row for every token that it can have one for."""
    yield from jump_to(llm, tokens, depth)
    with llm._sequence.exclusive():
        cells = with_repeated_rows(llm._sequence.save().cells, store_sections(llm))
        llm._sequence.load(SequenceState(cells=cells, logits=None, history=None))
    yield llm.n_past


def read_store_to(llm: Llama, tokens: Tokens, depth: int) -> Iterator[int]:
    """The same by reading: from the beginning, or from where the store's oldest token is."""
    config = llm.config
    assert config is not None and config.middle is not None
    llm.reset()
    yield from jump_to(llm, tokens, max(0, depth - config.middle.max_tokens))
    yield from read_to(llm, tokens, depth)


def shift_to(llm: Llama, tokens: Tokens, n_used: int, depth: int) -> Iterator[int]:
    """Reads until a context was shifted and n_used of its cells are in use; its text is then said to have a length."""
    sequence = llm._sequence
    assert isinstance(sequence, ShiftingSequence)
    while sequence.n_shifts == 0 or llm._context.n_past() < n_used:
        n_missing = n_used - llm._context.n_past() if sequence.n_shifts else llm._n_ubatch
        _append(llm, circle(tokens, llm.n_past, min(llm._n_ubatch, n_missing)))
        yield llm.n_past
    sequence.resume_at(depth)


def decode_turn(llm: Llama, tokens: Tokens, depth: int, n_tokens: int, max_seconds: float) -> Iterator[Turn]:
    """Goes back to a depth and decodes: one token that is not counted, then up to n_tokens in up to max_seconds.

    At least `N_AT_LEAST` tokens are decoded. A model that cannot go back (recurrent layers) goes on where it is.
    """
    if llm.n_past > depth:
        try:
            llm.truncate(depth)
        except StateError:
            depth = llm.n_past
    given = circle(tokens, depth, n_tokens + 1)
    recall = has_store(llm)
    _step(llm, given[:1], recall)
    n_done, seconds = 0, 0.0
    scanned = _scan_seconds(llm)
    with _undisturbed():
        begin = time.perf_counter()
        while n_done < n_tokens and (n_done < N_AT_LEAST or seconds < max_seconds):
            _step(llm, given[n_done + 1 : n_done + 2], recall)
            n_done += 1
            seconds = time.perf_counter() - begin
    yield Turn(n_tokens=n_done, seconds=seconds, scan_seconds=_scan_seconds(llm) - scanned)


def recompute_turn(llm: Llama, tokens: Tokens, n_window: int) -> Iterator[Turn]:
    """One token by a sliding window with re-computation: the whole window is read anew for it."""
    llm.reset()
    window = circle(tokens, 0, n_window)
    with _undisturbed():
        begin = time.perf_counter()
        _step(llm, window)
        seconds = time.perf_counter() - begin
    yield Turn(n_tokens=1, seconds=seconds)


def footprint(llm: Llama) -> Iterator[Footprint]:
    """What the process keeps in memory now."""
    stats = llm.memory_stats()
    yield Footprint(
        kv_bytes=stats.kv_bytes,
        resident_bytes=stats.resident_bytes,
        store_bytes=stats.store_bytes,
        n_retrievable=stats.n_retrievable,
        scan_bytes=_scan_bytes(llm, stats.n_retrievable),
    )


def read_prompt(llm: Llama, tokens: Tokens, n_tokens: int) -> Iterator[PromptTurn]:
    """Reads a prompt and draws the first token of an answer. With a store, its last `N_QUESTION` tokens recall."""
    _step(llm, circle(tokens, 0, min(n_tokens, _N_WARM_UP)))
    llm.reset()
    prompt = circle(tokens, 0, n_tokens)
    sampler = SamplingOptions().sampler(llm._model, 0)
    with _undisturbed():
        begin = time.perf_counter()
        if has_store(llm) and n_tokens > N_QUESTION:
            _append(llm, prompt[:-N_QUESTION])
        _step(llm, prompt[-N_QUESTION:] if has_store(llm) else prompt, has_store(llm))
        read = time.perf_counter()
        sampler.sample(llm._context)
        drawn = time.perf_counter()
    yield PromptTurn(seconds=read - begin, first_token=drawn - begin)


def time_tokens(llm: Llama, tokens: Tokens, n_tokens: int) -> Iterator[TimedTokens]:
    """Decodes token by token and tells what each had to wait for."""
    recall = has_store(llm)
    _step(llm, circle(tokens, llm.n_past, 1), recall)
    before = _counters(llm)
    for begin in range(0, n_tokens, _N_PIECE):
        given = circle(tokens, llm.n_past, min(_N_PIECE, n_tokens - begin))
        seconds, stalls = [], []
        with _undisturbed():
            for i in range(given.size):
                clock = time.perf_counter()
                _step(llm, given[i : i + 1], recall)
                seconds.append(time.perf_counter() - clock)
                after = _counters(llm)
                stalls.append(_stall(before, after))
                before = after
        yield TimedTokens(seconds=tuple(seconds), stalls=tuple(stalls))


def mean_loss(llm: Llama, tokens: Tokens) -> Iterator[float]:
    """Mean loss of a text read from the beginning, in nats per token."""
    llm.reset()
    yield -float(np.mean(llm.logprobs(tokens.tolist()), dtype=np.float64))


def logits_after(llm: Llama, tokens: Tokens) -> Iterator[npt.NDArray[np.float32]]:
    """Logits after each token of a text read from the beginning, float32 [n_tokens, n_vocab]."""
    llm.reset()
    yield llm.eval(tokens.tolist())


def circle(tokens: Tokens, begin: int, n_tokens: int) -> Tokens:
    """Some tokens of a text that begins again when it ends."""
    return tokens[np.arange(begin, begin + n_tokens) % tokens.size]


def _append(llm: Llama, tokens: Tokens, recall: bool = False) -> None:
    with llm._sequence.exclusive():
        llm._sequence.append(tokens, recall=llm._recall_mode(recall))


def _step(llm: Llama, tokens: Tokens, recall: bool = False) -> None:
    """Appends tokens and waits for the logits of the last one (a GPU computes on after llama.cpp's call)."""
    _append(llm, tokens, recall)
    llm._context.last_logits()


def _scan_seconds(llm: Llama) -> float:
    return llm._context.middle_stats().scan_seconds


def _head_sizes(llm: Llama) -> tuple[int, int]:
    """Components of a head's key and value."""
    metadata = llm.metadata
    arch, usual = metadata["general.architecture"], llm._model.n_embd // max(1, llm._model.n_head)
    key, value = (metadata.get(f"{arch}.attention.{name}_length", "") for name in ("key", "value"))
    return int(key or usual), int(value or usual)


def store_sections(llm: Llama) -> list[Section]:
    """What the store of middle tokens consists of, in the order of a state.

    Raises:
        UnsupportedModelError: The layers of the model are not all alike.
    """
    layers, sketch, key, value = _store_shape(llm)
    n_mean, n_words = -(-(_head_sizes(llm)[0] + 1) // 2) * 8, sketch // 8
    first_pass = [Section(n_mean, per_token=False), Section(2), *([Section(8)] * n_words)] if sketch else []
    sections = [*first_pass, Section(key), Section(value)] * (layers * llm._model.n_head_kv)
    if sum(section.size for section in sections if section.per_token) != llm._context.middle_stats().n_bytes_token:
        raise UnsupportedModelError("the layers of this model are not all alike: its store cannot be filled by copying")
    return sections


def _store_shape(llm: Llama) -> tuple[int, int, int, int]:
    """Layers, and bytes of a head's sketch (0: there are none), key and value."""
    assert llm.config is not None and llm.config.middle is not None
    middle = llm.config.middle
    begin, end = middle.layers
    n_weights, n_bytes = _STORE_BLOCKS[middle.cache_type]
    key, value = (n // n_weights * n_bytes for n in _head_sizes(llm))
    n_words = 1
    while 64 * n_words < _head_sizes(llm)[0]:
        n_words *= 2
    sketch = 0 if middle.n_candidates is None else 8 * n_words + 2
    return min(end or llm._model.n_layer, llm._model.n_layer) - begin, sketch, key, value


def _scan_bytes(llm: Llama, n_retrievable: int) -> int:
    """Bytes that looking through so many stored keys reads."""
    if llm.config is None or llm.config.middle is None or n_retrievable == 0:
        return 0
    layers, sketch, key, _ = _store_shape(llm)
    n_candidates = llm.config.middle.n_candidates
    n_exact = n_retrievable if n_candidates is None else min(n_candidates, n_retrievable)
    return layers * llm._model.n_head_kv * (n_retrievable * sketch + n_exact * key)


def _counters(llm: Llama) -> tuple[int, int, int, int]:
    """How often each of `STALLS` but the last has happened."""
    stats = llm._context.stats()
    sequence = llm._sequence
    n_shifts = sequence.n_shifts if isinstance(sequence, ShiftingSequence) else 0
    return n_shifts, stats.n_rebases, stats.n_placements, stats.n_evicted


def _stall(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    return next((name for name, n, m in zip(STALLS, before, after, strict=False) if m > n), STALLS[-1])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
