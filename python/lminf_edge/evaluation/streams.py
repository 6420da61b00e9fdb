"""Reading a long text and scoring it: loss and speed by position.

Loss is the mean negative natural-log probability of a token given those before it, in nats per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lminf_edge.llama import Llama
from lminf_edge.middle import Recall
from lminf_edge.tokens import TokenSequence


@dataclass(frozen=True, kw_only=True)
class StreamPiece:
    """What came of one micro-batch.

    Attributes:
        position: Position in the stream of the first token that was scored.
        losses: Loss of each scored token, float32 [n]; one fewer in the last piece of a stream than tokens were read.
        n_read: Tokens read by this piece.
        seconds: Time that it took.
    """

    position: int
    losses: npt.NDArray[np.float32]
    n_read: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The part of a stream from position begin to position end (exclusive).

    Attributes:
        begin: First position.
        end: Position after the last one.
        n_tokens: Tokens scored so far: the bucket is complete when this is end - begin, or one fewer at the stream's
            start.
        loss: Their mean loss in nats per token.
        tokens_per_second: Mean reading speed.
    """

    begin: int
    end: int
    n_tokens: int
    loss: float
    tokens_per_second: float


def read_stream(
    llm: Llama, tokens: TokenSequence, following: int | None = None, recall: Recall = False
) -> Iterator[StreamPiece]:
    """Appends a text to the model's sequence and scores all of its tokens but the first.

    Args:
        llm: The model. Its sequence may have begun earlier: then the scores depend on that too.
        tokens: Token ids of the text.
        following: Token that the text goes on with. It is scored, but not appended: so a text can be read in parts.
        recall: Whether the tokens look up middle tokens; see `Llama.eval`.

    Yields:
        One piece for each micro-batch, in order.
    """
    position = llm.n_past + 1
    clock = time.perf_counter()
    for logprobs in llm._iter_logprobs(tokens, following, recall):
        now = time.perf_counter()
        n_read = llm.n_past - position + 1
        yield StreamPiece(position=position, losses=-logprobs, n_read=n_read, seconds=now - clock)
        position += n_read
        clock = time.perf_counter()


class BucketedStream:
    """Sums a stream up by position while it is read."""

    def __init__(self, bucket: int) -> None:
        """Makes an empty summary.

        Args:
            bucket: Positions in each bucket.
        """
        self.bucket = bucket
        self.n_read = 0
        self.seconds = 0.0
        self._losses: list[npt.NDArray[np.float32]] = []
        self._seconds_per_token: list[npt.NDArray[np.float64]] = []

    def add(self, piece: StreamPiece) -> None:
        """Adds the next piece of the stream, which must begin at position 0."""
        self.n_read += piece.n_read
        self.seconds += piece.seconds
        self._losses.append(piece.losses)
        self._seconds_per_token.append(np.full(piece.n_read, piece.seconds / piece.n_read))

    def buckets(self) -> list[Bucket]:
        """The buckets that hold at least one scored token."""
        losses = _joined(self._losses)
        seconds = _joined(self._seconds_per_token)
        result = []
        for begin in range(0, self.n_read, self.bucket):
            end = begin + self.bucket
            scored = losses[max(0, begin - 1) : end - 1]  # losses[i] belongs to position i + 1
            if scored.size:
                result.append(
                    Bucket(
                        begin=begin,
                        end=end,
                        n_tokens=scored.size,
                        loss=float(scored.mean(dtype=np.float64)),
                        tokens_per_second=1.0 / float(seconds[begin:end].mean()),
                    )
                )
        return result

    def mean_loss(self, begin: int, end: int) -> float | None:
        """Mean loss of the tokens at positions from begin to end (exclusive). None if none of them was scored."""
        scored = _joined(self._losses)[max(0, begin - 1) : max(0, end - 1)]
        return float(scored.mean(dtype=np.float64)) if scored.size else None

    @property
    def tokens_per_second(self) -> float:
        """Mean reading speed of the whole stream."""
        return self.n_read / self.seconds if self.seconds else 0.0


def _joined(pieces: Sequence[npt.NDArray[np.floating]]) -> npt.NDArray[np.floating]:
    return np.concatenate(pieces) if pieces else np.empty(0)
