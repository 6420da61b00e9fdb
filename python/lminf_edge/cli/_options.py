"""Options that subcommands have in common, each declared once.

A subcommand takes them in groups: see `with_option_groups`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from lminf_edge._params import N_UBATCH, cache_type_pair
from lminf_edge.cli._terminal import find_model, loading_bar
from lminf_edge.completion_types import TextParams
from lminf_edge.config import LMInfConfig
from lminf_edge.llama import Llama
from lminf_edge.sampling import SamplingOptions

_MODEL, _WINDOW, _SAMPLING = "Model", "Window", "Sampling"

AsJson = Annotated[bool, typer.Option("--json", help="Report as JSON on standard output.")]

ModelFile = Annotated[
    str | None,
    typer.Option(
        help="GGUF file, or owner/repository/file.gguf on Hugging Face. Default: SmolLM2-135M-Instruct.",
        rich_help_panel=_MODEL,
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads. Default: the physical cores that others leave.", rich_help_panel=_MODEL),
]

GpuLayers = Annotated[int, typer.Option(min=-1, help="Layers to keep on a GPU; -1 is all.", rich_help_panel=_MODEL)]

Window = Annotated[
    int | None,
    typer.Option(
        help="Local window in tokens. Default: by the model's trained length.", rich_help_panel=_WINDOW, metavar="N"
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: ModelFile = None
    cache_type: Annotated[
        str,
        typer.Option(
            help="Type of cached keys and values: f16, q8_0, q4_0 ..., or of both: q8_0/q4_0.", rich_help_panel=_MODEL
        ),
    ] = "f16"
    n_ubatch: Annotated[
        int, typer.Option(min=1, help="Tokens of a micro-batch.", rich_help_panel=_MODEL, metavar="N")
    ] = N_UBATCH
    threads: Threads = None
    gpu_layers: GpuLayers = 0

    def llama_options(self) -> dict[str, Any]:
        """The keyword arguments of `Llama` that these options stand for.

        Raises:
            ConfigError: There are more than two types.
        """
        cache_type_k, cache_type_v = cache_type_pair(self.cache_type)
        return {
            "n_batch": self.n_ubatch,  # so that progress is seen after each micro-batch
            "n_ubatch": self.n_ubatch,
            "n_threads": self.threads,
            "n_gpu_layers": self.gpu_layers,
            "cache_type_k": cache_type_k,
            "cache_type_v": cache_type_v,
        }

    def open(self, config: LMInfConfig, seed: int | None) -> Llama:
        """The model, with bars while it is fetched and loaded.

        Raises:
            LMInfError: As `Llama` and `resolve_model`.
        """
        path = find_model(self.model)
        with loading_bar(path.name) as progress:
            return Llama(path, lminf=config, seed=seed, progress=progress, **self.llama_options())


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How far the model looks."""

    n_sink: Annotated[
        int,
        typer.Option(help="Sink tokens: first tokens that are never evicted.", rich_help_panel=_WINDOW, metavar="N"),
    ] = LMInfConfig.n_sink
    n_window: Window = None
    n_clamp: Annotated[
        int | None,
        typer.Option(help="Largest RoPE distance. Default: the window.", rich_help_panel=_WINDOW, metavar="N"),
    ] = None
    n_block: Annotated[
        int | None,
        typer.Option(
            help="Positions between placements of the sink tokens. Default: 64.", rich_help_panel=_WINDOW, metavar="N"
        ),
    ] = None

    def config(self, **others: Any) -> LMInfConfig:
        """The configuration, with other parameters than those that can be chosen here.

        Raises:
            ConfigError: A value is out of range.
        """
        return LMInfConfig(**asdict(self), **others)


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """How a text is written, and when it ends."""

    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", rich_help_panel=_SAMPLING)] = (
        SamplingOptions.temperature
    )
    top_k: Annotated[
        int, typer.Option(help="Draw from the K most probable tokens; 0 is all.", rich_help_panel=_SAMPLING)
    ] = SamplingOptions.top_k
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the tokens that together have this probability.", rich_help_panel=_SAMPLING),
    ] = SamplingOptions.top_p
    min_p: Annotated[
        float, typer.Option(help="Least probability, relative to the most probable token.", rich_help_panel=_SAMPLING)
    ] = SamplingOptions.min_p
    repeat_penalty: Annotated[
        float, typer.Option(help="Makes recent tokens less probable; 1 is off.", rich_help_panel=_SAMPLING)
    ] = SamplingOptions.repeat_penalty
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, by occurrence; 0 is off.", rich_help_panel=_SAMPLING)
    ] = SamplingOptions.frequency_penalty
    presence_penalty: Annotated[float, typer.Option(help="The same, once; 0 is off.", rich_help_panel=_SAMPLING)] = (
        SamplingOptions.presence_penalty
    )
    seed: Annotated[
        int | None, typer.Option(help="Makes the text repeatable. Default: a random one.", rich_help_panel=_SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends the text. Can be given more than once.", rich_help_panel=_SAMPLING),
    ] = None
    stop_on_loop: Annotated[
        bool, typer.Option("--stop-on-loop", help="End a text that repeats itself.", rich_help_panel=_SAMPLING)
    ] = False

    speculate: Annotated[
        str | None,
        typer.Option(
            help="Decode ahead what came next where the text stood so before; the text stays the same.",
            rich_help_panel=_SAMPLING,
            metavar="lookup",
        ),
    ] = None

    def params(self) -> TextParams:
        """The options of a completion. Whether the values are in range is checked there."""
        params: TextParams = asdict(self)  # type: ignore[assignment]  # the fields have its keys and types
        return params


_R = TypeVar("_R")


def with_option_groups(command: Callable[..., _R]) -> Callable[..., _R]:
    """Lets a subcommand have groups of options.

    Args:
        command: A function whose parameters are options as typer takes them, or dataclasses whose fields are: one of
            these stands for an option for each of its fields.

    Returns:
        A function that has the options themselves as parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _fields_as_parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def wrapped(**values: Any) -> _R:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _fields_as_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
