"""`lminf-edge repeat`: the run of a results file once more."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from lminf_edge.cli._evaluation import Output
from lminf_edge.cli._options import AsJson
from lminf_edge.cli._terminal import FAILURE, counting_bar, messages, output, with_exit_codes, without_control
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.results import Record, ResultLog, read_results
from lminf_edge.evaluation.tasks import TASKS, Repeated, compare, repeat, settings_of

_N_ROWS = 40
"""Most figures in the table; `--json` has all."""


@with_exit_codes
def repeat_run(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Results of eval or bench: a file of JSON lines.")],
    new: Output = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the model is now. It must be the recorded one.")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the text is now.")] = None,
    as_json: AsJson = False,
) -> None:
    """Does a run once more, from its own record, and compares both.

    Losses, accuracies and F1 are the same on the same machine with the same version; if they differ, the exit code is
    1. Times are shown, too, and never are the same.
    """
    before = read_results(results)
    run = before[0]
    if new is not None and new.exists() and new.samefile(results):
        raise ConfigError(f"output = {new}: that is the recorded run itself")
    settings = settings_of(run, model, text)
    if getattr(settings, "text", None) == "-" and sys.stdin.isatty():
        raise ConfigError("the recorded run read its text from standard input: give it the same text there again")
    with ResultLog(new) as log:
        with _progress(run["task"]) as on_progress:
            repeat(run, settings, log, on_progress)
        now = list(log.records)
    figures = compare(run["task"], before, now)
    changes = _changes(run, now[0])
    is_timed = TASKS[run["task"]].is_timed
    is_same = is_timed or all(figure.is_equal for figure in figures if figure.before is not None)
    if as_json:
        listed = [{**asdict(figure), "equal": figure.is_equal} for figure in figures]
        document = {"task": run["task"], "same": None if is_timed else is_same, "changes": changes, "figures": listed}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _show(figures, changes, is_timed)
    if not is_same:
        raise typer.Exit(FAILURE)


@contextmanager
def _progress(task: str) -> Iterator[Callable[..., object]]:
    """A bar for tasks that count, and a line for the one that says what it does."""
    if task == "bench":
        with Status("starting", console=messages) as status:
            yield lambda doing: status.update(escape(doing))
    else:
        with counting_bar("reading", "tokens") as on_progress:
            yield on_progress


def _changes(before: Record, now: Record) -> list[str]:
    """What is not as it was, and can explain differences."""
    return [
        f"{name.replace('_', ' ')}: {before[part].get(name)}, now {now[part].get(name)}"
        for part in ("program", "machine")
        for name in before[part]
        if before[part].get(name) != now[part].get(name)
    ]


def _show(figures: Sequence[Repeated], changes: Sequence[str], is_timed: bool) -> None:
    for change in changes:
        output.print(without_control(f"other than recorded: {change}"), markup=False, soft_wrap=True)
    known = [figure for figure in figures if figure.before is not None]
    output.print(_table(known[:_N_ROWS], is_timed))
    if len(known) > _N_ROWS:
        output.print(f"and {len(known) - _N_ROWS:,} more, all of which --json lists")
    if len(known) < len(figures):
        output.print(f"{len(figures) - len(known):,} figures are new: the recorded run had ended before them")
    if not is_timed:
        n_equal = sum(figure.is_equal for figure in known)
        same = "all" if n_equal == len(known) else f"{n_equal:,}"
        output.print(f"{same} of {len(known):,} figures are the same")


def _table(figures: Sequence[Repeated], is_timed: bool) -> Table:
    table = Table()
    for name in ("figure", "method", "where"):
        table.add_column(name)
    for name in ("recorded", "now", "now / recorded" if is_timed else "equal"):
        table.add_column(name, justify="right")
    for figure in figures:
        where = ", ".join(f"{name} {_value(value)}" for name, value in figure.place.items())
        row = (figure.what.partition(" ")[2], f"{figure.method}, {figure.cache_type}", where)
        verdict = _ratio(figure) if is_timed else "yes" if figure.is_equal else "no"
        table.add_row(
            *(escape(without_control(each)) for each in row), _value(figure.before), _value(figure.now), verdict
        )
    return table


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ratio(figure: Repeated) -> str:
    return f"{figure.now / figure.before:.3f}" if figure.before and figure.now is not None else "-"
