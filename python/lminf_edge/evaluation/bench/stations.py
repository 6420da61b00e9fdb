"""Models that wait at their depths for their turns, each in a process of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from lminf_edge.errors import ContextError, StateError, UnsupportedModelError
from lminf_edge.evaluation.bench import work
from lminf_edge.evaluation.bench.plan import RECOMPUTE, BenchSettings, Place, model_options
from lminf_edge.evaluation.bench.step_bytes import plain_context_bytes
from lminf_edge.evaluation.bench.work import Footprint, Tokens, Turn
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.peers.protocol import Peer, PeerModel, peer_command
from lminf_edge.evaluation.reader import StreamReader
from lminf_edge.system import default_n_threads, human_bytes

MAX_SECONDS = 3.0
"""A turn of a slow method ends after these, with fewer tokens than planned."""

IMPOSSIBLE = (ContextError, StateError, UnsupportedModelError)
"""What one method cannot do while others can: it is left out, with the reason."""

_MARGIN = 300_000_000
"""Bytes that a process needs beside keys and values, weights apart: they are mapped once for all."""

_N = TypeVar("_N")


class Station(Protocol):
    """Something that decodes at a depth."""

    @property
    def place(self) -> Place:
        """Where it is."""

    def turn(self) -> Turn:
        """Decodes some tokens, from the same depth each time."""

    def footprint(self) -> Footprint:
        """What its process keeps in memory."""

    def close(self) -> None:
        """Ends its process."""


class ModelStation:
    """A model at a depth.

    Attributes:
        place: Where it is, and how it got there.
        reader: The process.
    """

    def __init__(
        self,
        settings: BenchSettings,
        place: Place,
        tokens: Tokens,
        state: bytes | None = None,
        on_progress: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Opens the model and goes to its depth.

        Args:
            settings: The settings.
            place: The place.
            tokens: The text to read.
            state: What a plain context has read, for a place where another one is filled by copying.
            on_progress: Called with what is being done now, if it takes long.

        Raises:
            ContextError: There is not enough memory for it.
            LMInfError: As for `Llama`; or the depth cannot be reached.
        """
        self.place = place
        self._settings = settings
        self._tokens = tokens
        check_memory(settings, place)
        self.reader = StreamReader(model_options(settings, place))
        try:
            self._fill(state, on_progress)
        except BaseException:
            self.close()
            raise

    def _fill(self, state: bytes | None, on_progress: Callable[[str], object]) -> None:
        place, reader = self.place, self.reader
        if place.method == RECOMPUTE:
            return
        if place.filled == "copied" and place.method == "middle":
            filled = fill_store(self._settings.setup, reader, self._tokens, place.depth, on_progress)
            self.place = replace(place, filled=filled)
        elif place.filled == "copied":
            assert state is not None
            last_of(reader.run(work.copy_to, state, place.depth))
        elif place.method == "shift":
            n_used = self._settings.n_used_by_shift
            last_of(reader.run(work.shift_to, self._tokens, n_used, place.depth))
        elif place.filled == "positioned":
            last_of(reader.run(work.jump_to, self._tokens, place.depth))
        elif place.depth > 0:
            last_of(reader.run(work.read_to, self._tokens, place.depth))

    def turn(self) -> Turn:
        """See `Station`."""
        if self.place.method == RECOMPUTE:
            return last_of(self.reader.run(work.recompute_turn, self._tokens, self._settings.setup.n_window))
        n_tokens = self._settings.n_decode
        return last_of(self.reader.run(work.decode_turn, self._tokens, self.place.depth, n_tokens, MAX_SECONDS))

    def saved(self) -> bytes:
        """What a plain context has read."""
        return last_of(self.reader.run(work.save_read))

    def footprint(self) -> Footprint:
        """See `Station`."""
        return last_of(self.reader.run(work.footprint))

    def close(self) -> None:
        """See `Station`."""
        self.reader.close()


