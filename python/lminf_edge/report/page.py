"""One self-contained HTML page with everything that results files hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from lminf_edge.report.figures import Picture, pictures_of
from lminf_edge.report.runs import Run
from lminf_edge.report.tables import Table, tables_of
from lminf_edge.report.words import plain_text, setting_words
from lminf_edge.system import human_bytes

_TASKS = {
    "ppl": "Loss by position",
    "passkey": "Passkeys",
    "qa": "Answers to questions",
    "bench": "Speed, memory and latency",
}


@dataclass(frozen=True, kw_only=True)
class _Figure:
    title: str
    description: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class _Section:
    """What the template shows of a run."""

    anchor: str
    title: str
    run: Run
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    tables: list[Table]
    figures: list[_Figure]


def page_of(runs: Sequence[Run]) -> str:
    """The page. It needs nothing from anywhere else, and no scripts.

    Args:
        runs: What is on it, in this order.
    """
    template = files("lminf_edge.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections = [_section(run, f"run-{number}") for number, run in enumerate(runs, 1)]
    return environment.from_string(template).render(sections=sections)


def _section(run: Run, anchor: str) -> _Section:
    return _Section(
        anchor=anchor,
        title=f"{_TASKS[run.task]}: {plain_text(run.about['model']['name'])}",
        run=run,
        facts=_facts(run),
        settings=[(name, setting_words(value)) for name, value in _flat(run.about["settings"]) if name != "model"],
        tables=tables_of(run),
        figures=[
            _Figure(title=picture.title, description=picture.description, svg=_inline(picture, f"{anchor}-"))
            for picture in pictures_of(run, ("svg",))
        ],
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    model, program, machine = run.about["model"], run.about["program"], run.about["machine"]
    memory = machine["memory_bytes"]
    return [
        ("Results file", run.name),
        ("Begun", plain_text(run.about["started"])),
        ("Model", f"{plain_text(model['name'])}, {human_bytes(model['n_bytes'])}"),
        ("SHA-256 of the model", model["sha256"]),
        ("Program", f"lminf-edge {plain_text(program['lminf_edge'])}, llama.cpp {plain_text(program['llama_cpp'])}"),
        ("Patch", plain_text(program["patch_id"])),
        ("Processor", f"{plain_text(machine['cpu'])}, {machine['n_cores']} cores"),
        ("Memory", "not known" if memory is None else human_bytes(memory)),
        ("System", f"{plain_text(machine['system'])}, Python {plain_text(machine['python'])}"),
        ("Devices", ", ".join(plain_text(device) for device in machine["devices"])),
    ]


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _flat(value) if isinstance(value, dict) else [(plain_text(name), value)]
    return pairs


def _inline(picture: Picture, prefix: str) -> Markup:
    """A figure as an element of the page: its names are its own, and it says what is to be seen."""
    text = picture.files["svg"].decode()
    text = text[text.index("<svg") :]
    prefix += f"{picture.name}-"
    text = re.sub(r' id="([^"]+)"', rf' id="{prefix}\1"', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}', text)
    text = re.sub(r"<style[^>]*>\*", f"<style>#{prefix}figure_1 *", text, count=1)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.description)}" ', 1))
