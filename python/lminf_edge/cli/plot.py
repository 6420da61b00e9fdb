"""`lminf-edge plot`: figures of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lminf_edge._checks import check_choice
from lminf_edge.cli._evaluation import names
from lminf_edge.cli._options import AsJson
from lminf_edge.cli._terminal import messages, output, with_exit_codes
from lminf_edge.errors import LMInfError
from lminf_edge.evaluation.methods import check_names
from lminf_edge.report import check_matplotlib
from lminf_edge.report.files import make_folder, write_whole
from lminf_edge.report.runs import Run, load_runs

KINDS = ("svg", "png", "pdf")

ResultFiles = Annotated[
    list[Path], typer.Argument(metavar="RESULTS...", help="Results of eval or bench: files of JSON lines.")
]


@with_exit_codes
def plot(
    results: ResultFiles,
    output_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the figures go. It is made if it is not there.")
    ] = Path(),
    kinds: Annotated[str, typer.Option("--format", help=f"Kinds of files: some of {', '.join(KINDS)}.")] = "svg,png",
    as_json: AsJson = False,
) -> None:
    """Draws figures of results: loss, speed, memory and latency, passkeys, answers. Needs matplotlib."""
    wanted = names(kinds)
    check_names("format", wanted, None)
    for kind in wanted:
        check_choice("format", kind, KINDS)
    check_matplotlib()
    runs = load_runs(results)
    warn_of_cut_off(runs)
    from lminf_edge.report.figures import pictures_of

    files = {
        output_dir / f"{run.name}-{picture.name}.{kind}": data
        for run in runs
        for picture in pictures_of(run, wanted)
        for kind, data in picture.files.items()
    }
    if not files:
        raise LMInfError("there is nothing to draw yet: the results hold no figures' records")
    make_folder(output_dir)
    for path, data in files.items():
        write_whole(path, data)
        if not as_json:
            output.print(str(path), markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"files": [str(path) for path in files]}, indent=2, ensure_ascii=False))


def warn_of_cut_off(runs: list[Run]) -> None:
    """Says which files do not end with a whole line."""
    for run in runs:
        if run.cut_off:
            messages.print(f"{run.name}: the last line was not written to its end and is left out", markup=False)
