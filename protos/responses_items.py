"""Items of /v1/responses and the canonical messages of messages.py: what was said, called, thought and answered.

An ItemReader reads the items of one conversation in their order, those of stored responses first, and keeps them in
the form in which they are stored and listed. What an assistant said in neighbouring items is one message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .errors import InvalidRequest
from .messages import Media, Message, Reasoning, Refusal, Role, Text, ToolCall, ToolResult
from .openai_messages import MAX_CALLS, MAX_ID_CHARS
from .openai_parts import MAX_NAME_CHARS, MAX_PARTS, a_base64, from_url, read_sound, without_breakpoint
from .strict_json import MAX_CONTAINERS, parse_inner, printable
from .wire_checks import JsonObject, a_list, a_text, an_object, compact, is_default, one_of, refuse

MAX_ITEMS: Final = 4096  # of a conversation, those of the responses before it included
RESPONSE_ID: Final = re.compile(r"resp_([0-9a-f]{24})")
ITEM_ID: Final = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{24})[0-9a-f]{4}")
FIRST_OUTPUT: Final = 0x8000  # the number of the first item of an answer; those of the input begin with 0
INPUT_ROLES: tuple[Role, ...] = ("user", "assistant", "system", "developer")
_STATUS = ("in_progress", "completed", "incomplete")
_PHASES = ("commentary", "final_answer")
_PACKED = "\0"  # before what is sealed as JSON; no model writes it
_DETAILS = ("auto", "low", "high", "original")
_NONE: tuple[object, ...] = (None,)
# Fields that change nothing at these values, by the type of the item.
_FIXED: dict[str, dict[str, tuple[object, ...]]] = {
    "function_call": {"async": (None, False), "caller": (None, {"type": "direct"}), "namespace": _NONE},
    "function_call_output": {"caller": (None, {"type": "direct"}), "namespace": _NONE, "created_by": _NONE},
    "message": {},
    "reasoning": {},
}
_KNOWN: dict[str, frozenset[str]] = {
    "function_call": frozenset({"type", "id", "call_id", "name", "arguments", "parsed_arguments", "status"}),
    "function_call_output": frozenset({"type", "id", "call_id", "name", "output", "status"}),
    "message": frozenset({"type", "id", "role", "content", "phase", "status"}),
    "reasoning": frozenset({"type", "id", "summary", "content", "encrypted_content", "status"}),
}

Unseal = Callable[[str], str | None]  # the reasoning in an encrypted_content; None: it is not this server's


class UnknownItem(InvalidRequest):
    """No stored response of the tenant holds the item."""

    code = "item_not_found"
    http_status = 404


class ItemIds:
    """The ids of one response's items; each tells the response, so that a reference to an item finds it."""

    def __init__(self, response_id: str, first: int = 0) -> None:
        found = RESPONSE_ID.fullmatch(response_id)
        assert found is not None, response_id
        self._stem = found[1]
        self._next = first

    def new(self, prefix: str) -> str:
        """msg, rs, fc or fco, and what comes behind it."""
        self._next += 1
        return f"{prefix}_{self._stem}{self._next - 1:04x}"


def response_of(item_id: str) -> str | None:
    """The response that an item belongs to; None for an id that this server never gave."""
    found = ITEM_ID.fullmatch(item_id)
    return None if found is None else f"resp_{found[1]}"


def references(items: Sequence[object]) -> list[str]:
    """The ids in a list's item_references, as they came, for what holds them to be read."""
    found = []
    for item in items:
        if isinstance(item, dict) and _is_reference(item) and isinstance(item.get("id"), str):
            found.append(item["id"])
    return found


def _is_reference(item: JsonObject) -> bool:
    return item.get("type") == "item_reference" or (item.get("type") is None and item.keys() <= {"type", "id"})


