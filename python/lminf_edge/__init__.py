"""LM-Infinite for llama.cpp: GGUF models read and write without end, in constant memory and at constant speed.

Example:
    >>> from lminf_edge import Llama, LMInfConfig
    >>> llm = Llama("model.gguf", lminf=LMInfConfig(n_sink=4, n_window=2048))
    >>> for step in llm.generate("Once upon a time", max_tokens=64):
    ...     print(step.text, end="")
"""

from __future__ import annotations

from importlib.metadata import version

from lminf_edge._library import lib_path
from lminf_edge.chat_session import ChatSession
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import (
    ConfigError,
    ContextError,
    LMInfError,
    ModelLoadError,
    StateError,
    UnsupportedModelError,
)
from lminf_edge.llama import Llama
from lminf_edge.middle import MiddleConfig
from lminf_edge.records import ChatUsage, GenerationStep, MemoryStats, RecalledToken, TextPiece

__version__ = version("lminf-edge")

__all__ = [
    "ChatSession",
    "ChatUsage",
    "ConfigError",
    "ContextError",
    "GenerationStep",
    "LMInfConfig",
    "LMInfError",
    "Llama",
    "MemoryStats",
    "MiddleConfig",
    "ModelLoadError",
    "RecalledToken",
    "StateError",
    "TextPiece",
    "UnsupportedModelError",
    "__version__",
    "lib_path",
]
