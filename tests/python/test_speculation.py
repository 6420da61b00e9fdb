"""What is decoded ahead changes nothing but the time: tokens, probabilities and the sequence are those without it.

The default model has weights whose products do not depend on the batch, so that equal means equal bits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import run
from lminf_edge import ChatSession, ConfigError, Llama, LMInfConfig, MiddleConfig, UnsupportedModelError
from lminf_edge.history import TokenHistory
from lminf_edge.records import GenerationStep
from lminf_edge.speculation import N_DRAFT, DraftCosts, LookupDrafts, MatchModel
from lminf_edge.text_generation import text_options
from tiny_families import HYBRID, SLIDING_AND_FULL
from tiny_models import TinyModel, write_tiny_model

WINDOW = LMInfConfig(n_window=128, n_rollback=40)

LOG = "".join(
    f"12:{minute:02d} worker {minute % 3} has served the page of user {minute * 7 % 10} in {minute * 13 % 40} ms\n"
    for minute in range(20)
)
"""Lines that are alike: the window is left twice over."""

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.7, "seed": 3, "repeat_penalty": 1.05, "frequency_penalty": 0.02}


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are made wherever there is something to guess, however fast the machine is just now."""
    monkeypatch.setattr(LookupDrafts, "_SPEED_UP", 0.0)


@pytest.fixture(params=[("f16", "f16"), ("q8_0", "q4_0")], ids="-".join)
def open_default(request: pytest.FixtureRequest, default_model: Path) -> Callable[..., Llama]:
    """Opens the default model with a small window."""
    type_k, type_v = request.param

    def open_model(config: LMInfConfig = WINDOW, **options: Any) -> Llama:
        options = {"n_ubatch": 64, "n_threads": 1, "seed": 0, **options}
        return Llama(default_model, lminf=config, cache_type_k=type_k, cache_type_v=type_v, **options)

    return open_model


@pytest.fixture
def llm(default_model: Path) -> Iterator[Llama]:
    with Llama(default_model, lminf=WINDOW, n_ubatch=64, n_threads=1, seed=0) as llm:
        yield llm


def generated(llm: Llama, speculate: Any, prompt: Any = LOG, **options: Any) -> list[GenerationStep]:
    """What is written after a prompt, speed apart; the sequence begins with it."""
    llm.reset()
    options = {"max_tokens": 60, "stop_at_end": False, **options}
    return [replace(step, tokens_per_second=0.0) for step in llm.generate(prompt, speculate=speculate, **options)]


def n_accepted(llm: Llama) -> int:
    """How many drafted tokens were drawn; fewer than were drafted, so that some were taken back."""
    stats = llm.memory_stats()
    assert stats.n_accepted < stats.n_drafted
    return stats.n_accepted


# --- the same text


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_and_probabilities_are_the_same(open_default: Callable[..., Llama], options: dict[str, Any]) -> None:
    with open_default() as llm:
        expected = generated(llm, None, n_top_logprobs=3, **options)
        assert llm.memory_stats().n_drafted == 0
        assert generated(llm, "lookup", n_top_logprobs=3, **options) == expected
        assert n_accepted(llm) > 15
        assert llm.memory_stats().n_evicted > 100


@pytest.mark.parametrize("n_rollback", [0, 40])
@pytest.mark.parametrize("n_ubatch", [1, 3, 64])
def test_nothing_is_asked_of_rollback_or_micro_batch(
    open_default: Callable[..., Llama], n_rollback: int, n_ubatch: int
) -> None:
    with open_default(LMInfConfig(n_window=128, n_rollback=n_rollback), n_ubatch=n_ubatch) as llm:
        expected = generated(llm, None, max_tokens=30, **GREEDY)
        assert generated(llm, "lookup", max_tokens=30, **GREEDY) == expected
        assert (llm.memory_stats().n_accepted > 0) == (n_ubatch > 1)


