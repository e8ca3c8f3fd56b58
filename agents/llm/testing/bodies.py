"""What a request's body asks, in any of the five wire formats: models of the testing kit get bodies alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

JsonObject = dict[str, Any]
_TURNS = ("messages", "input", "contents")
_SCHEMAS = (
    ("response_format", "json_schema", "schema"),
    ("text", "format", "schema"),
    ("output_config", "format", "schema"),
    ("generationConfig", "responseJsonSchema"),
    ("generationConfig", "responseSchema"),
    ("outputConfig", "textFormat", "structure", "jsonSchema", "schema"),
)


def last_text(body: JsonObject) -> str:
    """The text of the user's last turn; empty where there is none."""
    for turn in reversed(turns(body)):
        if turn.get("role") == "user" and (text := _text(turn.get("content", turn.get("parts")))):
            return text
    return ""


def turns(body: JsonObject) -> list[JsonObject]:
    """Of the conversation, as the format has them."""
    found: Any = next((body[name] for name in _TURNS if name in body), [])
    return [{"role": "user", "content": found}] if isinstance(found, str) else [t for t in found if isinstance(t, dict)]


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def schema_of(body: JsonObject) -> JsonObject | None:
    """The schema that the answer is held to; None: there is none."""
    for path in _SCHEMAS:
        found: Any = body
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            found = json.loads(found)
        if isinstance(found, dict):
            return found
    return None


def tools_of(body: JsonObject) -> dict[str, JsonObject]:
    """The schemas of the arguments of the tools that may be called, by the tools' names."""
    groups = body.get("tools") or (body.get("toolConfig") or {}).get("tools") or []
    return dict(_tool(one) for group in groups for one in _flat(group))


def _flat(group: JsonObject) -> Iterator[JsonObject]:
    inner = group.get("function") or group.get("toolSpec") or group
    yield from group.get("functionDeclarations") or [inner]


def _tool(told: JsonObject) -> tuple[str, JsonObject]:
    schema: JsonObject = told.get("parameters") or told.get("input_schema") or told.get("inputSchema") or {}
    return str(told.get("name", "")), schema.get("json", schema)


def has_outcomes(body: JsonObject) -> bool:
    """Whether tools have answered since the user spoke last."""
    for turn in reversed(turns(body)):
        parts = turn.get("content", turn.get("parts"))
        kinds = (
            {key for part in parts if isinstance(part, dict) for key in (*part, part.get("type"))}
            if isinstance(parts, list)
            else set()
        )
        if turn.get("role") == "tool" or turn.get("type") == "function_call_output":
            return True
        if kinds & {"tool_result", "toolResult", "functionResponse"}:
            return True
        if turn.get("role") == "user":
            return False
    return False
