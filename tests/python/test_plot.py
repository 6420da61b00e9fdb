"""`lminf-edge plot`: figures that need no explanation, look the same anywhere and show what was measured."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from typer.testing import CliRunner

import sample_results as sample
from command_line import run as run_command
from lminf_edge.cli.app import app
from lminf_edge.evaluation.methods import METHODS
from lminf_edge.evaluation.results import read_results
from lminf_edge.report.answer_figures import passkey_map
from lminf_edge.report.bench_figures import decode_speed
from lminf_edge.report.buckets import combined
from lminf_edge.report.drawing import Drawing
from lminf_edge.report.figures import _FIGURES
from lminf_edge.report.loss_figures import loss_by_position
from lminf_edge.report.runs import Run, load_runs
from lminf_edge.report.style import colour, marker, own_style
from lminf_edge.report.words import method_words

FIGURES = {
    "ppl": {"loss", "loss-cache-difference", "loss-method-difference"},
    "passkey": {"passkey-map", "passkey-accuracy"},
    "qa": {"qa-f1"},
    "bench": {"decode-speed", "kv-memory", "latency", "prompt-speed", "first-token"},
}
RECORDS: dict[str, Callable[[], list[sample.Record]]] = {
    "ppl": sample.ppl,
    "passkey": sample.passkey,
    "qa": sample.qa,
    "bench": sample.bench,
}
SVG = "{http://www.w3.org/2000/svg}"


class Finished(NamedTuple):
    """What a command did."""

    exit_code: int
    output: str


def plot(*arguments: str | Path, command: str = "plot") -> Finished:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    return Finished(result.exit_code, result.output)


def a_run(tmp_path: Path, records: list[sample.Record]) -> Run:
    (run,) = load_runs([sample.written(tmp_path / "results.jsonl", records)])
    return run


def drawn(figure: Callable[[Run], Drawing | None], run: Run) -> Drawing:
    with own_style():
        drawing = figure(run)
    assert drawing is not None
    return drawing


def texts_of(svg: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.parse(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("task", RECORDS)
def test_every_kind_of_result_becomes_its_figures(task: str, tmp_path: Path) -> None:
    path = sample.written(tmp_path / f"{task}.jsonl", RECORDS[task]())
    assert read_results(path)[0]["task"] == task  # what is drawn is what the commands may write
    result = plot(path, "--output-dir", tmp_path / "new" / "figures")
    assert result.exit_code == 0, result.output
    names = {f"{task}-{name}.{kind}" for name in FIGURES[task] for kind in ("svg", "png")}
    assert {file.name for file in (tmp_path / "new" / "figures").iterdir()} == names
    assert {Path(line).name for line in result.output.split()} == names
    for name in FIGURES[task]:
        texts = texts_of(tmp_path / "new" / "figures" / f"{task}-{name}.svg")
        assert any("LM-Infinite" in text for text in texts)  # words, not outlines of letters
        assert any("model.gguf" in text and "window 1,024" in text for text in texts)
        assert (tmp_path / "new" / "figures" / f"{task}-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    path = sample.written(tmp_path / "b.jsonl", sample.bench(("endless", "full"), ("f16", "q8_0")))
    sample.written(tmp_path / "p.jsonl", sample.passkey(("endless",)))
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: path\nbackend: TkAgg\n")
    files = [path, tmp_path / "p.jsonl"]
    with matplotlib.rc_context({"axes.facecolor": "red", "savefig.dpi": 30}):
        assert plot(*files, "--output-dir", tmp_path / "here").exit_code == 0
        assert matplotlib.rcParams["savefig.dpi"] == 30  # and nothing is left changed
    arguments = ["plot", *map(str, files), "--output-dir", str(tmp_path / "there")]
    matplotlibrc = str(tmp_path / "matplotlibrc")
    finished = run_command(*arguments, MATPLOTLIBRC=matplotlibrc, PYTHONHASHSEED="7", SOURCE_DATE_EPOCH="0")
    assert finished.returncode == 0, finished.stderr
    here, there = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there
    assert len(here) == 14


def test_json_lists_the_files_and_existing_ones_are_replaced(tmp_path: Path) -> None:
    path = sample.written(tmp_path / "qa.jsonl", sample.qa())
    old = tmp_path / "qa-qa-f1.svg"
    old.write_text("old")
    result = plot(path, "--output-dir", tmp_path, "--format", "svg", "--json")
    assert json.loads(result.output) == {"files": [str(old)]}
    assert old.read_bytes().startswith(b"<?xml")


def test_files_of_the_same_name_get_figures_of_their_own(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        sample.written(tmp_path / folder / "r.jsonl", sample.qa(("endless",)))
    both = [tmp_path / folder / "r.jsonl" for folder in ("one", "two")]
    plot(*both, "--output-dir", tmp_path / "out", "--format", "svg")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"r-qa-f1.svg", "r-2-qa-f1.svg"}


@pytest.mark.parametrize("task", RECORDS)
def test_no_text_is_cut_off_or_covered(task: str, tmp_path: Path) -> None:
    run = a_run(tmp_path, RECORDS[task]())
    run.about["model"]["name"] = "A-rather-long-name-of-a-model-with-135M-parameters-Instruct.Q4_1.gguf"
    for figure in _FIGURES:
        with own_style():
            drawing = figure(run)
            if drawing is None:
                continue
            drawing.figure.draw_without_rendering()
            boxes = text_boxes(drawing)
        page = drawing.figure.bbox
        for words, box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, (words, box)
        for index, (words, box) in enumerate(boxes):
            for others, other in boxes[index + 1 :]:
                assert not covers(box, other), f"{drawing.name}: {words!r} and {others!r}"


def text_boxes(drawing: Drawing) -> list[tuple[str, Bbox]]:
    """Where each visible text stands."""
    return [
        (text.get_text(), text.get_window_extent())
        for text in drawing.figure.findobj(Text)
        if isinstance(text, Text) and text.get_text().strip() and _is_shown(drawing, text)
    ]


def _is_shown(drawing: Drawing, text: Text) -> bool:
    for axes in drawing.figure.axes:
        axis: Axis
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if text in (tick.label1, tick.label2):
                    return axes.get_visible() and text.get_visible() and low <= tick.get_loc() <= high
    return bool(text.get_visible())


def covers(box: Bbox, other: Bbox) -> bool:
    overlap = Bbox.intersection(box, other)
    return overlap is not None and overlap.width > 1 and overlap.height > 1


def test_methods_can_be_told_apart_without_colour_and_in_words() -> None:
    methods = [*METHODS, "fresh", "recompute", "attention-sinks", "truncate"]
    assert len({colour(method) for method in methods}) == len({marker(method) for method in methods}) == len(methods)
    assert all(method_words(method) != method for method in methods if method != "attention-sinks")
    shades = sorted(float(np.dot(to_rgb(colour(method)), (0.2126, 0.7152, 0.0722))) for method in methods)
    assert all(high - low > 0.001 for low, high in pairwise(shades))


def test_lines_go_through_what_was_measured(tmp_path: Path) -> None:
    run = a_run(tmp_path, sample.ppl(("endless", "full"), ("f16",)))
    drawing = drawn(loss_by_position, run)
    measured = [r["loss"]["mean"] for r in run.of_kind("ppl.bucket") if r["method"] == "full"]
    lines = [line for line in drawing.figure.axes[0].lines if line.get_color() == colour("full")]
    assert [list(line.get_ydata()) for line in lines] == [measured]  # type: ignore[arg-type]
    assert list(lines[0].get_xdata()) == [1024 + 2048 * i for i in range(12)]  # type: ignore[arg-type]


def test_the_trained_length_is_marked_where_the_run_says_it(tmp_path: Path) -> None:
    records = sample.ppl(("endless",), ("f16",))

    def labels() -> list[str]:
        (legend,) = drawn(loss_by_position, a_run(tmp_path, records)).figure.legends
        return [text.get_text() for text in legend.get_texts()]

    assert "trained length, 8,192" in labels()
    del records[0]["model"]["n_ctx_train"]
    assert not any("trained" in label for label in labels())


def test_methods_that_fail_do_not_flatten_those_that_do_not(tmp_path: Path) -> None:
    whole, enlarged = (
        axes
        for axes in drawn(loss_by_position, a_run(tmp_path, sample.ppl())).figure.axes
        if axes.get_ylabel()[:4] == "loss"
    )
    assert whole.get_ylim()[1] > 6.5
    assert enlarged.get_ylim()[1] < 4
    calm = drawn(loss_by_position, a_run(tmp_path, sample.ppl(("endless", "shift"))))
    assert sum(axes.get_ylabel()[:4] == "loss" for axes in calm.figure.axes) == 1


def test_many_buckets_are_averaged_by_their_tokens() -> None:
    records = [
        {
            "method": "endless",
            "cache_type": "f16",
            "begin": begin,
            "end": end,
            "loss": {"mean": mean, "low": mean - half, "high": mean + half},
        }
        for begin, end, mean, half in (
            (0, 100, 1.0, 0.3),
            (100, 200, 2.0, 0.4),
            (200, 300, 3.0, 0.3),
            (300, 350, 6.0, 0.6),
        )
    ]
    assert combined(records, "loss", 4) == (records, None)
    (first, second), n_each = combined(records, "loss", 2)
    assert n_each == 200
    assert (first["begin"], first["end"], second["begin"], second["end"]) == (0, 200, 200, 350)
    assert first["loss"] == pytest.approx({"mean": 1.5, "low": 1.25, "high": 1.75})  # half of (3, 4, 5) tenths
    assert second["loss"]["mean"] == pytest.approx(4.0)
    assert second["loss"]["high"] == pytest.approx(4.0 + np.hypot(0.3 * 2 / 3, 0.6 / 3))
    records[3]["loss"] = {"mean": 6.0, "low": None, "high": None}
    assert combined(records, "loss", 2)[0][1]["loss"] == {"mean": pytest.approx(4.0), "low": None, "high": None}


def test_the_heat_map_shows_where_the_window_begins(tmp_path: Path) -> None:
    drawing = drawn(passkey_map, a_run(tmp_path, sample.passkey(("endless", "full"))))
    endless, full = drawing.figure.axes
    heights = list(endless.lines[1].get_ydata())[::2]  # type: ignore[arg-type]
    # Of 10 depths in 5 rows, 5 are outside at 2k (distance 1,024 and more), 9 at 8k, all at 32k, and none at 512.
    assert heights == pytest.approx([0.04, 2.5, 4.5, 4.96])
    assert not full.lines
    assert [text.get_text() for text in full.texts][3::4][:1] != ["-"]
    assert len(endless.texts) == 20


def test_keys_at_distances_are_no_part_of_the_heat_map(tmp_path: Path) -> None:
    path = sample.written(tmp_path / "p.jsonl", sample.passkey_at_distances())
    result = plot(path, "--output-dir", tmp_path, "--format", "svg")
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.glob("*.svg")} == {"p-passkey-accuracy.svg"}


def test_depth_zero_has_its_place_on_the_axis(tmp_path: Path) -> None:
    axes = drawn(decode_speed, a_run(tmp_path, sample.bench())).figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4k", "16k", "32k", "128k", "1M"]
    ticks = list(axes.get_xticks())
    assert ticks == sorted(ticks)
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("half", [None, 0.0])
def test_results_of_a_single_point_can_be_drawn(half: float | None, tmp_path: Path) -> None:
    way = {"method": "endless", "cache_type": "f16"}
    lonely: dict[str, sample.Record] = {
        "ppl": {
            "kind": "ppl.bucket", **way, "begin": 0, "end": 5, "n_tokens": 5, "loss": sample.estimate(3.0, half),
            "perplexity": 20.1, "tokens_per_second": None, "kv_bytes": 0, "resident_bytes": 0,
        },
        "bench": {
            "kind": "bench.decode", **way, "depth": 0, "tokens_per_second": sample.spread(10.0, 0.0), "kv_bytes": 0,
            "resident_bytes": 0,
        },
        "qa": {
            "kind": "qa.cell", **way, "length": None, "length_low": 100, "length_high": None, "in_window": None,
            "n_questions": 1, "f1": sample.estimate(0.0, half), "exact": sample.estimate(0.0, half),
        },
    }  # fmt: skip
    paths = [sample.written(tmp_path / f"{task}.jsonl", [sample.run(task), each]) for task, each in lonely.items()]
    result = plot(*paths, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "ppl-loss.png", "bench-decode-speed.png", "bench-kv-memory.png", "qa-qa-f1.png"
    }  # fmt: skip


def test_names_from_a_file_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = '<script>alert("$x_{")</script>--> ]]> \x1b[31m\n模型 $\\frac{$'
    records = sample.bench(("endless", "_own$method^<b>"), ("f16", "_<q>&"))
    records[0]["model"]["name"] = records[0]["machine"]["cpu"] = hostile
    result = plot(sample.written(tmp_path / "r.jsonl", records), "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    svgs = list(tmp_path.glob("*.svg"))
    assert len(svgs) == 5
    for svg in svgs:
        elements = {element.tag for element in ElementTree.parse(svg).iter()}
        assert not {tag for tag in elements if "script" in tag}
        assert any("own$method^<b>" in text for text in texts_of(svg))


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, option in (("plot", "--output-dir"), ("report", "--output")):
        path = str(sample.written(tmp_path / "r.jsonl", sample.qa()))
        result = plot(path, option, tmp_path / "out", command=command)
        assert result.exit_code == 2
        assert "pip install 'lminf-edge[report]'" in result.output
        assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_can_be_drawn(tmp_path: Path) -> None:
    path = sample.written(tmp_path / "r.jsonl", sample.ppl(("endless",), ("f16",)))
    path.write_text(path.read_text() + '{"kind": "ppl.buck')
    result = plot(path, "--output-dir", tmp_path, "--format", "svg")
    assert result.exit_code == 0
    assert "r: the last line was not written to its end and is left out" in result.output
    assert (tmp_path / "r-loss.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.jsonl"], 1, "cannot read the results missing.jsonl"),
        (["text.txt"], 1, "text.txt, line 1: no JSON"),
        (["other.jsonl"], 1, "its first line is not the record of a run"),
        (["damaged.jsonl"], 1, "damaged.jsonl, line 2, loss: 3 is not of type 'object'"),
        (["empty.jsonl"], 1, "there is nothing to draw yet"),
        (["good.jsonl", "--format", "bmp"], 2, "format = 'bmp': must be one of 'svg', 'png', 'pdf'"),
        (["good.jsonl", "--format", ","], 2, "format: at least one is needed"),
        (["good.jsonl", "--output-dir", "text.txt"], 1, "cannot make the folder text.txt"),
        (["good.jsonl", "--format", "svg", "--output-dir", "taken"], 1, "good-qa-f1.svg: it is a folder"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_is_wrong_is_said_in_words(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no results\nat all\n")
    Path("other.jsonl").write_text('{"kind": "qa.cell"}\n')
    records = sample.ppl(("endless",), ("f16",))
    sample.written(Path("damaged.jsonl"), [records[0], {**records[1], "loss": 3}, records[2]])
    sample.written(Path("empty.jsonl"), [sample.run("qa")])
    sample.written(Path("good.jsonl"), sample.qa(("endless",)))
    Path("taken/good-qa-f1.svg").mkdir(parents=True)
    result = plot(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.png"))
