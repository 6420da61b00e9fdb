"""What is read to measure loss by position, and how it is summed up."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path
from typing import cast

from lminf_edge._checks import check_int, check_optional_int
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.methods import MethodSetup, Pass
from lminf_edge.evaluation.results import file_sha256
from lminf_edge.evaluation.texts import python_documentation

Progress = Callable[[int, int | None], object]
"""Called with the tokens read so far, and those in all if that is known."""

FRESH = "fresh"
"""LM-Infinite begun anew for each part beyond the trained length: what a part's loss is where no position is new."""

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class PplSettings:
    """What is read, and how it is summed up.

    Attributes:
        setup: The methods.
        text: Path of a text, or of JSON lines if it ends with .jsonl; "-": standard input; None: Python's
            documentation.
        text_sha256: What is in the file.
        n_tokens: Tokens to read, of each document if there are several. None: all.
        bucket: Positions in each bucket.
        full_tokens: Length at which full attention ends. None: twice the trained length.
        fresh: Read each bucket beyond the trained length with a new sequence, too.
        documents: Documents to read from JSON lines. None: all.
        min_tokens: Shorter documents are left out.
        concatenate: JSON lines are one text.
        field: Field of JSON lines that is the text.

    Raises:
        ConfigError: A value is out of range.
    """

    setup: MethodSetup
    text: str | None = None
    text_sha256: str | None = None
    n_tokens: int | None = None
    bucket: int = 4096
    full_tokens: int | None = None
    fresh: bool = False
    documents: int | None = None
    min_tokens: int = 2
    concatenate: bool = False
    field: str = "text"

    def __post_init__(self) -> None:
        check_optional_int("n_tokens", self.n_tokens, 2)
        check_int("bucket", self.bucket, 2)
        check_optional_int("full_tokens", self.full_tokens, 1)
        check_optional_int("documents", self.documents, 1)
        check_int("min_tokens", self.min_tokens, 2)
        if self.text is None and self.concatenate:
            raise ConfigError("concatenate: only JSON lines hold several texts")

    @property
    def is_json_lines(self) -> bool:
        """Whether the text is a file of JSON lines."""
        return self.text is not None and self.text.endswith(".jsonl")

    def passes(self) -> list[Pass]:
        """Those of the setup, and the fresh ones."""
        fresh = [Pass(method=FRESH, cache_type=kind) for kind in self.setup.cache_types if self.fresh]
        return self.setup.passes() + fresh


def text_identity(text: str | None) -> tuple[str | None, str | None]:
    """What settings hold of a text: absolute path and SHA-256 of a file.

    Raises:
        LMInfError: It cannot be read.
    """
    if text is None or text == STDIN:
        return text, None
    return str(Path(text).resolve()), file_sha256(text)


def check_text(settings: PplSettings) -> None:
    """Raises LMInfError if the text is not what it was when the settings were made."""
    if settings.text_sha256 is not None and settings.text is not None:
        found = file_sha256(settings.text)
        if found != settings.text_sha256:
            raise LMInfError(f"{settings.text} has changed: its SHA-256 is {found}, not {settings.text_sha256}")


@contextmanager
def opened_text(settings: PplSettings) -> Iterator[TextIOBase]:
    """The text as a stream, which is closed in the end."""
    if settings.text is None:
        yield io.StringIO(python_documentation())
    elif settings.text == STDIN:
        yield cast(TextIOBase, sys.stdin)
    else:
        with Path(settings.text).open(encoding="utf-8") as stream:
            yield stream
