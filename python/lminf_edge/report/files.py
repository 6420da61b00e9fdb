"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lminf_edge.errors import LMInfError


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then moves it there: an older one stays until this one is complete.

    Raises:
        LMInfError: It cannot be written. An older file is as it was.
    """
    if path.is_dir():
        raise LMInfError(f"cannot write {path}: it is a folder")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            part.chmod(0o666 & ~_umask())  # mkstemp lets only the owner read
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise LMInfError(f"cannot write {path}: {error}") from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are not there.

    Raises:
        LMInfError: It cannot be made, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise LMInfError(f"cannot make the folder {path}: {error}") from error


def _umask() -> int:
    """What the system takes from the rights of new files; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
