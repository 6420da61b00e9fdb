"""Records are what the schema says, intervals hold what they promise, and the context shift is llama.cpp's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import sample_results as sample
from lminf_edge import ConfigError, Llama, LMInfError, StateError
from lminf_edge.evaluation.context_shift import ShiftingLlama
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.results import (
    ResultLog,
    begin_or_resume,
    identify_model,
    plain,
    read_results,
    run_record,
    schema,
    settings_from,
)
from lminf_edge.evaluation.statistics import (
    N_BLOCK,
    Estimate,
    mean_interval,
    share_interval,
    slope_interval,
    stream_interval,
)
from tiny_models import TinyModel, TinyShape, random_tokens, write_tiny_model

# --- records


@dataclass(frozen=True, kw_only=True)
class Settings:
    setup: MethodSetup
    lengths: tuple[int, ...] = (1, 2)
    depths: tuple[float, ...] = ()
    name: str | None = None


SETUP = MethodSetup(model="m.gguf", methods=("endless", "full"), cache_types=("f16",), n_sink=4, n_window=64)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return sample.written(tmp_path / "results.jsonl", sample.qa(("endless",)))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    records = sample.qa(("endless",))
    lines: list[str] = []
    with ResultLog(tmp_path / "results.jsonl", echo=lines.append) as log:
        for record in records:
            log.write(record)
        assert log.of_kind("qa.cell") == records[1:]
    assert read_results(tmp_path / "results.jsonl") == records == [json.loads(line) for line in lines]


def test_the_record_of_a_run_has_everything_and_fits_the_schema(head_32: TinyModel, tmp_path: Path) -> None:
    model = identify_model(head_32.path)
    with ResultLog(tmp_path / "results.jsonl") as log:
        log.write(run_record("ppl", Settings(setup=SETUP), model))
    (record,) = read_results(tmp_path / "results.jsonl")
    assert record["model"]["n_bytes"] == head_32.path.stat().st_size
    assert record["settings"]["setup"]["methods"] == ["endless", "full"]
    assert record["program"].keys() == {"lminf_edge", "llama_cpp", "patch_id"}
    assert record["command"].startswith("lminf-edge")
    assert settings_from(Settings, record["settings"]) == Settings(setup=SETUP)


def test_settings_that_do_not_fit_are_refused() -> None:
    settings = plain({"setup": vars(SETUP), "lengths": (4,), "depths": (0.5,), "name": "x"})
    assert settings_from(Settings, settings) == Settings(setup=SETUP, lengths=(4,), depths=(0.5,), name="x")
    with pytest.raises(ConfigError, match="does not know: colour"):
        settings_from(Settings, {**settings, "colour": "blue"})
    with pytest.raises(ConfigError, match="do not fit: .*setup"):
        settings_from(Settings, {})
    with pytest.raises(ConfigError, match="n_window = 0"):
        settings_from(Settings, {"setup": {**vars(SETUP), "n_window": 0}})


def test_what_is_not_finite_becomes_null() -> None:
    assert plain({"a": (1.0, math.inf, -math.inf, math.nan), "b": {"c": math.nan}, "d": "inf", "e": True}) == {
        "a": [1.0, None, None, None],
        "b": {"c": None},
        "d": "inf",
        "e": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["no JSON", *lines], "line 1: no JSON"),
        (lambda lines: [lines[0], "[" * 100_000], "line 2: no JSON"),
        (lambda lines: lines[1:], "its first line is not the record of a run"),
        (lambda lines: ["[1, 2]", *lines], "its first line is not the record of a run"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 2'), *lines[1:]], "has results of version 2"),
        (lambda lines: [lines[0], '{"kind": "qa.sell"}'], "line 2: there is no kind of record 'qa.sell'"),
        (lambda lines: [lines[0], '{"kind": ["run"]}'], "line 2: there is no kind of record"),
        (lambda lines: [lines[0], "3"], "line 2: there is no kind of record None"),
        (lambda lines: [lines[0], '{"kind": "qa.cell"}'], "line 2, qa.cell: 'method' is a required property"),
        (lambda lines: [lines[0], lines[1].replace('"mean": 0.', '"mean": "0.', 1).replace(', "low"', '", "low"', 1)],
         "line 2, f1/mean: "),
        (lambda lines: [lines[0], "", *lines[1:]], "line 2: no JSON"),
        (lambda lines: [], "holds no results"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_words(
    change: Callable[[list[str]], list[str]], message: str, recorded: Path
) -> None:
    lines = change(recorded.read_text().splitlines())
    recorded.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(LMInfError, match=message):
        read_results(recorded)


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(LMInfError, match="cannot read the results"):
            read_results(tmp_path / name)
    for name in (".", "missing/results.jsonl"):
        with pytest.raises(LMInfError):
            ResultLog(tmp_path / name)


def test_every_kind_of_record_in_the_schema_is_described() -> None:
    kinds = [reference["$ref"].rpartition("/")[2] for reference in schema()["oneOf"]]
    assert len(set(kinds)) == len(kinds)
    for kind in kinds:
        described = schema()["$defs"][kind]
        assert described["properties"]["kind"] == {"const": kind}
        assert set(described["required"]) <= set(described["properties"])


def test_a_line_that_was_cut_off_is_left_out_when_the_run_goes_on(recorded: Path) -> None:
    whole = recorded.read_bytes()
    lines = whole.splitlines(keepends=True)
    recorded.write_bytes(whole[:-7])
    with pytest.raises(LMInfError, match=f"line {len(lines)}: no JSON"):
        read_results(recorded)
    with ResultLog(recorded) as log:
        assert log.records == [json.loads(line) for line in lines[:-1]]
        log.write(json.loads(lines[-1]))
    assert recorded.read_bytes() == whole


def test_a_damaged_line_that_is_not_the_last_one_is_not_left_out(recorded: Path) -> None:
    before = recorded.read_text().replace('"kind": "qa.cell"', '"kind": "qa.sell"', 1)
    recorded.write_text(before)
    with pytest.raises(LMInfError, match="line 2"):
        ResultLog(recorded)
    assert recorded.read_text() == before


def test_a_run_goes_on_only_as_the_same_run(head_32: TinyModel, tmp_path: Path) -> None:
    model = identify_model(head_32.path)
    record = run_record("ppl", Settings(setup=SETUP), model)
    log = ResultLog()
    assert not begin_or_resume(log, record)
    elsewhere = Settings(setup=MethodSetup(**{**vars(SETUP), "model": "/elsewhere/m.gguf"}))
    assert begin_or_resume(log, run_record("ppl", elsewhere, model))
    for other, message in (
        (run_record("qa", Settings(setup=SETUP), model), "task \\('ppl', now 'qa'\\)"),
        (run_record("ppl", Settings(setup=SETUP, lengths=(3,)), model), "lengths \\(\\[1, 2\\], now \\[3\\]\\)"),
        (run_record("ppl", Settings(setup=MethodSetup(**{**vars(SETUP), "n_window": 65})), model), "n_window"),
        ({**record, "program": {**record["program"], "patch_id": "x"}}, "patch"),
        ({**record, "model": {**record["model"], "sha256": "0" * 64}}, "model"),
    ):
        with pytest.raises(ConfigError, match=f"differs in {message}.*name another file"):
            begin_or_resume(log, other)
    assert len(log.records) == 1


# --- intervals


def covers(estimate: Estimate, value: float) -> bool:
    return estimate.low <= value <= estimate.high


def autoregressive(rng: np.random.Generator, n: int, memory: float) -> npt.NDArray[np.float64]:
    """Numbers with mean 0 that depend on the ones before them."""
    values = np.empty(n)
    value = rng.standard_normal() / math.sqrt(1 - memory**2)
    for index, noise in enumerate(rng.standard_normal(n)):
        values[index] = value
        value = memory * value + noise
    return values


def test_means_have_students_interval() -> None:
    found = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom, from tables
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-3)


@pytest.mark.parametrize(
    ("n_free", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (30, 2.04227), (1000, 1.96234)],
)
def test_quantiles_of_students_distribution(n_free: int, quantile: float) -> None:
    values = np.array([0.0] * n_free + [1.0])
    found = mean_interval(values)
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n_free + 1)
    assert found.high - found.mean == pytest.approx(half, rel=2e-3)


def test_one_observation_tells_no_interval() -> None:
    assert mean_interval(np.array([2.5])) == Estimate(mean=2.5, low=-math.inf, high=math.inf)
    assert stream_interval(np.full(2 * N_BLOCK - 1, 2.5)).high == math.inf
    assert stream_interval(np.full(2 * N_BLOCK, 2.5)) == Estimate(mean=2.5, low=2.5, high=2.5)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    independent = [covers(mean_interval(rng.standard_normal(6)), 0.0) for _ in range(2000)]
    assert np.mean(independent) == pytest.approx(0.95, abs=0.02)
    dependent = [autoregressive(rng, 2048, 0.7) for _ in range(300)]
    assert np.mean([covers(stream_interval(losses), 0.0) for losses in dependent]) > 0.9
    assert np.mean([covers(mean_interval(losses), 0.0) for losses in dependent]) < 0.75  # what blocks are for


def test_the_mean_of_a_stream_is_that_of_all_tokens() -> None:
    losses = np.arange(3 * N_BLOCK + 10, dtype=np.float32)
    found = stream_interval(losses)
    assert found.mean == float(losses.mean())
    blocks = mean_interval(losses[: 3 * N_BLOCK].reshape(3, N_BLOCK).mean(axis=1))
    assert found.high - found.mean == pytest.approx(blocks.high - blocks.mean)


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_wilsons_interval(n_right: int, n: int, low: float, high: float) -> None:
    """Values published by Newcombe (Statistics in Medicine 17, 1998); those of 0 and of all are z² / (n + z²)."""
    found = share_interval(n_right, n)
    assert (found.mean, found.low, found.high) == pytest.approx((n_right / n, low, high), abs=1e-4)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_slopes_are_those_of_least_squares() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 9.0])
    y = np.array([2.0, 1.0, 5.0, 9.0, 8.0])
    assert slope_interval(x, y).mean == pytest.approx(float(np.polyfit(x, y, 1)[0]))
    exact = slope_interval(x, 3 * x + 1)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((3.0, 3.0, 3.0))
    assert math.isnan(slope_interval(x[:2], y[:2]).mean)


def test_slopes_of_dependent_values_are_not_taken_for_certain() -> None:
    rng = np.random.default_rng(2)
    x = np.arange(200, dtype=np.float64)
    slopes = [slope_interval(x, 0.01 * x + autoregressive(rng, 200, 0.5)) for _ in range(500)]
    assert np.mean([covers(slope, 0.01) for slope in slopes]) > 0.88
    assert np.mean([slope.mean for slope in slopes]) == pytest.approx(0.01, abs=1e-3)


# --- the context shift

N_KEEP = 4
N_CTX = 256
N_UBATCH = 64
EXACT: dict[str, Any] = {
    "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False, "n_threads": 1, "n_ubatch": N_UBATCH
}  # fmt: skip


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values of one layer depend on their own token alone: a shifted context is like a newly read one."""
    path = tmp_path_factory.mktemp("one-layer") / "one-layer.gguf"
    return write_tiny_model(path, TinyShape(n_layer=1, n_ctx_train=512), seed=3).path


