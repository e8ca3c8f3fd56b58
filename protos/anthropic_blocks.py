"""The content blocks of Anthropic's messages, read into the canonical parts of messages.py.

Called by anthropic_messages.py. What is checked is the form; whether a model reads images is asked elsewhere. Documents
and search results that are texts become text, in the words that stand here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from .anthropic_replies import thought_in
from .errors import InvalidRequest
from .messages import Kept, Kind, Media, Message, Part, Reasoning, Text, ToolCall, ToolResult
from .openai_messages import MAX_CALLS, MAX_ID_CHARS
from .openai_parts import MAX_NAME_CHARS, MAX_PARTS, a_base64, from_url
from .strict_json import printable
from .wire_checks import JsonObject, a_flag, a_list, a_text, an_object, compact, one_of, refuse

BETWEEN = Text("\n\n")  # between two blocks of one who speaks: they are paragraphs of one turn
_MARKED = (Text, Media, ToolCall, ToolResult)  # what a prompt can be kept up to
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_SERVERS = ("server_tool_use", "container_upload")  # and all that end with _tool_result but the client's own
_OF_ASSISTANT = ("text", "thinking", "redacted_thinking", "tool_use")
_OF_USER = ("text", "image", "document", "search_result", "tool_result")
_OF_RESULT = ("text", "image", "document", "search_result")


@dataclass(slots=True)
class Announced:
    """The calls before a message: functions by the ids of their calls; and those whose result has come."""

    names: dict[str, str] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)


def read_texts(value: object, path: str) -> tuple[Text, ...]:
    """A system prompt: a string or a list of text blocks. Raises InvalidRequest naming the path."""
    if isinstance(value, str):
        return (Text(value),)
    return _paragraphs([_text(block, inner) for block, inner in _blocks(value, path)])


def read_user(value: object, path: str, announced: Announced) -> list[Message]:
    """A user's content: a message for each result of a tool, then what the user says, if anything."""
    if isinstance(value, str):
        return [Message(role="user", parts=(Text(value),))]
    found: list[Message] = []
    said: list[Part] = []
    for block, inner in _blocks(value, path):
        if _kind(block, inner, _OF_USER) != "tool_result":
            said += [BETWEEN] if said else []
            said += _user_parts(block, inner)
            continue
        if said:
            raise refuse(inner, "is a tool's result behind other blocks: results come first, then what the user says")
        found.append(Message(role="tool", parts=(_result(block, inner, announced),)))
    if said:
        found.append(Message(role="user", parts=tuple(said)))
    return found


def read_assistant(value: object, path: str, announced: Announced) -> Message:
    """An assistant's content; an empty list is an empty answer."""
    if isinstance(value, str):
        return Message(role="assistant", parts=(Text(value),))
    if value == []:
        return Message(role="assistant", parts=(Text(""),))
    parts: list[Part] = []
    for block, inner in _blocks(value, path):
        match _kind(block, inner, _OF_ASSISTANT):
            case "text":
                parts.append(_text(block, inner))
            case "tool_use":
                parts.append(_call(block, inner, announced))
            case _:
                parts.append(_thought(block, inner))
    if sum(isinstance(part, ToolCall) for part in parts) > MAX_CALLS:
        raise refuse(path, f"has more than {MAX_CALLS} calls")
    return Message(role="assistant", parts=tuple(parts))


def read_cache(given: JsonObject, path: str) -> Kept:
    """What a `cache_control` asks for, of a provider: here each prompt's beginning is kept without being asked."""
    if given.get("cache_control") is None:
        return ""
    path += ".cache_control"
    cache = an_object(given["cache_control"], path, {"type", "ttl"})
    one_of(cache.get("type"), f"{path}.type", ("ephemeral",))
    if cache.get("ttl") is not None:
        one_of(cache["ttl"], f"{path}.ttl", ("5m", "1h"))
    return "1h" if cache.get("ttl") == "1h" else "5m"


def with_mark(parts: Sequence[Part], kept: Kept) -> list[Part]:
    """`parts` of which the last one that can be is marked, where it is to be kept and is not."""
    found = list(parts)
    last = next((i for i in reversed(range(len(found))) if isinstance(found[i], _MARKED)), None)
    if kept and last is not None:
        part = found[last]
        assert isinstance(part, _MARKED)
        found[last] = part if part.kept else dataclasses.replace(part, kept=kept)
    return found


