"""A sequence of tokens in a context: who may change it, what it consists of, whether there is room in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from lminf_edge._library import _core
from lminf_edge.errors import ContextError, StateError
from lminf_edge.history import TokenHistory
from lminf_edge.records import MemoryStats, RecalledToken
from lminf_edge.speculation import DraftCosts
from lminf_edge.system import peak_resident_bytes, resident_bytes
from lminf_edge.threads import ThreadPlan
from lminf_edge.timing import TokenTimes
from lminf_edge.tokens import TokenArray


@dataclass(frozen=True, kw_only=True)
class SequenceState:
    """A sequence outside of its context.

    Attributes:
        cells: What llama.cpp keeps of it.
        logits: Logits of its last token, float32 [n_vocab], if they are still there.
        history: Its tokens as 32-bit integers, if they are known.
    """

    cells: bytes
    logits: npt.NDArray[np.float32] | None
    history: bytes | None


class ModelSequence:
    """One sequence of a context, which one caller at a time changes.

    Attributes:
        n_ctx: Length at which the context is full, in tokens. None: never (LM-Infinite).
        threads: How many threads compute.
        token_times: How long drawn tokens took.
        n_drafted: Tokens that were decoded ahead.
        n_accepted: Those of them that were drawn.
        draft_costs: How long they took.
    """

    def __init__(self, model: _core.Model, context: _core.Context, n_ctx: int | None, threads: ThreadPlan) -> None:
        """An empty sequence.

        Args:
            model: The model of the context.
            context: The context.
            n_ctx: See above.
            threads: See above.
        """
        self.n_ctx = n_ctx
        self.threads = threads
        self.token_times = TokenTimes()
        self.n_drafted = 0
        self.n_accepted = 0
        self.draft_costs = DraftCosts()
        self._n_ahead = 0
        self._open: tuple[_core.Model, _core.Context] | None = (model, context)
        self._history = TokenHistory()
        self._turn = 0
        self._n_batch = context.n_batch
        self._computing = threading.Lock()

    @property
    def model(self) -> _core.Model:
        """The model. Raises StateError once closed."""
        return self.check_open()[0]

    @property
    def context(self) -> _core.Context:
        """The context. Raises StateError once closed."""
        return self.check_open()[1]

    @property
    def n_past(self) -> int:
        """Position of the next token, 64-bit."""
        return self.context.n_past()

    def memory_stats(self) -> MemoryStats:
        """What the context keeps of the sequence. Waits for a micro-batch being computed."""
        stats = self.context.stats()
        middle = self.context.middle_stats()
        return MemoryStats(
            kv_bytes=stats.n_bytes,
            n_cells=stats.n_cells,
            n_cells_used=stats.n_cells_used,
            n_past=stats.n_past,
            n_evicted=stats.n_evicted,
            sink_distance=None if stats.sink_distance < 0 else stats.sink_distance,
            n_placements=stats.n_placements,
            n_rebases=stats.n_rebases,
            pos_physical=stats.pos_physical,
            window_fill=self._window_fill(stats),
            tokens_per_second=self.token_times.tokens_per_second,
            latency_p50=self.token_times.percentile(50),
            latency_p99=self.token_times.percentile(99),
            resident_bytes=resident_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
            n_stored=middle.n_stored,
            n_retrievable=middle.n_retrievable,
            store_bytes=middle.n_bytes,
            scan_seconds=middle.scan_seconds,
            attention=tuple(who or "none" for who in self.context.attention()),
            n_drafted=self.n_drafted,
            n_accepted=self.n_accepted,
        )

    def _window_fill(self, stats: _core.Stats) -> float:
        params = self.context.params
        if params is None:
            return stats.n_cells_used / stats.n_cells
        return (stats.n_cells_used - min(params.n_sink, stats.n_past)) / params.n_window

    def close(self) -> None:
        """Frees the context, as soon as no other thread computes with it. Can be called again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def check_open(self) -> tuple[_core.Model, _core.Context]:
        """The model and the context. Raises StateError once closed."""
        if self._open is None:
            raise StateError("this Llama is closed")
        return self._open

    @contextmanager
    def exclusive(self, turn: int | None = None) -> Iterator[int]:
        """Two callers that append to one sequence would mix their texts: refuses the second one.

        Args:
            turn: A call that comes back to its sequence passes what it got the first time.

        Returns:
            A context manager with the number of the call that the sequence belongs to from now on.

        Raises:
            StateError: Another thread computes, or another call has changed the sequence since that turn.
        """
        self.check_open()
        if not self._computing.acquire(blocking=False):
            raise StateError("this Llama is computing in another thread (or was called from a signal handler)")
        try:
            if turn is None:
                self._turn += 1
            elif turn != self._turn:
                raise StateError("another call has changed the sequence meanwhile")
            yield self._turn
        finally:
            self._computing.release()

    def check_room(self, n_tokens: int, n_past: int | None = None) -> None:
        """Raises ContextError if a plain context has no room for n_tokens after n_past others (None: those it has)."""
        n_past = self.n_past if n_past is None else n_past
        if self.n_ctx is not None and n_past + n_tokens > self.n_ctx:
            raise ContextError(
                f"the context is full: {n_past} of {self.n_ctx} positions are taken, {n_tokens} more are needed. "
                "Pass lminf=LMInfConfig() for a text without end."
            )

    def make_room(self, n_tokens: int) -> None:
        """Called before n_tokens are appended, at most n_batch. Only within `exclusive`."""

    @contextmanager
    def recording(self, tokens: TokenArray) -> Iterator[_core.Context]:
        """For a computation that appends tokens: remembers those that are in the sequence in the end.

        These are fewer when an interrupt came in between.
        """
        context = self.context
        self.make_room(tokens.size)
        context.set_n_threads(*self.threads.now())
        n_before = context.n_past()
        try:
            yield context
        finally:
            self._history.append(tokens[: context.n_past() - n_before])

    def append(self, tokens: TokenArray, check: Callable[[], object] | None = None, recall: int = 0) -> None:
        """Reads tokens; the logits of the last one stay for a sampler. Only within `exclusive`.

        Args:
            tokens: Token ids, any number.
            check: Called about every 50 ms; what it raises stops the reading after a complete micro-batch.
            recall: Of `recall_mode`.
        """
        meanwhile = partial(self._meanwhile, check) if tokens.size > 1 else check
        for begin in range(0, tokens.size, self._n_batch):
            piece = tokens[begin : begin + self._n_batch]
            with self.recording(piece) as context:
                context.decode(piece, check=meanwhile, recall=recall)

    def _meanwhile(self, check: Callable[[], object] | None) -> None:
        """Called while many tokens are read."""
        self.context.set_n_threads(*self.threads.now())
        if check is not None:
            check()

    def append_ahead(self, tokens: TokenArray, check: Callable[[], object] | None = None, recall: int = 0) -> int:
        """Appends one token and decodes others ahead, which `advance` takes up. Only within `exclusive`.

        The sequence does not hold them for anybody else: whatever else is done with it takes them back first.

        Args:
            tokens: The token, and any number of others that may come after it.
            check: See `append`; nothing is appended then.
            recall: See `append`.

        Returns:
            How many of the others were decoded: as many as a micro-batch has room for, and none where a rebase would
            come earlier for them.
        """
        if tokens.size == 1:
            self.append(tokens, check, recall)
            return 0
        with self.recording(tokens[:1]) as context:
            n_ahead = context.decode_ahead(tokens, check=check, recall=recall)
        self.n_drafted += n_ahead
        self._n_ahead = n_ahead
        return n_ahead

    def advance(self, token: int, recall: int = 0) -> bool:
        """Appends a token if it is the next of those decoded ahead. Only within `exclusive`.

        Args:
            token: Token id.
            recall: See `append`.

        Returns:
            Whether it was. If not, nothing changed.
        """
        if self._n_ahead == 0:
            return False
        with self.recording(np.array([token], np.int32)) as context:
            is_next = context.advance(token, recall=recall)
        self._n_ahead = self._n_ahead - 1 if is_next else 0
        self.n_accepted += is_next
        return is_next

    def newest_tokens(self, n: int) -> TokenArray:
        """The last n tokens, or as many as are recorded."""
        return self._history.newest(n)

    def recalled(self, n: int) -> tuple[RecalledToken, ...]:
        """The n heaviest of the tokens that the last one looked up."""
        result = []
        for position, weight in self.context.recalled()[:n]:
            token = self._history.token_at(position)
            text = None if token is None else self.model.token_to_piece(token, True).decode(errors="replace")
            result.append(RecalledToken(position=position, weight=weight, token=token, text=text))
        return tuple(result)

    def text_between(self, begin: int, end: int) -> str:
        """The text of the tokens at positions [begin, end), as far as they are recorded."""
        tokens = [self._history.token_at(position) for position in range(begin, end)]
        known = [self.model.token_to_piece(token, True) for token in tokens if token is not None]
        return b"".join(known).decode(errors="replace")

    @property
    def turn(self) -> int:
        """Number of the call that the sequence belongs to: another one than last time has changed it."""
        return self._turn

    def forget(self, end: int) -> None:
        """Forgets everything between the sink tokens and position `end`. Only within `exclusive`.

        Raises:
            StateError: The sequence does not go beyond `end`. Nothing was changed.
        """
        self.context.forget(end)
        self._history.forget()

    def forget_all(self) -> None:
        """Forgets everything behind the sink tokens and goes on at the same position. Only within `exclusive`.

        Middle tokens stay stored.

        Raises:
            StateError: A layer of the model cannot do that. The sequence is of no use then.
        """
        n_past = self.n_past
        # A sequence cannot forget its last token: another one becomes the last, and is taken back
        self.context.decode(np.zeros(1, np.int32))
        self.context.forget(n_past)
        self.context.truncate(n_past)
        self._history.forget()

    def save(self) -> SequenceState:
        """Everything that the sequence needs to go on bit for bit. Only within `exclusive`."""
        context = self.context
        try:
            logits = context.last_logits()
        except StateError:
            logits = None
        return SequenceState(cells=context.get_state(), logits=logits, history=self._history.save())

    def load(self, state: SequenceState) -> None:
        """Replaces the sequence. Only within `exclusive`.

        Raises:
            StateError: The state does not fit the context. Nothing was changed.
        """
        self.context.set_state(state.cells, state.logits)
        self._history.load(state.history, self.n_past)

    def truncate(self, n_past: int) -> None:
        """Removes everything from position n_past on. Only within `exclusive`.

        Raises:
            ConfigError: The sequence is shorter.
            StateError: It cannot be done exactly. Nothing was changed.
        """
        if n_past == 0:
            self.context.clear()
        else:
            self.context.truncate(n_past)
        self._history.truncate(n_past)

    def keep_common_beginning(self, tokens: TokenArray, n_max: int | None = None) -> int:
        """Removes what the sequence and some tokens do not have in common; all of it if that cannot be done exactly.

        Only within `exclusive`.

        Args:
            tokens: Token ids.
            n_max: Keep at most this many.

        Returns:
            How many of the tokens need not be read: never all of them, because the last one's logits are needed.
        """
        n_kept = min(self._history.n_common(tokens, self.n_past), tokens.size - 1)
        n_kept = n_kept if n_max is None else min(n_kept, n_max)
        try:
            self.truncate(n_kept)
        except StateError:
            n_kept = 0
            self.truncate(0)
        return n_kept
