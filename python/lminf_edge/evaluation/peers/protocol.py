"""How `bench` talks to another program: a JSON document a line, requests on its input, answers on its output.

| request | fields | answer |
| --- | --- | --- |
| `open` | model, n_sink, n_window, n_threads | versions, weight_bytes |
| `fill` | tokens | n_read: it begins anew and reads them |
| `decode` | tokens, n_at_least, max_seconds | n_tokens, seconds: one by one, the first one not counted |
| `footprint` | | kv_bytes, resident_bytes |
| `logits` | tokens, file | begins anew; writes float32 [n_tokens, n_vocab] as `.npy` |
| `loss` | tokens | loss: begins anew; mean over the text, in nats per token |

An answer is `{"ok": {...}}` or `{"error": "..."}`. The program ends when its input does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lminf_edge.errors import ConfigError, LMInfError

SCRIPTS = {"attention-sinks": Path(__file__).with_name("attention_sinks_peer.py")}
"""The programs, by name. They import nothing of this package: another Python may run them."""

NEEDED = {"attention-sinks": ("torch", "transformers", "attention_sinks", "gguf")}
"""What each imports."""


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """What a peer opened.

    Attributes:
        versions: Of the packages that it uses.
        weight_bytes: Bytes of weights that it reads for each token.
    """

    versions: dict[str, str]
    weight_bytes: int


class Peer:
    """A program that was started. A context manager."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        """Starts it.

        Raises:
            LMInfError: It cannot be started.
        """
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # closed by close()
        try:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the other one
            )
        except OSError as error:
            self._errors.close()
            raise LMInfError(f"cannot start {command[0]}: {error}") from error

    def open(self, model: str, n_sink: int, n_window: int, n_threads: int) -> PeerModel:
        """Lets it open a model.

        Raises:
            LMInfError: It cannot.
        """
        answer = self.ask("open", model=model, n_sink=n_sink, n_window=n_window, n_threads=n_threads)
        return PeerModel(versions=answer["versions"], weight_bytes=answer["weight_bytes"])

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            LMInfError: It answers with an error, with something else, or not at all.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LMInfError(f"the peer ended with exit code {self._process.wait()}: {self._last_words()}")
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise LMInfError(f"the peer failed: {answer['error']}")
            result: dict[str, Any] = answer["ok"]
        except (ValueError, LookupError, TypeError) as error:
            raise LMInfError(f"the peer answered {line[:200]!r}") from error
        return result

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def peer_command(name: str, python: str | None) -> list[str | Path]:
    """The command that starts a peer.

    Args:
        name: One of `SCRIPTS`.
        python: The interpreter. None: this one.

    Raises:
        ConfigError: The interpreter does not run, or lacks a package.
    """
    interpreter = python or sys.executable
    modules = NEEDED[name]
    found = "import importlib.util, sys; print([m for m in sys.argv[1:] if not importlib.util.find_spec(m)])"
    try:
        finished = subprocess.run([interpreter, "-c", found, *modules], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {interpreter}: {error}") from error
    if finished.returncode != 0:
        raise ConfigError(f"{interpreter} is no Python: {finished.stderr.strip()[:200]}")
    if finished.stdout.strip() != "[]":
        raise ConfigError(
            f"{name} is not installed for {interpreter} (missing: {finished.stdout.strip()}): "
            "pip install 'lminf-edge[peers]', or name a Python that has it with --peer-python"
        )
    return [interpreter, "-W", "ignore", SCRIPTS[name]]
