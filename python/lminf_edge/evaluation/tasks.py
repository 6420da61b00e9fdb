"""The tasks by name, and how a run is repeated from its own record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.bench import BenchSettings, run_bench
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.passkey import PasskeySettings, run_passkey
from lminf_edge.evaluation.perplexity import PplSettings, run_ppl
from lminf_edge.evaluation.question_answering import QaSettings, run_qa
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256, settings_from


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that can be measured.

    Attributes:
        settings: The dataclass of its settings, which has a field setup.
        run: Called with settings, a log, and what watches.
        figures: What it measures, by kind of record and field.
        is_timed: Its figures are times, which are never the same twice.
    """

    settings: type[Any]
    run: Callable[..., None]
    figures: tuple[tuple[str, str], ...]
    is_timed: bool = False


TASKS = {
    "ppl": Task(settings=PplSettings, run=run_ppl, figures=(("ppl.bucket", "loss"), ("ppl.summary", "loss"))),
    "passkey": Task(settings=PasskeySettings, run=run_passkey, figures=(("passkey.cell", "exact"),)),
    "qa": Task(settings=QaSettings, run=run_qa, figures=(("qa.cell", "f1"), ("qa.cell", "exact"))),
    "bench": Task(
        settings=BenchSettings,
        run=run_bench,
        figures=(("bench.decode", "tokens_per_second"), ("bench.prompt", "tokens_per_second")),
        is_timed=True,
    ),
}
"""By the name that run records have."""

_PLACE = (
    "begin",
    "end",
    "length",
    "length_low",
    "length_high",
    "depth_low",
    "depth_high",
    "in_window",
    "depth",
    "distance",
    "n_tokens",
)
"""Fields that tell where in a run a figure was measured, besides method and type of cache."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A figure of a run, and the same one when it was repeated.

    Attributes:
        what: Kind of record and field: "ppl.bucket loss".
        method: Method.
        cache_type: Type of cached keys and values.
        place: Where in the run: positions, a length, a depth.
        before: The recorded value. None: the recorded run ended before it.
        now: The new one. None: it is not there.
    """

    what: str
    method: str
    cache_type: str
    place: dict[str, Any]
    before: float | None
    now: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both are the same number."""
        return self.before == self.now


def settings_of(run: Record, model: Path | None = None, text: Path | None = None) -> Any:
    """The settings that a run can be repeated with.

    Args:
        run: Its record of kind "run".
        model: Where the model is now. None: where it was.
        text: Where the text is now. None: where it was.

    Returns:
        An instance of the task's settings.

    Raises:
        ConfigError: The settings are not those of this version, or the task reads no text.
        LMInfError: The model is not there, or is another one.
    """
    task = TASKS[run["task"]]
    path = Path(run["model"]["path"]) if model is None else model
    if not path.is_file():
        raise LMInfError(f"the model {path} is not there: name the file with --model")
    found, recorded = file_sha256(path), run["model"]["sha256"]
    if found != recorded:
        raise LMInfError(
            f"{path} is not the model of the recorded run: its SHA-256 is {found}, that of the run {recorded}. "
            "Name the right file with --model"
        )
    settings = settings_from(task.settings, run["settings"])
    setup = settings.setup
    assert isinstance(setup, MethodSetup)
    settings = replace(settings, setup=replace(setup, model=str(path.resolve())))
    if text is None:
        return settings
    if "text" not in {field.name for field in fields(settings)}:
        raise ConfigError(f"text: a run of {run['task']} reads none")
    return replace(settings, text=str(text.resolve()))


def repeat(run: Record, settings: Any, log: ResultLog, on_progress: Callable[..., object]) -> None:
    """Does the same again.

    Args:
        run: The record of kind "run".
        settings: Of `settings_of`.
        log: Where the new records go.
        on_progress: As the task calls it.

    Raises:
        LMInfError: What the task raises.
    """
    TASKS[run["task"]].run(settings, log, on_progress)


def compare(task: str, before: Sequence[Record], now: Sequence[Record]) -> list[Repeated]:
    """The figures of two runs beside each other, in the order of the first one.

    Args:
        task: Name of the task.
        before: Records of a run.
        now: Records of another one with the same settings.
    """
    earlier, later = dict(_figures(task, before)), dict(_figures(task, now))
    return [
        Repeated(
            what=what,
            method=method,
            cache_type=cache_type,
            place=dict(place),
            before=earlier.get((what, method, cache_type, place)),
            now=later.get((what, method, cache_type, place)),
        )
        for what, method, cache_type, place in {**earlier, **later}
    ]


_Key = tuple[str, str, str, tuple[tuple[str, Any], ...]]


def _figures(task: str, records: Sequence[Record]) -> Iterator[tuple[_Key, float | None]]:
    for kind, field in TASKS[task].figures:
        for record in (each for each in records if each["kind"] == kind):
            value = record[field]
            if isinstance(value, dict):
                value = value.get("mean", value.get("median"))
            place = tuple((name, record[name]) for name in _PLACE if record.get(name) is not None)
            yield (f"{kind} {field}", record["method"], record["cache_type"], place), value
