"""Middle tokens: what is stored of tokens that leave the window, and when a model looks it up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lminf_edge._checks import check_choice, check_int, check_optional_int
from lminf_edge.errors import ConfigError

Recall: TypeAlias = bool | Literal["gated"]
"""Whether tokens look up middle tokens; "gated": only such that weigh more than all else that a head sees together."""

RecallScope: TypeAlias = Literal["none", "question", "all"]
"""Which tokens of a prompt and of what is written after it look up middle tokens."""

N_QUESTION = 64
"""Tokens at the end of a prompt that are taken for the question where nothing tells what it is."""

STORE_TYPES = ("f32", "f16", "q8_0", "q4_0")
"""Types that stored keys and values can have."""

N_MIDDLE_MAX = 2**28


@dataclass(frozen=True, kw_only=True)
class MiddleConfig:
    """The store of middle tokens, and how many of them a query looks up (arXiv 2308.16137, section 4).

    Keys and values of every token are stored, un-rotated and quantised. A token that has left the window can then be
    looked up: by the calls that ask for it, in each of the layers, by its exact product with the query.

    Attributes:
        k: Tokens that a query looks up in each layer.
        per: "kv_head": k for each KV head, whose query heads share them. "head": k for each query head, as the paper.
        distance: RoPE distance at which they are seen; a query that looks them up sees its window up to there, so that
            they stand behind it. None: half of n_clamp.
        layers: First layer that looks them up, and the one after the last. None: to the last one.
        cache_type: Type of stored keys and values: f32, f16, q8_0 or q4_0.
        max_tokens: The newest tokens that can be looked up; of what is older nothing is kept. More than n_window.
        n_candidates: Stored keys that are multiplied with a query, for each KV head (or query head, as `per` says). A
            first pass chooses them by one bit of each rotated component, which reads a seventh of the bytes; worth
            it from some 32,768 tokens on (docs/semantics.md, "Middle tokens"). At least k. None: all keys.
        path: File for the store, of which the system keeps in memory what is in use. None: in memory. A file that is
            there already must have been made for the same model and parameters.

    Raises:
        ConfigError: A value is out of range. What depends on the model is checked when a `Llama` is made.
    """

    k: int = 16
    per: Literal["kv_head", "head"] = "kv_head"
    distance: int | None = None
    layers: tuple[int, int | None] = (4, None)
    cache_type: str = "q8_0"
    max_tokens: int = 65536
    n_candidates: int | None = None
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_int("k", self.k, 1, 256)
        check_choice("per", self.per, ("kv_head", "head"))
        check_optional_int("distance", self.distance, 1)
        check_choice("cache_type", self.cache_type, STORE_TYPES)
        check_int("max_tokens", self.max_tokens, 1, N_MIDDLE_MAX)
        check_optional_int("n_candidates", self.n_candidates, self.k, 65536)
        if not isinstance(self.layers, tuple | list) or len(self.layers) != 2:
            raise ConfigError(f"layers = {self.layers!r}: must be (first, end), where end may be None")
        begin = check_int("layers[0]", self.layers[0], 0)
        end = check_optional_int("layers[1]", self.layers[1], begin + 1)
        object.__setattr__(self, "layers", (begin, end))
        if self.path is not None:
            if not isinstance(self.path, str | os.PathLike):
                raise ConfigError(f"path = {self.path!r}: must be a path or None")
            if not (path := os.fspath(self.path)) or "\0" in path:
                raise ConfigError(f"path = {path!r}: must be the name of a file")
            object.__setattr__(self, "path", path)


@dataclass(frozen=True, kw_only=True)
class RecallPlan:
    """How the tokens of a prompt and those drawn after it recall; numbers as of `recall_mode`.

    Attributes:
        reading: The beginning of the prompt.
        answering: The question, which is the rest of the prompt, and what is drawn.
    """

    reading: int = 0
    answering: int = 0


NO_RECALL = RecallPlan()


def recall_plan(scope: RecallScope | None, *, has_store: bool) -> RecallPlan:
    """The plan of a scope. None: "question" if anything is stored.

    Raises:
        ConfigError: There is no such scope, or nothing is stored that could be recalled.
    """
    if scope is not None:
        check_choice("recall", scope, ("none", "question", "all"))
    if scope == "none" or (scope is None and not has_store):
        return NO_RECALL
    return RecallPlan(
        reading=recall_mode("gated" if scope == "all" else False, has_store=has_store),
        answering=recall_mode(True, has_store=has_store),
    )


def recall_mode(recall: object, *, has_store: bool) -> int:
    """The extension's number of a way to recall.

    Raises:
        ConfigError: There is no such way, or nothing is stored that could be recalled.
    """
    if not isinstance(recall, bool) and recall != "gated":
        raise ConfigError(f"recall = {recall!r}: must be True, False or 'gated'")
    if recall and not has_store:
        raise ConfigError(f"recall = {recall!r}: nothing is stored; pass lminf=LMInfConfig(middle=MiddleConfig())")
    return 2 if recall == "gated" else int(recall)
