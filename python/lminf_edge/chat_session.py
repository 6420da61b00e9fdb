"""An endless conversation: the class `ChatSession`."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from lminf_edge._checks import check_bool
from lminf_edge._library import _core
from lminf_edge._typing import Self, Unpack
from lminf_edge.background import Cancellation, iterate_in_thread
from lminf_edge.chat_prompt import ChatFormat, check_messages, check_tools
from lminf_edge.chat_sequence import ChatSequence, empty_conversation
from lminf_edge.chat_turns import TurnFormat
from lminf_edge.completion import Writing, answer, stream_answer
from lminf_edge.completion_types import AnswerParams, ChatCompletion, ChatCompletionChunk
from lminf_edge.config import LMInfConfig
from lminf_edge.conversation import Conversation, SpokenMessage
from lminf_edge.errors import ConfigError, StateError
from lminf_edge.gguf_file import check_gguf_file
from lminf_edge.llama import Llama
from lminf_edge.middle import MiddleConfig
from lminf_edge.records import ChatUsage, MemoryStats, TextPiece
from lminf_edge.state_file import StateFile, read_state_file, write_state_file
from lminf_edge.text_generation import TextOptions

N_WINDOW = 2048
"""Window of a session in tokens, unless the caller says otherwise: at most what the model's training leaves."""

_KIND = "chat"
_SAVED_OPTIONS = ("n_window", "n_clamp", "n_block", "n_rollback", "n_ubatch", "cache_type_k", "cache_type_v")


