"""Weights of a llama model from a GGUF file, as Hugging Face's `LlamaForCausalLM` has them, in float32.

Imported by a program that another Python may run: it needs NumPy and the `gguf` package only.
"""

from __future__ import annotations

import os
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]

_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def read_llama(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Weights]:
    """Hyperparameters and weights.

    Args:
        path: A GGUF file of architecture "llama".

    Returns:
        Arguments of `LlamaConfig`; and the weights by name, matrices as [n_out, n_in].

    Raises:
        ValueError: The model is something else than a plain llama.
    """
    reader = gguf.GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    config = llama_config(entries)
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    weights: Weights = {}
    for tensor in reader.tensors:
        layer, _, part = tensor.name.removeprefix("blk.").partition(".")
        shape = [int(n) for n in reversed(tensor.shape)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if tensor.name in _OUTER:
            weights[_OUTER[tensor.name]] = values
        elif layer.isdecimal() and part in _NAMES:
            values = without_permutation(values, heads[part]) if part in heads else values
            weights[f"model.layers.{layer}.{_NAMES[part]}"] = values
        else:
            raise ValueError(f"the peer runs plain llama models only: this one has a tensor {tensor.name}")
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config["vocab_size"] = len(weights["model.embed_tokens.weight"])
    return config, weights


def llama_config(entries: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `LlamaConfig` from a file's metadata.

    Raises:
        ValueError: The model is something else than a plain llama.
    """
    arch = entries["general.architecture"]
    scaling = entries.get(f"{arch}.rope.scaling.type", "none")
    n_embd, n_head = entries[f"{arch}.embedding_length"], entries[f"{arch}.attention.head_count"]
    n_rot = entries.get(f"{arch}.rope.dimension_count", n_embd // n_head)
    if arch != "llama" or scaling != "none" or n_rot * n_head != n_embd:
        raise ValueError(f"the peer runs plain llama models only: {arch}, RoPE scaling {scaling}, {n_rot} rotated")
    return {
        "hidden_size": n_embd,
        "intermediate_size": entries[f"{arch}.feed_forward_length"],
        "num_hidden_layers": entries[f"{arch}.block_count"],
        "num_attention_heads": n_head,
        "num_key_value_heads": entries.get(f"{arch}.attention.head_count_kv", n_head),
        "max_position_embeddings": entries[f"{arch}.context_length"],
        "rms_norm_eps": entries[f"{arch}.attention.layer_norm_rms_epsilon"],
        "rope_theta": entries.get(f"{arch}.rope.freq_base", 10000.0),
    }


def without_permutation(weights: npt.NDArray[np.float32], n_head: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key matrix in the order that rotates halves against each other.

    llama.cpp rotates neighbouring components: its converter interleaves the two halves of each head. This undoes it.

    Args:
        weights: Matrix [n_head * head_size, n_in] as the GGUF file has it.
        n_head: Heads that its rows belong to.
    """
    n_out, n_in = weights.shape
    pairs = weights.reshape(n_head, n_out // n_head // 2, 2, n_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(n_out, n_in))
