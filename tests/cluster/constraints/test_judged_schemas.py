"""Coverage tells the truth: "full" never lets a wrong answer pass, and every rewriting keeps the answers it should."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.cluster.constraints import trial
from diptych.cluster.constraints.schema import Judged, Verdicts, judge
from diptych.cluster.constraints.testing import walk
from diptych.cluster.constraints.validate import Validator
from diptych.protos.errors import InvalidRequest

N, S = {"type": "integer"}, {"type": "string"}
EXACT = [
    ({"oneOf": [N, S]}, ["1", '"a"'], ["true"]),
    (
        {"properties": {"a": N, "b": S, "c": S}, "oneOf": [{"required": ["a"]}, {"required": ["b", "c"]}]},
        ['{"a":1}', '{"a":1,"b":"x"}', '{"b":"x","c":"y"}'],
        ['{"a":1,"b":"x","c":"y"}', "{}"],
    ),
    (
        {
            "oneOf": [
                {"properties": {"kind": {"const": "a"}, "n": N}, "required": ["kind"]},
                {"properties": {"kind": {"const": "b"}, "n": S}, "required": ["kind"]},
            ],
            "type": "object",
        },
        ['{"kind":"a","n":1}', '{"kind":"b","n":"x"}'],
        ['{"kind":"a","n":"x"}', '{"kind":"c"}'],
    ),
    ({"type": "string", "not": {"enum": ["a", "ab", "b"]}}, ['"c"', '""', '"abc"', '"aa"'], ['"a"', '"ab"', '"b"']),
    ({"not": {"required": ["a", "b"]}, "type": "object"}, ['{"a":1}', "{}", '{"b":1}'], ['{"a":1,"b":1}']),
    ({"type": "integer", "not": {"minimum": 3, "maximum": 5}}, ["2", "6"], ["3", "5"]),
    ({"dependencies": {"a": ["b"]}, "properties": {"a": N, "b": N}}, ['{"b":1}', '{"a":1,"b":1}'], ['{"a":1}']),
    (
        {"properties": {"a": N, "b": N}, "if": {"required": ["a"]}, "then": {"required": ["b"]}, "type": "object"},
        ["{}", '{"a":1,"b":1}', '{"b":1}'],
        ['{"a":1}'],
    ),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, ['{"a":1}', "{}"], ['{"c":1}']),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}, ["2"], ["1"]),
    ({"items": [N, S], "additionalItems": False, "type": "array"}, ['[1,"a"]', "[]"], ['[1,"a",1]', '["a"]']),
    (
        {"type": "object", "properties": {"a": N, "b": N, "c": N}, "minProperties": 2, "additionalProperties": False},
        ['{"a":1,"c":1}'],
        ['{"a":1}'],
    ),
    ({"$ref": "#/definitions/a", "definitions": {"a": N}}, ["1"], ['"x"']),
    ({"properties": {"n": {"$ref": "#"}}, "type": "object"}, ['{"n":{"n":{}}}'], ['{"n":1}']),
    ({"type": "string", "format": "unheard-of"}, ['"x"'], ["1"]),
    ({"type": "array", "contains": True}, ["[1]"], ["[]"]),
    ({"type": "object", "properties": {"a": N}, "unevaluatedProperties": False}, ['{"a":1}'], ['{"b":1}']),
    ({"patternProperties": {"^a$": N, "^b": S}, "type": "object"}, ['{"a":1,"bb":"x"}'], ['{"a":"x"}', '{"bb":1}']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), EXACT, ids=lambda value: json.dumps(value)[:50])
def test_what_can_be_said_exactly_is(schema: object, good: list[str], bad: list[str]) -> None:
    """Plain llguidance refuses these, or takes them for less than they are."""
    judged = judge(schema, "schema")
    assert judged.coverage == "full", judged.notes
    grammar = trial.json_grammar(judged.schema)
    assert [text for text in good if not trial.accepts(grammar, text)] == []
    assert [text for text in bad if trial.accepts(grammar, text)] == []
    check = Validator(schema)
    assert not any(check.errors(text) for text in good)
    assert all(check.errors(text) for text in bad)


NAMED = [
    ({"properties": {"a": {"uniqueItems": True}}}, "properties.a.uniqueItems"),
    ({"oneOf": [{"pattern": "^a"}, {"pattern": "b$"}]}, "oneOf"),
    ({"$defs": {"n": {"not": {"pattern": "a"}}}, "$ref": "#/$defs/n"}, "$defs.n.not"),
    ({"items": {"pattern": "^(?!a)"}}, "items.pattern"),
    ({"if": {"pattern": "a"}, "then": {"minLength": 3}}, "if"),
    ({"contains": N}, "contains"),
    ({"format": "regex"}, "format"),
    ({"patternProperties": {"a": N, "b": S}}, "patternProperties"),
    ({"maximum": 2**70}, "maximum"),
    ({"const": 2**70 + 1}, "const"),
    ({"enum": ["a", {"b": [2**70 + 1]}]}, "enum"),
    ({"allOf": [{"pattern": f"a{i}"} for i in range(40)]}, "allOf[0].pattern"),
]


@pytest.mark.parametrize(("schema", "path"), NAMED, ids=lambda value: json.dumps(value)[:50])
def test_what_is_left_to_the_check_is_named_by_its_place(schema: object, path: str) -> None:
    """A relaxed keyword that nobody named made a client trust what the grammar had not enforced."""
    judged = judge(schema, "schema")
    assert judged.coverage == "partial"
    assert path in [note.path for note in judged.notes]


def test_a_schema_that_nothing_matches_is_refused() -> None:
    """The answer would have been cut off by the grammar at its first token."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "const": 1}}, "required": ["a"]}
    with pytest.raises(InvalidRequest, match="no value can match"):
        judge(schema, "schema")


