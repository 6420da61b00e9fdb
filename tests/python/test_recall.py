"""Which tokens of a prompt, of a chat and of what is written look up middle tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lminf_edge import ChatSession, ConfigError, Llama, LMInfConfig, MiddleConfig
from lminf_edge.completion import n_question_tokens
from lminf_edge.middle import N_QUESTION
from lminf_edge.passages import RecallLog
from lminf_edge.records import RecalledToken
from tiny_models import TinyModel, random_tokens

EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False, "n_threads": 1, "seed": 0}
MIDDLE = MiddleConfig(k=4, layers=(0, None), cache_type="f32", max_tokens=4096)


@pytest.fixture
def llm(head_32: TinyModel) -> Iterator[Llama]:
    """A tiny random model with a window of 64 that stores what leaves it."""
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64, middle=MIDDLE), **EXACT) as llm:
        yield llm


def recalled(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Position and mode of each stretch of tokens that is read from now on."""
    log: list[tuple[int, int]] = []
    append = llm._sequence.append

    def logged(tokens: Any, check: Any = None, recall: int = 0) -> None:
        log.append((llm.n_past, recall))
        append(tokens, check, recall)

    monkeypatch.setattr(llm._sequence, "append", logged)
    return log


class TestCompletions:
    @pytest.mark.parametrize(("scope", "reading", "answering"), [("none", 0, 0), ("question", 0, 1), ("all", 2, 1)])
    def test_the_question_is_behind_the_last_blank_line(
        self, llm: Llama, monkeypatch: pytest.MonkeyPatch, scope: Any, reading: int, answering: int
    ) -> None:
        log = recalled(llm, monkeypatch)
        document, question = "word " * 60 + "\n\nmore " * 3 + "\n \n", "What? "
        llm.create_completion(document + question, max_tokens=2, recall=scope)
        n_document = len(llm.tokenize(document))
        begins = [0] if scope == "none" else [0, n_document]
        assert log[: len(begins)] == [(begin, reading if begin == 0 else answering) for begin in begins]
        assert all(mode == answering for _, mode in log[len(begins) :])

    def test_with_a_store_the_question_recalls_by_itself(self, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        log = recalled(llm, monkeypatch)
        llm.create_completion(random_tokens(100, seed=1), max_tokens=1)
        assert log[:2] == [(0, 0), (100 - N_QUESTION, 1)]

    def test_a_question_is_read_anew(self, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may have been read as a part of a document before."""
        tokens = random_tokens(100, seed=2)
        llm.eval(tokens)
        log = recalled(llm, monkeypatch)
        llm.create_completion(tokens, max_tokens=1)
        assert log[0] == (100 - N_QUESTION, 1)

    def test_a_prompt_without_a_blank_line_is_all_question(self, llm: Llama) -> None:
        assert n_question_tokens(llm, "One line\nand another", 20) == 20
        assert n_question_tokens(llm, "Text\n\nQuestion\n\n", 30) == 30 - len(llm.tokenize("Text\n\n"))

    def test_wrong_scopes_are_named(self, llm: Llama, tiny: Llama) -> None:
        with pytest.raises(ConfigError, match="recall = 'yes'"):
            llm.create_completion("x", recall="yes")  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match="MiddleConfig"):
            tiny.create_completion("x", recall="question")
        assert llm.n_past == tiny.n_past == 0


class TestChats:
    def test_the_last_message_and_the_answer_recall(self, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        messages = [
            {"role": "user", "content": "first " * 20},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "second"},
        ]
        log = recalled(llm, monkeypatch)
        llm.create_chat_completion(messages, max_tokens=2)
        n_before = len(llm._chat_format.tokens(messages[:2], add_generation_prompt=False))
        assert log[:2] == [(0, 0), (n_before, 1)]

    def test_a_session_looks_up_what_was_said(self, head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        with ChatSession.open(head_32.path, n_window=160, middle=MIDDLE, **EXACT) as session:
            log = recalled(session.llm, monkeypatch)
            for number in range(9):
                session.send(f"message {number}", stream=False, max_tokens=12)
            # each turn: what ends the answer before it is read, then the question and the answer recall
            modes = [mode for _, mode in log]
            assert set(modes) == {0, 1}
            assert modes.count(0) <= 9 < modes.count(1)
            assert session.usage.n_tokens_forgotten > 0
            # what was forgotten with its message is stored
            found = session.llm.last_recall(1000)
            assert found
            assert all(token.text for token in found)

    def test_a_saved_session_remembers_what_it_forgot(self, head_32: TinyModel, tmp_path: Any) -> None:
        path = tmp_path / "chat"
        with ChatSession.open(head_32.path, n_window=160, middle=MIDDLE, **EXACT) as session:
            for number in range(7):
                session.send(f"message {number}", stream=False, max_tokens=12)
            session.save_state(path)
            expected = session.send("and?", stream=False, max_tokens=12)
        with ChatSession.resume(head_32.path, path, **EXACT) as again:
            answer = again.send("and?", stream=False, max_tokens=12)
        assert answer["choices"][0]["message"] == expected["choices"][0]["message"]


class TestPassages:
    def test_neighbours_are_one_passage(self) -> None:
        log = RecallLog()
        for position, weight in ((100, 1.0), (300, 0.5), (104, 1.5), (300, 0.75)):
            log.add([RecalledToken(position=position, weight=weight, token=None, text=None)])
        first, second = log.passages(lambda begin, end: f"{begin}-{end}")
        assert (first.begin, first.end, first.weight, first.text) == (88, 117, 2.5, "88-117")
        assert (second.begin, second.end, second.weight) == (288, 313, 1.25)
        assert np.isclose(log.passages(lambda *_: "", n=1)[0].weight, 2.5)
