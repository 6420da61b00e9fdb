"""Prompts that several methods answer one after the other, with the most probable tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from lminf_edge._checks import check_bool, check_float, check_int
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.methods import MethodSetup, Pass
from lminf_edge.evaluation.prompts import Answer, Prompt, Shared, answer_prompt, n_shared
from lminf_edge.evaluation.reader import ReaderOptions, StreamReader
from lminf_edge.evaluation.results import Record, ResultLog, begin_or_resume, identify_model, run_record
from lminf_edge.tokens import TokenArray

TRUNCATE = "truncate"
"""A control: full attention, which gets no more than the last n_window tokens of a prompt."""

Progress = Callable[[int, int | None], object]
"""Called with the tokens read so far, and those in all."""


@dataclass(frozen=True, kw_only=True)
class AnsweringSettings:
    """Who answers.

    Attributes:
        setup: The methods.
        full_tokens: Longer prompts are left out for a method whose context must hold the whole prompt.
        truncate: Add the control `TRUNCATE`.
        max_tokens: Tokens of an answer at most.
        seed: Of all random choices.

    Raises:
        ConfigError: A value is out of range.
    """

    setup: MethodSetup
    full_tokens: int
    truncate: bool = False
    max_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("full_tokens", self.full_tokens, 1)
        check_bool("truncate", self.truncate)
        check_int("max_tokens", self.max_tokens, 1)
        check_int("seed", self.seed, 0)

    def passes(self) -> list[Pass]:
        """Every method with every cache type."""
        control = [Pass(method=TRUNCATE, cache_type=kind) for kind in self.setup.cache_types if self.truncate]
        return self.setup.passes() + control

    def takes(self, of: Pass, n_prompt: int) -> bool:
        """Whether a pass answers a prompt of so many tokens."""
        return n_prompt <= self.full_tokens or not _holds_all(of, self.options(of, n_prompt))

    def n_read(self, of: Pass, n_prompt: int) -> int:
        """Tokens that a pass reads of a prompt: its last ones."""
        return min(n_prompt, self.setup.n_window) if of.method == TRUNCATE else n_prompt

    def tokens(self, of: Pass, prompt: Prompt) -> TokenArray:
        """What a pass reads of a prompt, int32 [n_read]."""
        return prompt.tokens()[-self.n_read(of, prompt.n_tokens) :]

    def n_shared(self, of: Pass, prompt: Prompt, following: Prompt) -> int:
        """Tokens that a pass reads once for a prompt and the next one."""
        n_questions = prompt.n_question, following.n_question
        return n_shared(self.tokens(of, prompt), self.tokens(of, following), n_questions, self.setup.n_ubatch)

    def options(self, of: Pass, n_prompt: int) -> ReaderOptions:
        """How the model is opened for prompts of at most so many tokens."""
        n_tokens = self.n_read(of, n_prompt) + self.max_tokens
        return self.setup.reader_options(
            Pass(method="full", cache_type=of.cache_type) if of.method == TRUNCATE else of, n_tokens
        )


def _holds_all(of: Pass, options: ReaderOptions) -> bool:
    return of.method != TRUNCATE and options.lminf is None and options.n_keep is None


_P = TypeVar("_P", bound=Prompt)


@dataclass(frozen=True, kw_only=True)
class AnsweringTask(Generic[_P]):
    """What a task makes of answers.

    Attributes:
        name: Of the run record.
        kind: Kind of the records of answers.
        one_line: An answer ends with its line.
        judged: Fields of an answer's record that this task alone has, by prompt and answer.
        cells: Summaries of all records of answers, in an order that depends on the settings alone.
    """

    name: str
    kind: str
    one_line: bool
    judged: Callable[[_P, str], Record]
    cells: Callable[[Sequence[Record]], Iterator[Record]]


def run_answering(
    task: AnsweringTask[_P],
    settings: AnsweringSettings,
    groups: Sequence[Sequence[_P]],
    log: ResultLog,
    on_progress: Progress | None,
) -> None:
    """Asks every method the same and writes what they answer to the log, but for what that holds already.

    Args:
        task: What is made of the answers.
        settings: Who is asked.
        groups: What is asked: see `ask_all`.
        log: Where the records go.
        on_progress: Watches.

    Raises:
        LMInfError: A model cannot be read or cannot compute, or the log holds another run.
    """

    def identity(of: Pass, fields: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
        return of, *(fields.get(name) for name in names)

    begin_or_resume(log, run_record(task.name, settings, identify_model(settings.setup.model)))
    names = next((list(prompt.identity) for group in groups for prompt in group), [])
    done = {identity(pass_of(record), record, names) for record in log.of_kind(task.kind)}
    answers = ask_all(
        settings,
        groups,
        lambda of, prompt: identity(of, prompt.identity, names) in done,
        on_progress or (lambda _done, _all: None),
        one_line=task.one_line,
    )
    for of, prompt, answer in answers:
        log.add(
            task.kind,
            **asdict(of),
            **prompt.identity,
            **task.judged(prompt, answer.text),
            answer=answer.text,
            n_tokens=prompt.n_tokens,
            in_window=prompt.in_window(settings.setup.n_window),
            seconds=answer.seconds,
        )
    for cell in list(task.cells(log.of_kind(task.kind)))[len(log.of_kind(f"{task.name}.cell")) :]:
        log.write(cell)


def pass_of(record: Record) -> Pass:
    """Whose answer it is."""
    return Pass(method=record["method"], cache_type=record["cache_type"])


def ask_all(
    settings: AnsweringSettings,
    groups: Iterable[Sequence[_P]],
    is_answered: Callable[[Pass, _P], bool],
    on_progress: Progress,
    *,
    one_line: bool,
) -> Iterator[tuple[Pass, _P, Answer]]:
    """Lets every pass answer every prompt that it takes: all passes a prompt, then the next one.

    What a prompt and the next one of a group have in common is read once, if it is long. So prompts that begin alike
    should be neighbours, and those that part earlier should come first.

    Args:
        settings: Who answers.
        groups: Prompts. The models are opened anew for each group, with contexts as long as its longest prompt needs.
        is_answered: Tells what need not be asked any more.
        on_progress: Watches. What need not be read counts as read.
        one_line: An answer ends with its line.

    Raises:
        LMInfError: A model cannot be opened or cannot compute.
    """
    work = [
        [(of, prompt) for prompt in group for of in settings.passes() if settings.takes(of, prompt.n_tokens)]
        for group in groups
    ]
    n_all = sum(settings.n_read(of, prompt.n_tokens) for group in work for of, prompt in group)
    open_work = [[each for each in group if not is_answered(*each)] for group in work]
    n_done = n_all - sum(settings.n_read(of, prompt.n_tokens) for group in open_work for of, prompt in group)
    on_progress(n_done, n_all)
    for group in open_work:
        n_longest = max((prompt.n_tokens for _, prompt in group), default=0)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="lminf-edge-")))
            readers: dict[Pass, StreamReader] = {}
            n_kept: dict[Pass, int] = {}
            for index, (of, prompt) in enumerate(group):
                if of not in readers:
                    readers[of] = stack.enter_context(StreamReader(settings.options(of, n_longest)))
                following = next((later for by, later in group[index + 1 :] if by == of), None)
                shared = Shared(
                    n_kept=n_kept.get(of, 0),
                    n_next=0 if following is None else settings.n_shared(of, prompt, following),
                    state=folder / f"{of.name}.state",
                )
                asked = (prompt.n_question, settings.max_tokens, one_line, shared)
                for message in readers[of].run(answer_prompt, settings.tokens(of, prompt), *asked):
                    if isinstance(message, Answer):
                        n_kept[of] = message.n_kept
                        yield of, prompt, message
                    else:
                        n_done += message
                        on_progress(n_done, n_all)


def seeded(*parts: object) -> random.Random:
    """Random numbers that depend on these alone, not on what was drawn before. `random()` is the same everywhere."""
    return random.Random("/".join(map(str, parts)))


def check_depths(depths: Sequence[float]) -> None:
    """Raises ConfigError unless these are different numbers from 0 to 1."""
    for depth in depths:
        check_float("depths", depth, 0, 1)
    if len(set(depths)) < len(depths):
        raise ConfigError(f"depths = {', '.join(map(str, depths))}: one is there twice")


def check_counts(name: str, counts: Sequence[int]) -> None:
    """Raises ConfigError unless these are different numbers of tokens."""
    for count in counts:
        check_int(name, count, 1)
    if len(set(counts)) < len(counts):
        raise ConfigError(f"{name} = {', '.join(map(str, counts))}: one is there twice")


def check_same(name: str, found: str, wanted: str | None) -> None:
    """Raises LMInfError if a text is not what it was when a run was described.

    Args:
        name: What to call it.
        found: Its SHA-256.
        wanted: What that should be.
    """
    if found != wanted:
        raise LMInfError(f"{name} is not the text that it was: its SHA-256 is {found}, not {wanted}")
