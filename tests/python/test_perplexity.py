"""Loss by position: what `lminf-edge eval ppl` measures is what the methods give, stopped and started again or not."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import run, start
from lminf_edge import ConfigError, Llama, LMInfConfig, LMInfError, MiddleConfig
from lminf_edge._library import _core
from lminf_edge.evaluation.context_shift import ShiftingLlama
from lminf_edge.evaluation.methods import NO_CLAMP, MethodSetup
from lminf_edge.evaluation.perplexity import PplSettings, run_ppl, text_identity
from lminf_edge.evaluation.results import Record, ResultLog, read_results
from lminf_edge.evaluation.texts import python_documentation
from lminf_edge.evaluation.token_source import TokenSource, json_documents, text_pieces, vocabulary_of
from tiny_models import TinyModel

METHODS = ("endless", "full", "absolute", "shift")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some 2,000 tokens of the tiny models' vocabulary."""
    path = tmp_path / "text.txt"
    path.write_text(python_documentation()[:4000])
    return path


def settings_for(model: TinyModel, text: Path | None, **others: Any) -> PplSettings:
    setup = MethodSetup(
        model=str(model.path), methods=METHODS, cache_types=("f32",), n_sink=2, n_window=64, n_threads=1, n_ubatch=32
    )
    name, sha256 = text_identity(None if text is None else str(text))
    values = {"n_tokens": 700, "bucket": 100, "full_tokens": 256, **others}
    return PplSettings(setup=setup, text=name, text_sha256=sha256, **values)


def losses_of(records: list[Record], method: str, cache_type: str = "f32") -> list[float]:
    return [
        record["loss"]["mean"]
        for record in records
        if record["kind"] == "ppl.bucket" and (record["method"], record["cache_type"]) == (method, cache_type)
    ]


def measured(settings: PplSettings, path: Path | None = None) -> list[Record]:
    with ResultLog(path) as log:
        run_ppl(settings, log)
        return log.records


def tokens_of(model: TinyModel, text: Path, n: int) -> list[int]:
    vocabulary = vocabulary_of(model.path)
    return [int(token) for token in vocabulary.tokenize(text.read_bytes(), True, False)[:n]]


# --- what is measured


def test_each_method_has_the_loss_that_its_own_logprobs_say(head_32: TinyModel, text: Path) -> None:
    settings = settings_for(head_32, text)
    records = measured(settings)
    tokens = tokens_of(head_32, text, 700)
    exact: dict[str, Any] = {"n_ubatch": 32, "n_threads": 1, "cache_type_k": "f32", "cache_type_v": "f32"}
    window = LMInfConfig(n_sink=2, n_window=64)
    models = {
        "endless": Llama(head_32.path, lminf=window, **exact),
        "absolute": Llama(head_32.path, lminf=replace(window, n_clamp=NO_CLAMP, n_block=64), **exact),
        "full": Llama(head_32.path, n_ctx=256, **exact),
        "shift": ShiftingLlama(head_32.path, n_ctx=256, n_keep=2, **exact),
    }
    for method, llm in models.items():
        with llm:
            expected = -llm.logprobs(tokens[:256] if method == "full" else tokens)
        found = losses_of(records, method)
        buckets = [expected[begin : begin + 100] for begin in range(0, len(expected), 100)]
        assert found[: len(buckets)] == pytest.approx([float(bucket.mean()) for bucket in buckets], abs=0.02)
        whole = np.concatenate(buckets).mean()
        summary = next(r for r in records if r["kind"] == "ppl.summary" and r["method"] == method)
        assert summary["loss"] == pytest.approx(float(whole), abs=0.01)
        assert summary["perplexity"] == pytest.approx(np.exp(summary["loss"]))


def test_full_attention_ends_where_its_context_does(head_32: TinyModel, text: Path) -> None:
    records = measured(settings_for(head_32, text))
    full = [r for r in records if r["kind"] == "ppl.bucket" and r["method"] == "full"]
    assert [(r["begin"], r["end"]) for r in full] == [(0, 100), (100, 200), (200, 256)]
    others = [r for r in records if r["kind"] == "ppl.bucket" and r["method"] == "endless"]
    assert sum(r["n_tokens"] for r in others) == 699


def test_differences_are_those_of_the_same_tokens(head_64: TinyModel, text: Path) -> None:
    settings = settings_for(head_64, text, full_tokens=300)
    setup = replace(settings.setup, methods=("endless", "shift"), cache_types=("f16", "q8_0"), n_window=128)
    records = measured(replace(settings, setup=setup))
    pairs = {
        (r["method"], r["cache_type"], r["of"]["method"], r["of"]["cache_type"])
        for r in records
        if r["kind"] == "ppl.difference"
    }
    assert pairs == {
        ("endless", "q8_0", "endless", "f16"),
        ("shift", "q8_0", "shift", "f16"),
        ("shift", "f16", "endless", "f16"),
        ("shift", "q8_0", "endless", "q8_0"),
    }
    for record in records:
        if record["kind"] == "ppl.difference":
            index = record["begin"] // 100
            mine = losses_of(records, record["method"], record["cache_type"])[index]
            other = losses_of(records, record["of"]["method"], record["of"]["cache_type"])[index]
            assert record["difference"]["mean"] == pytest.approx(mine - other, abs=1e-6)
            assert record["ratio"] == pytest.approx(mine / other)


