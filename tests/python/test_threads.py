"""How many threads compute: what the caller said, or as many as there are cores that others leave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge._library import lib_path
from lminf_edge.errors import ConfigError
from lminf_edge.system import default_n_threads, usable_cpus
from lminf_edge.text_generation import text_options
from lminf_edge.threads import INTERVAL, ThreadCount, ThreadPlan, seconds_of_others, threads_beside
from tiny_models import TinyModel


class Machine:
    """Cores of which others use some."""

    def __init__(self) -> None:
        self.time = 0.0
        self.seconds: float | None = 0.0

    def go_on(self, seconds: float, n_taken: float = 0.0) -> None:
        self.time += seconds
        if self.seconds is not None:
            self.seconds += n_taken * seconds

    def count(self, n_cpus: int = 4, n_max: int = 4) -> ThreadCount:
        return ThreadCount(lambda: self.seconds, n_max=n_max, n_cpus=n_cpus, clock=lambda: self.time)


@pytest.mark.parametrize(
    ("n_taken", "n_threads"), [(0.0, 4), (0.2, 4), (0.5, 3), (1.0, 3), (1.2, 3), (1.5, 2), (3.0, 1), (4.0, 1), (9.0, 1)]
)
def test_a_core_that_others_use_for_more_than_a_quarter_is_left_to_them(n_taken: float, n_threads: int) -> None:
    assert threads_beside(n_taken, 4, 4) == n_threads


def test_two_hardware_threads_of_a_core_are_enough_for_one_thread_and_others() -> None:
    assert threads_beside(4.0, n_cpus=8, n_max=4) == 4
    assert threads_beside(5.0, n_cpus=8, n_max=4) == 3


def test_the_number_follows_the_machine() -> None:
    machine = Machine()
    count = machine.count()
    assert count.now() == 4
    for n_taken, expected in ((1.0, 3), (2.0, 2), (0.0, 4)):
        machine.go_on(INTERVAL, n_taken)
        assert count.now() == expected


def test_a_short_time_says_nothing() -> None:
    machine = Machine()
    count = machine.count()
    machine.go_on(INTERVAL / 2, 4.0)
    assert count.now() == 4
    machine.go_on(INTERVAL / 2, 4.0)
    assert count.now() == 1


def test_where_the_system_says_nothing_all_cores_are_used() -> None:
    machine = Machine()
    machine.seconds = None
    count = machine.count()
    machine.go_on(10.0)
    assert count.now() == 4


def test_what_the_caller_says_is_obeyed() -> None:
    machine = Machine()
    free = machine.count()
    machine.go_on(INTERVAL, 2.0)
    assert ThreadPlan(None, None, free).now() == (2, 2)
    assert ThreadPlan(3, None, free).now() == (3, 3)
    assert ThreadPlan(None, 3, free).now() == (2, 3)
    assert ThreadPlan(3, 4, free).now() == (3, 4)


STAT = """\
cpu  9999 9999 9999 9999 0 0 0 0 0 0
cpu0 100 1000 20 5000 50 3 4 5 0 0
cpu1 200 2000 40 6000 60 6 7 8 0 0
cpu10 900 900 900 9000 90 90 90 90 0 0
intr 1 2 3
"""


@pytest.mark.skipif(os.nice(0) > 0, reason="this process is nice")
def test_others_are_counted_on_our_processors_without_ourselves(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    ticks = os.sysconf("SC_CLK_TCK")
    before = time.process_time()
    seconds = seconds_of_others([0, 1], stat)
    assert seconds is not None
    assert before <= (132 + 261) / ticks - seconds <= time.process_time()


def test_for_a_nice_process_nice_ones_count(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    code = (
        "import os, pathlib, time; os.nice(1); from lminf_edge.threads import seconds_of_others;"
        f"print(seconds_of_others([0], pathlib.Path({str(tmp_path / 'stat')!r})) + time.process_time())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(1132 / os.sysconf("SC_CLK_TCK"), abs=0.1)


def test_a_system_without_such_a_count(tmp_path: Path) -> None:
    assert seconds_of_others([0], tmp_path / "missing") is None


def test_a_context_uses_other_numbers_from_the_next_call_on(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=2, n_threads_batch=3) as llm:
        assert llm._context.n_threads == (2, 3)
        llm._context.set_n_threads(1, 1)
        llm.eval([5, 6])  # the caller's numbers again
        assert llm._context.n_threads == (2, 3)
        with pytest.raises(ConfigError, match="n_threads"):
            llm._context.set_n_threads(0, 1)


@pytest.fixture
def busy_processes() -> Iterator[None]:
    """One for each processor, so that no thread of ours has one of its own."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in usable_cpus()]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.skipif(default_n_threads() < 2 or not Path("/proc/stat").exists(), reason="needs Linux and two cores")
def test_a_busy_machine_gets_fewer_threads_and_an_explicit_number_stays(
    busy_processes: None, head_32: TinyModel
) -> None:
    config = LMInfConfig(n_window=64)
    n_cores = default_n_threads()
    with (
        Llama(head_32.path, lminf=config) as adapting,
        Llama(head_32.path, lminf=config, n_threads=n_cores) as fixed,
    ):
        deadline = time.monotonic() + 20
        while adapting._context.n_threads[0] == n_cores and time.monotonic() < deadline:
            adapting.eval([5])
            fixed.eval([5])
        assert adapting._context.n_threads[0] < n_cores
        assert fixed._context.n_threads == (n_cores, n_cores)


def test_the_number_changes_while_a_long_prompt_is_read(head_64: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(head_64.path, lminf=LMInfConfig(n_window=64), n_ubatch=4) as llm:
        looks: list[tuple[int, int]] = []

        def now() -> tuple[int, int]:
            looks.append(llm._context.n_threads)
            return (1, 1 + len(looks) % 2)

        monkeypatch.setattr(llm._sequence.threads, "now", now)
        next(llm._write([5] * 2000, text_options({}, max_tokens=1)))
    assert len(looks) > 4
    assert {batch for _, batch in looks[1:]} == {1, 2}


def test_a_forked_child_computes(default_model: Path) -> None:
    """The threads of a computation end with it, so a child lacks nothing."""
    code = """
import os, sys, warnings
from lminf_edge import Llama, LMInfConfig
llm = Llama(sys.argv[1], lminf=LMInfConfig(n_window=64), n_threads=2)
logits = llm.eval([5, 6, 7])
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
assert llm.eval([8])[0].argmax() >= 0
print(llm.eval([9]).tobytes().hex()[:64], flush=True)
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, str(default_model)], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    first, second = finished.stdout.split()
    assert first == second


def test_no_library_needs_openmp() -> None:
    """How its threads wait is decided before a library of ours is asked."""
    for library in lib_path().iterdir():
        if re.search(r"\.(so|dylib)$", library.name):
            assert not re.search(rb"lib(gomp|omp|iomp5)\.(so|dylib)", library.read_bytes()), library.name