class ItemReader:
    """One conversation, for one request."""

    def __init__(self, ids: ItemIds, unseal: Unseal, referred: Mapping[str, JsonObject]) -> None:
        """`ids` for items without one; `referred`: what references mean, by id."""
        self._ids = ids
        self._unseal = unseal
        self._referred = referred
        self._seen: set[str] = set()
        self._functions: dict[str, str] = {}  # by the id of the call
        self._answered: set[str] = set()
        self._containers = MAX_CONTAINERS
        self._num_items = 0
        self._turns = _Turns()

    def instruct(self, text: str) -> None:
        """Before all items: what the system says."""
        self._turns.add(Message(role="system", parts=(Text(text),)))

    def read(self, items: Sequence[object], path: str) -> list[JsonObject]:
        """The next items; as they are kept. Raises InvalidRequest naming the place below `path`."""
        self._num_items += len(items)
        if self._num_items > MAX_ITEMS:
            raise refuse(path, f"makes a conversation of {self._num_items} items; the limit is {MAX_ITEMS}")
        return [self._item(item, f"{path}[{i}]") for i, item in enumerate(items)]

    def messages(self) -> tuple[Message, ...]:
        """All that was read."""
        return self._turns.finish()

    def _item(self, value: object, path: str) -> JsonObject:
        item = an_object(value, path)
        if _is_reference(item):
            an_object(item, path, {"type", "id"})
            wanted = a_text(item.get("id"), f"{path}.id", most=MAX_ID_CHARS)
            if wanted not in self._referred:
                told = "is the id of no item of a stored response: send the item itself"
                raise UnknownItem(f"{path}.id {told}", f"{path}.id")
            item = self._referred[wanted]
        kind = item.get("type", "message")
        if kind is None:
            kind = "message"
        if not isinstance(kind, str) or kind not in _KNOWN:
            shown = printable(kind, 40) if isinstance(kind, str) else "no string"
            told = f"is {shown}; here may stand: {', '.join(sorted(_KNOWN))}, item_reference"
            raise refuse(f"{path}.type", told)
        fixed = _FIXED[kind]
        an_object(item, path, _KNOWN[kind] | fixed.keys())
        for name, defaults in fixed.items():
            if not is_default(item.get(name), defaults):
                raise refuse(f"{path}.{name}", "is not supported: leave it out")
        if item.get("status") is not None:
            one_of(item["status"], f"{path}.status", _STATUS)
        match kind:
            case "message":
                return self._message(item, path)
            case "function_call":
                return self._call(item, path)
            case "function_call_output":
                return self._result(item, path)
        return self._reasoning(item, path)

    def _id(self, item: JsonObject, path: str, prefix: str) -> str:
        if item.get("id") is None:
            return self._ids.new(prefix)
        name = a_text(item["id"], f"{path}.id", most=MAX_ID_CHARS)
        if name in self._seen:
            told = "is the id of an item before it: with previous_response_id only what is new is sent"
            raise refuse(f"{path}.id", told)
        self._seen.add(name)
        return name

    def _message(self, item: JsonObject, path: str) -> JsonObject:
        role = one_of(item.get("role"), f"{path}.role", INPUT_ROLES)
        is_answer = role == "assistant"
        content, parts = _content(item.get("content"), f"{path}.content", is_answer=is_answer)
        kept: JsonObject = {"id": self._id(item, path, "msg"), "type": "message", "role": role}
        kept |= {"status": item.get("status") or "completed", "content": content}
        if item.get("phase") is not None:
            kept["phase"] = one_of(item["phase"], f"{path}.phase", _PHASES)
        if is_answer:
            self._turns.say([part for part in parts if not isinstance(part, Media)])
        else:
            self._turns.add(Message(role=role, parts=tuple(parts)))
        return kept

    def _call(self, item: JsonObject, path: str) -> JsonObject:
        call_id = a_text(item.get("call_id"), f"{path}.call_id", most=MAX_ID_CHARS)
        if call_id in self._functions:
            raise refuse(f"{path}.call_id", "is the call_id of a function_call before it: each call has its own")
        name = a_text(item.get("name"), f"{path}.name", most=MAX_ID_CHARS)
        if isinstance(item.get("arguments"), dict):
            raise refuse(f"{path}.arguments", "must be a string that holds the JSON of an object, not the object")
        text = a_text(item.get("arguments"), f"{path}.arguments", least=0)
        arguments: JsonObject = {}
        if item.get("status") in (None, "completed"):  # what was cut off is told as far as it came
            arguments, containers = parse_inner(text or "{}", f"{path}.arguments", self._containers)
            self._containers -= containers
        self._functions[call_id] = name
        if not self._turns.call(ToolCall(id=call_id, name=name, arguments=arguments, text=text or "{}")):
            raise refuse(path, f"is one call more than {MAX_CALLS}, which one turn may hold")
        kept = {"id": self._id(item, path, "fc"), "type": "function_call", "call_id": call_id, "name": name}
        return kept | {"arguments": text, "status": item.get("status") or "completed"}

    def _result(self, item: JsonObject, path: str) -> JsonObject:
        call_id = a_text(item.get("call_id"), f"{path}.call_id", most=MAX_ID_CHARS)
        if call_id not in self._functions:
            told = "is the call_id of no function_call before it: send that item too, or its previous_response_id"
            raise refuse(f"{path}.call_id", told)
        if call_id in self._answered:
            raise refuse(f"{path}.call_id", "was answered by a function_call_output before it")
        self._answered.add(call_id)
        name = item.get("name")
        if name is not None:
            a_text(name, f"{path}.name", most=MAX_ID_CHARS)
        output = item.get("output")
        if isinstance(output, str):
            parts: Sequence[Text | Media] = (Text(output),)
        else:
            output, found = _content(output, f"{path}.output", is_answer=False)
            parts = [part for part in found if isinstance(part, Text | Media)]
        result = ToolResult(call_id=call_id, name=name or self._functions[call_id], parts=tuple(parts))
        self._turns.add(Message(role="tool", parts=(result,)))
        kept = {"id": self._id(item, path, "fco"), "type": "function_call_output", "call_id": call_id}
        return kept | {"output": output, "status": item.get("status") or "completed"}

    def _reasoning(self, item: JsonObject, path: str) -> JsonObject:
        summary = _texts(item.get("summary"), f"{path}.summary", "summary_text")
        content = _texts(item.get("content"), f"{path}.content", "reasoning_text")
        thought = "".join(content) or "\n".join(summary)
        kept: JsonObject = {"id": self._id(item, path, "rs"), "type": "reasoning"}
        kept["summary"] = [{"type": "summary_text", "text": text} for text in summary]
        if item.get("content") is not None:
            kept["content"] = [{"type": "reasoning_text", "text": text} for text in content]
        if item.get("encrypted_content") is not None:
            sealed = a_text(item["encrypted_content"], f"{path}.encrypted_content")
            opened = self._unseal(sealed)
            if opened is None:
                told = "was not made by this server for this tenant: leave the item out"
                raise refuse(f"{path}.encrypted_content", told)
            kept["encrypted_content"] = sealed
            part = unpacked(opened)
        else:
            part = Reasoning(thought)
        kept["status"] = item.get("status") or "completed"
        if part.text or part.signature:
            self._turns.think(part)
        return kept


