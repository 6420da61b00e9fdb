"""Random weights of tiny models, with attention sharp enough to notice a wrong mask.

The weights are drawn so that attention scores have a standard deviation of about two and the attention output weighs as
much as the token embedding: one key too many or one RoPE distance off by one then moves the logits visibly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tiny_models import TinyShape

Tensor = npt.NDArray[np.float32]
NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Tensors:
    """Which tensors a model has, where kinds of models differ.

    Attributes:
        bias: Projections that have a bias: none, queries, keys and values, or all and the norms.
        norm_bias: Norms have a bias.
        fused_qkv: One matrix makes queries, keys and values.
        gate: Gate of the feed-forward network: its own matrix, the first half of "ffn_up", or none.
        ffn_norm: Name of the norm before the feed-forward network. None: it reads what attention reads.
        head_norms: Queries and keys are normed head by head.
        branch_norms: What attention and the feed-forward network add is normed first.
        embedding_norm: Token embeddings are normed.
        output_bias: The output head has a bias.
        learned_positions: An embedding for each position of the trained length is added to the tokens'.
        n_expert: Experts, each with biases, instead of one feed-forward network. 0: none.
        attention_sinks: Each head has a learned attention sink.
        n_latent: Length of the latent vector that keys and values are made from. 0: none.
        expanded: They are made before they are cached, by one matrix.
        n_convolution: Length of the convolutions of recurrent layers. 0: all layers have attention.
        n_state: Numbers in the state of each of their channels. 0: they are nothing but convolutions.
        rope_factors: Frequency factors by tensor name.
    """

    bias: Literal["none", "qkv", "all"] = "none"
    norm_bias: bool = False
    fused_qkv: bool = False
    gate: Literal["separate", "fused", "none"] = "separate"
    ffn_norm: str | None = "ffn_norm"
    head_norms: bool = False
    branch_norms: bool = False
    embedding_norm: bool = False
    output_bias: bool = False
    learned_positions: bool = False
    n_expert: int = 0
    attention_sinks: bool = False
    n_latent: int = 0
    expanded: bool = False
    n_convolution: int = 0
    n_state: int = 0
    rope_factors: tuple[tuple[str, tuple[float, ...]], ...] = ()


def random_tensors(shape: TinyShape, n_vocab: int, rng: np.random.Generator) -> NamedTensors:
    """All tensors of a model by name; the same generator state gives the same numbers."""
    draw = _Draw(shape, rng)
    scale = shape.architecture.embedding_scale
    yield "token_embd.weight", rng.normal(0.0, 1.0 / scale, (n_vocab, shape.n_embd)).astype(np.float32)
    if shape.tensors.learned_positions:
        yield "position_embd.weight", rng.normal(0.0, 1.0, (shape.n_ctx_train, shape.n_embd)).astype(np.float32)
    if shape.tensors.embedding_norm:
        yield from draw.norm("token_embd_norm")
    for layer in range(shape.n_layer):
        yield from _layer(draw, layer)
    output_norm = shape.architecture.output_norm
    if shape.tied_embeddings:
        yield from draw.norm(output_norm, gain=scale / np.sqrt(shape.n_embd))
    else:
        yield from draw.norm(output_norm)
        yield from draw.linear("output", n_vocab, shape.n_embd, 1.0, bias=shape.tensors.output_bias)
    for name, factors in shape.tensors.rope_factors:
        yield f"{name}.weight", np.array(factors, np.float32)


class _Draw:
    """Draws norms and matrices."""

    def __init__(self, shape: TinyShape, rng: np.random.Generator) -> None:
        self.shape = shape
        self.rng = rng
        # ggml looks GELU up in a table: where two implementations take neighbouring entries, the error must stay small.
        self.feed_forward_share = 0.05 if shape.architecture.activation == "gelu" else 1.0

    def norm(self, name: str, size: int | None = None, *, gain: float = 1.0, bias: bool | None = None) -> NamedTensors:
        size = size or self.shape.n_embd
        yield f"{name}.weight", (gain * self.rng.uniform(0.8, 1.2, size)).astype(np.float32)
        if self.shape.tensors.norm_bias if bias is None else bias:
            yield f"{name}.bias", self.rng.normal(0.0, 0.1, size).astype(np.float32)

    def linear(
        self, name: str, n_out: int, n_in: int, gain: float, *, bias: bool | None = None, stack: tuple[int, ...] = ()
    ) -> NamedTensors:
        yield f"{name}.weight", self.rng.normal(0.0, gain / np.sqrt(n_in), (*stack, n_out, n_in)).astype(np.float32)
        if self.shape.tensors.bias == "all" if bias is None else bias:
            yield f"{name}.bias", self.rng.normal(0.0, 0.3, (*stack, n_out)).astype(np.float32)


def _layer(draw: _Draw, layer: int) -> NamedTensors:
    shape, block = draw.shape, f"blk.{layer}"
    yield from draw.norm(f"{block}.attn_norm")
    if shape.is_recurrent(layer):
        yield from _state_space(draw, block) if shape.tensors.n_state else _convolution(draw, block)
    elif shape.tensors.n_latent:
        yield from _latent_attention(draw, block)
    else:
        yield from _attention(draw, block, layer)
    if shape.tensors.branch_norms:
        yield from draw.norm(f"{block}.post_attention_norm")
    if shape.tensors.ffn_norm is not None:
        yield from draw.norm(f"{block}.{shape.tensors.ffn_norm}")
    yield from _experts(draw, block) if shape.tensors.n_expert else _feed_forward(draw, block)
    if shape.tensors.branch_norms:
        yield from draw.norm(f"{block}.post_ffw_norm", gain=draw.feed_forward_share)


def _attention(draw: _Draw, block: str, layer: int) -> NamedTensors:
    shape, size = draw.shape, draw.shape.head_size_of(layer)
    n_embd, n_query, n_key = shape.n_embd, shape.n_head * size, shape.n_head_kv * size
    bias = shape.tensors.bias != "none"
    # A query or key of gain g has components of deviation g, so their product, scaled, has deviation g * g.
    if shape.tensors.fused_qkv:
        yield from draw.linear(f"{block}.attn_qkv", n_query + 2 * n_key, n_embd, 1.4, bias=bias)
    else:
        yield from draw.linear(f"{block}.attn_q", n_query, n_embd, 1.4, bias=bias)
        if shape.architecture.layers[layer].source is None:
            yield from draw.linear(f"{block}.attn_k", n_key, n_embd, 1.4, bias=bias)
            yield from draw.linear(f"{block}.attn_v", n_key, n_embd, 1.0, bias=bias)
    if shape.tensors.head_norms:
        gain = np.sqrt(2.0 / ((shape.architecture.attention_scale or 1.0 / np.sqrt(size)) * np.sqrt(size)))
        yield from draw.norm(f"{block}.attn_q_norm", size, gain=gain, bias=False)
        if shape.architecture.layers[layer].source is None:
            yield from draw.norm(f"{block}.attn_k_norm", size, gain=gain, bias=False)
    if shape.tensors.attention_sinks:
        yield f"{block}.attn_sinks.weight", draw.rng.normal(1.0, 1.0, shape.n_head).astype(np.float32)
    yield from draw.linear(f"{block}.attn_output", n_embd, n_query, 1.5)


def _latent_attention(draw: _Draw, block: str) -> NamedTensors:
    """The last n_rot components of a head of keys are rotary and shared, the others are made from the latent vector."""
    shape, n_latent = draw.shape, draw.shape.tensors.n_latent
    n_rot = shape.n_rot
    n_plain = shape.head_size - n_rot
    heads = (shape.n_head,)
    yield from draw.linear(f"{block}.attn_q", shape.n_head * shape.head_size, shape.n_embd, 1.4)
    yield from draw.linear(f"{block}.attn_kv_a_mqa", n_latent + n_rot, shape.n_embd, 1.4)
    yield from draw.norm(f"{block}.attn_kv_a_norm", n_latent)
    if shape.tensors.expanded:
        yield from draw.linear(f"{block}.attn_kv_b", shape.n_head * (n_plain + shape.head_size), n_latent, 1.2)
    else:
        of_key = draw.rng.normal(0.0, 1.4 / np.sqrt(n_latent), (*heads, n_latent, n_plain))
        yield f"{block}.attn_k_b.weight", of_key.astype(np.float32)
        yield from draw.linear(f"{block}.attn_v_b", shape.head_size, n_latent, 1.0, stack=heads)
    yield from draw.linear(f"{block}.attn_output", shape.n_embd, shape.n_head * shape.head_size, 1.5)


def _convolution(draw: _Draw, block: str) -> NamedTensors:
    n_embd, n_kernel = draw.shape.n_embd, draw.shape.tensors.n_convolution
    yield from draw.linear(f"{block}.shortconv.in_proj", 3 * n_embd, n_embd, 1.0)
    yield f"{block}.shortconv.conv.weight", draw.rng.normal(0.0, 0.6, (n_embd, n_kernel)).astype(np.float32)
    yield from draw.linear(f"{block}.shortconv.out_proj", n_embd, n_embd, 1.0)


def _state_space(draw: _Draw, block: str) -> NamedTensors:
    rng, n_embd, n_state, n_step = draw.rng, draw.shape.n_embd, draw.shape.tensors.n_state, 8
    n_inner = 2 * n_embd
    yield from draw.linear(f"{block}.ssm_in", 2 * n_inner, n_embd, 1.0)
    kernels = rng.normal(0.0, 0.6, (n_inner, draw.shape.tensors.n_convolution))
    yield f"{block}.ssm_conv1d.weight", kernels.astype(np.float32)
    yield f"{block}.ssm_conv1d.bias", rng.normal(0.0, 0.3, n_inner).astype(np.float32)
    yield from draw.linear(f"{block}.ssm_x", n_step + 2 * n_state, n_inner, 1.0)
    for name, size in (("dt", n_step), ("b", n_state), ("c", n_state)):
        yield from draw.norm(f"{block}.ssm_{name}_norm", size)
    yield from draw.linear(f"{block}.ssm_dt", n_inner, n_step, 1.0, bias=True)
    yield f"{block}.ssm_a", -rng.uniform(0.2, 2.0, (n_inner, n_state)).astype(np.float32)
    yield f"{block}.ssm_d", rng.normal(0.0, 1.0, n_inner).astype(np.float32)
    yield from draw.linear(f"{block}.ssm_out", n_embd, n_inner, 1.0)


def _feed_forward(draw: _Draw, block: str) -> NamedTensors:
    shape = draw.shape
    if shape.tensors.gate == "separate":
        yield from draw.linear(f"{block}.ffn_gate", shape.n_ff, shape.n_embd, 1.0)
    n_up = 2 * shape.n_ff if shape.tensors.gate == "fused" else shape.n_ff
    yield from draw.linear(f"{block}.ffn_up", n_up, shape.n_embd, 1.0)
    yield from draw.linear(f"{block}.ffn_down", shape.n_embd, shape.n_ff, 0.7 * draw.feed_forward_share)


def _experts(draw: _Draw, block: str) -> NamedTensors:
    shape, experts = draw.shape, (draw.shape.tensors.n_expert,)
    yield from draw.linear(f"{block}.ffn_gate_inp", shape.tensors.n_expert, shape.n_embd, 1.0, bias=True)
    for name in ("gate", "up"):
        yield from draw.linear(f"{block}.ffn_{name}_exps", shape.n_ff, shape.n_embd, 1.0, bias=True, stack=experts)
    yield from draw.linear(f"{block}.ffn_down_exps", shape.n_embd, shape.n_ff, 0.7, bias=True, stack=experts)
