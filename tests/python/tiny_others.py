"""Model files of kinds that are no decoder-only transformers. They can be loaded; all weights are zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiny_models import N_VOCAB, MetadataValue, write_model_file

_EMBD, _FF, _HEADS, _RANK = 64, 96, 2, 16

Shapes = dict[str, tuple[int, ...]]


def write_other_model(path: Path, arch: str) -> Path:
    """Writes a model of one of the architectures in `OTHERS`."""
    own_metadata, shapes = OTHERS[arch]
    metadata = {
        "context_length": 256,
        "embedding_length": _EMBD,
        "block_count": 1,
        "feed_forward_length": _FF,
        "attention.head_count": _HEADS,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": N_VOCAB,
        **own_metadata,
    }
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    write_model_file(path, arch, metadata, tensors)
    return path


def _normed(*names: str) -> Shapes:
    """Weight and bias of layer norms."""
    return {f"{name}.{part}": (_EMBD,) for name in names for part in ("weight", "bias")}


def _block(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


_TOKENS: Shapes = {"token_embd.weight": (N_VOCAB, _EMBD)}
_SQUARE = (_EMBD, _EMBD)
_PROJECTIONS: Shapes = {f"attn_{name}": _SQUARE for name in "qkvo"}
_FEED_FORWARD: Shapes = {"ffn_up": (_FF, _EMBD), "ffn_down": (_EMBD, _FF)}

_MAMBA: Shapes = {
    "output_norm.weight": (_EMBD,),
    "blk.0.attn_norm.weight": (_EMBD,),
    "blk.0.ssm_in.weight": (4 * _EMBD, _EMBD),
    "blk.0.ssm_conv1d.weight": (2 * _EMBD, 4),
    "blk.0.ssm_conv1d.bias": (2 * _EMBD,),
    "blk.0.ssm_x.weight": (_RANK + 2 * 8, 2 * _EMBD),
    "blk.0.ssm_dt.weight": (2 * _EMBD, _RANK),
    "blk.0.ssm_dt.bias": (2 * _EMBD,),
    "blk.0.ssm_a": (2 * _EMBD, 8),
    "blk.0.ssm_d": (2 * _EMBD,),
    "blk.0.ssm_out.weight": (_EMBD, 2 * _EMBD),
}

_RWKV6: Shapes = {
    **_normed("token_embd_norm", "output_norm", "blk.0.attn_norm", "blk.0.attn_norm_2", "blk.0.time_mix_ln"),
    "output.weight": (N_VOCAB, _EMBD),
    **_block(
        "blk.0",
        {
            "time_mix_w1": (5 * _RANK, _EMBD),
            "time_mix_w2": (5, _EMBD, _RANK),
            "time_mix_lerp_x": (1, 1, _EMBD),
            "time_mix_lerp_fused": (5, 1, 1, _EMBD),
            "time_mix_first": (_HEADS, _EMBD // _HEADS),
            "time_mix_decay": (_EMBD,),
            "time_mix_decay_w1": (_RANK, _EMBD),
            "time_mix_decay_w2": (_EMBD, _RANK),
            **{f"time_mix_{name}": _SQUARE for name in ("key", "value", "receptance", "gate", "output")},
            "channel_mix_lerp_k": (1, 1, _EMBD),
            "channel_mix_lerp_r": (1, 1, _EMBD),
            "channel_mix_key": (_FF, _EMBD),
            "channel_mix_value": (_EMBD, _FF),
            "channel_mix_receptance": _SQUARE,
        },
    ),
}

_BERT: Shapes = {
    **_normed("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"),
    "position_embd.weight": (256, _EMBD),
    **_block("blk.0", {"attn_q": _SQUARE, "attn_k": _SQUARE, "attn_v": _SQUARE, "attn_output": _SQUARE}),
    **_block("blk.0", _FEED_FORWARD),
}

_T5: Shapes = {
    "enc.output_norm.weight": (_EMBD,),
    "dec.output_norm.weight": (_EMBD,),
    **{
        name: shape
        for side in ("enc.blk.0", "dec.blk.0")
        for name, shape in _block(
            side,
            {**_PROJECTIONS, **_FEED_FORWARD, "attn_norm": (_EMBD,), "ffn_norm": (_EMBD,), "attn_rel_b": (8, _HEADS)},
        ).items()
    },
    **_block("dec.blk.0", {f"cross_{name}": shape for name, shape in _PROJECTIONS.items()}),
    "dec.blk.0.cross_attn_norm.weight": (_EMBD,),
}

_STATE_SPACE: dict[str, MetadataValue] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * _EMBD,
    "ssm.state_size": 8,
    "ssm.time_step_rank": _RANK,
    "attention.head_count": 0,
}
_WKV: dict[str, MetadataValue] = {
    "wkv.head_size": _EMBD // _HEADS,
    "time_mix_extra_dim": _RANK,
    "time_decay_extra_dim": _RANK,
    "attention.head_count": 0,
}

OTHERS: dict[str, tuple[dict[str, MetadataValue], Shapes]] = {
    "mamba": (_STATE_SPACE, _TOKENS | _MAMBA),
    "rwkv6": (_WKV, _TOKENS | _RWKV6),
    "bert": ({"attention.causal": False, "tokenizer.ggml.token_type_count": 2}, _TOKENS | _BERT),
    "t5": ({"attention.relative_buckets_count": 8}, _TOKENS | _T5),
}
"""Metadata and tensor shapes by architecture: recurrent, encoder, and encoder-decoder models."""
