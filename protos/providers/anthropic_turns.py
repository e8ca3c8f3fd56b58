"""A conversation as Anthropic's `system` and `messages`.

Called by anthropic_requests.py. Media stand as their base64 or address; what a model reads of them is its provider's to
say. Systems' messages amid a conversation go before it: few models take them where they stand.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import assert_never

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Kept, Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest

from .codec import JsonObject, Note
from .conversation import Blocks, CallIds, Said, goes_back, input_of, own_blocks, own_data, turns
from .quirks import Quirks
from .request_fields import moved, unsupported

_IDS = re.compile(r"[A-Za-z0-9_-]+")
_MOST_ID_CHARS = 64
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_PDF = "application/pdf"
_TEXTS = ("application/json", "application/xml", "application/yaml", "application/x-yaml")
_OF_TEXT = ("cache_control", "citations")  # what its maker says of a block, and reads again
_OF_CALL = ("cache_control", "caller", "toolset_name")


@dataclass(slots=True)
class Turns:
    """The conversation of `request` in the making; `name` is the format's, for errors."""

    request: ChatRequest
    quirks: Quirks
    family: str
    name: str
    is_claude: bool = False
    goes_on: bool = False  # the last message begins the answer
    notes: list[Note] = field(default_factory=list)
    ids: CallIds = field(default_factory=lambda: CallIds(_IDS, _MOST_ID_CHARS))
    _strips: bool = False

    def made(self) -> tuple[list[JsonObject], list[JsonObject]]:
        """System blocks and messages. Raises InvalidRequest for what the format cannot say."""
        systems: list[Message] = []
        said: list[Said] = []
        first_user = self.quirks.system_role == "first_user"
        for i, message in enumerate(self.request.messages):
            if message.role in ("system", "developer"):
                systems.append(message)
                if said:
                    self.notes.append(moved(f"messages[{i}]", "before the conversation, with the system's other words"))
                continue
            found = self._said(message, i)
            if not found.blocks and not found.results:
                self.notes.append(moved(f"messages[{i}]", "says nothing that can be sent, and is left out"))
            said.append(found)
        system = self._system(systems)
        if first_user and system:
            said.insert(0, Said("user", system))
            system = []
        messages = turns(said)
        if not messages:
            raise InvalidRequest(f"messages hold nothing that {self.name} could answer: say something", "messages")
        if self.goes_on:
            self._trim(messages[-1])
            if self.quirks.prefill_field:
                messages[-1][self.quirks.prefill_field] = True
        self.notes += self.ids.notes()
        return system, messages

    def _system(self, messages: list[Message]) -> list[JsonObject]:
        found: list[JsonObject] = []
        for message in messages:
            blocks = Blocks(_text)
            for part in message.parts:
                if isinstance(part, Text):
                    blocks.text(part.text, self._kept(part, ("cache_control",)))
                elif isinstance(part, Media):
                    raise self._cannot(part, "a system's message holds texts alone")
            found += blocks.done()
        return found

    def _said(self, message: Message, i: int) -> Said:
        role: str = message.role
        if role == "tool":
            result = message.result
            assert result is not None
            return Said("user", results=[self._result(result)])
        blocks = Blocks(_text, keeps=role == "assistant")
        blocks.add(*own_blocks(message.provider_data, self.family))
        for part in message.parts:
            match part:
                case Text():
                    names = _OF_TEXT if role == "assistant" else ("cache_control",)
                    blocks.text(part.text, self._kept(part, names))
                case Refusal():
                    blocks.text(part.text)
                    self.notes.append(moved(f"messages[{i}].refusal", "a text: the format has no refusals"))
                case Media():
                    blocks.add(self.media(part))
                case ToolCall():
                    blocks.add(self._call(part))
                case Reasoning():
                    blocks.add(*self._reasoning(part, i))
                case ToolResult():
                    raise InvalidRequest(f"messages[{i}] holds a tool's result beside other parts", f"messages[{i}]")
                case _:
                    assert_never(part)
            if isinstance(part, Text | Reasoning | ToolCall):
                blocks.add(*own_blocks(part.provider_data, self.family))
        return Said("assistant" if role == "assistant" else "user", blocks.done())

    def _kept(self, part: Text | ToolCall, names: tuple[str, ...]) -> JsonObject:
        data = own_data(part.provider_data, self.family)
        return cache_control(part.kept) | {name: data[name] for name in names if data.get(name) is not None}

    def _call(self, part: ToolCall) -> JsonObject:
        made = {"type": "tool_use", "id": self.ids.of_call(part.id), "name": part.name, "input": input_of(part)}
        return made | self._kept(part, _OF_CALL)

    def _result(self, result: ToolResult) -> JsonObject:
        blocks = Blocks(_text)
        for part in result.parts:
            if isinstance(part, Text):
                blocks.text(part.text, cache_control(part.kept))
            else:
                blocks.add(self.media(part))
        made: JsonObject = {"type": "tool_result", "tool_use_id": self.ids.of_result(result.call_id)}
        if content := blocks.done():
            made["content"] = content
        return made | ({"is_error": True} if result.is_error else {}) | cache_control(result.kept)

    def _reasoning(self, part: Reasoning, i: int) -> list[JsonObject]:
        if not goes_back(part, self.family, self.quirks, needs_proof=self.is_claude):
            if not self._strips:
                self._strips = True
                told = "not sent: no proof of this provider came with it"
                self.notes.append(moved(f"messages[{i}].reasoning", told))
            return []
        if part.is_redacted:
            return [{"type": "redacted_thinking", "data": part.text}]
        return [{"type": "thinking", "thinking": part.text, "signature": part.signature}]

    def media(self, part: Media) -> JsonObject:
        """The block of an image or a document."""
        return self._shown(part) | cache_control(part.kept)

    def _shown(self, part: Media) -> JsonObject:
        if part.kind not in self.quirks.media or part.kind == "audio":
            article = {"image": "images", "audio": "sounds", "file": "files"}[part.kind]
            raise self._cannot(part, f"no {article} can be sent to this provider: leave it out or choose another model")
        if part.file_id:
            raise self._cannot(part, "a file_id of this server means nothing to the provider: send its data or a url")
        if part.kind == "image":
            return self._image(part)
        block: JsonObject = {"type": "document", "source": self._document(part)}
        return block | ({"title": part.name} if part.name else {})

    def _image(self, part: Media) -> JsonObject:
        if part.detail in ("low", "high"):
            self.notes.append(unsupported(f"{part.path}.detail", f"{self.name} has no such parameter"))
        if part.url:
            return {"type": "image", "source": {"type": "url", "url": part.url}}
        if part.media_type not in _IMAGES:
            raise self._cannot(part, f"is {part.media_type or 'of no type'}: {', '.join(_IMAGES)} can be sent")
        source = {"type": "base64", "media_type": part.media_type, "data": _packed(part.data)}
        return {"type": "image", "source": source}

    def _document(self, part: Media) -> JsonObject:
        if part.url:
            return {"type": "url", "url": part.url}
        if part.media_type == _PDF:
            return {"type": "base64", "media_type": _PDF, "data": _packed(part.data)}
        if part.media_type.startswith("text/") or part.media_type in _TEXTS:
            try:
                text = base64.b64decode(part.data).decode()
            except (binascii.Error, ValueError):
                raise self._cannot(part, f"is {part.media_type} that is no base64 of UTF-8") from None
            return {"type": "text", "media_type": "text/plain", "data": text}
        raise self._cannot(part, f"is {part.media_type or 'of no type'}: {_PDF} and texts can be sent")

    def _cannot(self, part: Media, words: str) -> InvalidRequest:
        return InvalidRequest(f"{part.path}: {words} ({self.name})", part.path)

    def _trim(self, last: JsonObject) -> None:
        """A text that is gone on with may not end with whitespace here."""
        block = last["content"][-1]
        if block.get("type") == "text" and (text := block["text"].rstrip()) != block["text"]:
            block["text"] = text
            path = f"messages[{len(self.request.messages) - 1}].content"
            self.notes.append(moved(path, "without the whitespace at its end, which the format refuses"))


def cache_control(kept: Kept) -> JsonObject:
    """The field of a block, or of a tool, up to which the prompt is to be kept."""
    if not kept:
        return {}
    return {"cache_control": {"type": "ephemeral"} | ({"ttl": kept} if kept != "5m" else {})}


def _text(text: str) -> JsonObject:
    return {"type": "text", "text": text}


def _packed(data: str) -> str:
    """Base64 on one line."""
    return "".join(data.split())
