"""The passkey task: numbers are told somewhere in a long text that says nothing else, and one asked for at its end.

Sources: Mohtashami and Jaggi, arXiv 2305.16300; Han et al., arXiv 2308.16137. The words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from lminf_edge._checks import check_int
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError
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
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.passkey_prompts import CITIES, GRASS, PasskeyFormat, PasskeyTrial, Secret
from lminf_edge.evaluation.results import Record, ResultLog, file_sha256
from lminf_edge.evaluation.statistics import share_interval
from lminf_edge.evaluation.texts import text_file
from lminf_edge.evaluation.token_source import vocabulary_of

_SEPARATED = re.compile(r"\d(?:[\s,.'_-]*\d)*")


@dataclass(frozen=True, kw_only=True)
class PasskeySettings(AnsweringSettings):
    """What is hidden where.

    Attributes:
        lengths: Lengths of prompts in tokens, with question and everything.
        n_trials: Texts of each length: as many for each bin, depth or distance.
        n_bins: Equal parts of the text, in each of which depths are uniformly random.
        depths: Fixed depths instead: shares of the text that are before the key. Empty: random ones.
        distances: Fixed distances instead: tokens from the end of what tells the key to the end of the prompt.
        n_needles: Keys that each text tells, one in each of as many equal parts. It is asked for all of them.
        filler: Path of a text to hide the key in. None: `GRASS`.
        filler_sha256: What is in the file.

    Raises:
        ConfigError: A value is out of range.
    """

    lengths: tuple[int, ...]
    n_trials: int = 10
    n_bins: int = 5
    depths: tuple[float, ...] = ()
    distances: tuple[int, ...] = ()
    n_needles: int = 1
    filler: str | None = None
    filler_sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("lengths", self.lengths)
        check_depths(self.depths)
        check_counts("distances", self.distances)
        check_int("n_bins", self.n_bins, 1)
        check_int("n_trials", self.n_trials, 1)
        check_int("n_needles", self.n_needles, 1, len(CITIES))
        if self.depths and self.distances:
            raise ConfigError("depths and distances: a key has either")
        if self.n_needles > 1 and (self.depths or self.distances):
            raise ConfigError("n_needles: several keys are at random depths: leave out depths and distances")
        n_places = len(self.distances or self.bins())
        if self.n_needles == 1 and self.n_trials % n_places:
            places = "distances" if self.distances else "depths" if self.depths else "bins"
            raise ConfigError(
                f"n_trials = {self.n_trials}: must be a multiple of the {n_places} {places}, so that all get as many"
            )

    def bins(self) -> list[tuple[float, float]]:
        """Lowest and highest depth of each bin; the same one twice for fixed depths; none for distances."""
        if self.distances:
            return []
        if self.depths:
            return [(depth, depth) for depth in self.depths]
        return _parts(self.n_bins)


def _parts(n: int) -> list[tuple[float, float]]:
    return [(number / n, (number + 1) / n) for number in range(n)]


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

    def judged(trial: PasskeyTrial, answer: str) -> Record:
        asked = trial.asked
        return {
            "n_needles": len(trial.needles),
            "city": asked.city,
            "depth": asked.depth,
            "distance": trial.distance,
            "seed": settings.seed,
            "key": asked.key,
            "exact": is_exact(answer, asked.key),
            "digits": has_digits(answer, asked.key),
        }

    task = AnsweringTask(
        name="passkey",
        kind="passkey.trial",
        one_line=False,
        judged=judged,
        cells=lambda trials: passkey_cells(settings, trials),
    )
    trials = prepare_trials(settings, vocabulary_of(settings.setup.model))
    run_answering(task, settings, trials, log, on_progress)


def prepare_trials(settings: PasskeySettings, vocabulary: _core.Model) -> list[list[PasskeyTrial]]:
    """The trials of each length, in ascending depths: all texts of a length begin alike, up to their first key.

    Args:
        settings: What is hidden where.
        vocabulary: The model, whose weights are not needed.

    Raises:
        ConfigError: A length has no room for the keys and the question, or none at a distance.
        LMInfError: The filler cannot be read, or is another one than it was.
    """
    if settings.filler is not None:
        check_same(settings.filler, file_sha256(settings.filler), settings.filler_sha256)
    form = PasskeyFormat(vocabulary, GRASS if settings.filler is None else text_file(settings.filler))
    groups: list[list[PasskeyTrial]] = []
    for length in settings.lengths:
        starts = form.filler.starts
        first = int(starts[int(seeded(settings.seed, length).random() * len(starts))])
        texts = [
            form.trials(_secrets(settings, length, number), length=length, trial=number, first=first)
            for number in range(settings.n_trials)
        ]
        texts.sort(key=lambda trials: trials[0].needles[0].n_before)
        groups.append([trial for trials in texts for trial in trials])
    return groups


def _secrets(settings: PasskeySettings, length: int, number: int) -> list[Secret]:
    """What the text of a trial tells."""
    random = seeded(settings.seed, length, number)

    def draw_key() -> str:
        return f"{10000 + int(90000 * random.random())}"

    if settings.distances:
        distance = settings.distances[number % len(settings.distances)]
        return [Secret(city=None, key=draw_key(), distance=distance)]
    if settings.n_needles == 1:
        bins = settings.bins()
        low, high = bins[number % len(bins)]
        return [Secret(city=None, key=draw_key(), depth=low + (high - low) * random.random())]
    cities = sorted(CITIES, key=lambda _: random.random())
    secrets: dict[str, Secret] = {}
    for city, (low, high) in zip(cities, _parts(settings.n_needles), strict=False):
        while (key := draw_key()) in secrets:
            pass
        secrets[key] = Secret(city=city, key=key, depth=low + (high - low) * random.random())
    return list(secrets.values())


def is_exact(answer: str, key: str) -> bool:
    """Whether an answer begins with the key, written like it."""
    return re.match(rf"{key}(?!\d)", answer.lstrip()) is not None


def has_digits(answer: str, key: str) -> bool:
    """Whether the first number of an answer begins with the key's digits, whatever separates them."""
    number = _SEPARATED.search(answer)
    return number is not None and re.sub(r"\D", "", number[0]).startswith(key)


def passkey_cells(settings: PasskeySettings, trials: Sequence[Record]) -> Iterator[Record]:
    """Accuracy of each pass at each length: by window, and by depth or distance. Where nothing was asked is no cell.

    Args:
        settings: What was hidden where.
        trials: Records of kind passkey.trial.
    """
    bins = settings.bins()
    for of in settings.passes():
        for length in settings.lengths:
            here = [each for each in trials if pass_of(each) == of and each["length"] == length]
            for in_window in (None, True, False):
                part = [each for each in here if in_window is None or each["in_window"] is in_window]
                yield from _cell(of, length, (0.0, 1.0), in_window, part)
            for low, high in bins if len(bins) > 1 else ():
                part = [each for each in here if each["depth"] == low or low < each["depth"] < high]
                yield from _cell(of, length, (low, high), None, part)
            for distance in settings.distances:
                part = [each for each in here if each["distance"] == distance]
                depths = [each["depth"] for each in part]
                yield from _cell(of, length, (min(depths, default=0), max(depths, default=0)), None, part, distance)


def _cell(
    of: Pass,
    length: int,
    depths: tuple[float, float],
    in_window: bool | None,
    trials: Sequence[Record],
    distance: int | None = None,
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
        "distance": distance,
        "in_window": in_window,
        "n_trials": len(trials),
        **{name: asdict(share) for name, share in shares.items()},
    }
