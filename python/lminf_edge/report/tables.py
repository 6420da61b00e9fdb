"""The numbers of a run as tables, ratios first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lminf_edge.evaluation.results import Record
from lminf_edge.report.buckets import combined, mean_of
from lminf_edge.report.runs import Run, Way, kept_bytes, ordered, way_of
from lminf_edge.report.words import half_words, interval_words, method_words, plain_text, token_count, way_words
from lminf_edge.system import human_bytes

_N_ROWS = 32
"""Most positions in the table of losses."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as it is shown.

    Attributes:
        caption: What it is about, with units.
        header: A name for each column.
        rows: The cells. The first one of a row says what it is about.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(run: Run) -> list[Table]:
    """All tables that there are records for."""
    makers = (
        _loss_ratios, _losses, _losses_by_position, _speed_ratios, _decoding, _stores, _latencies, _prompts,
        _bandwidth, _peers, _skipped, _passkeys, _passkey_depths,
        _passkey_distances, _answers,
    )  # fmt: skip
    return [table for maker in makers for table in maker(run) if table.rows]


def _loss_ratios(run: Run) -> Iterator[Table]:
    groups: dict[tuple[Way, Way], list[Record]] = {}
    for record in run.of_kind("ppl.difference"):
        groups.setdefault((way_of(record), way_of(record["of"])), []).append(record)
    order = ordered(way for way, _ in groups)
    trained = run.n_ctx_train
    beyond = () if trained is None else (f"mean ratio beyond {trained:,} tokens",)
    rows = []
    for way, other in sorted(groups, key=lambda pair: order.index(pair[0])):
        records = groups[way, other]
        far = [record for record in records if trained is not None and record["begin"] >= trained]
        ratios = [record["ratio"] for record in records]
        rows.append(
            (
                way_words(way),
                way_words(other),
                _mean_ratio(records),
                *((_mean_ratio(far),) if beyond else ()),
                _per_cent(min(ratios)),
                _per_cent(max(ratios)),
                interval_words(mean_of(records, "difference")["difference"], 4),
            )
        )
    header = ("", "compared with", "mean ratio", *beyond, "lowest", "highest", "mean difference, nats per token")
    yield Table(
        caption="Ratios of losses on the same tokens, by buckets; 95 % confidence in brackets",
        header=header,
        rows=tuple(rows),
    )


def _mean_ratio(records: Sequence[Record]) -> str:
    n_tokens = sum(record["end"] - record["begin"] for record in records)
    if not n_tokens:
        return "-"
    return _per_cent(sum(record["ratio"] * (record["end"] - record["begin"]) for record in records) / n_tokens)


