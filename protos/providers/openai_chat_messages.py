"""A canonical conversation as the messages of OpenAI's chat format, in the variant that a provider's quirks ask for.

Called by openai_chat_requests.py. Not said, for want of words: signatures of reasoning that others made, that a tool's
result is an error, where among the parts of a message its reasoning and its refusal stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Part, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest

from .codec import JsonObject, Note
from .quirks import Quirks

# What an answer brought that no request may hold.
_TOLD_ONLY = frozenset({"annotations", "audio", "citations", "search_results", "images"})
DETAILS = "reasoning_details"  # OpenRouter's, of a whole message wherever among its parts they came
_SOUNDS = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
}
_NO_REASONING = " "  # there must be some, and of empty ones there are none (Moonshot, 2026-05)


class MessageWriter:
    """Writes the messages of one request. `family`: whose provider_data goes along."""

    def __init__(self, request: ChatRequest, quirks: Quirks, family: str) -> None:
        self.notes: list[Note] = []
        self._request = request
        self._quirks = quirks
        self._family = family

    def written(self) -> list[JsonObject]:
        """All of them. Raises InvalidRequest naming the part that cannot be said."""
        found: list[JsonObject] = []
        shown: list[tuple[str, Media]] = []  # by the tools' results since the last message of another kind
        for i, message in enumerate(self._request.messages):
            path = f"messages[{i}]"
            if message.role != "tool" and shown:
                found.append(self._shown(shown))
                shown = []
            match message.role:
                case "system" | "developer":
                    found.append(self._system(message, path))
                case "user":
                    found.append(self._head("user", message, path) | {"content": self._content(message.parts, path)})
                case "assistant":
                    found.append(self._assistant(message, path))
                case "tool":
                    found.append(self._result(message, path, shown))
        found += [self._shown(shown)] if shown else []
        if self._quirks.system_role == "first_user":
            found = self._folded(found)
        if self._request.template.continue_final:
            self._prefill(found[-1])
        return found

    def _head(self, role: str, message: Message, path: str) -> JsonObject:
        named = {} if message.name is None else {"name": message.name}
        if named and "name" in self._quirks.unsupported:
            self.notes.append(Note("unsupported", f"{path}.name", "this provider knows no names of participants"))
            named = {}
        return {"role": role, **named, **self._own(message.provider_data)}

    def _own(self, data: Any) -> JsonObject:
        return {name: said for name, said in data.get(self._family, {}).items() if name not in _TOLD_ONLY | {DETAILS}}

    def _system(self, message: Message, path: str) -> JsonObject:
        wanted = self._quirks.system_role  # who knows `developer` knows `system`, too
        role = message.role if wanted == "developer" else "system"
        if role != message.role and wanted != "first_user":
            self.notes.append(Note("renamed", f"{path}.role", role))
        return self._head(role, message, path) | {"content": self._content(message.parts, path)}

    def _folded(self, messages: list[JsonObject]) -> list[JsonObject]:
        """System messages at the head of the user's next one; behind the last of those they are a user's."""
        found: list[JsonObject] = []
        waiting: list[JsonObject] = []
        for i, message in enumerate(messages):
            if message["role"] == "system":
                self.notes.append(Note("moved", f"messages[{i}]", "system messages go with the user's"))
                waiting.append(message)
                continue
            if waiting and message["role"] != "user":
                found.append(_joined(waiting) if len(waiting) > 1 else waiting[0] | {"role": "user"})
                waiting = []
            found.append(_joined([*waiting, message]) if waiting else message)
            waiting = []
        if waiting:
            found.append(_joined(waiting))
        return found

    def _content(self, parts: Sequence[Part], path: str) -> str | list[JsonObject]:
        found: list[JsonObject] = []
        for part in parts:
            if isinstance(part, Text):
                found.append({"type": "text", "text": part.text, **self._own(part.provider_data)})
            elif isinstance(part, Media):
                found.append(self._media(part))
        is_plain = all(part.keys() == {"type", "text"} for part in found)
        if self._quirks.flattens_content or (is_plain and len(found) <= 1):
            return "".join(part["text"] for part in found)
        return found

    def _media(self, part: Media) -> JsonObject:
        if part.kind not in self._quirks.media or self._quirks.flattens_content:
            raise InvalidRequest(f"{part.path}: this provider's format takes no {part.kind}: leave it out", part.path)
        if part.file_id:
            told = "is a file of this server, which the provider does not know: send its data in place of file_id"
            raise InvalidRequest(f"{part.path} {told}", part.path)
        address = part.url or f"data:{part.media_type or 'application/octet-stream'};base64,{part.data}"
        if part.kind == "image":
            detail = {"detail": part.detail} if part.detail else {}
            return {"type": "image_url", "image_url": {"url": address, **detail}}
        if part.url:
            told = f"is an address, and this provider's format takes the data of {part.kind} parts alone: send them"
            raise InvalidRequest(f"{part.path} {told}", part.path)
        if part.kind == "audio":
            if part.media_type not in _SOUNDS:
                raise InvalidRequest(f"{part.path}: of sounds this provider's format takes wav and mp3", part.path)
            sound = {"data": part.data, "format": _SOUNDS[part.media_type]}
            return {"type": "input_audio", "input_audio": sound}
        named = {"filename": part.name} if part.name else {}
        return {"type": "file", "file": {"file_data": address, **named}}

    def _assistant(self, message: Message, path: str) -> JsonObject:
        found = self._head("assistant", message, path)
        texts = [part for part in message.parts if isinstance(part, Text)]
        calls = [self._call(call) for call in message.tool_calls]
        found["content"] = self._content(texts, path) if texts or not (calls or message.refusal) else None
        if found["content"] is None and self._quirks.flattens_content:
            found["content"] = ""
        if message.refusal is not None and "refusal" not in self._quirks.unsupported:
            found["refusal"] = message.refusal
        elif message.refusal is not None:
            found["content"] = message.content
            self.notes.append(Note("moved", f"{path}.refusal", "it stands in the content"))
        if calls:
            found["tool_calls"] = calls
        return found | self._reasoning(message)

    def _reasoning(self, message: Message) -> JsonObject:
        if self._quirks.replay_reasoning == "strip":
            return {}
        sources = [message.provider_data]
        sources += [part.provider_data for part in message.parts if isinstance(part, Text | Reasoning | ToolCall)]
        details = [entry for data in sources for entry in data.get(self._family, {}).get(DETAILS, ())]
        if details:
            return {DETAILS: details}
        field, text = self._quirks.reasoning_field, message.reasoning_content
        if not text and self._quirks.replay_reasoning == "required":
            text = _NO_REASONING
        return {field: text} if field and text else {}

    def _call(self, call: ToolCall) -> JsonObject:
        function = {"name": call.name, "arguments": call.text or "{}"}
        return {"id": call.id, "type": "function", "function": function, **self._own(call.provider_data)}

    def _result(self, message: Message, path: str, shown: list[tuple[str, Media]]) -> JsonObject:
        result = message.result
        assert isinstance(result, ToolResult)
        pictures = [part for part in result.parts if isinstance(part, Media)]
        texts = [part for part in result.parts if isinstance(part, Text)]
        if pictures:
            self.notes.append(Note("moved", path, "what the tool showed stands in a user message behind its result"))
            shown += [(result.name or result.call_id, picture) for picture in pictures]
        content = self._content(texts, path) if texts else "" if not pictures else "(shown below)"
        return {"role": "tool", "tool_call_id": result.call_id, "content": content}

    def _shown(self, shown: Sequence[tuple[str, Media]]) -> JsonObject:
        parts: list[JsonObject] = []
        for name, media in shown:
            parts += [{"type": "text", "text": f"What {name} showed:"}, self._media(media)]
        return {"role": "user", "content": parts}

    def _prefill(self, last: JsonObject) -> None:
        if "continue_final_message" in self._quirks.rename:
            return
        if not self._quirks.prefill:
            words = "this provider begins an answer anew"
            self.notes.append(Note("unsupported", "continue_final_message", words))
        elif self._quirks.prefill_field:
            last[self._quirks.prefill_field] = True


def _joined(messages: Sequence[JsonObject]) -> JsonObject:
    """One user's message that says what several do."""
    contents = [message["content"] for message in messages]
    head = {key: value for key, value in messages[-1].items() if key != "content"} | {"role": "user"}
    if all(isinstance(content, str) for content in contents):
        return head | {"content": "\n\n".join(contents)}
    parts = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in contents]
    return head | {"content": [part for one in parts for part in one]}
