"""What tests of completions share: their text, and how an end is kept from coming by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lminf_edge import Llama
from lminf_edge.completion_types import Completion

QUESTION = [{"role": "user", "content": "Name three colours."}]


def text_of(llm: Llama, prompt: str | Sequence[int], **options: Any) -> str:
    completion: Completion = llm.create_completion(prompt, **options)
    return completion["choices"][0]["text"]


def banned(llm: Llama) -> dict[int, float]:
    """A bias against the end of the text: a random model could draw it at any time."""
    return dict.fromkeys(llm.tokenize("<|endoftext|><|im_start|><|im_end|>", special=True), -1000.0)