def test_a_fresh_pass_reads_each_part_inside_the_trained_length(head_32: TinyModel, text: Path) -> None:
    # trained on 256 tokens: a bucket of 100 is read behind the 156 before it
    settings = settings_for(head_32, text, fresh=True)
    records = measured(replace(settings, setup=replace(settings.setup, methods=("endless",))))
    tokens = tokens_of(head_32, text, 700)
    fresh, endless = losses_of(records, "fresh"), losses_of(records, "endless")
    assert fresh[:2] == endless[:2]
    exact: dict[str, Any] = {"n_ubatch": 32, "n_threads": 1, "cache_type_k": "f32", "cache_type_v": "f32"}
    with Llama(head_32.path, lminf=LMInfConfig(n_sink=2, n_window=64), **exact) as llm:
        expected = -llm.logprobs(tokens[400 - 156 : 501])[156 - 0 :]
    assert fresh[4] == pytest.approx(float(expected.mean()), abs=0.02)
    assert fresh[4] != endless[4]


def test_with_middle_tokens_what_is_read_recalls_gated(head_32: TinyModel, text: Path) -> None:
    settings = settings_for(head_32, text)
    middle = MiddleConfig(layers=(0, None))
    records = measured(replace(settings, setup=replace(settings.setup, methods=("endless", "middle"), middle=middle)))
    tokens = tokens_of(head_32, text, 700)
    exact: dict[str, Any] = {"n_ubatch": 32, "n_threads": 1, "cache_type_k": "f32", "cache_type_v": "f32"}
    window = LMInfConfig(n_sink=2, n_window=64, middle=middle)
    with Llama(head_32.path, lminf=window, **exact) as llm:
        expected = -llm.logprobs(tokens, recall="gated")
    assert losses_of(records, "middle")[4] == pytest.approx(float(expected[400:500].mean()), abs=0.002)


def test_memory_does_not_grow_with_the_text(head_32: TinyModel, text: Path) -> None:
    settings = settings_for(head_32, text)
    records = measured(replace(settings, setup=replace(settings.setup, methods=("endless", "shift"))))
    for method in ("endless", "shift"):
        sizes = {r["kv_bytes"] for r in records if r["kind"] == "ppl.bucket" and r["method"] == method}
        assert len(sizes) == 1


# --- stopped and started again


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_run_that_was_stopped_ends_with_the_same_figures(
    head_32: TinyModel, text: Path, tmp_path: Path, stop_after: int
) -> None:
    settings = settings_for(head_32, text, fresh=True)
    whole = measured(settings)
    path = tmp_path / "results.jsonl"

    class StoppedError(Exception):
        pass

    def stop(done: int, _total: int | None) -> None:
        if done >= 100 * stop_after:
            raise StoppedError

    with ResultLog(path) as log, pytest.raises(StoppedError):
        run_ppl(settings, log, stop, checkpoint_seconds=0)
    with path.open("a") as stream:
        stream.write('{"kind": "ppl.buck')  # killed in the middle of a line
    resumed = measured(settings, path)
    for method in (*METHODS, "fresh"):
        assert (method, losses_of(resumed, method)) == (method, losses_of(whole, method))
    for kind in ("ppl.difference", "ppl.summary"):
        assert [r for r in resumed if r["kind"] == kind] == [r for r in whole if r["kind"] == kind]
    assert not list(tmp_path.glob("*.states"))
    assert len(measured(settings, path)) == len(resumed)  # it is finished: nothing is read again


