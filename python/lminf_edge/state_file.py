"""Files that hold a saved state: written whole or not at all, and read only if nothing in them has changed.

Layout: magic, format version (u32), length of the header (u64), header (JSON), the sections that it lists one after the
other, and the BLAKE2b digest of everything before it. Numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lminf_edge.errors import StateError

MAGIC = b"\x93LMINF\r\n"
VERSION = 1
"""Of the layout and of what the header says."""

_PREFIX = struct.Struct("<8sIQ")
_N_DIGEST = 32
_N_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """What a file holds.

    Attributes:
        header: Plain data that says what the state belongs to.
        sections: Binary data by name.
    """

    header: Mapping[str, Any]
    sections: Mapping[str, bytes]


def write_state_file(path: str | os.PathLike[str], state: StateFile) -> None:
    """Writes a file: beside its place first, then moved there, so that an older one stays until this one is complete.

    Args:
        path: The file. Only its owner can read it.
        state: What to write.

    Raises:
        StateError: It cannot be written. An older file is as it was.
    """
    target = Path(path)
    sizes = [[name, len(data)] for name, data in state.sections.items()]
    header = json.dumps({**state.header, "sections": sizes}).encode()
    try:
        with _replaced(target) as stream:
            digest = hashlib.blake2b(digest_size=_N_DIGEST)
            for part in (_PREFIX.pack(MAGIC, VERSION, len(header)), header, *state.sections.values()):
                digest.update(part)
                stream.write(part)
            stream.write(digest.digest())
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise StateError(f"cannot save the state to {target}: {error}") from error


def read_state_file(path: str | os.PathLike[str]) -> StateFile:
    """Reads a file.

    Raises:
        StateError: It is missing, unreadable, no state file, of another version, cut off or damaged.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            return _read(file, stream)
    except FileNotFoundError as error:
        raise StateError(f"there is no file {file}") from error
    except (OSError, ValueError) as error:
        raise StateError(f"cannot read the state in {file}: {error}") from error


def _read(file: Path, stream: BinaryIO) -> StateFile:
    digest = hashlib.blake2b(digest_size=_N_DIGEST)
    n_bytes = os.fstat(stream.fileno()).st_size

    def take(n: int) -> bytes:
        if n > n_bytes - stream.tell() - _N_DIGEST:
            raise StateError(f"{file} is cut off: it has {n_bytes:,} bytes, and more were written")
        data = stream.read(n)
        digest.update(data)
        return data

    beginning = stream.read(len(MAGIC))
    if beginning != MAGIC:
        raise StateError(f"{file} is not a saved state of lminf-edge")
    stream.seek(0)
    _, version, n_header = _PREFIX.unpack(take(_PREFIX.size))
    if version != VERSION:
        raise StateError(
            f"{file} was saved in version {version} of the format, this lminf-edge reads version {VERSION}"
        )
    raw = take(n_header)
    try:
        header = json.loads(raw)
        sizes = [(str(name), int(n)) for name, n in header.pop("sections")]
        sections = {name: take(n) for name, n in sizes}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{file} is damaged: its header cannot be read") from error
    if stream.read() != digest.digest():
        raise StateError(f"{file} is damaged: its checksum is wrong")
    return StateFile(header=header, sections=sections)


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's place once it is complete and on the disk."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a power failure, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """Tells model files apart without reading them whole: a digest of size, beginning and 256 samples.

    Args:
        path: The model file.

    Raises:
        StateError: It cannot be read any more.
    """
    try:
        with Path(path).open("rb") as stream:
            n_bytes = os.fstat(stream.fileno()).st_size
            digest = hashlib.blake2b(str(n_bytes).encode(), digest_size=16)
            digest.update(stream.read(_N_BLOCK))
            for index in range(256):
                stream.seek(n_bytes * index // 256)
                digest.update(stream.read(4096))
    except OSError as error:
        raise StateError(f"cannot read the model file {path}: {error}") from error
    return digest.hexdigest()
