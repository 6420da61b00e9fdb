"""The command's subcommands. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lminf_edge import __version__
from lminf_edge.cli.bench import bench
from lminf_edge.cli.chat import chat
from lminf_edge.cli.demo import demo
from lminf_edge.cli.doctor import doctor
from lminf_edge.cli.eval_passkey import eval_passkey
from lminf_edge.cli.eval_ppl import eval_ppl
from lminf_edge.cli.eval_qa import eval_qa
from lminf_edge.cli.generate import generate
from lminf_edge.cli.plot import plot
from lminf_edge.cli.repeat import repeat_run
from lminf_edge.cli.report import report

app = typer.Typer(
    name="lminf-edge",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("demo")(demo)
app.command("chat")(chat)
app.command("generate")(generate)
app.command("doctor")(doctor)
app.command("bench")(bench)
app.command("plot")(plot)
app.command("report")(report)
app.command("repeat")(repeat_run)

evaluate = typer.Typer(
    no_args_is_help=True, help="Measures how well a model reads beyond its window, method by method."
)
evaluate.command("ppl")(eval_ppl)
evaluate.command("passkey")(eval_passkey)
evaluate.command("qa")(eval_qa)
app.add_typer(evaluate, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lminf-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Endless text for GGUF models: constant memory, constant speed."""


def main() -> None:
    """Runs the command with the process's arguments and exits."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the process was started without it
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's text may hold what the terminal's encoding does not
    app(prog_name="lminf-edge")
