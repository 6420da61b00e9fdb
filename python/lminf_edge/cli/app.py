"""The command's subcommands. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from lminf_edge import __version__
from lminf_edge.cli.demo import demo
from lminf_edge.cli.doctor import doctor
from lminf_edge.cli.generate import generate

app = typer.Typer(
    name="lminf-edge",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("demo")(demo)
app.command("generate")(generate)
app.command("doctor")(doctor)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's text may hold what the terminal's encoding does not
    app(prog_name="lminf-edge")
