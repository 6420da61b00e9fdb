"""How fast prompts are read, and when the first token of an answer is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import product

from lminf_edge.evaluation.bench import work
from lminf_edge.evaluation.bench.plan import BenchSettings
from lminf_edge.evaluation.bench.spread import spread_of
from lminf_edge.evaluation.bench.stations import IMPOSSIBLE, last_of
from lminf_edge.evaluation.bench.work import Tokens
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.reader import StreamReader
from lminf_edge.evaluation.results import Record, ResultLog

_Key = tuple[str, str, int]


def measure_prompts(
    settings: BenchSettings, tokens: Tokens, n_ctx_train: int, log: ResultLog, on_progress: Callable[[str], object]
) -> None:
    """Reads prompts of several lengths with every method and type of cache, in rounds, in a changing order.

    Full attention reads prompts up to the trained length only: its time grows with the square of the length, and beyond
    it the model makes nothing of them.

    Args:
        settings: The settings.
        tokens: A text that is read in a circle.
        n_ctx_train: Length that the model was trained on.
        log: Where the records go. What is there is not measured again.
        on_progress: Called with what is being done now.
    """
    wanted = _wanted(settings, n_ctx_train, log)
    for number in range(settings.prompt_rounds):
        done = {_key(record) for record in log.of_kind("bench.prompt_round") if record["round"] == number}
        for of, n_tokens in wanted if number % 2 == 0 else list(reversed(wanted)):
            if (of.method, of.cache_type, n_tokens) in done:
                continue
            on_progress(f"prompt of {n_tokens:,} tokens, round {number + 1}: {of.method}, {of.cache_type}")
            try:
                _read(settings, of, n_tokens, number, tokens, log)
            except IMPOSSIBLE as error:
                _skip(log, of, n_tokens, str(error))
                wanted = [item for item in wanted if item != (of, n_tokens)]
    written = {_key(record) for record in log.of_kind("bench.prompt")}
    for of, n_tokens in wanted:
        if (of.method, of.cache_type, n_tokens) not in written:
            _summarise(of, n_tokens, log)


def _wanted(settings: BenchSettings, n_ctx_train: int, log: ResultLog) -> list[tuple[Pass, int]]:
    """What is read; what is too long is written to the log."""
    skipped = {
        (record["method"], record["cache_type"], record["depth"])
        for record in log.of_kind("bench.skipped")
        if record["part"] == "prompt"
    }
    wanted = []
    for of, n_tokens in product(settings.setup.passes(), settings.prompts):
        if (of.method, of.cache_type, n_tokens) in skipped:
            continue
        if of.method != "full" or n_tokens <= n_ctx_train:
            wanted.append((of, n_tokens))
        else:
            _skip(log, of, n_tokens, f"longer than the {n_ctx_train:,} tokens that the model was trained on")
    return wanted


def _skip(log: ResultLog, of: Pass, n_tokens: int, reason: str) -> None:
    log.add("bench.skipped", part="prompt", **asdict(of), depth=n_tokens, reason=reason)


def _key(record: Record) -> _Key:
    return record["method"], record["cache_type"], record["n_tokens"]


def _read(settings: BenchSettings, of: Pass, n_tokens: int, number: int, tokens: Tokens, log: ResultLog) -> None:
    with StreamReader(settings.setup.reader_options(of, n_tokens)) as reader:
        read = last_of(reader.run(work.read_prompt, tokens, n_tokens))
        memory = last_of(reader.run(work.footprint))
    log.add("bench.prompt_round", **asdict(of), n_tokens=n_tokens, round=number, **asdict(read), **asdict(memory))


def _summarise(of: Pass, n_tokens: int, log: ResultLog) -> None:
    rounds = [
        record for record in log.of_kind("bench.prompt_round") if _key(record) == (of.method, of.cache_type, n_tokens)
    ]
    log.add(
        "bench.prompt",
        **asdict(of),
        n_tokens=n_tokens,
        tokens_per_second=asdict(spread_of([n_tokens / record["seconds"] for record in rounds])),
        first_token=asdict(spread_of([record["first_token"] for record in rounds])),
        kv_bytes=rounds[-1]["kv_bytes"],
        store_bytes=rounds[-1].get("store_bytes", 0),
        resident_bytes=max(record["resident_bytes"] for record in rounds),
    )
