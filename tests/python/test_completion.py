"""Completions and answers in a chat, as the OpenAI API and llama-cpp-python have them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from completing import QUESTION, banned, text_of
from lminf_edge import ConfigError, ContextError, Llama, StateError, UnsupportedModelError
from lminf_edge.chat_prompt import ChatFormat
from lminf_edge.completion_types import SamplingParams
from lminf_edge.history import TokenHistory
from lminf_edge.sampling import SamplingOptions
from tiny_models import TinyModel

# --- shape


def test_a_completion_has_the_openai_shape(real: Llama) -> None:
    completion = real.create_completion("The capital of France is", max_tokens=4, temperature=0)
    assert json.loads(json.dumps(completion)) == completion
    assert completion["id"].startswith("cmpl-")
    assert completion["object"] == "text_completion"
    assert completion["model"].endswith(".gguf")
    assert completion["choices"] == [
        {"text": " Paris.\n\n", "index": 0, "logprobs": None, "finish_reason": "length"},
    ]
    assert completion["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def test_the_pieces_of_a_stream_are_the_completion(real: Llama) -> None:
    options: Any = {"max_tokens": 12, "temperature": 0, "model": "mine"}
    whole = real.create_completion("Once upon a time", **options)
    pieces = list(
        real.create_completion("Once upon a time", stream=True, stream_options={"include_usage": True}, **options)
    )
    *pieces, usage = pieces
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert len(pieces) > 6
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert {piece["id"] for piece in pieces} == {usage["id"]}
    assert whole["model"] == usage["model"] == "mine"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert not any("usage" in piece for piece in pieces)


def test_an_answer_has_the_openai_shape(real: Llama) -> None:
    answer = real.create_chat_completion(QUESTION, max_tokens=5, temperature=0)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    prompt = real._chat_format.tokens(QUESTION)
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 5,
        "total_tokens": len(prompt) + 5,
    }


def test_the_pieces_of_an_answer_begin_with_the_role_and_end_with_the_reason(real: Llama) -> None:
    options: Any = {"max_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True}}
    whole = real.create_chat_completion(QUESTION, max_tokens=8, temperature=0)
    *pieces, usage = real.create_chat_completion(QUESTION, stream=True, **options)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert usage["usage"] == whole["usage"]


def test_an_answer_ends_where_the_model_ends_it(real: Llama) -> None:
    bias = {real.tokenize("<|im_end|>", special=True)[0]: 100.0}
    answer = real.create_chat_completion(QUESTION, logit_bias=bias)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 0


def test_programs_for_llama_cpp_python_find_what_they_call(real: Llama) -> None:
    output = real("Q: Name the planets. A: ", max_tokens=6, stop=["Q:", "\n"], echo=True)
    assert output["choices"][0]["text"].startswith("Q: Name the planets. A: ")
    streamed = real("Q: A: ", max_tokens=4, echo=True, stream=True, temperature=0)
    assert "".join(piece["choices"][0]["text"] for piece in streamed).startswith("Q: A: ")


# --- where a text ends


def test_a_stop_string_over_token_borders_ends_a_text_and_does_not_leak(real: Llama) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7, 8,"
    free = text_of(real, prompt, max_tokens=16, temperature=0)
    stop = free[3:8]
    assert len(real.tokenize(stop, add_bos=False)) > 2
    pieces = list(real.create_completion(prompt, max_tokens=16, temperature=0, stop=stop, stream=True))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == free[:3]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert text_of(real, prompt, max_tokens=16, temperature=0, stop=["never", stop]) == free[:3]
    assert text_of(real, prompt, max_tokens=16, temperature=0, stop="never") == free


def test_half_a_character_is_held_back(tiny: Llama) -> None:
    first, _ = tiny.tokenize("é", add_bos=False)
    forced = {first: 1000.0}
    (piece,) = tiny.create_completion("abc", max_tokens=1, logit_bias=forced, stream=True)
    assert piece["choices"][0]["text"] == "\ufffd"  # the text ends in the middle of a character
    grammar = 'root ::= "é" "ü" "z"'
    texts = [
        piece["choices"][0]["text"]
        for piece in tiny.create_completion("abc", max_tokens=5, grammar=grammar, logit_bias=banned(tiny), stream=True)
    ]
    assert texts == ["é", "ü", "z"]


def test_max_tokens_of_minus_one_is_a_text_without_end(tiny: Llama) -> None:
    endless = tiny.create_completion("abc", max_tokens=-1, logit_bias=banned(tiny), stream=True)
    assert sum(1 for _ in itertools.islice(endless, 300)) == 300
    assert tiny.n_past > 300


def test_a_text_that_repeats_itself_ends_on_request(tiny: Llama) -> None:
    bias = {tiny.tokenize("z", add_bos=False)[0]: 500.0}
    completion = tiny.create_completion("abc", max_tokens=90, stop_on_loop=True, logit_bias=bias)
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] == 64
    assert tiny.create_completion("abc", max_tokens=70, logit_bias=bias)["usage"]["completion_tokens"] == 70


def test_a_prompt_longer_than_the_window_is_read_through(tiny: Llama) -> None:
    completion = tiny.create_completion("abc " * 200, max_tokens=2, logit_bias=banned(tiny))
    assert completion["usage"]["prompt_tokens"] > 3 * 64
    assert tiny.n_past == completion["usage"]["total_tokens"]


def test_plain_llama_cpp_writes_until_its_context_is_full(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        bias = banned(llm)
        completion = llm.create_completion([5] * 250, max_tokens=-1, logit_bias=bias)
        assert completion["choices"][0]["finish_reason"] == "length"
        assert completion["usage"]["total_tokens"] == 256
        with pytest.raises(ContextError, match="context is full"):
            llm.create_completion([5] * 256)
        assert llm.create_completion([5] * 200, max_tokens=9, logit_bias=bias)["usage"]["completion_tokens"] == 9


# --- sampling


def test_a_seed_makes_a_completion_repeatable(tiny: Llama) -> None:
    options: Any = {"max_tokens": 20, "top_k": 0, "temperature": 1.0}
    assert text_of(tiny, "abc", seed=1, **options) == text_of(tiny, "abc", seed=1, **options)
    assert text_of(tiny, "abc", seed=1, **options) != text_of(tiny, "abc", seed=2, **options)


def test_a_bias_forces_and_forbids_tokens(tiny: Llama) -> None:
    (letter,) = tiny.tokenize("z", add_bos=False)
    assert text_of(tiny, "abc", max_tokens=5, logit_bias={letter: 500.0}) == "zzzzz"
    assert text_of(tiny, "abc", max_tokens=5, logit_bias={str(letter): 500}) == "zzzzz"
    tiny.reset()
    (greedy,) = tiny.generate("abc", max_tokens=1, temperature=0, n_top_logprobs=2)
    tiny.reset()
    (without,) = tiny.generate("abc", max_tokens=1, temperature=0, logit_bias={greedy.token: -500.0})
    assert [token for token, _ in greedy.top_logprobs] == [greedy.token, without.token]


def test_penalties_reach_the_sampler(real: Llama) -> None:
    prompt = "one two one two one two one two"
    repeating = text_of(real, prompt, temperature=0, max_tokens=12)
    for penalty in ({"repeat_penalty": 5.0}, {"frequency_penalty": 10.0}, {"presence_penalty": 20.0}):
        assert text_of(real, prompt, temperature=0, max_tokens=12, **penalty) != repeating


# --- log-probabilities


def test_log_probabilities_are_those_of_the_model(tiny: Llama) -> None:
    prompt = tiny.tokenize("abc")
    logprobs = tiny.create_completion(prompt, max_tokens=6, temperature=0, logit_bias=banned(tiny), logprobs=3)[
        "choices"
    ][0]["logprobs"]
    assert logprobs is not None
    drawn = [int(token) for token in tiny._sequence._history._tokens or ()][len(prompt) :]
    tiny.reset()
    logits = tiny.eval(prompt + drawn)[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs["token_logprobs"], expected[np.arange(6), drawn], atol=1e-4)
    for row, top in zip(expected, logprobs["top_logprobs"], strict=True):
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][: len(top)], atol=1e-4)
    assert [len(top) for top in logprobs["top_logprobs"]].count(3) >= 4  # fewer where two tokens are spelled alike


def test_log_probabilities_come_with_their_text(real: Llama) -> None:
    options: Any = {"max_tokens": 10, "temperature": 0, "logprobs": 0}
    choice = real.create_completion("The sea, the sea", **options)["choices"][0]
    assert choice["logprobs"] is not None
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    offsets = choice["logprobs"]["text_offset"]
    assert [choice["text"][begin:end] for begin, end in itertools.pairwise([*offsets, None])] == (
        choice["logprobs"]["tokens"]
    )
    pieces = list(real.create_completion("The sea, the sea", stream=True, **options))
    streamed = [piece["choices"][0]["logprobs"] for piece in pieces]
    assert [offset for logprobs in streamed if logprobs for offset in logprobs["text_offset"]] == offsets


def test_log_probabilities_of_an_answer_name_tokens_and_bytes(real: Llama) -> None:
    answer = real.create_chat_completion(QUESTION, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer["choices"][0]
    assert choice["logprobs"] is not None
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == choice["message"]["content"]
    for token in content:
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert math.isclose(token["top_logprobs"][0]["logprob"], token["logprob"], abs_tol=1e-6)
        assert len(token["top_logprobs"]) == 2
    streamed = list(real.create_chat_completion(QUESTION, max_tokens=5, temperature=0, logprobs=True, stream=True))
    assert sum(len((piece["choices"][0]["logprobs"] or {"content": []})["content"]) for piece in streamed) == 5


# --- one call after the other


def n_decoded(llm: Llama, prompt: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tokens of a prompt are computed."""
    counted: list[int] = []
    append = llm._sequence.append

    def count(tokens: Any, *options: Any) -> None:
        counted.append(len(tokens))
        append(tokens, *options)

    monkeypatch.setattr(llm._sequence, "append", count)
    list(llm.create_completion(prompt, max_tokens=1, stream=True))
    monkeypatch.undo()
    return counted[0]


