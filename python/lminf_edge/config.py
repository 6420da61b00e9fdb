"""How far a model looks: the parameters of LM-Infinite."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from lminf_edge._checks import N_MAX, check_choice, check_int, check_optional_int
from lminf_edge.errors import ConfigError
from lminf_edge.middle import MiddleConfig

SinkOrder = Literal["clamped", "kept"]


@dataclass(frozen=True, kw_only=True)
class LMInfConfig:
    """Which keys a token sees, and at which RoPE distances (Han et al., arXiv 2308.16137, section 4).

    A token at position p sees a key at position j <= p if j < n_sink or p - j < n_window. All counts are in tokens.

    Attributes:
        n_sink: The first tokens of a sequence, which are never evicted (S in the paper's terms).
        n_window: Length of the local window (W). None: 2048, at most the length that the model was trained on.
        n_clamp: Largest RoPE distance that a token may see (L). None: n_window.
        n_block: The clamp moves once per this many positions (B); 1 is the paper's exact clamp. None: 64, or with more
            than 64 sink tokens `n_ubatch` if that is more, at most `n_clamp`.
            None: 64, at most n_clamp.
        sink_order: "clamped": all far sink tokens stand at one distance, as in the paper. "kept": they keep their
            distances to each other, which needs n_sink + n_window <= n_clamp + 1; for pinned system prompts.
        n_rollback: A sequence can be cut exactly to this many tokens fewer than the longest it has been. Having been
            cut so far, it cannot be cut again before it has grown.
        middle: Store what leaves the window, so that it can be looked up. None: it is gone.

    Raises:
        ConfigError: A value, or a combination of values, is out of range. What depends on the model is checked when a
            `Llama` is made.
    """

    n_sink: int = 4
    n_window: int | None = None
    n_clamp: int | None = None
    n_block: int | None = None
    sink_order: SinkOrder = "clamped"
    n_rollback: int = 128
    middle: MiddleConfig | None = None

    def __post_init__(self) -> None:
        check_int("n_sink", self.n_sink, 0)
        window = check_optional_int("n_window", self.n_window, 1)
        clamp = check_optional_int("n_clamp", self.n_clamp, 1)
        check_optional_int("n_block", self.n_block, 1)
        check_int("n_rollback", self.n_rollback, 0)
        check_choice("sink_order", self.sink_order, ("clamped", "kept"))
        if self.middle is not None and not isinstance(self.middle, MiddleConfig):
            raise ConfigError(f"middle = {self.middle!r}: must be a MiddleConfig or None")
        self._check_together(window, window if clamp is None else clamp)

    @classmethod
    def from_budget(
        cls,
        model_path: str | os.PathLike[str],
        kv_bytes: int,
        cache_type: str = "f16",
        *,
        n_ubatch: int | None = None,
        **parameters: Any,
    ) -> LMInfConfig:
        """The configuration with the largest window whose cache fits a number of bytes.

        The bytes are those of `MemoryStats.kv_bytes`: keys, values and sink token originals of all layers, rollback
        slack and micro-batch included; and with middle tokens in memory those of their store once it is full. The
        model itself and its compute buffers come on top.

        Args:
            model_path: A GGUF file. Its weights are not read.
            kv_bytes: The budget.
            cache_type: Type of cached keys and values, to be given to `Llama` as cache_type_k and cache_type_v.
            n_ubatch: To be given to `Llama`, too. None: its default.
            **parameters: Of this class, but for n_window. With sink_order="kept", n_clamp follows the window.

        Raises:
            TypeError: There is no such parameter.
            ConfigError: A value is out of range, or even the smallest window does not fit.
            ModelLoadError, UnsupportedModelError: As for `Llama`.
        """
        from lminf_edge.budget import with_largest_window

        if "n_window" in parameters:
            raise TypeError("from_budget() got an unexpected keyword argument 'n_window': it is what is looked for")
        return with_largest_window(cls(**parameters), model_path, kv_bytes, cache_type, n_ubatch)

    def _check_together(self, window: int | None, clamp: int | None) -> None:
        if window is not None and self.n_sink + window > N_MAX:
            raise ConfigError(f"n_sink = {self.n_sink}, n_window = {window}: their sum must be at most {N_MAX}")
        if self.middle is not None and window is not None and self.middle.max_tokens <= window:
            raise ConfigError(f"max_tokens = {self.middle.max_tokens}: must be more than n_window ({window})")
        if clamp is None:
            return
        if self.middle is not None and self.middle.distance is not None and self.middle.distance > clamp:
            raise ConfigError(f"distance = {self.middle.distance}: must be at most n_clamp ({clamp})")
        if self.n_block is not None and self.n_block > clamp:
            raise ConfigError(f"n_block = {self.n_block}: must be at most n_clamp ({clamp})")
        if self.sink_order == "kept" and window is not None and self.n_sink + window > clamp + 1:
            raise ConfigError(
                f"n_clamp = {clamp}: must be at least n_sink + n_window - 1 = {self.n_sink + window - 1} "
                "with sink_order='kept'"
            )
