"""The passkey task: a number is told somewhere in a long text that says nothing else, and asked for at its end.

Sources: Mohtashami and Jaggi, arXiv 2305.16300; Han et al., arXiv 2308.16137. The words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lminf_edge._checks import check_int
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.answering import (
    AnsweringSettings,
    Progress,
    ask_all,
    check_counts,
    check_depths,
    check_same,
    seeded,
)
from lminf_edge.evaluation.filler import Filler
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.results import (
    Record,
    ResultLog,
    begin_or_resume,
    file_sha256,
    identify_model,
    run_record,
)
from lminf_edge.evaluation.statistics import share_interval
from lminf_edge.evaluation.texts import text_file
from lminf_edge.evaluation.token_source import vocabulary_of
from lminf_edge.tokens import TokenArray

GRASS = (
    " The grass on the hill is green. The sky above it is blue. The sun is warm and moves slowly."
    " One walks up, and one walks down again."
)
"""What the text consists of unless another one is named, over and over."""

_TASK = "A pass key is told somewhere in a long text. Find it and keep it in mind: it is asked for at the end.\n\n"
_TOLD = " The pass key is {key}. Do not forget it: {key} is the pass key."
_QUESTION = "\n\nWhat is the pass key? The pass key is the number"

_SEPARATED = re.compile(r"\d(?:[\s,.'_-]*\d)*")


@dataclass(frozen=True, kw_only=True)
class PasskeySettings(AnsweringSettings):
    """What is hidden where.

    Attributes:
        lengths: Lengths of prompts in tokens, with question and everything.
        n_trials: Trials of each length: as many in each bin, or at each depth.
        n_bins: Equal parts of the text, in each of which depths are uniformly random.
        depths: Fixed depths instead: shares of the text that are before the key. Empty: random ones.
        filler: Path of a text to hide the key in. None: `GRASS`.
        filler_sha256: What is in the file.

    Raises:
        ConfigError: A value is out of range.
    """

    lengths: tuple[int, ...]
    n_trials: int = 10
    n_bins: int = 5
    depths: tuple[float, ...] = ()
    filler: str | None = None
    filler_sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("lengths", self.lengths)
        check_depths(self.depths)
        check_int("n_bins", self.n_bins, 1)
        check_int("n_trials", self.n_trials, 1)
        if self.n_trials % len(self.bins()):
            places = "depths" if self.depths else "bins"
            raise ConfigError(
                f"n_trials = {self.n_trials}: must be a multiple of the {len(self.bins())} {places}, "
                "so that all get as many"
            )

    def bins(self) -> list[tuple[float, float]]:
        """Lowest and highest depth of each bin; the same one twice for fixed depths."""
        if self.depths:
            return [(depth, depth) for depth in self.depths]
        return [(number / self.n_bins, (number + 1) / self.n_bins) for number in range(self.n_bins)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PasskeyTrial:
    """One prompt.

    Attributes:
        length: Its length in tokens.
        trial: Number of the trial with this length.
        depth: Share of the text that should be before the key.
        key: Five digits.
        before: Tokens before the filler.
        told: Tokens that tell the key.
        after: Tokens behind the filler.
        filler: What the rest consists of.
        first: First token of the filler.
    """

    length: int
    trial: int
    depth: float
    key: str
    before: TokenArray
    told: TokenArray
    after: TokenArray
    filler: Filler
    first: int

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return self.length

    @property
    def n_question(self) -> int:
        """Tokens that ask for the key."""
        return len(self.after)

    @property
    def n_filler(self) -> int:
        """Tokens of filler."""
        return self.length - len(self.before) - len(self.told) - len(self.after)

    @property
    def n_before(self) -> int:
        """Tokens of filler before the key."""
        return self.filler.gap(self.n_filler, self.first, round(self.depth * self.n_filler))

    @property
    def distance(self) -> int:
        """Tokens from the end of what tells the key to the end of the prompt."""
        return self.n_filler - self.n_before + len(self.after)

    def in_window(self, n_window: int) -> bool:
        """Whether a local window at the prompt's end holds all that tells the key."""
        return self.distance + len(self.told) < n_window

    def tokens(self) -> TokenArray:
        """The prompt, int32 [length]."""
        filler = self.filler.part(self.n_filler, self.first)
        return np.concatenate(
            [self.before, filler[: self.n_before], self.told, filler[self.n_before :], self.after], dtype=np.int32
        )