def test_a_common_beginning_is_not_computed_again(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tiny.tokenize("The quick brown fox jumps over the lazy dog. " * 12)
    assert n_decoded(tiny, prompt, monkeypatch) == len(prompt)
    assert n_decoded(tiny, prompt, monkeypatch) == 1
    assert n_decoded(tiny, [*prompt, 5, 6, 7], monkeypatch) == 3
    assert n_decoded(tiny, [*prompt[:-5], 8, 9], monkeypatch) == 2
    assert n_decoded(tiny, prompt[:30], monkeypatch) == 30  # further back than the window can give back


@pytest.mark.parametrize("second", ["the same", "longer", "shorter", "another"])
def test_a_call_computes_its_own_prompt_whatever_was_there(tiny: Llama, second: str) -> None:
    first = tiny.tokenize("The quick brown fox jumps over the lazy dog. " * 12)
    prompt = {
        "the same": first,
        "longer": [*first, 9, 8, 7],
        "shorter": first[:-4],
        "another": [7, *first],
    }[second]
    options: Any = {"max_tokens": 8, "temperature": 0, "logprobs": 0, "logit_bias": banned(tiny)}
    expected = tiny.create_completion(prompt, **options)["choices"][0]
    tiny.reset()
    tiny.create_completion(first, **options)
    found = tiny.create_completion(prompt, **options)["choices"][0]
    assert found["text"] == expected["text"]
    assert found["logprobs"] is not None and expected["logprobs"] is not None
    assert found["logprobs"]["token_logprobs"] == expected["logprobs"]["token_logprobs"]


def test_an_abandoned_stream_leaves_the_object_usable(tiny: Llama) -> None:
    expected = text_of(tiny, "abc", max_tokens=6, temperature=0)
    stream = tiny.create_completion("xyz", max_tokens=50, logit_bias=banned(tiny), stream=True)
    next(stream)
    assert text_of(tiny, "abc", max_tokens=6, temperature=0) == expected
    with pytest.raises(StateError, match="another call"):
        list(stream)
    assert text_of(tiny, "abc", max_tokens=6, temperature=0) == expected


def test_the_end_of_a_sequence_can_be_removed(tiny: Llama) -> None:
    tokens = tiny.tokenize("The quick brown fox jumps over the lazy dog. " * 12)
    expected = tiny.eval([*tokens[:-10], 5])[-1]
    tiny.reset()
    tiny.eval(tokens)
    tiny.truncate(len(tokens) - 10)
    assert tiny.n_past == len(tokens) - 10
    np.testing.assert_array_equal(tiny.eval([5])[-1], expected)
    tiny.truncate(tiny.n_past)  # removes nothing
    with pytest.raises(StateError, match="cannot be removed exactly"):
        tiny.truncate(20)
    with pytest.raises(ConfigError, match="n_past"):
        tiny.truncate(tiny.n_past + 1)
    with pytest.raises(ConfigError, match="n_past"):
        tiny.truncate(-1)
    assert tiny.n_past == len(tokens) - 9
    list(tiny.generate(max_tokens=1, stop_at_end=False))  # the refusals have left the logits where they were
    tiny.truncate(0)
    assert tiny.n_past == 0
    with pytest.raises(StateError, match="no logits"):
        tiny._sequence.context.last_logits()


def test_the_end_of_a_very_long_sequence_can_be_removed(tiny: Llama) -> None:
    far = 2**40
    tiny.eval(range(5, 100))
    assert tiny._context.test_set_position(far)
    tiny.eval(range(5, 100))
    expected = tiny.eval([7])[-1]
    tiny.truncate(far + 90)
    assert tiny.n_past == far + 90
    np.testing.assert_array_equal(tiny.eval([*range(95, 100), 7])[-1], expected)


def test_the_end_of_a_plain_context_can_be_removed(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        expected = llm.eval([5, 6, 7])[-1]
        llm.eval(range(5, 100))
        llm.truncate(2)
        np.testing.assert_allclose(llm.eval([7])[-1], expected, atol=1e-4)
        assert llm.n_past == 3


FEW_TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(st.lists(st.tuples(FEW_TOKENS, st.integers(0, 30)), max_size=4), FEW_TOKENS)
def test_the_history_knows_what_is_common(changes: list[tuple[list[int], int]], prompt: list[int]) -> None:
    history, sequence = TokenHistory(n_max=20), np.empty(0, np.int32)
    too_long = False
    for appended, n_past in changes:
        history.append(np.array(appended, np.int32))
        sequence = np.concatenate([sequence, np.array(appended, np.int32)])
        too_long = too_long or len(sequence) > 20
        if n_past < len(sequence):
            history.truncate(n_past)
            sequence = sequence[:n_past]
            too_long = too_long and n_past > 0
    common = next((n for n, pair in enumerate(zip(sequence, prompt, strict=False)) if pair[0] != pair[1]), None)
    expected = min(len(sequence), len(prompt)) if common is None else common
    assert history.n_common(np.array(prompt, np.int32), len(sequence)) == (0 if too_long else expected)
    assert history.n_common(np.array(prompt, np.int32), len(sequence) + 1) == 0


# --- wrong input

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_tokens": 0}, ConfigError, "max_tokens = 0"),
    ({"max_tokens": -2}, ConfigError, "max_tokens = -2"),
    ({"max_tokens": "5"}, ConfigError, "max_tokens = '5'"),
    ({"temperature": -1}, ConfigError, "temperature"),
    ({"seed": -1}, ConfigError, "seed"),
    ({"stop": ""}, ConfigError, "stop"),
    ({"stop": 5}, TypeError, "stop"),
    ({"logit_bias": [1]}, TypeError, "logit_bias"),
    ({"logit_bias": {"a": 1}}, ConfigError, "logit_bias"),
    ({"logit_bias": {5: "x"}}, ConfigError, "logit_bias"),
    ({"logit_bias": {5: math.inf}}, ConfigError, "logit_bias"),
    ({"logit_bias": {10**6: 1}}, ConfigError, "outside the vocabulary"),
    ({"grammar": 5}, TypeError, "grammar"),
    ({"grammar": 'root ::= "a\0"'}, ConfigError, "zero character"),
    ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, ConfigError, "one of them"),
    ({"response_format": "json"}, TypeError, "response_format"),
    ({"response_format": {"type": "xml"}}, ConfigError, "xml"),
    ({"response_format": {"type": "json_schema"}}, ConfigError, "json_schema"),
    ({"response_format": {"type": "json_object", "schema": 5}}, TypeError, "schema"),
    ({"stop_on_loop": 1}, ConfigError, "stop_on_loop"),
    ({"stream_options": {"usage": True}}, ConfigError, "stream_options"),
    ({"model": 5}, TypeError, "model"),
    ({"stream": "yes"}, ConfigError, "stream = 'yes'"),
    ({"temprature": 1}, TypeError, "unexpected keyword argument 'temprature'"),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=[str(list(row[0].items())) for row in WRONG])
