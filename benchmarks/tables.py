"""What the benchmark scripts share: the model, the text, and tables for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lminf_edge.evaluation.texts import text_file, tokenize_text
from lminf_edge.models import resolve_model


def open_model_path(spec: str | None) -> Path:
    """The model's file; None is the default model, which is downloaded if it is not there yet."""
    return Path(resolve_model(spec))


def text_tokens(model: Path, text: str | Path, n_tokens: int) -> list[int]:
    """The first tokens of a text file in the model's vocabulary."""
    tokens = tokenize_text(model, text_file(text)).tokens
    if len(tokens) < n_tokens:
        raise SystemExit(f"{text} has only {len(tokens)} tokens, {n_tokens} are needed")
    return tokens[:n_tokens]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
