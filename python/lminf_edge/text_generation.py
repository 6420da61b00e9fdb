"""From drawn tokens to a text that ends where it should."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lminf_edge._checks import check_bool, check_int, check_optional_int
from lminf_edge.errors import ConfigError
from lminf_edge.grammar import response_format_grammar
from lminf_edge.middle import RecallScope
from lminf_edge.records import GenerationStep, TextPiece
from lminf_edge.sampling import N_SEED_MAX, SamplingOptions
from lminf_edge.speculation import Speculation, check_speculation
from lminf_edge.stopping import LoopGuard, StopStrings, check_stop

N_TOP_LOGPROBS_MAX = 100


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a text is written and when it ends.

    Attributes:
        sampling: How tokens are drawn.
        max_tokens: Tokens to write at most; -1 means without end.
        seed: Makes the text repeatable. None: the next one from the seed that the `Llama` was made with.
        stop: Strings that end the text and are not part of it.
        stop_on_loop: End a text that repeats itself word for word.
        n_top_logprobs: How many of the most probable tokens are looked up for each drawn one. None: no probability is
            computed.
        check: Called between tokens, and about every 50 ms while a prompt is read; what it raises ends the text.
        recall: Which tokens look up middle tokens. None: the question and the text, if any are stored.
        n_recalled: How many of the tokens that were looked up are told with each drawn one.
        speculate: See `DrawOptions`.

    Raises:
        ConfigError: A value is out of range.
        TypeError: `stop` is no string or sequence of strings.
    """

    sampling: SamplingOptions
    max_tokens: int
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_on_loop: bool = False
    n_top_logprobs: int | None = None
    check: Callable[[], object] | None = None
    recall: RecallScope | None = None
    n_recalled: int = 0
    speculate: Speculation | None = None

    def __post_init__(self) -> None:
        if check_int("max_tokens", self.max_tokens, -1) == 0:
            raise ConfigError("max_tokens = 0: must be -1 (without end) or at least 1")
        check_optional_int("seed", self.seed, 0, N_SEED_MAX)
        object.__setattr__(self, "stop", check_stop(self.stop))
        check_bool("stop_on_loop", self.stop_on_loop)
        check_speculation(self.speculate)


_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingOptions))


def text_options(
    params: Mapping[str, Any],
    *,
    max_tokens: int,
    n_top_logprobs: int | None = None,
    check: Callable[[], object] | None = None,
) -> TextOptions:
    """The options of a text from a caller's keywords.

    Args:
        params: `TextParams`. None is the default; other names are ignored.
        max_tokens: Default of max_tokens.
        n_top_logprobs: See `TextOptions`.
        check: See `TextOptions`.

    Raises:
        ConfigError, TypeError: A value is wrong.
    """
    given = {name: value for name, value in params.items() if value is not None}
    sampling = {name: value for name, value in given.items() if name in _SAMPLING_NAMES}
    if "response_format" in given and (grammar := response_format_grammar(given["response_format"])):
        if sampling.get("grammar"):
            raise ConfigError("grammar and response_format: the text can follow one of them only")
        sampling["grammar"] = grammar
    return TextOptions(
        sampling=SamplingOptions(**sampling),
        max_tokens=given.get("max_tokens", max_tokens),
        seed=given.get("seed"),
        stop=given.get("stop", ()),
        stop_on_loop=given.get("stop_on_loop", False),
        recall=given.get("recall"),
        speculate=given.get("speculate"),
        n_top_logprobs=n_top_logprobs,
        check=check,
    )


def write_text(steps: Iterator[GenerationStep], options: TextOptions) -> Generator[TextPiece, None, None]:
    """Turns drawn tokens into pieces of text, up to a stop string, a loop or the last token.

    Args:
        steps: Tokens as they are drawn. No more are drawn than the text needs.
        options: When the text ends.

    Returns:
        Pieces whose texts, one after the other, are the text. The last one says why it is the last.
    """
    stops, guard = StopStrings(options.stop), LoopGuard()
    waiting: deque[tuple[int, GenerationStep]] = deque()  # tokens whose text is held back, and where it begins
    n_drawn = n_text = n_passed = 0
    for step in steps:
        if step.finish_reason != "stop":  # an end-of-generation token is not part of the text
            waiting.append((n_text, step))
            n_drawn += 1
        n_text += len(step.text)
        text = stops.feed(step.text)
        reason: Literal["stop", "length", "loop"] | None = step.finish_reason
        if stops.found is not None:
            reason = "stop"
        elif reason is None and options.stop_on_loop and guard.feed(step.token):
            reason = "loop"
        if reason is not None:
            text += stops.flush()
        n_passed += len(text)
        passed = []
        while waiting:
            begin, oldest = waiting[0]
            if reason is None or stops.found is not None:
                # of the tokens around a stop string, one that has begun before it belongs to the text
                reaches_beyond = begin + len(oldest.text) > n_passed and stops.found is None
                if begin >= n_passed or reaches_beyond:
                    break
            passed.append(oldest)
            waiting.popleft()
        yield TextPiece(text=text, tokens=tuple(passed), n_tokens=n_drawn, finish_reason=reason)
        if reason is not None:
            return
