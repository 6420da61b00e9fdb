"""Prompt lookup: what comes next is guessed where the text has gone on from the same words before.

Exact: a guess is what a model is given to decode ahead, and never decides what is drawn. Drafts from n-gram matches are
those of speculative decoding with a lookup in place of a draft model (Leviathan et al., arXiv 2211.17192, for why it
pays); how a match is followed, and how reliable one of its length is, is the match model of data compression.
"""

from __future__ import annotations

from array import array
from typing import Literal, TypeAlias

import numpy as np

from lminf_edge._checks import check_choice
from lminf_edge.tokens import TokenArray

Speculation: TypeAlias = Literal["lookup"]
"""How tokens are guessed that are decoded ahead."""

N_DRAFT = 15
"""Longest draft in tokens: with the token before it a micro-batch of 16."""

N_REMEMBERED = 2**16
"""How many of the last tokens are looked through, at least."""


def check_speculation(speculate: object) -> None:
    """None, or a way to guess.

    Raises:
        ConfigError: There is no such way.
    """
    if speculate is not None:
        check_choice("speculate", speculate, ("lookup",))


class MatchModel:
    """Follows the last place where a text stood as it ends now.

    A place is found by the last 8, 4 or 2 tokens, the longest first, and followed as long as the text goes on as it did
    there. Where it does not and no other place is found, the one after it is the next guess: a word may have been
    replaced. Each token takes constant time, and memory is bounded.

    Attributes:
        length: How many of the last tokens are the same there, as far as was looked; 0 after a token that was another
            one there.
    """

    _ORDERS = (8, 4, 2)
    _N_BITS = 17
    _N_COMPARED = 32
    _FACTOR = 0x9E3779B1  # odd, with bits all over: Knuth's multiplicative hashing
    _MASK = 0xFFFFFFFF

    def __init__(self, tokens: TokenArray) -> None:
        """The text so far.

        Args:
            tokens: Token ids.
        """
        self.length = 0
        self._tokens = array("i", tokens[-N_REMEMBERED:].tobytes())
        self._at: int | None = None  # of the token that came next there
        self._leaving = [pow(self._FACTOR, n, 2**32) for n in self._ORDERS]
        self._index()

    @property
    def next(self) -> int | None:
        """What came next there. None: the text has never stood so."""
        return None if self._at is None else self._tokens[self._at]

    def feed(self, token: int) -> None:
        """The text's next token."""
        if self._at is not None:
            self.length = self.length + 1 if self._tokens[self._at] == token else 0
            self._at += 1
        self._tokens.append(token)
        self._look_up(token)
        if len(self._tokens) >= 2 * N_REMEMBERED:
            self._drop_oldest()

    def continuation(self, n: int) -> list[int]:
        """The n tokens that came next there; what comes after the text's end is what came after its repetition."""
        if self._at is None:
            return []
        result: list[int] = self._tokens[self._at : self._at + n].tolist()
        period = len(result)
        while len(result) < n:
            result.append(result[len(result) - period])
        return result

    def _look_up(self, token: int) -> None:
        """Finds a place if none is followed, and enters the present one."""
        n = len(self._tokens)
        for number, (order, leaving, table) in enumerate(zip(self._ORDERS, self._leaving, self._tables, strict=True)):
            oldest = self._tokens[n - 1 - order] if n > order else 0
            value = (self._hashes[number] * self._FACTOR + token - oldest * leaving) & self._MASK
            self._hashes[number] = value
            entry = value * self._FACTOR >> (32 - self._N_BITS) & (2**self._N_BITS - 1)
            found, table[entry] = table[entry], n
            if found and self.length == 0:
                length = self._n_equal(found)
                if length >= self._ORDERS[-1]:
                    self._at, self.length = found, length

    def _n_equal(self, place: int) -> int:
        """How many tokens before a place are the text's last ones."""
        tokens, n = self._tokens, len(self._tokens)
        for length in range(min(place, self._N_COMPARED)):
            if tokens[place - 1 - length] != tokens[n - 1 - length]:
                return length
        return min(place, self._N_COMPARED)

    def _index(self) -> None:
        """Enters the whole text, and hashes its last tokens."""
        tokens = np.frombuffer(self._tokens, np.int32).astype(np.uint32) if self._tokens else np.empty(0, np.uint32)
        self._hashes: list[int] = []
        self._tables: list[array[int]] = []
        for order in self._ORDERS:
            padded = np.concatenate((np.zeros(order - 1, np.uint32), tokens))
            hashes = np.zeros(tokens.size, np.uint32)
            for first in range(order):
                hashes = hashes * np.uint32(self._FACTOR) + padded[first : first + tokens.size]
            entries = hashes * np.uint32(self._FACTOR) >> np.uint32(32 - self._N_BITS)
            table = np.zeros(2**self._N_BITS, np.int32)
            table[entries] = np.arange(1, tokens.size + 1)  # of equal entries the last one stays
            self._hashes.append(int(hashes[-1]) if tokens.size else 0)
            self._tables.append(array("i", table.tobytes()))

    def _drop_oldest(self) -> None:
        n_gone = len(self._tokens) - N_REMEMBERED
        del self._tokens[:n_gone]
        if self._at is not None:
            self._at = self._at - n_gone if self._at >= n_gone else None
        self.length = self.length if self._at is not None else 0
        self._index()