def test_through_rebases(open_default: Callable[..., Llama]) -> None:
    """They round keys anew, so they have to come where they come without drafts."""
    with open_default(LMInfConfig(n_window=32, n_rollback=8), n_ubatch=16, _n_rebase=1) as llm:
        expected = generated(llm, None, max_tokens=200, **GREEDY)
        n_rebases = llm.memory_stats().n_rebases
        assert n_rebases > 2
        assert generated(llm, "lookup", max_tokens=200, **GREEDY) == expected
        assert llm.memory_stats().n_rebases == n_rebases
        assert n_accepted(llm) > 15


def test_with_a_grammar(llm: Llama) -> None:
    options = {"grammar": r'root ::= ("12:" [0-9]+ " worker " [0-9] "\n")*', **SAMPLED}
    expected = generated(llm, None, **options)
    assert generated(llm, "lookup", **options) == expected
    assert n_accepted(llm) > 5


@pytest.mark.parametrize("stop", ["user", " served the page", "\n12:2"])
def test_stop_strings_end_a_text_in_the_middle_of_a_draft(llm: Llama, stop: str) -> None:
    completions = []
    for speculate in (None, "lookup"):
        for logprobs in (None, 2):
            completion = llm.create_completion(
                LOG, max_tokens=60, stop=stop, speculate=speculate, logprobs=logprobs, **GREEDY
            )
            completions.append({name: completion[name] for name in ("choices", "usage")})
    assert completions[:2] == completions[2:]
    assert completions[0]["choices"][0]["finish_reason"] == "stop"
    assert llm.memory_stats().n_accepted > 0


def test_a_loop_is_noticed_where_it_is_without(llm: Llama) -> None:
    usages = [
        llm.create_completion("a b " * 20, max_tokens=200, stop_on_loop=True, speculate=speculate, **GREEDY)["usage"]
        for speculate in (None, "lookup")
    ]
    assert usages[0] == usages[1]
    assert usages[0]["completion_tokens"] < 200
    assert llm.memory_stats().n_accepted > 10


def test_an_end_is_never_decoded(llm: Llama) -> None:
    """A conversation is full of ends that a lookup finds."""
    conversation = [{"role": role, "content": "Yes."} for role in ("user", "assistant") * 6 + ("user",)]
    answers = [
        llm.create_chat_completion(conversation, speculate=speculate, max_tokens=20, **GREEDY)
        for speculate in (None, "lookup", "lookup")
    ]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_no_more_is_drafted_than_is_to_be_drawn(llm: Llama, max_tokens: int) -> None:
    n_prompt = len(llm.tokenize(LOG))
    steps = generated(llm, "lookup", max_tokens=max_tokens, **GREEDY)
    assert [step.n_past for step in steps] == list(range(n_prompt + 1, n_prompt + max_tokens + 1))
    assert steps[-1].finish_reason == "length"
    assert llm._context.stats().n_past == n_prompt + max_tokens
    assert llm.memory_stats().n_drafted <= sum(range(max_tokens))


def test_middle_tokens_are_looked_up_alike(default_model: Path) -> None:
    config = LMInfConfig(n_window=128, middle=MiddleConfig(k=4))
    with Llama(default_model, lminf=config, n_threads=1, seed=0) as llm:
        expected = generated(llm, None, recall=True, show_recall=True, **GREEDY)
        last = llm.last_recall()
        assert last and any(step.recall for step in expected)
        assert generated(llm, "lookup", recall=True, show_recall=True, **GREEDY) == expected
        assert llm.last_recall() == last
        assert n_accepted(llm) > 15


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_sliding_layers_go_back_too(tmp_path: Path, name: str) -> None:
    """A random model: what it has drawn is what there is to look up. Without penalties it soon repeats itself."""
    assert name in SLIDING_AND_FULL
    model = write_tiny_model(tmp_path / "model.gguf", SLIDING_AND_FULL[name], seed=1)
    exact: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
    with Llama(model.path, lminf=LMInfConfig(n_window=48, n_rollback=0), n_ubatch=16, n_threads=1, **exact) as llm:
        expected = generated(llm, None, range(5, 60), max_tokens=200, **GREEDY)
        found = generated(llm, "lookup", range(5, 60), max_tokens=200, **GREEDY)
        assert [step.token for step in found] == [step.token for step in expected]
        np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in expected], atol=1e-4)
        assert llm.memory_stats().n_accepted > 10