def shifted(tokens: list[int], n_read: int) -> tuple[list[int], int, int]:
    """What a context holds after n_read tokens in micro-batches, how many were discarded, and how often."""
    held: list[int] = []
    n_discarded = n_shifts = 0
    for begin in range(0, n_read, N_UBATCH):
        piece = tokens[begin : min(begin + N_UBATCH, n_read)]
        while len(held) + len(piece) > N_CTX:
            n = (len(held) - N_KEEP) // 2
            del held[N_KEEP : N_KEEP + n]
            n_discarded += n
            n_shifts += 1
        held += piece
    return held, n_discarded, n_shifts


def read(llm: Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits after each token; read in micro-batches, as the evaluations do."""
    return np.concatenate([llm.eval(tokens[begin : begin + N_UBATCH]) for begin in range(0, len(tokens), N_UBATCH)])


@pytest.mark.parametrize("n_read", [200, 256, 300, 700, 2000])
def test_a_shifted_context_is_the_kept_tokens_and_the_rest_moved_up(n_read: int, one_layer: Path) -> None:
    tokens = random_tokens(n_read, seed=n_read)
    held, n_discarded, n_shifts = shifted(tokens, n_read)
    n_last = n_read - (n_read - 1) // N_UBATCH * N_UBATCH  # of the last micro-batch: nothing was shifted since
    with Llama(one_layer, n_ctx=N_CTX, **EXACT) as plain_llm:
        expected = plain_llm.eval(held)[-n_last:]
    llm = ShiftingLlama(one_layer, n_ctx=N_CTX, n_keep=N_KEEP, **EXACT)
    with llm:
        found = read(llm, tokens)[-n_last:]
        assert (llm.n_shifts, llm.n_past) == (n_shifts, n_read)
        stats = llm.memory_stats()
        assert (stats.n_past, stats.n_evicted) == (n_read, n_discarded)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_before_the_context_is_full_nothing_differs(head_32: TinyModel) -> None:
    tokens = random_tokens(N_CTX, seed=1)
    llm = ShiftingLlama(head_32.path, n_ctx=N_CTX, n_keep=N_KEEP, **EXACT)
    with llm, Llama(head_32.path, n_ctx=N_CTX, **EXACT) as plain_llm:
        np.testing.assert_array_equal(llm.eval(tokens), plain_llm.eval(tokens))
        assert llm.n_shifts == 0


def test_the_end_of_a_shifted_text_can_be_taken_back_but_not_its_discarded_part(one_layer: Path) -> None:
    tokens = random_tokens(400, seed=2)
    llm = ShiftingLlama(one_layer, n_ctx=N_CTX, n_keep=N_KEEP, **EXACT)
    with llm:
        read(llm, tokens[:320])
        assert llm.n_shifts > 0
        first = llm.eval(tokens[320:330])
        llm.truncate(320)
        assert llm.n_past == 320
        np.testing.assert_allclose(llm.eval(tokens[320:330]), first, atol=1e-5)
        with pytest.raises(StateError, match="the first 50 tokens are not there any more: the context was shifted"):
            llm.truncate(50)
        llm.reset()
        assert llm.n_past == llm.memory_stats().n_evicted == 0
        fresh = llm.eval(tokens[:10])
    with Llama(one_layer, n_ctx=N_CTX, **EXACT) as plain_llm:
        np.testing.assert_allclose(fresh, plain_llm.eval(tokens[:10]), atol=1e-5)


def test_a_context_without_room_to_shift_is_refused(one_layer: Path) -> None:
    with pytest.raises(ConfigError, match="n_ctx = 256: a context shift needs room"):
        ShiftingLlama(one_layer, n_ctx=N_CTX, n_keep=N_CTX - N_UBATCH, **EXACT)
    with pytest.raises(ConfigError, match="n_keep = -1"):
        ShiftingLlama(one_layer, n_ctx=N_CTX, n_keep=-1, **EXACT)