def packed(part: Reasoning) -> str:
    """What is sealed of reasoning: its text, or with a proof of its maker's all of it."""
    if not part.signature and not part.is_redacted:
        return part.text
    told = {"text": part.text, "signature": part.signature, "is_redacted": part.is_redacted}
    return _PACKED + compact(told)


def unpacked(opened: str) -> Reasoning:
    """The reverse, of what this server sealed."""
    if not opened.startswith(_PACKED):
        return Reasoning(opened)
    told = json.loads(opened.removeprefix(_PACKED))
    return Reasoning(told["text"], told["signature"], told["is_redacted"])


class _Turns:
    """Items joined to messages: reasoning, words and calls of an assistant that follow one another are one turn."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._clear()

    def _clear(self) -> None:
        self._thoughts: list[Reasoning] = []
        self._words: list[Text | Refusal] = []
        self._calls: list[ToolCall] = []

    def add(self, message: Message) -> None:
        """Somebody else's turn."""
        self._close()
        self._messages.append(message)

    def think(self, part: Reasoning) -> None:
        """Comes before words and calls, so behind them a new turn begins."""
        if self._words or self._calls:
            self._close()
        self._thoughts.append(part)

    def say(self, parts: Sequence[Text | Refusal]) -> None:
        """Two messages of words alone are two turns; words behind a call belong to the call's."""
        if self._words and not self._calls:
            self._close()
        self._words += parts

    def call(self, call: ToolCall) -> bool:
        """False: the turn is full."""
        self._calls.append(call)
        return len(self._calls) <= MAX_CALLS

    def _close(self) -> None:
        if self._thoughts or self._words or self._calls:
            words = self._words or ([] if self._calls else [Text("")])
            self._messages.append(Message(role="assistant", parts=(*self._thoughts, *words, *self._calls)))
        self._clear()

    def finish(self) -> tuple[Message, ...]:
        self._close()
        return tuple(self._messages)


def _texts(value: object, path: str, kind: str) -> list[str]:
    if value is None:
        return []
    found = []
    for i, part in enumerate(a_list(value, path, most=MAX_PARTS, what="parts", may_be_empty=True)):
        place = f"{path}[{i}]"
        one_of(an_object(part, place, {"type", "text"}).get("type"), f"{place}.type", (kind,))
        found.append(a_text(part.get("text"), f"{place}.text", least=0))
    return found


