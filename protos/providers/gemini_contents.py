"""Canonical messages as Gemini's contents and systemInstruction.

Called by gemini.py. What Gemini said of its parts (thoughtSignature, parts of tools that it ran) goes back as it came;
thoughts without a signature do not: they are summaries, which it does not want. A refusal becomes a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Part, Reasoning, Refusal, Text, ToolCall, ToolResult

from .codec import JsonObject, Note
from .gemini_models import Generation
from .media_types import by_name
from .quirks import Quirks
from .request_fields import moved

# In place of a signature, for calls that another model made: Google's documentation of thought signatures names it.
UNSIGNED: Final = "skip_thought_signature_validator"
SIGNATURE: Final = "thoughtSignature"
AFTER: Final = "after"  # in provider_data: parts that came behind the part, and that no canonical one can hold


@dataclass(slots=True)
class Conversation:
    """A request's messages in Gemini's form."""

    contents: list[JsonObject] = field(default_factory=list)
    system: list[JsonObject] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def write_messages(messages: Sequence[Message], rules: Generation, quirks: Quirks, family: str) -> Conversation:
    """All of a conversation. Raises InvalidRequest for what Gemini has no words for."""
    writer = _Writer(rules, quirks, family)
    for kind, group in itertools.groupby(enumerate(messages), key=lambda entry: _KINDS[entry[1].role]):
        run = [(f"messages[{i}]", message) for i, message in group]
        match kind:
            case "system":
                writer.instruct(run)
            case "user":
                writer.ask(run)
            case "model":
                writer.answer(run)
            case _:
                writer.result(run)
    return writer.finish()


_KINDS = {"system": "system", "developer": "system", "user": "user", "assistant": "model", "tool": "result"}


class _Writer:
    def __init__(self, rules: Generation, quirks: Quirks, family: str) -> None:
        self._rules = rules
        self._quirks = quirks
        self._family = family
        self._made = Conversation()
        self._calls: list[str] = []  # ids of the last turn's calls, in their order
        self._has_results = False  # the last content holds results, and nothing is added to it but images of theirs

    def instruct(self, run: Sequence[tuple[str, Message]]) -> None:
        """What the system or the developer says."""
        made = self._made
        for path, message in run:
            if message.media:
                raise InvalidRequest(
                    f"{message.media[0].path} is no text, and Gemini reads texts alone as instructions: "
                    "put it into a message of the user",
                    message.media[0].path,
                )
            parts = self._parts(message)
            if self._quirks.system_role == "first_user":
                made.notes.append(moved(path, "into the user's turn: this model takes no instructions apart"))
                self._add("user", parts)
                continue
            if made.contents:
                made.notes.append(moved(path, "to the other instructions, before the conversation"))
            made.system += parts

    def ask(self, run: Sequence[tuple[str, Message]]) -> None:
        """What the user says."""
        for _, message in run:
            self._add("user", self._parts(message))

    def answer(self, run: Sequence[tuple[str, Message]]) -> None:
        """What the model said."""
        self._calls = [call.id for _, message in run for call in message.tool_calls]
        for _, message in run:
            self._add("model", [*self._raw(message.provider_data), *self._parts(message)])

    def result(self, run: Sequence[tuple[str, Message]]) -> None:
        """What came of the calls before: one content, in the order of the calls, by which those without ids are told
        apart.
        """
        found = [message.result for _, message in run]
        order = {call_id: at for at, call_id in reversed(list(enumerate(self._calls)))}
        results = sorted(
            (result for result in found if result is not None),
            key=lambda result: order.get(result.call_id, len(order)),
        )
        beside: list[JsonObject] = []
        parts = [self._result(result, beside) for result in results]
        self._add("user", [*parts, *beside], is_result=True)

    def finish(self) -> Conversation:
        """The whole conversation."""
        made = self._made
        if not made.contents:
            raise InvalidRequest(
                "messages must hold a text that is not the system's: Gemini answers no instructions alone", "messages"
            )
        if self._rules.signs_calls:
            for content in made.contents:
                _sign(content)
        return made

    def _add(self, role: str, parts: list[JsonObject], *, is_result: bool = False) -> None:
        if not parts:
            return
        last = self._made.contents[-1] if self._made.contents else None
        if last is not None and last["role"] == role and not is_result and not self._has_results:
            last["parts"] += parts
        else:
            self._made.contents.append({"role": role, "parts": parts})
        self._has_results = is_result

    def _parts(self, message: Message) -> list[JsonObject]:
        found: list[JsonObject] = []
        for part in message.parts:
            found += self._part(part)
            if isinstance(part, Text | Reasoning | ToolCall):
                found += self._raw(part.provider_data)
        return found

    def _part(self, part: Part) -> Iterable[JsonObject]:
        match part:
            case Text():
                signed = self._signature(part.provider_data)
                return [{"text": part.text} | signed] if part.text or signed else ()
            case Refusal():
                return [{"text": part.text}] if part.text else ()
            case Reasoning():
                return self._thought(part)
            case Media():
                return [self._media(part)]
            case ToolCall():
                call: JsonObject = {"id": part.id} if self._has_ids and part.id else {}
                call |= {"name": part.name, "args": part.arguments}
                return [{"functionCall": call} | self._signature(part.provider_data)]
        raise InvalidRequest(f"messages: a {type(part).__name__} stands where Gemini has no place for it", "messages")

    def _thought(self, part: Reasoning) -> Iterable[JsonObject]:
        """Only what is signed."""
        signed = self._signature(part.provider_data)
        return [{"text": "" if part.is_redacted else part.text, "thought": True} | signed] if signed else ()

    def _result(self, result: ToolResult, beside: list[JsonObject]) -> JsonObject:
        text = "".join(part.text for part in result.parts if isinstance(part, Text))
        media = [self._media(part) for part in result.parts if isinstance(part, Media)]
        told: JsonObject = {"id": result.call_id} if self._has_ids and result.call_id else {}
        told |= {"name": result.name, "response": {"error" if result.is_error else "output": text}}
        if media and self._rules.media_in_results:
            told["parts"] = media
        else:
            beside += media
        return {"functionResponse": told}

    def _media(self, media: Media) -> JsonObject:
        if media.kind not in self._quirks.media:
            kind = {"image": "an image", "audio": "a sound"}.get(media.kind, "a file")
            raise InvalidRequest(f"{media.path} is {kind}, which this target does not read", media.path)
        if media.file_id:
            if media.file_id.startswith(("files/", "https://", "gs://")):
                return {"fileData": {"fileUri": media.file_id} | _typed(media)}
            raise InvalidRequest(
                f"{media.path} names a file of another service, which Gemini cannot open: send its content", media.path
            )
        if media.url:
            return {"fileData": {"fileUri": media.url} | _typed(media)}
        typed = _typed(media)
        if not typed:
            raise InvalidRequest(
                f"{media.path} has no media type, which Gemini wants: send data:TYPE/SUBTYPE;base64,... or a file name "
                "with its ending",
                media.path,
            )
        return {"inlineData": typed | {"data": media.data}}

    def _signature(self, data: Mapping[str, Mapping[str, Any]]) -> JsonObject:
        found = data.get(self._family, {}).get(SIGNATURE)
        return {SIGNATURE: found} if isinstance(found, str) and found else {}

    def _raw(self, data: Mapping[str, Mapping[str, Any]]) -> list[JsonObject]:
        found = data.get(self._family, {}).get(AFTER)
        return [dict(part) for part in found if isinstance(part, dict)] if isinstance(found, list) else []

    @property
    def _has_ids(self) -> bool:
        return self._rules.has_ids and "functionCall.id" not in self._quirks.unsupported


def _typed(media: Media) -> JsonObject:
    found = media.media_type or by_name(media.name) or by_name(media.url)
    return {"mimeType": found} if found else {}


def _sign(content: JsonObject) -> None:
    """Of calls that were made together the first one carries the signature of all."""
    for part in content["parts"]:
        if "functionCall" in part:
            part.setdefault(SIGNATURE, UNSIGNED)
            return
