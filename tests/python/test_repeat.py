"""`lminf-edge repeat`: a results file is enough to do its run again, and the same comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.passkey import PasskeySettings, run_passkey
from lminf_edge.evaluation.perplexity import PplSettings, run_ppl, text_identity
from lminf_edge.evaluation.results import ResultLog, read_results
from lminf_edge.evaluation.tasks import compare, settings_of
from test_plot import Finished, plot
from tiny_models import TinyModel


def repeat(*arguments: str | Path) -> Finished:
    return plot(*arguments, command="repeat")


@pytest.fixture(scope="module")
def recorded(head_32: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a tiny model that read a short text in two ways."""
    folder = tmp_path_factory.mktemp("recorded")
    text = folder / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a text must be in want of a reader. " * 6)
    model = folder / "model.gguf"
    model.write_bytes(head_32.path.read_bytes())
    name, sha256 = text_identity(str(text))
    setup = MethodSetup(
        model=str(model),
        methods=("endless", "full"),
        cache_types=("f16",),
        n_sink=4,
        n_window=64,
        n_threads=1,
        n_ubatch=32,
    )
    settings = PplSettings(setup=setup, text=name, text_sha256=sha256, n_tokens=300, bucket=100)
    with ResultLog(folder / "ppl.jsonl") as log:
        run_ppl(settings, log)
    return folder / "ppl.jsonl"


def test_the_same_comes_out_wherever_the_files_are_now(recorded: Path, tmp_path: Path) -> None:
    for name in ("model.gguf", "text.txt"):
        (tmp_path / f"moved-{name}").write_bytes((recorded.parent / name).read_bytes())
    moved = ("--model", tmp_path / "moved-model.gguf", "--text", tmp_path / "moved-text.txt")
    result = repeat(recorded, *moved, "--output", tmp_path / "new.jsonl", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output[result.output.index("{") :])
    assert document["same"] is True and document["changes"] == []
    figures = document["figures"]
    assert len(figures) == 2 * (3 + 1)  # three buckets and a summary for each method
    assert all(figure["equal"] and figure["before"] == figure["now"] for figure in figures)
    assert {figure["place"].get("begin") for figure in figures} == {0, 100, 200, None}
    before, now = read_results(recorded), read_results(tmp_path / "new.jsonl")
    assert [_without_times(record) for record in before[1:]] == [_without_times(record) for record in now[1:]]
    assert now[0]["settings"]["setup"]["model"] == str(tmp_path / "moved-model.gguf")


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("tokens_per_second", "resident_bytes")}


def test_other_figures_are_shown_and_end_with_another_exit_code(recorded: Path, tmp_path: Path) -> None:
    records = read_results(recorded)
    index = next(i for i, record in enumerate(records) if record["kind"] == "ppl.bucket")
    records[index]["loss"]["mean"] += 0.5
    records[0]["program"]["patch_id"] = "another"
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = repeat(changed)
    assert result.exit_code == 1
    assert "7 of 8 figures are the same" in result.output
    assert "other than recorded: patch id: another, now" in result.output


