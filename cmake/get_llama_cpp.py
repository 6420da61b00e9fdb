"""Obtains llama.cpp for the build: finds the pinned source, verifies it, extracts it and applies our patch.

CMakeLists.txt runs ``prepare``. A developer runs ``update-patch`` after editing an extracted tree, and ``update-lock``
after editing the patch by hand. Every failure ends with a message that says what to do; nothing is ever half applied.

Standard library only: this runs before anything of ours is installed. git and patch need not be there either, and git
must not be used: inside another repository's build folder ``git apply`` reports success and changes nothing.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
LOCK_PATH = HERE / "llama.cpp.lock.json"
PATCH_PATH = HERE.parent / "src" / "patches" / "llama.cpp.patch"

SUBDIRECTORY = "vendor/llama.cpp"
# What libllama, ggml and the extension are built from. The rest (models, tools, documentation) is most of the tree.
NEEDED = ("CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "src", "vendor")
STAMP = ".lminf-complete"


class BuildError(Exception):
    """A failure whose message says what to do."""


@dataclass
class Lock:
    """What the build trusts: hashes of the source and of the patch, and of each touched file before and after it."""

    name: str
    version: str
    sdist_sha256: str
    tree_sha256: str
    patch_sha256: str
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Lock:
        return Lock(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")

    @property
    def sdist_name(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


# --- hashes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_files(root: Path) -> list[str]:
    """Returns the needed files of a llama.cpp tree as sorted relative paths. Dot files play no part in a build."""
    found = []
    for top in NEEDED:
        for path in [root / top, *(root / top).rglob("*")]:
            relative = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                found.append(relative.as_posix())
    return sorted(found)


def sha256_of_tree(root: Path) -> str:
    """Returns the hash of the tree's needed files: what ``sha256sum`` prints for them, hashed once more."""
    return sha256("".join(f"{sha256_of_file(root / path)}  {path}\n" for path in tree_files(root)).encode())


# --- patch


@dataclass
class Hunk:
    start: int  # index of the first line that is replaced
    start_after: int  # the same in the patched file
    before: list[bytes]
    after: list[bytes]


HUNK_HEADER = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def split_lines(data: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def parse_patch(patch: bytes) -> dict[str, list[Hunk]]:
    """Parses a unified diff that changes existing files only; lines before its first file are commentary."""
    files: dict[str, list[Hunk]] = {}
    lines = split_lines(patch)
    at = 0
    path = None
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"--- "):
            old, new = (header[4:].split(b"\t")[0].strip().decode() for header in [*lines, b""][at : at + 2])
            path = old[2:]
            inside = not {"", ".."} & set(path.split("/"))
            if old != f"a/{path}" or new != f"b/{path}" or not inside or path in files:
                raise BuildError(f"line {at + 1}: only changes of existing files, each named once, are allowed")
            files[path] = []
            at += 2
        elif line.startswith(b"@@"):
            header = HUNK_HEADER.match(line)
            if header is None or path is None:
                raise BuildError(f"line {at + 1}: not a hunk of a unified diff")
            start, n_before, start_after, n_after = (int(n) if n is not None else 1 for n in header.groups())
            # a range of no lines names the line before it
            hunk = Hunk(start - (n_before > 0), start_after - (n_after > 0), [], [])
            at += 1
            while len(hunk.before) < n_before or len(hunk.after) < n_after:
                mark, text = (lines[at][:1], lines[at][1:]) if at < len(lines) else (b"", b"")
                if mark not in (b" ", b"-", b"+"):
                    raise BuildError(f"line {at + 1}: the hunk ends before its line counts are reached")
                if mark != b"+":
                    hunk.before.append(text)
                if mark != b"-":
                    hunk.after.append(text)
                at += 1
            if (len(hunk.before), len(hunk.after)) != (n_before, n_after):
                raise BuildError(f"line {at}: the hunk has other line counts than its header says")
            files[path].append(hunk)
        elif path is not None and not line.startswith((b"diff --git ", b"index ")):
            raise BuildError(f"line {at + 1}: neither part of a hunk nor the begin of a file")
        else:
            at += 1
    return files


def apply_patch(patch: bytes, tree: Path) -> None:
    """Applies a patch where its line numbers say and where every context line fits, or raises and changes nothing."""
    patched_files = {}
    for path, hunks in parse_patch(patch).items():
        if not (tree / path).is_file():
            raise BuildError(f"{path} does not exist")
        lines = split_lines((tree / path).read_bytes())
        patched: list[bytes] = []
        done = 0
        for number, hunk in enumerate(hunks, 1):
            end = hunk.start + len(hunk.before)
            patched += lines[done : hunk.start]
            fits = hunk.start >= done and lines[hunk.start : end] == hunk.before and len(patched) == hunk.start_after
            if not fits:
                raise BuildError(f"{path}: hunk {number} does not fit at line {hunk.start + 1}")
            patched += hunk.after
            done = end
        patched_files[path] = b"".join(patched + lines[done:])
    for path, data in patched_files.items():
        (tree / path).write_bytes(data)


