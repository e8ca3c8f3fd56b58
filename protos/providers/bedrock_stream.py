"""Converse's answers, whole or as a stream, as canonical events.

`BlockEvents` turns blocks into events, for both; `ConverseDecoder` is one stream. Blocks of kinds that no part can say
are kept in provider_data behind the part before them, and go back there.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Signature
from diptych.protos.failures import ProviderFailure
from diptych.protos.replies import Began, Ended, Event, Finish, Usage
from diptych.protos.wire_checks import compact

from .bedrock_failures import broken, is_exception, read_error
from .codec import JsonObject, ServerEvent
from .loose_values import check_kept, count_in, json_in, list_in, object_in, text_in

_FINISHES: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "content_filtered": "content_filter",
    "guardrail_intervened": "content_filter",
}
_KNOWN = frozenset({"text", "reasoningContent", "citation", "toolUse", "toolResult", "image"})  # deltas
_MALFORMED = ("malformed_model_output", "malformed_tool_use")


class BlockEvents:
    """The events of an answer's blocks, which come one after the other. A block's kind shows in its first piece."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._kind = ""  # of the block that is being told: text, reasoning, call, server, result, image
        self._index: object = None
        self._start: JsonObject = {}
        self._pieces: list[str] = []
        self._contents: list[Any] = []  # of a result
        self._image = bytearray()
        self._signature: list[str] = []
        self._citations: list[Any] = []
        self._kept: list[JsonObject] = []  # whole blocks since the last part
        self._before = ""  # the kind of the part before, where nothing has parted the next one from it
        self.num_calls = 0

    @property
    def in_call(self) -> bool:
        """Whether the arguments of a call are being told."""
        return self._kind == "call"

    def whole(self, block: Mapping[str, Any]) -> list[Event]:
        """A block that came at once."""
        found = self.stop()
        match block:
            case {"text": str(text)}:
                return [*found, *self._open("text"), *self._text(text), *self.stop()]
            case {"reasoningContent": {"reasoningText": Mapping() as told}}:
                return [*found, *self._open("reasoning"), *self._reasoning(told), *self.stop()]
            case {"reasoningContent": {"redactedContent": str(told)}}:
                return [*found, *self._open("reasoning"), *self._reasoning({"redactedContent": told}), *self.stop()]
            case {"toolUse": Mapping() as call} if call.get("type") != "server_tool_use":
                found += self.start(None, {"toolUse": call})
                return [*found, *self._arguments(compact(object_in(call.get("input")))), *self.stop()]
            case {"citationsContent": Mapping() as cited}:
                texts = [text_in(object_in(text).get("text")) for text in list_in(cited.get("content"))]
                found += [*self._open("text"), *self._text("".join(texts))]
                self._citations += list_in(cited.get("citations"))
                return found + self.stop()
        self._keep(dict(block), found)
        return found

    def start(self, index: object, start: Mapping[str, Any]) -> list[Event]:
        """A block begins that says what it is. One that begins twice is one: some repeat what they send."""
        if self._kind and index is not None and index == self._index:
            return []
        found = self.stop()
        self._index = index
        match start:
            case {"toolUse": Mapping() as call} if call.get("type") == "server_tool_use":
                self._kind, self._start = "server", dict(call)
            case {"toolUse": Mapping() as call}:
                found += self._open("call")
                found.append(CallBegin(self.num_calls, text_in(call.get("name")), text_in(call.get("toolUseId"))))
            case {"toolResult": Mapping() as result}:
                self._kind, self._start = "result", dict(result)
            case {"image": Mapping() as image}:
                self._kind, self._start = "image", dict(image)
        return found

    def delta(self, index: object, delta: Mapping[str, Any]) -> list[Event] | None:
        """More of the block; None where nobody here knows what it is. Raises ProviderFailure for input of a call that
        never began.
        """
        if not _KNOWN & delta.keys():
            return None
        found = self.stop() if self._kind and index != self._index else []
        self._index = index
        match delta:
            case {"text": str(text)}:
                return found + self._become("text") + self._text(text)
            case {"reasoningContent": Mapping() as told}:
                return found + self._become("reasoning") + self._reasoning(told)
            case {"citation": Mapping() as citation}:
                found += self._become("text")
                self._citations.append(dict(citation))
                check_kept(self._citations)
            case {"toolUse": {"input": str(text)}}:
                if self._kind not in ("call", "server"):
                    raise broken("input of a tool's call came before the call")
                return found + self._arguments(text)
            case {"toolResult": list(contents)}:
                self._contents += contents
            case {"image": Mapping() as image}:
                found += self._become("image")
                self._see(image)
        return found

    def stop(self) -> list[Event]:
        """The block's end, if one is being told."""
        kind, self._kind, self._index = self._kind, "", None
        pieces, self._pieces = self._pieces, []
        found: list[Event] = []
        match kind:
            case "text":
                if self._citations:
                    found.append(Extras(self._family, {"citations": self._citations}))
                    self._citations, self._before = [], ""
            case "reasoning":
                if signature := "".join(self._signature):
                    found.append(Signature(signature))
                    self._before = ""
                self._signature = []
            case "call":
                found += [] if pieces else [CallArguments(self.num_calls, "{}")]
                found.append(CallEnd(self.num_calls))
                self.num_calls += 1
                self._before = ""
            case "server":
                self._keep({"toolUse": {**self._start, "input": json_in("".join(pieces)) or {}}}, found)
            case "result":
                contents, self._contents = self._contents, []
                self._keep({"toolResult": {**self._start, "content": contents}}, found)
            case "image":
                data, self._image = bytes(self._image), bytearray()
                source = {"source": {"bytes": b64encode(data).decode()}} if data else {}
                self._keep({"image": {**self._start, **source}}, found)
        return found

    def _open(self, kind: str) -> list[Event]:
        found: list[Event] = []
        if kind == self._before == "text":
            found.append(Extras(""))  # two texts are two parts: what is said of one is not of both
        elif kind == self._before == "reasoning":
            found.append(Signature(""))
        self._kind, self._before, self._kept = kind, kind, []
        return found

    def _become(self, kind: str) -> list[Event]:
        """Texts and reasoning begin with their first piece; so may a picture, which is no part."""
        if self._kind == kind:
            return []
        index = self._index
        found = self.stop()
        if kind == "image":
            self._kind, self._start = kind, {}
        else:
            found += self._open(kind)
        self._index = index
        return found

    def _see(self, image: Mapping[str, Any]) -> None:
        """More of a picture; of its bytes each piece is base64 by itself."""
        source = object_in(image.get("source"))
        try:
            self._image += b64decode(text_in(source.get("bytes")), validate=True)
        except ValueError as exc:
            raise broken("a picture in the answer is no base64") from exc
        place = {"source": source} if source and "bytes" not in source else {}
        self._start |= {name: value for name, value in image.items() if name != "source"} | place

    def _text(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def _reasoning(self, told: Mapping[str, Any]) -> list[Event]:
        if redacted := text_in(told.get("redactedContent")):
            self._before = ""
            return [Signature(redacted, True)]
        self._signature.append(text_in(told.get("signature")))
        return [Reasoning(text)] if (text := text_in(told.get("text"))) else []

    def _arguments(self, text: str) -> list[Event]:
        if not text:
            return []
        self._pieces.append(text)
        return [CallArguments(self.num_calls, text)] if self._kind == "call" else []

    def _keep(self, block: JsonObject, found: list[Event]) -> None:
        self._kept.append(block)
        check_kept(self._kept)
        self._before = ""
        found.append(Extras(self._family, {"blocks": list(self._kept)}))


class ConverseDecoder:
    """One stream; see codec.StreamDecoder. What the answer cost comes behind its end."""

    def __init__(self, family: str) -> None:
        self.skipped = 0
        self._family = family
        self._blocks = BlockEvents(family)
        self._has_begun = False
        self._end: JsonObject | None = None
        self._is_over = False

    def feed(self, event: ServerEvent) -> list[Event]:
        """What the event says."""
        told = json_in(event.data)
        if not isinstance(told, dict):
            if is_exception(event.event):
                raise ProviderFailure(read_error(event.event, {}))
            if self._blocks.in_call:
                raise broken("an event amid a tool's call could not be read")
            self.skipped += 1
            return []
        if is_exception(event.event):
            raise ProviderFailure(read_error(str(told.get("code") or event.event), told))
        if self._is_over:
            self.skipped += 1
            return []
        found: list[Event] = [] if self._has_begun else [Began()]
        self._has_begun = True
        return found + self._told(event.event, told)

    def finish(self) -> list[Event]:
        """What the stream's end settles."""
        if self._is_over:
            return []
        if self._end is None:
            raise broken("the stream ended before the answer did")
        return self._ended({})

    def _told(self, kind: str, told: JsonObject) -> list[Event]:
        index = told.get("contentBlockIndex", 0)
        match kind:
            case "messageStart":
                return []
            case "contentBlockStart" if isinstance(start := told.get("start"), dict):
                return self._blocks.start(index, start)
            case "contentBlockDelta" if isinstance(delta := told.get("delta"), dict):
                if (found := self._blocks.delta(index, delta)) is not None:
                    return found
            case "contentBlockStop":
                return self._blocks.stop()
            case "messageStop":
                found = self._blocks.stop()
                self._end = told
                check_end(told)
                return found
            case "metadata":
                return self._ended(told) if self._end is not None else []
        self.skipped += 1
        return []

    def _ended(self, metadata: JsonObject) -> list[Event]:
        self._is_over = True
        return ends_of({**(self._end or {}), **metadata}, self._family, has_calls=self._blocks.num_calls > 0)


def check_end(told: Mapping[str, Any]) -> None:
    """Raises ProviderFailure where the model did not say what can be read."""
    if told.get("stopReason") in _MALFORMED:
        raise broken(f"the model's words could not be read ({told['stopReason']})")


def ends_of(told: JsonObject, family: str, *, has_calls: bool) -> list[Event]:
    """The last events: what a guardrail found, the usage, how the answer ended."""
    found: list[Event] = []
    if told.get("trace"):
        found.append(Extras(family, {"trace": told["trace"]}))
    found.append(usage_of(object_in(told.get("usage"))))
    native = text_in(told.get("stopReason"))
    stop_text = object_in(told.get("additionalModelResponseFields")).get("stop_sequence")
    finish = _FINISHES.get(native, "tool_calls" if has_calls else "stop")
    return [*found, Ended(finish, native, stop_text if isinstance(stop_text, str) else None)]


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """Bedrock's inputTokens are those that no cache had, and none that were put into one."""
    fresh, read, written = (
        count_in(usage.get(name)) for name in ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
    )
    kept = [object_in(one) for one in list_in(usage.get("cacheDetails"))]
    long = [count_in(one.get("inputTokens")) or 0 for one in kept if one.get("ttl") == "1h"]
    return Usage(
        input_tokens=None if fresh is None else fresh + (read or 0) + (written or 0),
        output_tokens=count_in(usage.get("outputTokens")),
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=sum(long) if kept else None,
    )
