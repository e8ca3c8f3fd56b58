"""What may stand in a template's slot, by the slot's kind, and the text, parts or messages that it becomes.

templates.py asks. Values are data: no address in a text is followed, no file is opened, nothing is read as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

from diptych.protos.messages import Kind, Media, Message, Part, Text

from .conversation import is_rendered, messages_of, parts_of, told
from .errors import UsageError

MESSAGES = "MESSAGES"
KINDS = ("text", "image", "images", "audio", "document", "parts", "lines", "json", "messages")
_WORDS = (str, int, float, Decimal, date, time, timedelta, UUID, PurePath)
_MEDIA: dict[str, Kind] = {"image": "image", "images": "image", "audio": "audio", "document": "file"}


class SlotFault(Exception):
    """A value does not fit. Its words go on from "slot {x} of line 3"; `{name:` in them stands for the slot's name."""


def inserted(kind: str, value: Any) -> str | tuple[Part, ...] | tuple[Message, ...]:
    """A text, parts, or for kind messages, messages. Raises SlotFault."""
    match kind:
        case "text":
            return _words(value, "")
        case "lines":
            return _lines(value)
        case "json":
            return _json(value)
        case "parts":
            return _parts(value)
        case "messages":
            return _messages(value)
        case "images":
            if isinstance(value, str | bytes | Media) or not isinstance(value, Sequence):
                raise SlotFault(f"takes a list of llm.image(...), not {told(value)}")
            return tuple(_media(kind, one, f"[{at}]") for at, one in enumerate(value))
    return (_media(kind, value, ""),)


def _words(value: Any, place: str) -> str:
    if isinstance(value, Enum) and isinstance(value.value, str | int | float):
        value = value.value
    if isinstance(value, _WORDS):
        return format(value, "")
    here = _holds(place)
    if value is None:
        raise SlotFault(f'{here} None: give a text, "" for nothing')
    if isinstance(value, Media | Text):
        kind = {"file": "document"}.get(value.kind, value.kind) if isinstance(value, Media) else "parts"
        raise SlotFault(f"{here} {_what(value)}: write the slot {{name:{kind}}}")
    if isinstance(value, bytes | bytearray):
        raise SlotFault(
            f"{here} {told(value)}: decode it, or make it a part by llm.image(data=...) or llm.document(data=...)"
        )
    if isinstance(value, Sequence | set | frozenset):
        raise SlotFault(f"{here} {told(value)}: write the slot {{name:lines}} for a line each, or {{name:json}}")
    raise SlotFault(f"{here} {told(value)}: give a text or a number, or write the slot {{name:json}}")


def _lines(value: Any) -> str:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise SlotFault(f"takes a list of texts, not {told(value)}")
    return "\n".join(_words(one, f"[{at}]") for at, one in enumerate(value))


def _json(value: Any) -> str:
    from pydantic_core import PydanticSerializationError, to_jsonable_python

    try:
        plain = to_jsonable_python(value, by_alias=True)
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as exc:
        raise SlotFault(f"holds {told(value)}, which cannot be written as JSON: {exc}") from exc


def _parts(value: Any) -> tuple[Part, ...]:
    try:
        return parts_of(value, "its value")
    except UsageError as exc:
        raise SlotFault(f"takes parts: {exc}") from None


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        raise SlotFault("takes llm.user(...), llm.assistant(...), ... or a reply's .messages, not a text")
    if isinstance(value, Sequence) and not value:
        return ()
    if (
        not isinstance(value, Message)
        and not is_rendered(value)
        and not (isinstance(value, Sequence) and all(isinstance(one, Message) for one in value))
    ):
        raise SlotFault(
            f"takes a list of llm.user(...), llm.assistant(...), or a reply's .messages, not {_list(value)}"
        )
    try:
        return messages_of(value, "its value")
    except UsageError as exc:
        raise SlotFault(f"takes messages: {exc}") from None


def _list(value: Any) -> str:
    if isinstance(value, Sequence):
        odd = next(one for one in value if not isinstance(one, Message))
        return f"a list with {told(odd)}"
    return told(value)


def _media(kind: str, value: Any, place: str) -> Media:
    wanted = _MEDIA[kind]
    verb = {"image": "llm.image", "audio": "llm.audio", "file": "llm.document"}[wanted]
    if isinstance(value, Media) and value.kind == wanted:
        return value
    what = "a text" if isinstance(value, str) else _what(value)
    raise SlotFault(f"{_holds(place)} {what}, and takes what {verb} gives: {verb}(url=...), (path=...) or (data=...)")


def _holds(place: str) -> str:
    return f"holds at {place}" if place else "is"


def _what(value: object) -> str:
    if isinstance(value, Media):
        return {"image": "an image", "audio": "a sound", "file": "a document"}[value.kind]
    return told(value)