def test_a_name_spelled_by_number_is_no_other_name() -> None:
    r"""`{"\u0061": "x"}` passed as an additional member beside the integer `a`, and a parser read `a` as a string."""
    grammar = trial.json_grammar(judge({"type": "object", "properties": {"a": N}}).schema)
    assert not trial.accepts(grammar, '{"\\u0061":"x"}')
    assert trial.accepts(grammar, '{"b": "x", "\u00e9": [1, 2]}')
    assert not trial.accepts(grammar, '{"b":  1}')


LEAVES: st.SearchStrategy[object] = st.sampled_from(
    [
        *(N, S, True, {"const": "a"}, {"const": "b"}, {"const": 1}, {"enum": ["a", 2, None]}, {"type": "boolean"}),
        *({"minimum": 3}, {"type": "string", "minLength": 2}, {"type": ["null", "string"]}),
        *({"required": ["p"]}, {"required": ["q"]}),
    ]
)
OBJECT_NAMES = st.sets(st.sampled_from("pq"))


def grown(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    members = st.dictionaries(st.sampled_from(["p", "q", "r"]), inner, max_size=3)
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(
            lambda m, r: {"type": "object", "properties": m, "required": sorted(r)},
            members,
            st.sets(st.sampled_from("pq")),
        ),
        st.builds(lambda m: {"properties": m, "additionalProperties": False}, members),
        st.builds(lambda parts: {"oneOf": parts}, several),
        st.builds(lambda parts: {"anyOf": parts}, several),
        st.builds(lambda parts: {"allOf": parts}, several),
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        st.builds(lambda part: {"type": "array", "items": part, "maxItems": 2}, inner),
        st.builds(lambda part: {"dependentSchemas": {"p": part}}, inner),
    )


VALUES = st.recursive(
    st.sampled_from([None, True, 1, 2, 3, "a", "b", "ab", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("pqr"), inner, max_size=3),
    max_leaves=4,
)


def attempt(schema: object) -> Judged | None:
    try:
        return judge(schema, "schema", Verdicts(1, 1 << 20))
    except InvalidRequest:
        return None


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.recursive(LEAVES, grown, max_leaves=6), st.lists(VALUES, max_size=12), st.integers(0, 2**32))
def test_full_coverage_accepts_what_matches_and_nothing_else(schema: object, values: list[object], seed: int) -> None:
    """A wrong step of the rewriting let answers through that a client was told are impossible, or forbade others."""
    judged = attempt(schema)
    if judged is None:
        assert all(Validator(schema).errors(json.dumps(value)) for value in values)
        return
    if judged.backend != "llguidance":
        return
    check, grammar = Validator(schema), trial.json_grammar(judged.schema)
    for value in values:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        matches = not check.errors(text)
        if judged.coverage == "full" and not matches:
            assert not trial.accepts(grammar, text), (schema, text)
        if matches and not (isinstance(value, dict) and len(value) > 1) and "[{" not in text and ":{" not in text:
            assert trial.accepts(grammar, text), (schema, text)
    if judged.coverage == "full":
        rng = random.Random(seed)
        for text in filter(None, (walk(grammar, rng, most=300) for _ in range(4))):
            assert not check.errors(text), (schema, text, check.errors(text))
