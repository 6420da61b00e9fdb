"""`lminf-edge report`: one page that needs nothing else, says how to measure again, and takes nothing for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sample_results as sample
from lminf_edge.report.runs import load_runs
from lminf_edge.report.tables import Table, tables_of
from test_plot import FIGURES, RECORDS, plot

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What is in a page.

    Attributes:
        elements: Name and attributes of each element, in order.
        texts: Texts by the name of the element that they stand in.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open  # every element ends where it should

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.setdefault(self._open[-1], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(tmp_path: Path, *records: list[sample.Record]) -> str:
    """The page of some runs."""
    paths = [sample.written(tmp_path / f"results-{i}.jsonl", each) for i, each in enumerate(records)]
    result = plot(*paths, "--output", tmp_path / "page.html", command="report")
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith("page.html")
    return (tmp_path / "page.html").read_text("utf-8")


def table(records: list[sample.Record], tmp_path: Path, caption: str) -> Table:
    (run,) = load_runs([sample.written(tmp_path / "results.jsonl", records)])
    (found,) = (table for table in tables_of(run) if table.caption.startswith(caption))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of one run of each task."""
    few = (("endless", "full"), ("f16", "q8_0"))
    runs = (sample.ppl(*few), sample.passkey(few[0]), sample.qa(few[0]), sample.bench(*few))
    return report(tmp_path_factory.mktemp("report"), *runs)


def test_the_page_says_everything_that_is_needed_to_measure_again(whole: str) -> None:
    page = Page(whole)
    assert page.texts["code"] == [sample.run(task)["command"] for task in ("ppl", "passkey", "qa", "bench")]
    about = page.texts["dd"]
    for fact in ("ab" * 32, "0123456789abcdef", "Example CPU 3000 @ 2.00GHz, 2 cores", "24.0 GB", "1,024", "endless, "):
        assert sum(fact in text for text in about) >= 4, fact
    titles = page.texts["h2"]
    assert titles[0] == "Loss by position: model.gguf"
    assert [link["href"] for link in page.of("a")] == [f"#run-{number}" for number in (1, 2, 3, 4)]


def test_the_page_needs_no_network_and_no_scripts(whole: str) -> None:
    page = Page(whole)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src", "action"):
                assert value is not None and value.startswith("#"), (tag, name, value)
            assert "http" not in (value or "") or name.startswith("xmlns"), (tag, name, value)
    assert "@import" not in whole and not re.search(r"url\((?!#)", whole)
    assert not re.search(r"https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", whole))


def test_every_figure_is_there_with_words_for_those_who_cannot_see_it(whole: str) -> None:
    page = Page(whole)
    n_figures = sum(map(len, FIGURES.values()))
    assert len(page.of("figure")) == len(page.of("figcaption")) == len(page.of("svg")) == n_figures
    for svg in page.of("svg"):
        assert svg["role"] == "img"
        assert "full attention" in (svg["aria-label"] or "")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    names = {f"#{name}" for name in ids}
    for _, attributes in page.elements:
        for value in (attributes.get("xlink:href"), *re.findall(r"url\((#[^)]+)\)", str(attributes))):
            assert value is None or value in names


def test_tables_have_captions_and_headings(whole: str) -> None:
    page = Page(whole)
    tables = len(page.of("table"))
    assert tables >= 12
    assert len(page.of("caption")) == tables
    assert all(heading["scope"] in ("col", "row") for heading in page.of("th"))
    assert len(page.of("h1")) == 1 and len(page.of("main")) == 1 and page.of("html") == [{"lang": "en"}]


def test_the_page_is_for_light_dark_and_paper(whole: str) -> None:
    assert "prefers-color-scheme: dark" in whole and "@media print" in whole
    figure = re.search(r"figure > div \{ background: #ffffff;", whole)
    assert figure is not None  # dark lines stay legible on a dark page


@pytest.mark.parametrize("task", RECORDS)
def test_the_same_results_give_the_same_page(task: str, tmp_path: Path) -> None:
    assert report(tmp_path, RECORDS[task]()) == report(tmp_path, RECORDS[task]())


def test_names_from_a_file_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script><img src=http://x onerror=alert(1)>{{ 7 * 7 }}&amp;'
    records = sample.bench(("endless", hostile), ("f16", hostile))
    for part in ("model", "program", "machine"):
        for name, value in records[0][part].items():
            if isinstance(value, str) and name != "sha256":
                records[0][part][name] = hostile
    records[0]["machine"]["devices"] = [hostile]
    records[0]["settings"] |= {hostile: hostile, "nested": {"list": [hostile, None, True]}}
    records[0] |= {"command": hostile, "started": hostile}
    records[-2]["cache_type"] = "f16"
    for record in records:
        if record["kind"] == "bench.latency":
            record["stalls"] = [{"name": hostile, "count": 1, "median": 0.1, "max": 0.2}]
    html = report(tmp_path, records, sample.qa(("endless",)))
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert hostile in page.texts["code"]
    assert "49" not in page.texts["h2"][0]


def test_ratios_come_first(tmp_path: Path) -> None:
    records = sample.bench(("endless", "full"), ("f16",))
    (run,) = load_runs([sample.written(tmp_path / "results.jsonl", records)])
    first = tables_of(run)[0]
    assert first.header[2:] == ("times as fast", "times less memory for keys and values")
    row = next(row for row in first.rows if row[0].startswith("32k: LM-Infinite"))
    # In the sample, full attention is 1 + 32,768 / 2,000 times as slow as at depth 0, and the window 1 + 1,024 / 2,000.
    assert row[1:] == ("full attention, f16 cache", "11.50 (10.92 to 12.07)", "32.00")


