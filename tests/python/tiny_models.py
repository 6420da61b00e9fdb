"""Tiny random models in GGUF: seeded, a few hundred kilobytes, with attention sharp enough to notice a wrong mask.

The weights are drawn so that attention scores have a standard deviation of about two and the attention output weighs as
much as the token embedding: one key too many or one RoPE distance off by one then moves the logits visibly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from reference import Transformer

Weights = dict[str, npt.NDArray[np.float32]]
"""Weight matrices by GGUF tensor name, each of shape [n_out, n_in]; norms are vectors."""

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
    """Hyperparameters of a tiny llama-architecture model."""

    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 32
    n_ff: int = 128
    n_ctx_train: int = 256
    rope_freq_base: float = 10000.0
    rms_norm_eps: float = 1e-5
    tied_embeddings: bool = False

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model file and what is in it. The weights are the numbers in the file, F16 rounding included."""

    path: Path
    shape: TinyShape
    weights: Weights

    @cached_property
    def transformer(self) -> Transformer:
        """The same model for the reference."""
        return Transformer(
            self.weights,
            n_head=self.shape.n_head,
            n_head_kv=self.shape.n_head_kv,
            rope_freq_base=self.shape.rope_freq_base,
            rms_norm_eps=self.shape.rms_norm_eps,
        )


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
        weight_type: Type of the weight matrices, "f32" or "f16". Norms are F32, as in every GGUF file.

    Returns:
        The model with its weights as F32.
    """
    matrix_type = {"f32": np.float32, "f16": np.float16}[weight_type]
    weights = {
        name: tensor.astype(matrix_type).astype(np.float32) if tensor.ndim == 2 else tensor
        for name, tensor in _random_tensors(shape, np.random.default_rng(seed))
    }

    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, shape, weight_type)
    _add_tokenizer(writer)
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor.astype(matrix_type) if tensor.ndim == 2 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, shape, weights)


def random_tokens(n_tokens: int, *, seed: int) -> list[int]:
    """Uniformly random ordinary tokens (no special ones)."""
    tokens: list[int] = np.random.default_rng(seed).integers(len(_SPECIAL_TOKENS), N_VOCAB, n_tokens).tolist()
    return tokens


def _random_tensors(shape: TinyShape, rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    def matrix(n_out: int, n_in: int, gain: float) -> npt.NDArray[np.float32]:
        return rng.normal(0.0, gain / np.sqrt(n_in), (n_out, n_in)).astype(np.float32)

    def norm(gain: float = 1.0) -> npt.NDArray[np.float32]:
        return (gain * rng.uniform(0.8, 1.2, shape.n_embd)).astype(np.float32)

    n_embd, n_embd_kv = shape.n_embd, shape.n_head_kv * shape.head_size
    # A query or key of gain g has components of deviation g, so their scaled product has deviation g * g.
    yield "token_embd.weight", rng.normal(0.0, 1.0, (N_VOCAB, n_embd)).astype(np.float32)
    for layer in range(shape.n_layer):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", norm()
        yield f"{block}.attn_q.weight", matrix(n_embd, n_embd, 1.4)
        yield f"{block}.attn_k.weight", matrix(n_embd_kv, n_embd, 1.4)
        yield f"{block}.attn_v.weight", matrix(n_embd_kv, n_embd, 1.0)
        yield f"{block}.attn_output.weight", matrix(n_embd, n_embd, 1.5)
        yield f"{block}.ffn_norm.weight", norm()
        yield f"{block}.ffn_gate.weight", matrix(shape.n_ff, n_embd, 1.0)
        yield f"{block}.ffn_up.weight", matrix(shape.n_ff, n_embd, 1.0)
        yield f"{block}.ffn_down.weight", matrix(n_embd, shape.n_ff, 0.7)
    if shape.tied_embeddings:
        yield "output_norm.weight", norm(1.0 / np.sqrt(n_embd))
    else:
        yield "output_norm.weight", norm()
        yield "output.weight", matrix(N_VOCAB, n_embd, 1.0)


def _add_hyperparameters(writer: gguf.GGUFWriter, shape: TinyShape, weight_type: str) -> None:
    writer.add_name("tiny random llama")
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(N_VOCAB)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if weight_type == "f32" else gguf.LlamaFileType.MOSTLY_F16)


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
