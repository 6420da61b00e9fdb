"""Every architecture that llama.cpp knows, as a tiny random model: refused with a reason, or the rules hold."""

from __future__ import annotations

import pytest

from architectures import PAGE, Report, examine_all, page


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return examine_all()


def test_none_stops_the_process_and_what_is_supported_keeps_the_rules(reports: list[Report]) -> None:
    assert [problem for report in reports for problem in report.problems] == []


def test_what_is_refused_has_a_reason(reports: list[Report]) -> None:
    assert [report.arch for report in reports if not (report.supported or report.reason or report.crash)] == []


def test_plain_attention_with_rope_is_supported(reports: list[Report]) -> None:
    by_arch = {report.arch: report for report in reports}
    for arch in ("llama", "qwen2", "qwen3", "phi3", "gptneox", "olmoe", "qwen3moe"):
        assert by_arch[arch].supported
        assert by_arch[arch].checks.keys() == {
            "unchanged",
            "batches",
            "same bits",
            "sequences",
            "stream",
            "removal",
            "window",
        }


@pytest.mark.parametrize(
    ("arch", "words"),
    [("gpt2", "learned"), ("starcoder", "learned"), ("mamba", "recurrent"), ("bert", "causal"), ("t5", "causal")],
)
def test_what_cannot_be_bounded_is_refused(reports: list[Report], arch: str, words: str) -> None:
    refused = [report for report in reports if report.arch == arch]
    assert refused
    assert all(not report.supported and words in report.reason for report in refused)


def test_the_page_is_what_was_found(reports: list[Report]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(reports), "run python tests/python/architectures.py"