# --- nothing is left behind


@pytest.mark.parametrize("n_drawn", [1, 4, 7, 11, 20, 33])
def test_a_text_that_is_broken_off_leaves_what_was_handed_out(
    open_default: Callable[..., Llama], tmp_path: Path, n_drawn: int
) -> None:
    with open_default() as llm, open_default() as plain:
        expected = generated(plain, None, max_tokens=n_drawn, **GREEDY)
        last = plain._context.last_logits()
        going_on = [step.token for step in plain.generate(max_tokens=20, **GREEDY)]

        steps = llm.generate(LOG, speculate="lookup", max_tokens=60, stop_at_end=False, **GREEDY)
        assert [next(steps).token for _ in range(n_drawn)] == [step.token for step in expected]
        steps.close()  # type: ignore[attr-defined]
        assert llm.n_past == expected[-1].n_past
        llm.save_state(tmp_path / "state")
        assert np.array_equal(llm._context.last_logits(), last)
        assert [step.token for step in llm.generate(max_tokens=20, **GREEDY)] == going_on

        plain.load_state(tmp_path / "state")
        assert [step.token for step in plain.generate(max_tokens=20, **GREEDY)] == going_on


def test_whoever_looks_in_between_sees_what_was_handed_out(llm: Llama) -> None:
    expected = generated(llm, None, **GREEDY)
    llm.reset()
    for n, step in enumerate(llm.generate(LOG, speculate="lookup", max_tokens=60, stop_at_end=False, **GREEDY)):
        assert (step.token, step.n_past) == (expected[n].token, expected[n].n_past)
        assert llm.n_past == step.n_past
        if n % 5 == 0:
            assert llm.memory_stats().n_past == step.n_past
    assert n_accepted(llm) > 5


def test_as_many_tokens_can_be_taken_back(llm: Llama) -> None:
    """Those that were drafted beyond the end do not count."""
    n_prompt = len(llm.tokenize(LOG))
    generated(llm, None, max_tokens=7, **GREEDY)
    before = llm._context.last_logits()
    for n_more in range(1, 30, 3):
        llm.truncate(n_prompt + 6)
        steps = llm.generate([5], speculate="lookup", max_tokens=40, stop_at_end=False, **GREEDY)
        for _ in range(n_more):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        llm.truncate(llm.n_past - min(n_more + 1, 40))
        assert llm.n_past == n_prompt + 6
    generated(llm, None, max_tokens=7, **GREEDY)
    assert np.array_equal(llm._context.last_logits(), before)


def test_a_check_that_raises_leaves_what_was_handed_out(llm: Llama) -> None:
    class StoppedError(Exception):
        pass

    tokens = llm.tokenize(LOG)

    def check() -> None:
        if llm.n_past >= len(tokens) + 23:
            raise StoppedError

    text = text_options({"speculate": "lookup", **GREEDY}, max_tokens=200, check=check)
    drawn = []
    with pytest.raises(StoppedError), closing(llm._write(tokens, text)) as pieces:
        for piece in pieces:
            drawn += [step.token for step in piece.tokens]
    assert llm.n_past == len(tokens) + len(drawn) == len(tokens) + 23
    last = llm._context.last_logits()
    llm.reset()
    assert np.array_equal(llm.eval([*tokens, *drawn])[-1], last)


# --- everywhere


def test_a_conversation_is_the_same_while_it_forgets(default_model: Path) -> None:
    """Messages leave the window while an answer is drafted."""
    lines = "one two three four five six seven eight nine ten " * 3
    answers: list[list[str]] = []
    for speculate in (None, "lookup"):
        session = ChatSession.open(default_model, system="Repeat what I say.", n_window=160, n_threads=1, seed=0)
        with session:
            answers.append([])
            for n in range(4):
                answer = session.send(f"{n} {lines}", stream=False, speculate=speculate, max_tokens=70, **GREEDY)
                answers[-1].append(answer["choices"][0]["message"]["content"])
            assert session.usage.n_messages_remembered < 8
            stats = session.memory_stats()
            assert (stats.n_accepted > 10) == (speculate is not None)
    assert answers[0] == answers[1]


