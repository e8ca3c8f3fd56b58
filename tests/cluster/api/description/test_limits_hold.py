"""docs/limits.md is true: of each limit of a request the last one is taken by the reader, and one more is refused with
the number. Limits of fields stand in schemas too, and are sent by test_fields_are_sent.py; here are those that do not.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.cluster.api.description.bounds import GROUPS, page
from diptych.protos import openai, openai_messages, openai_tools, strict_json
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import parse_chat, parse_completion
from diptych.protos.responses import parse_responses
from diptych.protos.responses_items import MAX_ITEMS

HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def chat(**fields: object) -> None:
    parse_chat(json.dumps({**HELLO, **fields}, separators=(",", ":")).encode())


def calls(number: int) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": "{}"}
    return [{"role": "assistant", "tool_calls": [{"id": f"c{at}", "function": function} for at in range(number)]}]


def described(characters: int) -> list[dict[str, Any]]:
    function = {"name": "f", "description": "x" * characters}
    return [{"type": "function", "function": function}]


def schema(length: int) -> list[dict[str, Any]]:
    """A tool whose schema has so many bytes as JSON."""
    parameters = {"type": "object", "properties": {}, "title": ""}
    parameters["title"] = "x" * (length - len(json.dumps(parameters, separators=(",", ":"))))
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


AT_MOST: dict[str, tuple[int, Any]] = {
    "messages": (openai_messages.MAX_MESSAGES, lambda n: chat(messages=HELLO["messages"] * n)),
    "calls": (openai_messages.MAX_CALLS, lambda n: chat(messages=calls(n))),
    "descriptions": (openai_tools.MAX_DESCRIPTION_CHARS, lambda n: chat(tools=described(n))),
    "schemas": (openai_tools.MAX_SCHEMA_BYTES, lambda n: chat(tools=schema(n))),
    "depth": (strict_json.MAX_DEPTH - 1, lambda n: strict_json.parse_object(json.dumps({"a": deep(n)}).encode())),
    "containers": (
        strict_json.MAX_CONTAINERS - 2,
        lambda n: strict_json.parse_object(json.dumps({"a": [[]] * n}).encode()),
    ),
    "members": (
        strict_json.MAX_MEMBERS - 1,
        lambda n: strict_json.parse_object(json.dumps({"a": {str(at): 1 for at in range(n)}}).encode()),
    ),
    "answers": (
        openai.MAX_ANSWERS // 2,
        lambda n: parse_completion(json.dumps({"model": "echo", "prompt": ["x"] * n, "n": 2}).encode()),
    ),
    "items": (
        MAX_ITEMS,
        lambda n: parse_responses(json.dumps({"model": "echo", "input": HELLO["messages"] * n}).encode()),
    ),
}


@pytest.mark.parametrize("name", AT_MOST)
def test_the_last_one_is_taken_and_one_more_is_not(name: str) -> None:
    most, send = AT_MOST[name]
    send(most)
    with pytest.raises(InvalidRequest) as caught:
        send(most + 1)
    assert any(character.isdigit() for character in caught.value.message)


def test_the_page_names_each_limit_once() -> None:
    for group in GROUPS:
        names = [(one.what, one.where) for one in group.limits]
        assert len(names) == len(set(names)), group.title
        assert all(one.most and one.answer for one in group.limits)
    assert page().count("\n| ") > 70
