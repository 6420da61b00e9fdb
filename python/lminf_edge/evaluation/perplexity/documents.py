"""Loss by position over many documents, each read from its beginning: the paper's protocol for ArXiv."""

from __future__ import annotations

import math
import sys
import time
from io import TextIOBase

import numpy as np

from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.perplexity.passes import PassState, score_part, summarise
from lminf_edge.evaluation.perplexity.settings import PplSettings, Progress
from lminf_edge.evaluation.results import ResultLog
from lminf_edge.evaluation.statistics import mean_interval
from lminf_edge.evaluation.token_source import TokenSource, json_documents, vocabulary_of
from lminf_edge.tokens import TokenArray


def read_documents(
    settings: PplSettings, stream: TextIOBase, passes: list[PassState], log: ResultLog, on_progress: Progress
) -> None:
    """Every document from its beginning; buckets are means over documents."""
    if settings.fresh:
        raise ConfigError("fresh: documents begin anew anyway")
    vocabulary = vocabulary_of(settings.setup.model)
    done = {(each["method"], each["cache_type"], each["document"]) for each in log.of_kind("ppl.document")}
    n_documents = n_read = 0
    for number, text in enumerate(json_documents(stream, settings.text or "", settings.field)):
        source = TokenSource(vocabulary, [text])
        tokens = source.take(settings.n_tokens or sys.maxsize >> 1)
        if tokens.size < settings.min_tokens:
            continue
        for state in passes[number % len(passes) :] + passes[: number % len(passes)]:
            if (state.of.method, state.of.cache_type, number) not in done:
                _read_document(settings, state, number, tokens, log)
        n_documents += 1
        n_read += tokens.size
        on_progress(
            n_read, settings.n_tokens * settings.documents if settings.n_tokens and settings.documents else None
        )
        if n_documents == settings.documents:
            break
    if not n_documents:
        raise LMInfError(f"{settings.text} has no document of at least {settings.min_tokens} tokens")
    for state in passes:
        _sum_up_documents(settings, state, log)
    summarise(passes, log, settings.setup.n_window)


def _read_document(settings: PplSettings, state: PassState, number: int, tokens: TokenArray, log: ResultLog) -> None:
    clock = time.perf_counter()
    pieces = []
    for status in state.reader.run(score_part, np.empty(0, np.int32), tokens, None):
        state.status = status
        assert status.piece is not None
        pieces.append(status.piece.losses)
    losses = np.concatenate(pieces)
    parts = [losses[begin : begin + settings.bucket] for begin in range(0, len(losses), settings.bucket)]
    log.add(
        "ppl.document",
        **state.names(),
        document=number,
        n_tokens=int(tokens.size),
        losses=[float(part.mean(dtype=np.float64)) for part in parts],
        counts=[len(part) for part in parts],
        seconds=time.perf_counter() - clock,
        kv_bytes=state.status.kv_bytes,
        resident_bytes=state.status.resident_bytes,
    )


def _sum_up_documents(settings: PplSettings, state: PassState, log: ResultLog) -> None:
    """The mean of each bucket over the documents that fill it, and its interval."""
    documents = [
        record
        for record in log.of_kind("ppl.document")
        if (record["method"], record["cache_type"]) == (state.of.method, state.of.cache_type)
    ]
    for index in range(max(len(record["losses"]) for record in documents)):
        there = [record for record in documents if len(record["losses"]) > index]
        losses = np.array([record["losses"][index] for record in there])
        counts = [record["counts"][index] for record in there]
        interval = mean_interval(losses)
        begin = index * settings.bucket
        log.add(
            "ppl.bucket",
            **state.names(),
            begin=begin,
            end=begin + max(counts),
            n_tokens=sum(counts),
            n_documents=len(there),
            loss=vars(interval),
            perplexity=math.exp(interval.mean),
            tokens_per_second=None,
            kv_bytes=there[-1]["kv_bytes"],
            resident_bytes=there[-1]["resident_bytes"],
        )
        state.add(begin + max(counts), interval.mean, sum(counts))
