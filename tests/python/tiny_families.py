"""A tiny model for each kind that llama.cpp runs and LM-Infinite treats in a way of its own, or refuses."""

from __future__ import annotations

from typing import Any

from reference import AttentionTemperature, Chunks, Layer, Rope, SlidingWindow
from tiny_models import TinyShape
from tiny_tensors import Tensors

N_SWA = 12
"""Sliding window of the tiny models whose sliding layers have a length of their own choice."""

_NEOX = Rope(32, order="neox")
_LAYER_NORM_GELU = {"norm": "layer", "activation": "gelu"}
_SLIDING = SlidingWindow(N_SWA)


def _small(arch: str, **options: Any) -> TinyShape:
    """Two query heads of 32 that share a KV head, unless told otherwise."""
    return TinyShape(arch=arch, **{"n_head": 2, "n_head_kv": 1, "n_ff": 96, **options})


PARTIAL_ROTARY = {
    "gptneox": _small(
        "gptneox",
        n_head_kv=2,
        n_rot=16,
        layers=(Layer(Rope(16, order="neox")),) * 2,
        features={**_LAYER_NORM_GELU, "parallel": True},
        tensors=Tensors(bias="all", norm_bias=True, fused_qkv=True, gate="none"),
        metadata={"use_parallel_residual": True},
    ),
    "phi2": _small(
        "phi2",
        n_rot=12,
        layers=(Layer(Rope(12, order="neox")),) * 2,
        features={**_LAYER_NORM_GELU, "parallel": True},
        tensors=Tensors(bias="all", norm_bias=True, gate="none", ffn_norm=None, output_bias=True),
    ),
    "stablelm": _small(
        "stablelm",
        n_rot=8,
        layers=(Layer(Rope(8, order="neox")),) * 2,
        features={"norm": "layer"},
        tensors=Tensors(norm_bias=True),
    ),
    "chatglm": _small(
        "chatglm",
        n_rot=16,
        layers=(Layer(Rope(16)),) * 2,
        tensors=Tensors(bias="qkv", fused_qkv=True, gate="fused"),
    ),
}
"""Only a part of each head is rotated, in NeoX order (chatglm: in normal order)."""


