"""A text follows a grammar or a JSON schema, and a wrong one is an error in words."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from completing import QUESTION, banned, text_of
from lminf_edge import ConfigError, Llama, StateError
from lminf_edge.grammar import json_schema_grammar


def test_a_grammar_is_followed(tiny: Llama) -> None:
    for seed in range(5):
        text = text_of(tiny, "abc", grammar='root ::= ("yes" | "no") [0-9]{2} "é"', max_tokens=30, seed=seed)
        assert text[:-3] in ("yes", "no") and text[-3:-1].isdigit() and text.endswith("é")


def test_a_grammar_that_is_complete_ends_the_text(tiny: Llama) -> None:
    completion = tiny.create_completion("abc", grammar='root ::= "yes"', max_tokens=30)
    assert completion["choices"][0] == {"text": "yes", "index": 0, "logprobs": None, "finish_reason": "stop"}


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{0,11}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/id"}]},
    },
    "required": ["name", "age", "tags", "parent"],
    "additionalProperties": False,
    "$defs": {"id": {"type": "string", "pattern": "^[a-f]{3}$"}},
}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    ],
    ids=["llama-cpp-python", "OpenAI"],
)
def test_json_of_a_schema(tiny: Llama, response_format: dict[str, Any]) -> None:
    for seed in range(3):
        options: Any = {"seed": seed, "temperature": 1.5, "top_k": 0, "max_tokens": 400}
        answer = tiny.create_chat_completion(QUESTION, response_format=response_format, **options)
        value = json.loads(answer["choices"][0]["message"]["content"])
        assert list(value) == ["name", "age", "tags", "parent"]
        assert value["name"].isalpha() and len(value["name"]) <= 12 and 1 <= value["age"] <= 120
        assert set(value["tags"]) <= {"a", "b"}
        assert value["parent"] is None or set(value["parent"]) <= set("abcdef")


def test_json_without_a_schema_is_an_object(real: Llama) -> None:
    text = text_of(real, "JSON:", response_format={"type": "json_object"}, temperature=0, max_tokens=12)
    assert text.lstrip().startswith("{")


BAD_GRAMMARS = {
    "not closed": ('root ::= "a', "unexpected end"),
    "no root": ('start ::= "a"', "no rule root"),
    "undefined": ("root ::= other", "rule other is not defined"),
    "left recursion": ('root ::= root "a" | "b"', "left-recursive"),
    "hidden left recursion": ('root ::= b root "y" | "z"\nb ::= c\nc ::= ""', "root is left-recursive"),
    "deep": ("root ::= " + "(" * 100_000, "nested"),
    "many repetitions": ('root ::= "a"{100000}', "repetitions"),
    "huge number": ('root ::= "a"{99999999999999999999999}', "grammar"),
    "no rule at all": ("# nothing", "no rule root"),
    "prose": ("Please answer politely.", "grammar"),
    "unknown token": ("root ::= <|nosuch|>", "invalid token"),
}


@pytest.mark.parametrize(("grammar", "words"), BAD_GRAMMARS.values(), ids=BAD_GRAMMARS.keys())
def test_a_bad_grammar_is_refused_in_words(
    tiny: Llama, capfd: pytest.CaptureFixture[str], grammar: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny.create_completion("abc", grammar=grammar)
    assert capfd.readouterr() == ("", "")
    assert tiny.n_past == 0


def test_good_grammars_pass_the_check(tiny: Llama) -> None:
    for grammar in ('\n# comment\n\nroot ::= a*\na ::= "("{300} | b?\nb ::= ("x"*)*', 'root ::= "a" root | ""'):
        text_of(tiny, "abc", grammar=grammar, max_tokens=2)


GRAMMAR_PARTS = st.sampled_from(
    (
        *(
            "a",
            "b",
            "root",
            " ",
            '"x"',
            '"é"',
            "[a-z]",
            "[^a]",
            ".",
            "*",
            "+",
            "?",
            "{2}",
            "{0,3}",
            "(",
            ")",
            "|",
            '""',
        ),
        *('""', "<[5]>", "!<[5]>", "# c\n", "\\", '"', "[", "{1,", "\\x41", "::=", "\n", "[]", "[z-a]"),
    )
)
ALTERNATES = st.lists(GRAMMAR_PARTS, max_size=8).map("".join)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ALTERNATES, ALTERNATES, ALTERNATES)
def test_no_grammar_ends_the_process(tiny: Llama, root: str, a: str, b: str) -> None:
    with contextlib.suppress(ConfigError, StateError):
        tiny.create_completion([5, 6, 7], grammar=f"root ::= {root}\na ::= {a}\nb ::= {b}", max_tokens=4)


def test_a_grammar_that_leaves_no_token_is_an_error_and_not_the_end_of_the_process(tiny: Llama) -> None:
    (end,) = tiny.tokenize("<|im_end|>", special=True)
    with pytest.raises(StateError, match="grammar allows no token"):
        # the vocabulary has no token that is followed by what the grammar wants
        tiny.create_completion("abc", grammar=f'root ::= <[{end}]> "a"', max_tokens=5)
    assert len(text_of(tiny, "abc", max_tokens=3, logit_bias=banned(tiny))) > 0


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nosuch"}, "unrecognized type"),
        ({"$ref": "https://example.com/schema"}, "unsupported \\$ref"),
        ({"$ref": "#/$defs/missing"}, "cannot resolve"),
        ({"type": "string", "pattern": "abc"}, "pattern"),
        ({"type": "array", "items": {"not": {}}}, "#/items: 'not' is not supported"),
        ({"type": "number", "minimum": 1}, "'minimum' of a number"),
        ({"properties": {"a": {"multipleOf": 2}}}, "#/properties/a: 'multipleOf'"),
        ({"type": "object", "properties": 5}, "properties must be"),
        ({"anyOf": [{"required": []}], "properties": {}}, "'properties' beside 'anyOf'"),
        ({"properties": {"a": {}}, "required": ["b"]}, "requiring 'b'"),
        ({"type": "string", "pattern": "^\\d+$"}, "pattern"),
        ({"type": "string", "pattern": "^(a$"}, "Invalid pattern"),
        ({"type": {1}}, "no JSON"),
        ({"maximum": math.nan}, "no JSON"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        json_schema_grammar(schema)


@pytest.mark.parametrize("depth", [300, 600, 900, 5000])
def test_a_deep_schema_is_converted_or_refused(depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with contextlib.suppress(ConfigError):
        assert "root ::=" in json_schema_grammar(schema)


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    assert '"\\"not\\""' in json_schema_grammar({"properties": {"not": {"type": "integer"}}})
