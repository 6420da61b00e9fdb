"""How long single tokens take, and what the slow ones had to wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lminf_edge.evaluation.bench import work
from lminf_edge.evaluation.bench.plan import BenchSettings
from lminf_edge.evaluation.bench.stations import IMPOSSIBLE, fill_store, last_of
from lminf_edge.evaluation.bench.work import STALLS, Tokens
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.reader import StreamReader
from lminf_edge.evaluation.results import ResultLog

N_REBASE = 65536
"""Where the first rebase is due: physical positions stay below it."""


def measure_latency(
    settings: BenchSettings, tokens: Tokens, log: ResultLog, on_progress: Callable[[str], object]
) -> None:
    """Times single tokens of every method that goes on without end, with every type of cache.

    An endless sequence is timed around its first rebase, a shifted context around a shift, so that each is among the
    tokens, however few they are. With a store of middle tokens, each of them recalls from what came before.

    Args:
        settings: The settings.
        tokens: A text that is read in a circle.
        log: Where the records go. What is there is not measured again.
        on_progress: Called with what is being done now.
    """
    if settings.n_latency == 0:
        return
    skipped = [record for record in log.of_kind("bench.skipped") if record["part"] == "latency"]
    done = {(record["method"], record["cache_type"]) for record in [*log.of_kind("bench.latency"), *skipped]}
    depth = max(0, N_REBASE - settings.n_latency // 2)
    for of in settings.setup.passes():
        if of.method == "full" or (of.method, of.cache_type) in done:
            continue
        try:
            _measure(settings, of, depth, tokens, log, on_progress)
        except IMPOSSIBLE as error:
            log.add("bench.skipped", part="latency", **asdict(of), depth=depth, reason=str(error))


def stall_summary(seconds: Sequence[float], stalls: Sequence[str]) -> list[dict[str, Any]]:
    """Count, median and largest time of the tokens that had to wait for each of `STALLS`.

    Args:
        seconds: Time of each token.
        stalls: What each had to wait for.
    """
    summary = []
    for name in STALLS:
        times = [time for time, stall in zip(seconds, stalls, strict=True) if stall == name]
        median, largest = (float(np.median(times)), max(times)) if times else (None, None)
        summary.append({"name": name, "count": len(times), "median": median, "max": largest})
    return summary


def _measure(
    settings: BenchSettings, of: Pass, depth: int, tokens: Tokens, log: ResultLog, on_progress: Callable[[str], object]
) -> None:
    n = settings.n_latency
    title = f"{of.method}, {of.cache_type}"
    on_progress(f"going to position {depth:,} to time single tokens: {title}")
    seconds: list[float] = []
    stalls: list[str] = []
    with StreamReader(settings.setup.reader_options(of, depth)) as reader:
        if of.method == "shift":
            n_used = max(settings.setup.n_sink + 1, settings.n_shift - n // 2)
            last_of(reader.run(work.shift_to, tokens, n_used, depth))
        elif of.method == "middle":
            fill_store(settings.setup, reader, tokens, depth, on_progress)
        else:
            last_of(reader.run(work.jump_to, tokens, depth))
        for timed in reader.run(work.time_tokens, tokens, n):
            seconds += timed.seconds
            stalls += timed.stalls
            on_progress(f"timed {len(seconds):,} of {n:,} single tokens: {title}")
    log.add(
        "bench.latency",
        **asdict(of),
        depth=depth,
        n_tokens=n,
        p50=float(np.percentile(seconds, 50)),
        p99=float(np.percentile(seconds, 99)),
        max=max(seconds),
        stalls=stall_summary(seconds, stalls),
    )
