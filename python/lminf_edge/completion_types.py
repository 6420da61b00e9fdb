"""Completions as the OpenAI API has them: plain dictionaries with known keys."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from lminf_edge._typing import NotRequired
from lminf_edge.middle import RecallScope
from lminf_edge.speculation import Speculation

FinishReason = Literal["stop", "length"]
"""Why a text ended. "stop": the model, a stop string or the guard against loops ended it; "length": max_tokens."""


class CompletionUsage(TypedDict):
    """How many tokens were read and written. Tokens that were still in memory from the last call count as read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    """A list entry for each token of the text. Probabilities are natural logarithms, by the model alone."""

    tokens: list[str]
    text_offset: list[int]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(TypedDict):
    """The text, or a piece of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """What `create_completion` returns; with stream=True, each of its pieces (usage then only if asked for)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage]


class TopLogprob(TypedDict):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The tokens of the answer, or of a piece of it."""

    content: list[ChatTokenLogprob]


class ChatMessage(TypedDict):
    """The assistant's answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """The answer and why it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """What `create_chat_completion` returns."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatDelta(TypedDict, total=False):
    """What a piece adds to the answer: first the role, then text, at the end nothing."""

    role: Literal["assistant"]
    content: str


class ChatChunkChoice(TypedDict):
    """A piece of the answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """A piece of what `create_chat_completion` yields with stream=True."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage]


class SamplingParams(TypedDict, total=False):
    """How tokens are drawn: the options of `SamplingOptions`."""

    grammar: str | None
    logit_bias: dict[int, float] | dict[str, float] | None
    repeat_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    penalty_last_n: int | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    temperature: float | None


class TextParams(SamplingParams, total=False):
    """Options of every completion. None means the default.

    Attributes:
        max_tokens: Tokens to write at most; -1 means without end.
        seed: Makes this call repeatable. None: the next one from the seed that the `Llama` was made with.
        stop: One string or several that end the text; they are not part of it.
        stop_on_loop: End a text that repeats itself word for word.
        response_format: {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}: the text is
            JSON, of this schema.
        stream_options: {"include_usage": True}: the last piece of a stream has `usage`, and no choices.
        model: Name to report instead of the file's.
        recall: Which tokens look up middle tokens, if `LMInfConfig.middle` stores any. "question" is the default then:
            the question and what is written. The question is the prompt's part after its last blank line, the last 64
            of token ids, or the last message of the user and what follows it. "all": also what is read before, but
            only what weighs more than all that is seen anyway. "none": nothing.
        speculate: "lookup": where the text has gone on from the same words before, what came next is decoded ahead, and
            stays if it is what is drawn. The text is the same, and faster where it repeats itself. Needs `lminf`.
    """

    max_tokens: int | None
    seed: int | None
    stop: str | list[str] | tuple[str, ...] | None
    stop_on_loop: bool | None
    response_format: dict[str, Any] | None
    stream_options: dict[str, bool] | None
    model: str | None
    recall: RecallScope | None
    speculate: Speculation | None


class CompletionParams(TextParams, total=False):
    """Options of `create_completion`.

    Attributes:
        logprobs: Report the logarithmic probability of each token and of this many most probable ones.
        echo: Begin the text with the prompt.
    """

    logprobs: int | None
    echo: bool | None


class AnswerParams(TextParams, total=False):
    """Options of an answer in a `ChatSession`.

    Attributes:
        logprobs: Report the logarithmic probability of each token.
        top_logprobs: And of this many most probable ones.
    """

    logprobs: bool | None
    top_logprobs: int | None


class ChatCompletionParams(AnswerParams, total=False):
    """Options of `create_chat_completion`.

    Attributes:
        tools: Descriptions of functions for the chat template. What the model answers is text.
    """

    tools: list[dict[str, Any]] | None