def run_passkey(settings: PasskeySettings, log: ResultLog, on_progress: Progress | None = None) -> None:
    """Asks every method for the same keys and writes what they answer to the log.

    Trials that the log holds already are not run again.

    Args:
        settings: What is hidden where, and who is asked.
        log: Where the records go.
        on_progress: Watches.

    Raises:
        LMInfError: A file cannot be read or is another one than it was, or the log holds another run.
    """
    trials = prepare_trials(settings, vocabulary_of(settings.setup.model))
    begin_or_resume(log, run_record("passkey", settings, identify_model(settings.setup.model)))
    done = {_identity(record) for record in log.of_kind("passkey.trial")}
    answers = ask_all(
        settings,
        trials,
        lambda of, trial: (of.method, of.cache_type, trial.length, trial.trial) in done,
        on_progress or (lambda _done, _all: None),
        one_line=False,
    )
    for of, trial, answer in answers:
        log.add(
            "passkey.trial",
            **asdict(of),
            length=trial.length,
            trial=trial.trial,
            depth=trial.depth,
            seed=settings.seed,
            key=trial.key,
            answer=answer.text,
            exact=is_exact(answer.text, trial.key),
            digits=has_digits(answer.text, trial.key),
            n_tokens=trial.n_tokens,
            distance=trial.distance,
            in_window=trial.in_window(settings.setup.n_window),
            seconds=answer.seconds,
        )
    cells = list(passkey_cells(settings, log.of_kind("passkey.trial")))
    for cell in cells[len(log.of_kind("passkey.cell")) :]:
        log.write(cell)


def prepare_trials(settings: PasskeySettings, vocabulary: _core.Model) -> list[list[PasskeyTrial]]:
    """The trials of each length.

    Args:
        settings: What is hidden where.
        vocabulary: The model, whose weights are not needed.

    Raises:
        ConfigError: A length has no room for the key and the question.
        LMInfError: The filler cannot be read, or is another one than it was.
    """
    if settings.filler is not None:
        check_same(settings.filler, file_sha256(settings.filler), settings.filler_sha256)
    filler = Filler(vocabulary, GRASS if settings.filler is None else text_file(settings.filler))
    before = vocabulary.tokenize(_TASK.encode(), True, False)
    after = vocabulary.tokenize(_QUESTION.encode(), False, False)
    trials: list[list[PasskeyTrial]] = []
    for length in settings.lengths:
        trials.append([])
        for number in range(settings.n_trials):
            random = seeded(settings.seed, length, number)
            key = f"{10000 + int(90000 * random.random())}"
            low, high = settings.bins()[number % len(settings.bins())]
            depth = low + (high - low) * random.random()
            told = vocabulary.tokenize(_TOLD.format(key=key).encode(), False, False)
            first = int(filler.starts[int(random.random() * len(filler.starts))])
            trial = PasskeyTrial(
                length=length,
                trial=number,
                depth=depth,
                key=key,
                before=before,
                told=told,
                after=after,
                filler=filler,
                first=first,
            )
            if trial.n_filler < 0:
                raise ConfigError(
                    f"lengths: {length} tokens have no room for the key and the question, which take "
                    f"{length - trial.n_filler}"
                )
            trials[-1].append(trial)
    return trials


def is_exact(answer: str, key: str) -> bool:
    """Whether an answer begins with the key, written like it."""
    return re.match(rf"{key}(?!\d)", answer.lstrip()) is not None


def has_digits(answer: str, key: str) -> bool:
    """Whether the first number of an answer begins with the key's digits, whatever separates them."""
    number = _SEPARATED.search(answer)
    return number is not None and re.sub(r"\D", "", number[0]).startswith(key)


def passkey_cells(settings: PasskeySettings, trials: Sequence[Record]) -> Iterator[Record]:
    """Accuracy of each pass at each length: by window, and by depth. Where nothing was asked there is no cell.

    Args:
        settings: What was hidden where.
        trials: Records of kind passkey.trial.
    """
    bins = settings.bins()
    for of in settings.passes():
        for length in settings.lengths:
            here = [each for each in trials if _identity(each)[:3] == (of.method, of.cache_type, length)]
            for in_window in (None, True, False):
                part = [each for each in here if in_window is None or each["in_window"] is in_window]
                yield from _cell(of, length, (0.0, 1.0), in_window, part)
            for number, depths in enumerate(bins if len(bins) > 1 else ()):
                part = [each for each in here if each["trial"] % len(bins) == number]
                yield from _cell(of, length, depths, None, part)


def _cell(
    of: Pass, length: int, depths: tuple[float, float], in_window: bool | None, trials: Sequence[Record]
) -> Iterator[Record]:
    if not trials:
        return
    shares = {name: share_interval(sum(each[name] for each in trials), len(trials)) for name in ("exact", "digits")}
    yield {
        "kind": "passkey.cell",
        **asdict(of),
        "length": length,
        "depth_low": depths[0],
        "depth_high": depths[1],
        "in_window": in_window,
        "n_trials": len(trials),
        **{name: asdict(share) for name, share in shares.items()},
    }


def _identity(record: Record) -> tuple[str, str, int, int]:
    return record["method"], record["cache_type"], record["length"], record["trial"]
