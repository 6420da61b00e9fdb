"""What several rounds have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: The middle one.
        low: The smallest one.
        high: The largest one.
    """

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of some measurements, at least one."""
    return Spread(median=median(values), low=min(values), high=max(values))
