"""What `lminf-edge bench --tune` shows: what was tried, and what to pass."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lminf_edge.cli._terminal import output
from lminf_edge.evaluation.bench.tune import Trial, TuneResult, TuneSettings, cache_name
from lminf_edge.evaluation.results import plain
from lminf_edge.system import human_bytes
from lminf_edge.threads import TOLERANCE


def show_tuned(settings: TuneSettings, result: TuneResult) -> None:
    """A table of what was tried, and below it what to pass."""
    table = Table(
        title=f"At a full window of {settings.config.n_window:,} tokens: medians of {settings.rounds} rounds",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("threads", "micro-\nbatch", "cache"):
        table.add_column(name, no_wrap=True)
    for name in ("decoding\ntokens/s", "prompts\ntokens/s", "keys,\nvalues", "to first row\n(95 %)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption, table.caption_justify = "* is chosen", "left"
    option = None
    for trial in result.trials:
        if option not in (None, trial.option):
            table.add_section()
        option = trial.option
        table.add_row(*_row(trial))
    output.print(table)
    for trial in result.trials:
        if trial.error is not None:
            output.print(f"left out: {trial.option}, {cache_name(trial.choice)}: {trial.error}", soft_wrap=True)
    if result.n_taken is not None and result.n_taken > TOLERANCE:
        output.print(
            f"Other processes used {result.n_taken:.1f} cores meanwhile: on an idle machine other numbers of "
            "threads may be faster."
        )
    if not result.changes:
        output.print("Nothing is faster than the defaults by more than noise: pass nothing.")
        return
    if "cache_type_k" in result.changes or "cache_type_v" in result.changes:
        output.print("A quantised cache changes what the model writes; `lminf-edge eval ppl` tells how much.")
    output.print(python_line(settings, result), markup=False, soft_wrap=True)
    output.print(command_options(result), markup=False, soft_wrap=True)


def tuned_document(settings: TuneSettings, result: TuneResult) -> dict[str, Any]:
    """The same as JSON."""
    document: dict[str, Any] = plain(
        {
            "settings": asdict(settings),
            **asdict(result),
            "changes": result.changes,
            "python": python_line(settings, result),
            "options": command_options(result),
        }
    )
    return document


def python_line(settings: TuneSettings, result: TuneResult) -> str:
    """How to open the model in Python."""
    given = [f"n_window={settings.config.n_window}"]
    changes = [f"{name}={value!r}" for name, value in result.changes.items()]
    arguments = [repr(Path(settings.model).name), f"lminf=LMInfConfig({', '.join(given)})", *changes]
    return f"Llama({', '.join(arguments)})".replace("'", '"')


def command_options(result: TuneResult) -> str:
    """The same as options of `lminf-edge chat` and `generate`. Empty where there is nothing to pass."""
    changes, words = result.changes, []
    if "n_threads" in changes:
        words += ["--threads", str(changes["n_threads"])]
    if "n_ubatch" in changes:
        words += ["--n-ubatch", str(changes["n_ubatch"])]
    if "cache_type_k" in changes or "cache_type_v" in changes:
        words += ["--cache-type", cache_name(result.choice)]
    return shlex.join(words)


def _row(trial: Trial) -> tuple[str, ...]:
    choice = trial.choice
    what = (str(choice.n_threads), str(choice.n_ubatch), cache_name(choice))
    if trial.decode is None or trial.prompt is None:
        return (*what, "", "", "", "left out")
    gain = "" if trial.gain is None else f"{trial.gain.mean:.2f} ({trial.gain.low:.2f}-{trial.gain.high:.2f})"
    return (
        *what,
        f"{trial.decode.median:.1f}",
        f"{trial.prompt.median:.1f}",
        human_bytes(trial.kv_bytes),
        f"{gain}{' *' if trial.chosen else ''}",
    )
