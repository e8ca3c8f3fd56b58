"""What OpenAI's fields of an assistant's message cannot say, so that it comes back with the message: proofs of
reasoning, providers' data of parts. It rides in `provider_specific_fields`, which clients send back as they got it.

`carried` writes it for chat answers, `restored` is called by openai_messages.py. Signatures are their makers' to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from .errors import InvalidRequest
from .messages import Message, Part, ProviderData, Reasoning, Refusal, Text, ToolCall
from .wire_checks import JsonObject, a_flag, a_list, a_text, an_object, may_fit, one_of, refuse

OWN: Final = "diptych"  # the key below which it stands, beside what other servers may have left there
MAX_BYTES: Final = 1 << 20
_MAX_PARTS: Final = 4096
_KINDS: Final = ("text", "refusal", "reasoning", "call")


def carried(message: Message) -> JsonObject | None:
    """The value of the field; None where the message's other fields say everything."""
    parts = [_told(part) for part in message.parts]
    if not message.provider_data and not any(part.keys() - {"kind", "chars"} for part in parts):
        return None
    told: JsonObject = {"parts": parts}
    if message.provider_data:
        told["data"] = _plain(message.provider_data)
    return {OWN: told}


def restored(message: Message, value: object, path: str) -> Message:
    """`message` with what it was sent out with. Where its texts are others by now, what was said of them is void, and
    the message is left as it is. Raises InvalidRequest naming the place below `path`.
    """
    if not isinstance(value, dict) or OWN not in value:  # another server's
        return message
    if not may_fit(value, MAX_BYTES):
        raise refuse(path, f"has more than {MAX_BYTES} bytes of JSON")
    path = f"{path}.{OWN}"
    told = an_object(value[OWN], path, {"parts", "data"})
    data = _data(told.get("data"), f"{path}.data")
    entries = a_list(told.get("parts"), f"{path}.parts", most=_MAX_PARTS, what="parts", may_be_empty=True)
    parts = _Restoring(message).parts([_entry(entry, f"{path}.parts[{i}]") for i, entry in enumerate(entries)])
    return message if parts is None else replace(message, parts=tuple(parts), provider_data=data)


def _told(part: Part) -> JsonObject:
    match part:
        case Text():
            told: JsonObject = {"kind": "text", "chars": len(part.text)}
        case Refusal():
            return {"kind": "refusal", "chars": len(part.text)}
        case Reasoning(is_redacted=True):
            told = {"kind": "reasoning", "chars": 0, "signature": part.text, "is_redacted": True}
        case Reasoning():
            told = {"kind": "reasoning", "chars": len(part.text)}
            told |= {"signature": part.signature} if part.signature else {}
        case ToolCall():
            told = {"kind": "call"}
        case _:
            raise ValueError(f"an answer holds no {type(part).__name__}")
    return told | ({"data": _plain(part.provider_data)} if part.provider_data else {})


def _plain(data: ProviderData) -> JsonObject:
    return {name: dict(said) for name, said in data.items()}


def _data(value: object, path: str) -> Mapping[str, JsonObject]:
    if value is None:
        return {}
    return {name: an_object(said, f"{path}.{name[:64]}") for name, said in an_object(value, path).items()}


def _entry(value: object, path: str) -> JsonObject:
    entry = an_object(value, path, {"kind", "chars", "signature", "is_redacted", "data"})
    one_of(entry.get("kind"), f"{path}.kind", _KINDS)
    chars = entry.get("chars", 0)
    if type(chars) is not int or chars < 0:
        raise InvalidRequest(f"{path}.chars must be a whole number from 0", f"{path}.chars")
    if entry.get("signature") is not None:
        a_text(entry["signature"], f"{path}.signature", least=0)
    a_flag(entry.get("is_redacted"), f"{path}.is_redacted")
    return {**entry, "chars": chars, "data": _data(entry.get("data"), f"{path}.data")}


class _Restoring:
    """Of one message."""

    def __init__(self, message: Message) -> None:
        said = message.parts
        self._left = {
            "text": "".join(part.text for part in said if isinstance(part, Text)),
            "refusal": message.refusal or "",
            "reasoning": message.reasoning_content or "",
        }
        self._calls = list(message.tool_calls)

    def parts(self, entries: list[JsonObject]) -> list[Part] | None:
        """None: the message says something else by now."""
        found = []
        for entry in entries:
            if (part := self._part(entry)) is None:
                return None
            found.append(part)
        return None if self._calls or any(self._left.values()) else found

    def _part(self, entry: JsonObject) -> Part | None:
        kind, data = entry["kind"], entry["data"]
        if kind == "call":
            return replace(self._calls.pop(0), provider_data=data) if self._calls else None
        signature = entry.get("signature") or ""
        if kind == "reasoning" and entry.get("is_redacted"):
            return Reasoning(signature, is_redacted=True, provider_data=data)
        left, chars = self._left[kind], entry["chars"]
        if len(left) < chars:
            return None
        text, self._left[kind] = left[:chars], left[chars:]
        match kind:
            case "text":
                return Text(text, data)
            case "refusal":
                return Refusal(text)
        return Reasoning(text, signature, provider_data=data)