def test_ratios_of_losses_are_weighted_by_tokens(tmp_path: Path) -> None:
    way = {"method": "full", "cache_type": "f16"}
    of = {"method": "endless", "cache_type": "f16"}
    records = [
        {
            "kind": "ppl.difference",
            **way,
            "of": of,
            "begin": begin,
            "end": end,
            "ratio": ratio,
            "difference": difference,
        }
        for begin, end, ratio, difference in (
            (0, 8192, 0.99, sample.estimate(-0.03, 0.004)),
            (8192, 12288, 1.2, sample.estimate(0.6, 0.006)),
        )
    ]
    (row,) = table([sample.run("ppl"), *records], tmp_path, "Ratios of losses").rows
    half = (0.004**2 * 4 + 0.006**2) ** 0.5 / 3
    assert row == (
        "full attention, f16 cache",
        "LM-Infinite, f16 cache",
        "+6.00 %",
        "+20.00 %",
        "-1.00 %",
        "+20.00 %",
        f"0.1800 ({0.18 - half:.4f} to {0.18 + half:.4f})",
    )


def test_losses_stand_by_position_with_what_is_not_there_left_out(tmp_path: Path) -> None:
    records = sample.ppl(("endless", "full"), ("f16",), n_buckets=3)
    records = [r for r in records if (r["kind"], r.get("method"), r.get("begin")) != ("ppl.bucket", "full", 4096)]
    found = table(records, tmp_path, "Loss by position")
    assert found.header == ("positions", "LM-Infinite, f16 cache", "full attention, f16 cache")
    assert [row[0] for row in found.rows] == ["0 to 2,048", "2,048 to 4,096", "4,096 to 6,144"]
    assert re.fullmatch(r"3\.\d{3} ± 0\.050", found.rows[2][1])
    assert found.rows[2][2] == "-"


def test_keys_inside_and_outside_the_window_stand_apart(tmp_path: Path) -> None:
    found = table(sample.passkey(("endless",)), tmp_path, "Passkeys found, per cent; ")
    assert [row[0].partition(": ")[2] for row in found.rows] == [
        "all keys", "keys inside the window", "keys outside the window"
    ]  # fmt: skip
    assert found.header == ("", "512", "2k", "8k", "32k")
    assert found.rows[1][4] == found.rows[2][1] == "-"
    assert re.fullmatch(r"\d+ \(\d+ to \d+\), n = 30", found.rows[0][2])


def test_keys_at_distances_have_a_table(tmp_path: Path) -> None:
    found = table(sample.passkey_at_distances(), tmp_path, "Passkeys found by distance and length, per cent")
    assert found.header == ("distance", "2k", "8k")
    assert [row[0] for row in found.rows] == ["960 tokens", "1,024 tokens", "1,088 tokens"]
    assert [row[1].partition(" ")[0] for row in found.rows] == ["100", "0", "0"]
    with pytest.raises(ValueError, match="not enough values"):
        table(sample.passkey_at_distances(), tmp_path, "Passkeys found by depth")


def test_stalls_have_names_and_ratios(tmp_path: Path) -> None:
    found = table(sample.bench(("shift",), ("f16",)), tmp_path, "Times of single tokens")
    (row,) = found.rows
    assert row[:3] == ("4k: context shift, f16 cache", "1.25", "100.00")
    assert row[-1] == "shift: 3, median 900.0, at most 900.0"


def test_what_was_not_measured_and_what_it_was_compared_with_is_said(tmp_path: Path) -> None:
    reason = "full attention at 131,072 tokens needs 9 GB, and 8 GB are free"
    way = {"method": "full", "cache_type": "f16", "depth": 131072}
    peer = {
        "method": "attention-sinks",
        "versions": {"torch": "2.1"},
        "n_logits": 64,
        "same_argmax": 0.985,
        "n_loss": 9,
    }
    differences = {"largest_difference": 0.021, "mean_difference": 0.0012, "loss": 3.2, "loss_here": 3.25}
    records = [
        sample.run("bench"),
        {"kind": "bench.skipped", "part": "decode", **way, "reason": reason},
        {"kind": "bench.peer", **peer, **differences},
    ]
    assert table(records, tmp_path, "Not measured").rows == (("128k: full attention, f16 cache", "decode", reason),)
    assert table(records, tmp_path, "Another program").rows == (
        ("attention-sinks, PyTorch", "torch 2.1", "98.5 %", "0.0012", "0.021", "3.2000", "3.2500"),
    )


def test_a_run_without_measurements_and_one_that_goes_on_have_their_sections(tmp_path: Path) -> None:
    path = sample.written(tmp_path / "r.jsonl", [sample.run("qa")])
    path.write_text(path.read_text() + '{"kind": "qa.ce')
    result = plot(path, "--output", tmp_path / "p.html", "--json", command="report")
    assert json.loads(result.output[result.output.index("{") :]) == {"files": [str(tmp_path / "p.html")]}
    html = (tmp_path / "p.html").read_text()
    assert "There are none yet." in html and "the run was stopped, or still goes on" in html


@pytest.mark.parametrize(
    ("results", "output", "message"),
    [
        ("missing.jsonl", "page.html", "cannot read the results missing.jsonl"),
        ("good.jsonl", "folder", "cannot write folder: it is a folder"),
        ("good.jsonl", "nowhere/page.html", "cannot write nowhere/page.html"),
    ],
)
def test_what_is_wrong_is_said_in_words(
    results: str, output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample.written(Path("good.jsonl"), sample.qa(("endless",)))
    Path("folder").mkdir()
    Path("page.html").write_text("the old page")
    result = plot(results, "--output", output, command="report")
    assert result.exit_code == 1
    assert message in result.output
    assert Path("page.html").read_text() == "the old page"
    assert {path.name for path in Path().iterdir()} == {"good.jsonl", "folder", "page.html"}
