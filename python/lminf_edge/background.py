"""A computation in a worker thread, seen from asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_END = object()


class _CancelledError(Exception):
    """Ends a computation whose result nobody wants any more."""


class Cancellation:
    """Tells a computation in another thread to end."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    def request(self) -> None:
        """The computation is not wanted any more."""
        self._requested.set()

    def check(self) -> None:
        """Called by the computation now and then. Raises if it is not wanted any more."""
        if self._requested.is_set():
            raise _CancelledError


async def iterate_in_thread(start: Iterator[T], cancellation: Cancellation) -> AsyncGenerator[T, None]:
    """Computes an iterator's items in a worker thread, each when it is asked for.

    When the task is cancelled or the generator closed, the computation is told to end, and the generator ends after it:
    whatever the computation uses is free again then.

    Args:
        start: The iterator. If it is a generator, it is closed at the end.
        cancellation: What the iterator's computation checks.
    """
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="lminf-edge")
    try:
        while (item := await loop.run_in_executor(executor, _next, start)) is not _END:
            yield item  # type: ignore[misc]
    finally:
        cancellation.request()
        closed = loop.run_in_executor(executor, _close, start)
        executor.shutdown(wait=False)
        await asyncio.shield(closed)


def _next(iterator: Iterator[T]) -> T | object:
    """Like next(), for an asyncio future, which cannot hold a StopIteration."""
    return next(iterator, _END)


def _close(iterator: Iterator[T]) -> None:
    close: Callable[[], None] | None = getattr(iterator, "close", None)
    if close is not None:
        close()
