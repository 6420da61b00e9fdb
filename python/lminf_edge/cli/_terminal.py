"""What all subcommands share: where they print, how they end, and progress bars."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.models import resolve_model

FAILURE = 1
USAGE = 2
INTERRUPTED = 130

output = Console(highlight=False)
"""Results."""

messages = Console(stderr=True, highlight=False)
"""Everything else: progress, warnings, errors."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_N_SHORT = 256
"""A prompt of fewer tokens is read too quickly for a progress bar."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def with_exit_codes(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Ends a subcommand with the exit code for what it raised, and one line in words instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            messages.print("[bold red]wrong usage:[/bold red]", _plain(error), soft_wrap=True)
            raise typer.Exit(USAGE) from error
        except LMInfError as error:
            messages.print("[bold red]error:[/bold red]", _plain(error), soft_wrap=True)
            raise typer.Exit(FAILURE) from error
        except BrokenPipeError:  # whoever read the output has enough; typer ends the process quietly
            raise
        except OSError as error:
            messages.print("[bold red]error:[/bold red]", _plain(error), soft_wrap=True)
            raise typer.Exit(FAILURE) from error
        except KeyboardInterrupt as error:
            messages.print("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


@contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Ctrl-C does nothing but within `heeding_ctrl_c`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, once: whoever presses it again does not disturb what follows on the first."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_text(text: str) -> None:
    """A piece of a model's text on standard output, at once.

    A terminal gets no control characters but line feeds and tabs: a model's text must not move its cursor or set its
    title. Files and pipes get the text as it is.
    """
    sys.stdout.write(without_control(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def without_control(text: str) -> str:
    """A text without the characters that would control a terminal; line feeds and tabs stay."""
    return _CONTROL.sub("", text)


def find_model(spec: str | None) -> Path:
    """`resolve_model` with a progress bar while something is downloaded.

    Raises:
        ModelLoadError: There is no such model.
    """
    if not _draws_bars():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # huggingface_hub draws its own
    with _bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        task = None

        def progress(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task("downloading the default model", total=total)
            bar.update(task, completed=done)

        return resolve_model(spec, progress)


@contextmanager
def loading_bar(name: str) -> Iterator[Callable[[float], None]]:
    """A bar for a model that is being loaded; yields what to call with the loaded fraction."""
    with _bar(TaskProgressColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"loading {name}", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


@contextmanager
def reading_bar(n_tokens: int, n_read: Callable[[], int]) -> Iterator[None]:
    """A bar for a prompt that is being read; none for one that is read in no time.

    Args:
        n_tokens: Length of the prompt.
        n_read: How many tokens have been read by now; called from another thread.
    """
    if n_tokens < _N_SHORT:
        yield
        return
    with _bar(_TokensColumn(), _TokenRateColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("reading", total=n_tokens)
        bar.before_drawing = lambda: bar.update(task, completed=min(n_tokens, max(0, n_read())))
        yield


@contextmanager
def counting_bar(description: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for something that takes long; yields what to call with how much is done, and how much there is if known.

    Args:
        description: What is being done.
        unit: What is counted.
    """
    with _bar(_CountColumn(unit), TimeRemainingColumn()) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Bar(Progress):
    """A progress bar that can look at what it shows by itself.

    Attributes:
        before_drawing: Called each time that the bar is drawn.
    """

    before_drawing: Callable[[], object] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """See `Progress`."""
        if self.before_drawing is not None:
            self.before_drawing()
        return super().get_renderables()

    def stop(self) -> None:
        """See `Progress`, which in older versions of rich prints an empty line even if it is disabled."""
        if not self.disable:
            super().stop()


def _draws_bars() -> bool:
    return messages.is_terminal and not messages.is_dumb_terminal


def _bar(*columns: ProgressColumn) -> _Bar:
    return _Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=messages,
        transient=True,
        disable=not _draws_bars(),
    )


class _TokensColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} tokens")


class _CountColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total} {self._unit}")


class _TokenRateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")


def _plain(error: Exception) -> str:
    """The message with square brackets that are no markup."""
    return str(error).replace("[", r"\[")