def _blocks(value: object, path: str) -> list[tuple[JsonObject, str]]:
    if value is None:
        raise refuse(path, "is missing")
    entries = a_list(value, path, most=MAX_PARTS, what="content blocks, or a string")
    return [(an_object(entry, f"{path}[{i}]"), f"{path}[{i}]") for i, entry in enumerate(entries)]


def _kind(block: JsonObject, path: str, kinds: Sequence[str]) -> str:
    kind = block.get("type")
    if isinstance(kind, str) and kind not in kinds:
        if kind in _SERVERS or (kind.endswith("_tool_result") and kind != "tool_result"):
            raise refuse(f"{path}.type", f"is {printable(kind, 40)}, of a tool that a server runs: this one runs none")
        if kind in (*_OF_ASSISTANT, *_OF_USER):
            raise refuse(f"{path}.type", f"is {kind}, which cannot stand here: {', '.join(kinds)} can")
    return one_of(kind, f"{path}.type", tuple(kinds))


def _fields(block: JsonObject, path: str, *names: str) -> JsonObject:
    an_object(block, path, {"type", "cache_control", *names})
    read_cache(block, path)
    return block


def _text(block: JsonObject, path: str) -> Text:
    one_of(block.get("type"), f"{path}.type", ("text",))
    given = _fields(block, path, "text", "citations")
    if given.get("citations") not in (None, []):
        raise refuse(f"{path}.citations", "are not read by models here, which read text: leave them out")
    return Text(a_text(given.get("text"), f"{path}.text", least=0), kept=read_cache(given, path))


def _thought(block: JsonObject, path: str) -> Reasoning:
    if block["type"] == "redacted_thinking":
        data = a_text(an_object(block, path, {"type", "data"}).get("data"), f"{path}.data", least=0)
        return Reasoning(data, is_redacted=True, path=path)
    given = an_object(block, path, {"type", "thinking", "signature"})
    text = a_text(given.get("thinking"), f"{path}.thinking", least=0)
    signature = "" if given.get("signature") is None else a_text(given["signature"], f"{path}.signature", least=0)
    return Reasoning(text or thought_in(signature) or "", signature=signature)


def _call(block: JsonObject, path: str, announced: Announced) -> ToolCall:
    given = _fields(block, path, "id", "name", "input", "caller", "toolset_name")
    if given.get("caller") not in (None, {"type": "direct"}):
        raise refuse(f"{path}.caller", "must be of type direct: no program calls tools here")
    _check_toolset(given, path)
    call_id = a_text(given.get("id"), f"{path}.id", most=MAX_ID_CHARS)
    if call_id in announced.names:
        raise refuse(f"{path}.id", "is the id of another call of this conversation")
    if "input" not in given:
        raise refuse(f"{path}.input", "is missing")
    name = a_text(given.get("name"), f"{path}.name", most=MAX_ID_CHARS)
    arguments = an_object(given["input"], f"{path}.input")
    announced.names[call_id] = name
    kept = read_cache(given, path)
    return ToolCall(id=call_id, name=name, arguments=arguments, text=compact(arguments), kept=kept)


def _result(block: JsonObject, path: str, announced: Announced) -> ToolResult:
    given = _fields(block, path, "tool_use_id", "content", "is_error", "toolset_name")
    _check_toolset(given, path)
    call_id = a_text(given.get("tool_use_id"), f"{path}.tool_use_id", most=MAX_ID_CHARS)
    if call_id not in announced.names:
        told = "is the id of no tool_use in an assistant message before it: send that message with its blocks too"
        raise refuse(f"{path}.tool_use_id", told)
    if call_id in announced.answered:
        raise refuse(f"{path}.tool_use_id", "has a result already: a call has one")
    announced.answered.add(call_id)
    parts: list[Part] = []
    content = given.get("content")
    if isinstance(content, str):
        parts.append(Text(content))
    elif content is not None and content != []:
        for inner, place in _blocks(content, f"{path}.content"):
            _kind(inner, place, _OF_RESULT)
            parts += [BETWEEN] if parts else []
            parts += _user_parts(inner, place)
    return ToolResult(
        call_id=call_id,
        name=announced.names[call_id],
        parts=tuple(part for part in parts if isinstance(part, Text | Media)),
        is_error=a_flag(given.get("is_error"), f"{path}.is_error") is True,
        kept=read_cache(given, path),
    )


