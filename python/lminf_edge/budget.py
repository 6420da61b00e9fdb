"""How large a window fits into a number of bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lminf_edge._checks import N_MAX, check_choice, check_int
from lminf_edge._library import _core
from lminf_edge._params import batch_sizes, to_params
from lminf_edge.errors import ConfigError
from lminf_edge.gguf_file import check_gguf_file

N_BLOCK = 64
"""Default of n_block where the clamp has room for it."""

if TYPE_CHECKING:
    from lminf_edge.config import LMInfConfig


def with_largest_window(
    config: LMInfConfig, model_path: str | os.PathLike[str], kv_bytes: int, cache_type: str, n_ubatch: int | None
) -> LMInfConfig:
    """See `LMInfConfig.from_budget`; the window of `config` is not used.

    The engine itself says what a window takes, in a context without memory: no formula is written twice.
    """
    check_int("kv_bytes", kv_bytes, 0, 2**63 - 1)
    check_choice("cache_type", cache_type, _core.cache_types())
    batch, ubatch = batch_sizes(None, n_ubatch)
    model = _core.Model(str(check_gguf_file(model_path)), use_mmap=False, no_alloc=True)

    in_memory = config.middle is not None and config.middle.path is None

    def sizes(n_window: int) -> tuple[int, int]:
        """Of the cache, and of a full store of middle tokens in memory."""
        context = _core.Context(
            model,
            lminf=to_params(_with_window(config, n_window), 0),
            n_batch=batch,
            n_ubatch=ubatch,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
        )
        return context.stats().n_bytes, context.middle_stats().n_bytes_full if in_memory else 0

    def fits(n_window: int) -> bool:
        try:
            return sum(sizes(n_window)) <= kv_bytes
        except ConfigError:  # too large for the model, or for the other parameters
            return False

    smallest, regular = _smallest_window(config), _first_regular_window(config, model.n_ctx_train)
    if fits(regular):
        low, high = regular, max(regular, model.n_ctx_train) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return _with_window(config, low)
    for n_window in range(regular - 1, smallest - 1, -1):
        if fits(n_window):
            return _with_window(config, n_window)
    cache, store = min(map(sizes, range(smallest, regular + 1)), key=sum)
    advice = f", {store:,} of them the store of middle tokens (a file or fewer max_tokens would help)" if store else ""
    raise ConfigError(
        f"kv_bytes = {kv_bytes:,}: even the smallest cache needs {cache + store:,} bytes with this model{advice}"
    )


def _with_window(config: LMInfConfig, n_window: int) -> LMInfConfig:
    n_clamp = config.n_clamp
    if n_clamp is None and config.sink_order == "kept":
        n_clamp = min(N_MAX, config.n_sink + n_window - 1)
    return replace(config, n_window=n_window, n_clamp=n_clamp)


def _smallest_window(config: LMInfConfig) -> int:
    """A block is not longer than the clamp, which depends on the window unless it is given."""
    if config.n_block is None or config.n_clamp is not None:
        return 1
    return max(1, config.n_block - _n_beyond_window(config))


def _first_regular_window(config: LMInfConfig, n_ctx_train: int) -> int:
    """From here on a larger window takes more memory: blocks are not shortened any more to fit the clamp.

    Shorter blocks mean more copies of the sink tokens.
    """
    if config.n_block is not None or config.n_clamp is not None:
        return _smallest_window(config)
    return max(1, min(N_BLOCK - _n_beyond_window(config), n_ctx_train))


def _n_beyond_window(config: LMInfConfig) -> int:
    """How much longer than the window the clamp is by default."""
    return config.n_sink - 1 if config.sink_order == "kept" else 0
