"""`lminf-edge bench`: what it measures is what it says, at the depth it says. How fast anything is, is not tested."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

import command_line
from benching import of_kind, settings_for
from lminf_edge.cli.app import app
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.bench import BenchSettings, run_bench, stations
from lminf_edge.evaluation.bench.plan import decode_places
from lminf_edge.evaluation.bench.step_bytes import step_bytes
from lminf_edge.evaluation.results import Record, ResultLog, read_results
from tiny_models import TinyModel


@pytest.fixture(scope="module")
def measured(head_32: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchSettings, Path]:
    """A whole run and its file."""
    file = tmp_path_factory.mktemp("bench") / "results.jsonl"
    settings = settings_for(head_32)
    with ResultLog(file) as log:
        run_bench(settings, log)
    return settings, file


def test_a_run_measures_every_method_at_every_depth(measured: tuple[BenchSettings, Path]) -> None:
    _, file = measured
    decoded = Counter((r["method"], r["depth"], r["filled"]) for r in of_kind(file, "bench.decode"))
    assert decoded == Counter(
        [
            ("endless", 0, "read"),
            ("endless", 100, "read"),
            *(("endless", depth, "positioned") for depth in (300, 600, 2**20)),
            ("full", 0, "read"),
            ("full", 100, "read"),
            ("full", 600, "copied"),
            ("shift", 600, "positioned"),
            ("recompute", 100, "anew"),
            ("recompute", 600, "anew"),
        ]
    )
    rounds = Counter((r["method"], r["depth"]) for r in of_kind(file, "bench.round"))
    assert set(rounds.values()) == {2}
    assert set(rounds) == {(method, depth) for method, depth, _ in decoded} - {("recompute", 100)}
    assert len(of_kind(file, "bench.bandwidth")) == 1


def test_a_ratio_is_that_of_the_same_round(measured: tuple[BenchSettings, Path]) -> None:
    _, file = measured
    times = {(r["method"], r["depth"], r["round"]): r["seconds"] / r["n_tokens"] for r in of_kind(file, "bench.round")}
    decoded = {(r["method"], r["depth"]): r for r in of_kind(file, "bench.decode")}

    def check(place: tuple[str, int], reference: tuple[str, int], at: tuple[str, int] | None = None) -> None:
        (there, where), (here, depth) = reference, at or place
        ratios = [times[there, where, n] / times[here, depth, n] for n in range(2)]
        record = decoded[place]
        assert (record["of"]["method"], record["of"]["depth"]) == reference
        assert record["ratio"]["median"] == pytest.approx(median(ratios))
        assert (record["ratio"]["low"], record["ratio"]["high"]) == pytest.approx((min(ratios), max(ratios)))

    check(("endless", 600), ("full", 600))
    check(("endless", 2**20), ("endless", 300))
    check(("shift", 600), ("full", 600))
    check(("recompute", 100), ("full", 100), at=("recompute", 600))
    assert decoded["full", 600]["ratio"] is None
    assert decoded["endless", 300]["ratio"] is None


def test_memory_and_roofline_are_those_of_the_place(measured: tuple[BenchSettings, Path]) -> None:
    settings, file = measured
    decoded = {(r["method"], r["depth"]): r for r in of_kind(file, "bench.decode")}
    per_key = 2 * 2 * 64 * 2
    assert decoded["full", 600]["kv_bytes"] == 768 * per_key  # 605 tokens, rounded up to a multiple of 256
    assert {decoded["endless", depth]["kv_bytes"] for depth in (0, 100, 600, 2**20)} == {
        decoded["endless", 0]["kv_bytes"]
    }
    bandwidth = of_kind(file, "bench.bandwidth")[0]["bytes_per_second"]["high"]
    for record in decoded.values():
        assert record["resident_bytes"] > record["kv_bytes"]
        if record["method"] != "recompute":
            least = record["bytes_per_token"] / bandwidth
            assert record["roofline"] == pytest.approx(least * record["tokens_per_second"]["median"])
    step = step_bytes(settings.setup.model, "f16")
    assert decoded["full", 600]["bytes_per_token"] == step.at(604, 604)


def test_single_tokens_are_timed_around_a_rebase_and_a_shift(measured: tuple[BenchSettings, Path]) -> None:
    _, file = measured
    latency = {r["method"]: r for r in of_kind(file, "bench.latency")}
    assert set(latency) == {"endless", "shift"}
    counts = {method: {s["name"]: s["count"] for s in record["stalls"]} for method, record in latency.items()}
    assert counts["endless"]["rebase"] == 1
    assert counts["endless"]["placement"] == 0  # attention of our own places nothing
    assert counts["shift"]["shift"] == 1
    for record in latency.values():
        assert sum(stall["count"] for stall in record["stalls"]) == record["n_tokens"] == 130
        assert 0 < record["p50"] <= record["p99"] <= record["max"]


def test_prompts_are_read_by_who_can(measured: tuple[BenchSettings, Path]) -> None:
    _, file = measured
    prompts = {(r["method"], r["n_tokens"]): r for r in of_kind(file, "bench.prompt")}
    assert set(prompts) == {*product(("endless", "shift"), (100, 300)), ("full", 100)}
    for record in prompts.values():
        assert record["first_token"]["median"] > record["n_tokens"] / record["tokens_per_second"]["median"]
    (left_out,) = of_kind(file, "bench.skipped")
    assert (left_out["part"], left_out["method"], left_out["depth"]) == ("prompt", "full", 300)
    assert "256 tokens that the model was trained on" in left_out["reason"]


def test_a_finished_run_is_not_measured_again(measured: tuple[BenchSettings, Path]) -> None:
    settings, file = measured
    before = file.read_bytes()
    with ResultLog(file) as log:
        run_bench(settings, log)
    assert file.read_bytes() == before


def test_a_run_that_was_stopped_goes_on(measured: tuple[BenchSettings, Path], tmp_path: Path) -> None:
    settings, whole = measured
    lines = whole.read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    n_kept = kinds.index("bench.round") + 12  # in the middle of the second round
    file = tmp_path / "results.jsonl"
    file.write_text("".join(lines[:n_kept]) + lines[n_kept][:20])
    with ResultLog(file) as log:
        run_bench(settings, log)
    again = file.read_text().splitlines(keepends=True)
    assert again[:n_kept] == lines[:n_kept]
    assert Counter(map(_identity, map(json.loads, again))) == Counter(map(_identity, map(json.loads, lines)))


def _identity(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("kind", "part", "method", "cache_type", "depth", "n_tokens", "round"))


def test_another_run_is_not_mixed_with_it(measured: tuple[BenchSettings, Path]) -> None:
    settings, file = measured
    with ResultLog(file) as log, pytest.raises(ConfigError, match="differs in rounds"):
        run_bench(replace(settings, rounds=3), log)


def test_what_does_not_fit_into_memory_is_left_out(
    head_32: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_key = 2 * 2 * 64 * 2
    monkeypatch.setattr(stations, "free_bytes", lambda: stations._MARGIN + 2 * 512 * per_key)
    settings = settings_for(
        head_32,
        setup={"methods": ("full",)},
        depths=(100, 400, 600),
        recompute=False,
        prompts=(),
        n_latency=0,
        rounds=1,
    )
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    (left_out,) = log.of_kind("bench.skipped")
    assert left_out["depth"] == 600
    assert "are free" in left_out["reason"]
    assert [record["depth"] for record in log.of_kind("bench.decode")] == [100, 400]


def test_what_llama_cpp_cannot_shift_is_left_out(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(
        head_32,
        setup={"methods": ("shift",), "cache_types": ("q8_0",)},
        depths=(300,),
        far=None,
        recompute=False,
        prompts=(300,),
        n_latency=10,
    )
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    reasons = {record["part"]: record["reason"] for record in log.of_kind("bench.skipped")}
    assert set(reasons) == {"decode", "latency", "prompt"}
    assert all("cannot shift" in reason for reason in reasons.values())
    assert not log.of_kind("bench.decode")


@pytest.mark.parametrize(
    "changes",
    [
        {"depths": ()},
        {"depths": (5, 5)},
        {"depths": (-1,)},
        {"rounds": 0},
        {"n_decode": 0},
        {"n_decode": 127},
        {"prompts": (0,)},
        {"n_latency": -1},
        {"peer": "vllm"},
        {"peer_python": "python3"},
    ],
)
def test_settings_out_of_range_are_refused(head_32: TinyModel, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings_for(head_32, **changes)


def test_methods_that_do_not_depend_on_depth_are_measured_once(head_32: TinyModel) -> None:
    places = decode_places(settings_for(head_32, depths=(0, 300, 600)), "f16")
    (shift,) = (place for place in places if place.method == "shift")
    assert (shift.depth, shift.same_at) == (600, (300,))


# the command


def test_the_command_shows_tables_and_writes_json_lines(head_32: TinyModel, tmp_path: Path) -> None:
    arguments = (
        "bench", "--model", str(head_32.path), "--threads", "1", "--n-window", "64", "--n-ubatch", "32",
        "--methods", "endless,recompute", "--depths", "300", "--near", "280", "--rounds", "1", "--decode", "4",
        "--prompts", "64", "--latency-tokens", "20", "--output", str(tmp_path / "results.jsonl"),
    )  # fmt: skip
    shown = command_line.run(*arguments, COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    for words in (
        "window 64",
        "GB/s",
        "Decoding",
        "recompute f16",
        "roofline",
        "1,048,576",
        "at 280",
        "Single tokens",
        "Prompts",
    ):
        assert words in shown.stdout
    assert "left out" not in shown.stdout
    again = command_line.run(*arguments, "--json")
    assert (again.returncode, again.stdout) == (0, "")  # everything was there
    records = read_results(tmp_path / "results.jsonl")
    assert records[0]["settings"]["n_read"] == 2048
    assert records[0]["command"].startswith("lminf-edge bench --model")


@pytest.mark.parametrize(
    "options",
    [["--depths", "deep"], ["--methods", "magic"], ["--peer", "vllm"], ["--rounds", "0"], ["--peer-python", "x"]],
)
def test_wrong_options_end_with_exit_code_2(head_32: TinyModel, options: list[str]) -> None:
    finished = CliRunner().invoke(app, ["bench", "--model", str(head_32.path), *options])
    assert finished.exit_code == 2


def test_ctrl_c_leaves_a_file_that_goes_on(head_32: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    arguments = (
        "bench", "--model", str(head_32.path), "--threads", "1", "--n-window", "64", "--methods", "endless",
        "--depths", "0", "--far", "0", "--near", "280", "--rounds", "100", "--decode", "120", "--prompts", "",
        "--latency-tokens", "0", "--output", str(file),
    )  # fmt: skip
    process = command_line.start(*arguments)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not file.exists() or file.read_text().count("bench.round") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    n_before = len(of_kind(file, "bench.round"))
    assert 3 <= n_before < 200
    finished = command_line.run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert len(of_kind(file, "bench.round")) == 200