class ChatSession:
    """A conversation without end over one `Llama`.

    The system prompt is pinned: its tokens are the sink tokens, in kept order. Each turn reads its own tokens only.
    When the window cuts into a message, that message is forgotten as a whole, and with it the answer to it as soon as
    something else has been asked: the model always sees the system prompt followed by whole messages. Only a message
    that is longer than the window is ever cut inside.

    An answer that is stopped, by Ctrl-C or because its pieces are not asked for any more, stays in the conversation as
    far as it was handed out and is closed by the next turn; `regenerate` and `edit` take it back.

    If something else uses the `Llama` in between, the session reads what it remembers again.
    """

    def __init__(
        self, llm: Llama, *, system: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """A conversation without messages. Nothing is computed yet; the model's present sequence will be replaced.

        Args:
            llm: A model whose sink tokens are exactly those of the system prompt; `open` makes one.
            system: The system prompt. None: the chat template's own, if it has one.
            tools: Descriptions of functions for the chat template. What the model answers is text.

        Raises:
            ConfigError: The sink tokens do not fit; or the chat template refuses the system prompt or the tools, or
                writes messages differently once others follow.
            UnsupportedModelError: The model has no chat template.
        """
        self._llm = llm
        self._system = _checked_text("system", system) if system is not None else None
        self._tools = check_tools(tools)
        turns = TurnFormat(llm._chat_format, self._system, self._tools)
        config = llm.config
        n_pinned = len(turns.pinned)
        if config is None or config.n_sink != n_pinned or config.sink_order != "kept":
            raise ConfigError(
                f"the system prompt has {n_pinned} tokens with this model: the Llama needs "
                f"lminf=LMInfConfig(n_sink={n_pinned}, sink_order='kept', ...); ChatSession.open makes one that fits"
            )
        self._spoken = ChatSequence(llm, turns)

    @classmethod
    def open(
        cls,
        model_path: str | os.PathLike[str],
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n_window: int | None = None,
        n_clamp: int | None = None,
        n_block: int | None = None,
        n_rollback: int = 128,
        middle: MiddleConfig | None = None,
        **options: Any,
    ) -> Self:
        """Opens a model for a conversation; `close` closes it.

        Args:
            model_path: A GGUF file.
            system: See above.
            tools: See above.
            n_window: Local window in tokens. None: 2048, at most what the system prompt leaves of the trained length.
            n_clamp: Largest RoPE distance. None: n_sink + n_window - 1, which the kept order of sink tokens needs.
            n_block: See `LMInfConfig`.
            n_rollback: See `LMInfConfig`.
            middle: See `LMInfConfig`. The last message of the user and the answer then look up what was said before.
            **options: Of `Llama`.

        Raises:
            TypeError: There is no such option.
            ConfigError: An option is out of range, or the system prompt leaves no room for a window.
            LMInfError: As for `Llama` and `ChatSession`.
        """
        signature(Llama).bind(Path(), **options)
        if options.get("lminf") is not None:
            raise ConfigError("lminf: a session's own options are n_window, n_clamp, n_block, n_rollback, middle")
        model = _core.Model(str(check_gguf_file(model_path)), vocab_only=True)
        checked = _checked_text("system", system) if system is not None else None
        pinned = TurnFormat(ChatFormat(model, options.get("chat_format")), checked, check_tools(tools)).pinned
        if n_window is None:
            room = n_ctx_train(model) - len(pinned)
            if room < 1:
                raise ConfigError(
                    f"the system prompt has {len(pinned)} tokens: no room for a window in the trained length of "
                    f"{n_ctx_train(model)}"
                )
            n_window = min(N_WINDOW, room)
        config = LMInfConfig(
            n_sink=len(pinned),
            n_window=n_window,
            n_clamp=len(pinned) + n_window - 1 if n_clamp is None else n_clamp,
            n_block=n_block,
            n_rollback=n_rollback,
            sink_order="kept",
            middle=middle,
        )
        return cls._with(Llama(model_path, **{**options, "lminf": config}), system=system, tools=tools)

    @classmethod
    def _with(cls, llm: Llama, **options: Any) -> Self:
        try:
            return cls(llm, **options)
        except BaseException:
            llm.close()
            raise

    @property
    def llm(self) -> Llama:
        """The model."""
        return self._llm

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._system

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, forgotten messages included, as {"role": ..., "content": ...}."""
        return self._opening() + [_plain(message) for message in self._conversation.messages]

    @property
    def remembered_messages(self) -> list[dict[str, str]]:
        """What the model sees of it: the system prompt and the last messages."""
        return self._opening() + [_plain(message) for message in self._conversation.remembered]

    @property
    def usage(self) -> ChatUsage:
        """How many tokens and messages are remembered, and how many have left the window."""
        conversation = self._conversation
        n_pinned, n_tokens = len(conversation.pinned), conversation.n_tokens
        n_behind = sum(len(message.tokens) for message in conversation.remembered)
        n_remembered = n_pinned + min(n_behind, conversation.n_window)
        return ChatUsage(
            n_tokens=n_tokens,
            n_tokens_remembered=n_remembered,
            n_tokens_forgotten=n_tokens - n_remembered,
            n_tokens_pinned=n_pinned,
            n_messages=len(conversation.messages),
            n_messages_remembered=len(conversation.remembered),
        )

    def memory_stats(self) -> MemoryStats:
        """See `Llama.memory_stats`."""
        return self._llm.memory_stats()

    @overload
    def send(self, text: str, *, stream: Literal[False], **options: Unpack[AnswerParams]) -> ChatCompletion: ...
    @overload
    def send(
        self, text: str, *, stream: Literal[True] = True, **options: Unpack[AnswerParams]
    ) -> Iterator[ChatCompletionChunk]: ...
    @overload
    def send(
        self, text: str, *, stream: bool, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]: ...
    def send(
        self, text: str, *, stream: bool = True, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Says something and lets the model answer.

        Args:
            text: The message, of any length. Control tokens that it spells out are read as plain text.
            stream: Return the pieces as they come instead of the whole.
            **options: See `AnswerParams` and, for sampling, `SamplingOptions`. max_tokens is 1024 unless given.

        Returns:
            An iterator over dictionaries as the OpenAI API has them, or one such dictionary. The arguments are checked
            now; the message joins the conversation when the first piece with text is asked for.

        Raises:
            TypeError: An option does not exist, or an argument is of a wrong type.
            ConfigError: A value is out of range, a grammar or schema is wrong, or the template refuses the message.
            StateError: The model is closed or computing; while streaming: another call has changed its sequence.
        """
        return self._speak("send", self._asking(text), stream, options)

    @overload
    def regenerate(self, *, stream: Literal[False], **options: Unpack[AnswerParams]) -> ChatCompletion: ...
    @overload
    def regenerate(
        self, *, stream: Literal[True] = True, **options: Unpack[AnswerParams]
    ) -> Iterator[ChatCompletionChunk]: ...
    @overload
    def regenerate(
        self, *, stream: bool, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]: ...
    def regenerate(
        self, *, stream: bool = True, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Takes the last answer back and lets the model answer again.

        The sequence goes back exactly to where it was before the answer, however long that is. (A model with sliding
        windows or recurrent layers, and a message that is longer than the window, is read again instead if the answer
        was longer than `n_rollback`.) Messages that the answer had pushed out of the window stay forgotten.

        Args:
            stream: See `send`.
            **options: See `send`.

        Raises:
            StateError: Nothing has been said yet.
            TypeError, ConfigError: As for `send`.
        """
        self._check_asked()
        return self._speak("regenerate", self._spoken.ask_again, stream, options)

    @overload
    def edit(self, text: str, *, stream: Literal[False], **options: Unpack[AnswerParams]) -> ChatCompletion: ...
    @overload
    def edit(
        self, text: str, *, stream: Literal[True] = True, **options: Unpack[AnswerParams]
    ) -> Iterator[ChatCompletionChunk]: ...
    @overload
    def edit(
        self, text: str, *, stream: bool, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]: ...
    def edit(
        self, text: str, *, stream: bool = True, **options: Unpack[AnswerParams]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Takes the last message and the answer to it back, as `regenerate` does, and sends another one instead.

        Args:
            text: See `send`.
            stream: See `send`.
            **options: See `send`.

        Raises:
            StateError: Nothing has been said yet.
            TypeError, ConfigError: As for `send`.
        """
        self._check_asked()
        return self._speak("edit", self._asking(text, instead=True), stream, options)

    def asend(self, text: str, **options: Unpack[AnswerParams]) -> AsyncGenerator[ChatCompletionChunk, None]:
        """`send` for asyncio; see `Llama.acreate_chat_completion`."""
        cancellation = Cancellation()
        return iterate_in_thread(
            stream_answer(self._llm, self._starter(self._asking(text)), "asend", options, cancellation.check),
            cancellation,
        )

    def reset(self) -> None:
        """Begins the conversation anew, with the same system prompt."""
        self._spoken.reset()

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Saves the conversation and the sequence in one file, as `Llama.save_state` does.

        Args:
            path: The file to write.

        Raises:
            StateError: The model is closed or computing, or the file cannot be written.
        """
        with self._spoken.changing():
            state = self._llm._saved(
                _KIND,
                system=self._system,
                tools=self._tools,
                format=self._format.tokens(),
                conversation=self._conversation.save(),
            )
        write_state_file(path, state)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Replaces the conversation by a saved one, which goes on as it would have.

        Args:
            path: What `save_state` wrote.

        Raises:
            StateError: As for `Llama.load_state`, in particular if its system prompt has another number of tokens.
                Nothing was changed.
        """
        self._restore(read_state_file(path))

    @classmethod
    def resume(cls, model_path: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any) -> Self:
        """Opens a model as a saved conversation needs it, and loads that.

        Args:
            model_path: The model file that it was saved with.
            path: What `save_state` wrote.
            **options: Of `Llama`, but for those that the file says; and `middle`, where its store is a file.

        Raises:
            StateError, LMInfError: As for `load_state` and `open`.
        """
        file = read_state_file(path)
        try:
            settings = file.header["settings"]
            saved = {name: settings[name] for name in _SAVED_OPTIONS}
            saved.update(system=file.header["system"], tools=file.header["tools"])
            if settings.get("middle") is not None and "middle" not in options:
                saved["middle"] = MiddleConfig(**settings["middle"])
        except (LookupError, TypeError) as error:
            raise StateError(f"{path} is not the saved state of a conversation") from error
        session = cls.open(model_path, **{**options, **saved})
        try:
            session._restore(file)
        except BaseException:
            session.close()
            raise
        return session

    def _restore(self, file: StateFile) -> None:
        header = file.header
        try:
            if header["kind"] != _KIND:
                raise StateError("this is the saved state of a sequence, not of a conversation")
            turns = TurnFormat(self._llm._chat_format, header["system"], header["tools"])
            conversation = empty_conversation(self._llm, turns)
            conversation.load(header["conversation"])
            if header["format"] != turns.tokens():
                raise StateError("the conversation was saved with another chat format")
        except (LookupError, TypeError, ValueError) as error:
            raise StateError(f"the saved conversation does not fit: {error}") from error
        self._spoken.replace(turns, conversation, lambda: self._llm._restore(file, _KIND))
        self._system, self._tools = header["system"], header["tools"]

    def close(self) -> None:
        """Closes the model. Can be called again."""
        self._llm.close()

    def __enter__(self) -> Self:
        self._llm.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _conversation(self) -> Conversation:
        return self._spoken.conversation

    @property
    def _format(self) -> TurnFormat:
        return self._spoken.format

    def _speak(
        self, method: str, begin: Callable[[], None], stream: bool, options: AnswerParams
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        if check_bool("stream", stream):
            return stream_answer(self._llm, self._starter(begin), method, options)
        return answer(self._llm, self._starter(begin), method, options)

    def _asking(self, text: str, *, instead: bool = False) -> Callable[[], None]:
        """What asks a question, which is checked now."""
        content = _checked_text("text", text)
        tokens = self._format.question(content)
        return lambda: self._spoken.ask(content, tokens, instead=instead)

    def _check_asked(self) -> None:
        if not self._conversation.messages:
            raise StateError("nothing has been said yet")

    def _starter(self, begin: Callable[[], None]) -> Callable[[TextOptions], Writing]:
        """What writes an answer with given options, after they were checked."""

        def start(options: TextOptions) -> Writing:
            plan = self._llm._recall_plan(options.recall)
            self._llm._speculation(options.speculate)  # says now what is wrong
            sampler = options.sampling.sampler(self._llm._model, self._llm._next_seed(options.seed))
            writing = Writing(pieces=_nothing())
            writing.pieces = self._spoken.answer(begin, sampler, options, plan, writing)
            return writing

        return start

    def _opening(self) -> list[dict[str, str]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


def n_ctx_train(model: _core.Model) -> int:
    """Length that a model was trained on, also of one of which only the vocabulary was loaded."""
    metadata = model.metadata
    return int(metadata.get(f"{metadata['general.architecture']}.context_length", "0"))


def _nothing() -> Generator[TextPiece, None, None]:
    yield from ()


def _checked_text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, not {type(text).__name__}")
    content: str = check_messages([{"role": "user", "content": text}])[0]["content"]
    return content


def _plain(message: SpokenMessage) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
