"""Markdown on a terminal while it is being written."""

from __future__ import annotations

import time
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from lminf_edge._typing import Self

_SECONDS = 0.1
"""Between two drawings of what is not complete yet."""

_PARSER = MarkdownIt().enable("strikethrough").enable("table")  # as rich's Markdown has it


class MarkdownStream:
    """Shows a text that grows, with a line of status below it.

    Blocks (paragraphs, lists, code ...) that are complete are printed for good. Only the last one is drawn again and
    again, so that a long text costs no more than a short one and scrolls as any other output.
    """

    def __init__(self, console: Console) -> None:
        """Nothing is shown yet.

        Args:
            console: A terminal.
        """
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._text = ""
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._text.strip():
            self._console.print(_Block(self._text))

    def feed(self, text: str, status: str) -> None:
        """Some more of the text.

        Args:
            text: It, without control characters.
            status: One line.
        """
        self._text += text
        now = time.perf_counter()
        if now - self._drawn < _SECONDS:
            return
        self._drawn = now
        complete, self._text = split_complete(self._text)
        last = _Block(self._text, n_lines=max(1, self._console.size.height - 2))
        self._live.update(Group(last, Text(status, style="dim", no_wrap=True, overflow="ellipsis")))
        if complete.strip():
            self._console.print(_Block(complete), "", sep="\n")
        self._live.refresh()


def split_complete(text: str) -> tuple[str, str]:
    """A Markdown text up to its last block, and that block, which may still grow."""
    begins = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map is not None]
    if not begins or begins[-1] == 0:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: begins[-1]]) + "\n", "\n".join(lines[begins[-1] :])


class _Block:
    """Markdown without empty lines around it; of a long one that still grows, the last lines."""

    def __init__(self, text: str, n_lines: int | None = None) -> None:
        self._text = text
        self._n_lines = n_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options.update(height=None), pad=False)
        while lines and _is_empty(lines[0]):
            del lines[0]
        while lines and _is_empty(lines[-1]):
            del lines[-1]
        for line in lines[-self._n_lines :] if self._n_lines else lines:
            yield from line
            yield Segment.line()


def _is_empty(line: list[Segment]) -> bool:
    """Nothing is to be seen in it, not even a background."""
    return not any(segment.text.strip() or (segment.style and segment.style.bgcolor) for segment in line)
