"""Types and style of the package are checked like everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["mypy", "--strict", "python/lminf_edge"],
        ["ruff", "check", "python", "tests"],
        ["ruff", "format", "--check", "python", "tests"],
    ],
    ids=["mypy", "ruff check", "ruff format"],
)
def test_the_package_passes(arguments: list[str]) -> None:
    finished = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_stubs_declare_what_the_extension_has() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "lminf_edge._core", "--concise", "--ignore-missing-stub"],
        cwd=ROOT / "python",
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_package_says_that_it_is_typed() -> None:
    import lminf_edge

    assert (Path(lminf_edge.__file__).parent / "py.typed").is_file()
