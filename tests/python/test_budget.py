"""The largest window for a number of bytes: it fits, and one token more would not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lminf_edge import ConfigError, Llama, LMInfConfig, MiddleConfig, ModelLoadError
from tiny_families import SLIDING_AND_FULL
from tiny_models import TinyModel, write_tiny_model


def kv_bytes(model: Path, config: LMInfConfig, cache_type: str, **options: Any) -> int:
    with Llama(model, lminf=config, cache_type_k=cache_type, cache_type_v=cache_type, **options) as llm:
        return llm.memory_stats().kv_bytes


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["head_32", "head_64", "gemma3", "gemma4"])
def test_tiny_models(request: pytest.FixtureRequest, tmp_path: Path, name: str, cache_type: str) -> None:
    if name in SLIDING_AND_FULL:
        path = write_tiny_model(tmp_path / "model.gguf", SLIDING_AND_FULL[name], seed=1).path
    else:
        model: TinyModel = request.getfixturevalue(name)
        path = model.path
    options: dict[str, Any] = {"n_ubatch": 16}
    smallest = kv_bytes(path, LMInfConfig(n_window=1, n_rollback=4), cache_type, **options)
    for extra in (0, 1_000_000_000):
        config = LMInfConfig.from_budget(path, smallest + extra, cache_type, n_rollback=4, **options)
        assert config.n_window is not None
        assert kv_bytes(path, config, cache_type, **options) <= smallest + extra
        assert does_not_fit(path, replace(config, n_window=config.n_window + 1), cache_type, smallest + extra, options)
    with pytest.raises(ConfigError, match=f"needs {smallest:,} bytes"):
        LMInfConfig.from_budget(path, smallest - 1, cache_type, n_rollback=4, **options)


def does_not_fit(model: Path, config: LMInfConfig, cache_type: str, budget: int, options: dict[str, Any]) -> bool:
    try:
        return kv_bytes(model, config, cache_type, **options) > budget
    except ConfigError:  # longer than the model was trained on
        return True


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("megabytes", [20, 47])
def test_the_default_model(default_model: Path, megabytes: int, cache_type: str) -> None:
    budget = megabytes * 1_000_000
    config = LMInfConfig.from_budget(default_model, budget, cache_type)
    assert config.n_window is not None and config.n_window < 8192
    assert kv_bytes(default_model, config, cache_type) <= budget
    assert kv_bytes(default_model, replace(config, n_window=config.n_window + 1), cache_type) > budget


def test_kept_order_and_blocks(default_model: Path) -> None:
    config = LMInfConfig.from_budget(default_model, 40_000_000, n_sink=100, sink_order="kept", n_block=200)
    assert config.n_window is not None
    assert config.n_clamp == 100 + config.n_window - 1
    assert kv_bytes(default_model, config, "f16") <= 40_000_000
    larger = replace(config, n_window=config.n_window + 1, n_clamp=config.n_clamp + 1)
    assert kv_bytes(default_model, larger, "f16") > 40_000_000


@pytest.mark.parametrize("n_candidates", [None, 8])
def test_a_store_of_middle_tokens_in_memory_is_counted(
    head_64: TinyModel, tmp_path: Path, n_candidates: int | None
) -> None:
    middle = MiddleConfig(k=4, layers=(0, None), max_tokens=3000, n_candidates=n_candidates)
    options: dict[str, Any] = {"n_ubatch": 16}
    with Llama(head_64.path, lminf=LMInfConfig(n_window=100, middle=middle), **options) as llm:
        budget = llm.memory_stats().kv_bytes + (store := llm._context.middle_stats().n_bytes_full)
    assert store > 3000 * 3 * 2 * 2 * 68  # layers, heads, key and value of 64 components in q8_0
    config = LMInfConfig.from_budget(head_64.path, budget, middle=middle, **options)
    assert config.n_window is not None and config.n_window >= 100
    assert kv_bytes(head_64.path, config, "f16", **options) + store <= budget
    # a file is no memory
    in_file = replace(middle, path=tmp_path / "store")
    config = LMInfConfig.from_budget(head_64.path, budget - store, middle=in_file, **options)
    assert config.n_window is not None and config.n_window >= 100
    assert not (tmp_path / "store").exists()
    with pytest.raises(ConfigError, match=rf"{store:,} of them the store of middle tokens \(a file"):
        LMInfConfig.from_budget(head_64.path, budget - store, middle=middle, **options)


def test_wrong_input(default_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="n_window"):
        LMInfConfig.from_budget(default_model, 10**9, n_window=5)
    with pytest.raises(TypeError):
        LMInfConfig.from_budget(default_model, 10**9, n_windows=5)
    wrong: list[tuple[Any, str]] = [(-1, "f16"), (10**9, "q9_0"), (1.5, "f16"), (1000, "f16")]
    for arguments in wrong:
        with pytest.raises(ConfigError):
            LMInfConfig.from_budget(default_model, *arguments)
    with pytest.raises(ModelLoadError):
        LMInfConfig.from_budget(tmp_path / "missing.gguf", 10**9)
