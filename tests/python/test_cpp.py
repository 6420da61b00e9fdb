"""The C++ tests, all of them under sanitizers, and the tests of the memory as the package is installed."""

from __future__ import annotations

import sys

import pytest

from cpp_tests import cpp_test
from stock import run, tool


@pytest.mark.skipif(sys.platform != "linux", reason="the presets are for Linux")
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_every_program_holds_under_sanitizers(preset: str) -> None:
    run(
        tool("cmake"), "--preset", preset,
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    )  # fmt: skip
    run(tool("cmake"), "--build", "--preset", preset)
    run(tool("ctest"), "--preset", preset, "--no-tests=error")


@pytest.mark.parametrize("name", ["memory", "sketch", "attention", "requests", "devices", "failures"])
def test_the_installed_libraries_hold(name: str) -> None:
    run(cpp_test(f"test_{name}"))