def test_asyncio(llm: Llama) -> None:
    async def text(speculate: Any) -> str:
        pieces = llm.acreate_completion(LOG, max_tokens=30, speculate=speculate, **GREEDY)
        return "".join([piece["choices"][0]["text"] async for piece in pieces])

    assert asyncio.run(text("lookup")) == asyncio.run(text(None))
    assert llm.memory_stats().n_accepted > 5


def test_the_command_line(default_model: Path) -> None:
    options = ("--temperature", "0", "--threads", "1", "--json")
    reports = []
    for extra in ((), ("--speculate", "lookup")):
        finished = run("generate", *options, "--max-tokens", "80", *extra, given=LOG)
        assert finished.returncode == 0, finished.stderr
        reports.append(json.loads(finished.stdout))
    assert reports[0]["text"] == reports[1]["text"]
    assert reports[0]["memory"]["n_drafted"] == 0
    assert 0 <= reports[1]["memory"]["n_accepted"] <= reports[1]["memory"]["n_drafted"]

    given = "Say yes yes yes yes yes.\n/stats\n"
    finished = run("chat", *options, "--max-tokens", "30", "--speculate", "lookup", given=given)
    assert finished.returncode == 0, finished.stderr
    assert "n_drafted" in json.loads(finished.stdout.splitlines()[1])["stats"]


# --- what cannot be done


def test_an_unknown_way_is_refused(llm: Llama, default_model: Path) -> None:
    unknown: Any = "oracle"
    for call in (
        lambda: llm.generate(LOG, speculate=unknown),
        lambda: llm.create_completion(LOG, speculate=unknown),
        lambda: llm.create_chat_completion([{"role": "user", "content": "a"}], speculate=unknown),
        lambda: llm.acreate_completion(LOG, speculate=unknown),
    ):
        with pytest.raises(ConfigError, match=r"speculate = 'oracle': must be one of 'lookup'"):
            call()
    for command in ("generate", "chat"):
        finished = run(command, "--speculate", "oracle", given=LOG)
        assert finished.returncode == 2
        assert "speculate = 'oracle'" in finished.stderr


def test_a_conversation_refuses_at_once(head_32: TinyModel) -> None:
    unknown: Any = "oracle"
    with ChatSession.open(head_32.path, system="Be brief.", n_window=96) as session:
        with pytest.raises(ConfigError, match="oracle"):
            session.send("A", speculate=unknown)
        assert session.messages == [{"role": "system", "content": "Be brief."}]


def test_a_plain_context_is_refused(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256) as llm, pytest.raises(ConfigError, match=r"plain context.*LMInfConfig"):
        llm.generate(range(5, 20), speculate="lookup")


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "lfm2.gguf", HYBRID["lfm2"], seed=1)
    with Llama(model.path, lminf=LMInfConfig(n_window=64)) as llm:
        with pytest.raises(UnsupportedModelError, match="recurrent"):
            llm.create_completion([5, 6, 7], speculate="lookup")
        assert llm.n_past == 0


# --- guessing

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=80)


def array_of(tokens: Sequence[int]) -> Any:
    return np.array(tokens, np.int32)


@given(TOKENS, st.integers(0, 80))
def test_a_place_is_where_the_text_stood_as_it_ends(tokens: list[int], n_given: int) -> None:
    """And it is found wherever there is one; however much of the text is given at the beginning."""
    model = MatchModel(array_of(tokens[:n_given]))
    for end in range(n_given, len(tokens)):
        before = model.next
        model.feed(tokens[end])
        text = tokens[: end + 1]
        same = [
            next((n for n in range(place) if text[place - 1 - n] != text[-1 - n]), place) for place in range(1, end + 1)
        ]
        if max(same, default=0) >= 2 and (before is None or before != tokens[end]):
            assert model.length in same
            assert model.length >= min(8, 2 ** (max(same).bit_length() - 1))
            assert model.next in {text[place] for place, n in enumerate(same, 1) if n == model.length}
        elif before is not None and before == tokens[end]:
            assert model.next is not None and model.length > 0


