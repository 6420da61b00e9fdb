"""What a model file must be before llama.cpp is asked to load it."""

from __future__ import annotations

import os
from pathlib import Path

from lminf_edge.errors import ModelLoadError

MAGIC = b"GGUF"
_N_HEADER = 24  # magic, version (32 bits), number of tensors and of metadata entries (64 bits each)


def check_gguf_file(path: str | os.PathLike[str]) -> Path:
    """Finds the usual mistakes, in words that help more than llama.cpp's.

    Args:
        path: The file.

    Returns:
        The same path.

    Raises:
        ModelLoadError: It is missing, a folder, unreadable, empty, cut off in its header, or no GGUF file.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise ModelLoadError(f"{file} is a folder, not a GGUF file")
        with file.open("rb") as stream:
            header = stream.read(_N_HEADER)
    except FileNotFoundError as error:
        raise ModelLoadError(f"there is no file {file}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ModelLoadError(f"cannot read {file}: {error}") from error
    if not header:
        raise ModelLoadError(f"{file} is empty")
    if not header.startswith(MAGIC):
        raise ModelLoadError(f"{file} is not a GGUF file: it begins with {header[:4]!r}, not {MAGIC!r}")
    if len(header) < _N_HEADER:
        raise ModelLoadError(f"{file} is cut off: its header has {len(header)} of {_N_HEADER} bytes")
    return file
