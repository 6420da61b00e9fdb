"""How many threads compute: as many as there are cores that no other process uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from lminf_edge.system import default_n_threads, usable_cpus

INTERVAL = 0.25
"""Seconds between two looks at the machine. The system counts in hundredths of a second."""

TOLERANCE = 0.25
"""Part of a core that others may use before a thread is given up for it.

Threads wait for each other at every operation, so each of them is as slow as the slowest: with two cores, two threads
of which one is kept from running for more than this part of the time are slower than one.
"""

_STAT = Path("/proc/stat")


class ThreadCount:
    """A number of threads that follows what the machine has free.

    A thread that has to wait for its core makes all others wait, at every operation of the model. So there are never
    more of them than cores that others leave. Where the system does not tell how busy it is (only Linux does), all
    usable physical cores are used.

    Args:
        read_seconds: How long other processes have computed so far, in seconds of all usable processors together. None:
            the system does not say.
        n_max: Threads of an idle machine. None: the usable physical cores.
        n_cpus: Processors that this process may use. None: those of the system.
        clock: Seconds.
    """

    def __init__(
        self,
        read_seconds: Callable[[], float | None] | None = None,
        *,
        n_max: int | None = None,
        n_cpus: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        cpus = usable_cpus()
        self._read = read_seconds or (lambda: seconds_of_others(cpus))
        self._n_cpus = n_cpus or len(cpus)
        self._n_max = n_max or default_n_threads()
        self._clock = clock
        self._value = self._n_max
        self._time, self._seconds = clock(), self._read()

    def now(self) -> int:
        """Threads to use from now on. Looks at the machine at most every `INTERVAL` seconds; cheap in between."""
        clock = self._clock()
        elapsed = clock - self._time
        if elapsed >= INTERVAL and self._seconds is not None:
            seconds = self._read()
            if seconds is not None:
                self._value = threads_beside((seconds - self._seconds) / elapsed, self._n_cpus, self._n_max)
            self._time, self._seconds = clock, seconds
        return self._value


def threads_beside(n_taken: float, n_cpus: int, n_max: int) -> int:
    """Threads that find a processor of their own.

    Args:
        n_taken: Processors that others use, on average.
        n_cpus: Processors that there are for this process.
        n_max: Threads of an idle machine.

    Returns:
        From 1 to n_max.
    """
    return max(1, min(n_max, int(n_cpus - n_taken + TOLERANCE)))


def seconds_of_others(cpus: Collection[int], stat: Path = _STAT) -> float | None:
    """How long these processors have computed for other processes since the system was started (proc_stat(5)).

    That includes what a hypervisor has taken from them ("steal"). It leaves out what runs at a positive nice value,
    which the scheduler holds back for this process, unless this process is nice itself.

    Args:
        cpus: Numbers of processors.
        stat: The system's count.

    Returns:
        Seconds. None where the system does not say.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    wanted = {f"cpu{cpu}" for cpu in cpus}
    is_nice = os.nice(0) > 0
    ticks = 0
    for line in lines:
        name, *counts = line.split()
        if name in wanted:
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            ticks += user + system + irq + softirq + steal + (nice if is_nice else 0)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class ThreadPlan:
    """The numbers of threads of a model: what the caller said, and where he did not, what the machine has free.

    Args:
        n_threads: Threads for generation. None: a `ThreadCount`.
        n_threads_batch: Threads for prompts. None: as for generation.
        free: What the machine has free. None: a new `ThreadCount`.
    """

    def __init__(self, n_threads: int | None, n_threads_batch: int | None, free: ThreadCount | None = None) -> None:
        self._given = n_threads, n_threads_batch or n_threads
        self._free = free or ThreadCount()

    def now(self) -> tuple[int, int]:
        """Threads for generation and for prompts, from now on."""
        n_threads, n_threads_batch = self._given
        if n_threads is not None and n_threads_batch is not None:
            return n_threads, n_threads_batch
        free = self._free.now()
        return n_threads or free, n_threads_batch or free
