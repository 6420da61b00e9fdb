"""A text ends where it should, in whatever pieces it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lminf_edge import ConfigError, GenerationStep, TextPiece
from lminf_edge.sampling import SamplingOptions
from lminf_edge.stopping import LoopGuard, StopStrings, check_stop
from lminf_edge.text_generation import TextOptions, write_text

FEW_LETTERS = st.text("ab<", max_size=30)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3)


def passed(pieces: Sequence[str], stop: Sequence[str]) -> tuple[str, str | None]:
    """What goes through, and what stopped it."""
    stops = StopStrings(stop)
    text = "".join(stops.feed(piece) for piece in pieces)
    return text + stops.flush(), stops.found


def expected(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The same, from the text's prefixes: the first that ends with a stop string decides."""
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(FEW_LETTERS, STOPS, st.lists(st.integers(0, 30)))
def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert passed(pieces, stop) == expected(text, stop)


@given(FEW_LETTERS, STOPS)
def test_nothing_passes_that_could_still_turn_out_to_be_a_stop_string(text: str, stop: list[str]) -> None:
    endings = ["", *(string[n:] for string in stop for n in range(len(string)))]
    stops = StopStrings(stop)
    shown = ""
    for n, letter in enumerate(text, 1):
        shown += stops.feed(letter)
        assert all(expected(text[:n] + ending, stop)[0].startswith(shown) for ending in endings)


def test_what_cannot_begin_a_stop_string_passes_at_once() -> None:
    stops = StopStrings(["</end>"])
    assert [stops.feed(piece) for piece in ("one <", "/e", "nx", "</end")] == ["one ", "", "</enx", ""]
    assert stops.flush() == "</end"


@pytest.mark.parametrize(
    ("stop", "error"),
    [("", ConfigError), (["a", ""], ConfigError), ([1], TypeError), (5, TypeError), (b"a", TypeError)],
)
def test_wrong_stop_strings_are_refused(stop: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="stop"):
        check_stop(stop)


# --- loops


def n_until_loop(tokens: Sequence[int]) -> int | None:
    guard = LoopGuard()
    return next((n for n, token in enumerate(tokens, 1) if guard.feed(token)), None)


@pytest.mark.parametrize(("period", "n_tokens"), [(1, 64), (5, 64), (16, 64), (50, 200), (128, 512)])
def test_four_equal_parts_of_a_text_are_a_loop(period: int, n_tokens: int) -> None:
    story = list(range(1000, 1300))
    loop = list(range(period)) * (600 // period + 1)
    assert n_until_loop(story + loop) == len(story) + n_tokens
    assert n_until_loop(story + loop[: n_tokens - 1]) is None


def test_a_text_that_repeats_much_but_not_all_is_no_loop() -> None:
    numbered = [token for line in range(100) for token in (1, 2, 3, 1000 + line)]
    assert n_until_loop(numbered) is None


# --- pieces of text and their tokens


def steps(texts: Sequence[str], reason: Any = "length") -> Iterator[GenerationStep]:
    for n, text in enumerate(texts, 1):
        final = n == len(texts)
        yield GenerationStep(
            token=n, text=text, logprob=-1.0, n_past=n, tokens_per_second=1.0, finish_reason=reason if final else None
        )


def written(texts: Sequence[str], reason: Any = "length", **options: Any) -> list[TextPiece]:
    return list(write_text(steps(texts, reason), TextOptions(sampling=SamplingOptions(), max_tokens=9, **options)))


def tokens_of(pieces: Sequence[TextPiece]) -> list[int]:
    return [step.token for piece in pieces for step in piece.tokens]


def test_tokens_come_with_their_text_and_not_before() -> None:
    pieces = written(["one", "<", "x", " two"], stop=("<y",))
    assert [piece.text for piece in pieces] == ["one", "", "<x", " two"]
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 2, 1]
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length"]


def test_tokens_of_a_stop_string_are_left_out_and_one_that_begins_before_it_is_not() -> None:
    pieces = written(["one", " two<", "end", ">", "never"], stop=("<end>",))
    assert "".join(piece.text for piece in pieces) == "one two"
    assert tokens_of(pieces) == [1, 2]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].n_tokens == 4


def test_no_token_is_drawn_after_the_end() -> None:
    source = steps(["a", "b", "c"])
    list(write_text(source, TextOptions(sampling=SamplingOptions(), max_tokens=9, stop=("b",))))
    assert next(source).token == 3


def test_the_token_that_ends_a_text_is_not_part_of_it() -> None:
    pieces = written(["a", "b<", ""], reason="stop", stop=("<x",))
    assert tokens_of(pieces) == [1, 2]
    assert "".join(piece.text for piece in pieces) == "ab<"
    assert pieces[-1].n_tokens == 2


def test_a_loop_ends_a_text_on_request_only() -> None:
    source = (step for _ in range(200) for step in steps(["la", ""], reason=None))
    options = TextOptions(sampling=SamplingOptions(), max_tokens=-1, stop_on_loop=True)
    assert [*write_text(source, options)][-1].finish_reason == "loop"
    assert written(["la"] * 300)[-1].finish_reason == "length"
