"""Stands in for the Hub when llama-cpp-python's own tests run: the default model for transformers, no others."""

import os

import pytest

TRANSFORMERS = {"Qwen3.5-0.8B-Q8_0.gguf", "tinyllamas/stories15M-q4_0.gguf", "bge-small-en-v1.5-q4_k_m.gguf"}


def hf_hub_download(repo_id: str, filename: str) -> str:
    if filename not in TRANSFORMERS:
        pytest.skip(f"{repo_id} is a model of another kind")
    return os.environ["DEFAULT_MODEL"]
