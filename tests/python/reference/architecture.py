"""Kinds of models, described by what tells them apart. What a model has tensors for needs no word here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reference.semantics import View


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864) and its scalings.

    Attributes:
        n_rot: Components of a head that are rotated, two by two; the others are left as they are.
        base: Pair i turns by position * base**(-2i / n_rot), before scaling.
        order: "normal": neighbours are a pair; "neox": components n_rot / 2 apart.
        offset: First rotated component.
        scale: Positions are multiplied by it: 1 / factor of linear scaling, or of YaRN's interpolation.
        yarn: YaRN (Peng et al., arXiv 2309.00071): fast pairs are not interpolated, slow ones are.
        n_ctx_orig: Length before scaling: YaRN's bounds follow from it; longer contexts take the long factors.
        magnitude: Factor of every rotated component, on top of YaRN's own.
        has_factors: The model's frequency factors ("rope_freqs" or "rope_factors_long" / "_short") divide the angles.
    """

    n_rot: int
    base: float = 10000.0
    order: Literal["normal", "neox"] = "normal"
    offset: int = 0
    scale: float = 1.0
    yarn: bool = False
    n_ctx_orig: int = 0
    magnitude: float = 1.0
    has_factors: bool = False


@dataclass(frozen=True)
class AttentionTemperature:
    """Queries are multiplied by 1 + scale * log(1 + floor((position + offset) / n_floor)), as in Llama 4."""

    scale: float
    n_floor: int
    offset: int = 0


@dataclass(frozen=True)
class Layer:
    """What a layer does to positions.

    Attributes:
        rope: Rotary embedding. None: keys have no position, or only ALiBi's.
        view: The model's own mask. None: full attention, which LM-Infinite bounds.
        temperature: Attention temperature.
        source: Layer whose keys and values this one attends to. None: its own.
        unit_heads: Queries and keys are RMS-normed without weights.
    """

    rope: Rope | None = None
    view: View | None = None
    temperature: AttentionTemperature | None = None
    source: int | None = None
    unit_heads: bool = False


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        n_head: Query heads.
        n_head_kv: Key and value heads; each serves n_head / n_head_kv query heads.
        layers: One entry per layer.
        n_ctx_train: Length that the model was trained on, in tokens.
        norm: "rms": RMSNorm; "layer": LayerNorm.
        norm_eps: Added to the mean square, or to the variance.
        activation: Of the feed-forward network; with a gate it acts on the gate. "clamped_silu" is gpt-oss's.
        parallel: Attention and feed-forward network both read the layer's input.
        ffn_norm: Name of the norm before the feed-forward network.
        n_expert_used: Experts that a token is sent to.
        attention_scale: Factor of the scores. None: 1 / sqrt(head size).
        attention_softcap: Scores are squeezed to +- this by tanh. 0: not.
        max_alibi_bias: ALiBi (Press et al., arXiv 2108.12409): slopes are powers of 2**(-max_alibi_bias / n). 0: none.
        unit_values: Values are RMS-normed without weights.
        embedding_scale: Factor of the token embeddings.
        output_norm: Name of the last norm.
        logit_scale: Factor of the logits.
        logit_softcap: Logits are squeezed to +- this by tanh. 0: not.
    """

    n_head: int
    n_head_kv: int
    layers: tuple[Layer, ...]
    n_ctx_train: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "clamped_silu"] = "silu"
    parallel: bool = False
    ffn_norm: str = "ffn_norm"
    n_expert_used: int = 0
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    max_alibi_bias: float = 0.0
    unit_values: bool = False
    embedding_scale: float = 1.0
    output_norm: str = "output_norm"
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