def _per_cent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def _losses(run: Run) -> Iterator[Table]:
    summaries = {way_of(record): record for record in run.of_kind("ppl.summary")}
    last = {way_of(record): record for record in run.of_kind("ppl.bucket")}
    rows = []
    for way in ordered(summaries):
        record = summaries[way]
        slope = "-" if record["slope"] is None else interval_words(record["slope"], 4)
        memory = "-" if way not in last else human_bytes(last[way]["kv_bytes"])
        resident = "-" if way not in last else human_bytes(last[way]["resident_bytes"])
        begin = f"{record['slope_begin']:,}"
        figures = (f"{record['n_tokens']:,}", f"{record['loss']:.4f}", f"{record['perplexity']:,.2f}")
        rows.append((way_words(way), *figures, slope, begin, memory, resident))
    yield Table(
        caption="Loss of the whole text, in nats per token",
        header=(
            "", "tokens", "loss", "perplexity", "slope, nats per million tokens", "slope from position",
            "keys and values", "process in RAM",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _losses_by_position(run: Run) -> Iterator[Table]:
    records, _ = combined(run.of_kind("ppl.bucket"), "loss", _N_ROWS)
    ways = ordered(way_of(record) for record in records)
    ends: dict[int, int] = {}
    for record in records:
        ends[record["begin"]] = max(record["end"], ends.get(record["begin"], 0))
    found = {(record["begin"], way_of(record)): half_words(record["loss"], 3) for record in records}
    yield Table(
        caption="Loss by position, in nats per token, ± half of the 95 % confidence interval",
        header=("positions", *(way_words(way) for way in ways)),
        rows=tuple(
            (f"{begin:,} to {ends[begin]:,}", *(found.get((begin, way), "-") for way in ways)) for begin in sorted(ends)
        ),
    )


def _speed_ratios(run: Run) -> Iterator[Table]:
    decoded = {(record["depth"], way_of(record)): record for record in run.of_kind("bench.decode")}
    rows = []
    for (depth, way), record in _by_place(decoded):
        for against, ratio in _compared(record):
            reference = decoded.get((depth, against))
            kept = kept_bytes(record)
            memory = f"{kept_bytes(reference) / kept:,.2f}" if reference and kept else "-"
            name = f"{token_count(depth)}: {way_words(way)}"
            rows.append((name, way_words(against), interval_words(ratio, 2), memory))
    yield Table(
        caption="Decoding speed against the other's, in turns in the same run: median (lowest to highest round)",
        header=("depth and method", "compared with", "times as fast", "times less memory for keys and values"),
        rows=tuple(rows),
    )


def _compared(record: Record) -> Iterator[tuple[Way, Record]]:
    """What a speed is compared with, and the ratio."""
    other = record.get("of")
    if record.get("ratio") is not None and other is not None and "method" in other:
        yield Way(str(other["method"]), str(other.get("cache_type", ""))), record["ratio"]
    if record.get("ratio_to_endless") is not None:
        yield Way("endless", str(record["cache_type"])), record["ratio_to_endless"]


def _by_place(records: dict[tuple[int, Way], Record]) -> list[tuple[tuple[int, Way], Record]]:
    order = ordered(way for _, way in records)
    return sorted(records.items(), key=lambda item: (item[0][0], order.index(item[0][1])))


def _decoding(run: Run) -> Iterator[Table]:
    decoded = {(record["depth"], way_of(record)): record for record in run.of_kind("bench.decode")}
    rows = []
    for (depth, way), record in _by_place(decoded):
        read, roofline = record.get("bytes_per_token"), record.get("roofline")
        rows.append(
            (
                f"{token_count(depth)}: {way_words(way)}",
                interval_words(record["tokens_per_second"], 2),
                human_bytes(record["kv_bytes"]),
                human_bytes(record["resident_bytes"]),
                "-" if read is None else human_bytes(read),
                "-" if roofline is None else f"{100 * roofline:.0f} %",
                plain_text(record.get("filled", "-")),
            )
        )
    yield Table(
        caption="Decoding by depth: median (lowest to highest round)",
        header=(
            "depth and method", "tokens per second", "keys and values", "process in RAM", "bytes read for a token",
            "of what memory bandwidth allows", "context was",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _stores(run: Run) -> Iterator[Table]:
    decoded = {
        (record["depth"], way_of(record)): record for record in run.of_kind("bench.decode") if record.get("store_bytes")
    }
    if not decoded:
        return
    yield Table(
        caption="Middle tokens, when every decoded token recalls: median (lowest to highest round)",
        header=("depth and method", "retrievable tokens", "store", "looking through it, ms a token"),
        rows=tuple(
            (
                f"{token_count(depth)}: {way_words(way)}",
                f"{record['n_retrievable']:,}",
                human_bytes(record["store_bytes"]),
                interval_words(record["scan_seconds"], 2, 1000),
            )
            for (depth, way), record in _by_place(decoded)
        ),
    )


def _latencies(run: Run) -> Iterator[Table]:
    measured = {(record["depth"], way_of(record)): record for record in run.of_kind("bench.latency")}
    rows = []
    for (depth, way), record in _by_place(measured):
        p50 = record["p50"]
        ratios = tuple(f"{record[name] / p50:.2f}" if p50 else "-" for name in ("p99", "max"))
        times = tuple(f"{1000 * record[name]:,.1f}" for name in ("p50", "p99", "max"))
        stalls = "; ".join(_stall_words(stall) for stall in record["stalls"]) or "none"
        name = f"{token_count(depth)}: {way_words(way)}"
        rows.append((name, *ratios, *times, f"{record['n_tokens']:,}", stalls))
    yield Table(
        caption="Times of single tokens, in milliseconds",
        header=("from position", "p99 / median", "max / median", "median", "p99", "max", "tokens", "stalls"),
        rows=tuple(rows),
    )


def _stall_words(stall: Record) -> str:
    times = [stall["median"], stall["max"]]
    if None in times:
        return f"{plain_text(stall['name'])}: {stall['count']:,}"
    middle, most = (f"{1000 * seconds:,.1f}" for seconds in times)
    return f"{plain_text(stall['name'])}: {stall['count']:,}, median {middle}, at most {most}"


def _prompts(run: Run) -> Iterator[Table]:
    measured = {(record["n_tokens"], way_of(record)): record for record in run.of_kind("bench.prompt")}
    yield Table(
        caption="Reading a prompt: median (lowest to highest round)",
        header=("length and method", "tokens per second", "seconds to the first token"),
        rows=tuple(
            (
                f"{token_count(n_tokens)}: {way_words(way)}",
                interval_words(record["tokens_per_second"], 1),
                interval_words(record["first_token"], 2),
            )
            for (n_tokens, way), record in _by_place(measured)
        ),
    )


def _bandwidth(run: Run) -> Iterator[Table]:
    yield Table(
        caption="Memory bandwidth for reading: median (lowest to highest)",
        header=("threads", "GB per second"),
        rows=tuple(
            (str(record["n_threads"]), interval_words(record["bytes_per_second"], 2, 1e-9))
            for record in run.of_kind("bench.bandwidth")
        ),
    )


def _peers(run: Run) -> Iterator[Table]:
    rows = []
    for record in run.of_kind("bench.peer"):
        versions = ", ".join(f"{plain_text(name)} {plain_text(number)}" for name, number in record["versions"].items())
        differences = (f"{record['mean_difference']:.2g}", f"{record['largest_difference']:.2g}")
        losses = (f"{record['loss']:.4f}", f"{record['loss_here']:.4f}")
        same = f"{100 * record['same_argmax']:.1f} %"
        rows.append((method_words(record["method"]), versions, same, *differences, *losses))
    yield Table(
        caption="Another program with the same weights, against full attention and an f32 cache here",
        header=(
            "", "versions", "same most probable token", "mean difference of log-probabilities, nats", "largest",
            "its loss", "loss here",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _skipped(run: Run) -> Iterator[Table]:
    yield Table(
        caption="Not measured",
        header=("depth or length and method", "part", "reason"),
        rows=tuple(
            (
                f"{token_count(record['depth'])}: {way_words(way_of(record))}",
                record["part"],
                plain_text(record["reason"], 300),
            )
            for record in run.of_kind("bench.skipped")
        ),
    )


def _passkeys(run: Run) -> Iterator[Table]:
    cells = [cell for cell in run.of_kind("passkey.cell") if cell["depth_low"] <= 0 and cell["depth_high"] >= 1]
    words = {None: "all keys", True: "keys inside the window", False: "keys outside the window"}
    yield _by_length("Passkeys found, per cent; 95 % confidence in brackets", cells, "exact", "n_trials", words)


def _passkey_depths(run: Run) -> Iterator[Table]:
    cells = [
        cell
        for cell in run.of_kind("passkey.cell")
        if cell["in_window"] is None
        and cell.get("distance") is None
        and not (cell["depth_low"] <= 0 and cell["depth_high"] >= 1)
    ]
    yield from _passkeys_by_place("depth", cells, lambda cell: (cell["depth_low"], cell["depth_high"]), _depth_words)


def _passkey_distances(run: Run) -> Iterator[Table]:
    cells = [cell for cell in run.of_kind("passkey.cell") if cell.get("distance") is not None]
    yield from _passkeys_by_place("distance", cells, lambda cell: (cell["distance"],), _distance_words)


def _passkeys_by_place(
    name: str,
    cells: Sequence[Record],
    place: Callable[[Record], tuple[float, ...]],
    words: Callable[..., str],
) -> Iterator[Table]:
    lengths = sorted({cell["length"] for cell in cells})
    places = sorted({place(cell) for cell in cells})
    found = {(way_of(cell), cell["length"], place(cell)): cell for cell in cells}
    for way in ordered(way_of(cell) for cell in cells):
        rows = []
        for each in places:
            row = (found.get((way, length, each)) for length in lengths)
            shown = ("-" if cell is None else interval_words(cell["exact"], 0, 100) for cell in row)
            rows.append((words(*each), *shown))
        yield Table(
            caption=f"Passkeys found by {name} and length, per cent: {way_words(way)}",
            header=(name, *(token_count(length) for length in lengths)),
            rows=tuple(rows),
        )


def _depth_words(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _distance_words(distance: int) -> str:
    return f"{distance:,} tokens"


def _answers(run: Run) -> Iterator[Table]:
    words = {None: "all questions", True: "evidence inside the window", False: "evidence outside the window"}
    for field, name in (("f1", "F1"), ("exact", "Exact answers")):
        caption = f"{name} of the answers, per cent; 95 % confidence in brackets"
        yield _by_length(caption, run.of_kind("qa.cell"), field, "n_questions", words)


def _by_length(caption: str, cells: Iterable[Record], field: str, count: str, words: dict[bool | None, str]) -> Table:
    cells = list(cells)
    found = {(way_of(cell), cell["in_window"], _length(cell)): cell for cell in cells}
    lengths = sorted({_length(cell) for cell in cells})
    rows = []
    for way in ordered(way_of(cell) for cell in cells):
        for in_window, part in words.items():
            row = [found.get((way, in_window, length)) for length in lengths]
            if any(row):
                shown = (
                    "-" if cell is None else f"{interval_words(cell[field], 0, 100)}, n = {cell[count]:,}"
                    for cell in row
                )
                rows.append((f"{way_words(way)}: {part}", *shown))
    return Table(caption=caption, header=("", *(_length_words(length) for length in lengths)), rows=tuple(rows))


def _length(cell: Record) -> tuple[int, int]:
    """A length for a column: from and to; 0 where it is not known."""
    length = cell["length"]
    return (length, length) if length is not None else (cell.get("length_low") or 0, cell.get("length_high") or 0)


def _length_words(length: tuple[int, int]) -> str:
    low, high = length
    if low == high:
        return token_count(low) if low else "as it came"
    return f"{token_count(low)} to {token_count(high)}" if high else f"{token_count(low)} and more"
