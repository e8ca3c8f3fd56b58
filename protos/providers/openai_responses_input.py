"""Canonical messages as instructions and input items of OpenAI's /v1/responses.

Called by openai_responses_requests.py. Items that the provider gave (reasoning with its encrypted_content, those of its
own tools) go back as they came; reasoning of others goes where `replay_reasoning` requires some, and OpenAI refuses it.
Not said, for want of words: that a result is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import (
    Media,
    Message,
    Part,
    ProviderData,
    Reasoning,
    Refusal,
    Text,
    ToolCall,
    ToolResult,
)
from diptych.protos.wire_checks import compact

from .codec import JsonObject, Note
from .conversation import CallIds, own_data
from .quirks import Quirks
from .request_fields import moved

# In provider_data. ITEM: fields of the item that a part was, besides those that the part says; AFTER: whole items that
# came behind it, and that no part can hold.
ITEM: Final = "item"
AFTER: Final = "after"
MOST_ID_CHARS: Final = 64
_ID: Final = re.compile(r"[\x21-\x7e]+")
_OURS: Final = ("message", "function_call")  # are said by parts
_SOUNDS = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/mp3": "mp3"}


class InputWriter:
    """Writes the messages of one request. `family`: whose provider_data goes along."""

    def __init__(self, quirks: Quirks, family: str) -> None:
        self.notes: list[Note] = []
        self._instructions: str | None = None
        self._quirks = quirks
        self._family = family
        self._items: list[JsonObject] = []
        self._ids = CallIds(_ID, MOST_ID_CHARS)
        self._waiting: list[str] = []  # the system's texts for the user's next turn

    def write(self, messages: Sequence[Message]) -> JsonObject:
        """The fields instructions and input. Raises InvalidRequest for what the format has no words for."""
        for i, message in enumerate(messages):
            path = f"messages[{i}]"
            if message.role not in ("system", "developer", "user"):
                self._settle()
            match message.role:
                case "system" | "developer":
                    self._system(message, path)
                case "user":
                    self._say("user", self._content(message.parts))
                case "assistant":
                    self._assistant(message)
                case "tool":
                    self._result(message)
        self._settle()
        self.notes += self._ids.notes()
        if not self._items:
            # instructions alone are not answered, what the system says is
            return {"input": [{"type": "message", "role": "system", "content": self._instructions or ""}]}
        told: JsonObject = {} if self._instructions is None else {"instructions": self._instructions}
        return told | {"input": self._items}

    def _system(self, message: Message, path: str) -> None:
        role = self._quirks.system_role
        if role == "first_user":
            self._waiting.append(self._words(message))
            self.notes.append(moved(path, "into the user's turn: this target takes no instructions apart"))
            return
        is_first = self._instructions is None and not self._items and message.role == "system"
        if is_first and not message.media and "instructions" not in self._quirks.unsupported:
            self._instructions = message.content
            return
        wanted = "developer" if role == "developer" else message.role
        if wanted != message.role:
            self.notes.append(Note("renamed", f"{path}.role", wanted))
        self._say(wanted, self._content(message.parts))

    def _words(self, message: Message) -> str:
        if message.media:
            path = message.media[0].path
            raise InvalidRequest(f"{path} is no text, and instructions are texts alone here: let the user say it", path)
        return message.content

    def _settle(self) -> None:
        """What the system said is a turn of its own where no turn of the user's follows."""
        if self._waiting:
            self._say("user", [])

    def _say(self, role: str, content: list[JsonObject]) -> None:
        if role == "user":
            content = [*({"type": "input_text", "text": text} for text in self._waiting), *content]
            self._waiting = []
        told: str | list[JsonObject] = content
        if self._quirks.flattens_content or (len(content) == 1 and content[0]["type"] == "input_text"):
            told = "".join(part["text"] for part in content)
        self._items.append({"type": "message", "role": role, "content": told})

    def _content(self, parts: Sequence[Part]) -> list[JsonObject]:
        found: list[JsonObject] = []
        for part in parts:
            if isinstance(part, Text):
                found.append({"type": "input_text", "text": part.text})
            elif isinstance(part, Media):
                found.append(self._media(part))
        return found

    def _media(self, part: Media) -> JsonObject:
        if part.kind not in self._quirks.media or self._quirks.flattens_content:
            raise InvalidRequest(f"{part.path}: this provider's format takes no {part.kind}: leave it out", part.path)
        if part.file_id:
            told = "is a file of this server, which the provider does not know: send its data in place of file_id"
            raise InvalidRequest(f"{part.path} {told}", part.path)
        address = part.url or f"data:{part.media_type or 'application/octet-stream'};base64,{part.data}"
        if part.kind == "image":
            return {"type": "input_image", "detail": part.detail or "auto", "image_url": address}
        if part.kind == "audio":
            if part.url or part.media_type not in _SOUNDS:
                told = "of sounds this provider's format takes the data of wav and mp3"
                raise InvalidRequest(f"{part.path}: {told}", part.path)
            sound = {"data": part.data, "format": _SOUNDS[part.media_type]}
            return {"type": "input_audio", "input_audio": sound}
        if part.url:
            return {"type": "input_file", "file_url": part.url}
        name = part.name or ("file.pdf" if part.media_type == "application/pdf" else "file")
        return {"type": "input_file", "filename": name, "file_data": address}

    def _assistant(self, message: Message) -> None:
        """One turn: items of what was said, called and thought, in their order."""
        turn = _Turn(self._family)
        turn.raw(message.provider_data)
        for part in message.parts:
            match part:
                case Reasoning():
                    self._reasoning(turn, part)
                case Text():
                    turn.say({"type": "output_text", "text": part.text, "annotations": []}, part.provider_data)
                case Refusal():
                    turn.say({"type": "refusal", "refusal": part.text}, {})
                case ToolCall():
                    call = {"call_id": self._ids.of_call(part.id), "name": part.name}
                    arguments = part.text or compact(part.arguments)
                    rest = _rest(part.provider_data, self._family)
                    turn.items.append({**rest, "type": "function_call", **call, "arguments": arguments})
            if isinstance(part, Text | Reasoning | ToolCall):
                turn.raw(part.provider_data)
        self._items += turn.finished()

    def _reasoning(self, turn: _Turn, part: Reasoning) -> None:
        own = own_data(part.provider_data, self._family).get(ITEM)
        if isinstance(own, Mapping):
            turn.items.append({"summary": [], **own, "type": "reasoning"})
        elif part.text and not part.is_redacted and self._quirks.replay_reasoning == "required":
            content = [{"type": "reasoning_text", "text": part.text}]
            name = f"rs_{len(self._items) + len(turn.items)}"
            turn.items.append({"type": "reasoning", "id": name, "summary": [], "content": content})

    def _result(self, message: Message) -> None:
        result = message.result
        assert isinstance(result, ToolResult)
        output: str | list[JsonObject] = "".join(part.text for part in result.parts if isinstance(part, Text))
        if any(isinstance(part, Media) for part in result.parts):
            output = self._content(result.parts)
        call_id = self._ids.of_result(result.call_id)
        self._items.append({"type": "function_call_output", "call_id": call_id, "output": output})