def test_another_run_is_not_continued(head_32: TinyModel, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    settings = settings_for(head_32, text, n_tokens=200)
    measured(settings, path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"bucket \(100, now 50\)"):
        measured(replace(settings, bucket=50), path)
    assert path.read_bytes() == before


def test_a_text_that_has_changed_is_refused(head_32: TinyModel, text: Path) -> None:
    settings = settings_for(head_32, text)
    text.write_text("something else")
    with pytest.raises(LMInfError, match="has changed"):
        measured(settings)


def test_ctrl_c_leaves_a_file_that_goes_on(head_32: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    arguments = ["eval", "ppl", "--model", str(head_32.path), "--threads", "1", "--bucket", "64", "--checkpoint", "0"]
    arguments += ["--methods", "endless,absolute", "--n-window", "256", "--tokens", "20000", "--output", str(path)]
    process = start(*arguments)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (path.exists() and "ppl.checkpoint" in path.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    n_read = next(r["n_read"] for r in reversed(read_results(path, cut_off=True)) if r["kind"] == "ppl.checkpoint")
    assert 0 < n_read < 20000


# --- documents


def test_documents_are_read_one_by_one_and_averaged(head_32: TinyModel, tmp_path: Path) -> None:
    documents = [python_documentation()[begin : begin + 900] for begin in (0, 5000, 9000)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, "too short"]))
    settings = settings_for(head_32, path, n_tokens=250, min_tokens=20)
    records = measured(replace(settings, setup=replace(settings.setup, methods=("endless",))))
    read = [r for r in records if r["kind"] == "ppl.document"]
    assert [r["document"] for r in read] == [0, 1, 2]
    exact: dict[str, Any] = {"n_ubatch": 32, "n_threads": 1, "cache_type_k": "f32", "cache_type_v": "f32"}
    with Llama(head_32.path, lminf=LMInfConfig(n_sink=2, n_window=64), **exact) as llm:
        for document, record in zip(documents, read, strict=True):
            llm.reset()
            losses = -llm.logprobs(llm.tokenize(document)[:250])
            assert record["losses"][0] == pytest.approx(float(losses[:100].mean()), abs=0.02)
    mean = np.mean([r["losses"][0] for r in read])
    assert losses_of(records, "endless")[0] == pytest.approx(float(mean))


def test_documents_can_be_one_text(head_32: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": python_documentation()[:500]}) + "\n" for _ in range(2)))
    settings = settings_for(head_32, path, n_tokens=None, concatenate=True, field="body")
    records = measured(replace(settings, setup=replace(settings.setup, methods=("endless",))))
    assert not [r for r in records if r["kind"] == "ppl.document"]
    assert sum(r["n_tokens"] for r in records if r["kind"] == "ppl.bucket") > 800


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1: no JSON"), ('{"other": "x"}', "line 1: no field 'text'"), ('{"text": 1}', "is no text")],
)
def test_a_wrong_document_is_named(line: str, message: str) -> None:
    with pytest.raises(LMInfError, match=message):
        list(json_documents([line], "some.jsonl", "text"))


# --- tokens of long texts


def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lminf_edge.evaluation.token_source as module

    text = python_documentation()[:50_000]
    path = tmp_path / "text.txt"
    path.write_text(text)
    vocabulary = vocabulary_of(default_model)
    monkeypatch.setattr(module, "_N_CHARACTERS", 3000)
    with path.open() as stream:
        source = TokenSource(vocabulary, text_pieces(stream, "text"))
        taken: list[int] = []
        while (following := source.peek()) is not None:
            piece = source.take(777).tolist()
            assert piece[0] == following
            taken += piece
    assert taken == vocabulary.tokenize(text.encode(), True, False).tolist()
    assert source.n_taken == len(taken)


def test_a_text_without_lines_is_cut_at_words(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import lminf_edge.evaluation.token_source as module

    monkeypatch.setattr(module, "_N_CHARACTERS", 10)
    text = "word " * 100
    pieces = list(text_pieces(io.StringIO(text), "text"))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert isinstance(vocabulary_of(head_32.path), _core.Model)


# --- the command


def test_the_command_prints_tables_for_people(head_32: TinyModel, text: Path) -> None:
    finished = run(
        "eval", "ppl", str(text), "--model", str(head_32.path), "--threads", "1", "--n-window", "64", "--tokens", "500",
        "--bucket", "100", "--methods", "endless,full", "--cache-types", "f16",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "endless" in finished.stdout
    assert "perplexity" in finished.stdout


def test_the_command_prints_json_lines_for_machines(head_32: TinyModel, text: Path) -> None:
    finished = run(
        "eval", "ppl", "-", "--model", str(head_32.path), "--threads", "1", "--n-window", "64", "--bucket", "100",
        "--methods", "endless", "--json", given=text.read_bytes(),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in finished.stdout.splitlines()]
    assert records[0]["kind"] == "run"
    assert records[0]["settings"]["text"] == "-"
    assert {record["kind"] for record in records[1:]} == {"ppl.bucket", "ppl.summary"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "methods"),
        (["--methods", "endless,endless"], "is there twice"),
        (["--cache-types", "q9"], "q9"),
        (["no-such-file.txt"], "no-such-file.txt"),
        (["--n-window", "100000"], "n_window"),
    ],
)
def test_wrong_usage_is_told_in_words(head_32: TinyModel, arguments: list[str], message: str) -> None:
    finished = run("eval", "ppl", "--model", str(head_32.path), *arguments)
    assert finished.returncode in (1, 2)
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
