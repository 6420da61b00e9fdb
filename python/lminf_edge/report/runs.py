"""Results files as runs, and what figures and tables take from their records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lminf_edge.errors import LMInfError
from lminf_edge.evaluation.results import Record, read_results

METHOD_ORDER = ("endless", "middle", "fresh", "absolute", "shift", "recompute", "attention-sinks", "full", "truncate")
"""Methods in the order of legends and tables; others come behind them."""

_CACHE_ORDER = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


class Way(NamedTuple):
    """A method with a type of cache: what a line of a figure or a row of a table is about."""

    method: str
    cache_type: str


class Point(NamedTuple):
    """A value with its interval or spread; None where there is none."""

    x: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A results file.

    Attributes:
        name: The file's name without its ending; different from those of other runs.
        about: The record of kind "run".
        records: All records.
        cut_off: The last line was not written to its end, and is left out.
    """

    name: str
    about: Record
    records: list[Record]
    cut_off: bool = False

    @property
    def task(self) -> str:
        """What was measured: "ppl", "passkey", "qa" or "bench"."""
        return str(self.about["task"])

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    def setting(self, name: str) -> Any:
        """A setting of the task or of what is compared. None: there is none of this name."""
        settings = self.about["settings"]
        setup = settings.get("setup")
        inner = setup if isinstance(setup, dict) else {}
        return settings.get(name, inner.get(name))

    @property
    def n_ctx_train(self) -> int | None:
        """Length that the model was trained on, if the run says so."""
        length = self.about["model"].get("n_ctx_train", self.setting("n_ctx_train"))
        return length if isinstance(length, int) and length > 0 else None


def load_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads results files.

    A file of a run that was killed, or still goes on, may end within a line: that one is left out.

    Raises:
        LMInfError: One cannot be read, or holds something else.
    """
    runs: list[Run] = []
    for path in paths:
        records, cut_off = _read(path)
        names = {run.name for run in runs}
        stem = Path(path).stem or "results"
        name = next(name for name in _numbered(stem, len(names)) if name not in names)
        runs.append(Run(name=name, about=records[0], records=records, cut_off=cut_off))
    return runs


def _read(path: str | os.PathLike[str]) -> tuple[list[Record], bool]:
    try:
        return read_results(path), False
    except LMInfError:
        records = read_results(path, cut_off=True)
        if not records:
            raise
        return records, True


def _numbered(stem: str, n: int) -> list[str]:
    return [stem, *(f"{stem}-{number}" for number in range(2, n + 3))]


def way_of(record: Record) -> Way:
    """What a record is about."""
    return Way(record["method"], record["cache_type"])


def kept_bytes(record: Record) -> int:
    """Bytes of keys and values, in the cache and in the store of middle tokens."""
    return int(record["kv_bytes"]) + int(record.get("store_bytes", 0))


def ordered(ways: Iterable[Way]) -> list[Way]:
    """Each once: by method, then by type of cache, the more exact ones first."""

    def place(way: Way) -> tuple[int, str, int, str]:
        return (*_index(METHOD_ORDER, way.method), *_index(_CACHE_ORDER, way.cache_type))

    return sorted(set(ways), key=place)


def _index(order: Sequence[str], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order)), name


def lines_of(
    records: Iterable[Record], x: Callable[[Record], float], field: str, centre: str = "mean"
) -> dict[Way, list[Point]]:
    """Lines of a figure, each with ascending x.

    Args:
        records: Records of one kind.
        x: Where a record's point lies. Of several records with the same x, the last one counts.
        field: Estimate or spread that is shown, or a plain number.
        centre: Its middle, "mean" or "median".
    """
    found: dict[Way, dict[float, Point]] = {}
    for record in records:
        value = record[field]
        if isinstance(value, dict):
            middle, low, high = value[centre], value["low"], value["high"]
        else:
            middle, low, high = value, None, None
        if middle is not None:
            found.setdefault(way_of(record), {})[x(record)] = Point(x(record), middle, low, high)
    return {way: [found[way][at] for at in sorted(found[way])] for way in ordered(found)}
