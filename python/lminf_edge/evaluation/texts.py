"""English texts to measure with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lminf_edge._library import _core
from lminf_edge.errors import LMInfError, ModelLoadError
from lminf_edge.gguf_file import check_gguf_file

_MIN_WORDS = 12
"""A shorter paragraph is a heading, a grammar rule or a line of code."""


def python_documentation() -> str:
    """The prose of Python's language reference, which comes with every Python: some 35,000 words.

    The topics of `help()` are taken in alphabetical order and every paragraph once, without code, tables and markup.

    Raises:
        LMInfError: This Python came without its standard library's `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LMInfError("this Python has no pydoc_data.topics; name a text file instead") from error
    paragraphs: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            paragraph = _plain_prose(block)
            if paragraph is not None:
                paragraphs.setdefault(paragraph)
    return "\n\n".join(paragraphs)


def text_file(path: str | Path) -> str:
    """A text file in UTF-8.

    Raises:
        LMInfError: It cannot be read, is no UTF-8, or holds nothing.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LMInfError(f"cannot read the text {path}: {error}") from error
    if not text.strip():
        raise LMInfError(f"the text {path} is empty")
    return text


@dataclass(frozen=True)
class Tokenized:
    """A text in a model's tokens.

    Attributes:
        tokens: Token ids, with the begin-of-text token if the model wants one.
        n_ctx_train: Length that the model was trained on.
    """

    tokens: list[int]
    n_ctx_train: int


def tokenize_text(model_path: str | Path, text: str) -> Tokenized:
    """Splits a text into a model's tokens without loading its weights.

    Raises:
        ModelLoadError, UnsupportedModelError: As for `Llama`, or the file does not tell the trained length.
    """
    vocabulary = _core.Model(str(check_gguf_file(model_path)), vocab_only=True)
    n_ctx_train = trained_length(vocabulary, model_path)
    return Tokenized(vocabulary.tokenize(text.encode(), True, False).tolist(), n_ctx_train)


def trained_length(vocabulary: _core.Model, model_path: str | Path) -> int:
    """Length that a model was trained on, in tokens.

    Args:
        vocabulary: The model without its weights: llama.cpp does not look at this entry of its metadata then.
        model_path: What to call it in the error.

    Raises:
        ModelLoadError: The file does not tell.
    """
    metadata = vocabulary.metadata
    n_ctx_train = int(metadata.get(f"{metadata['general.architecture']}.context_length", "0"))
    if n_ctx_train < 1:
        raise ModelLoadError(f"{model_path} does not say on which length the model was trained")
    return n_ctx_train


def _plain_prose(block: str) -> str | None:
    """A paragraph of reStructuredText in one line, or None if it is no prose."""
    lines = [re.sub(r"^\s*(?:[*-]|\d+\.|#\.)\s+", "", line.rstrip()) for line in block.splitlines()]
    text = " ".join(line.strip() for line in lines)
    if re.search(r"::=|>>>|^\.\. |[-=+|~^]{4}", text) or not re.search(r"[.:]$", text):
        return None
    text = re.sub(r"``?([^`]*)``?", r"\1", text)
    text = re.sub(r"\*{1,2}(\S(?:[^*]*\S)?)\*{1,2}", r"\1", text)
    text = re.sub(r"\s*\[\d+\]_?", "", text)
    text = re.sub(r"\s+", " ", text).strip().replace("::", ":")
    words = text.split()
    wordlike = sum(bool(re.fullmatch(r"[\"'(]*[A-Za-z][A-Za-z'-]*[\"').,;:!?]*", word)) for word in words)
    is_prose = len(words) >= _MIN_WORDS and wordlike >= 0.8 * len(words) and text[0].isupper()
    return text if is_prose else None
