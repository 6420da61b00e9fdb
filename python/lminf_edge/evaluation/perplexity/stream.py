"""One text of any length, part by part: each part is read by all methods before the next one is."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path

import numpy as np

from lminf_edge.errors import LMInfError
from lminf_edge.evaluation.methods import Pass
from lminf_edge.evaluation.perplexity.passes import (
    Losses,
    PassState,
    load_state,
    read_unscored,
    save_state,
    score_part,
    summarise,
    write_differences,
)
from lminf_edge.evaluation.perplexity.settings import FRESH, PplSettings, Progress
from lminf_edge.evaluation.results import ResultLog
from lminf_edge.evaluation.statistics import stream_interval
from lminf_edge.evaluation.streams import StreamPiece
from lminf_edge.evaluation.token_source import TokenSource, json_documents, text_pieces, vocabulary_of
from lminf_edge.tokens import TokenArray


class TextStream:
    """One text from its beginning to its end."""

    def __init__(
        self, settings: PplSettings, stream: TextIOBase, passes: list[PassState], log: ResultLog, n_train: int
    ) -> None:
        texts: Iterator[str] = text_pieces(stream, settings.text or "")
        if settings.is_json_lines:
            texts = (text + "\n\n" for text in json_documents(stream, settings.text or "", settings.field))
        self._settings = settings
        self._passes = passes
        self._log = log
        self._n_train = n_train
        self._source = TokenSource(vocabulary_of(settings.setup.model), texts)
        self._before: TokenArray = np.empty(0, np.int32)  # what a fresh pass reads first
        self._states = None if log.path is None else log.path.with_name(log.path.name + ".states")

    def read(self, on_progress: Progress, checkpoint_seconds: float) -> None:
        """Reads to the end of the text, from the last checkpoint in the log if there is one."""
        self._resume()
        clock = time.monotonic()
        while True:
            on_progress(self._source.n_taken, self._settings.n_tokens)
            if not self._read_bucket():
                break
            if self._states is not None and time.monotonic() - clock > checkpoint_seconds:
                self._save()
                clock = time.monotonic()
        if self._source.n_taken < 2:
            raise LMInfError("the text has no two tokens: there is nothing to predict")
        summarise(self._passes, self._log, max(self._n_train, self._settings.setup.n_window))
        if self._states is not None:
            shutil.rmtree(self._states, ignore_errors=True)

    def _read_bucket(self) -> bool:
        """Reads the next bucket with every pass. False at the end."""
        begin = self._source.n_taken
        n = self._settings.bucket
        if self._settings.n_tokens is not None:
            n = min(n, self._settings.n_tokens - begin)
        tokens = self._source.take(n) if n > 0 else np.empty(0, np.int32)
        following = self._source.peek() if begin + n != self._settings.n_tokens else None
        losses: dict[Pass, Losses] = {}
        shift = begin // self._settings.bucket % len(self._passes)  # everyone is first in turn
        for state in self._passes[shift:] + self._passes[:shift]:
            read = self._read_pass(state, begin, tokens, following)
            if read.size:
                losses[state.of] = read
        for state in self._passes:  # differences only in the order of the passes
            if state.of in losses:
                write_differences(self._log, state.of, losses, begin, begin + len(losses[state.of]))
        n_kept = max(0, self._n_train - self._settings.bucket)
        self._before = np.concatenate([self._before, tokens])[-n_kept:] if n_kept else self._before
        return following is not None

    def _read_pass(self, state: PassState, begin: int, tokens: TokenArray, following: int | None) -> Losses:
        if state.is_full or not tokens.size:
            return np.empty(0, np.float32)
        fresh = state.of.method == FRESH and begin + tokens.size > self._n_train
        before = self._before if fresh else None
        pieces: list[StreamPiece] = []
        for status in state.reader.run(score_part, before, tokens, following):
            state.status = status
            assert status.piece is not None
            pieces.append(status.piece)
        state.is_full = state.status.n_ctx is not None and state.status.n_past >= state.status.n_ctx
        losses = np.concatenate([piece.losses for piece in pieces]) if pieces else np.empty(0, np.float32)
        if losses.size:
            n_read, seconds = sum(piece.n_read for piece in pieces), sum(piece.seconds for piece in pieces)
            interval = stream_interval(losses)
            self._log.add(
                "ppl.bucket",
                **state.names(),
                begin=begin,
                end=begin + len(losses),
                n_tokens=len(losses),
                loss=vars(interval),
                perplexity=math.exp(interval.mean),
                tokens_per_second=n_read / seconds if seconds else None,
                kv_bytes=state.status.kv_bytes,
                resident_bytes=state.status.resident_bytes,
            )
            state.add(begin + len(losses), interval.mean, len(losses))
        return losses

    def _save(self) -> None:
        """Saves all states, then says so in the log: whatever is stopped when, there is something to go on from."""
        assert self._states is not None
        self._states.mkdir(exist_ok=True)
        for state in self._passes:
            if not state.is_full and state.of.method != FRESH:
                list(state.reader.run(save_state, self._state_path(state, self._source.n_taken)))
        self._log.add("ppl.checkpoint", n_read=self._source.n_taken, digest=self._source.digest())
        for old in self._states.iterdir():
            if not old.name.endswith(f".{self._source.n_taken}.state"):
                old.unlink(missing_ok=True)

    def _state_path(self, state: PassState, n_read: int) -> Path:
        assert self._states is not None
        return self._states / f"{state.of.name}.{n_read}.state"

    def _resume(self) -> None:
        """Goes to the last checkpoint in the log, or to the beginning."""
        checkpoints = [i for i, record in enumerate(self._log.records) if record["kind"] == "ppl.checkpoint"]
        self._log.cut(1 + checkpoints[-1] if checkpoints else 1)
        if not checkpoints:
            return
        checkpoint = self._log.records[-1]
        n_read = checkpoint["n_read"]
        while self._source.n_taken < n_read:
            n_kept = max(1, self._n_train - self._settings.bucket)
            taken = self._source.take(min(n_read - self._source.n_taken, 1 << 16))
            if not taken.size:
                break
            self._before = np.concatenate([self._before, taken])[-n_kept:]
        if self._source.digest() != checkpoint.get("digest"):
            raise LMInfError("the text is not the one that this run began with: name another output file")
        for state in self._passes:
            self._restore(state, n_read)

    def _restore(self, state: PassState, n_read: int) -> None:
        for record in self._log.of_kind("ppl.bucket"):
            if (record["method"], record["cache_type"]) == (state.of.method, state.of.cache_type):
                state.add(record["end"], record["loss"]["mean"], record["n_tokens"])
        path = self._state_path(state, n_read)
        if state.of.method == "full" and not path.exists() and state.ends and state.ends[-1] < n_read:
            state.is_full = True
        elif state.of.method != FRESH:
            list(state.reader.run(load_state, path, n_read))
        elif n_read < self._n_train:
            list(state.reader.run(read_unscored, self._before[-n_read:]))
