"""`bench` with middle tokens: the store holds what a text of that length would leave in it, and every token recalls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benching import TOKENS, of_kind, settings_for
from lminf_edge import Llama, LMInfConfig, MiddleConfig
from lminf_edge.cli import _bench_tables
from lminf_edge.errors import ConfigError, UnsupportedModelError
from lminf_edge.evaluation.bench import BenchSettings, run_bench, stations, work
from lminf_edge.evaluation.bench.copied_store import Section, with_repeated_rows
from lminf_edge.evaluation.bench.plan import decode_places
from lminf_edge.evaluation.bench.step_bytes import step_bytes
from lminf_edge.evaluation.results import ResultLog, read_results
from lminf_edge.middle import N_QUESTION
from lminf_edge.report.runs import load_runs
from lminf_edge.report.tables import tables_of
from tiny_families import SLIDING_AND_FULL
from tiny_models import TinyModel, write_tiny_model

N_STORE = 512
MIDDLE = MiddleConfig(k=4, layers=(0, None), cache_type="q8_0", max_tokens=N_STORE)
ROWS = [Section(34)] * (2 * 2 * 2)
"""Bytes of a stored token: two layers, two heads of 32 components, keys and values."""
ROW = sum(section.size for section in ROWS)


def open_tiny(path: Path, **middle: Any) -> Llama:
    config = LMInfConfig(n_sink=4, n_window=64, middle=replace(MIDDLE, **middle))
    return Llama(path, lminf=config, n_threads=1, n_ubatch=32)


def middle_settings(model: TinyModel | Path, **changes: Any) -> BenchSettings:
    setup = {"methods": ("endless", "middle", "full"), "middle": MIDDLE, **changes.pop("setup", {})}
    return settings_for(model, setup=setup, recompute=False, **changes)


@pytest.fixture(scope="module")
def measured(head_32: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole run."""
    file = tmp_path_factory.mktemp("bench") / "results.jsonl"
    with ResultLog(file) as log:
        run_bench(middle_settings(head_32), log)
    return file


# the store at a depth


@pytest.mark.parametrize("depth", [300, 500, 5000, 2**20])
def test_a_copied_store_holds_as_many_tokens_as_one_that_was_read(head_32: TinyModel, depth: int) -> None:
    with open_tiny(head_32.path) as copied, open_tiny(head_32.path) as read:
        list(work.copy_store_to(copied, TOKENS, depth))
        list(work.read_store_to(read, TOKENS, depth))
        (here, there) = (llm._context.middle_stats() for llm in (copied, read))
        assert copied.n_past == read.n_past == depth
        assert here.n_retrievable == there.n_retrievable == min(depth - 4, N_STORE - 1) - 31
        assert here.n_stored >= there.n_stored
        logits = copied.eval([5], recall=True)
        assert np.isfinite(logits).all()
        positions = [token.position for token in copied.last_recall()]
        assert len(positions) >= MIDDLE.k
        assert all(max(4, depth - N_STORE) < position <= depth - 32 for position in positions)


