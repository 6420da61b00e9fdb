"""What a text has to look like: from a response_format to a grammar (GBNF) that llama.cpp's sampler follows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lminf_edge._checks import check_choice
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError

_NOT_ENFORCED = frozenset(
    (
        *("not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependencies"),
        *("dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef"),
    )
)
"""Keywords of JSON Schema that restrict a value and that llama.cpp's converter passes over."""

_NOT_ENFORCED_FOR_NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))

_ALONE = ("$ref", "oneOf", "anyOf", "allOf")
"""Where one of these stands, the converter looks at nothing else of the following."""

_STRUCTURE = frozenset(
    (
        *_ALONE,
        *("properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
        *("enum", "const", "pattern", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    )
)

_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPPINGS_OF_SCHEMAS = ("properties", "$defs", "definitions")


def json_schema_grammar(schema: Mapping[str, object]) -> str:
    """The grammar of all JSON texts that a schema allows, with properties in the schema's order.

    The conversion is llama.cpp's. Restrictions that it would pass over are refused here instead.

    Args:
        schema: A JSON Schema as Python data.

    Returns:
        GBNF with a rule named root.

    Raises:
        TypeError: The schema is no mapping.
        ConfigError: It is no JSON, or uses something that a grammar does not enforce.
    """
    if not isinstance(schema, Mapping):
        raise TypeError(f"a JSON schema must be a mapping, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema is no JSON: {error}") from error
    try:
        first = next(_unsupported(json.loads(text), "#"), None)
    except RecursionError as error:
        raise ConfigError("the JSON schema is nested too deeply") from error
    if first is not None:
        raise ConfigError(f"JSON schema, {first[0]}: {first[1]} is not supported")
    try:
        return _core.json_schema_to_grammar(text)
    except ConfigError as error:
        raise ConfigError(f"JSON schema: {error}") from error


def response_format_grammar(response_format: object) -> str:
    """The grammar for an OpenAI-style response_format.

    Args:
        response_format: {"type": "text"}; {"type": "json_object"}, with a "schema" if wanted; or
            {"type": "json_schema", "json_schema": {"schema": ...}}.

    Returns:
        GBNF with a rule named root; "" for text, which has no grammar.

    Raises:
        TypeError: It is no mapping, or a schema in it is none.
        ConfigError: It is of no such type, or its schema is wrong.
    """
    if not isinstance(response_format, Mapping):
        raise TypeError(f"response_format must be a mapping, not {type(response_format).__name__}")
    kind = response_format.get("type")
    check_choice("response_format['type']", kind, ("text", "json_object", "json_schema"))
    if kind == "text":
        return ""
    if kind == "json_object":
        return json_schema_grammar(response_format.get("schema") or {"type": "object"})
    wrapped = response_format.get("json_schema")
    if not isinstance(wrapped, Mapping) or "schema" not in wrapped:
        raise ConfigError("response_format['json_schema']: must be a mapping with the key 'schema'")
    return json_schema_grammar(wrapped["schema"])


def _is_convertible(pattern: str) -> bool:
    """Whether llama.cpp makes a grammar of a pattern, and does not fall back to its rule for any string."""
    return "\nstring ::=" not in "\n" + _core.json_schema_to_grammar(json.dumps({"type": "string", "pattern": pattern}))


def _unsupported(schema: object, path: str) -> Iterator[tuple[str, str]]:
    """Where a schema restricts what the grammar does not."""
    if isinstance(schema, bool) and not schema and not path.endswith("/additionalProperties"):
        yield path, "the schema false"
    if not isinstance(schema, dict):
        return
    for keyword in sorted(_NOT_ENFORCED & schema.keys()):
        yield path, f"'{keyword}'"
    chosen = next((keyword for keyword in _ALONE if keyword in schema), None)
    for keyword in sorted((_STRUCTURE & schema.keys()) - {chosen}) if chosen else ():
        yield path, f"'{keyword}' beside '{chosen}'"
    required, properties = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if not isinstance(properties, dict) or name not in properties:
            yield path, f"requiring {name!r} without a property of that name"
    types = schema.get("type")
    if types == "number" or (isinstance(types, list) and "number" in types):
        for keyword in sorted(_NOT_ENFORCED_FOR_NUMBERS & schema.keys()):
            yield path, f"'{keyword}' of a number that is no integer"
    if isinstance(schema.get("pattern"), str) and not _is_convertible(schema["pattern"]):
        yield path, f"the pattern {schema['pattern']!r} (it must begin with ^ and end with $; write [0-9] for \\d)"
    for keyword in _SCHEMAS:
        yield from _unsupported(schema.get(keyword), f"{path}/{keyword}")
    for keyword in _LISTS_OF_SCHEMAS:
        members = schema.get(keyword)
        for index, member in enumerate(members if isinstance(members, list) else ()):
            yield from _unsupported(member, f"{path}/{keyword}/{index}")
    for keyword in _MAPPINGS_OF_SCHEMAS:
        named = schema.get(keyword)
        for name, member in (named if isinstance(named, dict) else {}).items():
            yield from _unsupported(member, f"{path}/{keyword}/{name}")
