"""How the build obtains llama.cpp: each thing that can be wrong stops it, with a message that says what to do.

All but the last tests run on a tiny source distribution of their own; nothing is compiled.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import build_id
import get_llama_cpp as build
from lminf_edge import lib_path
from lminf_edge._library import _core
from stock import tool

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "CMakeLists.txt": "project(llama.cpp)\n",
    "src/llama.cpp": "".join(f"line {i}\n" for i in range(1, 21)),
    "src/other.cpp": "other\n",
    "models/huge.gguf": "not needed\n",
}
PATCH = b"""\
--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -2,3 +2,4 @@
 line 2
 line 3
+hook
 line 4
@@ -10,2 +11,2 @@
-line 10
+line ten
 line 11
"""
OUT_OF_ORDER = b"""\
--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -10,2 +10,2 @@
-line 10
+line ten
 line 11
@@ -2,2 +12,3 @@
 line 2
+hook
 line 3
"""
PATCHED = FILES["src/llama.cpp"].replace("line 3\n", "line 3\nhook\n").replace("line 10\n", "line ten\n")


@dataclass
class Pinned:
    """A source distribution in the download cache, a patch, and the lock that belongs to them."""

    lock: build.Lock
    sdist: Path
    into: Path

    def prepare(self, patch: bytes | None = PATCH) -> Path:
        return build.prepare(self.into, self.lock, patch)


def write_sdist(path: Path, extra: Callable[[tarfile.TarFile, str], None] = lambda archive, root: None) -> None:
    root = "llama_cpp_python-1.0/vendor/llama.cpp/"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            info = tarfile.TarInfo(root + name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        extra(archive, root)


def no_download(*_: object) -> None:
    raise build.BuildError("ERROR: no network in this test")


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pinned:
    monkeypatch.setenv("LMINF_DOWNLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LMINF_LLAMA_CPP_SOURCE", raising=False)
    monkeypatch.setattr(build, "pip_download", no_download)
    sdist = tmp_path / "cache" / "llama_cpp_python-1.0.tar.gz"
    sdist.parent.mkdir()
    write_sdist(sdist)
    lock = build.Lock("llama-cpp-python", "1.0", build.sha256_of_file(sdist), "", "")
    return Pinned(build.update_lock(lock, PATCH), sdist, tmp_path / "build")


def assert_nothing_left(pinned: Pinned) -> None:
    assert not pinned.into.exists() or list(pinned.into.iterdir()) == []


# --- the good case


def test_source_is_extracted_and_patched(pinned: Pinned) -> None:
    folder = pinned.prepare()
    assert (folder / "src/llama.cpp").read_text() == PATCHED
    assert (folder / "src/other.cpp").read_text() == FILES["src/other.cpp"]
    assert not (folder / "models").exists()
    assert list(pinned.into.iterdir()) == [folder]


def test_stock_source_is_not_patched(pinned: Pinned) -> None:
    assert (pinned.prepare(None) / "src/llama.cpp").read_text() == FILES["src/llama.cpp"]


def test_a_complete_extraction_is_used_again(pinned: Pinned) -> None:
    folder = pinned.prepare()
    pinned.sdist.unlink()
    assert pinned.prepare() == folder


def test_another_patch_gets_another_folder_and_id(pinned: Pinned) -> None:
    patch = PATCH.replace(b"+hook", b"+other hook")
    other = replace(pinned, lock=build.update_lock(pinned.lock, patch))
    assert other.prepare(patch) != pinned.prepare()
    assert build.patch_id(other.lock, patch) != build.patch_id(pinned.lock, PATCH)


def test_update_patch_turns_edits_into_the_patch(pinned: Pinned) -> None:
    edited = pinned.prepare()
    patch = build.make_patch(pinned.lock, edited)
    build.update_lock(pinned.lock, patch)
    again = pinned.prepare(None)
    build.apply_patch(patch, again)
    assert (again / "src/llama.cpp").read_text() == PATCHED


# --- the patch


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b" line 4\n", b" line four\n"),  # another context: no fuzz
        (b"-line 10\n", b"-line zehn\n"),  # another line to remove
        (b"@@ -2,3 +2,4 @@", b"@@ -3,3 +3,4 @@"),  # the right text one line off: no search
        (b"@@ -10,2 +11,2 @@", b"@@ -10,2 +10,2 @@"),  # the hunks do not add up
        (b"@@ -10,2 +11,2 @@", b"@@ -10,3 +11,3 @@"),  # a hunk is cut short
        (b"@@ -10,2 +11,2 @@", b"@@ -10,1 +11,1 @@"),  # a line too many after the hunk
        (b"@@ -10,2 +11,2 @@", b"@@ -10,1 +11,2 @@"),  # a line too many in it
        (b"src/llama.cpp", b"src/absent.cpp"),
        (b"src/llama.cpp", b"src/../src/llama.cpp"),
        (b"src/llama.cpp", b"/src/llama.cpp"),
        (b"--- a/src/llama.cpp", b"--- /dev/null"),
        (PATCH, PATCH[: PATCH.index(b"+++")]),
        (PATCH, PATCH + PATCH),
        (PATCH, OUT_OF_ORDER),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_whole(pinned: Pinned, old: bytes, new: bytes) -> None:
    tree = pinned.prepare(None)
    assert old in PATCH
    with pytest.raises(build.BuildError):
        build.apply_patch(PATCH.replace(old, new), tree)
    assert (tree / "src/llama.cpp").read_text() == FILES["src/llama.cpp"]


def test_the_build_stops_when_the_patch_does_not_apply(pinned: Pinned) -> None:
    patch = PATCH.replace(b" line 4\n", b" line four\n")
    pinned.lock.patch_sha256 = build.sha256(patch)
    with pytest.raises(build.BuildError, match=r"did not apply: src/llama.cpp: hunk 1 (.|\n)*update-lock"):
        pinned.prepare(patch)
    assert_nothing_left(pinned)


def test_the_build_stops_when_the_patch_is_not_the_locked_one(pinned: Pinned) -> None:
    with pytest.raises(build.BuildError, match="lock.json was made for"):
        pinned.prepare(b"A comment.\n" + PATCH)
    assert_nothing_left(pinned)


def test_the_build_stops_when_the_lock_lists_other_files(pinned: Pinned) -> None:
    pinned.lock.files["src/other.cpp"] = {when: build.sha256(b"other\n") for when in ("before", "after")}
    with pytest.raises(build.BuildError, match="lock.json was made for"):
        pinned.prepare()


@pytest.mark.parametrize("when", ["before", "after"])
def test_touched_files_are_verified_before_and_after(pinned: Pinned, when: str) -> None:
    pinned.lock.files["src/llama.cpp"][when] = build.sha256(b"")
    with pytest.raises(build.BuildError, match=f"src/llama.cpp is not what .* {when} the patch"):
        pinned.prepare()
    assert_nothing_left(pinned)


def test_a_patch_tool_that_does_nothing_is_noticed(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "apply_patch", lambda patch, tree: None)
    with pytest.raises(build.BuildError, match="after the patch"):
        pinned.prepare()


@pytest.mark.skipif(shutil.which("git") is None, reason="git makes the other repository")
def test_a_build_folder_inside_another_git_repository(pinned: Pinned) -> None:
    pinned.into.mkdir()
    subprocess.run(["git", "init", "--quiet", pinned.into], check=True)
    folder = build.prepare(pinned.into / "build", pinned.lock, PATCH)
    assert (folder / "src/llama.cpp").read_text() == PATCHED


# --- the source


def test_a_cached_file_with_another_hash_is_refused(pinned: Pinned) -> None:
    pinned.sdist.write_bytes(pinned.sdist.read_bytes() + b"\0")
    with pytest.raises(build.BuildError, match=rf"{re.escape(str(pinned.sdist))} is not the pinned(.|\n)*Delete"):
        pinned.prepare()
    assert_nothing_left(pinned)


def test_a_download_with_another_hash_is_refused_and_not_kept(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned.sdist.unlink()
    monkeypatch.setattr(build, "pip_download", lambda _, __, folder: (folder / pinned.sdist.name).write_bytes(b"bad"))
    with pytest.raises(build.BuildError, match="not the pinned one(.|\n)*package index"):
        pinned.prepare()
    assert list(pinned.sdist.parent.iterdir()) == []
    assert_nothing_left(pinned)


def test_a_good_download_is_kept(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = pinned.sdist.rename(pinned.sdist.parents[1] / "elsewhere.tar.gz")
    monkeypatch.setattr(build, "pip_download", lambda _, __, folder: elsewhere.rename(folder / pinned.sdist.name))
    pinned.prepare()
    assert list(pinned.sdist.parent.iterdir()) == [pinned.sdist]


def test_without_network_and_cache_the_message_says_where_to_put_the_file(pinned: Pinned) -> None:
    pinned.sdist.unlink()
    with pytest.raises(build.BuildError) as error:
        pinned.prepare()
    for part in ("no network in this test", "pip download --no-deps", str(pinned.sdist), "LMINF_LLAMA_CPP_SOURCE"):
        assert part in str(error.value)
    assert_nothing_left(pinned)


def test_a_failing_pip_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(build.BuildError, match="No matching distribution"):
        build.pip_download("llama-cpp-python==0.0.0.1", "llama-cpp-python", tmp_path)


def test_only_plain_files_below_the_source_folder_are_extracted(pinned: Pinned, tmp_path: Path) -> None:
    def add_hostile_members(archive: tarfile.TarFile, root: str) -> None:
        link = tarfile.TarInfo(root + "src/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo(root + "src/../../../../escaped"))
        archive.addfile(tarfile.TarInfo(root + ".git"))

    hostile = tmp_path / "hostile.tar.gz"
    write_sdist(hostile, add_hostile_members)
    build.extract_sdist(hostile, tmp_path / "a" / "b" / "tree")
    found = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "a").rglob("*") if not path.is_dir()}
    assert found == {f"a/b/tree/{name}" for name in FILES if not name.startswith("models")}
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("subdirectory", ["", "vendor/llama.cpp"])
def test_a_named_source_tree_is_copied(pinned: Pinned, monkeypatch: pytest.MonkeyPatch, subdirectory: str) -> None:
    with tarfile.open(pinned.sdist) as archive:
        archive.extractall(pinned.sdist.parent, members=list(archive))
    pinned.sdist.unlink()
    named = pinned.sdist.parent / "llama_cpp_python-1.0" / subdirectory
    monkeypatch.setenv("LMINF_LLAMA_CPP_SOURCE", str(named))
    assert (pinned.prepare() / "src/llama.cpp").read_text() == PATCHED
    original = pinned.sdist.parent / "llama_cpp_python-1.0/vendor/llama.cpp/src/llama.cpp"
    assert original.read_text() == FILES["src/llama.cpp"]


def test_a_named_source_that_is_no_source(pinned: Pinned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMINF_LLAMA_CPP_SOURCE", str(tmp_path / "nonsense"))
    with pytest.raises(build.BuildError, match="no llama.cpp source tree there"):
        pinned.prepare()
    assert_nothing_left(pinned)


def test_a_named_source_of_another_version(pinned: Pinned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build.extract_sdist(pinned.sdist, tmp_path / "other")
    (tmp_path / "other/src/other.cpp").write_text("newer\n")  # a file that the patch does not touch
    monkeypatch.setenv("LMINF_LLAMA_CPP_SOURCE", str(tmp_path / "other"))
    with pytest.raises(build.BuildError, match="not the pinned llama-cpp-python 1.0"):
        pinned.prepare()
    assert_nothing_left(pinned)


# --- the extraction


def test_a_half_finished_extraction_is_refused(pinned: Pinned) -> None:
    folder = pinned.prepare()
    (folder / build.STAMP).unlink()
    with pytest.raises(build.BuildError, match="half-finished(.|\n)*Delete that folder"):
        pinned.prepare()


def test_an_interrupted_extraction_leaves_nothing(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(build, "patch_source", interrupt)
        pinned.prepare()
    assert_nothing_left(pinned)
    pinned.prepare()


@pytest.mark.parametrize("name", ["src/llama.cpp", "src/other.cpp"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("edited\n")], ids=["removed", "edited"])
def test_a_changed_extraction_is_refused(pinned: Pinned, name: str, damage: Callable[[Path], object]) -> None:
    damage(pinned.prepare() / name)
    with pytest.raises(build.BuildError, match="was changed(.|\n)*Delete that folder(.|\n)*update-patch"):
        pinned.prepare()


# --- the command that CMake runs


def test_the_command_ends_with_the_message_and_without_a_traceback(pinned: Pinned, tmp_path: Path) -> None:
    pinned.lock.save(tmp_path / "lock.json")
    (tmp_path / "patch").write_bytes(PATCH)
    options: list[str | Path] = [
        "--lock",
        tmp_path / "lock.json",
        "--patch",
        tmp_path / "patch",
        "prepare",
        "--into",
        pinned.into,
    ]
    command: list[str | Path] = [sys.executable, ROOT / "cmake/get_llama_cpp.py", *options]

    good = subprocess.run(command, capture_output=True, text=True)
    (folder,) = good.stdout.splitlines()
    assert good.returncode == 0

    (Path(folder) / build.STAMP).unlink()
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "half-finished" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_cmake_stops_with_the_message(tmp_path: Path) -> None:
    nonsense = {**os.environ, "LMINF_LLAMA_CPP_SOURCE": str(tmp_path / "nonsense")}
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command: list[str | Path] = [tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", "-DLMINF_STOCK=ON", *options]
    result = subprocess.run(command, env=nonsense, capture_output=True, text=True)
    assert result.returncode != 0
    assert "there is no llama.cpp source tree there" in result.stderr


# --- what extension and library were built from


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A small src/."""
    for name in ("api/lminf.h", "api/lminf.cpp", "cache/cache.cpp"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(f"// {name}\n")
    (tmp_path / "src" / "README.md").write_text("The engine.\n")
    return tmp_path / "src"


@pytest.mark.parametrize(
    "change",
    [
        lambda src: (src / "api/lminf.h").write_text("struct other;\n"),
        lambda src: (src / "cache/cache.cpp").write_text("// something else\n"),
        lambda src: (src / "cache/cache.cpp").rename(src / "cache/other.cpp"),
        lambda src: (src / "cache/cache.cpp").unlink(),
        lambda src: (src / "policy.h").write_text(""),
    ],
    ids=["header", "source", "renamed", "removed", "added"],
)
def test_whatever_changes_in_the_engine_is_another_engine(engine: Path, change: Callable[[Path], object]) -> None:
    before = build_id.abi_id("patch", engine)
    assert build_id.abi_id("patch", engine) == before
    change(engine)
    assert build_id.abi_id("patch", engine) != before


def test_another_patch_is_another_engine_and_another_description_is_none(engine: Path) -> None:
    before = build_id.abi_id("patch", engine)
    assert build_id.abi_id("another patch", engine) != before
    (engine / "README.md").write_text("Said otherwise.\n")
    assert build_id.abi_id("patch", engine) == before


def test_two_sources_only_are_compiled_for_another_engine() -> None:
    sources = [path for folder in ("src", "cpp") for path in (ROOT / folder).rglob("*") if path.is_file()]
    naming = {
        path.relative_to(ROOT).as_posix() for path in sources if b'#include "lminf-build-id.h"' in path.read_bytes()
    }
    assert naming == {"src/api/lminf.cpp", "cpp/module.cpp"}


def test_an_extension_refuses_a_library_of_another_engine(tmp_path: Path) -> None:
    """As when a library of an earlier version comes first, or one of two files was replaced."""
    ours, other = _core.abi_id().encode(), b"0" * 64
    for folder in (tmp_path / "lminf_edge", tmp_path / "lminf_edge" / "lib"):
        folder.mkdir()
    shutil.copy(_core.__file__, tmp_path / "lminf_edge")
    for library in lib_path().iterdir():
        if library.is_file():
            content = library.read_bytes()
            assert "libllama" not in library.name or content.count(ours) == 1
            (tmp_path / "lminf_edge" / "lib" / library.name).write_bytes(content.replace(ours, other))
    (tmp_path / "lminf_edge" / "__init__.py").touch()
    command = [sys.executable, "-S", "-c", "import lminf_edge._core"]
    result = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "ImportError: lminf_edge._core was built for a libllama with the id" in result.stderr
    assert other.decode() in result.stderr


# --- the committed patch


@pytest.fixture(scope="module")
def committed_patch() -> bytes:
    return build.PATCH_PATH.read_bytes()


def test_the_committed_patch_applies_to_the_pinned_source(committed_patch: bytes, tmp_path: Path) -> None:
    folder = build.prepare(tmp_path, build.Lock.load(build.LOCK_PATH), committed_patch)
    build.check_complete(folder)


def test_the_committed_patch_only_adds_a_few_hooks_and_touches_no_model(committed_patch: bytes) -> None:
    files = build.parse_patch(committed_patch)
    added = [line for line in committed_patch.splitlines() if line.startswith(b"+") and not line.startswith(b"+++")]
    assert 0 < len(files) <= 8
    assert len(added) <= 60
    assert not [path for path in files if path.startswith("src/models/")]
