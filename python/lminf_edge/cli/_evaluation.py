"""Options and output that `eval` and `bench` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lminf_edge._params import N_UBATCH
from lminf_edge.cli._options import GpuLayers, ModelFile, Threads, Window
from lminf_edge.cli._terminal import find_model
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.answering import AnsweringSettings
from lminf_edge.evaluation.methods import METHODS, WITHOUT_STORE, MethodSetup
from lminf_edge.evaluation.results import ResultLog
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of
from lminf_edge.middle import MiddleConfig

_MODEL, _METHODS, _OUTPUT = "Model", "Methods", "Output"

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="File for the results, as JSON lines. A run that was stopped goes on where it was when it is started "
        "again with the same file.",
        rich_help_panel=_OUTPUT,
        metavar="FILE",
    ),
]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which model is read with which methods."""

    model: ModelFile = None
    threads: Threads = None
    gpu_layers: GpuLayers = 0
    n_ubatch: Annotated[
        int, typer.Option(min=1, help="Tokens of a micro-batch.", rich_help_panel=_MODEL, metavar="N")
    ] = N_UBATCH
    methods: Annotated[
        str, typer.Option(help=f"What is compared: some of {', '.join(METHODS)}.", rich_help_panel=_METHODS)
    ] = ",".join(WITHOUT_STORE)
    cache_types: Annotated[
        str, typer.Option(help="Types of cached keys and values, such as f16,q8_0,q4_0.", rich_help_panel=_METHODS)
    ] = "f16"
    n_sink: Annotated[
        int, typer.Option(help="Sink tokens; the context shift keeps as many.", rich_help_panel=_METHODS, metavar="N")
    ] = LMInfConfig.n_sink
    n_window: Window = None
    n_clamp: Annotated[
        int | None,
        typer.Option(help="Largest RoPE distance. Default: the window.", rich_help_panel=_METHODS, metavar="N"),
    ] = None
    n_block: Annotated[
        int | None,
        typer.Option(
            help="Positions between placements of sink tokens. Default: 64.", rich_help_panel=_METHODS, metavar="N"
        ),
    ] = None
    n_shift: Annotated[
        int | None,
        typer.Option(help="Context of the context shift. Default: the window.", rich_help_panel=_METHODS, metavar="N"),
    ] = None
    recall_k: Annotated[
        int, typer.Option(help="Middle tokens that a query recalls.", rich_help_panel=_METHODS, metavar="N")
    ] = MiddleConfig.k
    recall_per: Annotated[
        str, typer.Option(help="So many for each kv_head, or for each query head.", rich_help_panel=_METHODS)
    ] = MiddleConfig.per
    store_type: Annotated[
        str, typer.Option(help="Type of stored middle tokens: f32, f16, q8_0, q4_0.", rich_help_panel=_METHODS)
    ] = MiddleConfig.cache_type
    store_tokens: Annotated[
        int, typer.Option(help="Newest tokens that are stored.", rich_help_panel=_METHODS, metavar="N")
    ] = MiddleConfig.max_tokens
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Stored keys that a first pass chooses to be scored exactly. Default: all.",
            rich_help_panel=_METHODS,
            metavar="N",
        ),
    ] = None
    store_path: Annotated[
        str | None, typer.Option(help="File for the store. Default: in memory.", rich_help_panel=_METHODS)
    ] = None

    def setup(self, path: Path, n_ctx_train: int) -> MethodSetup:
        """What is compared.

        Args:
            path: The model's file.
            n_ctx_train: Length that the model was trained on: the window is an eighth of it, at most 1024, by default.

        Raises:
            ConfigError: A value is out of range.
        """
        return MethodSetup(
            model=str(path.resolve()),
            methods=names(self.methods),
            cache_types=names(self.cache_types),
            n_sink=self.n_sink,
            n_window=default_window(n_ctx_train, self.n_window),
            n_clamp=self.n_clamp,
            n_block=self.n_block,
            n_shift=self.n_shift,
            n_threads=self.threads,
            n_gpu_layers=self.gpu_layers,
            n_ubatch=self.n_ubatch,
            middle=MiddleConfig(
                k=self.recall_k,
                per=self.recall_per,  # type: ignore[arg-type]  # checked there
                cache_type=self.store_type,
                max_tokens=self.store_tokens,
                n_candidates=self.candidates,
                path=self.store_path,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class AnsweringOptions(MethodOptions):
    """The same for methods that answer, middle tokens among them, and how they do that."""

    methods: Annotated[
        str, typer.Option(help=f"What is compared: some of {', '.join(METHODS)}.", rich_help_panel=_METHODS)
    ] = ",".join(METHODS)
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = AnsweringSettings.seed
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = AnsweringSettings.max_tokens
    full_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out longer prompts for full attention. Default: twice the trained length."),
    ] = None
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Add a control: full attention that gets the last window of each prompt only."),
    ] = AnsweringSettings.truncate

    def settings(self) -> dict[str, Any]:
        """The arguments of `AnsweringSettings` that these options stand for.

        Raises:
            LMInfError: The model cannot be found, or a value is out of range.
        """
        path = find_model(self.model)
        n_ctx_train = trained_length(vocabulary_of(path), path)
        return {
            "setup": self.setup(path, n_ctx_train),
            "full_tokens": 2 * n_ctx_train if self.full_tokens is None else self.full_tokens,
            "truncate": self.truncate,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }


def default_window(n_ctx_train: int, given: int | None) -> int:
    """The window that was given, or one for a model that was trained on a length."""
    return max(1, min(1024, n_ctx_train // 8)) if given is None else given


def absolute(path: str | None) -> str | None:
    """A path that is the same from every folder."""
    return None if path is None else str(Path(path).resolve())


def names(text: str) -> tuple[str, ...]:
    """The names in "one,two"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers in "2048,4k,1M": k is 1024, M is 1024 times that.

    Raises:
        ConfigError: One is none.
    """
    units = {"k": 1024, "m": 1024**2}
    values = []
    for part in names(text):
        digits, unit = (part[:-1], units[part[-1].lower()]) if part[-1].lower() in units else (part, 1)
        if not digits.isdecimal():
            raise ConfigError(f"{option} {text}: {part!r} is no number such as 2048 or 4k")
        values.append(int(digits) * unit)
    if not values:
        raise ConfigError(f"{option}: at least one number is needed")
    return tuple(values)


@contextmanager
def result_log(output: Path | None, as_json: bool) -> Iterator[ResultLog]:
    """Where results go: to the file, and as JSON lines to standard output if that is wanted.

    Raises:
        LMInfError: The file cannot be written, or holds something else.
    """
    with ResultLog(output, echo=(lambda line: print(line, flush=True)) if as_json else None) as log:
        yield log