class _Turn:
    """An assistant's items in the making."""

    def __init__(self, family: str) -> None:
        self.items: list[JsonObject] = []
        self._family = family

    def say(self, content: JsonObject, data: ProviderData) -> None:
        """Words; those of one message of the provider's are one again, as are those without one."""
        rest = _rest(data, self._family)
        annotations = rest.pop("annotations", None)
        if annotations is not None and "annotations" in content:
            content["annotations"] = annotations
        last = self.items[-1] if self.items else {}
        if last.get("type") == "message" and (last.get("id") == rest.get("id") or content["type"] == "refusal"):
            last["content"].append(content)
        else:
            self.items.append({**rest, "type": "message", "role": "assistant", "content": [content]})

    def raw(self, data: ProviderData) -> None:
        """Items as they came."""
        found = own_data(data, self._family).get(AFTER)
        for item in found if isinstance(found, list) else ():
            if isinstance(item, Mapping) and isinstance(item.get("type"), str) and item["type"] not in _OURS:
                self.items.append(dict(item))

    def finished(self) -> list[JsonObject]:
        """The items. Ids are told beside reasoning alone, to which they bind the items; without it they are refused."""
        has_reasoning = any(item["type"] == "reasoning" for item in self.items)
        found = []
        for item in self.items:
            if item["type"] == "message":
                if not any(part.get("text") or part.get("refusal") for part in item["content"]):
                    continue
                item = _message(item, has_reasoning=has_reasoning)
            elif item["type"] == "function_call" and not has_reasoning:
                item.pop("id", None)
            found.append(item)
        return found


def _message(item: JsonObject, *, has_reasoning: bool) -> JsonObject:
    """A message with an id has its parts; one without is a text, in which a refusal is words like others."""
    if has_reasoning and item.get("id"):
        return item | {"status": "completed"}
    item.pop("id", None)
    text = "".join(part.get("text") or part.get("refusal") or "" for part in item["content"])
    return item | {"content": text}


def _rest(data: ProviderData, family: str) -> dict[str, Any]:
    found = own_data(data, family).get(ITEM)
    return dict(found) if isinstance(found, Mapping) else {}
