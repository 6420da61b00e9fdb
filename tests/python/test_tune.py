"""`lminf-edge bench --tune`: it tries what it says, and recommends what is faster by more than noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lminf_edge import Llama, LMInfConfig
from lminf_edge._params import cache_type_pair
from lminf_edge.cli import _tuned
from lminf_edge.cli._tuned import command_options, python_line
from lminf_edge.cli.app import app
from lminf_edge.errors import ConfigError, ContextError
from lminf_edge.evaluation.bench import tune as tuning
from lminf_edge.evaluation.bench.tune import Choice, TuneResult, TuneSettings, best_of, faster, thread_numbers, tune
from tiny_models import TinyModel

DEFAULT = Choice(n_threads=2, n_ubatch=256, cache_type_k="f16", cache_type_v="f16")


def settings_for(model: TinyModel) -> TuneSettings:
    return TuneSettings(
        model=str(model.path),
        config=LMInfConfig(n_window=64),
        n_threads=(1, 2),
        n_ubatch=(32,),
        cache_types=("q8_0", "q8_0/q4_0"),
        rounds=3,
        n_decode=2,
        n_prompt=70,
    )


def test_numbers_of_threads() -> None:
    assert [thread_numbers(n) for n in (1, 4, 6, 8, 12)] == [
        (1,), (1, 2, 3, 4), (1, 2, 4, 6), (1, 2, 4, 8), (1, 2, 4, 8, 12)
    ]  # fmt: skip


def test_types_of_keys_and_values() -> None:
    assert cache_type_pair("f16") == ("f16", "f16")
    assert cache_type_pair("q8_0/q4_0") == ("q8_0", "q4_0")
    with pytest.raises(ConfigError, match="q8_0/q4_0"):
        cache_type_pair("f16/f16/f16")


def test_a_ratio_is_that_of_the_same_round() -> None:
    gain = faster([10.0, 100.0, 20.0], [12.0, 120.0, 24.0])
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1.2, 1.2, 1.2))
    assert faster([1.0], [2.0]).low == 0


def test_what_may_be_noise_is_not_recommended() -> None:
    certain, small = faster([10.0] * 4, [12.0, 12.1, 11.9, 12.0]), faster([10.0] * 4, [10.2] * 4)
    noisy = faster([10.0] * 4, [30.0, 8.0, 12.0, 9.0])
    assert noisy.mean > certain.mean
    assert best_of([None, small, noisy]) is None
    assert best_of([None, small, certain, noisy]) == 2
    assert best_of([None]) is None


def test_everything_is_tried_beside_the_default(head_32: TinyModel) -> None:
    result = tune(settings_for(head_32))
    tried = [(t.option, t.choice.n_threads, t.choice.n_ubatch, t.choice.cache_type_k) for t in result.trials]
    threads = {t.choice.n_threads for t in result.trials if t.option == "threads"}
    assert threads == {1, 2, result.default.n_threads}
    assert {n for option, _, n, _ in tried if option == "micro-batch"} == {32, 256}
    assert [k for option, _, _, k in tried if option == "cache"] == ["f16", "q8_0", "q8_0"]
    sizes = [t.kv_bytes for t in result.trials if t.option == "cache"]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    for trial in result.trials:
        assert trial.decode is not None and trial.prompt is not None
        assert 0 < trial.decode.low <= trial.decode.median <= trial.decode.high
    for option in ("threads", "micro-batch", "cache"):
        first, *others = [t for t in result.trials if t.option == option]
        assert first.gain is None
        assert all(t.gain is not None and math.isfinite(t.gain.mean) for t in others)


class Machine:
    """Speeds that are known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fastest: Choice) -> None:
        self.turns: list[Choice] = []

        def turn(_: object, choice: Choice, n_decode: int, n_prompt: int) -> tuning._Turn:
            self.turns.append(choice)
            wobble = 1 + 0.001 * (len(self.turns) % 3)
            slower = sum(getattr(choice, name) != getattr(fastest, name) for name in vars(fastest))
            return tuning._Turn(decode=100 * wobble / 1.5**slower, prompt=1000 * wobble / 1.5**slower)

        monkeypatch.setattr(tuning._Station, "turn", turn)
        monkeypatch.setattr(tuning, "default_n_threads", lambda: 2)