def _content(value: object, path: str, *, is_answer: bool) -> tuple[list[JsonObject], list[Text | Refusal | Media]]:
    """The parts as they are kept, and as messages have them."""
    if isinstance(value, str):
        value = [{"type": "output_text" if is_answer else "input_text", "text": value}]
    elif value is None:
        raise refuse(path, "is missing")
    kept: list[JsonObject] = []
    parts: list[Text | Refusal | Media] = []
    for i, entry in enumerate(a_list(value, path, most=MAX_PARTS, what="parts", may_be_empty=is_answer)):
        told, part = _answered(entry, f"{path}[{i}]") if is_answer else _asked(entry, f"{path}[{i}]")
        kept.append(told)
        parts.append(part)
    return kept, parts


def _answered(value: object, path: str) -> tuple[JsonObject, Text | Refusal]:
    kind = one_of(an_object(value, path).get("type"), f"{path}.type", ("output_text", "refusal"))
    assert isinstance(value, dict)
    if kind == "refusal":
        an_object(value, path, {"type", "refusal"})
        text = a_text(value.get("refusal"), f"{path}.refusal", least=0)
        return {"type": kind, "refusal": text}, Refusal(text)
    an_object(value, path, {"type", "text", "annotations", "logprobs", "parsed"})
    text = a_text(value.get("text"), f"{path}.text", least=0)
    notes = value.get("annotations")
    if notes is not None:
        a_list(notes, f"{path}.annotations", most=MAX_PARTS, what="annotations", may_be_empty=True)
    if value.get("logprobs") is not None and not isinstance(value["logprobs"], list):
        raise refuse(f"{path}.logprobs", "must be a list")
    return {"type": kind, "text": text, "annotations": notes or [], "logprobs": []}, Text(text)


def _asked(value: object, path: str) -> tuple[JsonObject, Text | Media]:
    kinds = ("input_text", "input_image", "input_file", "input_audio")
    kind = one_of(an_object(value, path).get("type"), f"{path}.type", kinds)
    assert isinstance(value, dict)
    given = without_breakpoint(value, path)
    match kind:
        case "input_text":
            an_object(given, path, {"type", "text"})
            text = a_text(given.get("text"), f"{path}.text", least=0)
            return {"type": kind, "text": text}, Text(text)
        case "input_image":
            return given, _image(given, path)
        case "input_file":
            return given, _file(given, path)
    return given, read_sound(an_object(given, path, {"type", kind}).get(kind), f"{path}.{kind}", path)


def _image(given: JsonObject, path: str) -> Media:
    an_object(given, path, {"type", "detail", "file_id", "image_url"})
    detail = given.get("detail")
    if detail is not None:
        one_of(detail, f"{path}.detail", _DETAILS)
    name, value = _only(given, path, ("image_url", "file_id"))
    if name == "file_id":
        return Media(kind="image", path=path, file_id=a_text(value, f"{path}.file_id", most=MAX_ID_CHARS))
    return from_url("image", value, f"{path}.image_url", path, detail=detail or "")


def _file(given: JsonObject, path: str) -> Media:
    an_object(given, path, {"type", "detail", "file_data", "file_id", "file_url", "filename"})
    if given.get("detail") is not None:
        one_of(given["detail"], f"{path}.detail", _DETAILS[:3])
    called = given.get("filename")
    title = "" if called is None else a_text(called, f"{path}.filename", most=MAX_NAME_CHARS)
    name, value = _only(given, path, ("file_data", "file_id", "file_url"))
    place = f"{path}.{name}"
    if name == "file_id":
        return Media(kind="file", path=path, file_id=a_text(value, place, most=MAX_ID_CHARS), name=title)
    if name == "file_data" and not (isinstance(value, str) and value.startswith("data:")):
        return Media(kind="file", path=path, data=a_base64(value, place), name=title)
    found = from_url("file", value, place, path)
    return Media(kind="file", path=path, media_type=found.media_type, data=found.data, url=found.url, name=title)


def _only(given: JsonObject, path: str, names: tuple[str, ...]) -> tuple[str, object]:
    found = [name for name in names if given.get(name) is not None]
    if len(found) != 1:
        raise refuse(path, f"must have one of {', '.join(names)}")
    return found[0], given[found[0]]
