"""A conversation as Converse's `system` and `messages`.

Called by bedrock_requests.py. Media are bytes in base64, or lie in S3; other addresses cannot be sent, and are fetched
before by who wants them read.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from typing import assert_never

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Kept, Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest

from .bedrock_models import BedrockModel
from .codec import JsonObject, Note
from .conversation import Blocks, CallIds, Said, goes_back, input_of, own_blocks, own_data, turns
from .quirks import Quirks
from .request_fields import moved, unsupported

_IDS = re.compile(r"[A-Za-z0-9_.:-]+")
_MOST_ID_CHARS = 64
_IMAGES = {"image/png": "png", "image/jpeg": "jpeg", "image/gif": "gif", "image/webp": "webp"}
_SOUNDS = {"audio/wav": "wav", "audio/mpeg": "mp3", "audio/mp4": "mp4", "audio/ogg": "ogg", "audio/flac": "flac"}
_DOCUMENTS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
}
_KINDS = {"image": ("image", _IMAGES), "audio": ("audio", _SOUNDS), "file": ("document", _DOCUMENTS)}
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9()\[\]-]+")
_MOST_NAME_CHARS = 180


@dataclass(slots=True)
class Turns:
    """The conversation of `request` in the making; `name` is the format's, for errors."""

    request: ChatRequest
    model: BedrockModel
    quirks: Quirks
    family: str
    name: str
    goes_on: bool = False  # the last message begins the answer
    notes: list[Note] = field(default_factory=list)
    ids: CallIds = field(default_factory=lambda: CallIds(_IDS, _MOST_ID_CHARS))
    _strips: bool = False
    _names: set[str] = field(default_factory=set)

    def made(self) -> tuple[list[JsonObject], list[JsonObject]]:
        """System blocks and messages. Raises InvalidRequest for what the format cannot say."""
        system: list[JsonObject] = []
        said: list[Said] = []
        for i, message in enumerate(self.request.messages):
            if message.role in ("system", "developer"):
                system += self._system(message)
                if said:
                    self.notes.append(moved(f"messages[{i}]", "before the conversation, with the system's other words"))
                continue
            found = self._said(message, i)
            if not found.blocks and not found.results:
                self.notes.append(moved(f"messages[{i}]", "says nothing that can be sent, and is left out"))
            said.append(found)
        if self.quirks.system_role == "first_user" and system:
            said.insert(0, Said("user", system))
            system = []
        messages = turns(said)
        if not messages:
            raise InvalidRequest(f"messages hold nothing that {self.name} could answer: say something", "messages")
        if self.goes_on:
            self._trim(messages[-1])
        self.notes += self.ids.notes()
        return system, messages

    def _system(self, message: Message) -> list[JsonObject]:
        blocks = Blocks(_text)
        for part in message.parts:
            if isinstance(part, Text):
                self._words(blocks, part)
            elif isinstance(part, Media):
                raise self._cannot(part, "a system's message holds texts alone")
        return blocks.done()

    def _words(self, blocks: Blocks, part: Text) -> None:
        data = own_data(part.provider_data, self.family)
        if citations := data.get("citations"):
            blocks.add({"citationsContent": {"content": [{"text": part.text}], "citations": citations}})
        else:
            blocks.text(part.text)
        if point := data.get("cachePoint"):
            blocks.add({"cachePoint": point})
        else:
            blocks.add(*cache_point(part.kept, self.model))

    def _said(self, message: Message, i: int) -> Said:
        role: str = message.role
        if role == "tool":
            result = message.result
            assert result is not None
            return Said("user", results=[self._result(result), *cache_point(result.kept, self.model)])
        blocks = Blocks(_text, keeps=role == "assistant")
        blocks.add(*own_blocks(message.provider_data, self.family))
        for part in message.parts:
            match part:
                case Text():
                    self._words(blocks, part)
                case Refusal():
                    blocks.text(part.text)
                    self.notes.append(moved(f"messages[{i}].refusal", "a text: the format has no refusals"))
                case Media():
                    blocks.add(self.media(part), *cache_point(part.kept, self.model))
                case ToolCall():
                    call = {"toolUseId": self.ids.of_call(part.id), "name": part.name, "input": input_of(part)}
                    blocks.add({"toolUse": call}, *cache_point(part.kept, self.model))
                case Reasoning():
                    blocks.add(*self._reasoning(part, i))
                case ToolResult():
                    raise InvalidRequest(f"messages[{i}] holds a tool's result beside other parts", f"messages[{i}]")
                case _:
                    assert_never(part)
            if isinstance(part, Text | Reasoning | ToolCall):
                blocks.add(*own_blocks(part.provider_data, self.family))
        return Said("assistant" if role == "assistant" else "user", blocks.done())

    def _result(self, result: ToolResult) -> JsonObject:
        blocks = Blocks(self._result_text)
        for part in result.parts:
            if isinstance(part, Text):
                blocks.text(part.text)
            else:
                blocks.add(self.media(part))
        # A list without a block is refused by some models, and so is a text without a letter.
        made: JsonObject = {"toolUseId": self.ids.of_result(result.call_id), "content": blocks.done() or [{"json": {}}]}
        return {"toolResult": made | ({"status": "error"} if result.is_error else {})}

    def _result_text(self, text: str) -> JsonObject:
        if not self.model.results_are_json:
            return {"text": text}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        return {"json": found if isinstance(found, dict) else {"result": text}}

    def _reasoning(self, part: Reasoning, i: int) -> list[JsonObject]:
        is_claude, takes_any = self.model.claude is not None, self.model.replays_reasoning
        if not takes_any or not goes_back(part, self.family, self.quirks, needs_proof=is_claude):
            if not self._strips:
                self._strips = True
                told = "not sent: no proof of this provider came with it"
                self.notes.append(moved(f"messages[{i}].reasoning", told))
            return []
        if part.is_redacted:
            return [{"reasoningContent": {"redactedContent": part.text}}]
        text = {"text": part.text} | ({"signature": part.signature} if part.signature else {})
        return [{"reasoningContent": {"reasoningText": text}}]

    def media(self, part: Media) -> JsonObject:
        """The block of an image, a sound or a document."""
        if part.kind not in self.quirks.media:
            article = {"image": "images", "audio": "sounds", "file": "files"}[part.kind]
            raise self._cannot(part, f"no {article} can be sent to this model: leave it out or choose another one")
        if part.file_id:
            raise self._cannot(part, "a file_id of this server means nothing to the provider: send its data")
        name, formats = _KINDS[part.kind]
        if part.detail in ("low", "high"):
            self.notes.append(unsupported(f"{part.path}.detail", f"{self.name} has no such parameter"))
        block: JsonObject = {"format": self._format(part, formats), "source": self._source(part)}
        return {name: {"name": self._name(part), **block} if name == "document" else block}

    def _format(self, part: Media, formats: dict[str, str]) -> str:
        if part.media_type in formats:
            return formats[part.media_type]
        ending = part.url.rpartition(".")[2].lower()
        ending = "jpeg" if ending == "jpg" else ending
        if not part.media_type and ending in formats.values():
            return ending
        told = ", ".join(formats.values())
        raise self._cannot(part, f"is {part.media_type or 'of no type that its name tells'}: {told} can be sent")

    def _source(self, part: Media) -> JsonObject:
        if part.url.startswith("s3://"):
            return {"s3Location": {"uri": part.url}}
        if part.url:
            raise self._cannot(part, "an address cannot be sent to this provider: send the data themselves")
        try:
            base64.b64decode(part.data)
        except (binascii.Error, ValueError):
            raise self._cannot(part, "is no base64") from None
        return {"bytes": "".join(part.data.split())}

    def _name(self, part: Media) -> str:
        """A document's: of few letters, and no two the same."""
        stem = _NOT_IN_NAMES.sub(" ", part.name.rpartition(".")[0] or part.name).strip()[:_MOST_NAME_CHARS].strip()
        stem = stem or "document"
        found, number = stem, 1
        while found in self._names:
            number += 1
            found = f"{stem} {number}"
        self._names.add(found)
        return found

    def _cannot(self, part: Media, words: str) -> InvalidRequest:
        return InvalidRequest(f"{part.path}: {words} ({self.name})", part.path)

    def _trim(self, last: JsonObject) -> None:
        """A text that is gone on with may not end with whitespace here."""
        block = last["content"][-1]
        if "text" in block and (text := block["text"].rstrip()) != block["text"]:
            block["text"] = text
            path = f"messages[{len(self.request.messages) - 1}].content"
            self.notes.append(moved(path, "without the whitespace at its end, which the format refuses"))


def cache_point(kept: Kept, model: BedrockModel) -> list[JsonObject]:
    """The block behind what is to be kept, where the model is one of those that take it."""
    if not kept or model.claude is None:
        return []
    return [{"cachePoint": {"type": "default"} | ({"ttl": kept} if kept != "5m" else {})}]


def _text(text: str) -> JsonObject:
    return {"text": text}
