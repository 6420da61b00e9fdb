"""The demo measures what it says, for people and in JSON for machines, and ends with the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lminf_edge.evaluation.comparison import Comparison
from lminf_edge.evaluation.streams import StreamPiece
from lminf_edge.evaluation.texts import python_documentation
from tiny_models import TinyModel

COMMAND = [sys.executable, "-m", "lminf_edge", "demo"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "120", **environment}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=env, timeout=600)


def demo_on(model: TinyModel, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("--model", str(model.path), "--threads", "1", *arguments)


@pytest.fixture(scope="module")
def measured(head_32: TinyModel) -> Any:
    """The JSON of a run over twice the trained length of 256 tokens, and a story."""
    finished = demo_on(head_32, "--tokens", "600", "--story", "20", "--n-sink", "2", "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_the_json_has_what_was_measured(measured: Any, head_32: TinyModel) -> None:
    assert measured["model"] == str(head_32.path)
    assert (measured["n_tokens"], measured["n_ctx_train"], measured["bucket"]) == (600, 256, 64)
    assert measured["lminf"]["n_sink"] == 2
    assert measured["lminf"]["n_window"] == 32
    for reading, n_read, is_full in ((measured["endless"], 600, False), (measured["full"], 256, True)):
        assert reading["n_read"] == n_read
        assert reading["context_is_full"] is is_full
        assert reading["kv_bytes"] > 0
        assert reading["resident_bytes"] > reading["kv_bytes"]
        assert reading["tokens_per_second"] > 0
        assert sum(bucket["n_tokens"] for bucket in reading["buckets"]) == n_read - 1
        for bucket in reading["buckets"]:
            assert bucket["begin"] % 64 == 0
            assert bucket["end"] == bucket["begin"] + 64
            assert 0 < bucket["loss"] < 30
            assert bucket["tokens_per_second"] > 0


def test_the_story_goes_on_in_the_endless_context(measured: Any) -> None:
    story = measured["story"]
    assert story["n_tokens"] == 20
    assert story["n_past"] > 600 + 20
    assert len(story["text"]) > len("Once upon a time")


def test_the_conclusion_is_one_sentence_about_these_numbers(measured: Any) -> None:
    conclusion = measured["conclusion"]
    assert conclusion.count(". ") == 0
    assert conclusion.endswith(".")
    assert "600 tokens" in conclusion
    assert "256" in conclusion


def test_people_get_a_table_the_story_and_the_conclusion(head_32: TinyModel) -> None:
    finished = demo_on(head_32, "--tokens", "600", "--story", "5")
    assert finished.returncode == 0, finished.stderr
    for expected in ("LM-Infinite", "full attention", "context full", "keys, values", "Once upon a time", "tokens/s"):
        assert expected in finished.stdout
    assert finished.stderr.strip() == ""


def test_the_default_model_keeps_its_loss_beyond_a_short_window(default_model: Path) -> None:
    finished = run("--tokens", "1500", "--n-window", "256", "--story", "0", "--json")
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout)
    assert measured["endless"]["buckets"][0]["loss"] < 4.0
    assert measured["endless"]["kv_bytes"] < measured["full"]["kv_bytes"]
    assert not measured["full"]["context_is_full"] or measured["full"]["n_read"] == 1500


def test_a_text_of_one_s_own_is_read(head_32: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 30)
    assert demo_on(head_32, "--text", str(text), "--tokens", "300", "--story", "0").returncode == 0
    too_short = demo_on(head_32, "--text", str(text), "--tokens", "5000")
    assert too_short.returncode == 2
    assert "the text has only" in too_short.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokenz", "5"),
        ("--tokens", "many"),
        ("--tokens", "5"),
        ("--n-window", "0"),
        ("--cache-type", "q9"),
        ("extra",),
    ],
)
def test_wrong_usage_ends_with_2(head_32: TinyModel, arguments: tuple[str, ...]) -> None:
    finished = demo_on(head_32, *arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    assert arguments[0].removeprefix("--").replace("-", "_") in finished.stderr.replace("-", "_")


def test_a_failure_ends_with_1(tmp_path: Path) -> None:
    for arguments in (
        ("--model", str(tmp_path / "missing.gguf")),
        ("--model", str(tmp_path)),
        ("--model", "owner/repository/file.gguf"),
    ):
        finished = run(*arguments, HF_HUB_OFFLINE="1")
        assert finished.returncode == 1
        assert "error:" in finished.stderr
        assert "Traceback" not in finished.stderr


def test_ctrl_c_ends_with_130_and_leaves_no_process_behind(default_model: Path) -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "LM-Infinite: the first" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        process.stdout.read()  # ends when the last process that can write to it is gone
        assert "Traceback" not in process.stderr.read()
    assert time.perf_counter() - start < 10
    assert process.returncode == 130


def test_the_package_s_command_shows_help_and_version() -> None:
    program = [sys.executable, "-m", "lminf_edge"]
    version = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("lminf-edge ")
    assert "demo" in subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout


# --- the sentence says what was measured


def comparison(*, beyond: float = 3.0, full_loss: float = 3.0, n_tokens: int = 400) -> Comparison:
    """A model trained on 256 tokens that read 400 with LM-Infinite: loss 3.0 within the trained length."""
    result = Comparison(n_tokens, n_ctx_train=256, bucket=64)
    losses = [3.0] * 255 + [beyond] * (n_tokens - 256)
    result.endless.stream.add(piece(losses))
    result.endless.kv_bytes = 1000
    result.full.stream.add(piece([full_loss] * 255))
    result.full.n_ctx = 256
    result.full.kv_bytes = 4000
    return result


def piece(losses: list[float]) -> StreamPiece:
    return StreamPiece(position=1, losses=np.array(losses, np.float32), n_read=len(losses) + 1, seconds=1.0)


def test_a_stable_loss_is_called_stable() -> None:
    sentence = comparison().conclusion()
    assert "read all 400 tokens" in sentence
    assert "stopped at 256 with its context full" in sentence
    assert "a loss of 3.00 (3.00) where both read and 3.00 beyond the trained 256 tokens" in sentence
    assert "rose" not in sentence


def test_a_rising_loss_is_called_rising() -> None:
    assert "rose from 3.00 to 6.00" in comparison(beyond=6.0).conclusion()


def test_buckets_hold_the_tokens_at_their_positions() -> None:
    stream = comparison(beyond=6.0).endless.stream
    assert [bucket.n_tokens for bucket in stream.buckets()] == [63, 64, 64, 64, 64, 64, 16]
    assert [round(bucket.loss, 6) for bucket in stream.buckets()] == [3.0] * 4 + [6.0] * 3
    assert stream.mean_loss(256, 400) == 6.0
    assert stream.mean_loss(400, 500) is None


def test_the_documentation_text_is_plain_english() -> None:
    text = python_documentation()
    assert len(text.split()) > 20_000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    for markup in ("``", "::=", ">>>", "**"):
        assert text.count(markup) < 20
