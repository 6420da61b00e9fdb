"""Checks of option values. Each raises ConfigError that names the option, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection

from lminf_edge.errors import ConfigError

N_MAX = 2**30
"""Largest value of any count of tokens: sums of two still fit llama.cpp's 32-bit positions."""


def check_int(name: str, value: object, low: int, high: int = N_MAX) -> int:
    """An integer from low to high. Booleans are not integers here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r}: must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value}: must be from {low} to {high}")
    return value


def check_optional_int(name: str, value: object, low: int, high: int = N_MAX) -> int | None:
    """None, or an integer from low to high."""
    return None if value is None else check_int(name, value, low, high)


def check_float(name: str, value: object, low: float, high: float = math.inf) -> float:
    """A finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} = {value!r}: must be a number, not {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{name} = {value}: must be finite and {allowed}")
    return float(value)


def check_bool(name: str, value: object) -> bool:
    """True or False and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r}: must be True or False")
    return value


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """One of a few strings."""
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}")
