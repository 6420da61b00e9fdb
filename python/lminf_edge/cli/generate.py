"""`lminf-edge generate`: writes a text on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Annotated

import typer

from lminf_edge._checks import check_choice
from lminf_edge.cli._options import AsJson, CompletionOptions, ModelOptions, WindowOptions, with_option_groups
from lminf_edge.cli._terminal import messages, reading_bar, with_exit_codes, without_control, write_text
from lminf_edge.completion import n_question_tokens
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.texts import text_file
from lminf_edge.following import Follower, read_with_pauses
from lminf_edge.llama import N_RECALLED, Llama
from lminf_edge.middle import MiddleConfig
from lminf_edge.passages import RecallLog
from lminf_edge.records import TextPiece
from lminf_edge.system import human_bytes
from lminf_edge.text_generation import TextOptions, text_options


@with_exit_codes
@with_option_groups
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to write on. Without it: --file, or standard input.", show_default=False)
    ] = None,
    *,
    file: Annotated[str | None, typer.Option(help="Text file to write on, in UTF-8.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most; -1 means without end.")] = 256,
    grammar: Annotated[str | None, typer.Option(help="File with a grammar (GBNF) that the text follows.")] = None,
    schema: Annotated[
        str | None, typer.Option("--json-schema", help="File with a JSON schema that the text follows.")
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Recognise control tokens such as <|im_end|> in the prompt.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Keep reading standard input, such as a log. Whenever it pauses, and at each full window, write "
            "about it: the argument is then the question put after it.",
        ),
    ] = False,
    recall: Annotated[
        str | None,
        typer.Option(
            help="Store what leaves the window, and let the prompt's part after its last blank line and the text look "
            "it up (question), or everything that is read (all).",
            metavar="question|all",
        ),
    ] = None,
    show_recall: Annotated[bool, typer.Option("--show-recall", help="Show which passages were looked up.")] = False,
    pause: Annotated[float, typer.Option(min=0.01, help="Seconds without input that are a pause for --follow.")] = 2.0,
    as_json: AsJson = False,
    model: ModelOptions,
    window: WindowOptions,
    completion: CompletionOptions,
) -> None:
    """Writes a text on. The text goes to standard output, everything else to standard error."""
    params = completion.params()
    if grammar is not None:
        params["grammar"] = text_file(grammar)
    if schema is not None:
        params["response_format"] = {"type": "json_schema", "json_schema": {"schema": _json_file(schema)}}
    if recall is not None:
        check_choice("--recall", recall, ("question", "all"))
    elif show_recall:
        raise ConfigError("--show-recall: nothing is looked up without --recall")
    options = replace(
        text_options({**params, "recall": recall}, max_tokens=max_tokens), n_recalled=N_RECALLED if show_recall else 0
    )
    config = window.config(middle=None if recall is None else MiddleConfig())
    if follow:
        _check_following(file, options)
        question = _text_argument(prompt or "")
        # room to take back an answer and its question, of which a byte is a token at most
        n_rollback = max(config.n_rollback, options.max_tokens + len(question.encode()) + 1)
        with model.open(replace(config, n_rollback=n_rollback), completion.seed) as llm:
            _follow(llm, question, options, pause, as_json)
        return
    text = _read_prompt(prompt, file)
    with model.open(config, completion.seed) as llm:
        tokens = llm.tokenize(text, special=special)
        if not tokens:
            raise ConfigError("the prompt is empty, and this model needs something to begin with")
        _write_on(llm, tokens, options, as_json, n_question_tokens(llm, text, len(tokens)))


@dataclass
class _Written:
    """A text that was written, as far as it is known."""

    text: str = ""
    finish_reason: str | None = None
    n_tokens: int = 0
    tokens_per_second: float | None = None
    recall: RecallLog = field(default_factory=RecallLog)

    def add(self, piece: TextPiece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.n_tokens = piece.n_tokens
        if piece.tokens:
            self.tokens_per_second = piece.tokens[-1].tokens_per_second
        for step in piece.tokens:
            self.recall.add(step.recall)


def _write_on(llm: Llama, tokens: list[int], options: TextOptions, as_json: bool, n_question: int) -> None:
    pieces = llm._write(tokens, options, n_question=n_question)
    with reading_bar(len(tokens), lambda: llm.n_past):
        first = next(pieces)
    written = _show(chain([first], pieces), as_text=not as_json)
    if as_json:
        print(json.dumps(_to_json(llm, written, n_prompt=len(tokens)), indent=2, ensure_ascii=False))
    elif sys.stdout.isatty() and not written.text.endswith("\n"):
        write_text("\n")
    if options.n_recalled and not as_json:
        _show_passages(llm, written.recall)
    if messages.is_terminal:
        stats = llm.memory_stats()
        messages.print(
            f"{written.n_tokens:,} tokens, {written.tokens_per_second or 0:.1f} tokens/s, "
            f"keys and values {human_bytes(stats.kv_bytes)}, process in RAM {human_bytes(stats.resident_bytes)}",
            style="dim",
        )


def _follow(llm: Llama, question: str, options: TextOptions, pause: float, as_json: bool) -> None:
    follower = Follower(llm, question, options)
    assert llm.config is not None
    n_window = llm.config.n_window or 0  # every default is filled in
    n_bytes = min(4096, n_window)  # a token has a byte or more, so that no piece fills the window more than once
    for text in read_with_pauses(sys.stdin.fileno(), pause, n_bytes):
        if text is not None:
            follower.read(text)
        if follower.n_new and (text is None or follower.n_new >= n_window):
            n_read = llm.n_past
            with closing(follower.answer()) as pieces:
                written = _show(pieces, as_text=not as_json)
            if as_json:
                print(json.dumps(_to_json(llm, written, n_prompt=n_read), ensure_ascii=False), flush=True)
            elif not written.text.endswith("\n"):
                write_text("\n")


def _show(pieces: Iterator[TextPiece], as_text: bool) -> _Written:
    written = _Written()
    for piece in pieces:
        written.add(piece)
        if as_text:
            write_text(piece.text)
    return written


def _show_passages(llm: Llama, recall: RecallLog) -> None:
    for passage in recall.passages(llm._sequence.text_between):
        text = without_control(" ".join(passage.text.split()))
        messages.print(f"{passage.begin:,} to {passage.end - 1:,}, weight {passage.weight:.2f}: {text}", markup=False)


def _to_json(llm: Llama, written: _Written, n_prompt: int) -> dict[str, object]:
    return {
        "model": llm.model_name,
        "text": written.text,
        "finish_reason": written.finish_reason,
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": written.n_tokens,
            "total_tokens": n_prompt + written.n_tokens,
        },
        "tokens_per_second": written.tokens_per_second,
        "recall": [asdict(passage) for passage in written.recall.passages(llm._sequence.text_between)],
        "memory": asdict(llm.memory_stats()),
    }


def _check_following(file: str | None, options: TextOptions) -> None:
    if file is not None:
        raise ConfigError("--follow: reads standard input, not --file")
    if options.max_tokens < 0:
        raise ConfigError("--follow: needs an end of each answer, so --max-tokens must be at least 1")


def _read_prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("the prompt is an argument or --file, not both")
    if file is not None:
        return text_file(file)
    if prompt is not None:
        return _text_argument(prompt)
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt: give one as an argument, with --file or on standard input")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise LMInfError(f"standard input is no UTF-8: {error}") from error


def _text_argument(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is no valid text in this locale's encoding") from error
    return text


def _json_file(path: str) -> dict[str, object]:
    try:
        schema = json.loads(text_file(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{path} is no JSON schema: it must hold an object")
    return schema
