"""Model files from Hugging Face, fetched and kept by huggingface_hub."""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lminf_edge.errors import ConfigError, ModelLoadError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def fetch(repo_id: str, file_name: str) -> Path:
    """A file of a repository, from huggingface_hub's cache or fetched now.

    Args:
        repo_id: "owner/repository".
        file_name: The file's path in the repository; or a pattern such as "*Q4_K_M.gguf" that one file matches.

    Returns:
        Path of the file.

    Raises:
        ConfigError: This is no name of a repository or file.
        ModelLoadError: huggingface_hub is not installed, or the file cannot be fetched.
    """
    if not isinstance(repo_id, str) or not _REPOSITORY.fullmatch(repo_id):
        raise ConfigError(f"repo_id = {repo_id!r}: must be 'owner/repository'")
    if not isinstance(file_name, str) or not file_name:
        raise ConfigError(f"filename = {file_name!r}: must be the name of a file in {repo_id}, or a pattern")
    hub = _hub(f"to fetch {repo_id}/{file_name}")
    try:
        if any(letter in file_name for letter in "*?["):
            file_name = _only_match(repo_id, file_name, hub.list_repo_files(repo_id))
        return Path(hub.hf_hub_download(repo_id, file_name))
    except ConfigError:
        raise
    except Exception as error:  # it raises some twenty classes of three libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"cannot fetch {file_name} of {repo_id} from Hugging Face: {reason}") from error


def cached_files() -> Iterator[tuple[str, Path]]:
    """The GGUF files in huggingface_hub's cache.

    Returns:
        "owner/repository/file.gguf" and path of each; nothing if huggingface_hub is not installed.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        not_found = importlib.import_module("huggingface_hub.utils").CacheNotFound
    except ImportError:
        return
    try:
        cache = hub.scan_cache_dir()
    except not_found:  # nothing was ever downloaded
        return
    for repository in cache.repos:
        if repository.repo_type != "model":
            continue
        for revision in repository.revisions:
            for file in revision.files:
                if file.file_name.endswith(".gguf"):
                    inside = file.file_path.relative_to(revision.snapshot_path)
                    yield f"{repository.repo_id}/{inside.as_posix()}", file.file_path


def _only_match(repo_id: str, pattern: str, names: list[str]) -> str:
    matches = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))
    if len(matches) != 1:
        found = ", ".join(matches) if matches else "it has " + (", ".join(sorted(names)) or "no files")
        raise ConfigError(f"filename = {pattern!r}: must match one file of {repo_id}; {found}")
    return matches[0]


def _hub(purpose: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelLoadError(f"{purpose} from Hugging Face, `pip install huggingface_hub`") from error
