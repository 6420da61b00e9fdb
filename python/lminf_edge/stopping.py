"""When a text that is being written ends before the model ends it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lminf_edge.errors import ConfigError


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """One stop string, several, or none, as a tuple.

    Raises:
        TypeError: It is neither a string nor a sequence of strings.
        ConfigError: A stop string is empty.
    """
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else None
    if strings is None or isinstance(stop, bytes) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"stop = {stop!r}: must be a string or a sequence of strings")
    if "" in strings:
        raise ConfigError("stop: an empty string would end every text at once")
    return strings


class StopStrings:
    """Lets a text pass up to the first stop string, whatever pieces the text arrives in.

    What could be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first counts; of those complete at the same place, the longest.

    Attributes:
        found: The stop string that ended the text. None while it goes on.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Nothing has passed yet.

        Args:
            stop: The stop strings, none of them empty.
        """
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Takes the text's next piece.

        Returns:
            What is certain to stand before any stop string. Nothing more after one was found.
        """
        if self.found is not None:
            return ""
        held = self._held + text
        matches = ((held.find(stop), stop) for stop in self._stop)
        first = min(((at + len(stop), at, stop) for at, stop in matches if at >= 0), default=None)
        if first is not None:
            _, n_safe, self.found = first
            self._held = ""
            return held[:n_safe]
        n_safe = len(held) - self._n_undecided(held)
        self._held = held[n_safe:]
        return held[:n_safe]

    def flush(self) -> str:
        """The text ended: what was held back is part of it."""
        held, self._held = self._held, ""
        return held

    def _n_undecided(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0


class LoopGuard:
    """Notices a text that repeats itself word for word.

    A text is taken to loop when its last tokens consist of at least four equal parts of at most 128 tokens each, 64
    tokens in all or more.
    """

    N_PERIOD_MAX = 128
    N_PARTS = 4
    N_TOKENS_MIN = 64

    def __init__(self) -> None:
        self._recent = np.full(self.N_PERIOD_MAX, -1, np.int64)  # the last tokens, newest first
        self._n_equal = np.zeros(self.N_PERIOD_MAX, np.int64)  # for how long tokens equal those a period before
        period = np.arange(1, self.N_PERIOD_MAX + 1)
        self._n_needed = np.maximum(self.N_PARTS * period, self.N_TOKENS_MIN) - period

    def feed(self, token: int) -> bool:
        """Takes the next token. True: the text loops."""
        self._n_equal = np.where(self._recent == token, self._n_equal + 1, 0)
        self._recent = np.concatenate(([token], self._recent[:-1]))
        return bool((self._n_equal >= self._n_needed).any())
