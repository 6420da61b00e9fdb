"""How all figures look: colours, lines, fonts, axes. Nothing depends on the user's matplotlib settings.

The colours are those of Okabe and Ito (2008), which people with any kind of colour blindness can tell apart; methods
also differ in their markers, and types of cache in their line styles.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullFormatter

from lminf_edge.report.runs import Way
from lminf_edge.report.words import method_words, plain_text, token_count

_COLOURS = {
    "endless": "#0072B2",
    "middle": "#882255",
    "fresh": "#000000",
    "absolute": "#E69F00",
    "shift": "#009E73",
    "recompute": "#CC79A7",
    "attention-sinks": "#56B4E9",
    "full": "#D55E00",
    "truncate": "#7F7F7F",
}
_MARKERS = {
    "endless": "o",
    "middle": "*",
    "fresh": "P",
    "absolute": "^",
    "shift": "D",
    "recompute": "v",
    "attention-sinks": "X",
    "full": "s",
    "truncate": "h",
}
_DASHES: dict[str, Any] = {"f32": "-", "bf16": "-", "f16": "-", "q8_0": (0, (5, 1.8)), "q4_0": (0, (1.2, 1.4))}
_OTHER_DASH: Any = (0, (6, 1.5, 1.2, 1.5))

GREY = "#555555"
WIDTH = 8.4
"""Of every figure, in inches."""

_RC: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lminf-edge",  # the same figure gets the same names inside
    "text.parse_math": False,  # a name may hold a dollar sign
    "path.simplify": True,
}


@contextmanager
def own_style() -> Iterator[None]:
    """Everything drawn and written within looks the same anywhere."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in another script
        yield


def new_figure(height: float, title: str, source: str) -> Figure:
    """An empty figure.

    Args:
        height: In inches.
        title: Stands above, on the left.
        source: What it was measured with: stands below in small type.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
    figure.supxlabel(source, x=0.012, ha="left", fontsize=7.5, color=GREY)
    return figure


def as_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file, without the date and whatever else changes from time to time.

    Args:
        figure: The figure.
        kind: "svg", "png" or "pdf".
    """
    undated: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=undated[kind])
    return stream.getvalue()


def colour(method: str) -> str:
    """A method's colour; brown for one that this version does not know."""
    return _COLOURS.get(method, "#A0522D")


def marker(method: str) -> str:
    """A method's marker."""
    return _MARKERS.get(method, "*")


def dash(cache_type: str) -> Any:
    """A cache type's line style."""
    return _DASHES.get(cache_type, _OTHER_DASH)


def line_look(way: Way, n_points: int) -> dict[str, Any]:
    """A line's look: many points have no markers."""
    return {
        "color": colour(way.method),
        "linestyle": dash(way.cache_type),
        "marker": marker(way.method) if n_points <= 32 else "",
        "linewidth": 1.7 if n_points <= 32 else 1.2,
        "markerfacecolor": colour(way.method) if way.cache_type in ("f16", "f32", "bf16") else "white",
        "markeredgecolor": colour(way.method),
    }


def add_legend(figure: Figure, ways: Iterable[Way], others: Sequence[Artist] = ()) -> None:
    """A legend beside the axes: methods by colour and marker, types of cache by line style."""
    ways = list(ways)
    handles: list[Artist] = [_heading("Method")]
    for method in dict.fromkeys(way.method for way in ways):
        handles.append(
            Line2D([], [], color=colour(method), marker=marker(method), label=method_words(method).lstrip("_"))
        )
    handles.append(_heading("Cache"))
    for cache_type in dict.fromkeys(way.cache_type for way in ways):
        name = plain_text(cache_type, 24).lstrip("_")
        handles.append(Line2D([], [], color="black", linestyle=dash(cache_type), label=name))
    if others:
        handles += [_heading(""), *others]
    legend = figure.legend(handles=handles, loc="outside right upper")
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        if isinstance(handle, Line2D) and not handle.get_linewidth():
            text.set_fontweight("bold")


def _heading(words: str) -> Line2D:
    return Line2D([], [], linewidth=0, label=words)


def token_axis(axes: Axes, largest: float, label: str) -> None:
    """A linear axis of positions with marks at powers of two times a small number."""
    step = 1
    while largest / step > 8:
        step *= 2
    axes.xaxis.set_major_locator(MultipleLocator(step))
    in_thousands = step >= 1024
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: token_count(x) if in_thousands else f"{x:,.0f}"))
    axes.set_xlim(0, largest)
    axes.set_xlabel(f"{label} (1k = 1,024)" if in_thousands else label)


def places(values: Iterable[float]) -> dict[float, float]:
    """Where depths or lengths lie on an axis of powers of two; 0 lies left of the smallest other one."""
    sorted_values = sorted(set(values))
    positive = [value for value in sorted_values if value > 0]
    zero = math.log2(positive[0]) - 1.5 if positive else 0.0
    return {value: math.log2(value) if value > 0 else zero for value in sorted_values}


def depth_axis(axes: Axes, at: dict[float, float], label: str) -> None:
    """An axis with a mark at each place, as long as the marks do not touch."""
    ticks: list[float] = []
    names: list[str] = []
    span = max(at.values()) - min(at.values()) or 1.0
    for value, place in at.items():
        if not ticks or place - ticks[-1] >= 0.07 * span:
            ticks.append(place)
            names.append(token_count(value))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticklabels(names)
    axes.set_xlim(min(at.values()) - 0.06 * span, max(at.values()) + 0.06 * span)
    axes.set_xlabel(f"{label} (1k = 1,024)" if max(at) >= 1024 else label)


def log_axis(axes: Axes, low: float, high: float, words: Any) -> None:
    """A logarithmic y axis with marks at 1, 2 and 5 times powers of ten, or more densely where it is short.

    Args:
        axes: The axes.
        low: Smallest value, above 0.
        high: Largest value.
        words: What a mark is called.
    """
    axes.set_yscale("log")
    low, high = low / 1.25, high * 1.25
    longest = ((5, (1, 1.5, 2, 3, 4, 5, 6, 8)), (30, (1, 2, 3, 5)), (1e5, (1, 2, 5)))
    steps = next((steps for most, steps in longest if high / low <= most), (1,))
    ticks = [step * 10.0**power for power in range(-12, 16) for step in steps if low <= step * 10.0**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: words(y)))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)
