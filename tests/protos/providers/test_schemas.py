"""Schemas in the vendors' dialects: what is valid under the original can be said under what comes.

Guards against a keyword that a vendor refuses the whole request for, an instance that the adapted schema forbids, an
answer whose nulls the client's own schema does not allow, and references that lead nowhere or round in circles.
"""

from __future__ import annotations

import contextlib
import copy
import json
from itertools import pairwise
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diptych.protos.providers.schema_documents import Inexpressible
from diptych.protos.providers.schema_values import NullFilter, restore
from diptych.protos.providers.schemas import _DIALECTS, DIALECTS, adapt_schema, needs_restoring

ADAPTING = tuple(_DIALECTS)
Pair = tuple[dict[str, Any], st.SearchStrategy[Any]]  # a schema, and instances of it


def scalars() -> st.SearchStrategy[Pair]:
    return st.sampled_from(
        [
            ({"type": "string"}, st.text("ab", max_size=3)),
            (
                {"type": "string", "minLength": 1, "maxLength": 3, "description": "A word."},
                st.text("ab", min_size=1, max_size=3),
            ),
            ({"type": "string", "pattern": "^a+$", "title": "T"}, st.sampled_from(["a", "aa"])),
            ({"type": "string", "pattern": r"^(?!b)\w+\b", "default": "a"}, st.just("ab")),
            ({"type": "string", "format": "date"}, st.just("2026-11-23")),
            ({"type": "string", "format": "binary"}, st.just("x")),
            ({"type": "integer", "exclusiveMinimum": 0, "maximum": 9}, st.integers(1, 9)),
            ({"type": "number", "minimum": 0.5, "multipleOf": 0.5}, st.sampled_from([0.5, 1.0])),
            ({"type": "boolean", "default": True}, st.booleans()),
            ({"type": "null"}, st.none()),
            ({"enum": ["a", "b", 3]}, st.sampled_from(["a", "b", 3])),
            ({"enum": ["a", None], "type": ["string", "null"]}, st.sampled_from(["a", None])),
            ({"const": "k", "type": "string"}, st.just("k")),
            ({"const": 4}, st.just(4)),
            ({"type": "integer", "nullable": True}, st.none() | st.integers(0, 3)),
            ({"type": ["string", "integer"]}, st.text("a", max_size=2) | st.integers(0, 3)),
        ]
    )


def an_object(pairs: dict[str, tuple[Pair, bool]]) -> Pair:
    required = [name for name, (_, is_required) in pairs.items() if is_required]
    schema = {"type": "object", "properties": {name: pair[0] for name, (pair, _) in pairs.items()}}
    there = {name: pair[1] for name, (pair, is_required) in pairs.items() if is_required}
    maybe = {name: pair[1] for name, (pair, is_required) in pairs.items() if not is_required}
    return schema | ({"required": required} if required else {}), st.fixed_dictionaries(there, optional=maybe)


def a_list(pair: Pair, least: int) -> Pair:
    schema = {"type": "array", "items": pair[0], "minItems": least, "maxItems": 4, "uniqueItems": False}
    return schema, st.lists(pair[1], min_size=least, max_size=4)


def an_option(pair: Pair) -> Pair:
    return {"anyOf": [pair[0], {"type": "null"}], "default": None}, pair[1] | st.none()


def both(one: Pair, other: Pair) -> Pair:
    return {"oneOf": [one[0], other[0]]}, one[1] | other[1]


