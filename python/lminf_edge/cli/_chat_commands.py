"""What the user of `lminf-edge chat` can say: messages, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from lminf_edge.chat_session import ChatSession
from lminf_edge.cli._chat_views import ChatView
from lminf_edge.completion_types import AnswerParams, ChatCompletionChunk
from lminf_edge.errors import ConfigError, StateError


class SessionMaker(Protocol):
    """Opens conversations with the model and the options that the program was started with."""

    def open(self, system: str | None) -> ChatSession:
        """A new conversation with a system prompt."""

    def resume(self, path: Path) -> ChatSession:
        """A saved conversation with its own system prompt."""


@dataclass(frozen=True)
class _Command:
    run: Callable[[str], object]
    argument: str
    help: str


class ChatCommands:
    """Hands messages to the conversation, and does what commands ask for.

    Attributes:
        session: The present conversation.
        names: The commands.
        ended: The user has asked for the end.
    """

    def __init__(self, session: ChatSession, maker: SessionMaker, view: ChatView, params: AnswerParams) -> None:
        """Nothing is said yet.

        Args:
            session: The conversation to begin with.
            maker: Opens others.
            view: Where to show answers.
            params: Options of each answer.
        """
        self.session = session
        self._maker = maker
        self._view = view
        self._params = params
        self._commands = {
            "/regenerate": _Command(self._regenerate, "", "take the last answer back and write another one"),
            "/edit": _Command(self._edit, "TEXT", "take your last message and its answer back, say TEXT instead"),
            "/system": _Command(self._system, "[TEXT]", "show the system prompt, or begin anew with another one"),
            "/new": _Command(self._new, "", "begin a new conversation with the same system prompt"),
            "/save": _Command(self._save, "FILE", "save the conversation and what the model remembers of it"),
            "/load": _Command(self._load, "FILE", "go on with a saved conversation"),
            "/stats": _Command(self._stats, "", "show speed, memory, and how much is remembered"),
            "/help": _Command(self._help, "", "show this list"),
            "/quit": _Command(self._quit, "", "end the program"),
        }
        self.names = tuple(self._commands)
        self.ended = False

    def handle(self, line: str) -> None:
        """Does what a line says. A message that begins with a slash is sent with a space before it.

        Raises:
            ConfigError: There is no such command, or it takes another argument.
            LMInfError: It failed.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self._show(self.session.send(line, **self._params), line)
            return
        name, *rest = line.strip().split(maxsplit=1)
        argument = rest[0] if rest else ""
        command = self._commands.get(name)
        if command is None:
            raise ConfigError(f"there is no command {name}: /help lists them; a space before it makes it a message")
        if (argument and not command.argument) or (not argument and command.argument.isalpha()):
            raise ConfigError(f"{name}: use it as {name} {command.argument}".rstrip())
        command.run(argument)

    def _show(self, chunks: Iterator[ChatCompletionChunk], message: str = "") -> None:
        llm = self.session.llm
        try:
            self._view.show_answer(chunks, llm, len(llm.tokenize(message, add_bos=False)))
        finally:
            if isinstance(chunks, Generator):  # after Ctrl-C, what was written until then is the answer
                chunks.close()

    def _regenerate(self, _argument: str) -> None:
        self._show(self.session.regenerate(**self._params))

    def _edit(self, text: str) -> None:
        self._show(self.session.edit(text, **self._params), text)

    def _system(self, text: str) -> None:
        if text:
            self._go_on_with(self._maker.open(text))
            self._view.show_note("a new conversation with this system prompt")
        else:
            self._view.show_note(self.session.system or "there is none but the model's own")

    def _new(self, _argument: str) -> None:
        self.session.reset()
        self._view.show_note("a new conversation")

    def _save(self, path: str) -> None:
        self.session.save_state(_path(path))
        self._view.show_note(f"saved in {path}")

    def _load(self, name: str) -> None:
        path = _path(name)
        try:
            self.session.load_state(path)
        except StateError:  # its system prompt may have another length
            self._go_on_with(self._maker.resume(path))
        self._view.show_note(f"{self.session.usage.n_messages:,} messages from {name}")

    def _stats(self, _argument: str) -> None:
        self._view.show_stats({**asdict(self.session.usage), **asdict(self.session.memory_stats())})

    def _help(self, _argument: str) -> None:
        usages = [f"{name} {command.argument}".rstrip() for name, command in self._commands.items()]
        width = max(map(len, usages))
        helps = (command.help for command in self._commands.values())
        self._view.show_note("\n".join(f"{usage:{width}}  {text}" for usage, text in zip(usages, helps, strict=True)))

    def _quit(self, _argument: str) -> None:
        self.ended = True

    def _go_on_with(self, session: ChatSession) -> None:
        self.session.close()
        self.session = session


def _path(name: str) -> Path:
    if "\0" in name:
        raise ConfigError("a path holds no zero characters")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}: {error}") from error
