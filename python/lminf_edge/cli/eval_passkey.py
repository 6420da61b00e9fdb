"""`lminf-edge eval passkey`: is a number found again that was told somewhere in a long text?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lminf_edge.cli._answers import INSIDE, OUTSIDE, add_counts, fractions, rows_by_length, say_what_is_left_out, share
from lminf_edge.cli._evaluation import AnsweringOptions, Output, numbers, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import counting_bar, find_model, output, with_exit_codes
from lminf_edge.evaluation.passkey import PasskeySettings, run_passkey
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of


@with_exit_codes
@with_option_groups
def eval_passkey(
    *,
    lengths: Annotated[str, typer.Option(help="Lengths of the prompts in tokens, such as 2k,4k,32k.")] = "2k,4k,8k",
    trials: Annotated[int, typer.Option(min=1, help="Keys at each length.")] = 10,
    bins: Annotated[int, typer.Option(min=1, help="Parts of the text that get as many keys each.")] = 5,
    depths: Annotated[
        str | None,
        typer.Option(help="Fixed depths instead of random ones, such as 0,0.5,1: shares of the text before the key."),
    ] = None,
    filler: Annotated[
        str | None, typer.Option(help="Text file to hide the keys in. Default: sentences about grass, sky and sun.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of keys and depths.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    full_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out longer texts for full attention. Default: twice the trained length."),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Add a control: full attention that gets the last window of each prompt only."),
    ] = False,
    results: Output = None,
    as_json: AsJson = False,
    methods: AnsweringOptions,
) -> None:
    """Passkey retrieval: accuracy by length and depth, of several methods on the same prompts.

    With --output, a run that was stopped goes on when it is started again.
    """
    path = find_model(methods.model)
    n_ctx_train = trained_length(vocabulary_of(path), path)
    settings = PasskeySettings(
        setup=methods.setup(path, n_ctx_train),
        full_tokens=2 * n_ctx_train if full_tokens is None else full_tokens,
        truncate=truncate,
        max_tokens=max_tokens,
        seed=seed,
        lengths=numbers("--lengths", lengths),
        n_trials=trials,
        n_bins=bins,
        depths=fractions("--depths", depths),
        filler=None if filler is None else str(Path(filler).resolve()),
        filler_sha256=None if filler is None else file_sha256(filler),
    )
    say_what_is_left_out(settings, settings.lengths)
    with result_log(results, as_json) as log:
        with counting_bar("reading", "tokens") as on_progress:
            run_passkey(settings, log, on_progress)
        if not as_json:
            show_passkey(log)


def show_passkey(log: ResultLog) -> None:
    """Tables of a run: accuracy by window, and by depth."""
    cells = log.of_kind("passkey.cell")
    whole = [cell for cell in cells if (cell["depth_low"], cell["depth_high"]) == (0, 1)]
    output.print(_by_window(whole))
    if parts := [cell for cell in cells if cell not in whole]:
        output.print(_by_depth(parts))


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


def _by_depth(cells: list[Record]) -> Table:
    table = Table(title="The same by depth of the key: share of the text before it", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("method")
    depths = sorted({(cell["depth_low"], cell["depth_high"]) for cell in cells})
    for low, high in depths:
        where = f"{100 * low:.0f}" if low == high else f"{100 * low:.0f}-{100 * high:.0f}"
        table.add_column(f"{where} %", justify="right")
    for length, group in rows_by_length(cells):
        for name, part in group:
            by_depth = {(cell["depth_low"], cell["depth_high"]): cell for cell in part}
            shown = [f"{100 * by_depth[depth]['exact']['mean']:.0f} %" if depth in by_depth else "" for depth in depths]
            table.add_row(length, name, *shown)
        table.add_section()
    return table
