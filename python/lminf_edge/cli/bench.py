"""`lminf-edge bench`: speed, latency and memory of the methods, measured in turns on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status

from lminf_edge.cli._bench_tables import show_bench
from lminf_edge.cli._evaluation import MethodOptions, Output, names, numbers, result_log
from lminf_edge.cli._options import AsJson, with_option_groups
from lminf_edge.cli._terminal import find_model, messages, with_exit_codes
from lminf_edge.evaluation.bench import BenchSettings, run_bench
from lminf_edge.evaluation.bench.plan import PEERS, RECOMPUTE
from lminf_edge.evaluation.methods import METHODS
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of

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
    results: Output = None,
    as_json: AsJson = False,
    what: WhatOptions,
    methods: BenchMethodOptions,
) -> None:
    """Measures decoding speed by depth, prompts, single tokens and memory, method beside method.

    All methods have their turns in every round: ratios are those of one round. Numbers may be given as 2048, 2k or 1M.
    """
    settings = _settings(peer, peer_python, what, methods)
    with result_log(results, as_json) as log:
        with Status("starting", console=messages) as status:
            run_bench(settings, log, lambda doing: status.update(escape(doing)))
        if not as_json:
            show_bench(log)


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
