"""How the next token is drawn. The samplers themselves are llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lminf_edge._checks import check_float, check_int
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError

N_SEED_MAX = 2**32 - 2
"""Largest seed: llama.cpp takes the next number to mean "a random one"."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options in the order in which they act on the logits.

    Attributes:
        grammar: GBNF with a rule named root, which the text has to follow. "" is none.
        logit_bias: Added to the logits of these tokens; -100 forbids a token in practice, 100 forces it.
        repeat_penalty: Logits of recent tokens are divided (negative ones multiplied) by it; 1 leaves them alone.
        frequency_penalty: Subtracted from a recent token's logit once per occurrence.
        presence_penalty: Subtracted from a recent token's logit once.
        penalty_last_n: How many of the last tokens, prompt included, are recent.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens that together have this probability; 1 keeps all.
        min_p: Keep tokens at least this probable relative to the most probable one; 0 keeps all.
        temperature: Logits are divided by it; 0 takes the most probable token.

    Raises:
        ConfigError: A value is out of range.
        TypeError: The grammar is no string, or logit_bias no mapping.
    """

    grammar: str = ""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.grammar, str):
            raise TypeError(f"grammar must be a string (GBNF), not {type(self.grammar).__name__}")
        if "\0" in self.grammar:
            raise ConfigError("grammar: a zero character ends the text for llama.cpp")
        object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))
        check_float("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        check_float("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        check_float("presence_penalty", self.presence_penalty, -100.0, 100.0)
        check_int("penalty_last_n", self.penalty_last_n, 0, 2**20)
        check_int("top_k", self.top_k, 0)
        check_float("top_p", self.top_p, 0.0, 1.0)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("temperature", self.temperature, 0.0, 1000.0)

    def sampler(self, model: _core.Model, seed: int) -> _core.Sampler:
        """llama.cpp's sampler chain for these options.

        Raises:
            ConfigError: The grammar is wrong, or a biased token is outside the vocabulary.
        """
        return _core.Sampler(
            model,
            seed=seed,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            penalty_last_n=self.penalty_last_n,
            logit_bias=self.logit_bias,
            grammar=self.grammar,
        )


def _check_logit_bias(logit_bias: object) -> dict[int, float]:
    """Token ids are integers, or strings of digits as in JSON."""
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias must be a mapping of token ids to numbers, not {type(logit_bias).__name__}")
    checked = {}
    for token, bias in logit_bias.items():
        number = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        check_int("logit_bias: token", number, 0, 2**31 - 1)
        checked[number] = check_float(f"logit_bias[{number}]", bias, -1000.0, 1000.0)
    return checked
