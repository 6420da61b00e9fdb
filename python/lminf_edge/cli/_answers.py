"""What `eval passkey` and `eval qa` show alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from lminf_edge.cli._evaluation import names
from lminf_edge.cli._terminal import messages
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.answering import AnsweringSettings
from lminf_edge.evaluation.results import Record

INSIDE, OUTSIDE = "inside the window", "outside"


def fractions(option: str, text: str | None) -> tuple[float, ...]:
    """The numbers in "0,0.25,1".

    Raises:
        ConfigError: One is none.
    """
    try:
        return tuple(float(part) for part in names(text or ""))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: must be numbers from 0 to 1 with commas between them") from error


def say_what_is_left_out(settings: AnsweringSettings, lengths: Iterable[int]) -> None:
    """Tells which methods do not get which lengths, if any."""
    for of in settings.passes():
        left_out = [f"{length:,}" for length in lengths if not settings.takes(of, length)]
        if left_out:
            messages.print(
                f"{of.method}, {of.cache_type}: left out at {', '.join(left_out)} tokens, "
                f"which are more than --full-tokens {settings.full_tokens}"
            )


def say_what_was_left_out(settings: AnsweringSettings, answers: Iterable[Record]) -> None:
    """The same after a run with prompts whose lengths nobody chose."""
    counts = Counter(f"{each['method']}, {each['cache_type']}" for each in answers)
    n_all = max(counts.values(), default=0)
    for of in settings.passes():
        name = f"{of.method}, {of.cache_type}"
        if counts[name] < n_all:
            messages.print(
                f"{name}: {n_all - counts[name]} of {n_all} prompts were left out, which have more tokens than "
                f"--full-tokens {settings.full_tokens}"
            )


def share(estimate: dict[str, Any]) -> str:
    """A share with its interval in percent."""
    return f"{100 * estimate['mean']:.0f} % ({100 * estimate['low']:.0f}-{100 * estimate['high']:.0f})"


def mean(estimate: dict[str, Any]) -> str:
    """A mean of numbers from 0 to 1 with its interval."""
    if estimate["low"] is None:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} ({max(0, estimate['low']):.3f}-{min(1, estimate['high']):.3f})"


def rows_by_length(cells: Iterable[Record]) -> list[tuple[str, list[tuple[str, list[Record]]]]]:
    """Cells by length and then by pass, each with its name for people; lengths in ascending order."""
    by_length: dict[str, dict[str, list[Record]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["length"] or cell["length_low"]):
        group = by_length.setdefault(_length(cell), {})
        group.setdefault(f"{cell['method']}, {cell['cache_type']}", []).append(cell)
    return [(length, list(group.items())) for length, group in by_length.items()]


def add_counts(table: Table, length: str, cells: Iterable[Record], name: str, windows: Iterable[bool | None]) -> None:
    """A row that says how many observations there are: the most of any pass."""
    cells = list(cells)
    counts = [max((cell[name] for cell in cells if cell["in_window"] is window), default=0) for window in windows]
    table.add_row(length, name.removeprefix("n_"), *(f"{count:,}" for count in counts), style="dim")


def _length(cell: Record) -> str:
    if cell["length"] is not None:
        return f"{cell['length']:,}"
    return f"{cell['length_low']:,}-{cell['length_high']:,}"