def test_a_copied_store_repeats_the_rows_of_each_head(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as llm:
        list(work.jump_to(llm, TOKENS, 500))
        state = llm._context.get_state()
        n_read = llm._context.middle_stats().n_stored
        longer = with_repeated_rows(state, ROWS)
    assert n_read < 250
    assert len(longer) - len(state) == (500 - n_read) * ROW
    end = -4  # a mark
    sections = [(state[end - n_read * ROW : end], n_read), (longer[end - 500 * ROW : end], 500)]
    for head in range(len(ROWS)):
        read, copied = (rows[head * n * 34 : (head + 1) * n * 34] for rows, n in sections)
        assert copied == (3 * read)[: len(copied)]


@pytest.mark.parametrize("depth", [300, 5000])
def test_a_copied_store_has_sketches(head_32: TinyModel, depth: int) -> None:
    with open_tiny(head_32.path, n_candidates=16, max_tokens=400) as llm:
        list(work.copy_store_to(llm, TOKENS, depth))
        stats = llm._context.middle_stats()
        assert stats.n_bytes_token == ROW + 2 * 2 * 10
        assert np.isfinite(llm.eval([5], recall=True)).all()
        (footprint,) = work.footprint(llm)
        assert footprint.scan_bytes == 2 * 2 * (footprint.n_retrievable * 10 + 16 * 34)


def test_layers_that_are_not_alike_are_not_copied(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_head_sizes", lambda _: (64, 32))
    with open_tiny(head_32.path) as llm, pytest.raises(UnsupportedModelError, match="not all alike"):
        list(work.copy_store_to(llm, TOKENS, 500))


def test_a_store_that_was_read_from_the_beginning_is_not_changed(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as llm:
        list(work.read_to(llm, TOKENS, 300))
        state = llm._context.get_state()
    assert with_repeated_rows(state, ROWS) == state


@pytest.mark.parametrize("damage", [lambda s: s[:50], lambda s: b"\0" * 16 + s[16:], lambda s: s + b"\0" * 8])
def test_what_is_no_state_with_a_store_is_refused(head_32: TinyModel, damage: Any) -> None:
    with open_tiny(head_32.path) as llm:
        list(work.jump_to(llm, TOKENS, 500))
        state = llm._context.get_state()
    with pytest.raises(UnsupportedModelError, match="cannot be filled by copying"):
        with_repeated_rows(damage(state), ROWS)


def test_the_store_of_a_model_with_sliding_layers_is_read(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma3.gguf", SLIDING_AND_FULL["gemma3"], seed=3)
    settings = middle_settings(model, setup={"methods": ("middle",)}, depths=(800,), near=280, far=None, rounds=1)
    place = next(place for place in decode_places(settings, "f16") if place.depth == 800)
    assert place.filled == "copied"
    said: list[str] = []
    station = stations.ModelStation(settings, place, TOKENS, on_progress=said.append)
    try:
        assert station.place.filled == "read"
        assert station.footprint().n_retrievable == N_STORE - 32
    finally:
        station.close()
    assert said[-1] == "going there: reading for the store, 800 of 800 tokens"


def test_a_store_that_does_not_fit_into_memory_is_left_out(
    head_32: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stations, "free_bytes", lambda: stations._MARGIN + 2 * 400 * ROW)
    settings = middle_settings(
        head_32, setup={"methods": ("middle",)}, depths=(400, 600), far=None, prompts=(), n_latency=0, rounds=1
    )
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    (left_out,) = log.of_kind("bench.skipped")
    assert (left_out["method"], left_out["depth"]) == ("middle", 600)
    assert "GB of middle tokens" in left_out["reason"]


def test_every_depth_has_a_store_of_its_own(head_32: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store_path"):
        middle_settings(head_32, setup={"middle": replace(MIDDLE, path=tmp_path / "store")})


# what recalls


def recalls_of(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many tokens are appended from now on, and whether they recall."""
    log: list[tuple[int, int]] = []
    append = llm._sequence.append

    def logged(tokens: Any, check: Any = None, recall: int = 0) -> None:
        log.append((tokens.size, recall))
        append(tokens, check, recall)

    monkeypatch.setattr(llm._sequence, "append", logged)
    return log


def test_every_decoded_token_recalls(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny(head_32.path) as llm:
        list(work.copy_store_to(llm, TOKENS, 500))
        log = recalls_of(llm, monkeypatch)
        (turn,) = work.decode_turn(llm, TOKENS, 500, 10, 60.0)
        list(work.time_tokens(llm, TOKENS, 5))
    assert log == [(1, 1)] * (11 + 6)
    assert 0 < turn.scan_seconds < turn.seconds


def test_the_end_of_a_prompt_recalls(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny(head_32.path) as llm:
        log = recalls_of(llm, monkeypatch)
        list(work.read_prompt(llm, TOKENS, 300))
        assert log[1:] == [(300 - N_QUESTION, 0), (N_QUESTION, 1)]
        log.clear()
        list(work.read_prompt(llm, TOKENS, 50))
        assert log[1:] == [(50, 1)]


def test_without_a_store_nothing_recalls(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=1) as llm:
        log = recalls_of(llm, monkeypatch)
        (turn,) = work.decode_turn(llm, TOKENS, 0, 4, 60.0)
        list(work.read_prompt(llm, TOKENS, 100))
    assert {recall for _, recall in log} == {0}
    assert turn.scan_seconds == 0


# a run


def test_a_run_measures_recalling_beside_the_others(measured: Path) -> None:
    decoded = {(r["method"], r["depth"]): r for r in of_kind(measured, "bench.decode")}
    middle = {depth: record for (method, depth), record in decoded.items() if method == "middle"}
    assert {depth: record["filled"] for depth, record in middle.items()} == {
        0: "read", 100: "read", 300: "copied", 600: "copied", 2**20: "copied"
    }  # fmt: skip
    assert len(of_kind(measured, "bench.round")) == 2 * len(decoded)
    times = {
        (r["method"], r["depth"], r["round"]): r["seconds"] / r["n_tokens"] for r in of_kind(measured, "bench.round")
    }
    for depth, record in middle.items():
        ratios = [times["endless", depth, n] / times["middle", depth, n] for n in range(2)]
        assert record["ratio_to_endless"]["median"] == pytest.approx(median(ratios))
    assert {depth: record["of"] and record["of"]["method"] for depth, record in middle.items()} == {
        0: "full", 100: "full", 300: None, 600: "full", 2**20: "middle"
    }  # fmt: skip
    assert "ratio_to_endless" not in decoded["endless", 600]


def test_memory_and_roofline_count_the_store(measured: Path, head_32: TinyModel) -> None:
    decoded = {(r["method"], r["depth"]): r for r in of_kind(measured, "bench.decode")}
    step = step_bytes(head_32.path, "f16")
    for depth in (0, 100, 600, 2**20):
        record = decoded["middle", depth]
        n_past = depth + 5  # a token that does not count, and a turn
        n_stored = min(n_past - 4, N_STORE - 1)
        # once tokens have left the window, a query sees 32 of them
        assert record["n_retrievable"] == (n_stored - 31 if n_stored > 63 else 0)
        assert record["store_bytes"] == ROW * min(n_past, N_STORE + 128 + 32)
        assert record["scan_bytes"] == record["n_retrievable"] * ROW // 2
        assert record["bytes_per_token"] == decoded["endless", depth]["bytes_per_token"] + record["scan_bytes"]
        assert record["bytes_per_token"] >= step.weights
        assert (record["scan_seconds"]["median"] > 0) is (record["n_retrievable"] > 0)
    assert decoded["endless", 600]["store_bytes"] == 0


def test_latency_and_prompts_are_measured_with_a_store(measured: Path) -> None:
    (latency,) = (r for r in of_kind(measured, "bench.latency") if r["method"] == "middle")
    counts = {stall["name"]: stall["count"] for stall in latency["stalls"]}
    assert latency["n_tokens"] == 130
    assert counts["rebase"] == 1
    prompts = {r["n_tokens"]: r for r in of_kind(measured, "bench.prompt") if r["method"] == "middle"}
    assert {length: record["store_bytes"] for length, record in prompts.items()} == {100: 100 * ROW, 300: 300 * ROW}


def test_tables_say_what_it_is_compared_with(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=200, record=True, force_terminal=False)
    monkeypatch.setattr(_bench_tables, "output", console)
    with ResultLog(measured) as log:
        _bench_tables.show_bench(log)
    shown = console.export_text()
    assert "Middle tokens: every decoded token recalls" in shown
    # to endless at five depths
    assert Counter(shown.split("Memory of each process")[0].split())["endless"] >= 5 + 5


def test_a_finished_run_is_not_measured_again(measured: Path, head_32: TinyModel) -> None:
    before = read_results(measured)
    with ResultLog(measured) as log:
        run_bench(middle_settings(head_32), log)
    assert read_results(measured) == before


def test_reports_show_the_store_and_both_ratios(measured: Path) -> None:
    (run,) = load_runs([measured])
    tables = {table.caption.split(",")[0].split(":")[0]: table for table in tables_of(run)}
    assert len(tables["Middle tokens"].rows) == 5
    compared = Counter(
        against for name, against, *_ in tables["Decoding speed against the other's"].rows if "middle tokens" in name
    )
    assert compared == {
        "full attention, f16 cache": 3,
        "LM-Infinite, f16 cache": 5,
        "LM-Infinite, middle tokens, f16 cache": 1,  # the far depth to the near one
    }
