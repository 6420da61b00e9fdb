"""Passkeys are hidden where the settings say, asked of every method, and found or not: what the records tell is so."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from command_line import run, start
from lminf_edge import ConfigError, Llama, LMInfError
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.passkey import (
    PasskeySettings,
    has_digits,
    is_exact,
    passkey_cells,
    prepare_trials,
    run_passkey,
)
from lminf_edge.evaluation.passkey_prompts import PasskeyTrial
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256, plain, read_results, settings_from
from lminf_edge.evaluation.token_source import vocabulary_of
from tiny_models import TinyModel, TinyShape, write_tiny_model


def settings_for(
    model: TinyModel, methods: tuple[str, ...] = ("endless", "full", "shift"), **others: Any
) -> PasskeySettings:
    setup = MethodSetup(
        model=str(model.path),
        methods=methods,
        cache_types=("f16",),
        n_sink=2,
        n_window=160,
        n_threads=1,
        n_ubatch=32,
    )
    values: dict[str, Any] = {"lengths": (400, 700), "n_trials": 4, "n_bins": 2, "max_tokens": 4, "full_tokens": 500}
    return PasskeySettings(setup=setup, **{**values, **others})


def trials_of(model: TinyModel, **others: Any) -> list[PasskeyTrial]:
    settings = settings_for(model, **others)
    return [trial for group in prepare_trials(settings, vocabulary_of(model.path)) for trial in group]


def text_of(model: TinyModel, trial: PasskeyTrial) -> str:
    return vocabulary_of(model.path).detokenize(trial.tokens(), False, True).decode()


def measured(settings: PasskeySettings, path: Path | None = None) -> list[Record]:
    with ResultLog(path) as log:
        run_passkey(settings, log)
        return log.records


def without_time(records: list[Record]) -> list[Record]:
    return [{name: each[name] for name in each if name not in ("seconds", "started", "command")} for each in records]


# --- prompts


def test_a_prompt_is_exactly_as_long_as_it_should_be_and_tells_the_key(head_32: TinyModel) -> None:
    for trial in trials_of(head_32, lengths=(400, 401, 1000)):
        assert trial.tokens().shape == (trial.length,)
        text = text_of(head_32, trial)
        assert text.count(f"The pass key is {trial.asked.key}.") == 1
        assert text.endswith("What is the pass key? The number of the pass key is")
        assert len(trial.asked.key) == 5
        assert trial.asked.key.isdecimal()


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_key_is_told_at_its_depth_between_sentences(head_32: TinyModel, depth: float) -> None:
    for trial in trials_of(head_32, lengths=(1200,), depths=(depth,)):
        assert trial.asked.depth == depth
        before, told, after = text_of(head_32, trial).partition(f" The pass key is {trial.asked.key}.")
        assert told
        assert before.rstrip().endswith(".") or depth == 1  # where the filler is cut off
        assert abs(trial.asked.n_before - depth * len(trial.filler)) <= 50  # a sentence of the filler
        n_letters = len(before) - before.index("\n\n"), after.index("\n\n")
        assert abs(n_letters[0] / sum(n_letters) - depth) < 0.1


def test_distance_and_window_are_those_of_the_tokens(head_32: TinyModel) -> None:
    for trial in trials_of(head_32, lengths=(900,), n_trials=12, n_bins=3):
        tokens, told = trial.tokens().tolist(), trial.asked.told.tolist()
        (begin,) = [at for at in range(len(tokens)) if tokens[at : at + len(told)] == told]
        assert trial.distance == 900 - begin - len(told)
        for n_window in (100, 300, trial.distance + len(told), trial.distance + len(told) + 1):
            assert trial.in_window(n_window) is (900 - begin < n_window)


def test_every_bin_gets_as_many_keys_at_random_places(head_32: TinyModel) -> None:
    trials = trials_of(head_32, lengths=(3000,), n_trials=20, n_bins=5)
    for number in range(5):
        depths = [trial.asked.depth for trial in trials if number / 5 <= trial.asked.depth < (number + 1) / 5]
        assert len(depths) == len(set(depths)) == 4
    assert len({trial.asked.key for trial in trials}) == 20


def test_the_seed_decides_about_keys_and_places(head_32: TinyModel) -> None:
    first, again, other = (
        [(trial.asked.key, trial.asked.depth) for trial in trials_of(head_32, seed=seed, **extra)]
        for seed, extra in ((0, {}), (0, {"lengths": (400,)}), (1, {}))
    )
    assert again == first[:4]  # other lengths change nothing
    assert not set(first) & set(other)


def test_a_key_can_be_hidden_in_any_text(head_32: TinyModel, tmp_path: Path) -> None:
    novel = tmp_path / "novel.txt"
    novel.write_text("It rained all day.\n\n" + "\n\n".join(f"Day {day} was dry. Nobody came." for day in range(9)))
    named = {"filler": str(novel), "filler_sha256": file_sha256(novel)}
    for trial in trials_of(head_32, lengths=(1500,), **named):
        assert trial.tokens().size == 1500
        assert "Nobody came." in text_of(head_32, trial)
    novel.write_text("Another one.")
    with pytest.raises(LMInfError, match=r"novel\.txt is not the text that it was"):
        trials_of(head_32, **named)


def test_a_length_without_room_for_key_and_question_is_refused(head_32: TinyModel) -> None:
    with pytest.raises(ConfigError, match="lengths: 50 tokens have no room"):
        trials_of(head_32, lengths=(400, 50))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_trials": 5},
        {"n_trials": 0},
        {"n_bins": 0},
        {"lengths": (400, 400)},
        {"lengths": (0,)},
        {"depths": (0.5, 1.5)},
        {"depths": (0.5, 0.5)},
        {"depths": (0.1, 0.2, 0.3)},  # four trials
        {"max_tokens": 0},
        {"full_tokens": 0},
        {"seed": -1},
        {"distances": (0,)},
        {"distances": (300, 300)},
        {"distances": (100, 200, 300)},  # four trials
        {"distances": (300,), "depths": (0.5,)},
        {"n_needles": 33},
        {"n_needles": 2, "depths": (0.5,)},
    ],
)
def test_settings_out_of_range_are_refused(head_32: TinyModel, wrong: dict[str, Any]) -> None:
    name = "n_trials" if 3 in map(len, (wrong.get("depths", ()), wrong.get("distances", ()))) else next(iter(wrong))
    with pytest.raises(ConfigError, match=name):
        settings_for(head_32, **wrong)


# --- several keys


def test_a_text_with_several_keys_is_asked_for_each(head_32: TinyModel) -> None:
    trials = trials_of(head_32, lengths=(1500, 1501), n_trials=2, n_needles=5)
    assert len(trials) == 2 * 2 * 5
    for begin in range(0, len(trials), 5):
        several = trials[begin : begin + 5]
        assert [trial.needle for trial in several] == list(range(5))
        assert len({trial.asked.key for trial in several}) == len({trial.asked.city for trial in several}) == 5
        assert len({trial.tokens()[: -trial.n_question].tobytes() for trial in several}) == 1
        for number, trial in enumerate(several):
            assert number / 5 <= trial.asked.depth < (number + 1) / 5
            assert trial.tokens().shape == (trial.length,)
            text, city = text_of(head_32, trial), trial.asked.city
            assert text.endswith(f"What is the secret number of {city}? The secret number of {city} is")
            for needle in several:
                told = f" The secret number of {needle.asked.city} is {needle.asked.key}."
                assert text.count(told) == 1
            behind = vocabulary_of(head_32.path).detokenize(trial.tokens()[-trial.distance :], False, True).decode()
            assert text.removesuffix(behind).endswith(f"the secret number of {city} is {trial.asked.key}.")


def test_up_to_32_keys_fit_into_a_text(head_32: TinyModel) -> None:
    trials = trials_of(head_32, lengths=(6000,), n_trials=1, n_needles=32)
    assert len({trial.asked.city for trial in trials}) == 32
    with pytest.raises(ConfigError, match="have no room for 32 keys and the question"):
        trials_of(head_32, lengths=(2000,), n_trials=1, n_needles=32)


def test_cells_count_the_keys(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(head_32, ("endless",), lengths=(900,), n_trials=3, n_needles=4)
    settings = replace(settings, setup=replace(settings.setup, n_window=256))
    records = measured(settings, tmp_path / "passkey.jsonl")
    assert records == read_results(tmp_path / "passkey.jsonl")
    trials = [each for each in records if each["kind"] == "passkey.trial"]
    assert {(each["trial"], each["needle"]) for each in trials} == {(n, m) for n in range(3) for m in range(4)}
    assert {each["n_needles"] for each in trials} == {4}
    n_inside = sum(each["in_window"] for each in trials)
    assert 0 < n_inside < 12
    cells = [each for each in records if each["kind"] == "passkey.cell"]
    assert [(c["depth_low"], c["depth_high"], c["in_window"], c["n_trials"]) for c in cells] == [
        (0, 1, None, 12),
        (0, 1, True, n_inside),
        (0, 1, False, 12 - n_inside),
        (0, 0.5, None, 6),
        (0.5, 1, None, 6),
    ]


# --- distances


def test_a_key_can_be_told_at_a_distance_from_the_end_exactly(head_32: TinyModel) -> None:
    distances = (150, 161, 400)
    trials = trials_of(head_32, lengths=(700, 701), n_trials=6, distances=distances)
    assert sorted({(trial.length, trial.distance) for trial in trials}) == [
        (length, distance) for length in (700, 701) for distance in distances
    ]
    for trial in trials:
        text = text_of(head_32, trial)
        behind = vocabulary_of(head_32.path).detokenize(trial.tokens()[-trial.distance :], False, True).decode()
        assert text.removesuffix(behind).endswith(f" {trial.asked.key} is the pass key.")
        n_filler = sum(needle.n_before for needle in trial.needles)
        assert trial.asked.depth == pytest.approx(n_filler / len(trial.filler))


def test_a_distance_that_a_length_has_not_is_refused(head_32: TinyModel) -> None:
    for distance in (10, 690):
        with pytest.raises(ConfigError, match=f"distances: in a prompt of 700 tokens .* not {distance}"):
            trials_of(head_32, lengths=(700,), distances=(distance,))


def test_distances_have_cells_of_their_own(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(head_32, ("endless",), distances=(80, 250))
    measured(settings, tmp_path / "passkey.jsonl")
    cells = [each for each in read_results(tmp_path / "passkey.jsonl") if each["kind"] == "passkey.cell"]
    found = {(c["length"], c["distance"]): c["n_trials"] for c in cells if c["distance"] is not None}
    assert found == {(length, distance): 2 for length in (400, 700) for distance in (80, 250)}
    whole = {(c["length"], c["in_window"]): c["n_trials"] for c in cells if c["distance"] is None}
    assert whole == {(length, window): n for length in (400, 700) for window, n in ((None, 4), (True, 2), (False, 2))}


# --- what counts as found


@pytest.mark.parametrize(
    ("answer", "exact", "digits"),
    [
        ("12345", True, True),
        (" 12345. It is the key.", True, True),
        ("12,345", False, True),
        ("1 2 3 4 5", False, True),
        ("the number 12345", False, True),
        ("12345 12345", True, True),
        ("123456", False, True),
        ("12354", False, False),
        ("2 12345", False, False),
        ("1234", False, False),
        ("1234 and 5", False, False),
        ("hidden in the grass", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_judged_literally_and_by_its_digits(answer: str, exact: bool, digits: bool) -> None:
    assert is_exact(answer, "12345") is exact
    assert has_digits(answer, "12345") is digits


# --- a run


def test_all_methods_answer_the_same_keys_in_turns(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(head_32, truncate=True)
    measured(settings, tmp_path / "passkey.jsonl")
    records = read_results(tmp_path / "passkey.jsonl")  # checks them against the schema
    trials = [each for each in records if each["kind"] == "passkey.trial"]
    passes = ["endless", "full", "shift", "truncate"]
    asked = [(each["depth"], each["trial"], each["method"]) for each in trials if each["length"] == 400]
    assert [method for *_, method in asked] == 4 * passes
    assert [number for _, number, _ in asked[::4]] == [number for _, number, _ in sorted(asked)[::4]]  # by depth
    assert {number for _, number, _ in asked} == {0, 1, 2, 3}
    assert {each["method"] for each in trials if each["length"] == 700} == {"endless", "shift", "truncate"}
    for number in range(4):
        same = {(each["key"], each["depth"], each["distance"]) for each in trials if each["trial"] == number}
        assert len(same) == 2  # one for each length
    assert settings_from(PasskeySettings, records[0]["settings"]) == settings


def test_a_method_answers_what_its_model_answers(head_32: TinyModel) -> None:
    settings = settings_for(head_32, lengths=(400,), truncate=True)
    trials = [each for each in measured(settings) if each["kind"] == "passkey.trial"]
    prompts = {trial.trial: trial.tokens() for trial in trials_of(head_32, lengths=(400,))}
    common: dict[str, Any] = {"n_threads": 1, "n_ubatch": 32}
    with (
        Llama(head_32.path, n_ctx=512, **common) as plain_llama,
        Llama(head_32.path, lminf=settings.setup.config(), **common) as endless,
    ):
        for method, llm, n_seen in (
            ("full", plain_llama, 400),
            ("truncate", plain_llama, 160),
            ("endless", endless, 400),
        ):
            for number, prompt in prompts.items():
                llm.reset()
                text = "".join(step.text for step in llm.generate(prompt[-n_seen:], max_tokens=4, temperature=0))
                (answer,) = [e["answer"] for e in trials if (e["method"], e["trial"]) == (method, number)]
                assert answer == text.strip()


def test_cells_count_the_trials_of_their_lengths_windows_and_depths(head_32: TinyModel) -> None:
    settings = settings_for(head_32, ("endless",), lengths=(700,))
    places = ((0.1, False, True), (0.7, True, True), (0.2, False, False), (0.9, True, False))
    trials = [
        {
            "kind": "passkey.trial",
            "method": "endless",
            "cache_type": "f16",
            "length": 700,
            "trial": number,
            "depth": depth,
            "distance": 0,
            "in_window": inside,
            "exact": exact,
            "digits": True,
        }
        for number, (depth, inside, exact) in enumerate(places)
    ]
    cells = {(c["depth_low"], c["depth_high"], c["in_window"]): c for c in passkey_cells(settings, trials)}
    assert {key: (cell["n_trials"], cell["exact"]["mean"]) for key, cell in cells.items()} == {
        (0.0, 1.0, None): (4, 0.5),
        (0.0, 1.0, True): (2, 0.5),
        (0.0, 1.0, False): (2, 0.5),
        (0.0, 0.5, None): (2, 0.5),
        (0.5, 1.0, None): (2, 0.5),
    }
    assert all(cell["digits"]["mean"] == 1 and cell["digits"]["low"] < 1 for cell in cells.values())


def test_a_stopped_run_goes_on_to_the_same_figures(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(head_32, ("endless", "full"), lengths=(400,))
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    measured(settings, whole)
    lines = whole.read_text().splitlines(keepends=True)
    for n_lines in (4, len(lines) - 2):
        part.write_text("".join(lines[:n_lines]) + lines[n_lines][:20])
        measured(settings, part)
        assert part.read_text().splitlines(keepends=True)[:n_lines] == lines[:n_lines]
        assert without_time(read_results(part)) == without_time(read_results(whole))
    again = whole.read_bytes()
    measured(settings, whole)
    assert whole.read_bytes() == again


def test_another_run_is_not_continued(head_32: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "passkey.jsonl"
    measured(settings_for(head_32, lengths=(400,), n_trials=2), path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="seed"):
        measured(settings_for(head_32, lengths=(400,), n_trials=2, seed=1), path)
    assert path.read_bytes() == before


def test_progress_counts_all_tokens(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(head_32, lengths=(400,), n_trials=2, truncate=True)
    seen: list[tuple[int, int | None]] = []
    with ResultLog(tmp_path / "log.jsonl") as log:
        run_passkey(settings, log, lambda done, total: seen.append((done, total)))
        n_all = 2 * (3 * 400 + 160)
        assert seen[0] == (0, n_all)
        assert seen[-1] == (n_all, n_all)
        seen.clear()
        run_passkey(settings, log, lambda done, total: seen.append((done, total)))
        assert seen == [(n_all, n_all)]


def test_settings_come_back_from_a_record(head_32: TinyModel) -> None:
    for places in ({"depths": (0.25, 0.75)}, {"distances": (100, 200)}, {"n_needles": 4}):
        settings = settings_for(head_32, **places)
        assert settings_from(PasskeySettings, json.loads(json.dumps(plain(asdict(settings))))) == settings


# --- the command


def command(model: TinyModel, *arguments: str) -> tuple[str, ...]:
    settings = ("--threads", "1", "--n-window", "160", "--n-ubatch", "32", "--max-tokens", "4")
    return ("eval", "passkey", "--model", str(model.path), *settings, *arguments)


def test_the_command_shows_tables_and_says_what_is_left_out(head_32: TinyModel) -> None:
    finished = run(
        *command(head_32, "--lengths", "400,700", "--trials", "2", "--bins", "2", "--methods", "endless,full")
    )
    assert finished.returncode == 0, finished.stderr
    for expected in ("key inside the window", "outside", "endless, f16", "full, f16", "0-50 %", "50-100 %"):
        assert expected in finished.stdout
    assert "full, f16: left out at 700 tokens" in finished.stderr


def test_the_command_s_json_is_its_records(head_32: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    wanted = ("--lengths", "400", "--trials", "1", "--depths", "0.5", "--methods", "endless", "--json")
    finished = run(*command(head_32, *wanted, "--output", str(path)))
    assert finished.returncode == 0, finished.stderr
    assert [json.loads(line) for line in finished.stdout.splitlines()] == read_results(path)
    assert [each["kind"] for each in read_results(path)][:2] == ["run", "passkey.trial"]


def test_the_command_asks_for_several_keys_and_at_distances(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "six-layers.gguf", TinyShape(n_layer=6), seed=0)
    common = ("--lengths", "700", "--trials", "2", "--methods", "middle", "--store-path", str(tmp_path / "store"))
    finished = run(*command(model, *common, "--needles", "3"))
    assert finished.returncode == 0, finished.stderr
    assert "middle, f16" in finished.stdout
    assert (tmp_path / "store").stat().st_size > 0
    finished = run(*command(model, *common, "--distances", "100,250"))
    assert finished.returncode == 0, finished.stderr
    for expected in ("by distance", "100", "250"):
        assert expected in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "many"), "--lengths many"),
        (("--lengths", "50"), "no room for the key"),
        (("--depths", "half"), "--depths half"),
        (("--distances", "far"), "--distances far"),
        (("--needles", "2", "--depths", "0.5"), "n_needles"),
        (("--store-path", "store", "--cache-types", "f16,q8_0"), "one type of cache"),
    ],
)
def test_wrong_usage_ends_with_2(head_32: TinyModel, arguments: tuple[str, ...], said: str) -> None:
    finished = run(*command(head_32, *arguments))
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_missing_filler_ends_with_1(head_32: TinyModel, tmp_path: Path) -> None:
    finished = run(*command(head_32, "--filler", str(tmp_path / "missing.txt")))
    assert finished.returncode == 1
    assert "cannot read" in finished.stderr


def test_ctrl_c_ends_with_130_and_leaves_what_can_go_on(head_32: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "stopped.jsonl"
    wanted = ("--lengths", "4k", "--trials", "60", "--methods", "endless", "--bins", "2", "--output", str(path))
    with start(*command(head_32, *wanted)) as process:
        while not path.exists() or path.read_text().count("\n") < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    kinds = [each["kind"] for each in read_results(path)]
    assert kinds == ["run"] + ["passkey.trial"] * (len(kinds) - 1)
    assert 4 <= len(kinds) < 60


def test_the_default_model_finds_keys_inside_its_window(default_model: Path) -> None:
    setup = MethodSetup(
        model=str(default_model),
        methods=("endless",),
        cache_types=("f16",),
        n_sink=4,
        n_window=512,
        n_threads=1,
    )
    settings = PasskeySettings(setup=setup, full_tokens=512, lengths=(384,), n_trials=2, n_bins=2, max_tokens=6)
    trials = [each for each in measured(settings) if each["kind"] == "passkey.trial"]
    assert [(each["in_window"], each["exact"]) for each in trials] == [(True, True)] * 2


def test_middle_tokens_find_a_key_that_has_left_the_window(default_model: Path) -> None:
    setup = MethodSetup(
        model=str(default_model),
        methods=("endless", "middle"),
        cache_types=("f16",),
        n_sink=4,
        n_window=256,
        n_threads=1,
    )
    settings = PasskeySettings(
        setup=setup, full_tokens=512, lengths=(1024,), n_trials=2, depths=(0.25, 0.5), max_tokens=6
    )
    trials = [each for each in measured(settings) if each["kind"] == "passkey.trial"]
    assert not any(each["in_window"] for each in trials)
    found = {(each["method"], each["depth"]): each["exact"] for each in trials}
    assert found == {(method, depth): method == "middle" for method in ("endless", "middle") for depth in (0.25, 0.5)}
