"""What a text looked up, as passages that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lminf_edge.records import RecalledToken

N_AROUND = 12
"""Tokens before and after a token that was looked up which show what it is about."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage that was looked up.

    Attributes:
        begin: Position of its first token.
        end: Position after its last one.
        weight: Sum of the weights of what was looked up in it, over all tokens of the text.
        text: What it says.
    """

    begin: int
    end: int
    weight: float
    text: str


class RecallLog:
    """Adds up what the tokens of a text look up."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}  # by position

    def add(self, recall: Iterable[RecalledToken]) -> None:
        """One more token has looked these up."""
        for token in recall:
            self._weights[token.position] = self._weights.get(token.position, 0.0) + token.weight

    def passages(self, text_of: Callable[[int, int], str], n: int = 5) -> list[Passage]:
        """The passages that weighed most, the heaviest first.

        Args:
            text_of: The text between two positions; empty where it is not known.
            n: How many at most.
        """
        stretches: list[tuple[int, int, float]] = []
        for position in sorted(self._weights):
            begin, end, weight = max(0, position - N_AROUND), position + N_AROUND + 1, self._weights[position]
            if stretches and begin <= stretches[-1][1]:
                begin, _, before = stretches.pop()
                weight += before
            stretches.append((begin, end, weight))
        heaviest = sorted(stretches, key=lambda stretch: -stretch[2])[:n]
        return [
            Passage(begin=begin, end=end, weight=weight, text=text_of(begin, end)) for begin, end, weight in heaviest
        ]
