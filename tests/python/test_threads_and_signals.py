"""While a model computes, other threads run, signals are answered, and nobody else can disturb the computation."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from lminf_edge import Llama, LMInfConfig, StateError
from tiny_models import TinyModel

WINDOW = LMInfConfig(n_sink=4, n_window=32, n_rollback=0)


@pytest.fixture
def real(default_model: Path) -> Iterator[Llama]:
    """The default model with a window of 128."""
    with Llama(default_model, lminf=LMInfConfig(n_window=128), seed=0) as llm:
        yield llm


# --- threads


class Evaluation(threading.Thread):
    """Reads many tokens in another thread."""

    def __init__(self, llm: Llama) -> None:
        super().__init__()
        self.llm = llm
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.llm.logprobs([5] * 3000)
        except StateError as error:
            self.error = error

    def wait_until_computing(self) -> None:
        while self.is_alive() and self.llm.n_past == 0:
            time.sleep(0.001)


def test_python_goes_on_while_a_model_computes(real: Llama) -> None:
    tokens = [5] * 128
    start = time.perf_counter()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    real.eval(tokens)
    stop.set()
    ticker.join()
    pauses = np.diff([start, *ticks, time.perf_counter()])
    assert len(ticks) > 20
    assert pauses.max() < 0.5 * pauses.sum()


def test_a_second_thread_is_refused_and_can_still_watch(head_64: TinyModel) -> None:
    with Llama(head_64.path, lminf=WINDOW, n_ubatch=4, n_threads=1) as llm:
        thread = Evaluation(llm)
        thread.start()
        thread.wait_until_computing()
        with pytest.raises(StateError, match="another thread"):
            for _ in range(100):
                llm.eval([5])
        positions = [llm.n_past for _ in range(100)]
        assert positions == sorted(positions)
        assert llm.memory_stats().n_past >= positions[0]
        thread.join()
        assert thread.error is None
        assert llm.n_past == 3000


SHARED_SAMPLER = """
import sys, threading
import numpy as np
from lminf_edge import Llama, LMInfConfig
from lminf_edge.sampling import SamplingOptions

models = [Llama(sys.argv[1], lminf=LMInfConfig(n_window=64), n_threads=1) for _ in range(2)]
model = models[0]._model
sampler = SamplingOptions(repeat_penalty=1.001, penalty_last_n=1000, temperature=0).sampler(model, 0)
contexts = []
for best in (100, 40_000):
    context = type(models[0]._context)(model, lminf=models[0]._context.params, n_batch=64, n_ubatch=64)
    context.decode(np.ones(1, np.int32))
    logits = np.zeros(model.n_vocab, np.float32)
    logits[best] = 50
    context.set_state(context.get_state(), logits)
    contexts.append((context, best))
drawn = {best: set() for _, best in contexts}

def draw(context, best):
    for _ in range(400):
        drawn[best].add(sampler.sample(context)[0])

def accept():
    for _ in range(400):
        sampler.accept(np.arange(200, dtype=np.int32))

threads = [threading.Thread(target=draw, args=each) for each in contexts] + [threading.Thread(target=accept)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert drawn == {best: {best} for _, best in contexts}, drawn
"""


def test_threads_can_share_a_sampler(default_model: Path) -> None:
    """Each draws from its own logits, and none waits for another for ever."""
    command = [sys.executable, "-c", SHARED_SAMPLER, str(default_model)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


def test_closing_waits_for_the_micro_batch_of_another_thread(head_64: TinyModel) -> None:
    llm = Llama(head_64.path, lminf=WINDOW, n_ubatch=4, n_threads=1)
    thread = Evaluation(llm)
    thread.start()
    thread.wait_until_computing()
    llm.close()
    thread.join()
    assert isinstance(thread.error, StateError)


def test_a_signal_handler_that_uses_the_busy_object_gets_an_error(real: Llama) -> None:
    errors: list[StateError] = []

    def handler(number: int, frame: FrameType | None) -> None:
        for call in (real.reset, lambda: real.eval([5]), real.memory_stats):
            try:
                call()
            except StateError as error:
                errors.append(error)

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        while not errors:
            real.eval([5] * 512)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(errors) == 3
    assert real.n_past % 64 == 0


def test_an_exception_in_a_signal_handler_stops_a_micro_batch_and_leaves_no_trace(real: Llama) -> None:
    class AlarmError(Exception):
        pass

    def handler(number: int, frame: FrameType | None) -> None:
        raise AlarmError

    tokens = real.tokenize("The cat sat on the mat, and the dog lay by the door. " * 40)[:512]
    real.eval(tokens[:64])
    expected = real.logprobs(tokens[64:300])
    real.reset()
    real.eval(tokens[:64])
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(AlarmError):
            while True:
                real.eval(tokens[64:320])  # one micro-batch
                real.reset()
                real.eval(tokens[:64])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if real.n_past == 0:  # the alarm went off between two calls
        pytest.skip("the signal came too late")
    assert real.n_past == 64
    np.testing.assert_array_equal(real.logprobs(tokens[64:300]), expected)


# --- Ctrl-C

INTERRUPTED_READER = """
import signal, sys, time
import numpy as np
from lminf_edge import Llama, LMInfConfig

llm = Llama(sys.argv[1], lminf=LMInfConfig(n_window=1024), n_ubatch=256, deterministic=True, seed=0)
tokens = llm.tokenize("The sea was calm, and the ship sailed on towards the south. " * 2000)
print("reading", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
n_past = llm.n_past
assert n_past % 256 == 0 and n_past < len(tokens), n_past
after = llm.logprobs(tokens[n_past:n_past + 64])
llm.reset()
if n_past:
    llm.logprobs(tokens[:n_past])
np.testing.assert_array_equal(after, llm.logprobs(tokens[n_past:n_past + 64]))
print("usable", llm.n_past - n_past, flush=True)
"""

CALLS = {
    "eval": "llm.eval(tokens[:20000])",
    "logprobs": "llm.logprobs(tokens)",
    "generate": "list(llm.generate(tokens, max_tokens=10))",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_ctrl_c_stops_a_long_call_within_a_second_and_leaves_the_object_usable(default_model: Path, call: str) -> None:
    # a busy machine may starve the process once, so the best of three attempts counts
    seconds = math.inf
    for _ in range(3):
        seconds = min(seconds, seconds_until_interrupted(default_model, INTERRUPTED_READER.format(call=call)))
        if seconds < 1.0:
            return
    pytest.fail(f"it took {seconds:.2f} seconds")


def seconds_until_interrupted(model: Path, program: str) -> float:
    command = [sys.executable, "-c", program, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        assert process.stdout.readline() == "interrupted\n"
        seconds = time.perf_counter() - start
        assert process.stdout.readline() == "usable 64\n"
    assert process.returncode == 0
    return seconds
