"""What a conversation has forgotten stays in the store of middle tokens, whatever is forgotten or taken back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lminf_edge import ChatSession, Llama, LMInfConfig, MiddleConfig
from tiny_families import HYBRID, SLIDING_AND_FULL
from tiny_models import TinyModel, write_tiny_model

SYSTEM = "Be brief."
N_WINDOW = 96
LOST = "cannot be looked up any more"
LETTERS: dict[str, Any] = {"stream": False, "grammar": "root ::= [a-z ]*", "max_tokens": 10}
MANY_LETTERS: dict[str, Any] = {"stream": False, "grammar": "root ::= [a-z]{200}"}
LONG = "Q" * 50
"""A question that leaves no room for anything before it."""


def open_tiny(path: Path, **middle: Any) -> ChatSession:
    config = MiddleConfig(**{"k": 4, "layers": (0, None), "cache_type": "f32", "max_tokens": 4096, **middle})
    return ChatSession.open(
        path, system=SYSTEM, n_window=N_WINDOW, n_block=8, n_rollback=8, middle=config, n_threads=1, seed=0,
        n_ubatch=32, cache_type_k="f32", cache_type_v="f32", flash_attn=False,
    )  # fmt: skip


def talk(session: ChatSession) -> int:
    """Three short questions and answers; returns how many tokens there are then."""
    for _ in range(3):
        session.send("ABCDEFGH", **LETTERS)
    return session.llm.n_past


def said(session: ChatSession, position: int) -> str | None:
    token = session.llm._sequence._history.token_at(position)
    return None if token is None else session.llm.detokenize([token])


def recalled(session: ChatSession) -> set[int]:
    return {token.position for token in session.llm.last_recall(1000)}


def test_a_message_that_fills_the_window_leaves_the_store_alone(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as session:
        n_before = talk(session)
        session.send(LONG, **LETTERS)
        assert [message["role"] for message in session.remembered_messages] == ["system", "user", "assistant"]
        stats = session.llm.memory_stats()
        begin = session._conversation.remembered[0].begin
        assert begin >= n_before
        assert stats.n_retrievable >= n_before - len(session._format.pinned)
        assert any(position < begin for position in recalled(session))
        asked = [said(session, position) for position in range(n_before)]
        assert "A" in asked


def test_the_model_sees_no_more_of_it_than_without_a_store(head_32: TinyModel) -> None:
    """The logits are those of the system prompt and the question alone, at the position where they stand."""
    with open_tiny(head_32.path) as session:
        talk(session)
        session.send(LONG, **LETTERS, recall="none")
        logits = session.llm._context.last_logits()
        begin = session._conversation.remembered[0].begin
        pinned, *spoken = session._format.pinned, *session._conversation.remembered
        config = session.llm.config
    assert config is not None
    options: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False, "n_threads": 1}
    plain = LMInfConfig(
        n_sink=config.n_sink, n_window=N_WINDOW, n_clamp=config.n_clamp, n_block=8, n_rollback=8, sink_order="kept"
    )
    with Llama(head_32.path, lminf=plain, n_ubatch=32, **options) as llm:
        llm.eval(pinned)
        assert llm._context.test_set_position(begin)
        expected = llm.eval([token for message in spoken for token in message.tokens])[-1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_question_that_was_forgotten_while_it_was_answered_comes_back(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as session:
        n_before = talk(session)
        session.send("R" * 50, **MANY_LETTERS, max_tokens=60)
        assert session.usage.n_messages_remembered == 1  # the answer
        begin = session._conversation.remembered[0].begin
        session.regenerate(**LETTERS)
        assert session.usage.n_messages_remembered == 2
        question, answer = session._conversation.remembered
        assert question.begin == begin  # where the first answer was, of which nothing is left
        assert session.llm.n_past <= answer.end
        assert session.llm.memory_stats().n_retrievable >= n_before - len(session._format.pinned)


def test_another_question_instead_of_the_only_one_that_is_remembered(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as session:
        n_before = talk(session)
        session.send(LONG, **LETTERS)
        session.edit("XYZ", **LETTERS)
        assert session.remembered_messages[1]["content"] == "XYZ"
        asked = [said(session, position) for position in range(session.llm.n_past)]
        assert (asked.count("Q"), asked.count("X")) == (0, 1)
        assert session.llm.memory_stats().n_retrievable >= n_before - len(session._format.pinned)


def test_a_conversation_whose_messages_went_at_once_goes_on_from_a_file(head_32: TinyModel, tmp_path: Path) -> None:
    with open_tiny(head_32.path) as session:
        for question in ("ABCDEFGH", "IJKL", LONG):
            session.send(question, **LETTERS)
        session.save_state(tmp_path / "state")
        expected = session.edit("and?", **LETTERS)
        positions = recalled(session)
    options: dict[str, Any] = {"n_threads": 1, "seed": 0, "flash_attn": False}
    with ChatSession.resume(head_32.path, tmp_path / "state", **options) as again:
        answer = again.edit("and?", **LETTERS)
        assert recalled(again) == positions != set()
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]


def test_a_new_conversation_looks_up_nothing_of_the_old_one(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as session:
        for question in ("ABCDEFGH", LONG, LONG):
            session.send(question, **LETTERS)
        session.reset()
        assert session.llm.memory_stats().n_retrievable == 0
        session.send("ABCDEFGH", **LETTERS)
        assert recalled(session) == set()


# where the store is lost


def test_another_use_of_the_model_is_warned_of_once(head_32: TinyModel) -> None:
    with open_tiny(head_32.path) as session:
        session.send("ABCDEFGH", **LETTERS)
        session.llm.reset()
        session.send("ABCDEFGH", **LETTERS)  # nothing was forgotten, and nothing is lost
        session.send(LONG, **LETTERS)
        session.llm.reset()
        with pytest.warns(UserWarning, match=f"the first 4 messages .* {LOST}"):
            session.send("ABC", **LETTERS)
        session.llm.reset()
        session.send("ABC", **LETTERS)


def test_an_answer_that_cannot_be_taken_back_exactly_is_warned_of(head_32: TinyModel) -> None:
    """The store is full, and the answer is longer than n_rollback."""
    with open_tiny(head_32.path, max_tokens=N_WINDOW + 1) as session:
        for _ in range(9):
            session.send("ABCDEFGH", **LETTERS)
        session.send("I", **MANY_LETTERS, max_tokens=50)
        with pytest.warns(UserWarning, match=LOST):
            session.regenerate(**LETTERS)
        session.send("J", **LETTERS)


def test_sliding_layers_keep_the_store_when_messages_go_at_once(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma3.gguf", SLIDING_AND_FULL["gemma3"], seed=1)
    with open_tiny(model.path) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        for question in ("ABCDEFGH", "IJKL", LONG):
            session.send(question, **LETTERS)
        assert session.llm.memory_stats().n_retrievable > 30


def test_recurrent_layers_lose_the_store(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "lfm2.gguf", HYBRID["lfm2"], seed=1)
    with open_tiny(model.path) as session:
        for question in ("ABCDEFGH", "IJKL"):
            session.send(question, **LETTERS)
        with pytest.warns(UserWarning, match=LOST):
            session.send(LONG, **LETTERS)
        assert session.remembered_messages[1]["content"] == LONG
