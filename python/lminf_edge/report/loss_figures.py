"""Loss by position, and differences of losses."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from lminf_edge.evaluation.results import Record
from lminf_edge.report.buckets import combined
from lminf_edge.report.drawing import Drawing, listed
from lminf_edge.report.lines import Lines, draw_bands, value_range
from lminf_edge.report.runs import Run, Way, lines_of
from lminf_edge.report.style import GREY, add_legend, new_figure, token_axis
from lminf_edge.report.words import method_words, source_line, way_words

_POSITION = "position in the text, tokens"

_N_POINTS = 64
"""Most points of a line: more cannot be told from each other."""


def loss_by_position(run: Run) -> Drawing | None:
    """Lines of loss; where some leave the others far below, those are shown enlarged, too."""
    records, n_each = combined(run.of_kind("ppl.bucket"), "loss", _N_POINTS)
    lines = lines_of(records, _middle, "loss")
    if not lines:
        return None
    shaded = next(iter(lines))  # the others' intervals are as wide: it is the text that varies; differences vary less
    title = "Loss by position in the text"
    enlarged = _worth_enlarging(lines)
    figure = new_figure(6.6 if enlarged else 4.2, title, source_line(run) + _note(n_each))
    panels: list[Axes] = list(figure.subplots(2 if enlarged else 1, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        draw_bands(axes, lines, {shaded})
        axes.set_ylabel("loss, nats per token")
    _whole_range(panels[0], lines, shaded)
    if enlarged:
        low, high = value_range(enlarged, intervals=True)
        panels[1].set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        panels[1].set_title("The same, enlarged", loc="left")
    shade = Patch(facecolor=GREY, alpha=0.2, label=f"95 % confidence,\n{way_words(shaded)}")
    _finish(panels, run, lines, shade)
    description = f"Mean loss in nats per token against the position in the text. Lines: {listed(lines)}."
    return Drawing(name="loss", title=title, description=description, figure=figure)


def cache_differences(run: Run) -> Drawing | None:
    """What a type of cache costs, by position: a panel for each method."""
    records = [record for record in run.of_kind("ppl.difference") if record["of"]["method"] == record["method"]]
    others = sorted({str(record["of"]["cache_type"]) for record in records})
    title = f"What the type of cache costs: loss minus that with {' or '.join(others)}"
    return _differences(run, "loss-cache-difference", title, records)


def method_differences(run: Run) -> Drawing | None:
    """What a method loses or gains against another one, by position: a panel for each method."""
    records = [record for record in run.of_kind("ppl.difference") if record["of"]["method"] != record["method"]]
    return _differences(run, "loss-method-difference", "Loss minus that of another method", records)


def _differences(run: Run, name: str, title: str, records: list[Record]) -> Drawing | None:
    records, n_each = combined(records, "difference", _N_POINTS)
    lines = lines_of(records, _middle, "difference")
    if not lines:
        return None
    methods = list(dict.fromkeys(way.method for way in lines))
    others = {record["method"]: record["of"]["method"] for record in records}
    figure = new_figure(1.5 + 2.1 * len(methods), title, source_line(run) + _note(n_each))
    panels: list[Axes] = list(figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0])
    for axes, method in zip(panels, methods, strict=True):
        own = {way: points for way, points in lines.items() if way.method == method}
        draw_bands(axes, own)
        low, high = value_range(own, intervals=True)
        margin = 0.08 * (max(high, 0) - min(low, 0)) or 1e-3
        axes.set_ylim(min(low, 0) - margin, max(high, 0) + margin)
        axes.axhline(0, color="black", linewidth=0.8)
        against = "" if others[method] == method else f" minus {method_words(others[method])}"
        axes.set_title(f"{method_words(method)}{against}", loc="left")
        axes.set_ylabel("nats per token")
    _finish(panels, run, lines, Patch(facecolor=GREY, alpha=0.2, label="95 % confidence"))
    description = f"{title}, in nats per token, against the position in the text. Lines: {listed(lines)}."
    return Drawing(name=name, title=title, description=description, figure=figure)


def _note(n_each: int | None) -> str:
    return "" if n_each is None else f" · each point: {n_each:,} tokens"


def _middle(record: Record) -> float:
    return (int(record["begin"]) + int(record["end"])) / 2


def _worth_enlarging(lines: Lines) -> Lines | None:
    """The lines that stay low, if others do not."""
    lowest = min((value_range({way: points})[1] for way, points in lines.items()), default=0.0)
    calm = {way: points for way, points in lines.items() if value_range({way: points})[1] < lowest + 0.5}
    low, high = value_range(calm, intervals=True)
    return calm if value_range(lines)[1] > high + max(0.5, high - low) else None


def _whole_range(axes: Axes, lines: Lines, shaded: Way) -> None:
    """The axis fits all means and the band, and has perplexity on its right side."""
    ranges = (*value_range(lines), *value_range({shaded: lines[shaded]}, intervals=True))
    low, high = min(ranges), max(ranges)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    nice = [step * 10**power for power in range(-2, 9) for step in (1, 2, 5)]
    marks = [value for value in nice if low - margin <= math.log(value) <= high + margin]
    if len(marks) < 2:
        return
    right = axes.twinx()
    right.set_ylim(low - margin, high + margin)
    right.grid(False)
    right.yaxis.set_major_locator(FixedLocator([math.log(value) for value in marks]))
    words: Callable[[float, int | None], str] = lambda y, _: f"{float(f'{math.exp(y):.3g}'):,g}"  # noqa: E731
    right.yaxis.set_major_formatter(FuncFormatter(words))
    right.set_ylabel("perplexity", color=GREY)
    right.tick_params(axis="y", colors=GREY)


def _finish(panels: list[Axes], run: Run, lines: Lines, *others: Artist) -> None:
    """What all of these figures have: positions, the trained length, and a legend."""
    largest = max(point.x for points in lines.values() for point in points)
    shortest = min((points[0].x for points in lines.values()), default=0.0)
    largest += shortest  # to the end of the last bucket
    trained = run.n_ctx_train
    if trained is not None and trained < largest:
        for axes in panels:
            axes.axvline(trained, color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        label = f"trained length, {trained:,}"
        others += (Line2D([], [], color=GREY, linewidth=1.0, linestyle=(0, (3, 2)), label=label),)
    token_axis(panels[-1], largest, _POSITION)
    figure = panels[0].figure.get_figure(root=True)
    assert figure is not None
    ways: list[Way] = list(lines)
    add_legend(figure, ways, others)
