"""`lminf-edge bench`: what it measures is what it says, at the depth it says. How fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

import command_line
from lminf_edge import Llama, LMInfConfig
from lminf_edge._library import _core
from lminf_edge.cli.app import app
from lminf_edge.errors import ConfigError, LMInfError, UnsupportedModelError
from lminf_edge.evaluation.bench import BenchSettings, run_bench, stations, work
from lminf_edge.evaluation.bench.bandwidth import read_bandwidth
from lminf_edge.evaluation.bench.copied_state import CacheState, parse_state, repeated_state
from lminf_edge.evaluation.bench.plan import Place, bytes_per_token, decode_places
from lminf_edge.evaluation.bench.stalls import stall_summary
from lminf_edge.evaluation.bench.step_bytes import (
    _BLOCKS,
    StepBytes,
    TensorInfo,
    read_tensor_infos,
    step_bytes,
    weights_read,
)
from lminf_edge.evaluation.context_shift import ShiftingLlama
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.peers import protocol
from lminf_edge.evaluation.peers.gguf_llama import read_llama, without_permutation
from lminf_edge.evaluation.results import Record, ResultLog, read_results
from reference import FULL_ATTENTION, Layer, Rope, TokenStream, Transformer
from tiny_families import HYBRID, SLIDING_AND_FULL
from tiny_models import HEAD_32, N_VOCAB, TinyModel, random_tokens, write_tiny_model

STAND_IN = Path(__file__).parent / "stand_ins" / "peer.py"
TOKENS = np.array(random_tokens(500, seed=31), np.int32)


def settings_for(model: TinyModel | Path, **changes: Any) -> BenchSettings:
    """A short run: window 64, two rounds."""
    setup = MethodSetup(
        model=str(model if isinstance(model, Path) else model.path),
        methods=("endless", "full", "shift"),
        cache_types=("f16",),
        n_sink=4,
        n_window=64,
        n_threads=1,
        n_ubatch=32,
    )
    setup = replace(setup, **changes.pop("setup", {}))
    values: dict[str, Any] = {
        "recompute": True,
        "depths": (0, 100, 600),
        "near": 300,
        "far": 2**20,
        "rounds": 2,
        "n_decode": 4,
        "n_read": 128,
        "prompts": (100, 300),
        "prompt_rounds": 1,
        "n_latency": 130,
    }
    return BenchSettings(setup=setup, **{**values, **changes})


@pytest.fixture(scope="module")
def measured(head_32: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchSettings, Path]:
    """A whole run and its file."""
    file = tmp_path_factory.mktemp("bench") / "results.jsonl"
    settings = settings_for(head_32)
    with ResultLog(file) as log:
        run_bench(settings, log)
    return settings, file


def of_kind(file: Path, kind: str) -> list[Record]:
    return [record for record in read_results(file) if record["kind"] == kind]


# what is copied to get to a depth


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_copied_state_as_long_as_what_was_read_is_what_was_read(
    tiny_model: TinyModel, flash_attn: bool, cache_type: str
) -> None:
    value_type = cache_type if flash_attn else "f16"
    with Llama(
        tiny_model.path, n_ctx=256, n_threads=1, flash_attn=flash_attn, cache_type_k=cache_type, cache_type_v=value_type
    ) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
    assert repeated_state(state, 50) == state


@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_longer_copy_repeats_keys_and_values_and_can_be_decoded(head_64: TinyModel, flash_attn: bool) -> None:
    with Llama(head_64.path, n_ctx=512, n_threads=1, flash_attn=flash_attn) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
        list(work.copy_to(llm, state, 420))
        assert llm.n_past == 420
        held = llm._context.get_state()
        assert np.isfinite(llm.eval([5])).all()
    (read,), (copied,) = parse_state(state), parse_state(held)
    assert copied.positions == list(range(420))
    for cell in (0, 49, 50, 277, 419):
        assert _cell(copied, cell) == _cell(read, cell % 50)
    assert _cell(read, 0) != _cell(read, 1)


def _cell(cache: CacheState, cell: int) -> list[bytes]:
    parts = []
    for rows in (*cache.keys, *cache.values):
        n_part = len(rows.data) // rows.n_parts
        for part in range(rows.n_parts):
            begin = part * n_part + cell * rows.size
            parts.append(bytes(rows.data[begin : begin + rows.size]))
    return parts


def test_a_copy_decodes_as_what_was_read_does(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm, Llama(head_32.path, n_ctx=512, n_threads=1) as other:
        llm.eval(TOKENS[:50].tolist())
        list(work.copy_to(other, next(work.save_read(llm)), 50))
        np.testing.assert_array_equal(llm.eval([9]), other.eval([9]))


def test_sliding_layers_keep_the_end_of_a_copied_context(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma2.gguf", SLIDING_AND_FULL["gemma2"], seed=3)
    with Llama(model.path, n_ctx=256, n_threads=1, n_ubatch=32) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
        list(work.copy_to(llm, state, 200))
        assert llm.n_past == 200
        full, sliding = parse_state(llm._context.get_state())
        assert np.isfinite(llm.eval([5])).all()
    assert full.positions == list(range(200))
    assert sliding.positions[-1] == 199
    assert 0 < len(sliding.positions) < 50
    assert repeated_state(state, 50) == state


def test_a_recurrent_state_cannot_be_copied(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "lfm2.gguf", HYBRID["lfm2"], seed=3)
    with Llama(model.path, n_ctx=256, n_threads=1) as llm:
        llm.eval(TOKENS[:20].tolist())
        with pytest.raises(UnsupportedModelError, match="cannot be filled by copying"):
            repeated_state(llm._context.get_state(), 40)


# where a turn takes place


def test_an_endless_sequence_gets_to_any_position_with_its_window_full(head_32: TinyModel) -> None:
    config = LMInfConfig(n_sink=4, n_window=64)
    for depth in (0, 40, 300, 2**20, 2**40):
        with Llama(head_32.path, lminf=config, n_threads=1, n_ubatch=32) as llm:
            list(work.jump_to(llm, TOKENS, depth))
            assert llm.n_past == depth
            assert llm.memory_stats().n_cells_used == min(depth, 4 + 64)


def test_each_turn_begins_at_the_same_depth(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=1, n_ubatch=32) as llm:
        list(work.jump_to(llm, TOKENS, 2**20))
        for _ in range(3):
            (turn,) = work.decode_turn(llm, TOKENS, 2**20, 10, 60.0)
            assert turn.n_tokens == 10
            assert turn.seconds > 0
            assert llm.n_past == 2**20 + 11
        (turn,) = work.decode_turn(llm, TOKENS, 2**20, 10, 0.0)
        assert turn.n_tokens == work.N_AT_LEAST


def test_a_shifted_context_has_its_turns_in_the_middle_of_its_cycle(head_32: TinyModel) -> None:
    with closing(ShiftingLlama(head_32.path, n_ctx=256, n_keep=4, n_threads=1, n_ubatch=32)) as llm:
        list(work.shift_to(llm, TOKENS, 190, 5000))
        assert llm.n_shifts == 1
        assert llm.n_past == 5000
        for _ in range(2):
            next(work.decode_turn(llm, TOKENS, 5000, 4, 60.0))
            assert llm._context.n_past() == 195


def test_recomputation_reads_the_window_for_each_token(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        for _ in range(2):
            (turn,) = work.recompute_turn(llm, TOKENS, 64)
            assert turn.n_tokens == 1
            assert llm.n_past == 64


# stalls


def test_each_token_is_counted_under_what_it_waited_for(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64, n_block=16), n_threads=1, n_ubatch=32) as llm:
        list(work.jump_to(llm, TOKENS, 65536 - 60))
        timed = list(work.time_tokens(llm, TOKENS, 100))
    stalls = [stall for piece in timed for stall in piece.stalls]
    first = 65536 - 60 + 1
    assert Counter(stalls)["rebase"] == 1
    placed = [first + i for i, stall in enumerate(stalls) if stall == "placement"]
    assert placed == [p for p in range(first, first + 100) if p % 16 == 0 and stalls[p - first] != "rebase"]
    assert set(stalls) == {"rebase", "placement", "eviction"}
    assert sum(len(piece.seconds) for piece in timed) == 100


def test_a_stall_has_its_count_its_median_and_its_largest_time() -> None:
    summary = stall_summary([1.0, 5.0, 2.0, 3.0], ["eviction", "rebase", "eviction", "eviction"])
    by_name = {stall["name"]: stall for stall in summary}
    assert by_name["eviction"] == {"name": "eviction", "count": 3, "median": 2.0, "max": 3.0}
    assert by_name["rebase"] == {"name": "rebase", "count": 1, "median": 5.0, "max": 5.0}
    assert by_name["shift"] == {"name": "shift", "count": 0, "median": None, "max": None}


# the roofline


def test_tensor_sizes_are_those_that_others_know(default_model: Path, tmp_path: Path) -> None:
    assert sum(info.n_bytes for info in read_tensor_infos(default_model)) == _core.Model(str(default_model)).n_bytes
    model = write_tiny_model(tmp_path / "f16.gguf", HEAD_32, seed=1, weight_type="f16")
    ours = {info.name: (info.shape, info.n_bytes) for info in read_tensor_infos(model.path)}
    theirs = {t.name: (tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in gguf.GGUFReader(model.path).tensors}
    assert ours == theirs
    sizes = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: size for kind, size in _BLOCKS.items() if sizes.get(kind, size) != size} == {}


@pytest.mark.parametrize(("cache_type", "row"), [("f16", 64 * 2), ("q8_0", 64 // 32 * 34), ("q4_0", 64 // 32 * 18)])
def test_a_step_reads_all_weights_but_a_table_of_embeddings(head_32: TinyModel, cache_type: str, row: int) -> None:
    weights = sum(weight.nbytes for name, weight in head_32.weights.items() if name != "token_embd.weight")
    step = step_bytes(head_32.path, cache_type)
    assert step.weights == weights + HEAD_32.n_embd * 4
    # two layers with keys and values of two heads of 32 components
    assert step == StepBytes(weights=step.weights, per_key=2 * 2 * row)
    assert step.at(70, 1000) == step.weights + 70 * 2 * 2 * row


def test_tied_embeddings_are_read_whole(tied: TinyModel) -> None:
    assert step_bytes(tied.path, "f16").weights == sum(weight.nbytes for weight in tied.weights.values())


def test_experts_that_are_not_asked_are_not_read() -> None:
    tensors = [TensorInfo(name="blk.0.ffn_up_exps.weight", shape=(8, 8, 4), n_bytes=1024)]
    assert weights_read(tensors, 0.25) == 256


def test_sliding_layers_read_their_own_window(tmp_path: Path) -> None:
    shape = replace(SLIDING_AND_FULL["gemma2"], n_ctx_train=2048)
    model = write_tiny_model(tmp_path / "gemma2.gguf", shape, seed=3)
    step = step_bytes(model.path, "f16")
    row = 2 * shape.n_head_kv * shape.head_size * 2  # keys and values of one layer; two of four layers slide
    assert (step.per_key, step.sliding_per_key, step.n_sliding) == (2 * row, 2 * row, 12)
    assert step.at(100, 100) - step.weights == 100 * 2 * row + 12 * 2 * row


def test_a_method_reads_what_it_sees(head_32: TinyModel) -> None:
    settings = settings_for(head_32, n_decode=4)  # the middle of a turn: four tokens later
    step = StepBytes(weights=1000, per_key=10)

    def n_bytes(method: str, depth: int) -> int | None:
        return bytes_per_token(settings, Place(method=method, cache_type="f16", depth=depth, filled="read"), step)

    assert n_bytes("full", 600) == 1000 + 604 * 10
    assert n_bytes("endless", 0) == 1000 + 4 * 10
    assert n_bytes("endless", 62) == 1000 + (64 + 2) * 10
    assert n_bytes("endless", 2**20) == 1000 + (64 + 4) * 10
    assert n_bytes("shift", 600) == 1000 + (settings.n_used_by_shift + 4) * 10
    assert n_bytes("recompute", 600) is None


def test_bandwidth_is_that_of_arrays_read() -> None:
    spread = read_bandwidth(2, n_bytes=1 << 20, n_repetitions=3)
    assert 0 < spread.low <= spread.median <= spread.high


# a run


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
    assert counts["endless"]["placement"] in (1, 2)  # one block of 64 begins with the rebase
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


# peers


def test_weights_for_a_peer_are_the_models(tiny_model: TinyModel) -> None:
    config, weights = read_llama(tiny_model.path)
    assert config["num_hidden_layers"] == tiny_model.shape.n_layer
    assert config["vocab_size"] == N_VOCAB
    assert config["tie_word_embeddings"] is tiny_model.shape.tied_embeddings
    # halves that turn against each other with these rows are neighbours that turn with the file's
    halves = replace(
        tiny_model.shape.architecture,
        layers=(Layer(Rope(tiny_model.shape.head_size, order="neox")),) * tiny_model.shape.n_layer,
    )
    tokens = TOKENS[:40].tolist()
    ours = TokenStream(tiny_model.transformer, FULL_ATTENTION).eval(tokens)
    theirs = TokenStream(Transformer(_with_gguf_names(weights), halves), FULL_ATTENTION).eval(tokens)
    np.testing.assert_allclose(theirs, ours, atol=1e-9)


def _with_gguf_names(weights: dict[str, Any]) -> dict[str, Any]:
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    renamed = {}
    for name, values in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = values
    return renamed


def test_the_rows_of_each_head_are_sorted() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert without_permutation(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_peer_runs_plain_llama_models_only(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma2.gguf", SLIDING_AND_FULL["gemma2"], seed=3)
    with pytest.raises(ValueError, match="plain llama models only: gemma2"):
        read_llama(model.path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes the place of the package."""
    monkeypatch.setitem(protocol.SCRIPTS, "attention-sinks", STAND_IN)
    monkeypatch.setitem(protocol.NEEDED, "attention-sinks", ("numpy",))


