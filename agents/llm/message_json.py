"""Canonical messages as JSON and back, exactly: media, signatures of reasoning and providers' own data included.

agent_state.py keeps conversations in it. It is our own form, with a type for each part; wire formats of providers lose
what they have no words for. It knows neither agents nor requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args

from diptych.protos.messages import (
    Kept,
    Kind,
    Media,
    Message,
    Part,
    Reasoning,
    Refusal,
    Role,
    Text,
    ToolCall,
    ToolResult,
)

from .errors import UsageError

JsonObject = dict[str, Any]
_TYPES: Mapping[str, type[Any]] = {
    "text": Text,
    "refusal": Refusal,
    "reasoning": Reasoning,
    "media": Media,
    "tool_call": ToolCall,
    "tool_result": ToolResult,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_WORDS: Mapping[str, tuple[str, ...]] = {"role": get_args(Role), "kind": get_args(Kind), "kept": get_args(Kept)}


def messages_to_json(messages: Iterable[Message]) -> list[JsonObject]:
    """What `json.dumps` takes. Fields that have their defaults are left out."""
    return [_written(message) for message in messages]


def messages_from_json(found: object, where: str = "messages") -> tuple[Message, ...]:
    """The messages again, equal to those that were written. Raises UsageError that names the place."""
    return tuple(_message(one, f"{where}[{at}]") for at, one in enumerate(_list(found, where)))


def message_from_json(found: object, where: str) -> Message:
    """One of them."""
    return _message(found, where)


def _written(value: Message | Part) -> JsonObject:
    kind = type(value)
    told: JsonObject = {} if isinstance(value, Message) else {"type": _NAMES[kind]}
    for one in fields(value):
        found = getattr(value, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if default is not MISSING and found == default:
            continue
        if one.name == "parts":
            told["parts"] = [_written(part) for part in found]
        elif isinstance(found, Mapping):
            told[one.name] = {key: dict(inner) if isinstance(inner, Mapping) else inner for key, inner in found.items()}
        else:
            told[one.name] = found
    if isinstance(value, ToolCall) and json.dumps(_arguments(value.text)) == json.dumps(value.arguments):
        del told["arguments"]  # they are those of the text, and the text is exact
    return told


def _arguments(text: str) -> JsonObject:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(found: object, where: str) -> Message:
    return Message(**_read(Message, _mapping(found, where), where, (*_TYPES.values(),)))


def _part(found: object, where: str, allowed: tuple[type[Any], ...]) -> Any:
    told = dict(_mapping(found, where))
    name = told.pop("type", None)
    kind = _TYPES.get(name) if isinstance(name, str) else None
    if kind is None or kind not in allowed:
        raise UsageError(f"{where}.type is {name!r}; it may be {', '.join(_NAMES[one] for one in allowed)}", where)
    if kind is ToolCall and "arguments" not in told:
        told["arguments"] = _arguments(told["text"]) if isinstance(told.get("text"), str) else {}
    return kind(**_read(kind, told, where, (Text, Media)))


def _read(kind: type[Any], told: Mapping[str, Any], where: str, inner: tuple[type[Any], ...]) -> JsonObject:
    known = {one.name: one for one in fields(kind)}
    for name in told:
        if name not in known:
            raise UsageError(f"{where}.{name} is no field here; there are {', '.join(known)}", f"{where}.{name}")
    read: JsonObject = {}
    for name, one in known.items():
        place = f"{where}.{name}"
        if name not in told:
            if one.default is MISSING and one.default_factory is MISSING:
                raise UsageError(f"{place} is missing", place)
        elif name == "parts":
            parts = _list(told[name], place)
            read[name] = tuple(_part(part, f"{place}[{at}]", inner) for at, part in enumerate(parts))
        else:
            read[name] = _value(name, told[name], place)
    return read


def _value(name: str, found: Any, place: str) -> Any:
    if name in _WORDS:
        if found not in _WORDS[name]:
            raise UsageError(f"{place} is {found!r}; it may be {', '.join(map(repr, _WORDS[name]))}", place)
    elif name == "provider_data":
        for provider, data in _mapping(found, place).items():
            _mapping(data, f"{place}.{provider}")
    elif name == "arguments":
        _mapping(found, place)
    elif name.startswith("is_"):
        if not isinstance(found, bool):
            raise UsageError(f"{place} is {_told(found)}; it may be true or false", place)
    elif not isinstance(found, str):
        raise UsageError(f"{place} is {_told(found)}; it may be a text", place)
    return found


def _mapping(found: object, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise UsageError(f"{where} is {_told(found)}; it may be an object", where)
    return found


def _list(found: object, where: str) -> Sequence[Any]:
    if not isinstance(found, list | tuple):
        raise UsageError(f"{where} is {_told(found)}; it may be a list", where)
    return found


def _told(found: object) -> str:
    return "null" if found is None else f"a {type(found).__name__}"
