"""`lminf-edge eval passkey`: is a number found again that was told somewhere in a long text?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.table import Table

from lminf_edge.cli._answers import INSIDE, OUTSIDE, add_counts, fractions, rows_by_length, say_what_is_left_out, share
from lminf_edge.cli._evaluation import AnsweringOptions, Output, absolute, numbers, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import counting_bar, output, with_exit_codes
from lminf_edge.evaluation.passkey import PasskeySettings, run_passkey
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256


@with_exit_codes
@with_option_groups
def eval_passkey(
    *,
    lengths: Annotated[str, typer.Option(help="Lengths of the prompts in tokens, such as 2k,4k,32k.")] = "2k,4k,8k",
    trials: Annotated[int, typer.Option(min=1, help="Texts of each length.")] = 10,
    needles: Annotated[
        int, typer.Option(min=1, help="Keys that each text tells, all of which are asked for.", metavar="N")
    ] = 1,
    bins: Annotated[int, typer.Option(min=1, help="Parts of the text that get as many keys each.")] = 5,
    depths: Annotated[
        str | None,
        typer.Option(help="Fixed depths instead of random ones, such as 0,0.5,1: shares of the text before the key."),
    ] = None,
    distances: Annotated[
        str | None,
        typer.Option(help="Fixed distances instead, such as 960,1024,1088: tokens from the key to the prompt's end."),
    ] = None,
    filler: Annotated[
        str | None, typer.Option(help="Text file to hide the keys in. Default: sentences about grass, sky and sun.")
    ] = None,
    results: Output = None,
    as_json: AsJson = False,
    methods: AnsweringOptions,
) -> None:
    """Passkey retrieval: accuracy by length and depth, of several methods on the same prompts.

    With --output, a run that was stopped goes on when it is started again.
    """
    settings = PasskeySettings(
        **methods.settings(),
        lengths=numbers("--lengths", lengths),
        n_trials=trials,
        n_bins=bins,
        depths=fractions("--depths", depths),
        distances=() if distances is None else numbers("--distances", distances),
        n_needles=needles,
        filler=absolute(filler),
        filler_sha256=None if filler is None else file_sha256(filler),
    )
    say_what_is_left_out(settings, settings.lengths)
    with result_log(results, as_json) as log:
        with counting_bar("reading", "tokens") as on_progress:
            run_passkey(settings, log, on_progress)
        if not as_json:
            show_passkey(log)


def show_passkey(log: ResultLog) -> None:
    """Tables of a run: accuracy by window, and by depth or distance."""
    cells = log.of_kind("passkey.cell")
    whole = [cell for cell in cells if (cell["depth_low"], cell["depth_high"]) == (0, 1)]
    output.print(_by_window(whole))
    parts = [cell for cell in cells if cell not in whole]
    if by_depth := [cell for cell in parts if cell.get("distance") is None]:
        output.print(_by_place("The same by depth of the key: share of the text before it", by_depth, _depth))
    if by_distance := [cell for cell in parts if cell.get("distance") is not None]:
        output.print(_by_place("The same by distance of the key: tokens behind it", by_distance, _distance))


def _by_window(cells: list[Record]) -> Table:
    table = Table(title="Answers that begin with the key, and their 95 % interval", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("method")
    for title in (f"key {INSIDE}", OUTSIDE, "all", "digits only"):
        table.add_column(title, justify="right")
    windows = (True, False, None)
    for length, group in rows_by_length(cells):
        add_counts(table, length, (cell for _, part in group for cell in part), "n_trials", windows)
        for name, part in group:
            by_window = {cell["in_window"]: cell for cell in part}
            shown = [share(by_window[window]["exact"]) if window in by_window else "" for window in windows]
            table.add_row("", name, *shown, f"{100 * by_window[None]['digits']['mean']:.0f} %")
        table.add_section()
    return table


def _by_place(title: str, cells: list[Record], place: Callable[[Record], tuple[float, str]]) -> Table:
    """A row for each place, because there may be many."""
    table = Table(title=title, title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("key", justify="right")
    groups = [(length, dict(group)) for length, group in rows_by_length(cells)]
    names = list(dict.fromkeys(name for _, group in groups for name in group))
    for name in names:
        table.add_column(name, justify="right")
    for length, group in groups:
        found = {(name, place(cell)): cell for name, part in group.items() for cell in part}
        for each in sorted({where for _, where in found}):
            cells_here = [found.get((name, each)) for name in names]
            shown = ["" if cell is None else f"{100 * cell['exact']['mean']:.0f} %" for cell in cells_here]
            table.add_row(length, each[1], *shown)
        table.add_section()
    return table


def _depth(cell: Record) -> tuple[float, str]:
    low, high = cell["depth_low"], cell["depth_high"]
    return low, f"{100 * low:.0f} %" if low == high else f"{100 * low:.0f}-{100 * high:.0f} %"


def _distance(cell: Record) -> tuple[float, str]:
    return cell["distance"], f"{cell['distance']:,}"
