"""What `lminf-edge bench` shows: ratios first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lminf_edge.cli._terminal import output
from lminf_edge.evaluation.results import Record, ResultLog
from lminf_edge.system import human_bytes


def show_bench(log: ResultLog) -> None:
    """Machine, tables, and what was left out."""
    for line in _machine(log):
        output.print(line)
    tables = (
        (log.of_kind("bench.decode"), _decode_table),
        (log.of_kind("bench.decode"), _memory_table),
        ([record for record in log.of_kind("bench.decode") if record["method"] == "middle"], _store_table),
        (log.of_kind("bench.latency"), _latency_table),
        (log.of_kind("bench.prompt"), _prompt_table),
    )
    for records, table in tables:
        if records:
            output.print(table(records))
    for record in log.of_kind("bench.peer"):
        output.print(_peer_line(record))
    for record in log.of_kind("bench.skipped"):
        of = f"{record['part']}, {record['method']}, {record['cache_type']}, {record['depth']:,} tokens"
        output.print(f"left out: {of}: {record['reason']}", soft_wrap=True)


def _machine(log: ResultLog) -> Iterator[str]:
    run = log.records[0]
    machine, setup = run["machine"], run["settings"]["setup"]
    yield f"{run['model']['name']}, window {setup['n_window']:,}, sink tokens {setup['n_sink']}"
    memory = "" if machine["memory_bytes"] is None else f", {human_bytes(machine['memory_bytes'])} of memory"
    yield f"{machine['cpu']}, {machine['n_cores']} cores{memory}, {machine['system']}"
    for record in log.of_kind("bench.bandwidth"):
        speed = {name: value / 1e9 for name, value in record["bytes_per_second"].items()}
        yield (
            f"memory is read with {speed['high']:.1f} GB/s by {record['n_threads']} threads "
            f"(median {speed['median']:.1f}, lowest {speed['low']:.1f})"
        )


def _decode_table(records: list[Record]) -> Table:
    table = _table("Decoding: median over the rounds (lowest-highest), ratios within a round")
    for name in ("depth", "ratio", "to", "tokens/s"):
        table.add_column(name, justify="left" if name == "to" else "right")
    for record in _by_depth(records):
        ratios, references = [_spread(record["ratio"], "x")], [_reference(record)]
        if record.get("ratio_to_endless") is not None:
            ratios.append(_spread(record["ratio_to_endless"], "x"))
            references.append("endless")
        speed = _spread(record["tokens_per_second"])
        shown = ("\n".join(filter(None, lines)) for lines in (ratios, references))
        table.add_row(_name(record), f"{record['depth']:,}", *shown, speed)
    return table


def _memory_table(records: list[Record]) -> Table:
    table = _table("Memory of each process; part of the speed that memory bandwidth allows")
    for name in ("depth", "keys, values", "process", "roofline", "filled"):
        table.add_column(name, justify="left" if name == "filled" else "right")
    for record in _by_depth(records):
        table.add_row(
            _name(record),
            f"{record['depth']:,}",
            human_bytes(record["kv_bytes"]),
            human_bytes(record["resident_bytes"]),
            "" if record["roofline"] is None else f"{record['roofline']:.0%}",
            record["filled"] if "measured_at" not in record else f"as at {record['measured_at']:,}",
        )
    table.caption = "copied: what a shorter text left there, repeated; positioned: a window read at that position"
    table.caption_justify = "left"
    return table


def _store_table(records: list[Record]) -> Table:
    table = _table("Middle tokens: every decoded token recalls")
    for name in ("depth", "retrievable", "store", "looking through it, ms per token"):
        table.add_column(name, justify="right")
    for record in _by_depth(records):
        scan = {name: 1e3 * seconds for name, seconds in record["scan_seconds"].items()}
        retrievable, store = f"{record['n_retrievable']:,}", human_bytes(record["store_bytes"])
        table.add_row(_name(record), f"{record['depth']:,}", retrievable, store, _spread(scan))
    return table


def _by_depth(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: int(record["depth"]))


def _reference(record: Record) -> str:
    of = record["of"]
    if of is None:
        return ""
    return of["method"] if of["depth"] == record["depth"] else f"at {of['depth']:,}"


def _latency_table(records: list[Record]) -> Table:
    table = _table("Single tokens, in ms; stalls as multiples of the median")
    for name in ("tokens", "p99/p50", "max/p50", "p50", "p99", "max", "stalls: median, max (count)"):
        table.add_column(name, justify="left" if name.startswith("stalls") else "right")
    for record in records:
        p50 = record["p50"]
        stalls = [
            f"{stall['name']} {stall['median'] / p50:.2f}, {stall['max'] / p50:.2f} ({stall['count']:,})"
            for stall in record["stalls"]
            if stall["count"]
        ]
        table.add_row(
            _name(record),
            f"{record['n_tokens']:,}",
            *(f"{record[name] / p50:.2f}" for name in ("p99", "max")),
            *(f"{1e3 * record[name]:.1f}" for name in ("p50", "p99", "max")),
            "\n".join(stalls),
        )
    return table


def _prompt_table(records: list[Record]) -> Table:
    table = _table("Prompts")
    for name in ("tokens", "to shortest", "tokens/s", "first token, s", "KV", "process"):
        table.add_column(name, justify="right")
    for record in records:
        shortest = min(
            (each for each in records if _name(each) == _name(record)), key=lambda each: int(each["n_tokens"])
        )
        ratio = record["tokens_per_second"]["median"] / shortest["tokens_per_second"]["median"]
        table.add_row(
            _name(record),
            f"{record['n_tokens']:,}",
            "" if record is shortest else f"{ratio:.3f}x",
            _spread(record["tokens_per_second"]),
            _spread(record["first_token"]),
            human_bytes(record["kv_bytes"]),
            human_bytes(record["resident_bytes"]),
        )
    return table


def _peer_line(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    agreement = (
        f"of {record['n_logits']} most probable tokens {record['same_argmax']:.0%} agree, log-probabilities differ by "
        f"{record['mean_difference']:.2f} on average ({record['largest_difference']:.2f} at most)"
    )
    losses = f"loss over {record['n_loss']} tokens {record['loss']:.4f}, ours {record['loss_here']:.4f}"
    return f"{record['method']} ({versions}) runs the same model: {agreement}; {losses}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    return table


def _name(record: Record) -> str:
    return f"{record['method']} {record['cache_type']}"


def _spread(spread: dict[str, Any] | None, unit: str = "") -> str:
    if spread is None:
        return ""
    middle = f"{_figures(spread['median'])}{unit}"
    if spread["low"] == spread["high"]:
        return middle
    return f"{middle} ({_figures(spread['low'])}-{_figures(spread['high'])})"


def _figures(value: float) -> str:
    """Three significant figures, and of what is near 1 three places."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.1 <= value < 2 else f"{value:.3g}"
