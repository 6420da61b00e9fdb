"""Passkeys and answers to questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lminf_edge.evaluation.results import Record
from lminf_edge.report.drawing import Drawing, listed
from lminf_edge.report.lines import draw_bars
from lminf_edge.report.runs import Run, Way, lines_of, ordered, way_of
from lminf_edge.report.style import GREY, add_legend, new_figure
from lminf_edge.report.words import source_line, token_count, way_words

_PARTS = ((None, ""), (True, " inside the window"), (False, " outside the window"))
_N_COLUMNS = 2


def passkey_map(run: Run) -> Drawing | None:
    """Accuracy by length and depth: a panel for each method and type of cache."""
    cells = [cell for cell in run.of_kind("passkey.cell") if cell["in_window"] is None and _is_of_depths(cell)]
    if not cells:
        return None
    ways = ordered(way_of(cell) for cell in cells)
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({(cell["depth_low"], cell["depth_high"]) for cell in cells})
    n_columns = min(_N_COLUMNS, len(ways))
    n_rows = -(-len(ways) // n_columns)
    title = "Passkeys found (per cent) by length of the text and depth of the key"
    figure = new_figure(1.1 + n_rows * (0.9 + 0.3 * max(3, len(depths))), title, source_line(run))
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    bounded = False
    for index, axes in enumerate(panels.flat):
        if index >= len(ways):
            axes.set_visible(False)
            continue
        own = {(c["length"], (c["depth_low"], c["depth_high"])): c for c in cells if way_of(c) == ways[index]}
        _draw_cells(axes, own, lengths, depths)
        boundary = _boundary(run, ways[index], lengths, depths)
        bounded |= _draw_boundary(axes, boundary, len(depths))
        axes.set_title(way_words(ways[index]), loc="left")
        axes.tick_params(labelbottom=True)
    if bounded:
        line = Line2D([], [], color=_BOUNDARY, linewidth=2.4, label="keys below\nthis line are\ninside the\nwindow")
        figure.legend(handles=[line], loc="outside right upper", handlelength=1.6)
    description = f"Share of passkeys found, by length of the text and depth of the key. Panels: {listed(ways)}."
    return Drawing(name="passkey-map", title=title, description=description, figure=figure)


_BOUNDARY = "#D55E00"


def _is_of_depths(cell: Record) -> bool:
    return cell.get("distance") is None and not _is_whole(cell)


def _is_whole(cell: Record) -> bool:
    return bool(cell["depth_low"] <= 0 and cell["depth_high"] >= 1)


def _draw_cells(
    axes: Axes,
    cells: dict[tuple[int, tuple[float, float]], Record],
    lengths: Sequence[int],
    depths: Sequence[tuple[float, float]],
) -> None:
    shades = matplotlib.colormaps["cividis"]
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            cell = cells.get((length, depth))
            share = None if cell is None else cell["exact"]["mean"]
            fill = "#EEEEEE" if share is None else shades(0.08 + 0.92 * share)
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="white", linewidth=1.5))
            words = "-" if share is None else f"{100 * share:.0f}"
            ink = "black" if share is None or share > 0.42 else "white"
            behind = {"facecolor": fill, "edgecolor": "none", "pad": 1.5}  # the boundary does not strike it through
            place = (column + 0.5, row + 0.5)
            axes.text(*place, words, ha="center", va="center", fontsize=9, color=ink, bbox=behind, zorder=5)
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.grid(False)
    axes.set_xticks([column + 0.5 for column in range(len(lengths))], [token_count(length) for length in lengths])
    axes.set_yticks([row + 0.5 for row in range(len(depths))], [_depth_words(depth) for depth in depths])
    axes.tick_params(length=0)
    axes.set_xlabel("length of the text, tokens")
    if axes.get_subplotspec() is not None and axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("depth of the key\n(0 % is the beginning)")


def _depth_words(depth: tuple[float, float]) -> str:
    low, high = (round(100 * end) for end in depth)
    return f"{low} %" if low == high else f"{low} to {high} %"


def _boundary(run: Run, way: Way, lengths: Sequence[int], depths: Sequence[tuple[float, float]]) -> list[float | None]:
    """For each length, how many rows of depths lie outside the window, parts of rows included. None: no trials."""
    shares: dict[tuple[int, tuple[float, float]], list[bool]] = {}
    for trial in run.of_kind("passkey.trial"):
        if way_of(trial) == way:
            row = next((each for each in reversed(depths) if each[0] <= trial["depth"] <= each[1]), None)
            if row is not None:
                shares.setdefault((trial["length"], row), []).append(trial["in_window"])
    boundary: list[float | None] = []
    for length in lengths:
        rows = [shares[length, depth] for depth in depths if (length, depth) in shares]
        boundary.append(sum(row.count(False) / len(row) for row in rows) if rows else None)
    return boundary


def _draw_boundary(axes: Axes, boundary: Sequence[float | None], n_rows: int) -> bool:
    """Draws the line. False if everything is inside."""
    if not any(boundary):
        return False
    x: list[float] = []
    y: list[float] = []
    for column, height in enumerate(boundary):
        x += [column, column + 1]
        y += 2 * [float("nan") if height is None else min(max(height, 0.04), n_rows - 0.04)]
    axes.plot(x, y, color="white", linewidth=4.4, solid_capstyle="butt")
    axes.plot(x, y, color=_BOUNDARY, linewidth=2.4, solid_capstyle="butt")
    return True


def passkey_accuracy(run: Run) -> Drawing | None:
    """Accuracy by length, with intervals: keys inside and outside the window apart."""
    cells = [cell for cell in run.of_kind("passkey.cell") if _is_whole(cell)]
    title = "Passkeys found, by length of the text"
    label = "length of the text, tokens"
    return _by_length(run, "passkey-accuracy", title, cells, "exact", "share of keys found", label, "Keys")


def qa_f1(run: Run) -> Drawing | None:
    """Answer F1 by length, with intervals: evidence inside and outside the window apart."""
    title = "Answers to questions, by length of the context"
    label = "length of the context, tokens"
    return _by_length(run, "qa-f1", title, run.of_kind("qa.cell"), "f1", "F1 of the answers", label, "Evidence")


def _by_length(
    run: Run, name: str, title: str, cells: Iterable[Record], field: str, unit: str, label: str, subject: str
) -> Drawing | None:
    cells = [cell for cell in cells if cell[field]["mean"] is not None]
    if not cells:
        return None
    names = dict(sorted({_length_key(cell): _length_words(cell) for cell in cells}.items()))
    at = {key: float(index) for index, key in enumerate(names)}
    parts = [part for part in _PARTS if any(cell["in_window"] is part[0] for cell in cells)]
    ways = ordered(way_of(cell) for cell in cells)
    figure = new_figure(1.4 + 2.5 * len(parts), title, source_line(run))
    panels: list[Axes] = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (in_window, words) in zip(panels, parts, strict=True):
        lines = lines_of((cell for cell in cells if cell["in_window"] is in_window), _length_key, field)
        draw_bars(axes, lines, at, step=0.11)
        axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel(unit)
        axes.set_title(f"{subject}{words}" if words else "All", loc="left")
    panels[-1].set_xlim(-0.5, len(names) - 0.5)
    panels[-1].set_xticks(list(at.values()), list(names.values()))
    panels[-1].set_xlabel(label)
    add_legend(figure, ways, [Line2D([], [], color=GREY, linewidth=1.2, label="bars: 95 % confidence")])
    description = f"{title}: {unit}, with 95 % confidence intervals. Lines: {listed(ways)}."
    return Drawing(name=name, title=title, description=description, figure=figure)


def _length_key(cell: Record) -> float:
    """Lengths in ascending order; contexts as they came lie by where they begin, or in front."""
    return float(next((cell[name] for name in ("length", "length_low") if cell.get(name) is not None), -1))


def _length_words(cell: Record) -> str:
    if cell["length"] is not None:
        return token_count(cell["length"])
    low, high = cell.get("length_low"), cell.get("length_high")
    if low is None and high is None:
        return "as it came"
    if low is None or high is None:
        return f"up to {token_count(high)}" if high is not None else f"{token_count(low or 0)} and more"
    return f"{token_count(low)} to {token_count(high)}"