def test_a_repetition_is_continued_beyond_the_end_of_the_text() -> None:
    model = MatchModel(array_of([7, 1, 2, 3, 1, 2]))
    for token in (3, 1, 2):
        model.feed(token)
    assert model.continuation(7) == [3, 1, 2, 3, 1, 2, 3]
    assert MatchModel(array_of([])).continuation(3) == []


def test_after_a_word_that_was_replaced_the_text_goes_on() -> None:
    text = list(range(100, 120))
    model = MatchModel(array_of(text))
    for token in (*text[:8], 50):
        model.feed(token)
    assert model.length == 0
    assert model.continuation(3) == text[9:12]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lminf_edge.speculation.N_REMEMBERED", 50)
    random = np.random.default_rng(1)
    model = MatchModel(array_of([]))
    for _ in range(20):
        sentence = random.integers(0, 1000, 10).tolist()
        for token in sentence * 3:
            model.feed(token)
            assert len(model._tokens) < 100
        assert model.length >= 10
        assert model.continuation(10) == sentence


def drafted(tokens: Sequence[int], n_learnt: int, cost: float) -> tuple[int, int]:
    """How many tokens are drafted for a text, and how many are right; each costs so many steps."""
    costs = DraftCosts()
    drafts = LookupDrafts(array_of(tokens[:n_learnt]), costs)
    n_drafted = n_right = 0
    at = n_learnt
    while at < len(tokens):
        drafts.feed(tokens[at])
        draft = drafts.draft(N_DRAFT)
        costs.add(len(draft), 1 + cost * len(draft))
        following = [*tokens[at + 1 : at + 1 + len(draft)], *[-1] * len(draft)]
        right = next((n for n, guess in enumerate(draft) if guess != following[n]), len(draft))
        for token in tokens[at + 1 : at + 1 + right]:
            drafts.feed(token)
        at += 1 + right
        n_drafted, n_right = n_drafted + len(draft), n_right + right
    return n_drafted, n_right


class TestDrafts:
    @pytest.fixture(autouse=True)
    def _as_ever(self, monkeypatch: pytest.MonkeyPatch, _eager: None) -> None:
        monkeypatch.undo()

    @pytest.mark.parametrize("n_learnt", [0, 300])
    def test_none_where_nothing_repeats_itself(self, n_learnt: int) -> None:
        tokens = np.random.default_rng(1).integers(0, 30, 1000).tolist()  # pairs come again, and say nothing
        n_drafted, _ = drafted(tokens, n_learnt, 0.6)
        assert n_drafted < 20

    def test_long_ones_where_everything_does(self) -> None:
        tokens = np.random.default_rng(1).integers(0, 1000, 50).tolist() * 10
        n_drafted, n_right = drafted(tokens, 100, 0.6)
        assert n_right > 300
        assert n_right > 0.9 * n_drafted

    def test_none_where_they_cost_more_than_they_save(self) -> None:
        tokens = np.random.default_rng(1).integers(0, 1000, 50).tolist() * 10
        n_drafted, _ = drafted(tokens, 100, 1.2)
        assert n_drafted < 15 * N_DRAFT

    def test_a_token_that_is_never_right_ends_a_draft(self) -> None:
        """As the numbers in the lines of a log."""
        random = np.random.default_rng(2)
        tokens = [token for _ in range(60) for token in (*range(100, 110), int(random.integers(0, 90)))]
        n_drafted, n_right = drafted(tokens, 200, 0.3)
        assert n_right > 250
        assert n_right > 0.85 * n_drafted


def test_the_history_of_an_endless_text_is_its_newest_part() -> None:
    history = TokenHistory(n_max=20)
    for token in range(100):
        history.append(array_of([token]))
        assert 10 <= len(history.newest(100)) <= 20 or token < 10
        assert history.newest(5).tolist() == list(range(max(0, token - 4), token + 1))
    assert history.token_at(99) == 99
    assert history.token_at(5) is None
    assert history.save() is None
    history.truncate(97)
    assert history.newest(2).tolist() == [95, 96]
    history.truncate(3)
    history.append(array_of([7]))
    assert (history.token_at(3), history.token_at(2), history.newest(9).tolist()) == (7, None, [7])
    assert history.n_common(array_of([7]), 4) == 0
