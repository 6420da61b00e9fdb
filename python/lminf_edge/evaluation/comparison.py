"""One text read twice, with LM-Infinite and with full attention: what was measured, and what it says in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lminf_edge.evaluation.reader import ReaderStatus
from lminf_edge.evaluation.streams import BucketedStream
from lminf_edge.system import human_bytes

RISE = 0.25
"""Nats per token. A model that leaves the range it was trained for loses several; parts of one text differ by less."""


@dataclass
class Reading:
    """One pass over the text, summed up while it goes on.

    Attributes:
        stream: Loss and speed by position.
        kv_bytes: Bytes of keys and values.
        resident_bytes: Largest resident memory of the process so far, weights included.
        n_ctx: Length at which the context is full. None: never.
    """

    stream: BucketedStream
    kv_bytes: int = 0
    resident_bytes: int = 0
    n_ctx: int | None = None

    def add(self, status: ReaderStatus) -> None:
        """Takes over what the reading process says."""
        self.kv_bytes = status.kv_bytes
        self.resident_bytes = max(self.resident_bytes, status.resident_bytes)
        self.n_ctx = status.n_ctx
        if status.piece is not None:
            self.stream.add(status.piece)

    @property
    def context_is_full(self) -> bool:
        """Whether no further token fits."""
        return self.n_ctx is not None and self.stream.n_read >= self.n_ctx

    def final_speed(self) -> float:
        """Tokens per second in the last bucket that is at least half full."""
        buckets = self.stream.buckets()
        whole = [bucket for bucket in buckets if 2 * bucket.n_tokens >= bucket.end - bucket.begin]
        return (whole or buckets)[-1].tokens_per_second if buckets else 0.0

    def to_json(self) -> dict[str, Any]:
        """The measured numbers."""
        return {
            "n_read": self.stream.n_read,
            "context_is_full": self.context_is_full,
            "tokens_per_second": self.stream.tokens_per_second,
            "kv_bytes": self.kv_bytes,
            "resident_bytes": self.resident_bytes,
            "buckets": [asdict(bucket) for bucket in self.stream.buckets()],
        }


@dataclass
class Comparison:
    """Both passes.

    Attributes:
        n_tokens: Tokens of the text.
        n_ctx_train: Length that the model was trained on.
        bucket: Positions in each bucket.
        endless: The pass with LM-Infinite.
        full: The pass with full attention.
    """

    n_tokens: int
    n_ctx_train: int
    bucket: int
    endless: Reading = field(init=False)
    full: Reading = field(init=False)

    def __post_init__(self) -> None:
        self.endless = Reading(BucketedStream(self.bucket))
        self.full = Reading(BucketedStream(self.bucket))

    def conclusion(self) -> str:
        """One sentence that says what was measured, whether it is what was hoped for or not."""
        return f"{self._how_far()}; LM-Infinite (full attention) {self._how_well()}, {self._at_what_cost()}."

    def _how_far(self) -> str:
        n_full = self.full.stream.n_read
        if self.full.context_is_full and n_full < self.n_tokens:
            stopped = f"full attention stopped at {n_full:,} with its context full"
            return f"LM-Infinite read all {self.n_tokens:,} tokens, {stopped}"
        return f"LM-Infinite and full attention both read all {self.n_tokens:,} tokens"

    def _how_well(self) -> str:
        n_both = self.full.stream.n_read
        here, there = self.endless.stream.mean_loss(0, n_both), self.full.stream.mean_loss(0, n_both)
        if here is None or there is None:
            return "scored nothing"
        common = f"had a loss of {here:.2f} ({there:.2f}) where both read"
        within = self.endless.stream.mean_loss(0, self.n_ctx_train)
        beyond = self.endless.stream.mean_loss(self.n_ctx_train, self.n_tokens)
        if beyond is None or within is None:
            return common
        if beyond > within + RISE:
            return (
                f"{common}, which rose from {within:.2f} to {beyond:.2f} beyond the trained {self.n_ctx_train:,} tokens"
            )
        return f"{common} and {beyond:.2f} beyond the trained {self.n_ctx_train:,} tokens"

    def _at_what_cost(self) -> str:
        endless, full = self.endless, self.full
        return (
            f"held {human_bytes(endless.kv_bytes)} ({human_bytes(full.kv_bytes)}) of keys and values, "
            f"and read {endless.final_speed():.0f} ({full.final_speed():.0f}) tokens/s at the end"
        )
