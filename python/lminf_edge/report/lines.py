"""Lines with intervals on axes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from matplotlib.axes import Axes

from lminf_edge.report.runs import Point, Way
from lminf_edge.report.style import colour, line_look

Lines = dict[Way, list[Point]]


def draw_bands(axes: Axes, lines: Lines, bands: Collection[Way] | None = None) -> None:
    """Lines over many positions, the first one on top; their intervals are bands.

    Args:
        axes: The axes.
        lines: The lines.
        bands: Those whose bands are drawn. None: all.
    """
    for way, points in reversed(lines.items()):
        x = [point.x for point in points]
        wanted = bands is None or way in bands
        bounded = [point for point in points if wanted and point.low is not None and point.high is not None]
        axes.fill_between(
            [point.x for point in bounded],
            [point.low or 0.0 for point in bounded],
            [point.high or 0.0 for point in bounded],
            color=colour(way.method),
            alpha=0.13,
            linewidth=0,
        )
        axes.plot(x, [point.value for point in points], **line_look(way, len(points)))


def draw_bars(axes: Axes, lines: Lines, at: Mapping[float, float], step: float = 0.0) -> None:
    """Lines over a few places, the first one on top; their intervals are bars.

    Args:
        axes: The axes.
        lines: The lines.
        at: Where each x lies.
        step: How far methods stand apart, so that they do not cover each other.
    """
    methods = list(dict.fromkeys(way.method for way in lines))
    for way, points in reversed(lines.items()):
        aside = step * (methods.index(way.method) - (len(methods) - 1) / 2)
        x = [at[point.x] + aside for point in points]
        lows = [point.value if point.low is None else point.low for point in points]
        highs = [point.value if point.high is None else point.high for point in points]
        axes.vlines(x, lows, highs, color=colour(way.method), linewidth=1.2, alpha=0.75)
        axes.plot(x, [point.value for point in points], **line_look(way, 0))


def value_range(lines: Lines, intervals: bool = False) -> tuple[float, float]:
    """Smallest and largest value; (0, 1) of nothing.

    Args:
        lines: The lines.
        intervals: Also of the intervals' ends.
    """
    values = [point.value for points in lines.values() for point in points]
    if intervals:
        values += [point.low for points in lines.values() for point in points if point.low is not None]
        values += [point.high for points in lines.values() for point in points if point.high is not None]
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)
