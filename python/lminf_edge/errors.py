"""What can go wrong, by what a caller can do about it."""

from __future__ import annotations


class LMInfError(Exception):
    """Base class of every error that lminf_edge raises on purpose."""


class ConfigError(LMInfError, ValueError):
    """An option or argument, or a combination of them, is out of range. Nothing was changed."""


class ModelLoadError(LMInfError):
    """A model file is missing, unreadable, damaged or cannot be fetched."""


class UnsupportedModelError(LMInfError):
    """The model is intact, but llama.cpp or LM-Infinite cannot run it as asked."""


class ContextError(LMInfError):
    """The context cannot be made, or has no room for more tokens."""


class StateError(LMInfError):
    """The call does not fit the object's state: closed, busy in another thread, nothing evaluated yet."""
