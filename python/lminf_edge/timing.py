"""How long tokens take."""

from __future__ import annotations

from collections import deque

import numpy as np

N_RECENT = 1024
"""How many of the last tokens count."""


class TokenTimes:
    """Times of the tokens that were drawn last, each from when it was asked for to when it was in the sequence."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=N_RECENT)

    def add(self, seconds: float) -> None:
        """One more token was drawn."""
        self._seconds.append(seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed. None before the first token."""
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None

    def percentile(self, percent: float) -> float | None:
        """The time in seconds that this part of the tokens did not exceed. None before the first token."""
        return float(np.percentile(self._seconds, percent)) if self._seconds else None