def _check_toolset(given: JsonObject, path: str) -> None:
    if given.get("toolset_name") is not None:
        raise refuse(f"{path}.toolset_name", "names a toolset of Anthropic's models: there are none here")


def _user_parts(block: JsonObject, path: str) -> list[Part]:
    parts: list[Part]
    match block["type"]:
        case "text":
            parts = [_text(block, path)]
        case "image":
            parts = [_image(block, path)]
        case "search_result":
            parts = _search_result(block, path)
        case _:
            parts = _document(block, path)
    return with_mark(parts, read_cache(block, path))


def _image(block: JsonObject, path: str) -> Media:
    given = _fields(block, path, "source", "transformations")
    if given.get("transformations") not in (None, {}):
        raise refuse(f"{path}.transformations", "are not supported: send the image in the size that is to be read")
    return _media("image", given.get("source"), f"{path}.source", path, _IMAGES)


def _media(kind: Kind, value: object, path: str, place: str, types: tuple[str, ...]) -> Media:
    source = an_object(value, path)
    match one_of(source.get("type"), f"{path}.type", ("base64", "url", "file")):
        case "url":
            return from_url(kind, an_object(source, path, {"type", "url"}).get("url"), f"{path}.url", place)
        case "file":
            an_object(source, path, {"type", "file_id"})
            file_id = a_text(source.get("file_id"), f"{path}.file_id", most=MAX_NAME_CHARS)
            return Media(kind=kind, path=place, file_id=file_id)
    an_object(source, path, {"type", "media_type", "data"})
    media_type = one_of(source.get("media_type"), f"{path}.media_type", types)
    return Media(kind=kind, path=place, media_type=media_type, data=a_base64(source.get("data"), f"{path}.data"))


def _document(block: JsonObject, path: str) -> list[Part]:
    given = _fields(block, path, "source", "title", "context", "citations")
    _check_citations(given, path)
    title, context = (_optional(given.get(name), f"{path}.{name}") for name in ("title", "context"))
    inner = f"{path}.source"
    source = an_object(given.get("source"), inner)
    body: list[Part]
    match one_of(source.get("type"), f"{inner}.type", ("text", "content", "base64", "url", "file")):
        case "text":
            an_object(source, inner, {"type", "media_type", "data"})
            one_of(source.get("media_type"), f"{inner}.media_type", ("text/plain",))
            body = [Text(a_text(source.get("data"), f"{inner}.data", least=0))]
        case "content":
            body = _content(an_object(source, inner, {"type", "content"}).get("content"), f"{inner}.content")
        case _:
            body = [_media("file", source, inner, path, ("application/pdf",))]
    head = [f"Document: {title}" if title else "Document:", *([context] if context else [])]
    return [Text("\n".join(head) + "\n\n"), *body]


def _content(value: object, path: str) -> list[Part]:
    if isinstance(value, str):
        return [Text(value)]
    parts: list[Part] = []
    for block, inner in _blocks(value, path):
        kind = _kind(block, inner, ("text", "image"))
        parts += [BETWEEN] if parts else []
        parts.append(_text(block, inner) if kind == "text" else _image(block, inner))
    return parts


def _search_result(block: JsonObject, path: str) -> list[Part]:
    given = _fields(block, path, "source", "title", "content", "citations")
    _check_citations(given, path)
    source, title = (a_text(given.get(name), f"{path}.{name}") for name in ("source", "title"))
    return [Text(f"Search result: {title}\nSource: {source}\n\n"), *read_texts(given.get("content"), f"{path}.content")]


def _check_citations(given: JsonObject, path: str) -> None:
    if given.get("citations") is not None:
        path += ".citations"
        if a_flag(an_object(given["citations"], path, {"enabled"}).get("enabled"), f"{path}.enabled"):
            raise InvalidRequest(f"{path}.enabled: answers have no citations here: leave it out", f"{path}.enabled")


def _optional(value: object, path: str) -> str | None:
    return None if value is None else a_text(value, path, least=0)


def _paragraphs(texts: Sequence[Text]) -> tuple[Text, ...]:
    found: list[Text] = []
    for text in texts:
        found += [BETWEEN, text] if found else [text]
    return tuple(found)
