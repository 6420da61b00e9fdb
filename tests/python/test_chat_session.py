"""An endless conversation: what the model sees of it is always the system prompt and whole messages."""

from __future__ import annotations

import asyncio
import copy
import itertools
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge import ChatSession, ConfigError, Llama, LMInfConfig, MiddleConfig, StateError
from parity import TOLERANCE
from reference import Attention, TokenStream
from tiny_families import SLIDING_AND_FULL
from tiny_models import TinyModel, write_tiny_model

SYSTEM = "Be brief."
LETTERS = "root ::= [a-z ]*"  # what an answer of a random model can be: any tokens of these letters
END, USER, ASSISTANT = "<|im_end|>\n", "<|im_start|>user\n", "<|im_start|>assistant\n"


def open_tiny(model: TinyModel, *, n_window: int = 96, **options: Any) -> ChatSession:
    options = {"n_ubatch": 32, "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False, **options}
    return ChatSession.open(
        model.path, system=SYSTEM, n_window=n_window, n_block=8, n_rollback=8, n_threads=1, seed=0, **options
    )


def text_of(pieces: Any) -> str:
    return "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces if piece["choices"])


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[ChatSession]:
    """The default model with a window of 128."""
    with ChatSession.open(default_model, system="You are a helpful assistant.", n_window=128, seed=0) as session:
        yield session


# --- what the model sees


class Witness:
    """Sees each change of the sequence, knows what the model sees then, and computes the same in the reference."""

    def __init__(self, session: ChatSession, model: TinyModel) -> None:
        config = session.llm.config
        assert config is not None and config.n_window and config.n_clamp and config.n_block
        self._session = session
        self._attention = Attention(config.n_sink, config.n_window, config.n_clamp, config.n_block, "kept")
        self._model = model
        self._n_sink = config.n_sink
        self._n_window = config.n_window
        self.begin()
        self.spoken: list[tuple[str, str]] = []
        sequence: Any = session.llm._sequence
        self._append, self._forget, self._truncate = sequence.append, sequence.forget, sequence.truncate
        sequence.append, sequence.forget, sequence.truncate = self.append, self.forget, self.truncate
        self._forget_all = sequence.forget_all
        sequence.forget_all = self.forget_all

    def begin(self) -> None:
        self._stream = TokenStream(self._model.transformer, self._attention)
        self._tokens: dict[int, int] = {}

    def snapshot(self) -> Any:
        return copy.deepcopy((self._stream, self._tokens))

    def restore(self, snapshot: Any) -> None:
        self._stream, self._tokens = copy.deepcopy(snapshot)

    def append(self, tokens: npt.NDArray[np.int32], check: Any = None, recall: int = 0) -> None:
        self._append(tokens, check, recall)
        position = self._stream.n_past
        self._tokens.update({position + i: int(token) for i, token in enumerate(tokens)})
        expected = self._stream.eval(tokens.tolist())[-1]
        assert np.abs(self._session.llm._context.last_logits() - expected).max() < TOLERANCE
        self.look()

    def forget(self, end: int) -> None:
        self._forget(end)
        self._stream.forget(self._n_sink, end)
        self._tokens = {at: token for at, token in self._tokens.items() if at < self._n_sink or at >= end}

    def forget_all(self) -> None:
        n_past = self._stream.n_past
        self._forget_all()
        self._stream.forget(self._n_sink, n_past)
        self._tokens = {at: token for at, token in self._tokens.items() if at < self._n_sink}

    def truncate(self, n_past: int) -> None:
        self._truncate(n_past)
        if n_past == 0:
            self.begin()
        elif n_past < self._stream.n_past:
            self._stream.remove_tail(n_past)
            self._tokens = {at: token for at, token in self._tokens.items() if at < n_past}

    def look(self) -> None:
        """What the last token sees: the system prompt, whole messages and the beginning of an answer."""
        window_begin = self._stream.n_past - self._n_window
        seen = [token for at, token in sorted(self._tokens.items()) if at < self._n_sink or at >= window_begin]
        text = self._session.llm.detokenize(seen, special=True)
        system = f"<|im_start|>system\n{SYSTEM}{END}"
        assert text.startswith(system)
        is_cut = text[len(system) :].startswith("\n")  # the window begins with the last token of a long message
        *whole, partial = text[len(system) + is_cut :].split(END)
        if not whole and not partial.startswith("<|im_start|>"):  # inside a long answer
            assert len(seen) == self._n_sink + self._n_window
            return
        if whole and not whole[0].startswith("<|im_start|>"):  # the end of a message that the window does not hold
            cut, is_cut = whole.pop(0), True
            assert len(seen) == self._n_sink + self._n_window
            role, content = self.spoken[-1 - len(whole)] if self.spoken else ("", "")
            assert content.endswith(cut) and len(content) + 30 > self._n_window, (role, cut)
        heads = {"user": USER, "assistant": ASSISTANT}
        n = len(whole)
        assert whole == [heads[role] + content for role, content in self.spoken[len(self.spoken) - n :]]
        assert partial.startswith(ASSISTANT)
        roles = [role for role, _ in self.spoken[len(self.spoken) - n :]]
        assert is_cut or "user" not in roles or roles[0] == "user"


class Chat:
    """A session and its witness, driven at random."""

    def __init__(self, session: ChatSession, model: TinyModel) -> None:
        self.session = session
        self.witness = Witness(session, model)
        self.messages: list[dict[str, str]] = []
        self.saved: Any = None

    def _speak(self, begin: Callable[..., Any], question: str, data: st.DataObject) -> None:
        n, n_asked = data.draw(st.integers(1, 60), "n_tokens"), data.draw(st.integers(2, 70), "n_pieces")
        self.witness.spoken = [(m["role"], m["content"]) for m in self.messages] + [("user", question)]
        stop = data.draw(st.sampled_from([None, "e", "th"]), "stop")
        pieces = begin(max_tokens=n, grammar=LETTERS, stop=stop, recall="none")
        text = text_of(itertools.islice(pieces, n_asked))
        del pieces
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        self.check()

    def check(self) -> None:
        assert self.session.messages[1:] == self.messages
        usage = self.session.usage
        assert usage.n_messages == len(self.messages)
        assert self.session.remembered_messages[1:] == self.messages[len(self.messages) - usage.n_messages_remembered :]

    def send(self, data: st.DataObject) -> None:
        length = data.draw(st.sampled_from([1, 5, 20, 50, 70, 75, 200]), "length")
        question = "".join(np.random.default_rng(len(self.messages)).choice(list(string.ascii_uppercase), length))
        self._speak(lambda **options: self.session.send(question, **options), question, data)

    def regenerate(self, data: st.DataObject) -> None:
        if self.messages:
            self.messages.pop()
            question = self.messages.pop()["content"]
            self._speak(self.session.regenerate, question, data)

    def edit(self, data: st.DataObject) -> None:
        if self.messages:
            del self.messages[-2:]
            question = "Q" * data.draw(st.sampled_from([1, 30, 75, 120]), "length")
            self._speak(lambda **options: self.session.edit(question, **options), question, data)

    def save(self, path: Path) -> None:
        self.session.save_state(path)
        self.saved = (self.witness.snapshot(), list(self.messages))

    def load(self, path: Path) -> None:
        if self.saved is not None:
            self.session.load_state(path)
            snapshot, messages = self.saved
            self.witness.restore(snapshot)
            self.messages = list(messages)
            self.check()

    def use_the_model_for_something_else(self) -> None:
        self.session.llm.reset()
        self.session.llm.eval([5, 6, 7])
        self.witness.begin()


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model with sliding layers, whose tail cannot be cut far."""
    return write_tiny_model(tmp_path_factory.mktemp("sliding") / "gemma3.gguf", SLIDING_AND_FULL["gemma3"], seed=1)


@pytest.mark.parametrize(("name", "stores"), [("head_32", False), ("sliding", False), ("head_32", True)])
@given(data=st.data())
@settings(max_examples=20)
@pytest.mark.filterwarnings("default:.*cannot be looked up any more")
def test_any_history(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    stores: bool,
    data: st.DataObject,
) -> None:
    """Messages of any length, answers taken back or stopped: always whole messages, and the reference's logits."""
    model: TinyModel = request.getfixturevalue(name)
    path = tmp_path_factory.getbasetemp() / f"{name}-{stores}.state"
    with open_tiny(model, middle=MiddleConfig(layers=(0, None), cache_type="f32") if stores else None) as session:
        chat = Chat(session, model)
        for _ in range(data.draw(st.integers(1, 12), "n_operations")):
            action = data.draw(st.sampled_from(["send"] * 4 + ["regenerate", "edit", "save", "load", "else"]), "action")
            if action in ("save", "load"):
                getattr(chat, action)(path)
            elif action == "else":
                chat.use_the_model_for_something_else()
            else:
                getattr(chat, action)(data)


def test_only_its_own_tokens_are_read(real: ChatSession) -> None:
    """With its answer closed: no turn reads anything again, also long after the window is full."""
    real.reset()
    question = "Tell me something about the sea, please."
    n_question = len(real.llm._chat_format.segments([real.messages[0], {"role": "user", "content": question}])[1])
    n_closing, n_prompt = 2, 4
    for turn in range(9):
        answer = real.send(question, stream=False, max_tokens=20, temperature=0)
        expected = n_question + n_prompt + (n_closing if turn else len(real._conversation.pinned))
        assert answer["usage"]["prompt_tokens"] == expected
    usage = real.usage
    assert usage.n_messages == 18
    assert usage.n_tokens_forgotten > 128
    assert usage.n_tokens_remembered + usage.n_tokens_forgotten == usage.n_tokens
    assert 2 <= usage.n_messages_remembered == len(real.remembered_messages) - 1 < 18
    assert real.messages[0] == {"role": "system", "content": "You are a helpful assistant."}


def test_it_goes_on_as_if_the_conversation_had_been_read_at_once(default_model: Path) -> None:
    with ChatSession.open(default_model, system="Be brief.", n_window=512) as session:
        session.send("Name a colour.", stream=False, max_tokens=12, temperature=0)
        session.send("And another one.", stream=False, max_tokens=12, temperature=0)
        turn_by_turn = session.llm._context.last_logits()
        at_once = list(session.llm._chat_format.tokens(session.messages, add_generation_prompt=False))
        n_closing = len(session._format.closing) if not session._conversation.messages[-1].closed else 0
    with Llama(default_model) as llm:
        logits = llm.eval(at_once[: len(at_once) - n_closing])
    assert np.corrcoef(logits[-1], turn_by_turn)[0, 1] > 0.999


# --- the last turn once more


def test_a_long_answer_is_taken_back_exactly(head_32: TinyModel) -> None:
    """Far beyond n_rollback, with the window full: nothing is read again but the beginning of the answer."""
    with open_tiny(head_32) as session:
        for _ in range(6):
            session.send("ABCDE", stream=False, max_tokens=10, grammar=LETTERS)
        options: dict[str, Any] = {"stream": False, "max_tokens": 60, "logit_bias": dict.fromkeys(range(3), -100.0)}
        first = session.send("FGHIJ", seed=3, **options)
        again = session.regenerate(seed=4, **options)
        assert first["usage"]["completion_tokens"] == again["usage"]["completion_tokens"] == 60
        assert again["usage"]["prompt_tokens"] == len(session._format.prompt)
        assert len(session.messages) == 1 + 14


def test_the_same_seed_answers_the_same(real: ChatSession) -> None:
    real.reset()
    options: dict[str, Any] = {"stream": False, "max_tokens": 10}
    first = real.send("Name three animals.", seed=1, **options)
    other = real.regenerate(seed=2, **options)
    again = real.regenerate(seed=1, **options)
    assert first["choices"] == again["choices"] != other["choices"]
    edited = real.edit("Name three plants.", seed=1, **options)
    assert real.messages[1:] == [
        {"role": "user", "content": "Name three plants."},
        {"role": "assistant", "content": edited["choices"][0]["message"]["content"]},
    ]


def test_nothing_to_take_back(real: ChatSession) -> None:
    real.reset()
    with pytest.raises(StateError, match="nothing has been said"):
        real.regenerate()
    with pytest.raises(StateError, match="nothing has been said"):
        real.edit("text")


# --- answers that end early


def test_a_stopped_answer_stays_as_far_as_it_went(real: ChatSession) -> None:
    real.reset()
    pieces = real.send("Write a long story.", max_tokens=-1, logit_bias={2: -100.0})
    begun = text_of(itertools.islice(pieces, 10))
    del pieces
    assert real.messages[-1] == {"role": "assistant", "content": begun}
    real.send("Go on.", stream=False, max_tokens=5)
    assert [message["role"] for message in real.messages] == ["system"] + ["user", "assistant"] * 2
    assert real.messages[2]["content"] == begun


INTERRUPTED = """
import signal, sys, threading, time
from lminf_edge import ChatSession

session = ChatSession.open(sys.argv[1], system="Be brief.", n_window=256, seed=0)
text = "The sea was calm, and the ship sailed on towards the south. " * int(sys.argv[2])
threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGINT)).start()
try:
    for piece in session.send(text, max_tokens=-1, logit_bias={2: -100.0}):
        pass
except KeyboardInterrupt:
    print("interrupted", session.llm.n_past)
session.send("What was that?", stream=False, max_tokens=8)
assert [message["role"] for message in session.messages[1:]] == ["user", "assistant"] * 2
assert session.messages[1]["content"] == text
print(session.llm.detokenize(session._conversation.unread(0), special=True).count("<|im_start|>"))
"""


@pytest.mark.parametrize("n_sentences", [1, 40])
def test_ctrl_c_while_it_answers_or_still_reads_leaves_a_valid_conversation(
    default_model: Path, n_sentences: int
) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(default_model), str(n_sentences)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("interrupted")


def test_an_answer_of_another_call_is_not_continued(real: ChatSession) -> None:
    real.reset()
    pieces = real.send("Count to a hundred.", max_tokens=-1, logit_bias={2: -100.0})  # no end
    begun = text_of(itertools.islice(pieces, 6))
    real.send("Stop.", stream=False, max_tokens=4)
    with pytest.raises(StateError, match="another call"):
        list(pieces)
    assert real.messages[2]["content"] == begun


def test_something_else_may_use_the_model_in_between(real: ChatSession) -> None:
    real.reset()
    real.send("Name a colour.", stream=False, max_tokens=8)
    real.llm.create_completion("Once upon a time", max_tokens=4)
    answer = real.send("Another one.", stream=False, max_tokens=8)
    n_read = answer["usage"]["prompt_tokens"]
    assert n_read == real.usage.n_tokens - answer["usage"]["completion_tokens"]
    # a sequence with a hole is nobody's beginning
    for _ in range(4):
        real.send("Tell me more about that, please.", stream=False, max_tokens=25)
    assert real.usage.n_messages_remembered < real.usage.n_messages
    tokens = real._conversation.unread(0)[:30]
    after_chat = real.llm.create_completion(tokens, max_tokens=12, temperature=0)
    real.llm.reset()
    assert real.llm.create_completion(tokens, max_tokens=12, temperature=0)["choices"] == after_chat["choices"]


def test_answers_end_where_they_should(real: ChatSession) -> None:
    real.reset()
    counted = real.send("Count.", stream=False, max_tokens=30, grammar='root ::= "one two three four"')
    assert counted["choices"][0]["message"]["content"] == "one two three four"
    stopped = real.regenerate(stream=False, max_tokens=30, grammar='root ::= "one two three four"', stop="thr")
    assert stopped["choices"][0]["message"]["content"] == "one two "
    tokens = real._conversation.messages[-1].tokens[len(real._format.prompt) :]
    assert real.llm.detokenize(tokens) == "one two "
    looping = real.regenerate(stream=False, max_tokens=-1, grammar='root ::= "la "+', stop_on_loop=True)
    assert looping["choices"][0]["finish_reason"] == "stop"


def test_penalties_count_what_is_remembered(real: ChatSession) -> None:
    real.reset()
    options: dict[str, Any] = {"stream": False, "max_tokens": 8, "temperature": 0, "grammar": 'root ::= "blue" | "red"'}
    first = real.send("Say a colour.", **options)["choices"][0]["message"]["content"]
    other = {"blue": "red", "red": "blue"}[first]
    penalty: dict[str, Any] = {"presence_penalty": 50.0, "penalty_last_n": 256}
    assert real.send("Go on.", **options, **penalty)["choices"][0]["message"]["content"] == other


def test_asyncio(real: ChatSession) -> None:
    real.reset()

    async def ask() -> str:
        return "".join([text_of([piece]) async for piece in real.asend("Name a colour.", max_tokens=8)])

    assert asyncio.run(ask()) == real.messages[-1]["content"] != ""


# --- long messages


def test_a_message_longer_than_the_window_is_read_to_its_end(real: ChatSession) -> None:
    real.reset()
    real.send("Hello!", stream=False, max_tokens=8)
    text = "The sea was calm, and the ship sailed on towards the south. " * 20
    n_text = len(real.llm.tokenize(text, add_bos=False))
    answer = real.send(text + "The password is swordfish.", stream=False, max_tokens=8)
    assert answer["usage"]["prompt_tokens"] > n_text > 256
    assert real.usage.n_tokens_forgotten > n_text - 128
    assert [message["role"] for message in real.remembered_messages] == ["system", "user", "assistant"]
    seen = real.llm.detokenize(real._conversation.unread(real.llm.n_past - 60), special=True)
    assert "The password is swordfish.<|im_end|>" in seen


# --- what is pinned


def test_the_system_prompt_is_the_sink_tokens(default_model: Path) -> None:
    system = "You are a pirate, and answer in rhymes. " * 5
    with ChatSession.open(default_model, system=system, n_window=512) as session:
        config = session.llm.config
        assert config is not None
        pinned = session.llm.tokenize(f"<|im_start|>system\n{system}<|im_end|>\n", special=True)
        assert session._format.pinned == pinned
        assert config.n_sink == len(pinned) == session.usage.n_tokens_pinned
        assert (config.sink_order, config.n_clamp) == ("kept", len(pinned) + 511)


def test_a_llama_whose_sink_tokens_do_not_fit_is_refused_with_what_would(default_model: Path) -> None:
    too_few = LMInfConfig(n_window=256)
    reason = r"n_sink=8, sink_order='kept'"
    with Llama(default_model, lminf=too_few) as llm, pytest.raises(ConfigError, match=reason):
        ChatSession(llm, system="Be brief.")
    fitting = LMInfConfig(n_sink=8, n_window=256, n_clamp=263, sink_order="kept")
    with Llama(default_model, lminf=fitting) as llm, ChatSession(llm, system="Be brief.") as session:
        session.send("Hello!", stream=False, max_tokens=2)
    with Llama(default_model) as llm, pytest.raises(ConfigError, match="LMInfConfig"):
        ChatSession(llm, system="Be brief.")


def test_wrong_input(default_model: Path, real: ChatSession) -> None:
    wrong_types: list[dict[str, Any]] = [{"n_windows": 5}, {"tools": "weather"}, {"system": 5}]
    for options in wrong_types:
        with pytest.raises(TypeError):
            ChatSession.open(default_model, **options)
    wrong: list[dict[str, Any]]
    wrong = [{"n_window": 0}, {"lminf": LMInfConfig()}, {"system": "word " * 9000}]
    for options in wrong:
        with pytest.raises(ConfigError):
            ChatSession.open(default_model, **options)
    before = real.messages
    with pytest.raises(TypeError, match=r"send\(\) got an unexpected keyword argument 'tools'"):
        real.send("Hello!", tools=[])  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="grammar"):
        real.send("Hello!", grammar="root ::= [")
    with pytest.raises(TypeError):
        real.send(5)  # type: ignore[call-overload]
    assert real.messages == before
