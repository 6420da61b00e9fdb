"""Speed by number of threads, on an idle machine and beside other processes: what n_threads=None chooses.

    python benchmarks/busy_machine.py --busy 0 1 --rounds 9

For each number of busy processes a context with the default, and one for each number of threads, read a prompt and
decode in turns. Prints medians of the times of a round relative to the best fixed number of threads in that round, the
processor time, and how busy others kept the machine meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

from lminf_edge import Llama, LMInfConfig
from lminf_edge.system import default_n_threads, usable_cpus
from lminf_edge.threads import seconds_of_others
from tables import markdown_table, open_model_path


class Turn(NamedTuple):
    """Seconds of a turn, and of processor time."""

    wall: float
    processor: float


@contextmanager
def busy_processes(n: int, nice: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    command = ["nice", "-n", str(nice), sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(n)]
    try:
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def timed(llm: Llama, tokens: list[list[int]]) -> Turn:
    """Appends pieces one after the other; they are taken back."""
    n_past = llm.n_past
    wall, processor = time.perf_counter(), time.process_time()
    for piece in tokens:
        llm._sequence.append(np.array(piece, np.int32))
    turn = Turn(time.perf_counter() - wall, time.process_time() - processor)
    llm.truncate(n_past)
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="other processes that compute")
    parser.add_argument("--nice", type=int, default=0, help="their nice value")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--prompt", type=int, default=120, help="tokens of a prompt")
    args = parser.parse_args()

    path = open_model_path(args.model)
    kinds: list[int | None] = [None, *range(1, default_n_threads() + 1)]
    rows = []
    with ExitStack() as stack:
        models = [stack.enter_context(Llama(path, lminf=LMInfConfig(), n_threads=kind)) for kind in kinds]
        for llm in models:
            llm.eval(list(range(100, 180)))
        for n_busy in args.busy:
            with busy_processes(n_busy, args.nice):
                begin, others = time.monotonic(), seconds_of_others(usable_cpus()) or 0.0
                turns: dict[str, list[list[Turn]]] = {"decode": [], "prompt": []}
                for i in range(args.rounds):
                    order = [(k + i) % len(models) for k in range(len(models))]
                    for name, pieces in (
                        ("decode", [[7]] * args.decode),
                        ("prompt", [list(range(200, 200 + args.prompt))]),
                    ):
                        measured = {k: timed(models[k], pieces) for k in order}
                        turns[name].append([measured[k] for k in range(len(models))])
                taken = ((seconds_of_others(usable_cpus()) or 0.0) - others) / (time.monotonic() - begin)
            for name, per_round in turns.items():
                wall = np.array([[turn.wall for turn in each] for each in per_round])
                processor = np.array([[turn.processor for turn in each] for each in per_round])
                best = np.median(wall[:, 1:], axis=0).min()
                for k, kind in enumerate(kinds):
                    relative = np.median(best / wall[:, k])
                    rows.append(
                        [
                            f"{n_busy} ({taken:.2f})",
                            name,
                            "default" if kind is None else str(kind),
                            f"{relative:.2f} ({np.percentile(best / wall[:, k], 25):.2f} to "
                            f"{np.percentile(best / wall[:, k], 75):.2f})",
                            f"{np.median(processor[:, k]) / np.median(processor[:, 1]):.2f}",
                        ]
                    )
                print(rows[-len(kinds) :], flush=True)
    header = [
        "busy processes (cores that others took)",
        "",
        "threads",
        "speed / best fixed (quartiles)",
        "CPU time / 1",
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
