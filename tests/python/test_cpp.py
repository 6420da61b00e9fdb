"""The C++ tests: of the policy, built alone with sanitizers, and of the memory, with the installed libraries."""

from __future__ import annotations

import sys
from pathlib import Path

from cpp_tests import cpp_test
from stock import ROOT, run, tool


def test_the_policy_holds_under_sanitizers(tmp_path: Path) -> None:
    source = ROOT / "tests" / "cpp"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    sanitize = f"-DLMINF_SANITIZE={'OFF' if sys.platform == 'win32' else 'ON'}"
    run(
        tool("cmake"), "-S", source, "-B", tmp_path, "-G", "Ninja", ninja,
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", sanitize, "-DLMINF_WERROR=ON",
    )  # fmt: skip
    run(tool("cmake"), "--build", tmp_path)
    run(tool("ctest"), "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error")


def test_the_memory_holds_through_the_c_api() -> None:
    run(cpp_test("test_memory"))


def test_sketches_estimate_products() -> None:
    run(cpp_test("test_sketch"))


def test_what_was_asked_for_is_made_or_refused() -> None:
    run(cpp_test("test_requests"))
