"""The machine that a result was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lminf_edge._library import _core
from lminf_edge.system import default_n_threads


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What speed depends on.

    Attributes:
        cpu: Name of the processor.
        n_cores: Physical cores that this process may use.
        memory_bytes: Size of the memory. None where the system does not say.
        system: Operating system and the processor's architecture.
        python: Version of Python.
        devices: What ggml can compute on.
    """

    cpu: str
    n_cores: int
    memory_bytes: int | None
    system: str
    python: str
    devices: tuple[str, ...]


def describe_machine() -> Machine:
    """This machine."""
    return Machine(
        cpu=_cpu_name(),
        n_cores=default_n_threads(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        devices=tuple(_core.devices()),
    )


def _cpu_name() -> str:
    if sys.platform == "darwin":
        finished = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return finished.stdout.strip() or platform.processor()
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", described, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
