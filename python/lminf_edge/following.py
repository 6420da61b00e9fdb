"""A text that never ends, such as a log, as the context of short texts about it."""

from __future__ import annotations

import codecs
import os
import queue
import threading
from collections.abc import Generator, Iterator

from lminf_edge.errors import ConfigError
from lminf_edge.llama import Llama
from lminf_edge.records import TextPiece
from lminf_edge.text_generation import TextOptions

_N_WAITING = 16
"""Pieces that are read ahead."""


class Follower:
    """Reads a text as it comes, and writes about it when asked.

    What is written, and the question before it, is taken back afterwards: the sequence holds the text that was read and
    nothing else.

    Attributes:
        n_new: Tokens read since the last answer.
    """

    def __init__(self, llm: Llama, question: str, options: TextOptions) -> None:
        """Follows a text from its beginning.

        Args:
            llm: A model with an empty sequence.
            question: Put after the text before an answer is written. May be empty: then the text itself is written on.
            options: How to write an answer.

        Raises:
            ConfigError: `llm` cannot take so long an answer back.
        """
        self._llm = llm
        self._question = llm.tokenize(question, add_bos=False)
        self._options = options
        self.n_new = 0
        n_rollback = 0 if llm.config is None else llm.config.n_rollback
        if not 0 < options.max_tokens <= n_rollback - len(self._question):
            raise ConfigError(
                f"max_tokens = {options.max_tokens}: must be from 1 to n_rollback ({n_rollback}) less the question's "
                f"{len(self._question)} tokens"
            )

    def read(self, text: str) -> None:
        """Appends a piece of the text. Pieces that end with a line are tokenised as the whole text would be."""
        tokens = self._llm.tokenize(text, add_bos=self._llm.n_past == 0)
        if tokens:
            for _ in self._llm.generate(tokens, max_tokens=0):
                pass
            self.n_new += len(tokens)

    def answer(self) -> Generator[TextPiece, None, None]:
        """Writes about what was read so far; to be called when something is new.

        Returns:
            The pieces of the answer. When the generator ends or is closed, the answer is taken back.
        """
        self.n_new = 0
        n_past = self._llm.n_past
        pieces = self._llm._write(self._question, self._options, fresh=False)
        try:
            yield from pieces
        finally:
            self._llm.truncate(n_past)


def read_with_pauses(file_descriptor: int, pause: float, n_bytes: int = 4096) -> Iterator[str | None]:
    """A file that grows, as text: whole lines as far as they are there.

    It is read in a thread, which waits when what it has read is not fetched.

    Args:
        file_descriptor: The file. What is no UTF-8 in it becomes U+FFFD.
        pause: Seconds.
        n_bytes: How much to read at once; a piece is longer by an unfinished line before it at most.

    Returns:
        An iterator over pieces of the text; None each time that nothing has come for so long, and at the end.
    """
    chunks: queue.Queue[bytes] = queue.Queue(_N_WAITING)
    threading.Thread(target=_read_chunks, args=(file_descriptor, n_bytes, chunks), daemon=True).start()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    line = ""
    while True:
        try:
            chunk = chunks.get(timeout=pause)
        except queue.Empty:
            if line:
                yield line
            line = ""
            yield None
            continue
        lines, newline, line = (line + decoder.decode(chunk, final=not chunk)).rpartition("\n")
        if lines or newline:
            yield lines + newline
        if not chunk:
            if line:
                yield line
            yield None
            return


def _read_chunks(file_descriptor: int, n_bytes: int, chunks: queue.Queue[bytes]) -> None:
    chunk = b"-"
    while chunk:
        try:
            chunk = os.read(file_descriptor, n_bytes)
        except OSError:  # the writer's side broke off
            chunk = b""
        chunks.put(chunk)
