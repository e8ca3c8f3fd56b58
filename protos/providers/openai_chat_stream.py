"""A stream of OpenAI's chat format, of whatever provider, as an answer's events; a whole answer is one of one piece.

Made by openai_chat.py. Only choice 0 is read: requests ask for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.protos.deltas import Content, Delta, Extras, Reasoning, Refusal, Structured
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.replies import UNTOLD, Began, Ended, Event, Finish

from .codec import JsonObject, ServerEvent
from .error_bodies import told_by
from .failure_words import failure_of
from .loose_values import check_kept, json_in
from .openai_chat_calls import Calls
from .openai_chat_messages import DETAILS
from .openai_chat_usage import read_usage
from .quirks import Quirks

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_FINISHES: dict[str, Finish] = {
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "sensitive": "content_filter",
    "recitation": "content_filter",
    "prohibited_content": "content_filter",
    "blocklist": "content_filter",
}
# Words for an answer that broke off.
BROKEN = {
    "error": FailureKind.SERVER,
    "abort": FailureKind.SERVER,
    "aborted": FailureKind.SERVER,
    "network_error": FailureKind.SERVER,
    "insufficient_system_resource": FailureKind.OVERLOADED,
}
MAX_DETAILS_CHARS = 4 << 20


def finish_of(native: str, *, has_calls: bool) -> Finish:
    """OpenAI's word for a provider's own; of an answer with calls there is a word of its own."""
    finish = _FINISHES.get(native.lower(), "stop")
    return "tool_calls" if finish == "stop" and has_calls else finish


class ChatDecoder:
    """One stream."""

    def __init__(self, quirks: Quirks) -> None:
        self.skipped = 0
        self.usage = UNTOLD  # as far as it was told
        self._family = quirks.family or "openai.chat"
        self._fields = (
            tuple(dict.fromkeys((quirks.reasoning_field, *REASONING_FIELDS)))
            if quirks.reasoning_field
            else REASONING_FIELDS
        )
        self._tells_parts = quirks.tells_parts
        self._calls = Calls(self._family)
        self._details = _Details()
        self._sources: JsonObject = {}  # on which the answer's text stands
        self._has_begun = False
        self._has_content = False
        self._native: str | None = None
        self._stop_text: str | None = None
        self._is_done = False

    def feed(self, event: ServerEvent) -> list[Event]:
        """What the event says. Raises ProviderFailure."""
        data = event.data.strip()
        if self._is_done or not data:
            return []
        if data == "[DONE]":
            return self.finish()
        chunk = json_in(data)
        if isinstance(chunk, list):
            chunk = chunk[0] if len(chunk) == 1 else None
        if not isinstance(chunk, dict):
            if event.event == "error" or "error" in data[:40].lower():
                raise ProviderFailure(failure_of(0, {}, told_by(data)))
            return self._skip()
        return self.read(chunk, event.event)

    def read(self, chunk: JsonObject, name: str = "") -> list[Event]:
        """What a chunk says, or a whole answer. Raises ProviderFailure."""
        self._check(chunk, name)
        found: list[Event] = []
        choices = chunk.get("choices")
        if not self._has_begun and (choices or chunk.get("id")):
            self._has_begun = True
            found.append(Began(_text(chunk.get("id")), _text(chunk.get("model"))))
        choice = next(_first_choices(choices), None)
        if (usage := read_usage(chunk, choice or {})) is not None:
            self.usage = self.usage.merged(usage)
        if choice is not None:
            found += self._choice(choice)
        if isinstance(sources := chunk.get("citations"), list) and sources:
            self._sources["citations"] = sources
        return found

    def finish(self) -> list[Event]:
        """The stream is over. Raises ProviderFailure (SERVER) where the answer had not ended."""
        if self._is_done:
            return []
        if self._native is None:
            said = "broke off" if self._has_content else "ended before it said anything"
            raise _failed(FailureKind.SERVER, f"the provider's stream {said}: it never told why the answer ends")
        self._is_done = True
        found: list[Event] = [] if self._has_begun else [Began()]
        found += [*self._flush(), *self._calls.end()]
        if self._sources:
            found.append(Extras(self._family, self._sources))
        finish = finish_of(self._native, has_calls=self._calls.any)
        if self.usage != UNTOLD:
            found.append(self.usage)
        return [*found, Ended(finish, self._native, self._stop_text)]

    def _skip(self) -> list[Event]:
        if self._calls.is_open:
            raise _failed(FailureKind.SERVER, "the provider's stream lost a piece of a call: it sent what is no JSON")
        self.skipped += 1
        return []

    def _check(self, chunk: JsonObject, name: str) -> None:
        choices = chunk.get("choices")
        is_error = bool(chunk.get("error")) or name == "error" or chunk.get("object") == "error"
        is_none = choices is None and not chunk.get("usage") and not chunk.get("id")
        is_other = is_none and any(
            isinstance(chunk.get(key), str | list | dict) for key in ("message", "detail", "errors")
        )
        if is_error or is_other:
            raise ProviderFailure(failure_of(0, {}, told_by(chunk)))

    def _choice(self, choice: JsonObject) -> Iterator[Event]:
        if isinstance(error := choice.get("error"), dict | str) and error:
            raise ProviderFailure(failure_of(0, {}, told_by({"error": error})))
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            message = choice.get("message")
            delta = message if isinstance(message, dict) and not self._has_content else {}
        for said in self._delta(delta):
            self._has_content = True
            yield said
        native = choice.get("finish_reason")
        if isinstance(native, str) and native and native != "null":
            if native.lower() in BROKEN:
                words = f"the provider broke the answer off and says no more than {native[:40]}"
                raise _failed(BROKEN[native.lower()], words)
            self._native = native
        if isinstance(choice.get("stop_reason"), str):
            self._stop_text = choice["stop_reason"]

    def _delta(self, delta: JsonObject) -> Iterator[Delta]:
        text, thought = _words(delta.get("content"))
        for name in self._fields:
            if value := delta.get(name):
                thought = _joined(value) or thought
                break
        if isinstance(details := delta.get(DETAILS), list):
            thought = self._details.add(details, is_told=bool(thought)) or thought
        if thought:
            yield from self._calls.say(Reasoning(thought))
        others = [delta.get(key) for key in ("refusal", "tool_calls", "function_call")]
        if text or any(others):
            yield from self._flush()
        if text:
            yield from self._calls.say(Content(text))
        if self._tells_parts and (parts := _parts(delta.get("structured"))):
            yield Structured(parts)
        if isinstance(refusal := others[0], str) and refusal:
            yield from self._calls.say(Refusal(refusal))
        if others[1]:
            yield from self._calls.feed(others[1])
        if isinstance(others[2], dict):
            yield from self._calls.feed([{"index": 0, "function": others[2]}])
        if isinstance(notes := delta.get("annotations"), list) and notes:
            kept = self._sources.setdefault("annotations", [])
            kept += notes
            check_kept(kept)

    def _flush(self) -> list[Delta]:
        """What the reasoning leaves behind when it is over."""
        entries = self._details.taken()
        return [Extras(self._family, {DETAILS: entries})] if entries else []


class _Details:
    """OpenRouter's reasoning_details, whose texts come in pieces."""

    def __init__(self) -> None:
        self._entries: list[JsonObject] = []
        self._pieces: list[dict[str, list[str]]] = []  # of the texts of each
        self._num_chars = 0

    def add(self, details: list[Any], *, is_told: bool) -> str:
        """The text that can be read, where it `is_told` nowhere else."""
        found: list[str] = []
        for detail in details:
            if isinstance(detail, dict):
                texts = {key: detail[key] for key in ("text", "summary") if isinstance(detail.get(key), str)}
                self._grow(detail)
                if not self._continues(detail):
                    self._entries.append({})
                    self._pieces.append({})
                self._entries[-1] |= {key: value for key, value in detail.items() if value is not None}
                for key, text in texts.items():
                    self._pieces[-1].setdefault(key, []).append(text)
                found += texts.values()
        return "" if is_told else "".join(found)

    def taken(self) -> list[JsonObject]:
        """All of them; they leave."""
        whole = [{key: "".join(texts) for key, texts in pieces.items()} for pieces in self._pieces]
        entries = [entry | texts for entry, texts in zip(self._entries, whole, strict=True)]
        self._entries, self._pieces = [], []
        return entries

    def _continues(self, detail: JsonObject) -> bool:
        if not self._entries or "data" in detail:
            return False
        last = self._entries[-1]
        return all(last.get(key) == detail.get(key) for key in ("type", "index", "format"))

    def _grow(self, detail: JsonObject) -> None:
        self._num_chars += sum(len(value) for value in detail.values() if isinstance(value, str))
        if self._num_chars > MAX_DETAILS_CHARS:
            words = f"the answer's reasoning has more than {MAX_DETAILS_CHARS} characters"
            raise _failed(FailureKind.SERVER, words)


def _first_choices(choices: object) -> Iterator[JsonObject]:
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (None, 0):
            yield choice


def _words(content: object) -> tuple[str, str]:
    """The text to read, and (Mistral's) the text of thought, of a content."""
    if isinstance(content, str):
        return content, ""
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and (kind := _text(part.get("type"))) in texts:
            texts[kind].append(_joined(part.get(kind)))
    return "".join(texts["text"]), "".join(texts["thinking"])


def _joined(value: object) -> str:
    """A text, or the texts of parts."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [part.get("text", part.get("content")) for part in parts if isinstance(part, dict)]
    return "".join(text for text in found if isinstance(text, str))


def _parts(value: object) -> list[JsonObject]:
    """Those that say where they are."""
    given = value if isinstance(value, list) else ()
    return [part for part in given if isinstance(part, dict) and isinstance(part.get("path"), str)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _failed(kind: FailureKind, words: str) -> ProviderFailure:
    return ProviderFailure(Failure(kind=kind, message=words))
