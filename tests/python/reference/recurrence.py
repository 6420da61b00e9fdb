"""What recurrent layers do to a whole sequence, from its first token on."""

from __future__ import annotations

import numpy as np

from reference.arrays import FloatArray


def causal_convolution(inputs: FloatArray, kernel: FloatArray) -> FloatArray:
    """Each channel of inputs [n, n_channel] with its own kernel [n_channel, length], whose last column is for now."""
    length = kernel.shape[1]
    padded = np.concatenate([np.zeros((length - 1, inputs.shape[1])), inputs])
    windows = np.lib.stride_tricks.sliding_window_view(padded, length, axis=0)
    convolved: FloatArray = (windows * kernel).sum(axis=-1)
    return convolved


def selective_scan(
    inputs: FloatArray, steps: FloatArray, decay: FloatArray, writes: FloatArray, reads: FloatArray
) -> FloatArray:
    """The state space of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2).

    Args:
        inputs: [n, n_channel].
        steps: [n, n_channel] time that passes with each token.
        decay: [n_channel, n_state] rates, negative.
        writes: [n, n_state] how each token enters the state (the paper's B).
        reads: [n, n_state] how it is read (C).

    Returns:
        [n, n_channel].
    """
    state = np.zeros_like(decay)
    outputs = np.empty_like(inputs)
    for token, (value, step) in enumerate(zip(inputs, steps, strict=True)):
        state = np.exp(step[:, None] * decay) * state + (step * value)[:, None] * writes[token]
        outputs[token] = state @ reads[token]
    return outputs
