"""Tokens of texts of any length, read as they are needed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from io import TextIOBase
from pathlib import Path

import numpy as np

from lminf_edge._library import _core
from lminf_edge.errors import LMInfError
from lminf_edge.gguf_file import check_gguf_file
from lminf_edge.tokens import TokenArray

_N_CHARACTERS = 1 << 18
"""How much of a text is tokenised at once."""


class TokenSource:
    """Tokens of a text that is read while they are taken: memory does not grow with the text.

    Attributes:
        n_taken: Tokens taken so far.
    """

    def __init__(self, vocabulary: _core.Model, texts: Iterable[str]) -> None:
        """Nothing is read yet.

        Args:
            vocabulary: The model whose tokens these are; its weights are not needed.
            texts: The text in pieces.
        """
        self.n_taken = 0
        self._pieces = _tokenized(vocabulary, texts)
        self._ahead: TokenArray = np.empty(0, np.int32)
        self._digest = hashlib.blake2b(digest_size=16)

    def take(self, n: int) -> TokenArray:
        """The next n tokens; fewer at the end of the text."""
        self._look_ahead(n)
        taken, self._ahead = self._ahead[:n], self._ahead[n:]
        self._digest.update(taken.tobytes())
        self.n_taken += taken.size
        return taken

    def peek(self) -> int | None:
        """The next token, which is not taken. None at the end."""
        self._look_ahead(1)
        return int(self._ahead[0]) if self._ahead.size else None

    def digest(self) -> str:
        """Of all tokens that were taken."""
        return self._digest.hexdigest()

    def _look_ahead(self, n: int) -> None:
        while self._ahead.size < n:
            piece = next(self._pieces, None)
            if piece is None:
                return
            self._ahead = np.concatenate([self._ahead, piece])


def vocabulary_of(model_path: str | Path) -> _core.Model:
    """A model without its weights.

    Raises:
        ModelLoadError, UnsupportedModelError: As for `Llama`.
    """
    return _core.Model(str(check_gguf_file(model_path)), vocab_only=True)


def text_pieces(stream: TextIOBase, name: str) -> Iterator[str]:
    """A text in pieces that end where tokens do.

    Args:
        stream: Where to read.
        name: What to call it in errors.

    Raises:
        LMInfError: It cannot be read, or is no UTF-8.
    """
    rest = ""
    while True:
        try:
            read = stream.read(_N_CHARACTERS)
        except (OSError, UnicodeDecodeError) as error:
            raise LMInfError(f"cannot read the text {name}: {error}") from error
        if not read:
            break
        rest += read
        end = _last_boundary(rest)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _last_boundary(text: str) -> int:
    """Where a text can be cut without changing its tokens: before a single line feed or space, near its end.

    Tokenisers that join runs of white space, or take a space as the beginning of a word, split a text there anyway.
    """
    for pattern in (r"(?s)(.*\S)\n\S", r"(?s)(.*\S) \S"):
        if found := re.match(pattern, text):
            return found.end(1)
    return len(text)


def json_documents(stream: Iterable[str], name: str, field: str) -> Iterator[str]:
    """The texts of a file of JSON lines.

    Args:
        stream: Its lines.
        name: What to call it in errors.
        field: Which field of a line is the text.

    Raises:
        LMInfError: A line is no JSON, or has no such text.
    """
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, RecursionError) as error:
            raise LMInfError(f"{name}, line {number}: no JSON: {error}") from error
        except (LookupError, TypeError) as error:
            raise LMInfError(f"{name}, line {number}: no field {field!r}") from error
        if not isinstance(text, str):
            raise LMInfError(f"{name}, line {number}: {field!r} is no text")
        yield text


def _tokenized(vocabulary: _core.Model, texts: Iterable[str]) -> Iterator[TokenArray]:
    first = True
    for text in texts:
        # lone surrogates, which JSON can spell, are no UTF-8
        yield vocabulary.tokenize(text.encode(errors="replace"), first, False)
        first = False
