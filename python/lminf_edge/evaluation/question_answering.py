"""Question answering: how well short answers agree with reference answers, by method and by length of the text.

The measure is that of Qasper (Dasigi et al., arXiv 2105.03011), which Han et al., arXiv 2308.16137, use, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256

import numpy as np

from lminf_edge._checks import check_optional_int
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.answer_f1 import answer_f1, is_exact
from lminf_edge.evaluation.answering import (
    AnsweringSettings,
    AnsweringTask,
    Progress,
    check_counts,
    check_depths,
    check_same,
    pass_of,
    run_answering,
    seeded,
)
from lminf_edge.evaluation.filler import Filler
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.question_prompts import (
    PromptFormat,
    QuestionPrompt,
    by_length,
    length_range,
    prompt_as_it_comes,
    prompt_in_filler,
)
from lminf_edge.evaluation.questions import own_questions, own_questions_data, read_questions
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256
from lminf_edge.evaluation.statistics import mean_interval, share_interval
from lminf_edge.evaluation.texts import python_documentation, text_file
from lminf_edge.evaluation.token_source import vocabulary_of

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class QaSettings(AnsweringSettings):
    """What is asked.

    Attributes:
        text: Path of a file of questions (`read_questions`). None: the package's own.
        text_sha256: What is in them.
        lengths: Lengths of prompts in tokens, for the package's own questions. Empty: texts are taken as they are.
        depths: Shares of the filler before the passage: one question after the other has the next one.
        filler: Path of a text that the passages are put into. None: Python's documentation.
        filler_sha256: What is in that text.
        n_questions: Ask the first ones only. None: all.

    Raises:
        ConfigError: A value is out of range.
    """

    text: str | None = None
    text_sha256: str
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    filler: str | None = None
    filler_sha256: str | None = None
    n_questions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("lengths", self.lengths)
        check_depths(self.depths)
        check_optional_int("n_questions", self.n_questions, 1)
        if self.text is not None and (self.lengths or self.filler is not None):
            raise ConfigError("lengths and filler: the texts of a file of questions are taken as they are")
        if not self.depths:
            raise ConfigError("depths: at least one is needed")


def run_qa(settings: QaSettings, log: ResultLog, on_progress: Progress | None = None) -> None:
    """Asks every method the same questions and writes what they answer to the log.

    Questions that the log holds answers to are not asked again.

    Args:
        settings: What is asked, and who is asked.
        log: Where the records go.
        on_progress: Watches.

    Raises:
        LMInfError: A file cannot be read or is another one than it was, or the log holds another run.
    """

    def judged(prompt: QuestionPrompt, answer: str) -> Record:
        question = prompt.question
        return {
            "question": question.question,
            "answers": question.answers,
            "depth": prompt.depth,
            "f1": answer_f1(answer, question.answers),
            "exact": is_exact(answer, question.answers),
        }

    task = AnsweringTask(
        name="qa", kind="qa.answer", one_line=True, judged=judged, cells=lambda answers: qa_cells(settings, answers)
    )
    prompts = prepare_questions(settings, vocabulary_of(settings.setup.model))
    run_answering(task, settings, prompts, log, on_progress)


def questions_sha256(text: str | None) -> str:
    """SHA-256 of a file of questions, or of the package's own ones.

    Raises:
        LMInfError: It cannot be read.
    """
    return sha256(own_questions_data()).hexdigest() if text is None else file_sha256(text)


def filler_sha256(filler: str | None) -> str:
    """SHA-256 of a text that passages are put into.

    Raises:
        LMInfError: It cannot be read.
    """
    return sha256(python_documentation().encode()).hexdigest() if filler is None else file_sha256(filler)


def prepare_questions(settings: QaSettings, vocabulary: _core.Model) -> list[list[QuestionPrompt]]:
    """The prompts of each length, or range of lengths. Those with one length and depth begin alike.

    Args:
        settings: What is asked.
        vocabulary: The model, whose weights are not needed.

    Raises:
        ConfigError: A length has no room for a question.
        LMInfError: A file cannot be read, or is another one than it was.
    """
    form = PromptFormat(vocabulary)
    check_same(settings.text or "the set of questions", questions_sha256(settings.text), settings.text_sha256)
    questions = own_questions() if settings.text is None else read_questions(settings.text)
    questions = questions[: settings.n_questions]
    if not settings.lengths:
        return by_length([prompt_as_it_comes(form, question) for question in questions])
    check_same(settings.filler or "Python's documentation", filler_sha256(settings.filler), settings.filler_sha256)
    filler = Filler(vocabulary, python_documentation() if settings.filler is None else text_file(settings.filler))
    groups: list[list[QuestionPrompt]] = []
    for length in settings.lengths:
        prompts = []
        for number, question in enumerate(questions):
            depth = settings.depths[number % len(settings.depths)]
            first = int(filler.starts[int(seeded(settings.seed, length, depth).random() * len(filler.starts))])
            prompts.append(prompt_in_filler(form, question, filler, length=length, depth=depth, first=first))
        groups.append(sorted(prompts, key=lambda prompt: (prompt.depth or 0, prompt.n_before)))
    return groups


def qa_cells(settings: QaSettings, answers: Sequence[Record]) -> Iterator[Record]:
    """Mean F1 of each pass at each length: of all questions, and by whether the window held the passage.

    Args:
        settings: What was asked.
        answers: Records of kind qa.answer.
    """
    for of in settings.passes():
        here = [each for each in answers if pass_of(each) == of]
        for length in settings.lengths:
            part = [each for each in here if each["length"] == length]
            for in_window in (None, True, False):
                yield from _cell(of, length, None, in_window, part)
        if not settings.lengths:
            for limits in sorted({length_range(each["n_tokens"]) for each in here}):
                yield from _cell(of, None, limits, None, [e for e in here if length_range(e["n_tokens"]) == limits])


def _cell(
    of: Pass, length: int | None, limits: tuple[int, int] | None, in_window: bool | None, answers: Sequence[Record]
) -> Iterator[Record]:
    part = [each for each in answers if in_window is None or each["in_window"] is in_window]
    if part:
        yield {
            "kind": "qa.cell",
            **asdict(of),
            "length": length,
            "length_low": limits[0] if limits else None,
            "length_high": limits[1] if limits else None,
            "in_window": in_window,
            "n_questions": len(part),
            "f1": asdict(mean_interval(np.array([each["f1"] for each in part]))),
            "exact": asdict(share_interval(sum(each["exact"] for each in part), len(part))),
        }
