"""Speed, memory and latency."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.lines import Line2D

from lminf_edge.evaluation.results import Record
from lminf_edge.report.drawing import Drawing, listed
from lminf_edge.report.lines import draw_bars, value_range
from lminf_edge.report.runs import Run, kept_bytes, lines_of, ordered, way_of
from lminf_edge.report.style import GREY, add_legend, colour, depth_axis, log_axis, new_figure, places
from lminf_edge.report.words import method_words, plain_text, source_line, token_count
from lminf_edge.system import human_bytes

_DEPTH = "depth: tokens before the one that is written"
_N_STALLS = 4
"""Kinds of stalls that are named in the figure; the table has all of them."""


def decode_speed(run: Run) -> Drawing | None:
    """Decoding speed by depth."""
    title = "Decoding speed by depth"
    return _by_place(
        run,
        "decode-speed",
        title,
        run.of_kind("bench.decode"),
        "depth",
        ("tokens_per_second", "median"),
        "tokens per second",
        _DEPTH,
    )


def kv_memory(run: Run) -> Drawing | None:
    """Keys and values by depth, stored ones included."""
    records = [{**record, "kept_bytes": kept_bytes(record)} for record in run.of_kind("bench.decode")]
    return _by_place(
        run, "kv-memory", "Memory for keys and values by depth", records, "depth", ("kept_bytes", ""),
        "bytes of keys and values", _DEPTH, lambda value: human_bytes(round(value)),
    )  # fmt: skip


def prompt_speed(run: Run) -> Drawing | None:
    """How fast prompts are read."""
    return _by_place(
        run, "prompt-speed", "Speed of reading a prompt, by its length", run.of_kind("bench.prompt"), "n_tokens",
        ("tokens_per_second", "median"), "tokens per second", "length of the prompt, tokens",
    )  # fmt: skip


def first_token(run: Run) -> Drawing | None:
    """How long one waits for the first token."""
    return _by_place(
        run, "first-token", "Time to the first token, by length of the prompt", run.of_kind("bench.prompt"), "n_tokens",
        ("first_token", "median"), "seconds", "length of the prompt, tokens",
    )  # fmt: skip


def _by_place(
    run: Run,
    name: str,
    title: str,
    records: list[Record],
    place: str,
    field: tuple[str, str],
    unit: str,
    label: str,
    words: Callable[[float], str] = lambda value: f"{value:,.6g}",
) -> Drawing | None:
    lines = lines_of(records, lambda record: float(record[place]), *field)
    if not lines:
        return None
    figure = new_figure(4.2, title, source_line(run, with_machine=True))
    axes = figure.subplots()
    at = places(point.x for points in lines.values() for point in points)
    draw_bars(axes, lines, at, step=0.012 * (max(at.values()) - min(at.values())))
    low, high = value_range(lines, intervals=True)
    if low > 0:
        log_axis(axes, low, high, words)
    axes.set_ylabel(unit)
    depth_axis(axes, at, label)
    add_legend(figure, lines)
    description = f"{title}, in {unit}. Both axes are logarithmic. Lines: {listed(lines)}."
    return Drawing(name=name, title=title, description=description, figure=figure)


def latency(run: Run) -> Drawing | None:
    """Times of single tokens, and what made the slow ones slow."""
    records = run.of_kind("bench.latency")
    latest = {(way_of(record), record["depth"]): record for record in records}
    order = ordered(way for way, _ in latest)
    keys = sorted(latest, key=lambda key: (order.index(key[0]), key[1]))
    if not keys:
        return None
    title = "Time of a token: typical, slow and slowest"
    figure = new_figure(1.6 + 0.42 * len(keys), title, source_line(run, with_machine=True))
    axes = figure.subplots()
    names = list(dict.fromkeys(stall["name"] for key in keys for stall in latest[key]["stalls"]))[:_N_STALLS]
    for row, key in enumerate(keys):
        record = latest[key]
        tint = colour(key[0].method)
        times = [1000 * record[field] for field in ("p50", "p99", "max")]
        axes.hlines(row, times[0], times[2], color=tint, linewidth=1.2, alpha=0.6)
        for time, shape in zip(times, ("o", "|", "d"), strict=True):
            axes.plot([time], [row], marker=shape, color=tint, markersize=11 if shape == "|" else 6, markeredgewidth=2)
        for stall in record["stalls"]:
            if stall["name"] in names and stall["median"] is not None:
                shape = _stall_marker(names.index(stall["name"]))
                axes.plot(
                    [1000 * stall["median"]],
                    [row + 0.27],
                    marker=shape,
                    color="black",
                    markersize=6,
                    markerfacecolor="white",
                )
    axes.set_yticks(range(len(keys)), [_row_name(latest[key]) for key in keys])
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(False, axis="y")
    _time_axis(axes, [1000 * latest[key][field] for key in keys for field in ("p50", "max")])
    shown = [("o", "median"), ("|", "99 % are faster"), ("d", "slowest")]
    handles = [Line2D([], [], linestyle="", marker=shape, color=GREY, label=label) for shape, label in shown]
    handles += [
        Line2D([], [], linestyle="", marker=_stall_marker(index), color="black", markerfacecolor="white",
               label=f"{plain_text(name, 24)}, median")
        for index, name in enumerate(names)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper")
    description = f"Median, 99th percentile and maximum of the time of a token in milliseconds. Rows: {listed(order)}."
    return Drawing(name="latency", title=title, description=description, figure=figure)


def _row_name(record: Record) -> str:
    way = way_of(record)
    depth = f" at {token_count(record['depth'])}" if record["depth"] else ""
    return f"{method_words(way.method)}\n{plain_text(way.cache_type, 16)} cache{depth}"


def _stall_marker(index: int) -> str:
    return ("^", "s", "v", "P")[index]


def _time_axis(axes: object, times: list[float]) -> None:
    """Milliseconds, on a logarithmic axis if the slowest is much slower than the fastest."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import FixedLocator, FuncFormatter

    assert isinstance(axes, Axes)
    axes.set_xlabel("milliseconds")
    low, high = min(times), max(times)
    if low <= 0 or high < 5 * low:
        axes.set_xlim(0, 1.08 * high)
        return
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (logarithmic)")
    axes.set_xlim(low / 1.3, high * 1.3)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**power for power in range(-6, 9) for step in steps]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.xaxis.set_minor_locator(FixedLocator([]))
