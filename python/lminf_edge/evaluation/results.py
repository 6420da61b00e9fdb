"""Results as JSON lines: what was measured, with everything that is needed to measure it again.

The first line of a file is a record of kind "run": version, settings, model, program, machine and command. The lines
after it are what was measured, each of a kind that `results.schema.json` describes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar, get_args, get_origin, get_type_hints

import jsonschema

from lminf_edge._library import _core
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.machine import describe_machine
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of

VERSION = 1
"""Of the records."""

Record = dict[str, Any]
"""JSON data with its "kind"."""

_S = TypeVar("_S")

_PLACES = ("model", "text", "filler", "path")
"""Settings that name files: texts and models, whose SHA-256 is compared instead, and where middle tokens are stored."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model it was.

    Attributes:
        path: The file.
        name: Its name.
        n_bytes: Its size.
        sha256: Its SHA-256, in hex.
        n_ctx_train: Length that it was trained on, in tokens.
    """

    path: str
    name: str
    n_bytes: int
    sha256: str
    n_ctx_train: int


def identify_model(path: str | os.PathLike[str]) -> ModelIdentity:
    """Reads the whole file once.

    Raises:
        LMInfError: It cannot be read, or does not say on which length the model was trained.
    """
    file = Path(path)
    return ModelIdentity(
        path=str(file.resolve()),
        name=file.name,
        n_bytes=file.stat().st_size,
        sha256=file_sha256(file),
        n_ctx_train=trained_length(vocabulary_of(file), file),
    )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        LMInfError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise LMInfError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


def run_record(task: str, settings: Any, model: ModelIdentity) -> Record:
    """The first record of a run.

    Args:
        task: "ppl", "passkey", "qa" or "bench".
        settings: A dataclass of plain values: the run can be repeated from it.
        model: The model that is measured.
    """
    return {
        "kind": "run",
        "version": VERSION,
        "task": task,
        "settings": plain(asdict(settings)),
        "model": asdict(model),
        "program": {
            "lminf_edge": version("lminf-edge"),
            "llama_cpp": _core.llama_cpp_version(),
            "patch_id": _core.patch_id(),
        },
        "machine": plain(asdict(describe_machine())),
        "command": shlex.join(["lminf-edge", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def settings_from(kind: type[_S], settings: Mapping[str, Any]) -> _S:
    """The settings of a run record as the dataclass that they came from.

    Raises:
        ConfigError: They are not its fields, or a value is out of range.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    if unknown := sorted(set(settings) - names):
        raise ConfigError(f"the record has settings that this version does not know: {', '.join(unknown)}")
    try:
        return kind(**{name: _typed(hints[name], value) for name, value in settings.items()})
    except TypeError as error:
        raise ConfigError(f"the record's settings do not fit: {error}") from error


