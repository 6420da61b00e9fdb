"""The methods of `Llama` that follow the OpenAI API and llama-cpp-python."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from lminf_edge._checks import check_bool
from lminf_edge._typing import Unpack
from lminf_edge.background import Cancellation, iterate_in_thread
from lminf_edge.completion import TextModel, chat, complete, stream_chat, stream_completion
from lminf_edge.completion_types import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionParams,
    Completion,
    CompletionParams,
)
from lminf_edge.tokens import TokenSequence


class CompletionMethods:
    """Completions and answers in a chat, whole, piece by piece, and for asyncio.

    Each call is about its own prompt, not about the sequence as it is: `generate` continues that. What prompt and
    sequence have in common at their beginning is not computed again, as long as the sequence has not grown beyond it by
    more than the window can give back.
    """

    @overload
    def create_completion(
        self: TextModel,
        prompt: str | TokenSequence,
        *,
        stream: Literal[False] = False,
        **options: Unpack[CompletionParams],
    ) -> Completion: ...
    @overload
    def create_completion(
        self: TextModel, prompt: str | TokenSequence, *, stream: Literal[True], **options: Unpack[CompletionParams]
    ) -> Iterator[Completion]: ...
    @overload
    def create_completion(
        self: TextModel, prompt: str | TokenSequence, *, stream: bool, **options: Unpack[CompletionParams]
    ) -> Completion | Iterator[Completion]: ...
    def create_completion(
        self: TextModel, prompt: str | TokenSequence, *, stream: bool = False, **options: Unpack[CompletionParams]
    ) -> Completion | Iterator[Completion]:
        """Writes a text on.

        With LM-Infinite the prompt may have any length: it is read through the window.

        Args:
            prompt: Text, in which special tokens are recognised; or token ids, for text that you did not write.
            stream: Return the pieces as they come instead of the whole.
            **options: See `CompletionParams` and, for sampling, `SamplingOptions`. max_tokens is 16 unless given.

        Returns:
            A dictionary as the OpenAI API has it, or an iterator over such dictionaries. The arguments are checked now.

        Raises:
            TypeError: An option does not exist, or an argument is of a wrong type.
            ConfigError: A value is out of range, or a grammar or schema is wrong. Nothing was computed.
            ContextError: A plain context has no room for the prompt. Nothing was computed.
            StateError: The object is closed or computing; while streaming: another call has changed its sequence.
        """
        if check_bool("stream", stream):
            return stream_completion(self, prompt, options)
        return complete(self, prompt, options)

    __call__ = create_completion

    def acreate_completion(
        self: TextModel, prompt: str | TokenSequence, **options: Unpack[CompletionParams]
    ) -> AsyncGenerator[Completion, None]:
        """`create_completion` with stream=True for asyncio.

        The text is computed in a worker thread. When the task is cancelled or the generator closed, the computation
        ends within a fraction of a second, and the object can be used again.
        """
        cancellation = Cancellation()
        return iterate_in_thread(stream_completion(self, prompt, options, cancellation.check), cancellation)

    @overload
    def create_chat_completion(
        self: TextModel,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatCompletionParams],
    ) -> ChatCompletion: ...
    @overload
    def create_chat_completion(
        self: TextModel,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        **options: Unpack[ChatCompletionParams],
    ) -> Iterator[ChatCompletionChunk]: ...
    @overload
    def create_chat_completion(
        self: TextModel,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool,
        **options: Unpack[ChatCompletionParams],
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]: ...
    def create_chat_completion(
        self: TextModel,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        **options: Unpack[ChatCompletionParams],
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Writes the assistant's next message.

        The model's own chat template makes a prompt of the messages. Control tokens that a message spells out are read
        as plain text.

        Args:
            messages: The conversation: dictionaries with "role" and "content".
            stream: Return the pieces as they come instead of the whole.
            **options: See `ChatCompletionParams` and, for sampling, `SamplingOptions`. max_tokens is 1024 unless given.

        Returns:
            A dictionary as the OpenAI API has it, or an iterator over such dictionaries. The arguments are checked now.

        Raises:
            TypeError: An option does not exist, or an argument is of a wrong type.
            ConfigError: A value is out of range, a grammar or schema is wrong, or the template refuses the messages.
            UnsupportedModelError: The model has no chat template that can be used, and no chat_format was given.
            ContextError, StateError: As for `create_completion`.
        """
        if check_bool("stream", stream):
            return stream_chat(self, messages, options)
        return chat(self, messages, options)

    def acreate_chat_completion(
        self: TextModel, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatCompletionParams]
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        """`create_chat_completion` with stream=True for asyncio; see `acreate_completion`."""
        cancellation = Cancellation()
        return iterate_in_thread(stream_chat(self, messages, options, cancellation.check), cancellation)
