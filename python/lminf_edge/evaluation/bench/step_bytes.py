"""How many bytes decoding a token must read: the roof of the roofline.

A step reads every weight once, but for tables of which it needs one row (token embeddings that are not also the output
matrix) and experts that are not asked; and the keys and values that the new token sees, once each.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lminf_edge._library import _core
from lminf_edge._params import to_params
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ModelLoadError, UnsupportedModelError
from lminf_edge.gguf_file import check_gguf_file

_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Weights in a block and bytes of one, by the number of a tensor type in GGUF."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type; 8 is a string, 9 an array."""

_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name.
        shape: Its dimensions; the first one varies fastest.
        n_bytes: Its size, without padding.
    """

    name: str
    shape: tuple[int, ...]
    n_bytes: int


def read_tensor_infos(path: str | os.PathLike[str]) -> list[TensorInfo]:
    """What a GGUF file says of its tensors.

    Raises:
        ModelLoadError: It is no GGUF file, is cut off, or has a type of tensors that is not known here.
    """
    try:
        with check_gguf_file(path).open("rb") as stream:
            return list(_tensor_infos(stream))
    except (struct.error, KeyError, OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: its tensors cannot be listed: {error!r}") from error


def weights_read(tensors: Iterable[TensorInfo], experts_used: float = 1.0) -> int:
    """Bytes of weights that one decoding step reads.

    Args:
        tensors: All tensors of the model.
        experts_used: Which part of the experts a token asks.
    """
    all_tensors = list(tensors)
    tied = all(tensor.name != "output.weight" for tensor in all_tensors)
    n_bytes = 0
    for tensor in all_tensors:
        if tensor.name == "per_layer_token_embd.weight" or (tensor.name == "token_embd.weight" and not tied):
            n_bytes += tensor.n_bytes // tensor.shape[-1]
        elif "_exps." in tensor.name:
            n_bytes += round(tensor.n_bytes * experts_used)
        else:
            n_bytes += tensor.n_bytes
    return n_bytes


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What decoding a token reads, by how many keys it sees.

    Attributes:
        weights: Bytes of weights.
        per_key: Bytes of one token's keys and values, in all layers that see as far as the method lets them.
        sliding_per_key: The same in layers with a sliding window of the model's own.
        n_sliding: How many keys those layers see at most.
        fixed: Bytes of recurrent layers' states.
    """

    weights: int
    per_key: int
    sliding_per_key: int = 0
    n_sliding: int = 0
    fixed: int = 0

    def at(self, n_visible: int, n_past: int) -> int:
        """Bytes of a step.

        Args:
            n_visible: Keys that the new token sees, itself included.
            n_past: Tokens so far, the new one included.
        """
        sliding = min(n_past, self.n_sliding) * self.sliding_per_key
        return self.weights + n_visible * self.per_key + sliding + self.fixed


def step_bytes(path: str | os.PathLike[str], cache_type: str) -> StepBytes:
    """What decoding reads with a model and a type of cache. No weights are loaded.

    Raises:
        ModelLoadError, UnsupportedModelError, ConfigError: As for `Llama`.
    """
    model = _core.Model(str(Path(path)), use_mmap=False, no_alloc=True)
    metadata = model.metadata
    arch = metadata["general.architecture"]
    n_used, n_experts = (int(metadata.get(f"{arch}.{key}", "0")) for key in ("expert_used_count", "expert_count"))
    weights = weights_read(read_tensor_infos(path), n_used / n_experts if n_used and n_experts else 1.0)
    at_short, at_long = (_context_bytes(model, n_ctx, 256, cache_type) for n_ctx in (1024, 2048))
    per_cell = (at_long - at_short) // 1024
    window = metadata.get(f"{arch}.attention.sliding_window", "0")
    n_sliding = int(window) if window.isdecimal() else 0
    per_key = min(per_cell, _growing_with_window(model, cache_type)) if n_sliding else per_cell
    return StepBytes(
        weights=weights,
        per_key=per_key,
        sliding_per_key=per_cell - per_key,
        n_sliding=n_sliding,
        fixed=at_short - 1024 * per_cell,
    )


def _growing_with_window(model: _core.Model, cache_type: str) -> int:
    """Bytes of a token's keys and values in the layers whose window LM-Infinite sets: not those that have their own."""
    n_window = model.n_ctx_train // 256 * 256
    if n_window < 512:
        raise UnsupportedModelError("a model with sliding windows that was trained on less than 512 tokens")
    small, large = (
        _core.Context(
            model,
            lminf=to_params(LMInfConfig(n_window=n), 0),
            n_batch=256,
            n_ubatch=256,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
        )
        for n in (n_window - 256, n_window)
    )
    return (large.stats().n_bytes - small.stats().n_bytes) // 256


def plain_context_bytes(path: str | os.PathLike[str], cache_type: str, n_ctx: int, n_ubatch: int) -> int:
    """Bytes of the keys and values of a plain context. Nothing is allocated.

    Raises:
        ModelLoadError, UnsupportedModelError, ConfigError, ContextError: As for `Llama`.
    """
    return _context_bytes(_core.Model(str(Path(path)), use_mmap=False, no_alloc=True), n_ctx, n_ubatch, cache_type)


def _context_bytes(model: _core.Model, n_ctx: int, n_ubatch: int, cache_type: str) -> int:
    context = _core.Context(
        model, n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, cache_type_k=cache_type, cache_type_v=cache_type
    )
    return context.stats().n_bytes


def _tensor_infos(stream: BinaryIO) -> Iterable[TensorInfo]:
    _, _, n_tensors, n_entries = _numbers(stream, "<IIQQ")
    for _ in range(n_entries):
        _string(stream)
        _skip_value(stream, _numbers(stream, "<I")[0])
    for _ in range(n_tensors):
        name = _string(stream)
        (n_dimensions,) = _numbers(stream, "<I")
        shape = _numbers(stream, f"<{n_dimensions}Q")
        kind, _ = _numbers(stream, "<IQ")
        n_weights, n_bytes = _BLOCKS[kind]
        yield TensorInfo(name=name, shape=shape, n_bytes=math.prod(shape) // n_weights * n_bytes)


def _numbers(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _string(stream: BinaryIO) -> str:
    return stream.read(_numbers(stream, "<Q")[0]).decode("utf-8")


def _skip_value(stream: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        stream.seek(_numbers(stream, "<Q")[0], os.SEEK_CUR)
    elif kind != _ARRAY:
        stream.seek(_SIZES[kind], os.SEEK_CUR)
    else:
        of, n = _numbers(stream, "<IQ")
        if of in (_STRING, _ARRAY):
            for _ in range(n):
                _skip_value(stream, of)
        else:
            stream.seek(n * _SIZES[of], os.SEEK_CUR)
