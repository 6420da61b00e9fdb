"""`lminf-edge bench`: speed, latency and memory of the methods, measured in turns on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status

from lminf_edge.cli._bench_tables import show_bench
from lminf_edge.cli._evaluation import MethodOptions, Output, default_window, names, numbers, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import find_model, messages, with_exit_codes
from lminf_edge.cli._tuned import show_tuned, tuned_document
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.bench import BenchSettings, run_bench
from lminf_edge.evaluation.bench.plan import PEERS, RECOMPUTE
from lminf_edge.evaluation.bench.tune import TuneSettings, thread_numbers
from lminf_edge.evaluation.bench.tune import tune as tune_here
from lminf_edge.evaluation.methods import METHODS
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of
from lminf_edge.system import default_n_threads

_WHAT, _PEER, _METHODS = "What is measured", "Peer", "Methods"

_METHODS_MEASURED = ("endless", "full", "shift")


@dataclass(frozen=True, kw_only=True)
class BenchMethodOptions(MethodOptions):
    """Which model is measured with which methods."""

    methods: Annotated[
        str,
        typer.Option(
            help=f"What is compared: some of {', '.join(METHODS)} and {RECOMPUTE} (a sliding window, read "
            "anew for each token). Default: all but absolute and middle.",
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class WhatOptions:
    """What is measured. Without a value: as much as a run of some minutes allows, or of one minute with --quick."""

    quick: Annotated[
        bool, typer.Option("--quick", help="About a minute: less of everything.", rich_help_panel=_WHAT)
    ] = False
    depths: Annotated[
        str | None,
        typer.Option(help="Where decoding is measured. Default: 0,2k,8k,32k,128k.", rich_help_panel=_WHAT),
    ] = None
    near: Annotated[
        str, typer.Option(help="Depth that the far one is compared with.", rich_help_panel=_WHAT, metavar="N")
    ] = "4k"
    far: Annotated[
        str,
        typer.Option(help="Far position, for methods without end; 0: none.", rich_help_panel=_WHAT, metavar="N"),
    ] = "1M"
    rounds: Annotated[
        int | None, typer.Option(help="Turns of each method. Default: 5.", rich_help_panel=_WHAT, metavar="N")
    ] = None
    decode: Annotated[
        int | None, typer.Option(help="Tokens of a turn. Default: 32.", rich_help_panel=_WHAT, metavar="N")
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(help='Lengths of prompts; none: "".  [default: 4k]', rich_help_panel=_WHAT),
    ] = None
    prompt_rounds: Annotated[
        int, typer.Option(help="Times that each prompt is read.", rich_help_panel=_WHAT, metavar="N")
    ] = 1
    latency_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens timed one by one; 0: none. Default: 300.", rich_help_panel=_WHAT, metavar="N"),
    ] = None

    def values(self) -> dict[str, Any]:
        """Arguments of `BenchSettings`.

        Raises:
            ConfigError: A number is none.
        """
        given = (self.depths, self.prompts, self.rounds, self.decode, self.latency_tokens)
        usual = ("0,8k", "1k", 3, 16, 64) if self.quick else ("0,2k,8k,32k,128k", "4k", 5, 32, 300)
        depths, prompts, rounds, decode, latency = (
            default if value is None else value for value, default in zip(given, usual, strict=True)
        )
        (far,) = numbers("--far", self.far)[:1]
        return {
            "depths": numbers("--depths", str(depths)),
            "near": numbers("--near", self.near)[0],
            "far": far or None,
            "rounds": rounds,
            "n_decode": decode,
            "n_read": 512 if self.quick else 2048,
            "prompts": numbers("--prompts", str(prompts)) if str(prompts).strip() else (),
            "prompt_rounds": self.prompt_rounds,
            "n_latency": latency,
        }


@with_exit_codes
@with_option_groups
def bench(
    *,
    peer: Annotated[
        str | None,
        typer.Option(help=f"Measure another program beside: {', '.join(PEERS)}.", rich_help_panel=_PEER),
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(
            help="Python that it is installed in, if not this one: the extra 'peers'.",
            rich_help_panel=_PEER,
            metavar="PATH",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Try numbers of threads, micro-batches and types of cache instead, and tell which are faster than the "
            "defaults.",
        ),
    ] = False,
    results: Output = None,
    as_json: AsJson = False,
    what: WhatOptions,
    methods: BenchMethodOptions,
) -> None:
    """Measures decoding speed by depth, prompts, single tokens and memory, method beside method.

    All methods have their turns in every round: ratios are those of one round. Numbers may be given as 2048, 2k or 1M.
    """
    if tune:
        _tune(peer, results, as_json, what, methods)
        return
    settings = _settings(peer, peer_python, what, methods)
    with result_log(results, as_json) as log:
        with Status("starting", console=messages) as status:
            run_bench(settings, log, lambda doing: status.update(escape(doing)))
        if not as_json:
            show_bench(log)


def _tune(
    peer: str | None, results: Path | None, as_json: bool, what: WhatOptions, methods: BenchMethodOptions
) -> None:
    for name, given in (
        ("--peer", peer),
        ("--output", results),
        ("--methods", methods.methods or None),
        ("--threads", methods.threads),
        ("--depths", what.depths),
        ("--latency-tokens", what.latency_tokens),
    ):
        if given is not None:
            raise ConfigError(f"{name} has no meaning with --tune: leave it away")
    path = find_model(methods.model)
    values = what.values()
    (n_prompt,) = (numbers("--prompts", what.prompts) if what.prompts is not None else (512,))[:1]
    settings = TuneSettings(
        model=str(path),
        config=LMInfConfig(
            n_sink=methods.n_sink,
            n_window=default_window(trained_length(vocabulary_of(path), path), methods.n_window),
            n_clamp=methods.n_clamp,
            n_block=methods.n_block,
        ),
        n_gpu_layers=methods.gpu_layers,
        n_threads=thread_numbers(default_n_threads()),
        rounds=TuneSettings.rounds if what.rounds is None and not what.quick else values["rounds"],
        n_decode=values["n_decode"],
        n_prompt=n_prompt,
    )
    with Status("starting", console=messages) as status:
        result = tune_here(settings, lambda doing: status.update(escape(doing)))
    if as_json:
        print(json.dumps(tuned_document(settings, result), indent=2, ensure_ascii=False))
    else:
        show_tuned(settings, result)


def _settings(
    peer: str | None, peer_python: str | None, what: WhatOptions, methods: BenchMethodOptions
) -> BenchSettings:
    path = find_model(methods.model)
    n_ctx_train = trained_length(vocabulary_of(path), path)
    wanted = names(methods.methods) or (*_METHODS_MEASURED, *(() if what.quick else (RECOMPUTE,)))
    plain = replace(methods, methods=",".join(name for name in wanted if name != RECOMPUTE))
    if what.quick and methods.n_window is None:
        plain = replace(plain, n_window=max(1, min(512, n_ctx_train // 8)))
    return BenchSettings(
        setup=plain.setup(path, n_ctx_train),
        recompute=RECOMPUTE in wanted,
        peer=peer,
        peer_python=peer_python,
        **what.values(),
    )