def inner(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    named = st.dictionaries(
        st.sampled_from(["a", "b", "default", "$ref"]), st.tuples(pairs, st.booleans()), min_size=1, max_size=3
    )
    return st.one_of(
        named.map(an_object),
        st.builds(a_list, pairs, st.integers(0, 2)),
        pairs.map(an_option),
        pairs.map(lambda pair: ({"allOf": [pair[0]], "description": "D"}, pair[1])),
    )


NESTED = st.recursive(scalars(), inner, max_leaves=5)
SCHEMAS = st.dictionaries(
    st.sampled_from(["x", "y", "z"]), st.tuples(NESTED, st.booleans()), min_size=1, max_size=3
).map(an_object)


def as_json_schema(schema: Any) -> Any:
    """OpenAPI's `nullable` in words that a validator knows."""
    if isinstance(schema, list):
        return [as_json_schema(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: as_json_schema(value) for name, value in schema.items() if name != "nullable" or value is not True}
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") is True else made


def with_nulls(value: Any, schema: Any, adapted: Any) -> Any:
    """The documented mapping: null for each property that is optional in the original, required in what comes, and
    absent.
    """
    if isinstance(value, dict):
        found = {}
        for name, inner in value.items():
            found[name] = with_nulls(inner, None, property_of(adapted, name))
        for option in objects_of(adapted):
            if set(value) <= set(option["properties"]):
                found |= {name: None for name in option.get("required", ()) if name not in value}
        return found
    if isinstance(value, list):
        items = [option["items"] for option in options(adapted) if "items" in option]
        return [with_nulls(entry, None, items[0] if items else {}) for entry in value]
    return value


def options(adapted: Any) -> list[dict[str, Any]]:
    return [found for branch in adapted["anyOf"] for found in options(branch)] if "anyOf" in adapted else [adapted]


def objects_of(adapted: Any) -> list[dict[str, Any]]:
    return [option for option in options(adapted) if "properties" in option]


def property_of(adapted: Any, name: str) -> Any:
    return next((option["properties"][name] for option in objects_of(adapted) if name in option["properties"]), {})


def keywords(schema: Any) -> set[str]:
    """All that stand at places of keywords."""
    found: set[str] = set()
    for name, value in schema.items():
        found.add(name)
        if name in ("properties", "$defs"):
            for one in value.values():
                found |= keywords(one)
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            found |= keywords(value)
        elif name in ("anyOf", "prefixItems"):
            for one in value:
                found |= keywords(one)
    return found


@settings(max_examples=100, deadline=None)
@given(SCHEMAS, st.data())
def test_what_is_valid_can_be_said(pair: Pair, data: st.DataObject) -> None:
    schema, instances = pair
    before = copy.deepcopy(schema)
    dialect = data.draw(st.sampled_from(ADAPTING))
    adapted, notes = adapt_schema(schema, dialect)
    assert schema == before
    assert keywords(adapted) <= _DIALECTS[dialect].keywords
    instance = data.draw(instances)
    told = with_nulls(instance, schema, adapted) if _DIALECTS[dialect].all_required else instance
    assert jsonschema_rs.is_valid(as_json_schema(adapted), told), (adapted, told)
    restored = restore(told, schema)
    assert without_nulls(restored) == without_nulls(instance)
    assert jsonschema_rs.is_valid(as_json_schema(schema), restored)
    if not needs_restoring(notes):
        assert jsonschema_rs.is_valid(as_json_schema(schema), told)


def without_nulls(value: Any) -> Any:
    """Whether a property that may be null is null or absent, no answer to a strict schema tells."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def filtered(text: str, schema: dict[str, Any], cuts: list[int]) -> str:
    filter_ = NullFilter(schema)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return "".join(filter_.feed(text[a:b]) for a, b in pairwise(places)) + filter_.end()


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.data(), st.lists(st.integers(0, 120), max_size=8), st.sampled_from([None, 1]))
def test_a_text_is_restored_as_it_comes(pair: Pair, data: st.DataObject, cuts: list[int], indent: int | None) -> None:
    schema, instances = pair
    adapted, _ = adapt_schema(schema, "openai_strict")
    told = with_nulls(data.draw(instances), schema, adapted)
    whole = filtered(json.dumps(told, indent=indent), schema, cuts)
    assert json.loads(whole) == restore(told, schema)


@example("{,", [])
@settings(max_examples=60, deadline=None)
@given(st.text('{}[]",:nul 1a\\', max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_what_is_no_json_goes_through(text: str, cuts: list[int]) -> None:
    assert filtered(text, {"type": "object", "properties": {}}, cuts) == text


def test_a_text_goes_on_as_soon_as_it_can() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    filter_ = NullFilter(schema)
    pieces = ['{"a', '": ', "nu", "ll", ', "b"', ": 1", "2", "}", "\n"]
    assert [filter_.feed(piece) for piece in pieces] == ["{", "", "", "", "", ' "b": 1', "2", "}", "\n"]


@settings(max_examples=60, deadline=None)
@given(SCHEMAS)
def test_a_strict_schema_is_closed_and_requires_all(pair: Pair) -> None:
    def check(schema: dict[str, Any]) -> None:
        if schema.get("type") == "object":
            assert schema["additionalProperties"] is False
            assert schema.get("required", []) == list(schema.get("properties", {}))
        for one in [*schema.get("properties", {}).values(), *schema.get("anyOf", []), schema.get("items", {})]:
            if one:
                check(one)

    check(adapt_schema(pair[0], "openai_strict")[0])


@settings(max_examples=30, deadline=None)
@given(SCHEMAS)
def test_a_schema_in_the_dialect_stays_as_it_is(pair: Pair) -> None:
    once, _ = adapt_schema(pair[0], "openai_strict")
    again, notes = adapt_schema(once, "openai_strict")
    assert (again, notes) == (once, ())


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from(["object", "string", "#", "#/properties/a", "x", "^("]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "type properties items anyOf allOf oneOf $ref enum const required additionalProperties minItems "
                "minimum pattern format description default prefixItems nullable a exclusiveMinimum".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["type", "properties", "items", "anyOf", "$ref", "enum", "allOf"]), JUNK), JUNK)
def test_nothing_that_calls_itself_a_schema_breaks_the_adapter(schema: dict[str, Any], value: Any) -> None:
    for dialect in ADAPTING:
        with contextlib.suppress(Inexpressible):
            adapt_schema(schema, dialect)
    restore(value, schema)


NODE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "next": {"$ref": "#/$defs/Node"},
        "kind": {"$ref": "#/$defs/Kind", "title": "K"},
    },
    "required": ["name"],
}
RECURSIVE = {"$ref": "#/$defs/Node", "$defs": {"Node": NODE, "Kind": {"enum": ["a"], "type": "string"}}}


def test_recursion_is_kept_where_it_can_be() -> None:
    adapted, notes = adapt_schema(RECURSIVE, "openai_strict")
    assert adapted["properties"]["next"] == {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}
    assert adapted["$defs"]["Node"]["properties"]["next"] == adapted["properties"]["next"]
    assert adapted["properties"]["kind"] == {"type": ["string", "null"], "enum": ["a", None], "title": "K"}
    told = {"name": "x", "kind": None, "next": {"name": "y", "kind": "a", "next": None}}
    assert jsonschema_rs.is_valid(adapted, told)
    assert needs_restoring(notes)
    assert restore(told, RECURSIVE) == {"name": "x", "next": {"name": "y", "kind": "a"}}


@pytest.mark.parametrize("dialect", ["anthropic", "bedrock", "gemini"])
def test_recursion_is_refused_by_its_place(dialect: str) -> None:
    with pytest.raises(Inexpressible, match="itself") as caught:
        adapt_schema(RECURSIVE, dialect, field="response_format.json_schema.schema")
    assert caught.value.path == "response_format.json_schema.schema.properties.next"


def test_a_union_is_restored_by_what_tells_its_branches_apart() -> None:
    branches = [
        {"type": "object", "properties": {"kind": {"const": "cat"}, "age": {"type": "integer"}}, "required": ["kind"]},
        {
            "type": "object",
            "properties": {"kind": {"const": "dog"}, "age": {"type": ["integer", "null"]}},
            "required": ["kind"],
        },
    ]
    schema = {"type": "object", "properties": {"pet": {"oneOf": branches}}, "required": ["pet"]}
    assert restore({"pet": {"kind": "cat", "age": None}}, schema) == {"pet": {"kind": "cat"}}
    assert restore({"pet": {"kind": "dog", "age": None}}, schema) == {"pet": {"kind": "dog", "age": None}}
    assert restore({"pet": {"kind": "cow", "age": None}}, schema) == {"pet": {"kind": "cow", "age": None}}
    assert filtered('{"pet": {"kind": "cat", "age": null}}', schema, [3, 14]) == '{"pet": {"kind": "cat"}}'
    assert filtered('{"pet": {"kind": "dog", "age": null}}', schema, []) == '{"pet": {"kind": "dog", "age": null}}'
    assert filtered('{"pet": {"age": null, "kind": "cat"}}', schema, []) == '{"pet": {"age": null, "kind": "cat"}}'


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "any properties"),
        ({"type": "object", "properties": {"a": {"type": "object", "additionalProperties": True}}}, "any properties"),
        ({"type": "object", "properties": {"a": {}}}, "any value"),
        ({"type": "object", "properties": {"a": {"type": "array"}}}, "items"),
        ({"type": "array", "items": {"type": "string"}}, "outermost"),
        ({"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}, "put it into"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}}, "there is not"),
        ({"type": "object", "properties": {"a": False}}, "no value"),
        ({"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"type": "integer"}]}}}, "no value is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_said_is_told_with_its_place(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(Inexpressible, match=words):
        adapt_schema(schema, "openai_strict")


def test_references_that_multiply_come_to_an_end() -> None:
    """Thirty levels of two references each would be a thousand million schemas."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}} for i in range(30)
    }
    definitions["d30"] = {"type": "string"}
    with pytest.raises(Inexpressible, match="grows"):
        adapt_schema({"$ref": "#/$defs/d0", "$defs": definitions}, "gemini")
    adapt_schema({"$ref": "#/$defs/d0", "$defs": definitions}, "openai_strict")


def test_notes_name_the_place_and_what_is_no_longer_held() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 2, "description": "A."}},
        "required": ["a"],
    }
    adapted, (note,) = adapt_schema(schema, "openai_strict", field="f")
    assert (note.kind, note.field, note.words) == ("adapted", "f.properties.a", "minLength told in the description")
    assert adapted["properties"]["a"] == {"type": "string", "description": "A. (minLength: 2)"}


def test_gemini_says_null_in_its_own_way_and_keeps_the_order() -> None:
    schema = {"type": "object", "properties": {"b": {"type": ["string", "null"]}, "a": {"const": "x"}}}
    adapted, _ = adapt_schema(schema, "gemini")
    assert adapted["properties"] == {"b": {"type": "string", "nullable": True}, "a": {"type": "string", "enum": ["x"]}}
    assert adapted["propertyOrdering"] == ["b", "a"]


def test_dialects_that_change_nothing_or_take_nothing() -> None:
    schema = {"anything": 1}
    assert adapt_schema(schema, "openai") == (schema, ())
    with pytest.raises(Inexpressible, match="takes no schema"):
        adapt_schema(schema, "none")
    with pytest.raises(ValueError, match="those that are: " + ", ".join(DIALECTS)):
        adapt_schema(schema, "klingon")
