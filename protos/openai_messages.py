"""The messages of a chat request in OpenAI's form, read into the canonical ones of messages.py.

`read_messages` is called by openai.py. The deprecated roles and fields (`function`, `function_call`) become what
replaced them. Parts of contents: openai_parts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidRequest
from .messages import Media, Message, Part, Reasoning, Refusal, Role, Text, ToolCall, ToolResult
from .openai_carried import restored
from .openai_parts import read_content
from .strict_json import MAX_CONTAINERS, parse_inner, printable
from .wire_checks import JsonObject, a_list, a_text, an_object, one_of, refuse

MAX_MESSAGES = 4096
MAX_CALLS = 128  # of one message
MAX_ID_CHARS = 256
ROLES: tuple[Role | Literal["function"], ...] = ("system", "developer", "user", "assistant", "tool", "function")
# Fields of an assistant's message; clients that pass an answer on send them empty, also with other roles.
_ASSISTANTS: dict[str, tuple[object, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "parsed": (None,),
    "provider_specific_fields": (None,),  # what providers want back; LiteLLM's copy of what its own classes lack
    "reasoning": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
_KNOWN = frozenset({"role", "content", "name", "tool_call_id", *_ASSISTANTS})


@dataclass(slots=True)
class _Announced:
    """The calls before a message: functions by the ids of their calls, the last call of each function; how many objects
    and lists the arguments of further calls may hold.
    """

    names: dict[str, str]
    latest: dict[str, str]
    containers: int = MAX_CONTAINERS


def read_messages(value: object) -> tuple[Message, ...]:
    """The conversation. Raises InvalidRequest naming the path."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list with at least one message", "messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(value)} entries; the limit is {MAX_MESSAGES}", "messages")
    announced = _Announced({}, {})
    found = []
    for i, entry in enumerate(value):
        message = _message(entry, f"messages[{i}]", announced)
        for call in message.tool_calls:
            announced.names[call.id] = call.name
            announced.latest[call.name] = call.id
        found.append(message)
    return tuple(found)


def _message(value: object, path: str, announced: _Announced) -> Message:
    given = an_object(value, path)
    for name in given:
        if name not in _KNOWN:
            inner = f"{path}.{printable(name)}"
            raise InvalidRequest(f"unknown field {inner}", inner)
    role = one_of(given.get("role"), f"{path}.role", ROLES)
    if role == "assistant":
        return _assistant(given, path, announced)
    for field, defaults in _ASSISTANTS.items():
        if given.get(field) not in defaults:
            raise refuse(f"{path}.{field}", f"is for assistant messages; this one is the {role}'s")
    parts = read_content(given.get("content"), f"{path}.content")
    who = _name(given.get("name"), path)
    if role == "function":
        call_id = _legacy_id(given.get("name"), path, announced)
        return _result(call_id, announced.names[call_id], parts)
    if role == "tool":
        call_id = _answered(given.get("tool_call_id"), path, announced)
        return _result(call_id, who or announced.names[call_id], parts)
    if given.get("tool_call_id") is not None:
        raise refuse(f"{path}.tool_call_id", f"is for tool messages; this one is the {role}'s")
    return Message(role=role, parts=parts, name=who)


def _result(call_id: str, name: str, parts: Sequence[Part]) -> Message:
    inner = tuple(part for part in parts if isinstance(part, Text | Media))
    return Message(role="tool", parts=(ToolResult(call_id=call_id, name=name, parts=inner),))


def _name(value: object, path: str) -> str | None:
    return None if value is None else a_text(value, f"{path}.name", most=MAX_ID_CHARS)


def _answered(value: object, path: str, announced: _Announced) -> str:
    path += ".tool_call_id"
    call_id = a_text(value, path, most=MAX_ID_CHARS)
    if call_id not in announced.names:
        told = "is the id of no call in an assistant message before it: send that message with its tool_calls too"
        raise refuse(path, told)
    return call_id


def _legacy_id(name: object, path: str, announced: _Announced) -> str:
    path += ".name"
    wanted = a_text(name, path, most=MAX_ID_CHARS)
    if wanted not in announced.latest:
        raise refuse(path, "is called in no assistant message before it: send that message with its function_call too")
    return announced.latest[wanted]


