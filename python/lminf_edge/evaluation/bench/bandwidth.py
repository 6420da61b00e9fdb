"""How fast this machine's memory can be read: the limit for a model whose weights do not fit into a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from lminf_edge.evaluation.bench.spread import Spread, spread_of

N_BYTES = 256 * 1024**2
"""Read by each thread: several times what last-level caches hold."""

N_REPETITIONS = 7


def read_bandwidth(n_threads: int, n_bytes: int = N_BYTES, n_repetitions: int = N_REPETITIONS) -> Spread:
    """Reads large arrays with all threads at once, several times.

    Args:
        n_threads: Threads, each with an array of its own.
        n_bytes: Size of an array.
        n_repetitions: Measurements; one before them is not counted.

    Returns:
        Bytes per second of all threads together.
    """
    arrays = [np.full(max(1, n_bytes // 4), i, np.int32) for i in range(n_threads)]
    total = sum(array.nbytes for array in arrays)
    with ThreadPoolExecutor(n_threads) as threads:
        _seconds(threads, arrays)
        return spread_of([total / _seconds(threads, arrays) for _ in range(n_repetitions)])


def _seconds(threads: ThreadPoolExecutor, arrays: list[npt.NDArray[np.int32]]) -> float:
    # The largest 32-bit integer of an array: vectorised, one load for each element, and NumPy releases the GIL
    largest: Callable[[npt.NDArray[np.int32]], np.int32] = np.max
    begin = time.perf_counter()
    list(threads.map(largest, arrays))
    return time.perf_counter() - begin
