"""The formulas of a model that need no other token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reference.architecture import Architecture
from reference.arrays import FloatArray
from reference.recurrence import causal_convolution, selective_scan
from reference.rotation import Rotation, rotation


class Transformer:
    """Weights of a model and what is computed from them, token by token.

    Args:
        weights: Matrices [n_out, n_in], stacks of matrices, and vectors by GGUF tensor name. Optional tensors take part
            if they are there: biases, norms of queries, keys and branches, gates, experts, an output head (else the
            token embeddings), latent keys and values, short convolutions, state spaces, attention sinks.
        architecture: The kind of model.
    """

    def __init__(self, weights: Mapping[str, npt.NDArray[Any]], architecture: Architecture) -> None:
        self._weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
        self.architecture = architecture
        self.n_layer = len(architecture.layers)
        self.n_vocab = len(self._weights["token_embd.weight"])

    def rotation(self, layer: int, n_ctx: int | None = None) -> Rotation:
        """How a layer rotates queries and keys in a context of n_ctx tokens (None: of the trained length)."""
        rope = self.architecture.layers[layer].rope
        factors = None
        if rope is not None and rope.has_factors:
            is_long = (n_ctx or self.architecture.n_ctx_train) > rope.n_ctx_orig
            chosen = "rope_factors_long" if is_long else "rope_factors_short"
            factors = self._weights.get("rope_freqs.weight", self._weights.get(f"{chosen}.weight"))
        return rotation(rope, self.head_size(layer), factors)

    def head_size(self, layer: int) -> int:
        """Components of a query head."""
        if (fused := self._find(layer, "attn_qkv.weight")) is not None:
            return len(fused) // (self.architecture.n_head + 2 * self.architecture.n_head_kv)
        return len(self._get(layer, "attn_q.weight")) // self.architecture.n_head

    def scale(self, layer: int) -> float:
        """Factor of the attention scores."""
        scale = self.architecture.attention_scale
        return 1.0 / np.sqrt(self.head_size(layer)) if scale is None else scale

    def alibi_slopes(self) -> FloatArray:
        """[n_head] ALiBi slopes: powers of one number; beyond the last power of two heads, odd powers of its root."""
        n_head = self.architecture.n_head
        n_regular = 1 << (n_head.bit_length() - 1)
        step = self.architecture.max_alibi_bias / n_regular
        exponents = [step * (head + 1) for head in range(n_regular)]
        exponents += [step / 2 * (2 * head + 1) for head in range(n_head - n_regular)]
        return 2.0 ** -np.array(exponents)

    def attention_sinks(self, layer: int) -> FloatArray | None:
        """[n_head] learned scores that share in the softmax without a value (gpt-oss). None: none."""
        return self._find(layer, "attn_sinks.weight")

    def is_recurrent(self, layer: int) -> bool:
        """Whether the layer is a short convolution or a state space instead of attention."""
        return self._mixer(layer) != "attn_output"

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """[n_tokens, n_embd] token embeddings."""
        embedded: FloatArray = self._weights["token_embd.weight"][np.asarray(tokens, np.int64)]
        embedded = embedded * self.architecture.embedding_scale
        return self._norm(embedded, "token_embd_norm") if self._has_embedding_norm() else embedded

    def queries(self, layer: int, hidden: FloatArray) -> FloatArray:
        """[n, n_head, head_size] un-rotated queries."""
        return self._normed_heads(layer, "q", self._project(layer, "q", self.attention_input(layer, hidden)))

    def keys_values(self, layer: int, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Un-rotated keys [n, n_head_kv, head_size] and values [n, n_head_kv, value size]."""
        hidden = self.attention_input(layer, hidden)
        if self._find(layer, "attn_kv_a_mqa.weight") is not None:
            return self._latent_keys_values(layer, hidden)
        keys, values = (self._project(layer, which, hidden) for which in ("k", "v"))
        return self._normed_heads(layer, "k", keys), self._unit(values) if self.architecture.unit_values else values

    def recur(self, layer: int, hidden: FloatArray) -> FloatArray:
        """What a recurrent layer makes of the residual stream [n, n_embd] of a whole sequence: [n, n_inner]."""
        normed = self.attention_input(layer, hidden)
        if self._find(layer, "shortconv.conv.weight") is None:
            return self._state_space(layer, normed)
        input_gate, output_gate, value = np.split(self._linear(layer, "shortconv.in_proj", normed), 3, axis=-1)
        return output_gate * causal_convolution(input_gate * value, self._get(layer, "shortconv.conv.weight"))

    def attention_input(self, layer: int, hidden: FloatArray) -> FloatArray:
        """[n, n_embd] the residual stream as attention reads it."""
        return self._norm(hidden, f"blk.{layer}.attn_norm")

    def after_attention(self, layer: int, hidden: FloatArray, mixed: FloatArray) -> FloatArray:
        """The rest of a layer, added to the residual stream [n, n_embd]: output projection and feed-forward network."""
        branch = self._linear(layer, self._mixer(layer), mixed)
        own_norm = self.architecture.ffn_norm
        if own_norm != "post_attention_norm" and self._find(layer, "post_attention_norm.weight") is not None:
            branch = self._norm(branch, f"blk.{layer}.post_attention_norm")
        before = hidden if self.architecture.parallel else hidden + branch
        shares_norm = self._find(layer, f"{own_norm}.weight") is None
        normed = self._norm(before, f"blk.{layer}.{'attn_norm' if shares_norm else own_norm}")
        fed = self._feed_forward(layer, normed)
        if self._find(layer, "post_ffw_norm.weight") is not None:
            fed = self._norm(fed, f"blk.{layer}.post_ffw_norm")
        scale = self._find(layer, "layer_output_scale.weight")
        return (hidden + branch + fed) * (1.0 if scale is None else scale)

    def logits(self, hidden: FloatArray) -> FloatArray:
        """[n, n_vocab] logits."""
        head = self._weights.get("output.weight", self._weights["token_embd.weight"])
        logits: FloatArray = self._norm(hidden, self.architecture.output_norm) @ head.T
        logits = logits * self.architecture.logit_scale + self._weights.get("output.bias", 0.0)
        return softcapped(logits, self.architecture.logit_softcap)

    def _project(self, layer: int, which: Literal["q", "k", "v"], hidden: FloatArray) -> FloatArray:
        """[n, heads, head_size] queries, keys or values, from a matrix of their own or one for all three."""
        n_head, n_head_kv = self.architecture.n_head, self.architecture.n_head_kv
        start, n_heads = {"q": (0, n_head), "k": (n_head, n_head_kv), "v": (n_head + n_head_kv, n_head_kv)}[which]
        if self._find(layer, "attn_qkv.weight") is None:
            return self._linear(layer, f"attn_{which}", hidden).reshape(len(hidden), n_heads, -1)
        heads = self._linear(layer, "attn_qkv", hidden).reshape(len(hidden), n_head + 2 * n_head_kv, -1)
        return heads[:, start : start + n_heads]

    def _latent_keys_values(self, layer: int, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Keys and values of every head from one latent vector, and a rotary part that all heads' keys share (MLA)."""
        n_latent, n_head = len(self._get(layer, "attn_kv_a_norm.weight")), self.architecture.n_head
        compressed = self._linear(layer, "attn_kv_a_mqa", hidden)
        latent = self._norm(compressed[:, :n_latent], f"blk.{layer}.attn_kv_a_norm")
        rotary = np.repeat(compressed[:, None, n_latent:], n_head, axis=1)
        if self._find(layer, "attn_kv_b.weight") is None:
            plain = np.einsum("nl,hlk->nhk", latent, self._get(layer, "attn_k_b.weight"))
            values = np.einsum("nl,hvl->nhv", latent, self._get(layer, "attn_v_b.weight"))
        else:
            both = self._linear(layer, "attn_kv_b", latent).reshape(len(hidden), n_head, -1)
            plain, values = np.split(both, [self.head_size(layer) - rotary.shape[-1]], axis=-1)
        return np.concatenate([plain, rotary], axis=-1), values

    def _normed_heads(self, layer: int, which: Literal["q", "k"], heads: FloatArray) -> FloatArray:
        if self._find(layer, f"attn_{which}_norm.weight") is not None:
            return self._norm(heads, f"blk.{layer}.attn_{which}_norm")
        return self._unit(heads) if self.architecture.layers[layer].unit_heads else heads

    def _state_space(self, layer: int, normed: FloatArray) -> FloatArray:
        """Mamba's layer, with Jamba's norms of what controls the state."""
        n_state, n_step = self._get(layer, "ssm_a").shape[1], self._get(layer, "ssm_dt.weight").shape[1]
        inputs, gate = np.split(self._linear(layer, "ssm_in", normed), 2, axis=-1)
        convolved = causal_convolution(inputs, self._get(layer, "ssm_conv1d.weight"))
        inputs = silu(convolved + self._get(layer, "ssm_conv1d.bias"))
        control = np.split(self._linear(layer, "ssm_x", inputs), [n_step, n_step + n_state], axis=-1)
        step, writes, reads = (
            self._norm(part, f"blk.{layer}.ssm_{name}_norm")
            for name, part in zip(("dt", "b", "c"), control, strict=True)
        )
        steps = np.logaddexp(0.0, self._linear(layer, "ssm_dt", step))
        outputs = selective_scan(inputs, steps, self._get(layer, "ssm_a"), writes, reads)
        return silu(gate) * (outputs + self._get(layer, "ssm_d") * inputs)

    def _feed_forward(self, layer: int, normed: FloatArray) -> FloatArray:
        if self._find(layer, "ffn_gate_inp.weight") is not None:
            return self._experts(layer, normed)
        up = self._linear(layer, "ffn_up", normed)
        if self._find(layer, "ffn_gate.weight") is not None:
            activated = self._activate(self._linear(layer, "ffn_gate", normed), up)
        elif up.shape[-1] == 2 * self._get(layer, "ffn_down.weight").shape[-1]:
            activated = self._activate(*np.split(up, 2, axis=-1))
        else:
            activated = self._activate(up)
        return self._linear(layer, "ffn_down", activated)

    def _experts(self, layer: int, normed: FloatArray) -> FloatArray:
        """Mixture of experts: each token goes to those with the highest scores, weighted by the scores' softmax."""
        scores = self._linear(layer, "ffn_gate_inp", normed)
        chosen = np.argsort(-scores, axis=-1)[:, : self.architecture.n_expert_used]
        shares = softmax(np.take_along_axis(scores, chosen, axis=-1))
        mixed = np.zeros_like(normed)
        for expert in range(scores.shape[-1]):
            gate, up = (self._linear(layer, f"ffn_{name}_exps", normed, expert) for name in ("gate", "up"))
            result = self._linear(layer, "ffn_down_exps", self._activate(gate, up), expert)
            mixed += (shares * (chosen == expert)).sum(axis=-1, keepdims=True) * result
        return mixed

    def _activate(self, gate: FloatArray, up: FloatArray | None = None) -> FloatArray:
        if self.architecture.activation == "clamped_silu":
            assert up is not None
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0) + 1.0
            return silu(1.702 * gate) / 1.702 * up
        activated = gelu(gate) if self.architecture.activation == "gelu" else silu(gate)
        return activated if up is None else activated * up

    def _linear(self, layer: int, name: str, vectors: FloatArray, expert: int | None = None) -> FloatArray:
        """Matrix (of an expert), and bias if there is one, applied to vectors [n, n_in]: [n, n_out]."""
        matrix, bias = self._get(layer, f"{name}.weight"), self._find(layer, f"{name}.bias")
        if expert is not None:
            matrix, bias = matrix[expert], None if bias is None else bias[expert]
        product: FloatArray = vectors @ matrix.T
        return product if bias is None else product + bias

    def _norm(self, vectors: FloatArray, name: str) -> FloatArray:
        """RMSNorm or LayerNorm over the last axis, with the weights and the bias, if any, of that name."""
        if self.architecture.norm == "layer":
            vectors = vectors - vectors.mean(axis=-1, keepdims=True)
        normed: FloatArray = self._unit(vectors) * self._weights[f"{name}.weight"]
        return normed + self._weights.get(f"{name}.bias", 0.0)

    def _unit(self, vectors: FloatArray) -> FloatArray:
        mean_square = np.mean(vectors**2, axis=-1, keepdims=True)
        unit: FloatArray = vectors / np.sqrt(mean_square + self.architecture.norm_eps)
        return unit

    def _mixer(self, layer: int) -> str:
        """Name of the output projection, which tells what mixes the tokens."""
        names = ("attn_output", "shortconv.out_proj", "ssm_out")
        return next(name for name in names if self._find(layer, f"{name}.weight") is not None)

    def _has_embedding_norm(self) -> bool:
        return "token_embd_norm.weight" in self._weights and self.architecture.output_norm != "token_embd_norm"

    def _get(self, layer: int, name: str) -> FloatArray:
        return self._weights[f"blk.{layer}.{name}"]

    def _find(self, layer: int, name: str) -> FloatArray | None:
        return self._weights.get(f"blk.{layer}.{name}")


def softcapped(values: FloatArray, cap: float) -> FloatArray:
    """Values squeezed to the open interval from -cap to cap; 0: as they are."""
    capped: FloatArray = cap * np.tanh(values / cap) if cap else values
    return capped


def softmax(scores: FloatArray) -> FloatArray:
    """Softmax over the last axis."""
    exponentials: FloatArray = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials


def silu(values: FloatArray) -> FloatArray:
    """x * sigmoid(x)."""
    return values / (1.0 + np.exp(-values))


def gelu(values: FloatArray) -> FloatArray:
    """GELU's tanh form, rounded to half precision before and after: ggml's CPU code looks it up in a table."""
    rounded = values.astype(np.float16).astype(np.float64)
    curve = 0.5 * rounded * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * rounded * (1.0 + 0.044715 * rounded**2)))
    looked_up: FloatArray = curve.astype(np.float16).astype(np.float64)
    return np.where(values <= -10.0, 0.0, np.where(values >= 10.0, values, looked_up))
