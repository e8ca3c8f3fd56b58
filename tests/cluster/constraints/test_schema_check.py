"""What is no schema is refused with its place and a remedy; what is one is not."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from diptych.cluster.constraints.check import check
from diptych.cluster.constraints.keywords import Draft
from diptych.protos.errors import InvalidRequest

WHERE = "response_format.json_schema.schema"
NESTED: object = 1
for _ in range(200):
    NESTED = [NESTED]

REFUSED = [
    (1, "", "a schema is an object"),
    ({"properties": {"age": {"type": "strnig"}}}, ".properties.age.type", "types are null"),
    ({"properties": {"age": "integer"}}, ".properties.age", "not a string"),
    ({"properties": {"a b": {"required": True}}}, ".properties['a b'].required", "beside `properties`"),
    ({"required": ["a", 1]}, ".required", "list of property names"),
    ({"required": ["a", "a"]}, ".required", "twice"),
    ({"items": {"minimum": "3"}}, ".items.minimum", "must be a number"),
    ({"minLength": -1}, ".minLength", "at least 0"),
    ({"maxItems": 1.5}, ".maxItems", "whole number"),
    ({"minItems": 10**9}, ".minItems", "at most 100000"),
    ({"multipleOf": 0}, ".multipleOf", "more than 0"),
    ({"minimum": 10**400}, ".minimum", "must be a number"),
    ({"exclusiveMinimum": True, "$schema": "http://json-schema.org/draft-07/schema#"}, ".exclusiveMinimum", "draft-04"),
    ({"pattern": "("}, ".pattern", "no regular expression"),
    ({"patternProperties": {"[": True}}, ".patternProperties['[']", "no regular expression"),
    ({"enum": []}, ".enum", "at least one value"),
    ({"enum": list(range(5000))}, ".enum", "at most 4096"),
    ({"anyOf": []}, ".anyOf", "at least one schema"),
    ({"anyOf": [True, 3]}, ".anyOf[1]", "a schema is"),
    ({"type": []}, ".type", "empty list"),
    ({"$ref": "#/$defs/a"}, ".$ref", "leads nowhere"),
    ({"$ref": "https://example.org/a.json"}, ".$ref", "not fetched"),
    ({"$ref": "#"}, ".$ref", "in a circle"),
    ({"allOf": [{"$ref": "#"}]}, ".allOf[0].$ref", "in a circle"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ".$ref", "in a circle"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, ".properties.a.$ref", "from within properties"),
    ({"$dynamicRef": "#a"}, ".$dynamicRef", "use $ref"),
    ({"$schema": "https://example.org/mine"}, ".$schema", "unknown draft"),
    ({"additonalProperties": False}, ".additonalProperties", "'additionalProperties'"),
    ({"properties": {"a": {"maxlength": 3}}}, ".properties.a.maxlength", "'maxLength'"),
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", "items": [True]}, ".items", "prefixItems"),
    ({"dependentRequired": {"a": "b"}}, ".dependentRequired.a", "property names"),
    ({"uniqueItems": "yes"}, ".uniqueItems", "true or false"),
    ({"description": "x" * 70_000}, "", "65536"),
    ({"default": NESTED}, "", "nested deeper"),
    ({"const": "\ud800"}, "", "surrogate"),
    ({"$ref": "#/components/a", "components": {"a": {"type": "nil"}}}, ".components.a.type", "types are"),
]


@pytest.mark.parametrize(("schema", "path", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_each_fault_is_named_with_its_place(schema: object, path: str, words: str) -> None:
    """A client with a schema of 300 lines got "invalid schema"."""
    with pytest.raises(InvalidRequest) as caught:
        check(schema, WHERE)
    assert caught.value.param == WHERE + path
    assert str(caught.value).startswith(WHERE + path)
    assert words in str(caught.value)


ACCEPTED: list[tuple[dict[str, object], Draft, tuple[str, ...]]] = [
    ({"title": "T", "x-anything": 1, "_old": 2, "examples": [1], "readonly": True}, Draft.DRAFT_2020_12, ("readonly",)),
    ({"items": [True], "additionalItems": False}, Draft.DRAFT_7, ()),
    ({"minimum": 1, "exclusiveMinimum": True}, Draft.DRAFT_4, ()),
    ({"$schema": "http://json-schema.org/draft-06/schema"}, Draft.DRAFT_6, ()),
    ({"$defs": {"a": {"$anchor": "here"}}, "$ref": "#here"}, Draft.DRAFT_2020_12, ()),
    (
        {"$id": "urn:example:a", "$defs": {"b": {"$id": "urn:example:b"}}, "$ref": "urn:example:b"},
        Draft.DRAFT_2020_12,
        (),
    ),
    ({"properties": {"type": {"type": "string"}, "pattern": {"enum": [1]}}}, Draft.DRAFT_2020_12, ()),
    ({"properties": {"next": {"$ref": "#"}}}, Draft.DRAFT_2020_12, ()),
    ({"anyOf": [{"type": "null"}, {"items": {"$ref": "#"}}]}, Draft.DRAFT_2020_12, ()),
    ({"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": True}}, Draft.DRAFT_2020_12, ()),
]


@pytest.mark.parametrize(("schema", "draft", "ignored"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_what_real_schemas_have_is_taken(schema: object, draft: Draft, ignored: tuple[str, ...]) -> None:
    """Annotations of form builders, older drafts without `$schema` and properties named like keywords were refused."""
    found = check(schema, WHERE)
    assert (found.draft, found.ignored) == (draft, ignored)


def test_a_web_of_references_is_looked_through_once() -> None:
    """Each of 600 definitions leads to the next by two ways: 2 ** 600 ways in all."""
    names = [f"d{i}" for i in range(600)]
    web: dict[str, object] = {name: {"allOf": [{"$ref": f"#/$defs/{after}"}] * 2} for name, after in pairwise(names)}
    began = time.process_time()
    check({"$ref": "#/$defs/d0", "$defs": {**web, names[-1]: {"type": "null"}}}, WHERE)
    assert time.process_time() - began < 2
