"""Texts that say nothing but one or more keys, and the questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf_edge._library import _core
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.filler import Filler
from lminf_edge.tokens import TokenArray

GRASS = (
    " The grass on the hill is green. The sky above it is blue. The sun is warm and moves slowly."
    " One walks up, and one walks down again."
)
"""What the text consists of unless another one is named, over and over."""

CITIES = (
    "Athens", "Baghdad", "Berlin", "Boston", "Brussels", "Cairo", "Chicago", "Delhi", "Dublin", "Geneva", "Havana",
    "Helsinki", "Istanbul", "Lima", "Lisbon", "London", "Madrid", "Mexico", "Moscow", "Mumbai", "Oslo", "Paris",
    "Prague", "Rome", "Seoul", "Shanghai", "Stockholm", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip
"""What the numbers of a text with several are told apart by."""

TASK = "A pass key is told somewhere in a long text. Find it and keep it in mind: it is asked for at the end.\n\n"
TOLD = " The pass key is {key}. Do not forget it: {key} is the pass key."
QUESTION = "\n\nWhat is the pass key? The number of the pass key is"
"""How one key is announced, told and asked for; the model goes on with it."""

_TASK_SEVERAL = (
    "Secret numbers are told here and there in a long text. Find them and keep them in mind: one is asked for at the "
    "end.\n\n"
)
_TOLD_SEVERAL = " The secret number of {city} is {key}. Do not forget it: the secret number of {city} is {key}."
_QUESTION_SEVERAL = "\n\nWhat is the secret number of {city}? The secret number of {city} is"


@dataclass(frozen=True, kw_only=True)
class Secret:
    """What is to be told.

    Attributes:
        city: Which of the text's keys it is. None: the only one.
        key: Five digits.
        depth: Share of the filler that should be before it.
        distance: Tokens from the end of what tells it to the end of the prompt, exactly. None: the depth decides.
    """

    city: str | None
    key: str
    depth: float = 0.0
    distance: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Needle:
    """A key in its text.

    Attributes:
        city: See `Secret`.
        key: Five digits.
        depth: Share of the filler that should be before it.
        told: Tokens that tell it.
        n_before: Tokens of filler before it.
    """

    city: str | None
    key: str
    depth: float
    told: TokenArray
    n_before: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PasskeyTrial:
    """One prompt: a text and a question about one of its keys.

    Attributes:
        length: Its length in tokens.
        trial: Number of the text with this length.
        needles: The text's keys, in the order in which it tells them.
        needle: Index of the one that is asked for.
        before: Tokens before the filler.
        filler: Tokens of filler.
        after: Tokens behind the filler, which ask.
        n_question: Tokens at the end that take part in asking: as many for each key of a text, so that what is before
            them is the same.
    """

    length: int
    trial: int
    needles: tuple[Needle, ...]
    needle: int
    before: TokenArray
    filler: TokenArray
    after: TokenArray
    n_question: int

    @property
    def identity(self) -> dict[str, Any]:
        """See `Prompt`."""
        return {"length": self.length, "trial": self.trial, "needle": self.needle}

    @property
    def asked(self) -> Needle:
        """The key that is asked for."""
        return self.needles[self.needle]

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return self.length

    @property
    def distance(self) -> int:
        """Tokens from the end of what tells the key to the end of the prompt."""
        n_told = sum(len(needle.told) for needle in self.needles[: self.needle + 1])
        return self.length - len(self.before) - self.asked.n_before - n_told

    def in_window(self, n_window: int) -> bool:
        """Whether a local window at the prompt's end holds all that tells the key."""
        return self.distance + len(self.asked.told) < n_window

    def tokens(self) -> TokenArray:
        """The prompt, int32 [length]."""
        parts, begin = [self.before], 0
        for needle in self.needles:
            parts += [self.filler[begin : needle.n_before], needle.told]
            begin = needle.n_before
        return np.concatenate([*parts, self.filler[begin:], self.after], dtype=np.int32)


class PasskeyFormat:
    """How keys are told and asked for, in a model's tokens."""

    def __init__(self, vocabulary: _core.Model, text: str) -> None:
        """Splits the filler into tokens.

        Args:
            vocabulary: The model, whose weights are not needed.
            text: What surrounds the keys.
        """
        self.filler = Filler(vocabulary, text)
        self._vocabulary = vocabulary

    def trials(self, secrets: Sequence[Secret], *, length: int, trial: int, first: int) -> list[PasskeyTrial]:
        """A text, asked for each of its keys.

        Args:
            secrets: What it tells, in ascending depths.
            length: Length of each prompt in tokens.
            trial: Number of the text with this length.
            first: First token of the filler.

        Raises:
            ConfigError: The length has no room for that.
        """
        before = self._tokens(TASK if len(secrets) == 1 else _TASK_SEVERAL, begins=True)
        telling, asking = (TOLD, QUESTION) if len(secrets) == 1 else (_TOLD_SEVERAL, _QUESTION_SEVERAL)
        told = [self._tokens(telling.format(city=each.city, key=each.key)) for each in secrets]
        after = [self._tokens(asking.format(city=each.city)) for each in secrets]
        n_question = max(map(len, after))
        n_needed = len(before) + sum(map(len, told)) + n_question
        n_filler = length - n_needed
        if n_filler < 0:
            raise ConfigError(
                f"lengths: {length} tokens have no room for the key and the question, which take {n_needed}"
                if len(secrets) == 1
                else f"lengths: {length} tokens have no room for {len(secrets)} keys and the question, which take "
                f"{n_needed}"
            )
        needles = []
        for secret, tokens in zip(secrets, told, strict=True):
            if secret.distance is None:
                depth, n_before = secret.depth, self.filler.gap(n_filler, first, round(secret.depth * n_filler))
            else:
                n_before = n_filler + n_question - secret.distance
                if not 0 <= n_before <= n_filler:
                    raise ConfigError(
                        f"distances: in a prompt of {length} tokens a key can be from {n_question} to "
                        f"{n_filler + n_question} tokens from its end, not {secret.distance}"
                    )
                depth = n_before / max(1, n_filler)
            needles.append(Needle(city=secret.city, key=secret.key, depth=depth, told=tokens, n_before=n_before))
        return [
            PasskeyTrial(
                length=length,
                trial=trial,
                needles=tuple(needles),
                needle=index,
                before=before,
                filler=self.filler.part(n_filler + n_question - len(question), first),
                after=question,
                n_question=n_question,
            )
            for index, question in enumerate(after)
        ]

    def _tokens(self, text: str, *, begins: bool = False) -> TokenArray:
        return self._vocabulary.tokenize(text.encode(), begins, False)