def test_a_run_that_was_stopped_is_compared_as_far_as_it_went(recorded: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.jsonl"
    part.write_text("".join(recorded.read_text().splitlines(keepends=True)[:3]))
    known = sum(record["kind"] == "ppl.bucket" for record in read_results(part))
    result = repeat(part)
    assert result.exit_code == 0, result.output
    assert f"all of {known} figures are the same" in result.output
    assert f"{8 - known} figures are new" in result.output


def test_another_model_is_refused_with_both_hashes(recorded: Path, tmp_path: Path) -> None:
    run = read_results(recorded)[0]
    (tmp_path / "other.gguf").write_bytes(b"GGUF, but another one")
    with pytest.raises(
        LMInfError, match=r"SHA-256 is [0-9a-f]{64}, that of the run " + run["model"]["sha256"]
    ) as caught:
        settings_of(run, tmp_path / "other.gguf")
    assert "--model" in str(caught.value)
    run["model"]["path"] = str(tmp_path / "nowhere.gguf")
    with pytest.raises(LMInfError, match="nowhere.gguf is not there: name the file with --model"):
        settings_of(run)


def test_another_text_is_refused(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("something else")
    result = repeat(recorded, "--text", tmp_path / "other.txt")
    assert result.exit_code == 1
    assert "other.txt has changed: its SHA-256 is" in result.output


def test_a_recorded_run_is_not_written_over(recorded: Path) -> None:
    before = recorded.read_bytes()
    result = repeat(recorded, "--output", recorded)
    assert result.exit_code == 2
    assert "that is the recorded run itself" in result.output
    assert recorded.read_bytes() == before


def test_settings_of_another_version_are_refused(recorded: Path) -> None:
    run = read_results(recorded)[0]
    run["settings"]["setup"]["n_wings"] = 2
    with pytest.raises(ConfigError, match="does not know: n_wings"):
        settings_of(run)


def test_settings_come_back_as_they_were(recorded: Path) -> None:
    run = read_results(recorded)[0]
    settings = settings_of(run)
    assert isinstance(settings, PplSettings)
    assert settings.setup.methods == ("endless", "full")
    assert settings == settings_of(run, Path(run["model"]["path"]), Path(run["settings"]["text"]))
    assert replace(settings, bucket=50) != settings


def test_only_tasks_that_read_a_text_can_be_given_one(recorded: Path) -> None:
    run = read_results(recorded)[0]
    measured = {"recompute": False, "depths": [0], "near": 64, "far": None, "rounds": 1, "n_decode": 1, "n_read": 64}
    settings = {"setup": run["settings"]["setup"], **measured, "prompts": [], "prompt_rounds": 1, "n_latency": 0}
    bench = {**run, "task": "bench", "settings": settings}
    assert settings_of(bench).depths == (0,)
    with pytest.raises(ConfigError, match="text: a run of bench reads none"):
        settings_of(bench, text=Path("text.txt"))


def test_a_run_with_several_keys_or_distances_comes_out_the_same(head_32: TinyModel, tmp_path: Path) -> None:
    setup = MethodSetup(
        model=str(head_32.path),
        methods=("endless",),
        cache_types=("f16",),
        n_sink=2,
        n_window=160,
        n_threads=1,
        n_ubatch=32,
    )
    for name, others in (("needles", {"n_needles": 2}), ("distances", {"distances": (90, 300)})):
        settings = PasskeySettings(
            setup=setup, full_tokens=800, lengths=(700,), n_trials=2, n_bins=2, max_tokens=2, **others
        )
        with ResultLog(tmp_path / name) as log:
            run_passkey(settings, log)
        finished = repeat(tmp_path / name, "--json")
        assert finished.exit_code == 0, finished.output
        figures = json.loads(finished.output)["figures"]
        assert len(figures) == len(read_results(tmp_path / name)) - 1 - len(log.of_kind("passkey.trial"))
        assert {figure["place"].get("distance") for figure in figures} - {None} == set(settings.distances)


def test_figures_are_matched_by_method_cache_and_place() -> None:
    cell = {"kind": "passkey.cell", "method": "endless", "cache_type": "f16", "length": 512}
    before = [
        {**cell, "in_window": inside, "exact": {"mean": mean}}
        for inside, mean in ((True, 1.0), (False, 0.0), (None, 0.5))
    ]
    now = [
        {**before[1], "exact": {"mean": 0.25}},
        before[2],
        before[0],
        {**cell, "length": 1024, "exact": {"mean": 1.0}},
    ]
    found = compare("passkey", before, now)
    assert [(figure.before, figure.now, figure.is_equal) for figure in found] == [
        (1.0, 1.0, True),
        (0.0, 0.25, False),
        (0.5, 0.5, True),
        (None, 1.0, False),
    ]