def _typed(hint: Any, value: Any) -> Any:
    """JSON has lists for tuples and mappings for dataclasses."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return settings_from(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_typed(get_args(hint)[0], item) for item in value)
    return value


def plain(value: Any) -> Any:
    """A value as JSON has it: without tuples, and with null for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class ResultLog:
    """Where the records of a run go: a file, standard output, or nowhere. A context manager.

    Attributes:
        path: The file, if there is one.
        records: All records, also those of an earlier part of the run.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, echo: Callable[[str], object] | None = None) -> None:
        """Opens the file to append to it.

        Args:
            path: The file. Records in it are those of an earlier part of this run.
            echo: Called with each new line.

        Raises:
            LMInfError: The file cannot be written, or is no results file.
        """
        self.path = None if path is None else Path(path)
        self.records: list[Record] = []
        self._echo = echo
        self._stream: TextIO | None = None
        if self.path is not None:
            earlier = read_results(self.path, cut_off=True) if self.path.exists() else []
            try:
                self._stream = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise LMInfError(f"cannot write the results to {path}: {error}") from error
            self.records = earlier
            self.cut(len(earlier))

    def add(self, kind: str, **values: Any) -> Record:
        """Writes one record, at once.

        Args:
            kind: Its kind.
            **values: Its other fields. What is not finite becomes null.

        Returns:
            The record.
        """
        return self.write({"kind": kind, **values})

    def write(self, record: Record) -> Record:
        """The same for a record that is there already."""
        written: Record = plain(record)
        line = json.dumps(written, ensure_ascii=False)
        if self._stream is not None:
            self._stream.write(line + "\n")
            self._stream.flush()
        if self._echo is not None:
            self._echo(line)
        self.records.append(written)
        return written

    def cut(self, n_records: int) -> None:
        """Forgets all records but the first ones."""
        del self.records[n_records:]
        if self.path is not None and self._stream is not None:
            self._stream.flush()
            with self.path.open("r+b") as stream:
                for _ in range(n_records):
                    stream.readline()
                stream.truncate(stream.tell())

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()


def begin_or_resume(log: ResultLog, record: Record) -> bool:
    """Writes the run record, or finds that the log holds an earlier part of the very same run.

    Args:
        log: The log.
        record: Of `run_record`.

    Returns:
        Whether the log holds an earlier part.

    Raises:
        ConfigError: It holds another run; the message says what differs.
    """
    if not log.records:
        log.write(record)
        return False
    earlier = log.records[0]
    now = plain(record)
    parts = {
        "task": (earlier.get("task"), now["task"]),
        "version": (earlier.get("version"), now["version"]),
        "model": (earlier["model"]["sha256"], now["model"]["sha256"]),
        "patch": (earlier["program"]["patch_id"], now["program"]["patch_id"]),
    }
    before, after = _flat(earlier["settings"]), _flat(now["settings"])
    parts |= {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    if different := [f"{name} ({was!r}, now {now!r})" for name, (was, now) in parts.items() if was != now]:
        raise ConfigError(
            f"the output file holds another run, which differs in {', '.join(different)}: name another file"
        )
    return True


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those of where files are: what is in them decides."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        elif name not in _PLACES:
            flat[name] = value
    return flat


def read_results(path: str | os.PathLike[str], *, cut_off: bool = False) -> list[Record]:
    """Reads and checks a results file.

    Args:
        path: The file.
        cut_off: Leave out a last line that was not written to its end.

    Raises:
        LMInfError: It cannot be read, is of another version, or a line is not what the schema says.
    """
    records: list[Record] = []
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LMInfError(f"cannot read the results {path}: {error}") from error
    lines = text.split("\n")
    last = lines.pop()
    if last and not cut_off:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        records.append(_checked(path, number, line))
    if not records and not cut_off:
        raise LMInfError(f"{path} holds no results")
    return records


def _checked(path: str | os.PathLike[str], number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LMInfError(f"{path}, line {number}: no JSON: {error}") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if number == 1 and kind != "run":
        raise LMInfError(f"{path} is no results file: its first line is not the record of a run")
    if number == 1 and record.get("version") != VERSION:
        raise LMInfError(f"{path} has results of version {record.get('version')}, this lminf-edge reads {VERSION}")
    validator = _validators().get(kind) if isinstance(kind, str) else None
    if validator is None:
        raise LMInfError(f"{path}, line {number}: there is no kind of record {kind!r}")
    wrong = jsonschema.exceptions.best_match(validator.iter_errors(record))
    if wrong is not None:
        place = "/".join(map(str, wrong.absolute_path)) or kind
        raise LMInfError(f"{path}, line {number}, {place}: {wrong.message[:200]}")
    checked: Record = record
    return checked


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of all records (`results.schema.json`)."""
    text = files("lminf_edge.evaluation").joinpath("results.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def _validators() -> dict[str, Any]:
    """A validator for each kind of record."""
    whole = schema()
    kinds = [reference["$ref"].rpartition("/")[2] for reference in whole["oneOf"]]
    return {
        kind: jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": whole["$defs"]}) for kind in kinds
    }


def without_run(records: list[Record]) -> Iterator[Record]:
    """What was measured."""
    return (record for record in records if record["kind"] != "run")
