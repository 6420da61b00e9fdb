"""What a figure is before it is a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.figure import Figure

from lminf_edge.report.runs import Way
from lminf_edge.report.words import method_words, plain_text, way_words


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure that can be written as a file of any kind.

    Attributes:
        name: For files, such as "loss".
        title: In words.
        description: What is to be seen, for those who cannot see it.
        figure: Of matplotlib.
    """

    name: str
    title: str
    description: str
    figure: Figure


def listed(ways: Iterable[Way]) -> str:
    """What a figure compares, in words."""
    ways = list(ways)
    methods, caches = (list(dict.fromkeys(names)) for names in zip(*ways, strict=True))
    if len(ways) < len(methods) * len(caches):
        return "; ".join(way_words(way) for way in ways)
    types = ", ".join(plain_text(cache, 24) for cache in caches)
    return f"{', '.join(map(method_words, methods))}; each with {types} cache"
