"""Options of `Llama` in the form that the extension takes."""

from __future__ import annotations

from dataclasses import replace

from lminf_edge._checks import check_optional_int
from lminf_edge._library import _core
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.middle import MiddleConfig

N_UBATCH = 256
"""Tokens of a micro-batch: as fast as llama.cpp's default, with half of the memory for logits."""


def batch_sizes(n_batch: int | None, n_ubatch: int | None) -> tuple[int, int]:
    """n_batch and n_ubatch with their defaults filled in.

    Raises:
        ConfigError: One is out of range, or n_ubatch is larger than n_batch.
    """
    check_optional_int("n_batch", n_batch, 1)
    check_optional_int("n_ubatch", n_ubatch, 1)
    batch = max(2048, n_ubatch or 0) if n_batch is None else n_batch
    ubatch = min(N_UBATCH, batch) if n_ubatch is None else n_ubatch
    if ubatch > batch:
        raise ConfigError(f"n_ubatch = {ubatch}: must be at most n_batch ({batch})")
    return batch, ubatch


def cache_type_pair(name: str) -> tuple[str, str]:
    """Types of keys and values: of "q8_0/q4_0", or twice the same.

    Raises:
        ConfigError: There are more than two.
    """
    types = name.split("/")
    if len(types) > 2:
        raise ConfigError(f"cache type {name!r}: one type, or those of keys and of values, such as q8_0/q4_0")
    return types[0], types[-1]


def to_middle_params(middle: MiddleConfig | None) -> _core.MiddleParams | None:
    """The C API's lminf_middle_params, in which 0 means "default"; without the path."""
    if middle is None:
        return None
    begin, end = middle.layers
    return _core.MiddleParams(
        k=middle.k,
        per_head=middle.per == "head",
        distance=middle.distance or 0,
        layer_begin=begin,
        layer_end=end or 0,
        cache_type=middle.cache_type,
        max_tokens=middle.max_tokens,
        n_candidates=middle.n_candidates or 0,
    )


def to_params(config: LMInfConfig | None, n_rebase: int, deterministic: bool = False) -> _core.Params | None:
    """The C API's lminf_params, in which 0 means "default"."""
    if config is None:
        return None
    return _core.Params(
        n_sink=config.n_sink,
        n_window=config.n_window or 0,
        n_clamp=config.n_clamp or 0,
        n_block=config.n_block or 0,
        n_rollback=config.n_rollback,
        n_rebase=n_rebase,
        kept=config.sink_order == "kept",
        deterministic=deterministic,
        middle=to_middle_params(config.middle),
    )


def from_params(params: _core.Params | None, middle: MiddleConfig | None = None) -> LMInfConfig | None:
    """The configuration that lminf_params stand for; of `middle` what they do not say."""
    if params is None:
        return None
    if middle is not None and params.middle is not None:
        layers = (params.middle.layer_begin, params.middle.layer_end)
        middle = replace(middle, distance=params.middle.distance, layers=layers)
    return LMInfConfig(
        n_sink=params.n_sink,
        n_window=params.n_window,
        n_clamp=params.n_clamp,
        n_block=params.n_block,
        n_rollback=params.n_rollback,
        sink_order="kept" if params.kept else "clamped",
        middle=middle,
    )
