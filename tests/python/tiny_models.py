"""Tiny random models in GGUF: seeded, a few hundred kilobytes; of any kind that `TinyShape` can describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from reference import Architecture, Layer, Rope, Transformer
from tiny_tensors import Tensors, random_tensors

Weights = dict[str, npt.NDArray[np.float32]]
"""Weight matrices by GGUF tensor name, each of shape [n_out, n_in]; norms and biases are vectors."""

MetadataValue = bool | int | float | str | Sequence[bool] | Sequence[int]
"""An entry of a GGUF file; whole numbers are written as 32-bit ones."""

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = ("Ġ t", "h e", "Ġ a", "i n", "Ġt he")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

N_VOCAB = len(_SPECIAL_TOKENS) + 256 + len(_MERGES)
"""Tokens of every tiny model: three special ones, one for each byte, and a few merges."""


@dataclass(frozen=True)
class TinyShape:
    """What a tiny model is, weights apart. The defaults are a llama model's.

    Attributes:
        arch: llama.cpp's name of the architecture.
        n_rot: Rotated components of a head, for the file and for layers that are not given.
        layers: What each layer does to positions. None: n_layer layers with RoPE and full attention.
        features: Further arguments of `Architecture`.
        tensors: Which tensors there are.
        metadata: Further entries of the file, without the architecture's prefix.
    """

    arch: str = "llama"
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 32
    n_ff: int = 128
    n_ctx_train: int = 256
    rope_freq_base: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    n_rot: int = -1
    layers: tuple[Layer, ...] | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=Tensors)
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_rot < 0:
            object.__setattr__(self, "n_rot", self.head_size)
        if self.layers is not None:
            object.__setattr__(self, "n_layer", len(self.layers))

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size

    @cached_property
    def architecture(self) -> Architecture:
        """The same kind of model for the reference."""
        plain = (Layer(Rope(self.n_rot, self.rope_freq_base)),) * self.n_layer
        return Architecture(
            self.n_head, self.n_head_kv, self.layers or plain, self.n_ctx_train, norm_eps=self.norm_eps, **self.features
        )

    def head_size_of(self, layer: int) -> int:
        """Components of a head, which sliding layers may have fewer of."""
        is_sliding = self.architecture.layers[layer].view is not None
        swa_size = self.metadata.get("attention.key_length_swa", self.head_size)
        assert isinstance(swa_size, int)
        return swa_size if is_sliding else self.head_size

    def is_recurrent(self, layer: int) -> bool:
        """Whether the layer is recurrent instead of attention: every other layer, from the first on."""
        return self.tensors.n_convolution > 0 and layer % 2 == 0


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model file and what is in it. The weights are the numbers in the file, F16 rounding included."""

    path: Path
    shape: TinyShape
    weights: Weights

    @cached_property
    def transformer(self) -> Transformer:
        """The same model for the reference."""
        return Transformer(self.weights, self.shape.architecture)


HEAD_32 = TinyShape()
"""Two layers; quantised caches keep keys as they are."""

HEAD_64 = TinyShape(n_layer=3, head_size=64, n_ff=192)
"""Three layers; quantised caches store keys and values after a Hadamard rotation (head size a multiple of 64)."""

TIED = TinyShape(n_layer=4, n_head=3, n_head_kv=1, tied_embeddings=True)
"""Four layers, one KV head for three query heads, and the token embeddings as output head."""


def write_tiny_model(path: Path, shape: TinyShape, *, seed: int, weight_type: str = "f32") -> TinyModel:
    """Writes a random model. The same shape, seed and type give the same bytes.

    Args:
        path: The GGUF file to write.
        shape: Hyperparameters.
        seed: Seed of the weights.
        weight_type: Type of the weight matrices, "f32" or "f16". All else is F32, as in every GGUF file.

    Returns:
        The model with its weights as F32.
    """
    matrix_type = {"f32": np.float32, "f16": np.float16}[weight_type]
    weights = {
        name: tensor.astype(matrix_type).astype(np.float32) if tensor.ndim == 2 else tensor
        for name, tensor in random_tensors(shape, N_VOCAB, np.random.default_rng(seed))
    }

    file_type = gguf.LlamaFileType.ALL_F32 if weight_type == "f32" else gguf.LlamaFileType.MOSTLY_F16
    tensors = {name: tensor.astype(matrix_type) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    write_model_file(path, shape.arch, _hyperparameters(shape), tensors, file_type)
    return TinyModel(path, shape, weights)


def write_model_file(
    path: Path,
    arch: str,
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, npt.NDArray[Any]],
    file_type: gguf.LlamaFileType = gguf.LlamaFileType.ALL_F32,
) -> None:
    """Writes a GGUF file with a small tokenizer.

    Args:
        path: The file to write.
        arch: llama.cpp's name of the architecture.
        metadata: Entries without the architecture's prefix; those of the tokenizer have none.
        tensors: Tensors by name, dimensions as in NumPy: the first one varies slowest.
        file_type: What the file says of the tensors' types.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny random model")  # llama.cpp treats some names in a special way
    writer.add_file_type(file_type)
    for key, value in metadata.items():
        _add_entry(writer, key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    _add_tokenizer(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_tokens(n_tokens: int, *, seed: int) -> list[int]:
    """Uniformly random ordinary tokens (no special ones)."""
    tokens: list[int] = np.random.default_rng(seed).integers(len(_SPECIAL_TOKENS), N_VOCAB, n_tokens).tolist()
    return tokens


def _hyperparameters(shape: TinyShape) -> dict[str, MetadataValue]:
    return {
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "rope.dimension_count": shape.n_rot,
        "rope.freq_base": shape.rope_freq_base,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "attention.layer_norm_epsilon": shape.norm_eps,
        "vocab_size": N_VOCAB,
        **shape.metadata,
    }


def _add_entry(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE tokenizer: any text goes through it and comes back unchanged."""
    byte_tokens = list(_byte_letters().values())
    merged_tokens = [merge.replace(" ", "") for merge in _MERGES]
    n_ordinary = len(byte_tokens) + len(merged_tokens)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*_SPECIAL_TOKENS, *byte_tokens, *merged_tokens])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(_SPECIAL_TOKENS) + [gguf.TokenType.NORMAL] * n_ordinary)
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(_SPECIAL_TOKENS.index("<|im_start|>"))
    writer.add_eos_token_id(_SPECIAL_TOKENS.index("<|im_end|>"))
    writer.add_unk_token_id(_SPECIAL_TOKENS.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself where visible, else the next free letter from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