class DraftCosts:
    """What it costs to decode tokens ahead, as it was measured so far: in decode steps of one token."""

    _COST = 0.5  # of a drafted token until it was measured; if it were too high, it never would be
    _COST_MAX = 2.0  # that is believed: the machine may have been busy
    _N_FORGOTTEN = 256  # steps after which a high cost is not believed any more

    def __init__(self) -> None:
        """Nothing was measured yet."""
        self._step: float | None = None  # seconds
        self._above = [0.0] * (N_DRAFT + 1)  # what a token costs more than that, by the length of its draft
        self._believed = 1.0  # share of what is above it

    @property
    def known(self) -> bool:
        """Whether a step was measured."""
        return self._step is not None

    def of(self, n_draft: int) -> float:
        """Of a draft of so many tokens."""
        return n_draft * (self._COST + self._still(self._above[n_draft]))

    def add(self, n_draft: int, seconds: float) -> None:
        """A token and n_draft others after it took so long."""
        if n_draft == 0:
            self._step = seconds if self._step is None else self._step + (seconds - self._step) / 8
            self._believed *= 1 - 1 / self._N_FORGOTTEN
        elif self._step is not None:
            above = min((seconds / self._step - 1) / n_draft, self._COST_MAX) - self._COST
            self._above = [old + (above - old) / 8 for old in map(self._still, self._above)]
            self._above[n_draft] += (above - self._above[n_draft]) / 2  # others are likely to be alike, but less so
            self._believed = 1.0

    def _still(self, above: float) -> float:
        return above * self._believed if above > 0 else above


class LookupDrafts:
    """Decides what is decoded ahead, and how much of it: as much as is expected to make the text faster.

    Whether a guess is right is seen with every token, drafted or not, and already in the text so far. So how often
    matches of a length are right here, and guesses of a token, is known before a draft is made, and no draft has to be
    made to find out.
    """

    _N_LEARNT = 256  # of the text's last tokens: guesses in them are judged before the first draft
    _N_RECENT = 32  # guesses that count, of each kind
    _N_LONG = 8  # tokens of a long match
    _N_PRIOR = 2  # guesses of a token that weigh as much as how reliable the length of the match is
    _REACHED_MIN = 0.1  # less probable tokens are not drafted
    _SPEED_UP = 1.15  # that is expected of a draft at least: the step after it, for one, has to build its graph anew

    def __init__(self, tokens: TokenArray, costs: DraftCosts) -> None:
        """The text so far.

        Args:
            tokens: Token ids.
            costs: What drafts cost; to be told by the caller.
        """
        self._model = MatchModel(tokens[: -self._N_LEARNT])
        # Share of right guesses, by length of match: at first by Laplace's rule, as it was right so often in succession
        n_kinds = self._kind(MatchModel._N_COMPARED) + 1
        self._right: list[float] = [1 - 1 / (2 + (2**kind >> 1)) for kind in range(n_kinds)]
        self._n_seen = [0] * len(self._right)
        # How often a token was guessed in a short or in a long match, and the share of right guesses
        self._by_token: dict[tuple[int, bool], tuple[int, float]] = {}
        self._costs = costs
        for token in tokens[-self._N_LEARNT :].tolist():
            self.feed(token)

    def feed(self, token: int) -> None:
        """The text's next token."""
        guess = self._model.next
        if guess is not None:
            kind = self._kind(self._model.length)
            n = self._n_seen[kind] = min(self._n_seen[kind] + 1, self._N_RECENT)
            self._right[kind] += ((guess == token) - self._right[kind]) / (n + 2)
            case = guess, self._model.length >= self._N_LONG
            n, right = self._by_token.get(case, (0, 0.0))
            n = min(n + 1, self._N_RECENT)
            self._by_token[case] = n, right + ((guess == token) - right) / n
        self._model.feed(token)

    def draft(self, n_max: int) -> list[int]:
        """What to decode ahead of the token after the last one fed.

        Of a draft of n tokens, E are expected to be right: the text goes on by 1 + E tokens in the time of 1 + cost
        steps. The n is taken for which that is fastest.

        Args:
            n_max: Longest draft.

        Returns:
            Token ids; none where a draft is not expected to pay.
        """
        if not self._costs.known or self._model.next is None:
            return []
        guesses = self._model.continuation(min(n_max, N_DRAFT))
        n_best, best = 0, self._SPEED_UP
        reached, n_right = 1.0, 0.0
        for n, guess in enumerate(guesses, 1):
            reached *= self._reliability(guess, self._model.length + n - 1)
            if reached < self._REACHED_MIN:
                break
            n_right += reached
            speed_up = (1 + n_right) / (1 + self._costs.of(n))
            if speed_up > best:
                n_best, best = n, speed_up
        return guesses[:n_best]

    def _reliability(self, guess: int, length: int) -> float:
        """Probability that a guess of a match of some length is right."""
        n, right = self._by_token.get((guess, length >= self._N_LONG), (0, 0.0))
        return (n * right + self._N_PRIOR * self._right[self._kind(length)]) / (n + self._N_PRIOR)

    @staticmethod
    def _kind(length: int) -> int:
        """Of lengths 0, 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31, and more."""
        return min(length, MatchModel._N_COMPARED).bit_length()
