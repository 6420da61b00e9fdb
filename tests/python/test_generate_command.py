"""`lminf-edge generate` writes text to standard output and everything else to standard error."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from command_line import COMMAND, Terminal, run, start
from lminf_edge import ConfigError, Llama, LMInfConfig
from lminf_edge.cli._terminal import without_control
from lminf_edge.cli.app import app
from lminf_edge.following import Follower, read_with_pauses
from lminf_edge.text_generation import text_options
from tiny_models import TinyModel

PROMPT = "The capital of France is"
GREEDY = ("--temperature", "0", "--threads", "1")

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")


@pytest.fixture(scope="module")
def expected(default_model: Path) -> str:
    """How the default model goes on after PROMPT."""
    with Llama(default_model, lminf=LMInfConfig(), n_threads=1) as llm:
        return llm.create_completion(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"]


def test_the_prompt_comes_from_argument_file_or_standard_input(
    default_model: Path, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    for arguments, given in (((PROMPT,), ""), (("--file", str(file)), ""), ((), PROMPT)):
        finished = run("generate", *arguments, *GREEDY, "--max-tokens", "8", given=given)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == expected
        assert finished.stderr == ""


def test_the_json_has_text_usage_speed_and_memory(default_model: Path, expected: str) -> None:
    finished = run("generate", PROMPT, *GREEDY, "--max-tokens", "8", "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["model"] == default_model.name
    assert report["text"] == expected
    assert report["finish_reason"] == "length"
    assert report["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert report["tokens_per_second"] > 0
    assert report["memory"]["n_past"] == 13
    assert report["memory"]["kv_bytes"] > 0


def test_a_schema_and_stop_strings_are_kept_to(default_model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}))
    finished = run("generate", "A number: ", *GREEDY, "--max-tokens", "40", "--json-schema", str(schema))
    assert finished.returncode == 0, finished.stderr
    assert isinstance(json.loads(finished.stdout)["n"], int)

    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "one, two, three"')
    finished = run("generate", "Count: ", *GREEDY, "--grammar", str(grammar), "--stop", "x", "--stop", ", th")
    assert (finished.returncode, finished.stdout) == (0, "one, two")


def test_a_reader_that_goes_away_ends_the_writer_quietly(default_model: Path) -> None:
    with start("generate", "Once upon a time", "--max-tokens", "-1", "--stop-on-loop", "--seed", "1") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        begin = time.monotonic()
        assert process.stderr.read() == b""
    assert time.monotonic() - begin < 20
    assert process.returncode not in (0, -signal.SIGKILL)


def test_ctrl_c_ends_with_130_and_what_was_written(default_model: Path) -> None:
    with start("generate", "Once upon a time", "--max-tokens", "-1", "--n-window", "64") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == b"interrupted\n"
    assert process.returncode == 130


@needs_terminal
def test_a_terminal_sees_bars_and_figures_and_no_control_characters(default_model: Path) -> None:
    with Terminal("generate", "word " * 600 + "\x1b]0;title\x07", *GREEDY, "--max-tokens", "4") as terminal:
        assert terminal.wait(60) == 0
        assert "loading" in terminal.text
        assert "reading" in terminal.text
        assert "4 tokens" in terminal.text
        assert "tokens/s" in terminal.text
        assert "\x1b]0;" not in terminal.raw
    with Terminal("generate", PROMPT, *GREEDY, "--max-tokens", "4", NO_COLOR="1") as plain:
        assert plain.wait(60) == 0
        assert "\x1b[3" not in plain.raw  # no colours
    assert without_control("a\x1b[31mb\x07\x9bc\td\n") == "a[31mbc\td\n"


@needs_terminal
def test_a_terminal_without_a_prompt_is_told_so(default_model: Path) -> None:
    with Terminal("generate") as terminal:
        assert terminal.wait(30) == 2
        assert "there is no prompt" in terminal.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--temprature", "1"), 2, "temprature"),
        (("--max-tokens", "many"), 2, "max-tokens"),
        (("--max-tokens", "0"), 2, "max_tokens = 0"),
        (("--temperature", "-1"), 2, "temperature = -1.0"),
        (("--n-window", "0"), 2, "n_window = 0"),
        (("--cache-type", "q9"), 2, "cache_type_k = 'q9'"),
        (("--stop", ""), 2, "stop"),
        (("--file", "x.txt"), 2, "not both"),
        (("--follow", "--max-tokens", "-1"), 2, "--follow"),
        (("--follow", "--file", "x.txt"), 2, "--follow"),
        (("--json-schema", "BAD"), 2, "is no JSON"),
        (("--grammar", "BAD"), 2, "grammar"),
        (("--grammar", "missing.gbnf"), 1, "missing.gbnf"),
        (("--model", "missing.gguf"), 1, "missing.gguf"),
        (("--model", "owner/repository/file.gguf"), 1, "owner/repository"),
        (("second argument",), 2, "second argument"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    default_model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("{")
    arguments = tuple(str(bad) if argument == "BAD" else argument for argument in arguments)
    result = CliRunner().invoke(app, ["generate", "prompt", *arguments], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_standard_input_is_refused(default_model: Path) -> None:
    for given, code, message in ((b"caf\xe9", 1, "standard input is no UTF-8"), (b"", 2, "prompt is empty")):
        finished = run("generate", given=given)
        assert (finished.returncode, finished.stdout) == (code, "")
        assert message in finished.stderr
        assert finished.stderr.count("\n") == 1


def test_a_full_disk_and_missing_streams_are_no_tracebacks(default_model: Path) -> None:
    command = [*COMMAND, "generate", "Hello", "--max-tokens", "2"]
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert finished.returncode == 1
        assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    without_input = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, "generate"], stderr=subprocess.PIPE, text=True
    )
    assert without_input.returncode == 2
    assert without_input.stderr.count("\n") == 1


def test_the_shells_get_completions() -> None:
    # the shell is found by looking at the parent process, so it must not give way to the command
    command = f"{shlex.join([*COMMAND, '--show-completion'])}; exit $?"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "lminf-edge" in finished.stdout


# --- following a text that never ends


def test_a_slow_log_is_answered_at_each_pause(default_model: Path) -> None:
    arguments = ("--follow", "\nThe last word in capitals:", "--pause", "0.3", "--max-tokens", "4", "--json", *GREEDY)
    with start("generate", *arguments) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        reports: list[Any] = []
        for text in (b"Line one\nLine two\n", b"Line three \xff\nand half"):
            process.stdin.write(text)
            process.stdin.flush()
            reports.append(json.loads(process.stdout.readline()))
        process.stdin.write(b" a line\n")
        process.stdin.close()
        reports += [json.loads(line) for line in process.stdout]
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert len(reports) == 3
    n_read = [report["usage"]["prompt_tokens"] for report in reports]
    assert 0 < n_read[0] < n_read[1] < n_read[2] < 40  # answers and questions are not among what was read
    assert all(report["usage"]["completion_tokens"] == 4 for report in reports)


def test_a_log_without_pauses_is_answered_at_each_window(default_model: Path) -> None:
    log = "a line of a log\n" * 60
    arguments = ("--follow", "--max-tokens", "2", "--n-window", "100", "--json", *GREEDY)
    reports = [json.loads(line) for line in run("generate", *arguments, given=log).stdout.splitlines()]
    n_read = [report["usage"]["prompt_tokens"] for report in reports]
    assert n_read[-1] > 300
    assert all(100 <= later - earlier < 200 for earlier, later in pairwise([0, *n_read[:-1]]))


def test_ctrl_c_ends_the_following(default_model: Path) -> None:
    with start("generate", "--follow", "--pause", "0.1", "--max-tokens", "1") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"text\n")
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(0.3)  # waiting for more
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"interrupted\n"
    assert process.returncode == 130


def test_an_answer_leaves_no_trace_in_what_is_followed(head_32: TinyModel) -> None:
    options = text_options({"temperature": 0.0}, max_tokens=6)
    config = LMInfConfig(n_sink=2, n_window=32, n_rollback=40)
    with (
        Llama(head_32.path, lminf=config, n_threads=1) as asked,
        Llama(head_32.path, lminf=config, n_threads=1) as silent,
    ):
        follower = Follower(asked, "what?", options)
        for text in ("some text\n" * 5, "more of it\n" * 9):
            follower.read(text)
            Follower(silent, "", options).read(text)
            assert follower.n_new > 0
            assert sum(len(piece.tokens) for piece in follower.answer()) > 0
            assert follower.n_new == 0
        assert asked.n_past == silent.n_past > 32
        tokens = asked.tokenize("the end", add_bos=False)
        assert (asked.eval(tokens) == silent.eval(tokens)).all()


def test_an_answer_too_long_to_be_taken_back_is_refused(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=32, n_rollback=8), n_threads=1) as llm:
        for max_tokens in (9, -1):
            with pytest.raises(ConfigError, match=f"max_tokens = {max_tokens}"):
                Follower(llm, "", text_options({}, max_tokens=max_tokens))


def test_a_growing_text_arrives_in_lines_and_pauses() -> None:
    reader, writer = os.pipe()
    pieces = read_with_pauses(reader, 0.05)
    os.write(writer, "a\nb\nc\u00e9".encode()[:-1])
    assert next(pieces) == "a\nb\n"
    assert next(pieces) == "c"
    assert next(pieces) is None
    os.write(writer, "\u00e9".encode()[1:] + b"d\n\xff")
    assert next(pieces) == "\u00e9d\n"
    os.close(writer)
    rest = list(pieces)
    assert [piece for piece in rest if piece is not None] == ["\ufffd"]
    assert rest[-1] is None
    os.close(reader)
