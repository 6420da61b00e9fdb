"""`lminf-edge doctor` says what is installed, and whether it works."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import lminf_edge
from command_line import run
from lminf_edge import Llama, diagnosis
from lminf_edge._library import _core
from lminf_edge.evaluation.texts import python_documentation
from tiny_models import TinyModel


def test_the_report_describes_the_installation_and_the_engine_works(default_model: Path) -> None:
    finished = run("doctor", "--json", LMINF_N_SINK="4")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["lminf_edge"] == lminf_edge.__version__
    assert report["patch_id"] == _core.patch_id()
    assert report["llama_cpp"] == _core.llama_cpp_version()
    assert "CPU" in report["backends"]
    assert any(device.startswith("CPU: ") for device in report["devices"])
    assert report["features"]
    assert report["default_model"] == str(default_model)
    assert report["environment"]["LMINF_N_SINK"] == "4"
    checks = report["self_test"]["checks"]
    assert len(checks) == 6
    assert [check["passed"] for check in checks] == [True] * 6
    assert "attention: own kernel" in checks[0]["detail"]
    assert "a store of 65,536 middle tokens would take" in checks[1]["detail"]


def test_people_get_the_same_in_lines(head_32: TinyModel) -> None:
    finished = run("doctor", "--model", str(head_32.path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert _core.patch_id() in finished.stdout
    assert finished.stdout.count("\n  ok ") == 6
    assert "with weights of type f32 (CPU_Mapped) bit for bit only where deterministic=True" in finished.stdout
    assert finished.stderr == ""


def test_without_a_model_there_is_no_self_test(tmp_path: Path) -> None:
    finished = run("doctor", LMINF_CACHE_DIR=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "self-test: not done" in finished.stdout
    report = json.loads(run("doctor", "--json", LMINF_CACHE_DIR=str(tmp_path)).stdout)
    assert report["default_model"] is None
    assert report["self_test"] is None


def test_a_broken_model_fails_the_self_test(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    finished = run("doctor", "--model", str(path))
    assert finished.returncode == 1
    assert "FAILED" in finished.stdout
    assert "not a GGUF file" in finished.stdout


def test_an_engine_that_computes_something_else_fails_the_self_test(
    head_32: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Llama.logprobs

    def wrong(llm: Llama, tokens: list[int]) -> object:
        return right(llm, tokens) + np.float32(0.5 if llm.config is not None and llm._n_ubatch == 7 else 0)

    monkeypatch.setattr(Llama, "logprobs", wrong)
    checks = list(diagnosis.self_test(head_32.path, python_documentation(), n_threads=1))
    assert [check.passed for check in checks] == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("available", "passed", "said"),
    [
        (10**6, False, r"which does not fit: only in a file; 1.0 MB are available"),
        (5 * 10**8, True, r"which does not fit: only in a file; 500 MB are available"),
        (10**12, True, r"would take \d\d\d MB; 1.0 TB are available"),
        (None, True, r"would take \d\d\d MB$"),
    ],
)
def test_what_fits_into_memory_is_told(
    default_model: Path, monkeypatch: pytest.MonkeyPatch, available: int | None, passed: bool, said: str
) -> None:
    monkeypatch.setattr(_core, "available_memory", lambda: available)
    check = list(islice(diagnosis.self_test(default_model, python_documentation(), n_threads=1), 2))[1]
    assert check.passed is passed
    assert re.search(said, check.detail), check.detail
