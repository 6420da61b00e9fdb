"""Models are found by path, by their name on Hugging Face, and in the folders where they are kept."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lminf_edge import ConfigError, Llama, LMInfConfig, ModelLoadError
from lminf_edge.models import list_models, resolve_model
from tiny_models import TinyModel


class CacheMissingError(Exception):
    """What huggingface_hub raises where nothing was ever downloaded."""


@pytest.fixture
def hub(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A huggingface_hub with one repository, in which two files are one and the same tiny model."""

    def download(repo_id: str, file_name: str) -> str:
        if repo_id != "someone/models" or not file_name.endswith(".gguf"):
            raise OSError("404 Client Error.\nEntry Not Found")
        return str(head_32.path)

    def scan() -> Any:
        file = SimpleNamespace(file_name="a.Q4_1.gguf", file_path=head_32.path)
        readme = SimpleNamespace(file_name="README.md", file_path=head_32.path)
        gone = SimpleNamespace(file_name="gone.gguf", file_path=head_32.path.parent / "gone.gguf")
        revision = SimpleNamespace(snapshot_path=head_32.path.parent, files=[file, readme, gone])
        model = SimpleNamespace(repo_type="model", repo_id="someone/models", revisions=[revision])
        data = SimpleNamespace(repo_type="dataset", repo_id="someone/data", revisions=[revision])
        return SimpleNamespace(repos=[model, data])

    fake = SimpleNamespace(
        hf_hub_download=download,
        list_repo_files=lambda repo_id: ["README.md", "a.Q4_1.gguf", "a.Q8_0.gguf"],
        scan_cache_dir=scan,
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", SimpleNamespace(CacheNotFound=CacheMissingError))
    return fake


def test_a_model_is_opened_by_its_name_on_hugging_face(hub: SimpleNamespace) -> None:
    for file_name in ("a.Q4_1.gguf", "*Q8_0.gguf"):
        with Llama.from_pretrained("someone/models", file_name, lminf=LMInfConfig(), n_threads=1) as llm:
            assert isinstance(llm, Llama)
            assert llm.config is not None


def test_a_pattern_must_match_one_file(hub: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"a\.Q4_1\.gguf, a\.Q8_0\.gguf"):
        Llama.from_pretrained("someone/models", "*.gguf")
    with pytest.raises(ConfigError, match="must match one file"):
        Llama.from_pretrained("someone/models", "*Q2*")


@pytest.mark.parametrize(("repo_id", "file_name"), [("models", "a.gguf"), ("a/b/c", "a.gguf"), ("a/b", ""), (5, "a")])
def test_names_that_are_none_are_refused(repo_id: Any, file_name: str) -> None:
    with pytest.raises(ConfigError, match="repo_id|filename"):
        Llama.from_pretrained(repo_id, file_name)


def test_a_misspelt_option_is_refused_before_anything_is_fetched(hub: SimpleNamespace) -> None:
    hub.hf_hub_download = None
    with pytest.raises(TypeError, match="n_thread"):
        Llama.from_pretrained("someone/models", "a.Q4_1.gguf", n_thread=1)


def test_what_cannot_be_fetched_is_an_error_in_one_line(hub: SimpleNamespace) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot fetch a\.gguf of other/models .*: 404 Client Error\.$"):
        Llama.from_pretrained("other/models", "a.gguf")
    with pytest.raises(ModelLoadError, match="cannot fetch"):
        resolve_model("other/models/a.gguf")


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match="pip install huggingface_hub"):
        Llama.from_pretrained("someone/models", "a.gguf")


def test_a_name_with_folders_is_looked_up(hub: SimpleNamespace, head_32: TinyModel) -> None:
    assert resolve_model("someone/models/sub/a.gguf") == head_32.path
    assert resolve_model(head_32.path) == head_32.path


def test_the_models_on_this_machine_are_listed(
    hub: SimpleNamespace, head_32: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "models"
    (folder / ".download-x").mkdir(parents=True)
    (folder / ".download-x" / "half.gguf").write_bytes(b"GG")
    (folder / "mine.gguf").write_bytes(b"GGUF")
    models = {model.name: (model.path, model.n_bytes) for model in list_models()}
    assert models == {
        str(folder / "mine.gguf"): (folder / "mine.gguf", 4),
        f"someone/models/{head_32.path.name}": (head_32.path, head_32.path.stat().st_size),
    }
    for name in models:
        assert resolve_model(name).exists()

    def nothing() -> None:
        raise CacheMissingError

    hub.scan_cache_dir = nothing
    assert [model.name for model in list_models()] == [str(folder / "mine.gguf")]
    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path / "nowhere"))
    assert list_models() == []
