"""Types and style of the package are checked like everything else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lminf_edge
from lminf_edge._library import _core

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
    stubs = ast.parse((ROOT / "python" / "lminf_edge" / "_core.pyi").read_text())
    assert declared_names(stubs) == public_names(_core)
    for stub in stubs.body:
        if isinstance(stub, ast.ClassDef):
            assert declared_names(stub) == public_names(getattr(_core, stub.name))


def declared_names(node: ast.Module | ast.ClassDef) -> set[str]:
    names = {child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef)}
    return {name for name in names if not name.startswith("_")}


def public_names(owner: object) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(lminf_edge.__file__).parent / "py.typed").is_file()
