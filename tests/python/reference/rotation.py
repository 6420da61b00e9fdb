"""RoPE as one complex factor per pair of components: what a distance does to the product of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference.architecture import Rope
from reference.arrays import ComplexArray, FloatArray, IntArray

_YARN_FAST, _YARN_SLOW = 32.0, 1.0
"""Turns within the original context above which a pair is not interpolated, and below which it is: YaRN's defaults."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The pairs of a head and how they turn. A pair that RoPE leaves alone has frequency 0.

    Attributes:
        first: [head_size / 2] component that is the real part of each pair.
        second: [head_size / 2] component that is the imaginary part.
        frequencies: [head_size / 2] angle per position.
        magnitudes: [head_size / 2] factor of each pair, in query and key alike.
    """

    first: IntArray
    second: IntArray
    frequencies: FloatArray
    magnitudes: FloatArray

    def pairs(self, heads: FloatArray) -> ComplexArray:
        """[..., head_size / 2] pairs of components [..., head_size] as complex numbers."""
        pairs: ComplexArray = heads[..., self.first] + 1j * heads[..., self.second]
        return pairs

    def turn(self, distance: IntArray) -> ComplexArray:
        """[..., head_size / 2] factors of the products of query pairs with conjugated key pairs."""
        distances, inverse = np.unique(distance, return_inverse=True)
        turns: ComplexArray = self.magnitudes**2 * np.exp(1j * distances[:, None] * self.frequencies)
        return turns[inverse.reshape(distance.shape)]


def rotation(rope: Rope | None, head_size: int, factors: FloatArray | None = None) -> Rotation:
    """The rotation of heads of a size; `factors` [n_rot / 2] divide the angles."""
    n_rot, offset = (rope.n_rot, rope.offset) if rope else (0, 0)
    rotated = np.arange(offset, offset + n_rot)
    others = np.setdiff1d(np.arange(head_size), rotated)
    halves = (rotated[0::2], rotated[1::2]) if rope and rope.order == "normal" else np.split(rotated, 2)
    frequencies, magnitude = _frequencies(rope, factors) if rope else (np.zeros(0), 1.0)
    return Rotation(
        first=np.concatenate([halves[0], others[0::2]]),
        second=np.concatenate([halves[1], others[1::2]]),
        frequencies=np.concatenate([frequencies, np.zeros(len(others) // 2)]),
        magnitudes=np.concatenate([np.full(n_rot // 2, magnitude), np.ones(len(others) // 2)]),
    )


def _frequencies(rope: Rope, factors: FloatArray | None) -> tuple[FloatArray, float]:
    """[n_rot / 2] angles per position, and the factor of each rotated component."""
    pair = np.arange(rope.n_rot // 2)
    original = rope.base ** (-2.0 * pair / rope.n_rot)
    if factors is not None:
        original = original / factors
    if not rope.yarn:
        return rope.scale * original, rope.magnitude
    low = max(0.0, np.floor(_pair_that_turns(rope, _YARN_FAST)))
    high = min(rope.n_rot - 1.0, np.ceil(_pair_that_turns(rope, _YARN_SLOW)))
    interpolated = np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    frequencies: FloatArray = original * (1.0 - interpolated + rope.scale * interpolated)
    return frequencies, rope.magnitude * float(1.0 - 0.1 * np.log(rope.scale))


def _pair_that_turns(rope: Rope, n_turns: float) -> float:
    """The (fractional) pair that turns around n_turns times within the original context."""
    wavelength = rope.n_ctx_orig / n_turns
    return float(rope.n_rot * np.log(wavelength / (2.0 * np.pi)) / (2.0 * np.log(rope.base)))