class PeerStation:
    """Another program at a depth beyond its window.

    Attributes:
        place: Where it is.
        peer: The program.
        model: What it opened.
    """

    def __init__(self, settings: BenchSettings, place: Place, tokens: Tokens) -> None:
        """Starts the program, which reads until its window is full.

        Raises:
            ConfigError: It is not installed.
            LMInfError: It failed.
        """
        self.place = place
        self._settings = settings
        self._tokens = tokens
        self.peer = Peer(peer_command(place.method, settings.peer_python))
        setup = settings.setup
        try:
            n_threads = setup.n_threads or default_n_threads()
            self.model: PeerModel = self.peer.open(setup.model, setup.n_sink, setup.n_window, n_threads)
        except BaseException:
            self.close()
            raise

    def fill(self) -> None:
        """Reads until the window is full."""
        n_full = min(self.place.depth, self._settings.setup.n_window + self._settings.setup.n_sink)
        self.peer.ask("fill", tokens=self._given(0, n_full))

    def turn(self) -> Turn:
        """See `Station`."""
        tokens = self._given(self.place.depth, self._settings.n_decode + 1)
        answer = self.peer.ask("decode", tokens=tokens, n_at_least=work.N_AT_LEAST, max_seconds=MAX_SECONDS)
        return Turn(n_tokens=answer["n_tokens"], seconds=answer["seconds"])

    def footprint(self) -> Footprint:
        """See `Station`."""
        answer = self.peer.ask("footprint")
        return Footprint(kv_bytes=answer["kv_bytes"], resident_bytes=answer["resident_bytes"])

    def close(self) -> None:
        """See `Station`."""
        self.peer.close()

    def _given(self, begin: int, n_tokens: int) -> list[int]:
        given: list[int] = work.circle(self._tokens, begin, n_tokens).tolist()
        return given


def check_memory(settings: BenchSettings, place: Place) -> None:
    """Raises ContextError if a plain context, with the copy that fills it, does not fit into free memory."""
    free = free_bytes()
    if free is None or place.method != "full":
        return
    n_tokens = place.depth + settings.n_decode + 1
    n_bytes = plain_context_bytes(settings.setup.model, place.cache_type, n_tokens, settings.setup.n_ubatch)
    needed = (2 if place.filled == "copied" else 1) * n_bytes + _MARGIN
    if needed > free:
        raise ContextError(
            f"{n_bytes / 1e9:.1f} GB of keys and values: filling them takes {human_bytes(needed)}, "
            f"{human_bytes(free)} are free"
        )


def fill_store(
    setup: MethodSetup, reader: StreamReader, tokens: Tokens, depth: int, on_progress: Callable[[str], object]
) -> str:
    """Goes to a depth at which the store of middle tokens holds all that came before, as far as it can.

    Args:
        setup: What is compared.
        reader: A process with a store.
        tokens: The text to read.
        depth: The depth.
        on_progress: Called with how far it has come, if it has to read all of that.

    Returns:
        "copied", or "read" where a model's state does not allow that.

    Raises:
        ContextError: There is not enough memory for it.
    """
    n_bytes = min(depth, setup.middle.max_tokens) * last_of(reader.run(work.store_row_bytes))
    free = free_bytes()
    if free is not None and 2 * n_bytes + _MARGIN > free:
        raise ContextError(
            f"{n_bytes / 1e9:.1f} GB of middle tokens: filling the store takes {human_bytes(2 * n_bytes + _MARGIN)}, "
            f"{human_bytes(free)} are free"
        )
    try:
        last_of(reader.run(work.copy_store_to, tokens, depth))
    except UnsupportedModelError:
        for n_past in reader.run(work.read_store_to, tokens, depth):
            on_progress(f"going there: reading for the store, {n_past:,} of {depth:,} tokens")
        return "read"
    return "copied"


def free_bytes() -> int | None:
    """Memory that can still be used without swapping. None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    known = [n_bytes for n_bytes in (free, _cgroup_free()) if n_bytes is not None]
    return min(known) if known else None


def last_of(messages: Iterable[_N]) -> _N:
    """The last of what a process sends until its work is done."""
    return deque(messages, maxlen=1)[0]


def as_tokens(tokens: list[int]) -> Tokens:
    """Token ids as llama.cpp takes them."""
    return np.asarray(tokens, np.int32)


def _cgroup_free() -> int | None:
    """What the container (control groups version 2) leaves, if it has a limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdecimal() else None
