"""How `lminf-edge chat` shows a conversation: to a person at a terminal, in a pipe, or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, Protocol

from rich.table import Table

from lminf_edge.cli._markdown import MarkdownStream
from lminf_edge.cli._terminal import messages, output, reading_bar, without_control, write_text
from lminf_edge.completion_types import ChatCompletionChunk
from lminf_edge.llama import Llama
from lminf_edge.records import by_layer


class ChatView(Protocol):
    """Where answers and everything else are shown."""

    def show_answer(self, chunks: Iterator[ChatCompletionChunk], llm: Llama, n_tokens: int) -> None:
        """An answer as it is written.

        Args:
            chunks: Its pieces.
            llm: The model that writes it.
            n_tokens: How many tokens it has to read first, about.
        """

    def show_note(self, text: str) -> None:
        """Something that the program says by itself."""

    def show_stats(self, stats: Mapping[str, Any]) -> None:
        """Figures by name."""


class TextView:
    """Answers on standard output as plain text, everything else on standard error."""

    def show_answer(self, chunks: Iterator[ChatCompletionChunk], llm: Llama, n_tokens: int) -> None:
        """See `ChatView`."""
        text = ""
        for chunk in chunks:
            text = _content(chunk) or text
            write_text(_content(chunk))
        write_text("" if text.endswith("\n") else "\n")

    def show_note(self, text: str) -> None:
        """See `ChatView`."""
        messages.print(text, markup=False, soft_wrap=True)

    def show_stats(self, stats: Mapping[str, Any]) -> None:
        """See `ChatView`."""
        for name, value in stats.items():
            self.show_note(f"{_words(name)}: {_readable(value)}")


class JsonView(TextView):
    """A line of JSON on standard output for each answer, and for figures."""

    def show_answer(self, chunks: Iterator[ChatCompletionChunk], llm: Llama, n_tokens: int) -> None:
        """See `ChatView`."""
        text, reason, usage = "", None, None
        for chunk in chunks:
            text += _content(chunk)
            usage = chunk.get("usage")
            reason = chunk["choices"][0]["finish_reason"] if chunk["choices"] else reason
        _print_json({"role": "assistant", "content": text, "finish_reason": reason, "usage": usage})

    def show_stats(self, stats: Mapping[str, Any]) -> None:
        """See `ChatView`."""
        _print_json({"stats": dict(stats)})


class TerminalView(TextView):
    """Answers as Markdown that grows, with a line of figures below."""

    def show_answer(self, chunks: Iterator[ChatCompletionChunk], llm: Llama, n_tokens: int) -> None:
        """See `ChatView`."""
        n_before = llm.n_past
        with reading_bar(n_tokens, lambda: llm.n_past - n_before):
            first = list(islice(chunks, 2))  # the first one comes at once, without text
        begin = time.perf_counter()
        with MarkdownStream(output) as shown:
            for n_written, chunk in enumerate(chain(first[1:], chunks)):
                shown.feed(without_control(_content(chunk)), _figures(n_written, begin))
        output.print()

    def show_stats(self, stats: Mapping[str, Any]) -> None:
        """See `ChatView`."""
        table = Table(show_header=False, box=None)
        table.add_column()
        table.add_column(justify="right")
        for name, value in stats.items():
            table.add_row(_words(name), _readable(value))
        output.print(table)


def _figures(n_written: int, begin: float) -> str:
    speed = n_written / max(time.perf_counter() - begin, 1e-6)
    return f"{speed:.1f} tokens/s, {n_written:,} tokens · Ctrl-C stops"


def _content(chunk: ChatCompletionChunk) -> str:
    return chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, ensure_ascii=False), flush=True)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _readable(value: object) -> str:
    if isinstance(value, tuple):
        return by_layer(value)
    if isinstance(value, float):
        return f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
