"""`lminf-edge doctor`: what to paste into a bug report."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from lminf_edge.cli._options import AsJson
from lminf_edge.cli._terminal import FAILURE, find_model, messages, output, with_exit_codes
from lminf_edge.diagnosis import Check, Installation, describe_installation, self_test
from lminf_edge.evaluation.texts import python_documentation


@with_exit_codes
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Model for the self-test, as for the other commands. Default: the default model, if there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tells what is installed on which machine, and tests for some five seconds that it works."""
    installation = describe_installation()
    if not as_json:
        _show(installation)
    path = find_model(model) if model is not None else _path(installation.default_model)
    checks = [] if path is None else _run_self_test(path, as_json)
    if as_json:
        tested = None if path is None else {"model": str(path), "checks": [asdict(check) for check in checks]}
        print(json.dumps({**asdict(installation), "self_test": tested}, indent=2, ensure_ascii=False))
    elif path is None:
        _line("self-test: not done, the default model was not downloaded yet. Name a model with --model, or run")
        _line("           `lminf-edge generate Hello`, which fetches it")
    if not all(check.passed for check in checks):
        raise typer.Exit(FAILURE)


def _show(installation: Installation) -> None:
    for field in fields(installation):
        value = getattr(installation, field.name)
        if isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = " ".join(f"{name}={content}" for name, content in value.items())
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        _line(f"{field.name.replace('_', ' '):14} {'-' if value in (None, '') else value}")


def _run_self_test(path: Path, as_json: bool) -> list[Check]:
    if not as_json:
        _line(f"{'self-test':14} {path.name}")
    checks = []
    with messages.status("testing"):
        for check in self_test(path, python_documentation()):
            checks.append(check)
            if not as_json:
                verdict = "ok    " if check.passed else "FAILED"
                _line(f"  {verdict} {check.name}: {check.detail} ({check.seconds:.1f} s)")
    return checks


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _line(text: str) -> None:
    output.print(text, markup=False, soft_wrap=True)
