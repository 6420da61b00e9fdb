"""Questions about texts: from a file of JSON lines, or those that come with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lminf_edge.errors import LMInfError

_OWN = "persuasion-questions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that can be answered from a text.

    Attributes:
        id: Its name, which no other one of the same file has.
        context: The text.
        question: The question.
        answers: Answers that are right, at least one.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]


def own_questions() -> list[Question]:
    """Sixty questions on passages of Jane Austen's *Persuasion* (1818), written for this package."""
    return list(parse_questions(own_questions_data().decode().splitlines(), _OWN))


def own_questions_data() -> bytes:
    """The file of these questions."""
    return files("lminf_edge.evaluation").joinpath("data").joinpath(_OWN).read_bytes()


def read_questions(path: str | Path) -> list[Question]:
    """Questions from a file of JSON lines.

    A line has "context", "question" and "answers" (a list; or "answer", a text), and perhaps an "id". The names that
    LongBench uses, "input" and "_id", are understood, too.

    Raises:
        LMInfError: The file cannot be read or has no questions, or a line is not like that; the message names it.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            questions = list(parse_questions(stream, str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise LMInfError(f"cannot read the questions {path}: {error}") from error
    if not questions:
        raise LMInfError(f"{path} holds no questions")
    return questions


def parse_questions(lines: Iterable[str], name: str) -> Iterator[Question]:
    """Questions from JSON lines; empty lines are skipped.

    Args:
        lines: The lines.
        name: What to call their file.

    Raises:
        LMInfError: A line holds no question.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LMInfError(f"{place}: no JSON: {error}") from error
        if not isinstance(record, dict):
            raise LMInfError(f"{place}: must be an object with context, question and answers")
        question = Question(
            id=_id(record, place, number),
            context=_text(record, place, ("context", "passage")),
            question=_text(record, place, ("question", "input")),
            answers=_answers(record, place),
        )
        if question.id in seen:
            raise LMInfError(f"{place}: the id {question.id!r} is that of line {seen[question.id]}")
        seen[question.id] = number
        yield question


def _id(record: Mapping[str, Any], place: str, number: int) -> str:
    value = record.get("id", record.get("_id", f"line {number}"))
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise LMInfError(f"{place}: id must be a text or a number")
    return str(value)


def _text(record: Mapping[str, Any], place: str, names: tuple[str, ...]) -> str:
    for name in names:
        if name in record:
            return _checked_text(record[name], f"{place}, {name}")
    raise LMInfError(f"{place}: has no {names[0]}")


def _answers(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if "answers" in record:
        answers = record["answers"]
        if not isinstance(answers, list) or not answers:
            raise LMInfError(f"{place}, answers: must be a list of texts, at least one")
        return tuple(_checked_text(answer, f"{place}, answers") for answer in answers)
    if "answer" in record:
        return (_checked_text(record["answer"], f"{place}, answer"),)
    raise LMInfError(f"{place}: has no answers")


def _checked_text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LMInfError(f"{place}: must be a text that is not empty")
    # half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