@pytest.mark.usefixtures("stand_in")
def test_a_peer_is_compared_and_measured_beside_ours(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(
        head_32,
        setup={"methods": ("endless", "full")},
        depths=(100, 600),
        far=None,
        recompute=False,
        prompts=(),
        n_latency=0,
        peer="attention-sinks",
    )
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    (compared,) = log.of_kind("bench.peer")
    assert compared["versions"] == {"stand-in": "1.0"}
    assert compared["same_argmax"] == 1.0
    assert compared["largest_difference"] < 1e-3
    assert compared["loss"] == pytest.approx(compared["loss_here"], abs=1e-3)
    decoded = {r["depth"]: r for r in log.of_kind("bench.decode") if r["method"] == "attention-sinks"}
    assert set(decoded) == {100, 600}
    for depth, record in decoded.items():
        assert record["tokens_per_second"]["median"] == 4 / 0.5
        assert (record["kv_bytes"], record["resident_bytes"]) == (1000, 2000)
        assert record["bytes_per_token"] == head_32.path.stat().st_size + 1000
        assert record["of"] == {"method": "endless", "cache_type": "f16", "depth": depth}
    before = len(log.records)
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    assert len(log.records) == before


def test_what_goes_wrong_in_a_peer_is_said(head_32: TinyModel) -> None:
    with protocol.Peer([sys.executable, STAND_IN]) as peer:
        peer.open(str(head_32.path), 4, 64, 1)
        with pytest.raises(LMInfError, match="the peer failed: as asked"):
            peer.ask("fail")
        with pytest.raises(LMInfError, match="the peer answered .*no answer"):
            peer.ask("babble")
        with pytest.raises(LMInfError, match="exit code 1: cannot dance"):
            peer.ask("dance", tokens=[5])
    with pytest.raises(LMInfError, match="cannot start"):
        protocol.Peer([os.devnull + "/python"])


def test_a_peer_that_is_not_installed_is_asked_for(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.NEEDED, "attention-sinks", ("numpy", "no_such_package"))
    with pytest.raises(ConfigError, match=r"missing: \['no_such_package'\].*pip install 'lminf-edge\[peers\]'"):
        protocol.peer_command("attention-sinks", None)
    with pytest.raises(ConfigError, match="cannot run /no/python"):
        protocol.peer_command("attention-sinks", "/no/python")
    with ResultLog() as log, pytest.raises(ConfigError, match="not installed"):
        run_bench(settings_for(head_32, peer="attention-sinks"), log)
    assert log.records == []
