"""Speed, latency and memory of the methods on this machine, measured in turns.

Processor clocks and neighbours on a machine change from minute to minute. So everything that is compared waits in a
process of its own at its depth, and in each round each of them decodes some tokens, in a changing order: ratios are
those of one round, and their median and spread over the rounds are what can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from lminf_edge.evaluation.bench.bandwidth import read_bandwidth
from lminf_edge.evaluation.bench.decode import DecodeBench
from lminf_edge.evaluation.bench.plan import BenchSettings
from lminf_edge.evaluation.bench.prompts import measure_prompts
from lminf_edge.evaluation.bench.spread import Spread
from lminf_edge.evaluation.bench.stalls import measure_latency
from lminf_edge.evaluation.bench.stations import as_tokens
from lminf_edge.evaluation.bench.work import Tokens
from lminf_edge.evaluation.peers.protocol import peer_command
from lminf_edge.evaluation.results import ResultLog, begin_or_resume, identify_model, run_record
from lminf_edge.evaluation.texts import python_documentation, tokenize_text
from lminf_edge.system import default_n_threads

N_TOKENS = 8192
"""Of the text that is read in a circle."""

Progress = Callable[[str], object]
"""Called with what is being done now."""


__all__ = ["BenchSettings", "Progress", "run_bench"]


def run_bench(settings: BenchSettings, log: ResultLog, on_progress: Progress = lambda _: None) -> None:
    """Measures what the settings say and writes it to the log. What the log already holds is not measured again.

    Args:
        settings: What to measure.
        log: Where the records go.
        on_progress: See `Progress`.

    Raises:
        ConfigError: The log holds another run, or the peer is not installed.
        LMInfError: As for `Llama`.
    """
    if settings.peer is not None:
        peer_command(settings.peer, settings.peer_python)  # tells what is missing before anything is measured
    setup = settings.setup
    on_progress("reading the model file")
    tokens, n_ctx_train = _text(setup.model)
    begin_or_resume(log, run_record("bench", settings, identify_model(setup.model)))
    bandwidth = _bandwidth(log, setup.n_threads or default_n_threads(), on_progress)
    for cache_type in setup.cache_types:
        DecodeBench(settings, cache_type, tokens, bandwidth.high, log, on_progress).run()
    measure_latency(settings, tokens, log, on_progress)
    measure_prompts(settings, tokens, n_ctx_train, log, on_progress)


def _text(model: str) -> tuple[Tokens, int]:
    """A text, and the length that the model was trained on."""
    tokenized = tokenize_text(model, python_documentation()[: 8 * N_TOKENS])
    return as_tokens(tokenized.tokens[:N_TOKENS]), tokenized.n_ctx_train


def _bandwidth(log: ResultLog, n_threads: int, on_progress: Progress) -> Spread:
    earlier = log.of_kind("bench.bandwidth")
    if not earlier:
        on_progress("memory bandwidth")
        measured = read_bandwidth(n_threads)
        earlier = [log.add("bench.bandwidth", bytes_per_second=asdict(measured), n_threads=n_threads)]
    return Spread(**earlier[0]["bytes_per_second"])
