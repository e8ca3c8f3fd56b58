"""The form of an answer: every way to ask for one becomes one value, two at once are refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import parse_chat, parse_completion
from diptych.protos.openai_output import OutputForm

SCHEMA = {"title": "T", "type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "\u00f6"}}}
COMPACT = '{"title":"T","type":"object","properties":{"b":{"type":"string"},"a":{"const":"\u00f6"}}}'
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def forms(**fields: Any) -> list[OutputForm | None]:
    """Of both endpoints."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    text = {"model": "m", "prompt": "hi", **fields}
    return [parse_chat(json.dumps(chat).encode()).output_form, parse_completion(json.dumps(text).encode()).output_form]


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as told:
        forms(**fields)
    return told.value


@pytest.mark.parametrize(
    ("fields", "kind", "value", "path"),
    [
        ({"response_format": FORMAT}, "json_schema", COMPACT, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "json_object", '{"type":"object"}', "response_format"),
        ({"guided_json": SCHEMA}, "json_schema", COMPACT, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA, indent=3)}, "json_schema", COMPACT, "guided_json"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["b", "a"]}, "choice", ("b", "a"), "guided_choice"),
        ({"guided_grammar": "root ::= x"}, "grammar", "root ::= x", "guided_grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", COMPACT, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": None}}, "regex", "a", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["x"]}}, "choice", ("x",), "structured_outputs.choice"),
        (
            {
                "structured_outputs": {
                    "grammar": "g",
                    "json_object": False,
                    "whitespace_pattern": None,
                    "backend": "auto",
                }
            },
            "grammar",
            "g",
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"json_object": True}},
            "json_object",
            '{"type":"object"}',
            "structured_outputs.json_object",
        ),
    ],
)
def test_each_way_to_ask_becomes_a_form(fields: dict[str, Any], kind: str, value: Any, path: str) -> None:
    for form in forms(**fields, guided_decoding_backend="auto"):
        assert form is not None
        assert (form.kind, form.value, form.path) == (kind, value, path)
        assert form.schema == (json.loads(value) if form.is_json else None)
        assert form.is_guided == (not path.startswith("response"))


def test_a_text_is_no_form_and_strict_changes_nothing() -> None:
    for fields in ({"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None}):
        assert forms(**fields, structured_outputs=None) == [None, None]
    for strict in (True, False, None):
        inner = {**FORMAT["json_schema"], "strict": strict}
        assert forms(response_format={**FORMAT, "json_schema": inner}) == forms(response_format=FORMAT)
    told = forms(response_format={"type": "json_schema", "json_schema": {**FORMAT["json_schema"], "description": "d"}})[
        0
    ]
    assert told is not None
    assert (told.name, told.description) == ("n", "d")


ONE_OF_EACH: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "g",
    "structured_outputs": {"regex": "a"},
}


@pytest.mark.parametrize("names", list(itertools.combinations(ONE_OF_EACH, 2)))
def test_two_forms_are_refused_and_both_are_named(names: tuple[str, str]) -> None:
    refusal = refused(**{name: ONE_OF_EACH[name] for name in names})
    assert all(name in str(refusal) for name in names)
    refusal = refused(structured_outputs={"regex": "a", "json": {}})
    assert "structured_outputs.json and structured_outputs.regex" in str(refusal)


INNER = "response_format.json_schema"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "text, json_object or json_schema"),
        ({"response_format": {}}, "response_format.type", "is missing"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "must be text"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown field"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema"}}, INNER, "is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, INNER, "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, f"{INNER}.schema", "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, f"{INNER}.name", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": "two\nlines"}}},
            f"{INNER}.name",
            "1 to 64",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [], "name": "n"}}},
            f"{INNER}.schema",
            "must be an object",
        ),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[]"}, "guided_json", "JSON of an object"),
        ({"guided_json": True}, "guided_json", "must be an object"),
        ({"guided_json": {"x": "y" * 65_536}}, "guided_json", "65536 bytes"),
        ({"guided_json": {"x": "\u00f6" * 33_000}}, "guided_json", "65536 bytes"),
        ({"guided_regex": ""}, "guided_regex", "is empty"),
        ({"guided_regex": 1}, "guided_regex", "must be a string"),
        ({"guided_regex": "x" * 65_537}, "guided_regex", "65536 bytes"),
        ({"guided_grammar": []}, "guided_grammar", "must be a string"),
        ({"guided_choice": []}, "guided_choice", "list of strings"),
        ({"guided_choice": "ab"}, "guided_choice", "list of strings"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]", "is empty"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]", "must be a string"),
        ({"guided_choice": ["a", "b", "a"]}, "guided_choice[2]", "same as guided_choice[0]"),
        ({"guided_choice": [str(i) for i in range(100_000)]}, "guided_choice", "limit is 4096"),
        ({"guided_choice": [str(i) * 8192 for i in range(9)]}, "guided_choice", "65536 bytes"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "one way"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "bounded"),
        ({"structured_outputs": {}}, "structured_outputs", "asks for nothing"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "asks for nothing"),
        ({"structured_outputs": []}, "structured_outputs", "must be an object"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "unknown field"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "setting",
        ),
        ({"structured_outputs": {"json": {}, "backend": "x"}}, "structured_outputs.backend", "setting"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
    ],
)
def test_a_fault_is_refused_with_its_path(fields: dict[str, Any], param: str, words: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param
    assert words in str(refusal)
    assert param in str(refusal)
    assert len(str(refusal)) < 400


def chat(**fields: Any) -> OutputForm | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(json.dumps(body).encode()).output_form


def test_a_form_beside_tools() -> None:
    for choice in ("auto", "none", "required"):
        assert chat(response_format=FORMAT, tools=TOOLS, tool_choice=choice) is not None
    assert chat(guided_regex="a", tools=TOOLS) is not None
    for fields, name in (
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call"),
    ):
        with pytest.raises(InvalidRequest, match=f"guided_regex gives.*{name} makes it a call"):
            chat(guided_regex="a", **fields)


def test_structured_events_need_a_stream_of_json() -> None:
    assert chat(response_format=FORMAT, structured=True, stream=True) is not None
    assert chat(structured=False) is None
    for fields in ({"stream": True}, {"response_format": FORMAT}, {"stream": True, "guided_regex": "a"}):
        with pytest.raises(InvalidRequest, match="structured is for streams"):
            chat(structured=True, **fields)