@pytest.mark.parametrize(
    "fastest",
    [
        DEFAULT,
        replace(DEFAULT, n_threads=1),
        replace(DEFAULT, n_ubatch=32),
        Choice(n_threads=1, n_ubatch=32, cache_type_k="q8_0", cache_type_v="q4_0"),
    ],
)
def test_the_fastest_is_found(monkeypatch: pytest.MonkeyPatch, head_32: TinyModel, fastest: Choice) -> None:
    machine = Machine(monkeypatch, fastest)
    result = tune(settings_for(head_32))
    assert result.choice == fastest
    assert [t.choice for t in result.trials if t.chosen] != [] or fastest == DEFAULT
    assert set(machine.turns) == {t.choice for t in result.trials}


def test_what_cannot_be_measured_is_left_out(monkeypatch: pytest.MonkeyPatch, head_32: TinyModel) -> None:
    class Full(tuning._Station):
        def __init__(self, model: Any, settings: TuneSettings, choice: Choice, tokens: Any) -> None:
            if choice.n_ubatch == 32:
                raise ContextError("no memory")
            super().__init__(model, settings, choice, tokens)

    monkeypatch.setattr(tuning, "_Station", Full)
    failed = [t for t in tune(settings_for(head_32)).trials if t.error is not None]
    assert {(t.option, t.choice.n_ubatch, t.error) for t in failed} == {("micro-batch", 32, "no memory")}
    assert all(t.decode is None and not t.chosen for t in failed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "rounds"),
        ({"n_decode": 0}, "n_decode"),
        ({"n_threads": (0,)}, "n_threads"),
        ({"cache_types": ("q9",)}, "q9"),
    ],
)
def test_wrong_settings(head_32: TinyModel, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(settings_for(head_32), **changes)  # type: ignore[arg-type]


def test_what_to_pass_can_be_passed(head_32: TinyModel) -> None:
    settings = settings_for(head_32)
    best = Choice(n_threads=1, n_ubatch=32, cache_type_k="q8_0", cache_type_v="q4_0")
    result = TuneResult(default=DEFAULT, choice=best, trials=())
    line = python_line(settings, result).replace(head_32.path.name, str(head_32.path))
    with eval(line, {"Llama": Llama, "LMInfConfig": LMInfConfig}) as llm:
        assert llm._context.n_threads == (1, 1)
        assert llm._context.n_ubatch == 32
    options = command_options(result).split()
    assert options == ["--threads", "1", "--n-ubatch", "32", "--cache-type", "q8_0/q4_0"]
    arguments = ["generate", "hi", "--model", str(head_32.path), "--max-tokens", "2", "--n-window", "64", *options]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert command_options(TuneResult(default=DEFAULT, choice=DEFAULT, trials=())) == ""


def test_the_command(head_32: TinyModel) -> None:
    arguments = ["bench", "--tune", "--model", str(head_32.path), "--n-window", "64", "--rounds", "3", "--decode", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--prompts", "40"])
    assert shown.exit_code == 0, shown.output
    assert "512" in shown.output and "q8_0/q4_0" in shown.output
    answer = CliRunner().invoke(app, [*arguments, "--prompts", "40", "--json"])
    assert answer.exit_code == 0
    document = json.loads(answer.stdout)
    assert {trial["option"] for trial in document["trials"]} == {"threads", "micro-batch", "cache"}
    assert document["settings"]["rounds"] == 3
    assert document["python"].startswith("Llama(")


def test_a_table_fits_into_a_terminal_and_a_busy_machine_is_told(
    head_32: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tuned, "output", Console(width=80, highlight=False))
    settings = settings_for(head_32)
    result = replace(tune(settings), n_taken=1.25)
    _tuned.show_tuned(settings, result)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "q8_0/q4_0" in shown and "1.2 cores" in shown
    _tuned.show_tuned(settings, replace(result, n_taken=0.0, choice=result.default))
    shown = capsys.readouterr().out
    assert "cores" not in shown and "pass nothing" in shown


@pytest.mark.parametrize("option", [["--threads", "1"], ["--output", "x"], ["--methods", "full"], ["--depths", "0"]])
def test_options_that_mean_nothing_here(head_32: TinyModel, option: list[str]) -> None:
    refused = CliRunner().invoke(app, ["bench", "--tune", "--model", str(head_32.path), *option])
    assert refused.exit_code == 2
    assert option[0] in refused.output
