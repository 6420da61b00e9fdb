"""What the engine says of every architecture that llama.cpp knows, and docs/architectures.md, which says it to readers.

`python tests/python/architectures.py` writes the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# this file is also a program, and then it has no conftest.py to say where the build's modules are
sys.path.append(str(Path(__file__).resolve().parents[2] / "cmake"))

from cpp_tests import cpp_test
from stock import ROOT

PAGE = ROOT / "docs" / "architectures.md"

_INTRODUCTION = """\
# Architectures

Every architecture that the pinned llama.cpp knows, and what lminf-edge says of it. A test compares this page, which
`python tests/python/architectures.py` writes.

Each architecture is made as a tiny model with random weights and opened with LM-Infinite. If that is refused, the
table says why. If not, these rules are checked with an F32 cache, S = 4, W = L = 32 and B = 8, and a rule that does not
hold is a failed test:

- *unchanged*: before anything is masked or clamped, logits equal llama.cpp's;
- *batches*: a text of five windows gives the same logits token by token, in micro-batches of 7 and in calls of
  any size;
- *same bits*: with `deterministic=True` that is so bit for bit, also in two threads;
- *sequences*: three sequences of different ages in one batch each equal the same sequence alone;
- *stream*: over 20 windows logits stay finite and of one size;
- *removal*: when the last tokens are removed, logits are those of never having had them, or the removal is refused and
  changes nothing;
- *window*: tokens that have left the window of every layer change nothing, sink tokens do.

Equal means up to rounding. An architecture has a line for each kind of model that it has. Random weights show that the
rules hold, not that a model of that kind writes well.
"""


@dataclass(frozen=True)
class Check:
    """The outcome of one check: `passed`, `failed` or `not checked`."""

    verdict: str
    value: float | None
    note: str


@dataclass(frozen=True)
class Report:
    """What was found out about one kind of model.

    Attributes:
        arch: llama.cpp's name of the architecture.
        kind: Its attention and positions; empty if no model could be made, `reason` then has llama.cpp's words.
        supported: Whether the engine opened it.
        reason: Why not.
        checks: By name; empty if it is not supported.
        crash: What the program wrote before it crashed, if it did.
    """

    arch: str
    kind: str = ""
    supported: bool = False
    reason: str = ""
    checks: dict[str, Check] = field(default_factory=dict)
    crash: str = ""

    @property
    def problems(self) -> list[str]:
        """The crash and the checks that failed, a line each."""
        crash = [f"{self.arch}: {self.crash}"] if self.crash else []
        return crash + [f"{self.arch} ({self.kind}): {n}: {c}" for n, c in self.checks.items() if c.verdict == "failed"]


def examine(program: Path, arch: str) -> list[Report]:
    """Runs the program for one architecture, in a process of its own: a crash hides no other."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    result = subprocess.run(
        [program, "--json", "--arch", arch],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    if result.returncode not in (0, 1):
        return [Report(arch, crash=f"exit status {result.returncode}: {result.stderr[-2000:]}")]
    reports = []
    for line in result.stdout.splitlines():
        values = json.loads(line)
        checks = {name: Check(**check) for name, check in values.pop("checks").items()}
        reports.append(Report(**values, checks=checks))
    return reports


def examine_all() -> list[Report]:
    """Returns the reports of all architectures, sorted by name."""
    program = cpp_test("test_architectures")
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda arch: examine(program, arch), sorted(listed.stdout.split()))
        return [report for reports in found for report in reports]


def page(reports: list[Report]) -> str:
    """Returns the page in Markdown. It holds no measured value: those differ between machines."""
    made = [report for report in reports if report.kind]
    names = {report.arch for report in reports}
    supported = {report.arch for report in reports if report.supported}
    rows = [f"| `{r.arch}` | {r.kind} | {'supported' if r.supported else 'refused'} | {_note(r)} |" for r in made]
    others = [f"| `{r.arch}` | {_note(r)} |" for r in reports if not r.kind]
    return "\n".join(
        [
            _INTRODUCTION,
            f"Of {len(names)} architectures {len(supported)} are supported.",
            "",
            "| architecture | kind of model | LM-Infinite | note |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "No model could be made of these:",
            "",
            "| architecture | reason |",
            "| --- | --- |",
            *others,
            "",
        ]
    )


def _note(report: Report) -> str:
    notes = [report.reason] if report.reason else []
    open_checks: dict[str, list[str]] = {}  # by the reason why they were not made
    for name, check in report.checks.items():
        if check.verdict == "not checked":
            open_checks.setdefault(check.note, []).append(name)
    notes += [f"{', '.join(names)} not checked: {reason}" for reason, names in open_checks.items()]
    notes += ["removal refused" for name, c in report.checks.items() if (name, c.note) == ("removal", "refused")]
    return "; ".join(notes).replace("|", "\\|")


def main() -> None:
    reports = examine_all()
    problems = [problem for report in reports for problem in report.problems]
    if problems:
        sys.exit("\n".join(problems))
    PAGE.write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
