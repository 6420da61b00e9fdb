"""`lminf-edge chat` on a terminal, in a pipe, and as JSON."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from command_line import Terminal, run, start
from lminf_edge.cli._markdown import MarkdownStream, split_complete
from lminf_edge.cli.app import app

GREEDY = ("--temperature", "0", "--threads", "1")
QUESTION = "What is the capital of France?"

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")


def answers(finished: Any) -> list[Any]:
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


# --- in a pipe


def test_each_line_is_a_message_and_its_answer_goes_to_standard_output(default_model: Path) -> None:
    finished = run("chat", *GREEDY, "--max-tokens", "12", given=f"{QUESTION}\n/stats\n/quit\nnever read\n")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1
    assert len(finished.stdout) > 10
    assert "kv bytes" in finished.stderr
    assert "\x1b" not in finished.stdout + finished.stderr


def test_json_has_a_line_for_each_answer(default_model: Path) -> None:
    lines = answers(
        run("chat", *GREEDY, "--max-tokens", "8", "--json", given=f"{QUESTION}\n/regenerate\n/edit {QUESTION}\n/stats")
    )
    assert len(lines) == 4
    assert lines[0]["role"] == "assistant"
    assert lines[0]["content"]
    assert 0 < lines[0]["usage"]["completion_tokens"] <= 8
    assert lines[0]["content"] == lines[1]["content"] == lines[2]["content"]  # no trace of the answer before it
    assert lines[3]["stats"]["kv_bytes"] > 0


def test_a_saved_conversation_goes_on_in_another_process(default_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a conversation"
    first = answers(
        run("chat", *GREEDY, "--max-tokens", "8", "--json", given=f"My name is Ann.\n/save {path}\n{QUESTION}\n")
    )
    second = answers(run("chat", *GREEDY, "--max-tokens", "8", "--json", "--load", str(path), given=f"{QUESTION}\n"))
    assert [line["content"] for line in second] == [line["content"] for line in first[1:]]
    third = answers(run("chat", *GREEDY, "--max-tokens", "8", "--json", given=f"/load {path}\n{QUESTION}\n"))
    assert third == second


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (b"/nonsense\n", 2, "there is no command /nonsense"),
        (b"/save\n", 2, "/save FILE"),
        (b"/regenerate now\n", 2, "/regenerate"),
        (b"/regenerate\n", 1, ""),
        (b"/load missing.state\n", 1, "missing.state"),
        (b"/load ~nobody-of-this-name/x\n", 2, "~nobody-of-this-name"),
        (b"/save a\0b\n", 2, "zero"),
        (b"/save /no/such/folder/x\n", 1, "/no/such/folder"),
        (b"caf\xe9\n", 1, "standard input is no UTF-8"),
    ],
)
def test_a_wrong_line_ends_a_pipe(default_model: Path, given: bytes, code: int, message: str) -> None:
    finished = run("chat", given=given)
    assert (finished.returncode, finished.stdout) == (code, "")
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--sistem", "x"), 2, "sistem"),
        (("--max-tokens", "0"), 2, "max_tokens = 0"),
        (("--top-p", "2"), 2, "top_p = 2.0"),
        (("--n-window", "0"), 2, "n_window = 0"),
        (("--load", "missing.state"), 1, "missing.state"),
        (("--load", "missing.state", "--system", "x"), 2, "--load"),
        (("--model", "missing.gguf"), 1, "missing.gguf"),
        (("a message",), 2, "a message"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    default_model: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = CliRunner().invoke(app, ["chat", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_a_pipe_with_130(default_model: Path) -> None:
    with start("chat", "--max-tokens", "-1", "--n-window", "64") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"Tell me a long story.\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == b"interrupted\n"
    assert process.returncode == 130


# --- on a terminal


@pytest.fixture(scope="module")
def terminal(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """One program for all tests, each of which leaves it waiting for a message."""
    state = str(tmp_path_factory.mktemp("state"))
    arguments = ("chat", "--max-tokens", "400", "--seed", "1", "--threads", "1", "--system", "You are a poet.")
    with Terminal(*arguments, XDG_STATE_HOME=state) as running:
        running.wait_for("tokens remembered")
        yield running


@needs_terminal
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.press("Tell me a very long story.\r")
    terminal.wait_for("[1-9][0-9]* tokens . Ctrl-C stops")
    terminal.press("\x03\x03\x03")
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for("tokens remembered")
    terminal.press("\x03")
    terminal.wait_for("Ctrl-D or /quit")


@needs_terminal
def test_ctrl_c_stops_the_reading_of_a_long_message(terminal: Terminal) -> None:
    terminal.press(f"\x1b[200~{'word ' * 700}\x1b[201~\r")
    terminal.wait_for(r"reading .* 256/70\d tokens")
    terminal.press("\x03")
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for("tokens remembered")
    terminal.press("/new\r")
    terminal.wait_for("a new conversation")
    terminal.wait_for("tokens remembered")


@needs_terminal
def test_commands_are_answered_and_errors_do_not_end_the_program(terminal: Terminal, tmp_path: Path) -> None:
    terminal.press("/help\r")
    terminal.wait_for("/regenerate")
    terminal.wait_for("tokens remembered")
    terminal.press("/system\r")
    terminal.wait_for("You are a poet.")
    terminal.wait_for("tokens remembered")
    terminal.press("/nonsense\r")
    terminal.wait_for("error: there is no command /nonsense")
    terminal.wait_for("tokens remembered")
    terminal.press(f"/save {tmp_path}/s\r")
    terminal.wait_for("saved in")
    terminal.wait_for("tokens remembered")
    assert (tmp_path / "s").is_file()
    terminal.press("/system Be brief.\r")
    terminal.wait_for("tokens remembered")
    terminal.press(f"/load {tmp_path}/s\r")
    terminal.wait_for("messages from")
    terminal.wait_for("tokens remembered")
    terminal.press("/system\r")
    terminal.wait_for("You are a poet.")
    terminal.wait_for("tokens remembered")


@needs_terminal
def test_the_last_answer_can_be_written_again_and_the_last_line_be_fetched_back(terminal: Terminal) -> None:
    terminal.press("/new\r")
    terminal.wait_for("tokens remembered")
    for line in ("Tell me a very long story.", "/regenerate"):
        terminal.press(f"{line}\r")
        terminal.wait_for("[1-9][0-9]* tokens . Ctrl-C stops")
        terminal.press("\x03")
        terminal.wait_for("tokens remembered")
    terminal.press("/stats\r")
    terminal.wait_for(r"n messages +2\b")
    terminal.wait_for("tokens remembered")
    terminal.press("\x1b[A\r")
    terminal.wait_for(r"n messages +2\b")
    terminal.wait_for("tokens remembered")


@needs_terminal
def test_a_message_may_have_several_lines(terminal: Terminal) -> None:
    terminal.press("/system Answer in one word.\\\rAlways.\r")
    terminal.wait_for("tokens remembered")
    terminal.press("/system\r")
    terminal.wait_for(r"Answer in one word\.\s+Always\.")
    terminal.wait_for("tokens remembered")
    terminal.press("/system \x1b[200~Pasted\nlines.\x1b[201~\r")  # as terminals mark what was pasted
    terminal.wait_for("tokens remembered")
    terminal.press("/system\r")
    terminal.wait_for(r"Pasted\s+lines\.")
    terminal.wait_for("tokens remembered")


@needs_terminal
def test_ctrl_d_ends_with_0(default_model: Path, tmp_path: Path) -> None:
    with Terminal("chat", XDG_STATE_HOME=str(tmp_path), NO_COLOR="1") as terminal:
        terminal.wait_for("tokens remembered")
        terminal.press("\x04")
        assert terminal.wait() == 0
        assert "\x1b[3" not in terminal.raw  # no colours


# --- Markdown


def test_a_block_is_complete_when_the_next_one_begins() -> None:
    text = "# Title\n\none\n\n- a\n\n  a\n- b\n\n```\nx\n\ny\n```\n\n| a |\n|---|\n| 1 |\n\nlast"
    blocks, rest = [], ""
    for letter in text:
        complete, rest = split_complete(rest + letter)
        blocks += [complete] if complete else []
    blocks.append(rest)
    assert "".join(blocks) == text
    assert [block.strip("\n") for block in blocks] == [
        "# Title",
        "one",
        "- a\n\n  a\n- b",
        "```\nx\n\ny\n```",
        "| a |\n|---|\n| 1 |",
        "last",
    ]


def test_each_block_is_shown_once_and_without_empty_lines_around_it() -> None:
    text = "one\n\n~~two~~\n\n- a\n- b\n\nlast **word**"
    console = Console(file=io.StringIO(), width=40, height=10)
    with MarkdownStream(console) as shown:
        for letter in text:
            shown.feed(letter, "status")
            time.sleep(0.004)
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    shown_lines = [line for line in lines if line and line != "status"]
    assert shown_lines == ["one", "two", "\u2022 a", "\u2022 b", "last word"]
    assert lines[0]
    assert lines[-1]
    assert not any(not one and not two for one, two in pairwise(lines))
