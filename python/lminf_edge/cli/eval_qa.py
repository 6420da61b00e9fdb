"""`lminf-edge eval qa`: short answers to questions about long texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.table import Table

from lminf_edge.cli._answers import (
    INSIDE,
    OUTSIDE,
    add_counts,
    fractions,
    mean,
    rows_by_length,
    say_what_is_left_out,
    say_what_was_left_out,
)
from lminf_edge.cli._evaluation import AnsweringOptions, Output, absolute, numbers, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import counting_bar, output, with_exit_codes
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.question_answering import QaSettings, filler_sha256, questions_sha256, run_qa
from lminf_edge.evaluation.results import ResultLog

_LENGTHS = "512,2k"


@dataclass(frozen=True, kw_only=True)
class _QaOptions(AnsweringOptions):
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32


@with_exit_codes
@with_option_groups
def eval_qa(
    file: Annotated[
        str | None,
        typer.Argument(
            help="JSON lines with context, question and answers. Default: 60 questions on Persuasion, each with its "
            "passage put into a longer text.",
            show_default=False,
        ),
    ] = None,
    *,
    lengths: Annotated[
        str | None,
        typer.Option(
            help=f"Lengths of the prompts in tokens, without a file. Default: {_LENGTHS}.", show_default=False
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Shares of the text before the passage; one question after the other has the next one.")
    ] = "0,0.25,0.5,0.75,1",
    filler: Annotated[
        str | None, typer.Option(help="Text file to put passages into. Default: Python's documentation.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Ask the first ones only. Default: all.")] = None,
    results: Output = None,
    as_json: AsJson = False,
    methods: _QaOptions,
) -> None:
    """Question answering: F1 of short answers by length, of several methods on the same questions.

    With --output, a run that was stopped goes on when it is started again.
    """
    if file is not None and lengths is not None:
        raise ConfigError("--lengths: the texts of a file are taken as they are")
    settings = QaSettings(
        **methods.settings(),
        text=absolute(file),
        text_sha256=questions_sha256(file),
        lengths=() if file is not None else numbers("--lengths", _LENGTHS if lengths is None else lengths),
        depths=fractions("--depths", depths),
        filler=absolute(filler),
        filler_sha256=None if file is not None else filler_sha256(filler),
        n_questions=questions,
    )
    say_what_is_left_out(settings, settings.lengths)
    with result_log(results, as_json) as log:
        with counting_bar("reading", "tokens") as on_progress:
            run_qa(settings, log, on_progress)
        if file is not None:
            say_what_was_left_out(settings, log.of_kind("qa.answer"))
        if not as_json:
            show_qa(log)


def show_qa(log: ResultLog) -> None:
    """Table of a run: F1 by length of the prompt."""
    cells = log.of_kind("qa.cell")
    table = Table(title="Answer F1 (0 to 1, higher is better) and its 95 % interval", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("method")
    windows: tuple[bool | None, ...] = (
        (True, False, None) if any(c["in_window"] is not None for c in cells) else (None,)
    )
    for window in windows:
        table.add_column({True: f"answer {INSIDE}", False: OUTSIDE, None: "all"}[window], justify="right")
    table.add_column("exact", justify="right")
    for length, group in rows_by_length(cells):
        add_counts(table, length, (cell for _, part in group for cell in part), "n_questions", windows)
        for name, part in group:
            by_window = {cell["in_window"]: cell for cell in part}
            shown = [mean(by_window[window]["f1"]) if window in by_window else "" for window in windows]
            table.add_row("", name, *shown, f"{100 * by_window[None]['exact']['mean']:.0f} %")
        table.add_section()
    output.print(table)
