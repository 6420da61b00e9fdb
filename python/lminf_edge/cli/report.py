"""`lminf-edge report`: one page with everything that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lminf_edge.cli._options import AsJson
from lminf_edge.cli._terminal import output, with_exit_codes
from lminf_edge.cli.plot import ResultFiles, warn_of_cut_off
from lminf_edge.report import check_matplotlib
from lminf_edge.report.files import write_whole
from lminf_edge.report.runs import load_runs


@with_exit_codes
def report(
    results: ResultFiles,
    output_file: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The page. It needs no other file and no network.")
    ] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Writes one HTML page with all commands, settings, tables and figures of results. Needs matplotlib."""
    check_matplotlib()
    runs = load_runs(results)
    warn_of_cut_off(runs)
    from lminf_edge.report.page import page_of

    write_whole(output_file, page_of(runs).encode())
    if as_json:
        print(json.dumps({"files": [str(output_file)]}, indent=2, ensure_ascii=False))
    else:
        output.print(str(output_file), markup=False, soft_wrap=True)
