"""A model in a process of its own that reads a stream and writes on: what that process uses is the model's alone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from lminf_edge.config import LMInfConfig
from lminf_edge.errors import LMInfError
from lminf_edge.evaluation.context_shift import ShiftingLlama
from lminf_edge.evaluation.streams import StreamPiece, read_stream
from lminf_edge.llama import Llama
from lminf_edge.records import GenerationStep
from lminf_edge.tokens import TokenSequence

_P = ParamSpec("_P")
_R = TypeVar("_R")


class PipeEnd(Protocol):
    """One end of a multiprocessing pipe."""

    def send(self, message: Any, /) -> None:
        """Sends an object that can be pickled."""

    def recv(self) -> Any:
        """Waits for the next object."""


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How the process opens the model. The other fields mean what they mean for `Llama`.

    Attributes:
        n_keep: A plain context is shifted when it is full, and keeps this many tokens (`ShiftingLlama`). None: it ends.
        cache_type: Type of cached keys and values.
    """

    model_path: Path
    lminf: LMInfConfig | None
    n_ctx: int | None = None
    n_keep: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int = 0
    cache_type: str = "f16"


@dataclass(frozen=True, kw_only=True)
class ReaderStatus:
    """Sent when the model is open, and with each piece of a stream.

    Attributes:
        n_past: Tokens that the model has seen.
        n_ctx: Length at which the context is full. None: never.
        n_ctx_train: Length that the model was trained on.
        kv_bytes: Bytes of the model's keys and values.
        resident_bytes: Memory of the process that is in RAM.
        lminf: The parameters in use, defaults filled in.
        piece: What was read since the last message.
    """

    n_past: int
    n_ctx: int | None
    n_ctx_train: int
    kv_bytes: int
    resident_bytes: int
    lminf: LMInfConfig | None
    piece: StreamPiece | None = None


@dataclass(frozen=True)
class _Work:
    function: Callable[..., Iterator[Any]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Done:
    error: LMInfError | None = None


class StreamReader:
    """Starts the process, gives it work and ends it. A context manager."""

    def __init__(self, options: ReaderOptions) -> None:
        """Starts the process and waits until the model is open.

        Raises:
            LMInfError: What opening the model raised there.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, options), daemon=True)
        with _interrupts_ignored():
            self._process.start()
        remote.close()
        try:
            (self.status,) = self._messages()
        except BaseException:
            self.close()
            raise

    def run(
        self, work: Callable[Concatenate[Llama, _P], Iterator[_R]], *args: _P.args, **kwargs: _P.kwargs
    ) -> Iterator[_R]:
        """Lets the process do something with its model.

        Args:
            work: A function of a module, which gets the model first.
            *args: Its other arguments, which can be pickled.
            **kwargs: The same.

        Yields:
            What it yields, as it comes. The next work can begin when all of it was taken.

        Raises:
            LMInfError: What it raised. The process can be given other work then.
        """
        self._pipe.send(_Work(work, args, kwargs))
        yield from self._messages()

    def read(self, tokens: TokenSequence, following: int | None = None) -> Iterator[ReaderStatus]:
        """Reads a text and scores it, as `read_stream` does.

        A plain context reads as much as fits: where n_ctx is less than the text, the stream ends there.

        Raises:
            LMInfError: What reading raised there.
        """
        for status in self.run(read_part, tokens, following):
            self.status = status
            yield status

    def write(
        self, prompt: str, n_tokens: int, *, temperature: float, repeat_penalty: float, seed: int
    ) -> Iterator[GenerationStep]:
        """Reads a prompt and writes on, past the model's end-of-generation tokens.

        Raises:
            LMInfError: What generating raised there.
        """
        yield from self.run(_write, prompt, n_tokens, temperature, repeat_penalty, seed)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _messages(self) -> Iterator[Any]:
        """What the process sends until its work is done."""
        while True:
            try:
                message = self._pipe.recv()
            except EOFError:
                self._process.join()
                raise LMInfError(f"the model's process ended with exit code {self._process.exitcode}") from None
            if isinstance(message, _Done):
                if message.error is not None:
                    raise message.error
                return
            yield message


def _serve(pipe: PipeEnd, options: ReaderOptions) -> None:
    """The process: opens the model, then does what it is told until it is killed."""
    try:
        with _open(options) as llm:
            pipe.send(status_of(llm))
            pipe.send(_Done())
            while True:
                work: _Work = pipe.recv()
                pipe.send(_Done(_do(pipe, llm, work)))
    except (EOFError, BrokenPipeError):
        return  # nobody is interested any more
    except LMInfError as error:
        pipe.send(_Done(error))
    except Exception as error:
        pipe.send(_Done(_unexpected(error)))


def _do(pipe: PipeEnd, llm: Llama, work: _Work) -> LMInfError | None:
    try:
        for message in work.function(llm, *work.args, **work.kwargs):
            pipe.send(message)
    except BrokenPipeError:
        raise
    except LMInfError as error:
        return error
    except Exception as error:
        return _unexpected(error)
    return None


def _unexpected(error: Exception) -> LMInfError:
    return LMInfError(f"{type(error).__name__}: {error}")


def _open(options: ReaderOptions) -> Llama:
    common: dict[str, Any] = {
        "n_ubatch": options.n_ubatch,
        "n_threads": options.n_threads,
        "n_gpu_layers": options.n_gpu_layers,
        "cache_type_k": options.cache_type,
        "cache_type_v": options.cache_type,
    }
    if options.n_keep is not None:
        assert options.n_ctx is not None
        return ShiftingLlama(options.model_path, n_ctx=options.n_ctx, n_keep=options.n_keep, **common)
    return Llama(options.model_path, lminf=options.lminf, n_ctx=options.n_ctx, **common)


def has_store(llm: Llama) -> bool:
    """Whether the model stores middle tokens that can be recalled."""
    return llm.config is not None and llm.config.middle is not None


def read_part(llm: Llama, tokens: TokenSequence, following: int | None) -> Iterator[ReaderStatus]:
    """What `StreamReader.read` does, in the process. With a store, what is read recalls, gated."""
    room = len(tokens) if llm.n_ctx is None else llm.n_ctx - llm.n_past
    if room < len(tokens):
        tokens, following = tokens[:room], int(tokens[room])
    if len(tokens):
        for piece in read_stream(llm, tokens, following, "gated" if has_store(llm) else False):
            yield status_of(llm, piece)


def _write(
    llm: Llama, prompt: str, n_tokens: int, temperature: float, repeat_penalty: float, seed: int
) -> Iterator[GenerationStep]:
    yield from llm.generate(
        prompt,
        max_tokens=n_tokens,
        temperature=temperature,
        repeat_penalty=repeat_penalty,
        seed=seed,
        stop_at_end=False,
    )


def status_of(llm: Llama, piece: StreamPiece | None = None) -> ReaderStatus:
    """What the process says of its model."""
    stats = llm.memory_stats()
    return ReaderStatus(
        n_past=stats.n_past,
        n_ctx=llm.n_ctx,
        n_ctx_train=llm.n_ctx_train,
        kv_bytes=stats.kv_bytes,
        resident_bytes=stats.resident_bytes,
        lminf=llm.config,
        piece=piece,
    )


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts now never sees Ctrl-C; it is killed when its parent goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