def _assistant(given: JsonObject, path: str, announced: _Announced) -> Message:
    for name in ("audio", "annotations"):
        if given.get(name) not in _ASSISTANTS[name]:
            raise refuse(f"{path}.{name}", "is not read by this model, which reads text: leave it out")
    if given.get("tool_call_id") is not None:
        raise refuse(f"{path}.tool_call_id", "is for tool messages; the calls of an assistant have an id each")
    calls = _calls(given, path, announced)
    refusal = _optional(given.get("refusal"), f"{path}.refusal")
    content = given.get("content")
    said: tuple[Part, ...] = ()
    if content is None or (content == [] and calls):
        if not calls and refusal is None:
            raise refuse(f"{path}.content", "is missing: a message without calls has a text, if an empty one")
    else:
        said = read_content(content, f"{path}.content", may_refuse=True)
    thought = _reasoning(given, path)
    first = () if thought is None else (Reasoning(thought),)
    refused = () if refusal is None else (Refusal(refusal),)
    who = _name(given.get("name"), path)
    message = Message(role="assistant", parts=(*first, *said, *refused, *calls), name=who)
    return restored(message, given.get("provider_specific_fields"), f"{path}.provider_specific_fields")


def _reasoning(given: JsonObject, path: str) -> str | None:
    one = _optional(given.get("reasoning_content"), f"{path}.reasoning_content")
    other = _optional(given.get("reasoning"), f"{path}.reasoning")
    if one is not None and other is not None and one != other:
        raise refuse(f"{path}.reasoning", f"and {path}.reasoning_content differ: send one of them")
    return other if one is None else one


def _optional(value: object, path: str) -> str | None:
    return None if value is None else a_text(value, path, least=0)


def _calls(given: JsonObject, path: str, announced: _Announced) -> tuple[ToolCall, ...]:
    legacy = given.get("function_call")
    entries: Sequence[object] = ()
    if given.get("tool_calls") is not None:
        entries = a_list(given["tool_calls"], f"{path}.tool_calls", most=MAX_CALLS, what="calls", may_be_empty=True)
    if legacy is not None:
        if entries:
            raise refuse(f"{path}.function_call", "is the old name of tool_calls: send one of them")
        name, text, arguments = _function(legacy, f"{path}.function_call", announced)
        return (ToolCall(id=f"call_of_{path}", name=name, arguments=arguments, text=text),)
    calls: dict[str, ToolCall] = {}
    for i, entry in enumerate(entries):
        call = _call(entry, f"{path}.tool_calls[{i}]", announced)
        if call.id in calls:
            raise refuse(f"{path}.tool_calls[{i}].id", "is the id of another call of this message")
        calls[call.id] = call
    return tuple(calls.values())


def _call(value: object, path: str, announced: _Announced) -> ToolCall:
    entry = an_object(value, path, {"id", "type", "function", "index"})  # index: left over from a stream
    if entry.get("type") is not None:
        one_of(entry["type"], f"{path}.type", ("function",))
    if "function" not in entry:
        raise refuse(f"{path}.function", "is missing: name and arguments stand in it")
    name, text, arguments = _function(entry["function"], f"{path}.function", announced)
    return ToolCall(
        id=a_text(entry.get("id"), f"{path}.id", most=MAX_ID_CHARS), name=name, arguments=arguments, text=text
    )


def _function(value: object, path: str, announced: _Announced) -> tuple[str, str, JsonObject]:
    function = an_object(value, path, {"name", "arguments", "parsed_arguments"})  # the last repeats the one before
    name = a_text(function.get("name"), f"{path}.name", most=MAX_ID_CHARS)
    if isinstance(function.get("arguments"), dict):
        raise refuse(f"{path}.arguments", "must be a string that holds the JSON of an object, not the object itself")
    # A stream that brought no arguments leaves an empty text with many clients.
    text = a_text(function.get("arguments"), f"{path}.arguments", least=0) or "{}"
    arguments, containers = parse_inner(text, f"{path}.arguments", announced.containers)
    announced.containers -= containers
    return name, text, arguments
