"""`lminf-edge chat`: a conversation without end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lminf_edge.chat_session import ChatSession
from lminf_edge.cli._chat_commands import ChatCommands
from lminf_edge.cli._chat_input import KEYS, ChatInput, LineInput, TerminalInput
from lminf_edge.cli._chat_views import ChatView, JsonView, TerminalView, TextView
from lminf_edge.cli._options import AsJson, CompletionOptions, ModelOptions, Window, with_option_groups
from lminf_edge.cli._terminal import (
    find_model,
    heeding_ctrl_c,
    ignoring_ctrl_c,
    loading_bar,
    messages,
    with_exit_codes,
)
from lminf_edge.completion import N_TOKENS_CHAT
from lminf_edge.completion_types import AnswerParams
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.middle import MiddleConfig
from lminf_edge.system import human_bytes
from lminf_edge.text_generation import text_options


@with_exit_codes
@with_option_groups
def chat(
    *,
    system: Annotated[str | None, typer.Option(help="System prompt, which the model never forgets.")] = None,
    load: Annotated[str | None, typer.Option(help="Go on with a conversation that /save has written.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most; -1 means no limit.")] = N_TOKENS_CHAT,
    chat_format: Annotated[
        str | None, typer.Option(help="Such as chatml, for a model file without a chat template.")
    ] = None,
    n_window: Window = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Store what is forgotten, and let each message and answer look it up.")
    ] = False,
    as_json: AsJson = False,
    model: ModelOptions,
    completion: CompletionOptions,
) -> None:
    """Talks with a model, for as long as you like. Without a terminal, each line of standard input is a message."""
    stream_options = {"include_usage": True}
    params = cast(AnswerParams, {**completion.params(), "max_tokens": max_tokens, "stream_options": stream_options})
    text_options(params, max_tokens=max_tokens)  # says what is wrong before the model is loaded
    if load is not None and (system is not None or n_window is not None):
        raise ConfigError("--load: the conversation has its own system prompt and window")
    path = find_model(model.model)
    options = {**model.llama_options(), "n_window": n_window, "chat_format": chat_format}
    if recall:
        options["middle"] = MiddleConfig()
    maker = _Maker(path, options)
    session = maker.open(system) if load is None else maker.resume(Path(load))
    view = _view(as_json)
    commands = ChatCommands(session, maker, view, params)
    try:
        if sys.stdin.isatty():
            messages.print(f"{path.name}. {KEYS} /help lists commands.", style="dim", markup=False)
            _run_interactively(commands, _input(commands), view)
        else:
            _run(commands, LineInput())
    finally:
        commands.session.close()


@dataclass(frozen=True)
class _Maker:
    """See `SessionMaker`."""

    model: Path
    options: dict[str, Any]

    def open(self, system: str | None) -> ChatSession:
        with loading_bar(self.model.name) as progress:
            return ChatSession.open(self.model, system=system, progress=progress, **self.options)

    def resume(self, path: Path) -> ChatSession:
        options = {name: value for name, value in self.options.items() if name != "n_window"}
        with loading_bar(self.model.name) as progress:
            return ChatSession.resume(self.model, path, progress=progress, **options)


def _run(commands: ChatCommands, source: ChatInput) -> None:
    """Reads and answers until the end, or until something goes wrong."""
    while not commands.ended and (line := source.read()) is not None:
        commands.handle(line)


def _run_interactively(commands: ChatCommands, source: ChatInput, view: ChatView) -> None:
    """The same with somebody there to go on after errors and Ctrl-C."""
    with ignoring_ctrl_c():
        while not commands.ended:
            try:
                with heeding_ctrl_c():
                    line = source.read()
            except KeyboardInterrupt:
                view.show_note("Ctrl-D or /quit ends the conversation.")
                continue
            if line is None:
                return
            try:
                with heeding_ctrl_c():
                    commands.handle(line)
            except KeyboardInterrupt:
                view.show_note("(stopped)")
            except LMInfError as error:
                view.show_note(f"error: {error}")


def _input(commands: ChatCommands) -> ChatInput:
    if not sys.stdout.isatty():
        return LineInput()
    return TerminalInput(commands.names, lambda: _status(commands.session))


def _view(as_json: bool) -> ChatView:
    if as_json:
        return JsonView()
    return TerminalView() if sys.stdout.isatty() else TextView()


def _status(session: ChatSession) -> str:
    usage, memory = session.usage, session.memory_stats()
    speed = "" if memory.tokens_per_second is None else f"{memory.tokens_per_second:.1f} tokens/s, "
    return (
        f" {usage.n_tokens_remembered:,} tokens remembered, {usage.n_tokens_forgotten:,} forgotten · {speed}"
        f"keys and values {human_bytes(memory.kv_bytes)}, process {human_bytes(memory.resident_bytes)}"
    )
