"""Intervals for what was measured: 95 % confidence unless a function says otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # 97.5 % of a normal distribution lie below

N_BLOCK = 64
"""Tokens that are averaged before an interval is computed: losses of neighbouring tokens depend on each other."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its confidence interval.

    Attributes:
        mean: The estimate.
        low: Lower end of the interval; -inf if there are too few observations to tell.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def mean_interval(values: npt.NDArray[np.floating]) -> Estimate:
    """Mean of independent observations (Student's t).

    Args:
        values: Observations [n], n at least 1.
    """
    mean = float(np.mean(values, dtype=np.float64))
    if len(values) < 2:
        return Estimate(mean=mean, low=-math.inf, high=math.inf)
    half = _t(len(values) - 1) * float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def stream_interval(losses: npt.NDArray[np.floating]) -> Estimate:
    """Mean of consecutive losses, whose interval comes from the means of blocks of `N_BLOCK` of them (batch means).

    Args:
        losses: Losses of consecutive tokens, or differences of such, [n], n at least 1.
    """
    mean = float(np.mean(losses, dtype=np.float64))
    n_blocks = len(losses) // N_BLOCK
    if n_blocks < 2:
        return Estimate(mean=mean, low=-math.inf, high=math.inf)
    blocks = np.asarray(losses[: n_blocks * N_BLOCK], np.float64).reshape(n_blocks, N_BLOCK).mean(axis=1)
    around = mean_interval(blocks)
    return Estimate(mean=mean, low=mean + around.low - around.mean, high=mean + around.high - around.mean)


def share_interval(n_right: int, n: int) -> Estimate:
    """Share of successes, with Wilson's score interval (Wilson 1927), which is right for shares near 0 and 1, too.

    Args:
        n_right: Successes.
        n: Trials, at least 1.
    """
    share = n_right / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Estimate(mean=share, low=max(0.0, min(share, centre - half)), high=min(1.0, max(share, centre + half)))


def slope_interval(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> Estimate:
    """Slope of a straight line through points, by least squares.

    The interval allows for neighbouring points that deviate together (Newey and West 1987, with Bartlett weights).

    Args:
        x: Positions [n] in ascending order.
        y: Values [n].
    """
    n = len(x)
    if n < 3:
        return Estimate(mean=math.nan, low=-math.inf, high=math.inf)
    centred = np.asarray(x, np.float64) - np.mean(x, dtype=np.float64)
    spread = float(np.sum(centred**2))
    slope = float(np.sum(centred * y) / spread)
    scores = centred * (y - np.mean(y, dtype=np.float64) - slope * centred)
    n_lags = int(4 * (n / 100) ** (2 / 9))
    variance = float(scores @ scores)
    for lag in range(1, min(n_lags, n - 1) + 1):
        variance += 2 * (1 - lag / (n_lags + 1)) * float(scores[lag:] @ scores[:-lag])
    half = _t(n - 2) * math.sqrt(max(0.0, variance) * n / (n - 2)) / spread
    return Estimate(mean=slope, low=slope - half, high=slope + half)


def _t(n_free: int) -> float:
    """97.5 % quantile of Student's t distribution (Abramowitz and Stegun 26.7.5; exact for 1 and 2)."""
    if n_free == 1:
        return 12.706204736174698
    if n_free == 2:
        return 4.302652729749464
    z, v = _Z, float(n_free)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))