# --- source


def cache_folder() -> Path:
    """Returns the folder that keeps downloads from one build to the next."""
    if named := os.environ.get("LMINF_DOWNLOAD_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lminf-edge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "lminf-edge" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lminf-edge"


def pip_download(requirement: str, name: str, folder: Path) -> None:
    """Downloads a source distribution with the user's own pip settings (indexes, proxies, mirrors)."""
    options = ["--no-deps", "--no-binary", name, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode != 0:
        raise BuildError("\n".join(result.stdout.splitlines()[-15:]))


def obtain_sdist(lock: Lock) -> Path:
    """Returns the verified source distribution: from the download cache, else by ``pip download``."""
    cached = cache_folder() / lock.sdist_name
    if cached.is_file():
        if (actual := sha256_of_file(cached)) != lock.sdist_sha256:
            raise BuildError(
                f"{cached} is not the pinned {lock.name} {lock.version}.\n"
                f"  SHA-256 expected {lock.sdist_sha256}\n  SHA-256 found    {actual}\n"
                "Delete this file and build again."
            )
        return cached

    cached.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"{lock.name}=={lock.version}"
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cached.parent) as partial:
        try:
            pip_download(requirement, lock.name, Path(partial))
        except BuildError as error:
            raise BuildError(
                f"Could not download {lock.name} {lock.version} (the source of llama.cpp) with pip:\n\n{error}\n\n"
                "With a network connection, build again. Without one, get the file on another machine with\n"
                f"  python -m pip download --no-deps --no-binary {lock.name} {requirement}\n"
                f"and put it here as\n  {cached}\n"
                "or name an extracted copy of it in the environment variable LMINF_LLAMA_CPP_SOURCE."
            ) from None
        downloaded = Path(partial) / lock.sdist_name
        actual = sha256_of_file(downloaded) if downloaded.is_file() else "no such file"
        if actual != lock.sdist_sha256:
            raise BuildError(
                f"pip downloaded a {lock.sdist_name} that is not the pinned one.\n"
                f"  SHA-256 expected {lock.sdist_sha256}\n  SHA-256 found    {actual}\n"
                "Check which package index pip is configured to use, then build again."
            )
        downloaded.replace(cached)  # atomic: another build sees the whole file or none
    return cached


def extract_sdist(sdist: Path, into: Path) -> None:
    """Extracts the needed part of vendor/llama.cpp: plain files only, each below ``into``."""
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]
            inside = parts[:2] == tuple(SUBDIRECTORY.split("/")) and len(parts) > 2 and parts[2] in NEEDED
            if not inside or ".." in parts or not member.isfile():
                continue
            target = into.joinpath(*parts[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            data = archive.extractfile(member)
            assert data is not None
            with target.open("wb") as file:
                shutil.copyfileobj(data, file)


def copy_source(named: Path, into: Path) -> None:
    """Copies the needed part of a source tree: the source distribution's root, or vendor/llama.cpp itself."""
    root = next((tree for tree in (named / SUBDIRECTORY, named) if (tree / "src" / "llama.cpp").is_file()), None)
    if root is None:
        raise BuildError(
            f"LMINF_LLAMA_CPP_SOURCE names {named}, and there is no llama.cpp source tree there.\n"
            f"Name the folder of the extracted source distribution, or its {SUBDIRECTORY}, or unset the variable."
        )
    for path in tree_files(root):
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target)


def obtain_source(lock: Lock, into: Path) -> None:
    """Fills ``into`` with the pinned, unpatched llama.cpp."""
    if named := os.environ.get("LMINF_LLAMA_CPP_SOURCE"):
        copy_source(Path(named).expanduser(), into)
        origin = f"LMINF_LLAMA_CPP_SOURCE ({named})"
        advice = f"Name an unmodified extraction of {lock.sdist_name}, or unset the variable."
    else:
        sdist = obtain_sdist(lock)
        extract_sdist(sdist, into)
        origin, advice = str(sdist), "Is cmake/llama.cpp.lock.json as committed? Restore it and build again."
    if (actual := sha256_of_tree(into)) != lock.tree_sha256:
        raise BuildError(
            f"The llama.cpp source from {origin} is not the pinned {lock.name} {lock.version}.\n"
            f"  hash of the tree expected {lock.tree_sha256}\n  hash of the tree found    {actual}\n{advice}"
        )


# --- commands


def patch_id(lock: Lock, patch: bytes) -> str:
    """Returns the identity of the patched llama.cpp, as ``lminf_edge._core.patch_id()`` reports it."""
    return sha256(lock.sdist_sha256.encode() + patch)


def check_touched(lock: Lock, tree: Path, when: str) -> None:
    for path, hashes in lock.files.items():
        if not (tree / path).is_file() or sha256_of_file(tree / path) != hashes[when]:
            raise BuildError(f"{path} is not what cmake/llama.cpp.lock.json says it is {when} the patch")


def patch_source(lock: Lock, patch: bytes, tree: Path) -> None:
    """Applies the patch and proves by the hashes of the touched files that it did what it does everywhere else."""
    try:
        if sha256(patch) != lock.patch_sha256 or parse_patch(patch).keys() != lock.files.keys():
            raise BuildError("the patch is not the one that cmake/llama.cpp.lock.json was made for")
        check_touched(lock, tree, "before")
        apply_patch(patch, tree)
        check_touched(lock, tree, "after")
    except BuildError as error:
        raise BuildError(
            f"The llama.cpp patch did not apply: {error}.\n"
            "If you changed src/patches/llama.cpp.patch, run\n  python cmake/get_llama_cpp.py update-lock\n"
            "and build again; if not, restore src/patches and cmake/ from version control."
        ) from None


def stamp_text(folder: Path) -> str:
    """Returns what identifies a finished extraction: its content, and how much of llama.cpp it was meant to be."""
    return f"{sha256_of_tree(folder)} {' '.join(NEEDED)}\n"


def check_complete(folder: Path) -> None:
    """Raises unless ``folder`` is, byte for byte, what a finished extraction left there."""
    stamp = folder / STAMP
    if not stamp.is_file():
        problem = "is a half-finished extraction of llama.cpp"
    elif stamp.read_text(encoding="utf-8") != stamp_text(folder):
        problem = "was changed after llama.cpp was extracted to it, or extracted for an earlier version of this build"
    else:
        return
    raise BuildError(
        f"{folder} {problem}.\nDelete that folder and build again. "
        "To keep changes made there in our patch, first run\n"
        f"  python cmake/get_llama_cpp.py update-patch {folder}"
    )


def prepare(into: Path, lock: Lock, patch: bytes | None) -> Path:
    """Returns a folder below ``into`` with the pinned llama.cpp, patched unless ``patch`` is None.

    The folder is named by the hash of source and patch and appears whole: it is made under another name, stamped, and
    renamed last.
    """
    key = f"stock-{lock.sdist_sha256[:12]}" if patch is None else patch_id(lock, patch)[:12]
    folder = into / f"llama.cpp-{key}"
    if folder.exists():
        check_complete(folder)
        return folder

    into.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=into))
    try:
        obtain_source(lock, partial)
        if patch is not None:
            patch_source(lock, patch, partial)
        (partial / STAMP).write_text(stamp_text(partial), encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp makes private folders
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def update_lock(lock: Lock, patch: bytes) -> Lock:
    """Returns the lock for a changed patch, or for a changed ``version`` and ``sdist_sha256``."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        extract_sdist(obtain_sdist(lock), tree)
        tree_sha256 = sha256_of_tree(tree)
        touched = sorted(parse_patch(patch))
        before = {path: sha256_of_file(tree / path) for path in touched if (tree / path).is_file()}
        apply_patch(patch, tree)
        files = {path: {"before": before[path], "after": sha256_of_file(tree / path)} for path in touched}
    return Lock(lock.name, lock.version, lock.sdist_sha256, tree_sha256, sha256(patch), files)


def diff_trees(before: Path, after: Path) -> bytes:
    """Returns the patch that turns one tree into the other."""
    patch: list[bytes] = []
    for path in tree_files(before):
        old, new = (before / path).read_bytes(), (after / path).read_bytes()
        if old != new:
            name = path.encode()
            patch += difflib.diff_bytes(
                difflib.unified_diff, split_lines(old), split_lines(new), b"a/" + name, b"b/" + name
            )
    return b"".join(patch)


def make_patch(lock: Lock, edited: Path) -> bytes:
    """Returns the difference between the pinned llama.cpp and an edited copy of it."""
    with tempfile.TemporaryDirectory() as temporary:
        extract_sdist(obtain_sdist(lock), Path(temporary))
        if tree_files(Path(temporary)) != tree_files(edited):
            raise BuildError(f"{edited} has other files than the pinned llama.cpp: only existing ones may change")
        return diff_trees(Path(temporary), edited)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lock", type=Path, default=LOCK_PATH)
    parser.add_argument("--patch", type=Path, default=PATCH_PATH)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="extract and patch; print the folder")
    command.add_argument("--into", type=Path, required=True, help="where the folder is made")
    command.add_argument("--stock", action="store_true", help="no patch")
    commands.add_parser("update-lock", help="write the lock for the patch as it is now")
    command = commands.add_parser("update-patch", help="write patch and lock from an edited llama.cpp tree")
    command.add_argument("tree", type=Path)
    options = parser.parse_args(arguments)

    try:
        lock = Lock.load(options.lock)
        if options.command == "prepare":
            patch = None if options.stock else options.patch.read_bytes()
            print(prepare(options.into.resolve(), lock, patch).as_posix())
        else:
            if options.command == "update-patch":
                options.patch.write_bytes(make_patch(lock, options.tree))
            update_lock(lock, options.patch.read_bytes()).save(options.lock)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
