"""All figures that there are records for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lminf_edge.report.answer_figures import passkey_accuracy, passkey_map, qa_f1
from lminf_edge.report.bench_figures import decode_speed, first_token, kv_memory, latency, prompt_speed
from lminf_edge.report.drawing import Drawing
from lminf_edge.report.loss_figures import cache_differences, loss_by_position, method_differences
from lminf_edge.report.runs import Run
from lminf_edge.report.style import as_bytes, own_style

_FIGURES: tuple[Callable[[Run], Drawing | None], ...] = (
    loss_by_position,
    cache_differences,
    method_differences,
    decode_speed,
    kv_memory,
    latency,
    prompt_speed,
    first_token,
    passkey_map,
    passkey_accuracy,
    qa_f1,
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as files.

    Attributes:
        name: For files, such as "loss".
        title: In words.
        description: What is to be seen, for those who cannot see it.
        files: Their content by kind, such as "svg".
    """

    name: str
    title: str
    description: str
    files: dict[str, bytes]


def pictures_of(run: Run, kinds: tuple[str, ...]) -> Iterator[Picture]:
    """The figures of a run, the same bytes each time.

    Args:
        run: The run.
        kinds: Kinds of files, of "svg", "png" and "pdf".
    """
    for draw in _FIGURES:
        picture = _picture(draw, run, kinds)
        if picture is not None:
            yield picture


def _picture(draw: Callable[[Run], Drawing | None], run: Run, kinds: tuple[str, ...]) -> Picture | None:
    with own_style():
        drawing = draw(run)
        if drawing is None:
            return None
        return Picture(
            name=drawing.name,
            title=drawing.title,
            description=drawing.description,
            files={kind: as_bytes(drawing.figure, kind) for kind in kinds},
        )
