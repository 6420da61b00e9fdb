"""The PyPI package `attention-sinks` on torch as a peer: see `protocol.py` for what it is asked.

Run by its path, possibly with another Python than lminf-edge's: it imports nothing of that package.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_sinks import LlamaForCausalLM
from gguf_llama import read_llama  # type: ignore[import-not-found]  # beside this file, which is run by its path
from transformers import LlamaConfig

_N_PIECE = 256


class AttentionSinks:
    """A llama model with attention_sinks' cache, in float32."""

    def open(self, model: str, n_sink: int, n_window: int, n_threads: int) -> dict[str, Any]:
        """Loads the weights of a GGUF file."""
        torch.set_num_threads(n_threads)
        config, weights = read_llama(model)
        state = {name: torch.from_numpy(values) for name, values in weights.items()}
        self._model = LlamaForCausalLM.from_pretrained(
            None,
            config=LlamaConfig(**config),
            state_dict=state,
            attention_sink_size=n_sink,
            attention_sink_window_size=n_window,
        ).eval()
        self._cache: Any = None
        n_read = sum(weight.nbytes for name, weight in state.items() if name != "model.embed_tokens.weight")
        packages = ("attention-sinks", "torch", "transformers")
        return {"versions": {name: version(name) for name in packages}, "weight_bytes": n_read}

    def fill(self, tokens: list[int]) -> dict[str, Any]:
        """Reads a text from the beginning."""
        self._cache = None
        for begin in range(0, len(tokens), _N_PIECE):
            self._read(tokens[begin : begin + _N_PIECE])
        return {"n_read": len(tokens)}

    def decode(self, tokens: list[int], n_at_least: int, max_seconds: float) -> dict[str, Any]:
        """Reads tokens one by one."""
        self._read(tokens[:1])
        n_done, seconds, begin = 0, 0.0, time.perf_counter()
        while n_done < len(tokens) - 1 and (n_done < n_at_least or seconds < max_seconds):
            self._read(tokens[n_done + 1 : n_done + 2])
            n_done += 1
            seconds = time.perf_counter() - begin
        return {"n_tokens": n_done, "seconds": seconds}

    def footprint(self) -> dict[str, Any]:
        """What the process keeps in memory."""
        kv_bytes = sum(tensor.nbytes for layer in self._cache or () for tensor in layer)
        return {"kv_bytes": kv_bytes, "resident_bytes": _resident_bytes()}

    def logits(self, tokens: list[int], file: str) -> dict[str, Any]:
        """Writes the logits after each token of a text to a file."""
        self._cache = None
        np.save(file, self._read(tokens).numpy())
        return {}

    def loss(self, tokens: list[int]) -> dict[str, Any]:
        """Mean loss of a text."""
        self._cache = None
        logits = self._read(tokens)
        return {"loss": float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))}

    def _read(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            output = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[0]
        return logits


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    peer = AttentionSinks()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(peer, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