def test_wrong_options_are_refused_before_anything_is_computed(
    tiny: Llama, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    create: Any = tiny.create_completion
    chat: Any = tiny.create_chat_completion
    calls: list[Callable[[], object]] = [
        lambda: create("abc", **options),
        lambda: create("abc", **{"stream": True, **options}),
        lambda: chat(QUESTION, **options),
        lambda: chat(QUESTION, **{"stream": True, **options}),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
    assert tiny.n_past == 0


def test_wrong_prompts_and_combinations_are_refused(tiny: Llama) -> None:
    create: Any = tiny.create_completion
    chat: Any = tiny.create_chat_completion
    wrong: Any
    for wrong in ("", [], [10**6]):
        with pytest.raises(ConfigError):
            create(wrong)
    for wrong in (b"abc", 5, ["abc"], None):
        with pytest.raises(TypeError):
            create(wrong)
    with pytest.raises(ConfigError, match="echo and logprobs"):
        create("abc", echo=True, logprobs=1)
    with pytest.raises(ConfigError, match="top_logprobs"):
        chat(QUESTION, top_logprobs=1)
    with pytest.raises(ConfigError, match="takes none"):
        chat(QUESTION, tools=[{"type": "function"}])
    with pytest.raises(TypeError, match="echo"):
        chat(QUESTION, echo=True)
    assert tiny.n_past == 0


def test_tools_reach_the_model_s_template(tiny: Llama) -> None:
    class WithTools:
        chat_template = "{{ messages[0].content }}{{ tools[0].function.name }}"

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny._model, name)

    model: Any = WithTools()
    vars(tiny)["_chat_format"] = ChatFormat(model)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    answer = tiny.create_chat_completion(QUESTION, tools=tools, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(tiny.tokenize(QUESTION[0]["content"] + "weather"))


def test_a_model_without_a_template_says_what_to_do(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutTemplate:
        chat_template = None

    monkeypatch.setattr("lminf_edge.chat_prompt._spelling", lambda model, token: "")
    without: Any = WithoutTemplate()
    with pytest.raises(UnsupportedModelError, match="chat_format: .*chatml"):
        ChatFormat(without)


def test_every_option_is_documented_and_typed() -> None:
    assert set(SamplingParams.__annotations__) == set(SamplingOptions.__dataclass_fields__)
    for name in SamplingParams.__annotations__:
        assert f"{name}:" in (SamplingOptions.__doc__ or "")