def _phi3() -> TinyShape:
    rope = Rope(24, order="neox", n_ctx_orig=256, magnitude=1.1, has_factors=True)
    short = tuple(1.0 + 0.05 * pair for pair in range(12))
    long = tuple(1.0 + 0.5 * pair for pair in range(12))
    return _small(
        "phi3",
        n_ctx_train=512,
        n_rot=24,
        layers=(Layer(rope),) * 2,
        tensors=Tensors(
            fused_qkv=True, gate="fused", rope_factors=(("rope_factors_short", short), ("rope_factors_long", long))
        ),
        metadata={"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.1},
    )


SOME_WITHOUT_ROPE = {
    "smollm3": _small("smollm3", n_ff=64, layers=(Layer(Rope(32)),) * 3 + (Layer(),)),
}
"""Full attention everywhere, positions not."""

ROPE_SCALING = {
    "linear": _small(
        "llama",
        layers=(Layer(Rope(32, scale=0.25)),) * 2,
        metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "yarn": _small(
        "llama",
        layers=(Layer(Rope(32, scale=0.25, yarn=True, n_ctx_orig=64)),) * 2,
        metadata={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "llama3": _small(
        "llama",
        layers=(Layer(Rope(32, has_factors=True)),) * 2,
        tensors=Tensors(rope_factors=(("rope_freqs", (1.0,) * 6 + (1.5, 2.0, 3.0, 4.5, 6.0) + (8.0,) * 5),)),
    ),
    "phi3": _phi3(),
    "mistral3": _small(
        "mistral3",
        layers=(
            Layer(
                Rope(32, scale=0.25, yarn=True, n_ctx_orig=16),
                temperature=AttentionTemperature(scale=0.3, n_floor=16),
            ),
        )
        * 2,
        metadata={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "attention.temperature_scale": 0.3,
        },
    ),
}
"""Linear, YaRN, Llama 3's frequency factors, Phi 3's short and long ones; mistral3 has an attention temperature too."""


def _gpt_oss() -> TinyShape:
    rope = Rope(32, order="neox", scale=0.25, yarn=True, n_ctx_orig=64)
    return _small(
        "gpt-oss",
        n_ff=32,
        layers=(Layer(rope, _SLIDING), Layer(rope), Layer(rope, _SLIDING)),
        features={"activation": "clamped_silu", "ffn_norm": "post_attention_norm", "n_expert_used": 2},
        tensors=Tensors(bias="all", ffn_norm="post_attention_norm", n_expert=4, attention_sinks=True),
        metadata={
            "attention.sliding_window": N_SWA,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    )


def _gemma4() -> TinyShape:
    """Full layers have larger heads, of which a quarter turns; the last two layers reuse an earlier one's cache."""
    full = Rope(64, base=1e5, order="neox", has_factors=True)
    return _small(
        "gemma4",
        n_head=1,
        head_size=64,
        rope_freq_base=1e5,
        layers=(
            Layer(_NEOX, _SLIDING),
            Layer(_NEOX, _SLIDING),
            Layer(full),
            Layer(_NEOX, _SLIDING, source=1),
            Layer(full, source=2),
        ),
        features={
            "activation": "gelu",
            "attention_scale": 1.0,
            "unit_values": True,
            "embedding_scale": 8.0,
            "logit_softcap": 20.0,
        },
        tied_embeddings=True,
        tensors=Tensors(head_norms=True, branch_norms=True, rope_factors=(("rope_freqs", (1.0,) * 8 + (1e30,) * 24),)),
        metadata={
            "attention.sliding_window": N_SWA,
            "attention.sliding_window_pattern": [True, True, False, True, False],
            "attention.shared_kv_layers": 2,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "rope.dimension_count_swa": 32,
            "rope.freq_base_swa": 10000.0,
            "embedding_length_per_layer_input": 0,
            "final_logit_softcapping": 20.0,
        },
    )


_LLAMA4_CHUNK = Layer(Rope(32), Chunks(8192), unit_heads=True)

SLIDING_AND_FULL = {
    "gemma2": _small(
        "gemma2",
        layers=(Layer(_NEOX, _SLIDING), Layer(_NEOX)) * 2,
        features={
            "activation": "gelu",
            "embedding_scale": 8.0,
            "attention_softcap": 5.0,
            "logit_softcap": 20.0,
        },
        tied_embeddings=True,
        tensors=Tensors(branch_norms=True),
        metadata={
            "attention.sliding_window": N_SWA,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3": _small(
        "gemma3",
        rope_freq_base=1e5,
        layers=(Layer(_NEOX, _SLIDING), Layer(Rope(32, base=1e5, order="neox", scale=0.5))) * 2,
        features={"activation": "gelu", "embedding_scale": 8.0},
        tied_embeddings=True,
        tensors=Tensors(head_norms=True, branch_norms=True),
        metadata={
            "attention.sliding_window": N_SWA,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": 10000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 2.0,
        },
    ),
    "gemma4": _gemma4(),
    "gpt-oss": _gpt_oss(),
    "cohere2": _small(
        "cohere2",
        layers=(Layer(Rope(32), _SLIDING),) * 2 + (Layer(),),
        features={"norm": "layer", "parallel": True, "logit_scale": 0.5},
        tied_embeddings=True,
        tensors=Tensors(ffn_norm=None),
        metadata={
            "attention.sliding_window": N_SWA,
            "attention.sliding_window_pattern": 3,
            "logit_scale": 0.5,
        },
    ),
    "llama4": _small(
        "llama4",
        n_ctx_train=16384,
        layers=(_LLAMA4_CHUNK,) * 3 + (Layer(temperature=AttentionTemperature(scale=0.1, n_floor=8192, offset=1)),),
        metadata={
            "expert_count": 1,
            "expert_used_count": 1,
            "expert_feed_forward_length": 96,
            "interleave_moe_layer_step": 0,
        },
    ),
}
"""Some layers have a mask of their own; the full layers differ in frequencies, scaling, head size or have no RoPE."""

ALIBI = {
    "bloom": _small(
        "bloom",
        n_head=3,
        n_head_kv=3,
        layers=(Layer(),) * 2,
        features={**_LAYER_NORM_GELU, "max_alibi_bias": 8.0},
        tied_embeddings=True,
        tensors=Tensors(bias="all", norm_bias=True, fused_qkv=True, gate="none", embedding_norm=True),
    ),
    "mpt": _small(
        "mpt",
        layers=(Layer(),) * 2,
        features={**_LAYER_NORM_GELU, "max_alibi_bias": 4.0},
        tensors=Tensors(fused_qkv=True, gate="none"),
        metadata={"attention.max_alibi_bias": 4.0},
    ),
}
"""Scores fall linearly with the distance; three heads have slopes of both series."""

M_ROPE = {
    "qwen2vl": _small(
        "qwen2vl",
        layers=(Layer(_NEOX),) * 2,
        tensors=Tensors(bias="qkv"),
        metadata={"rope.dimension_sections": [4, 6, 6, 0]},
    ),
    "qwen3vl": _small(
        "qwen3vl",
        layers=(Layer(_NEOX),) * 2,
        tensors=Tensors(head_norms=True),
        metadata={"rope.dimension_sections": [6, 5, 5, 0]},
    ),
}
"""Several RoPE sections, which turn alike in text; qwen3vl's are interleaved."""

LATENT = {
    "deepseek2": _small(
        "deepseek2",
        head_size=48,
        n_rot=32,
        layers=(Layer(Rope(32, offset=16)),) * 2,
        tensors=Tensors(n_latent=32),
        metadata={
            "leading_dense_block_count": 2,
            "attention.q_lora_rank": 0,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 64,
            "attention.value_length": 32,
            "attention.key_length_mla": 48,
            "attention.value_length_mla": 48,
            "expert_feed_forward_length": 96,
            "expert_shared_count": 0,
        },
    ),
    "deepseek2-expanded": _small(
        "deepseek2",
        n_head_kv=2,
        head_size=64,
        n_rot=32,
        n_ff=64,
        layers=(Layer(Rope(32, offset=32)),) * 2,
        tensors=Tensors(n_latent=32, expanded=True),
        metadata={
            "leading_dense_block_count": 2,
            "attention.q_lora_rank": 0,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "expert_feed_forward_length": 64,
            "expert_shared_count": 0,
        },
    ),
}
"""Keys and values of all heads are made from one latent vector (MLA), which is cached, or they are."""

HYBRID = {
    "lfm2": _small(
        "lfm2",
        layers=(Layer(), Layer(_NEOX)) * 2,
        features={"output_norm": "token_embd_norm"},
        tied_embeddings=True,
        tensors=Tensors(head_norms=True, n_convolution=3),
        metadata={"attention.head_count_kv": [0, 1, 0, 1], "shortconv.l_cache": 3},
    ),
    "jamba": _small(
        "jamba",
        n_ff=64,
        layers=(Layer(),) * 4,
        tensors=Tensors(n_convolution=4, n_state=8),
        metadata={
            "attention.head_count_kv": [0, 1, 0, 1],
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 128,
            "ssm.state_size": 8,
            "ssm.time_step_rank": 8,
        },
    ),
}
"""Recurrent layers and attention take turns: short convolutions (lfm2), or Mamba and attention without RoPE."""

_WITH_LEARNED_POSITIONS = Tensors(bias="all", norm_bias=True, fused_qkv=True, gate="none", learned_positions=True)

REFUSED = {
    "gpt2": _small("gpt2", n_head_kv=2, layers=(Layer(),), features=_LAYER_NORM_GELU, tensors=_WITH_LEARNED_POSITIONS),
    "mpt-with-positions": _small(
        "mpt",
        layers=(Layer(),),
        features={**_LAYER_NORM_GELU, "max_alibi_bias": 8.0},
        tensors=_WITH_LEARNED_POSITIONS,
        metadata={"attention.max_alibi_bias": 8.0},
    ),
    "dream": _small("dream", n_layer=1),
}
"""Kinds that are refused, as far as they are put together like the others: learned positions, diffusion."""

KINDS = {
    "partial rotary": PARTIAL_ROTARY,
    "some layers without RoPE": SOME_WITHOUT_ROPE,
    "RoPE scaling": ROPE_SCALING,
    "sliding + full layers": SLIDING_AND_FULL,
    "ALiBi": ALIBI,
    "M-RoPE, text": M_ROPE,
    "latent attention (MLA)": LATENT,
    "recurrent + attention": HYBRID,
}

FAMILIES = PARTIAL_ROTARY | SOME_WITHOUT_ROPE | ROPE_SCALING | SLIDING_AND_FULL | ALIBI | M_ROPE | LATENT | HYBRID
"""All kinds that are supported."""
