"""What `lminf-edge demo` shows while it measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lminf_edge.evaluation.comparison import Comparison, Reading
from lminf_edge.evaluation.reader import ReaderOptions, ReaderStatus
from lminf_edge.evaluation.streams import Bucket
from lminf_edge.records import GenerationStep
from lminf_edge.system import human_bytes


class DemoScreen:
    """A table that fills while both passes go on; on anything but a terminal, one line per finished part instead."""

    def __init__(self, console: Console, comparison: Comparison) -> None:
        """Shows nothing yet.

        Args:
            console: Where to.
            comparison: What is being measured; read again at each update.
        """
        self._console = console
        self._comparison = comparison
        self._live: Live | None = None
        self._n_reported = [0, 0]

    def show_settings(self, options: ReaderOptions, status: ReaderStatus) -> None:
        """Model and parameters."""
        config = status.lminf
        self._line(f"{options.model_path.name}, trained on {status.n_ctx_train:,} tokens, {options.cache_type} cache")
        if config is not None:
            self._line(
                f"LM-Infinite: the first {config.n_sink} tokens and a window of {config.n_window:,}, "
                f"RoPE distances up to {config.n_clamp:,}"
            )

    @contextmanager
    def live_table(self) -> Iterator[None]:
        """The table is on the screen, and stays there in its last state."""
        if not self._console.is_terminal:
            yield
            self._console.print(self._table())
            return
        with Live(console=self._console, get_renderable=self._table, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def update(self) -> None:
        """Something new was measured. A terminal draws the table by itself."""
        if self._live is not None:
            return
        readings = (("LM-Infinite", self._comparison.endless), ("full attention", self._comparison.full))
        for index, (name, reading) in enumerate(readings):
            finished = [bucket for bucket in reading.stream.buckets() if bucket.end <= reading.stream.n_read]
            for bucket in finished[self._n_reported[index] :]:
                self._line(
                    f"{name}, tokens {_range(bucket)}: loss {bucket.loss:.3f}, {bucket.tokens_per_second:.0f} tokens/s"
                )
            self._n_reported[index] = len(finished)

    def show_story(self, beginning: str, steps: Iterable[GenerationStep]) -> Iterator[GenerationStep]:
        """Prints a text as it is written, and hands the steps on."""
        for number, step in enumerate(steps):
            text = step.text if number else beginning.strip() + step.text
            self._console.print(text, end="", markup=False, soft_wrap=True)
            if step.finish_reason is not None:
                self._line(f"\n(written up to position {step.n_past:,}, {step.tokens_per_second:.0f} tokens/s)\n")
            yield step

    def show_conclusion(self) -> None:
        """The result in one sentence."""
        self._line(self._comparison.conclusion())

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        endless, full = self._comparison.endless, self._comparison.full
        table = Table(title="Loss in nats per token (lower is better)", title_justify="left")
        table.add_column("tokens so far", justify="right")
        for name in ("LM-Infinite", "full attention"):
            table.add_column(f"{name}\nloss", justify="right")
            table.add_column("\ntokens/s", justify="right")
        by_begin = [{bucket.begin: bucket for bucket in reading.stream.buckets()} for reading in (endless, full)]
        for begin in range(0, self._comparison.n_tokens, self._comparison.bucket):
            end = min(begin + self._comparison.bucket, self._comparison.n_tokens)
            cells = _cells(by_begin[0].get(begin), endless) + _cells(by_begin[1].get(begin), full)
            table.add_row(f"{end:,}", *cells)
        table.add_section()
        table.add_row("keys, values", human_bytes(endless.kv_bytes), "", human_bytes(full.kv_bytes), "")
        table.add_row("process in RAM", human_bytes(endless.resident_bytes), "", human_bytes(full.resident_bytes), "")
        return table


def _cells(bucket: Bucket | None, reading: Reading) -> tuple[str, str]:
    if bucket is not None:
        return f"{bucket.loss:.3f}", f"{bucket.tokens_per_second:.0f}"
    return ("context full", "") if reading.context_is_full else ("", "")


def _range(bucket: Bucket) -> str:
    return f"{bucket.begin:,} to {bucket.end:,}"
