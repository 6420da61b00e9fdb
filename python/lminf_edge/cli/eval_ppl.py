"""`lminf-edge eval ppl`: loss and perplexity by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from lminf_edge.cli._evaluation import MethodOptions, Output, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import counting_bar, find_model, output, with_exit_codes
from lminf_edge.evaluation.perplexity import PplSettings, run_ppl, text_identity
from lminf_edge.evaluation.results import Record, ResultLog
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of
from lminf_edge.system import human_bytes

_N_ROWS = 16
"""A table of more buckets shows the means of several in a row."""

_N_WITH_INTERVAL = 3
"""A table of more passes has no room for intervals, which are in the results file."""


@with_exit_codes
@with_option_groups
def eval_ppl(
    text: Annotated[
        str | None,
        typer.Argument(
            help="Text file; JSON lines with a text each if its name ends with .jsonl; - for standard input. "
            "Default: Python's documentation.",
            show_default=False,
        ),
    ] = None,
    *,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to read (of each document). Default: all.")] = None,
    bucket: Annotated[int, typer.Option(min=2, help="Positions that are averaged.")] = 4096,
    full_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where full attention ends. Default: twice the trained length.")
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Also read each part beyond the trained length with LM-Infinite begun anew, inside that length.",
        ),
    ] = False,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents to read from JSON lines.")] = None,
    min_tokens: Annotated[int, typer.Option(min=2, help="Leave out shorter documents.")] = 2,
    concatenate: Annotated[bool, typer.Option("--concatenate", help="Read JSON lines as one text.")] = False,
    field: Annotated[str, typer.Option(help="Field of JSON lines that is the text.")] = "text",
    checkpoint: Annotated[
        float, typer.Option(min=0, help="Seconds between states that a stopped run goes on from.")
    ] = 120,
    results: Output = None,
    as_json: AsJson = False,
    methods: MethodOptions,
) -> None:
    """Loss by position, of several methods on the same text.

    A text of any length is read in constant memory. With --output, a run that was stopped goes on when started again.
    """
    path = find_model(methods.model)
    name, sha256 = text_identity(text)
    settings = PplSettings(
        setup=methods.setup(path, trained_length(vocabulary_of(path), path)),
        text=name,
        text_sha256=sha256,
        n_tokens=tokens,
        bucket=bucket,
        full_tokens=full_tokens,
        fresh=fresh,
        documents=documents,
        min_tokens=min_tokens,
        concatenate=concatenate,
        field=field,
    )
    with result_log(results, as_json) as log:
        with counting_bar("reading", "tokens") as on_progress:
            run_ppl(settings, log, on_progress, checkpoint)
        if not as_json:
            show_ppl(log)


def show_ppl(log: ResultLog) -> None:
    """Tables of a run: losses by position, and what the methods differ by."""
    buckets, summaries = log.of_kind("ppl.bucket"), log.of_kind("ppl.summary")
    for cache_type in dict.fromkeys(each["cache_type"] for each in summaries):
        alike = [each for each in summaries if each["cache_type"] == cache_type]
        output.print(_by_position(cache_type, buckets, alike))
    if differences := log.of_kind("ppl.difference"):
        output.print(_differences(differences))


def _by_position(cache_type: str, buckets: Sequence[Record], summaries: Sequence[Record]) -> Table:
    """Of the passes with one type of cache: there is no room for those with all."""
    title = f"{cache_type} cache: loss in nats per token (lower is better), ± half of a 95 % interval"
    table = Table(title=title, title_justify="left")
    table.add_column("up to token", justify="right")
    passes = [(each["method"], cache_type) for each in summaries]
    for method, _ in passes:
        table.add_column(method, justify="right")
    ends = sorted({each["end"] for each in buckets})
    for group in _groups(ends):
        row = [f"{group[-1]:,}"]
        for each in passes:
            there = [b for b in buckets if _pass_of(b) == each and b["end"] in group]
            row.append(_mean_loss(there, with_interval=len(passes) <= _N_WITH_INTERVAL))
        table.add_row(*row)
    table.add_section()
    table.add_row("all", *(f"{each['loss']:.4f}" for each in summaries))
    table.add_row("perplexity", *(f"{each['perplexity']:.2f}" for each in summaries))
    table.add_row("slope per 1M", *(_interval(each["slope"], 3) for each in summaries))
    last = {_pass_of(each): each for each in buckets}
    table.add_row("keys, values", *(human_bytes(last[each]["kv_bytes"]) for each in passes))
    table.add_row("process in RAM", *(human_bytes(last[each]["resident_bytes"]) for each in passes))
    return table


def _differences(differences: Sequence[Record]) -> Table:
    table = Table(title="Ratio of losses on the same tokens, over all buckets", title_justify="left")
    for title in ("method", "compared with", "mean", "smallest", "largest", "last"):
        table.add_column(title, justify="left" if title in ("method", "compared with") else "right")
    pairs: dict[tuple[str, str], list[float]] = {}
    for each in differences:
        of = each["of"]
        pair = (f"{each['method']}, {each['cache_type']}", f"{of['method']}, {of['cache_type']}")
        pairs.setdefault(pair, []).append(each["ratio"])
    for (method, other), ratios in pairs.items():
        figures = (np.mean(ratios), min(ratios), max(ratios), ratios[-1])
        table.add_row(method, other, *(f"{figure:.4f}" for figure in figures))
    return table


def _groups(ends: list[int]) -> list[list[int]]:
    n = -(-len(ends) // _N_ROWS)
    return [ends[begin : begin + n] for begin in range(0, len(ends), n)] if ends else []


def _mean_loss(buckets: Sequence[Record], with_interval: bool) -> str:
    if not buckets:
        return ""
    counts = np.array([each["n_tokens"] for each in buckets], float)
    mean = float(np.average([each["loss"]["mean"] for each in buckets], weights=counts))
    halves = [each["loss"]["high"] for each in buckets]
    if not with_interval or any(high is None for high in halves):
        return f"{mean:.3f}"
    half = np.array(halves) - np.array([each["loss"]["mean"] for each in buckets])
    return f"{mean:.3f} ± {float(np.sqrt(np.sum((counts * half) ** 2)) / counts.sum()):.3f}"


def _interval(estimate: dict[str, Any] | None, n_digits: int) -> str:
    if estimate is None or estimate["mean"] is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['mean']:.{n_digits}f}"
    return f"{estimate['mean']:.{n_digits}f} ± {estimate['high'] - estimate['mean']:.{n_digits}f}"


def _pass_of(record: Record) -> tuple[str, str]:
    return record["method"], record["cache_type"]
