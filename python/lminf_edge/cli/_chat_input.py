"""Where the messages of `lminf-edge chat` come from: an editor on a terminal, or lines of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lminf_edge.cli._terminal import messages
from lminf_edge.errors import LMInfError

KEYS = "Enter sends; Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C stops an answer, Ctrl-D ends."


class ChatInput(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message or command; None at the end. Raises KeyboardInterrupt for Ctrl-C."""


class TerminalInput:
    """An editor for messages of several lines, with the history of all conversations."""

    def __init__(self, commands: Sequence[str], status: Callable[[], str]) -> None:
        """Reads nothing yet.

        Args:
            commands: Names of commands, for completion.
            status: What to show below the editor.
        """
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            multiline=True,
            prompt_continuation=lambda width, _line, _is_wrapped: " " * width,
            history=_history(),
            completer=_CommandCompleter(commands),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            bottom_toolbar=status,
        )

    def read(self) -> str | None:
        """See `ChatInput`."""
        try:
            return self._session.prompt()
        except EOFError:
            return None


class LineInput:
    """Standard input, each line a message."""

    def read(self) -> str | None:
        """See `ChatInput`.

        Raises:
            LMInfError: The input is no UTF-8.
        """
        if sys.stdin.isatty():
            messages.print("> ", end="")
        line = sys.stdin.buffer.readline()
        try:
            return line.decode().rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise LMInfError(f"standard input is no UTF-8: {error}") from error


def _history() -> History:
    """The file for it in the user's folder for such things, which only they can read; memory if that cannot be."""
    path = user_state_path("lminf-edge", appauthor=False) / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


class _CommandCompleter(Completer):
    """Names of commands at the beginning, then paths."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            for command in self._commands:
                if command.startswith(name):
                    yield Completion(command, start_position=-len(name))
        elif name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
