"""Names, numbers and units as figures and tables show them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from lminf_edge.report.runs import Run, Way

_METHODS = {
    "endless": "LM-Infinite",
    "middle": "LM-Infinite, middle tokens",
    "fresh": "LM-Infinite, begun anew",
    "absolute": "sinks and window, no clamp",
    "shift": "context shift",
    "recompute": "window, recomputed",
    "attention-sinks": "attention-sinks, PyTorch",
    "full": "full attention",
    "truncate": "full, last window only",
}

_N_LONGEST = 80


def method_words(method: str) -> str:
    """A method's name in words."""
    return _METHODS.get(method, plain_text(method))


def way_words(way: Way) -> str:
    """A method and a type of cache in words."""
    return f"{method_words(way.method)}, {plain_text(way.cache_type)} cache"


def plain_text(text: object, longest: int = _N_LONGEST) -> str:
    """A text from a file in one line that can be shown: without control characters, and not too long."""
    shown = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in str(text)).strip()
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def token_count(n_tokens: float) -> str:
    """A number of tokens: 300, 4k (4,096), 1M (1,048,576)."""
    n = round(n_tokens)
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if n >= size and n % size == 0:
            return f"{n // size:,}{unit}"
    return f"{n:,}"


def interval_words(value: Mapping[str, Any], digits: int, scale: float = 1.0) -> str:
    """An estimate or a spread: 3.41 (3.38 to 3.44)."""
    middle = value.get("mean", value.get("median"))
    if middle is None:
        return "-"
    shown = f"{middle * scale:,.{digits}f}"
    if value["low"] is None or value["high"] is None:
        return shown
    return f"{shown} ({value['low'] * scale:,.{digits}f} to {value['high'] * scale:,.{digits}f})"


def half_words(value: Mapping[str, Any], digits: int) -> str:
    """An estimate with a symmetric interval: 3.41 ± 0.03."""
    if value["mean"] is None or value["low"] is None or value["high"] is None:
        return interval_words(value, digits)
    return f"{value['mean']:,.{digits}f} ± {(value['high'] - value['low']) / 2:,.{digits}f}"


def setting_words(value: Any) -> str:
    """A setting."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(setting_words(item) for item in value)
    return plain_text(value, 400)


def source_line(run: Run, with_machine: bool = False) -> str:
    """What a figure was measured with, in one line."""
    parts = [plain_text(run.about["model"]["name"], 60)]
    for name, words in (("n_window", "window"), ("n_sink", "sink tokens")):
        value = run.setting(name)
        if isinstance(value, int):
            parts.append(f"{words} {value:,}")
    if with_machine:
        parts.append(plain_text(run.about["machine"]["cpu"], 60))
    parts.append(f"lminf-edge {plain_text(run.about['program']['lminf_edge'], 20)}")
    return " · ".join(parts)
