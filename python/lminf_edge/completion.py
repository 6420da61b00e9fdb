"""Completions in the shape of the OpenAI API, whole or piece by piece."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lminf_edge._checks import check_bool, check_int
from lminf_edge.chat_prompt import ChatFormat, check_messages, check_tools
from lminf_edge.chat_template import Message
from lminf_edge.completion_types import (
    AnswerParams,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionParams,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionLogprobs,
    CompletionParams,
    CompletionUsage,
    FinishReason,
    TopLogprob,
)
from lminf_edge.errors import ConfigError
from lminf_edge.middle import N_QUESTION
from lminf_edge.records import GenerationStep, TextPiece
from lminf_edge.text_generation import N_TOP_LOGPROBS_MAX, TextOptions, text_options
from lminf_edge.tokens import TokenSequence

N_TOKENS_COMPLETION = 16
"""Tokens of a completion unless the caller says how many: the OpenAI API's default."""

N_TOKENS_CHAT = 1024
"""The same for an answer in a chat."""

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")

Check = Callable[[], object]
"""Called now and then while a text is computed; what it raises ends the computation."""


class TextModel(Protocol):
    """What completions need of a `Llama`."""

    @property
    def model_name(self) -> str:
        """Name of the model."""

    @property
    def _chat_format(self) -> ChatFormat:
        """How conversations are written down."""

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Splits a text into tokens."""

    def detokenize_bytes(self, tokens: TokenSequence, *, special: bool = False) -> bytes:
        """The text of tokens."""

    def _write(
        self, prompt: TokenSequence, options: TextOptions, *, n_question: int | None = None
    ) -> Generator[TextPiece, None, None]:
        """Writes a text after a prompt, which replaces the present sequence. Arguments are checked now."""


def stream_completion(
    model: TextModel, prompt: str | TokenSequence, params: Mapping[str, Any], check: Check | None = None
) -> Iterator[Completion]:
    """The pieces of a completion.

    Args:
        model: The model.
        prompt: Text, in which special tokens are recognised, or tokens.
        params: `CompletionParams`.
        check: See `TextOptions.check`.

    Returns:
        An iterator over pieces. Arguments are checked now; nothing is computed before the first piece is asked for.

    Raises:
        ConfigError, TypeError: An argument is wrong.
        ContextError: A plain context has no room for the prompt.
    """
    answer = _CompletionShape(model, prompt, params, check)
    return answer.chunks()


def complete(model: TextModel, prompt: str | TokenSequence, params: Mapping[str, Any]) -> Completion:
    """A whole completion; arguments and errors as for `stream_completion`."""
    return _CompletionShape(model, prompt, params, None).whole()


def stream_chat(
    model: TextModel, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any], check: Check | None = None
) -> Iterator[ChatCompletionChunk]:
    """The pieces of an answer.

    Args:
        model: The model.
        messages: The conversation, as in the OpenAI API.
        params: `ChatCompletionParams`.
        check: See `TextOptions.check`.

    Returns:
        An iterator over pieces. Arguments are checked now; nothing is computed before the first piece is asked for.

    Raises:
        ConfigError, TypeError: An argument is wrong, or the chat template refuses the messages.
        UnsupportedModelError: The model has no chat template that can be used.
        ContextError: A plain context has no room for the prompt.
    """
    return _chat_shape(model, messages, params, check).chunks()


def chat(model: TextModel, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> ChatCompletion:
    """A whole answer; arguments and errors as for `stream_chat`."""
    return _chat_shape(model, messages, params, None).whole()


@dataclass(kw_only=True)
class Writing:
    """A text that will be written.

    Attributes:
        pieces: Its pieces; nothing is computed before the first one is asked for.
        n_prompt: Tokens that are read before it, once that is known.
    """

    pieces: Generator[TextPiece, None, None]
    n_prompt: int = 0


def stream_answer(
    model: TextModel,
    start: Callable[[TextOptions], Writing],
    method: str,
    params: Mapping[str, Any],
    check: Check | None = None,
) -> Iterator[ChatCompletionChunk]:
    """The pieces of an answer in a conversation that somebody else keeps.

    Args:
        model: The model.
        start: Begins to write with options that have been checked.
        method: What the caller calls this.
        params: `AnswerParams`.
        check: See `TextOptions.check`.

    Returns:
        An iterator over pieces. Arguments are checked now; nothing is computed before the first piece is asked for.

    Raises:
        ConfigError, TypeError: An argument is wrong.
    """
    _refuse_unknown(method, params, AnswerParams)
    return _ChatShape(model, start, params, check).chunks()


def answer(
    model: TextModel, start: Callable[[TextOptions], Writing], method: str, params: Mapping[str, Any]
) -> ChatCompletion:
    """A whole answer; arguments and errors as for `stream_answer`."""
    _refuse_unknown(method, params, AnswerParams)
    return _ChatShape(model, start, params, None).whole()


class _Shape:
    """What completions and answers in a chat have in common."""

    def __init__(self, model: TextModel, writing: Writing, params: Mapping[str, Any], id_prefix: str) -> None:
        self._model = model
        self._writing = writing
        self._pieces = writing.pieces
        stream_options = params.get("stream_options") or {}
        if not isinstance(stream_options, Mapping) or stream_options.keys() - {"include_usage"}:
            raise ConfigError(f"stream_options = {stream_options!r}: may only hold 'include_usage'")
        self._include_usage = check_bool("include_usage", stream_options.get("include_usage", False))
        name = params.get("model")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"model must be a string, not {type(name).__name__}")
        self._head = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name or model.model_name,
        }

    def _usage(self, n_written: int) -> CompletionUsage:
        n_prompt = self._writing.n_prompt
        return {"prompt_tokens": n_prompt, "completion_tokens": n_written, "total_tokens": n_prompt + n_written}

    def _token_text(self, token: int) -> str:
        return self._token_bytes(token).decode(errors="replace")

    def _token_bytes(self, token: int) -> bytes:
        return self._model.detokenize_bytes([token], special=True)


class _CompletionShape(_Shape):
    def __init__(
        self, model: TextModel, prompt: str | TokenSequence, params: Mapping[str, Any], check: Check | None
    ) -> None:
        _refuse_unknown("create_completion", params, CompletionParams)
        self._n_top = _n_top_logprobs("logprobs", params.get("logprobs"))
        echo = check_bool("echo", _given(params, "echo", False))
        if echo and self._n_top is not None:
            raise ConfigError("echo and logprobs: Llama.logprobs gives the probabilities of a prompt's tokens")
        options = text_options(params, max_tokens=N_TOKENS_COMPLETION, n_top_logprobs=self._n_top, check=check)
        tokens = _prompt_tokens(model, prompt)
        pieces = model._write(tokens, options, n_question=n_question_tokens(model, prompt, len(tokens)))
        super().__init__(model, Writing(pieces=pieces, n_prompt=len(tokens)), params, "cmpl")
        self._echoed = _prompt_text(model, prompt) if echo else ""
        self._n_text = 0

    def chunks(self) -> Iterator[Completion]:
        text, n_written = self._echoed, 0
        for piece in self._pieces:
            text += piece.text
            n_written = piece.n_tokens
            if text or piece.finish_reason:
                yield self._completion(text, piece.tokens, _openai_reason(piece))
            text = ""
        if self._include_usage:
            empty = self._completion("", (), None)
            yield {**empty, "choices": [], "usage": self._usage(n_written)}

    def whole(self) -> Completion:
        pieces = list(self._pieces)
        steps = [step for piece in pieces for step in piece.tokens]
        text = self._echoed + "".join(piece.text for piece in pieces)
        return {
            **self._completion(text, steps, _openai_reason(pieces[-1])),
            "usage": self._usage(pieces[-1].n_tokens),
        }

    def _completion(self, text: str, steps: Sequence[GenerationStep], reason: FinishReason | None) -> Completion:
        logprobs = None if self._n_top is None else self._logprobs(steps)
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "text_completion", "choices": [choice]}  # type: ignore[typeddict-item]

    def _logprobs(self, steps: Sequence[GenerationStep]) -> CompletionLogprobs:
        offsets = []
        for step in steps:
            offsets.append(self._n_text)
            self._n_text += len(step.text)
        return {
            "tokens": [self._token_text(step.token) for step in steps],
            "text_offset": offsets,
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [
                {self._token_text(token): logprob for token, logprob in step.top_logprobs} for step in steps
            ],
        }


class _ChatShape(_Shape):
    def __init__(
        self,
        model: TextModel,
        start: Callable[[TextOptions], Writing],
        params: Mapping[str, Any],
        check: Check | None,
    ) -> None:
        self._with_logprobs = check_bool("logprobs", _given(params, "logprobs", False))
        n_top = _n_top_logprobs("top_logprobs", params.get("top_logprobs"))
        if n_top and not self._with_logprobs:
            raise ConfigError("top_logprobs: needs logprobs=True")
        n_asked = n_top or 0 if self._with_logprobs else None
        options = text_options(params, max_tokens=N_TOKENS_CHAT, n_top_logprobs=n_asked, check=check)
        super().__init__(model, start(options), params, "chatcmpl")

    def chunks(self) -> Iterator[ChatCompletionChunk]:
        yield self._chunk({"role": "assistant", "content": ""}, (), None)
        n_written = 0
        with closing(self._pieces):
            for piece in self._pieces:
                n_written = piece.n_tokens
                if piece.text or piece.tokens:
                    yield self._chunk({"content": piece.text}, piece.tokens, None)
                if piece.finish_reason:
                    yield self._chunk({}, (), _openai_reason(piece))
        if self._include_usage:
            empty = self._chunk({}, (), None)
            yield {**empty, "choices": [], "usage": self._usage(n_written)}

    def whole(self) -> ChatCompletion:
        pieces = list(self._pieces)
        steps = [step for piece in pieces for step in piece.tokens]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": self._logprobs(steps),
            "finish_reason": _openai_reason(pieces[-1]),
        }
        usage = self._usage(pieces[-1].n_tokens)
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": [choice], "usage": usage}  # type: ignore[typeddict-item]

    def _chunk(
        self, delta: ChatDelta, steps: Sequence[GenerationStep], reason: FinishReason | None
    ) -> ChatCompletionChunk:
        logprobs = self._logprobs(steps) if steps else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}  # type: ignore[typeddict-item]

    def _logprobs(self, steps: Sequence[GenerationStep]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return {
            "content": [
                {
                    **self._top(step.token, step.logprob),
                    "top_logprobs": [self._top(token, logprob) for token, logprob in step.top_logprobs],
                }
                for step in steps
            ]
        }

    def _top(self, token: int, logprob: float) -> TopLogprob:
        data = self._token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def _chat_shape(
    model: TextModel, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any], check: Check | None
) -> _ChatShape:
    def start(options: TextOptions) -> Writing:
        checked, tools = check_messages(messages), check_tools(params.get("tools"))
        tokens = model._chat_format.tokens(checked, tools=tools)
        n_question = _n_last_turn(model._chat_format, checked, tools)
        return Writing(pieces=model._write(tokens, options, n_question=n_question), n_prompt=len(tokens))

    _refuse_unknown("create_chat_completion", params, ChatCompletionParams)
    return _ChatShape(model, start, params, check)


def _prompt_tokens(model: TextModel, prompt: str | TokenSequence) -> list[int]:
    if isinstance(prompt, str):
        tokens = model.tokenize(prompt, special=True)
    elif isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
        tokens = np.asarray(prompt).tolist()
    else:
        raise TypeError(f"prompt must be text or token ids, not {type(prompt).__name__}")
    if not tokens:
        raise ConfigError("prompt is empty: at least one token is needed")
    return tokens


def n_question_tokens(model: TextModel, prompt: str | TokenSequence, n_prompt: int) -> int:
    """How many tokens at the end of a prompt are the question: what comes after the last blank line of a text.

    Args:
        model: The model.
        prompt: Text or token ids.
        n_prompt: Its number of tokens.
    """
    if not isinstance(prompt, str):
        return min(N_QUESTION, n_prompt)
    blank_lines = list(_BLANK_LINE.finditer(prompt.rstrip()))
    if not blank_lines:
        return n_prompt
    return max(1, n_prompt - len(model.tokenize(prompt[: blank_lines[-1].end()], special=True)))


def _n_last_turn(chat_format: ChatFormat, messages: Sequence[Message], tools: Sequence[object] | None) -> int:
    """How many tokens at the end of a conversation are the user's last message and what follows it."""
    n_before = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    try:
        return len(chat_format.added_tokens(messages, n_before, tools=tools))
    except ConfigError:  # the template makes something else of the messages before when it is without this one
        return N_QUESTION


def _prompt_text(model: TextModel, prompt: str | TokenSequence) -> str:
    return prompt if isinstance(prompt, str) else model.detokenize_bytes(prompt, special=True).decode(errors="replace")


def _n_top_logprobs(name: str, value: int | None) -> int | None:
    return None if value is None else check_int(name, value, 0, N_TOP_LOGPROBS_MAX)


def _given(params: Mapping[str, Any], name: str, default: object) -> object:
    value = params.get(name)
    return default if value is None else value


def _refuse_unknown(method: str, params: Mapping[str, Any], known: type) -> None:
    for name in params:
        if name not in known.__annotations__:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")


def _openai_reason(piece: TextPiece) -> FinishReason | None:
    return "stop" if piece.finish_reason == "loop" else piece.finish_reason
