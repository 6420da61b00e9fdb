"""What the machine offers and what this process uses of it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path


def usable_cpus() -> list[int]:
    """The processors that this process may use, by number; hardware threads of one core count as several."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_n_threads() -> int:
    """Threads to compute with: the physical cores that this process may use.

    Two hardware threads of one core share the arithmetic units that llama.cpp keeps busy, so they count as one.
    """
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    cores = {_core_of(cpu) for cpu in usable_cpus()}
    quota = _cgroup_cpus()
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, mapped model files included."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE
    listing = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(listing.stdout) * 1024


def peak_resident_bytes() -> int | None:
    """The most memory of this process that has been in RAM. None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human_bytes(n_bytes: int) -> str:
    """A number of bytes to read: 47.2 MB."""
    units = ("kB", "MB", "GB", "TB")
    power = next((i for i in range(1, len(units)) if n_bytes < 999.5 * 1000**i), len(units))
    value = n_bytes / 1000**power
    return f"{value:.0f} {units[power - 1]}" if value >= 99.95 else f"{value:.1f} {units[power - 1]}"


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return siblings.read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int | None:
    """The container's CPU quota (control groups version 2), rounded up, if there is one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None


def _sysctl(name: str) -> int | None:
    try:
        return int(subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
