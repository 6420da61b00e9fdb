"""What all subcommands share: where they print, how they end, and progress bars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
        except KeyboardInterrupt as error:
            messages.print("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


def find_model(spec: str | None) -> Path:
    """`resolve_model` with a progress bar while something is downloaded.

    Raises:
        ModelLoadError: There is no such model.
    """
    with _download_bar("default model") as progress:
        return resolve_model(spec, progress)


@contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as bar:
        task = None

        def progress(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(f"downloading the {name}", total=total)
            bar.update(task, completed=done)

        yield progress


def _plain(error: Exception) -> str:
    """The message with square brackets that are no markup."""
    return str(error).replace("[", r"\[")
