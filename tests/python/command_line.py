"""Runs the command as its users do: in a pipe, or on a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

COMMAND = (sys.executable, "-m", "lminf_edge")

_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?<>=]*[A-Za-z]|\][^\x07]*\x07|[()=>78]\S?)|\r")


def run(
    *arguments: str, given: str | bytes = b"", timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, without a terminal, with something on standard input."""
    finished = subprocess.run(
        [*COMMAND, *arguments],
        input=given.encode() if isinstance(given, str) else given,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "120", **environment},
    )
    return subprocess.CompletedProcess(
        finished.args, finished.returncode, finished.stdout.decode(), finished.stderr.decode()
    )


class Terminal:
    """The command on a pseudo-terminal of 100 columns and 40 rows.

    Attributes:
        text: What it has shown so far, without escape sequences.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        import fcntl
        import pty
        import termios

        pid, self._fd = pty.fork()
        if pid == 0:
            env = {**os.environ, "TERM": "xterm-256color", **environment}
            os.execve(COMMAND[0], [*COMMAND, *arguments], env)
        self._pid = pid
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.raw = ""
        self._n_seen = 0

    @property
    def text(self) -> str:
        return _ESCAPE.sub("", self.raw)

    def press(self, text: str) -> None:
        """Presses keys; "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        self._n_seen = len(self.text)
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Waits until something is shown after the last keys."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = re.search(pattern, self.text[self._n_seen :])
            if found:
                return found
            if not self._read(end - time.monotonic()):
                break
        raise AssertionError(f"{pattern!r} was not shown after: {self.text[self._n_seen :]!r}")

    def wait(self, timeout: float = 30.0) -> int:
        """Reads to the end and returns the exit code."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self._read(end - time.monotonic()):
            pass
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, timeout))
        if not ready:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data.decode(errors="replace")
        if b"\x1b[6n" in data:  # asks where the cursor is
            os.write(self._fd, b"\x1b[20;1R")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Starts the command with pipes to it and from it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *arguments], **{**pipes, **options})
