"""`lminf-edge demo`: one text, read with LM-Infinite and with full attention, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated

import typer

from lminf_edge.cli._demo_screen import DemoScreen
from lminf_edge.cli._options import AsJson, ModelOptions, WindowOptions, with_option_groups
from lminf_edge.cli._terminal import find_model, messages, output, with_exit_codes
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.comparison import Comparison, Reading
from lminf_edge.evaluation.reader import ReaderOptions, StreamReader
from lminf_edge.evaluation.texts import python_documentation, text_file, tokenize_text
from lminf_edge.records import GenerationStep

STORY_BEGINNING = "\n\nOnce upon a time, in a small village at the edge of a great forest, there lived"


@with_exit_codes
@with_option_groups
def demo(
    *,
    text: Annotated[str | None, typer.Option(help="Text file to read. Default: Python's documentation.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to read.")] = 12288,
    story: Annotated[int, typer.Option(min=0, help="Tokens to write afterwards.")] = 200,
    as_json: AsJson = False,
    model: ModelOptions,
    window: WindowOptions,
) -> None:
    """Reads a long text with LM-Infinite, then with full attention, and writes a story on.

    The window is an eighth of the trained length, at most 1024, unless you choose another one.
    """
    path = find_model(model.model)
    config = window.config()
    tokenized = tokenize_text(path, text_file(text) if text else python_documentation())
    if len(tokenized.tokens) < tokens:
        raise ConfigError(f"--tokens {tokens}: the text has only {len(tokenized.tokens)} tokens")
    if config.n_window is None:
        config = replace(config, n_window=max(1, min(1024, tokenized.n_ctx_train // 8)))
    options = ReaderOptions(
        model_path=path,
        lminf=config,
        n_ubatch=model.n_ubatch,
        n_threads=model.threads,
        n_gpu_layers=model.gpu_layers,
        cache_type=model.cache_type,
    )
    comparison = Comparison(tokens, tokenized.n_ctx_train, bucket=max(1, min(2048, tokenized.n_ctx_train // 4)))
    _compare(tokenized.tokens[:tokens], story, options, comparison, as_json)


def _compare(tokens: list[int], n_story: int, options: ReaderOptions, comparison: Comparison, as_json: bool) -> None:
    screen = DemoScreen(messages if as_json else output, comparison)
    with StreamReader(options) as endless:
        screen.show_settings(options, endless.status)
        with screen.live_table():
            for _ in _read(endless, tokens, comparison.endless):
                screen.update()
            plain = replace(options, lminf=None, n_ctx=min(len(tokens), comparison.n_ctx_train))
            with StreamReader(plain) as full:
                for _ in _read(full, tokens, comparison.full):
                    screen.update()
        written = []
        if n_story:
            steps = endless.write(STORY_BEGINNING, n_story, temperature=0.8, repeat_penalty=1.15, seed=1)
            written = list(screen.show_story(STORY_BEGINNING, steps))
    screen.show_conclusion()
    if as_json:
        print(json.dumps(_to_json(options, endless, comparison, written), indent=2))


def _read(reader: StreamReader, tokens: list[int], reading: Reading) -> Iterator[None]:
    reading.add(reader.status)
    for status in reader.read(tokens):
        reading.add(status)
        yield


def _to_json(
    options: ReaderOptions, endless: StreamReader, comparison: Comparison, written: list[GenerationStep]
) -> dict[str, object]:
    config = endless.status.lminf
    return {
        "model": str(options.model_path),
        "n_tokens": comparison.n_tokens,
        "n_ctx_train": comparison.n_ctx_train,
        "bucket": comparison.bucket,
        "cache_type": options.cache_type,
        "lminf": asdict(config) if config else None,
        "endless": comparison.endless.to_json(),
        "full": comparison.full.to_json(),
        "story": {
            "text": STORY_BEGINNING + "".join(step.text for step in written),
            "n_tokens": len(written),
            "tokens_per_second": written[-1].tokens_per_second if written else None,
            "n_past": written[-1].n_past if written else None,
        },
        "conclusion": comparison.conclusion(),
    }
