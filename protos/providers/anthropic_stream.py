"""Anthropic's answers, whole or as a stream, as canonical events.

`BlockEvents` turns blocks into events, for both; `MessagesDecoder` is one stream. Blocks of kinds that no part can say
(those of tools that a server runs) are kept in provider_data behind the part before them, and go back there.
Format: platform.claude.com/docs/en/build-with-claude/streaming, read 2026-11-23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Signature
from diptych.protos.failures import ProviderFailure
from diptych.protos.replies import Began, Ended, Event, Finish, Usage
from diptych.protos.wire_checks import compact

from .anthropic_failures import broken, read_error
from .codec import JsonObject, ServerEvent
from .loose_values import check_kept, count_in, json_in, list_in, object_in, text_in

_FINISHES: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_OF_BLOCK = {"text": ("citations",), "tool_use": ("caller", "toolset_name")}  # what goes into provider_data
_IMPLIED = {"text_delta": "text", "thinking_delta": "thinking"}  # third parties leave out the beginnings of these
_JSON_DELTA = "input_json_delta"
_SEARCHES, _FREE = "web_search_requests", ("web_fetch_requests",)  # of usage.server_tool_use; fetching costs its tokens


class BlockEvents:
    """The events of an answer's blocks, which come one after the other."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._block: JsonObject | None = None  # the one that is being told
        self._index: object = None
        self._pieces: list[str] = []  # of its input
        self._signature: list[str] = []
        self._citations: list[Any] = []
        self._kept: list[JsonObject] = []  # whole blocks since the last part
        self._before = ""  # the kind of the part before, where nothing has parted the next one from it
        self.num_calls = 0

    @property
    def in_call(self) -> bool:
        """Whether the arguments of a call are being told."""
        return self._block is not None and self._block.get("type") == "tool_use"

    def start(self, index: object, block: JsonObject) -> list[Event]:
        """A block begins, with what it already holds. One that begins twice is one: some repeat what they send."""
        kind = str(block.get("type"))
        if self._block is not None and index is not None and index == self._index and kind == self._block.get("type"):
            return []
        found = self.stop()
        self._block, self._index = dict(block), index
        if kind in ("text", "thinking", "redacted_thinking", "tool_use"):
            if kind == self._before == "text":
                found.append(Extras(""))  # two texts are two parts: what is said of one is not of both
            elif kind == self._before == "thinking":
                found.append(Signature(""))
            self._before, self._kept = kind, []
        match kind:
            case "text":
                self._citations += list_in(block.get("citations"))
                found += [Content(text)] if (text := text_in(block.get("text"))) else []
            case "thinking":
                self._signature = [text_in(block.get("signature"))]
                found += [Reasoning(text)] if (text := text_in(block.get("thinking"))) else []
            case "redacted_thinking":
                found.append(Signature(text_in(block.get("data")), True))
                self._before = ""
            case "tool_use":
                found.append(CallBegin(self.num_calls, text_in(block.get("name")), text_in(block.get("id"))))
        return found

    def delta(self, index: object, delta: Mapping[str, Any]) -> list[Event]:
        """More of the block. Raises ProviderFailure for input of a call that never began."""
        kind, found = str(delta.get("type")), []
        if self._block is None or index != self._index:
            if kind == _JSON_DELTA:
                raise broken("input of a tool's call came before the call")
            if kind not in _IMPLIED:
                return []
            found = self.start(index, {"type": _IMPLIED[kind]})
        match kind:
            case "text_delta" if text := text_in(delta.get("text")):
                found.append(Content(text))
            case "thinking_delta" if text := text_in(delta.get("thinking")):
                found.append(Reasoning(text))
            case "signature_delta":
                self._signature.append(text_in(delta.get("signature")))
            case "citations_delta" if delta.get("citation") is not None:
                self._citations.append(delta["citation"])
                check_kept(self._citations)
            case "input_json_delta" if text := text_in(delta.get("partial_json")):
                self._pieces.append(text)
                if self.in_call:
                    found.append(CallArguments(self.num_calls, text))
        return found

    def stop(self) -> list[Event]:
        """The block's end, if one is being told."""
        block, self._block, self._index = self._block, None, None
        if block is None:
            return []
        pieces, self._pieces = self._pieces, []
        found: list[Event] = []
        match kind := str(block.get("type")):
            case "text":
                found += self._said(block | ({"citations": self._citations} if self._citations else {}))
                self._citations = []
            case "thinking":
                if signature := "".join(self._signature):
                    found.append(Signature(signature))
                    self._before = ""
                self._signature = []
            case "tool_use":
                if not pieces:
                    found.append(CallArguments(self.num_calls, compact(object_in(block.get("input")))))
                found.append(CallEnd(self.num_calls))
                self.num_calls += 1
                self._before = ""
                found += self._said(block)
            case _ if kind != "redacted_thinking":
                if pieces:
                    block["input"] = json_in("".join(pieces)) or {}
                self._kept.append(block)
                check_kept(self._kept)
                found.append(Extras(self._family, {"blocks": list(self._kept)}))
                self._before = ""
        return found

    def _said(self, block: JsonObject) -> list[Event]:
        said = {name: block[name] for name in _OF_BLOCK[str(block["type"])] if block.get(name)}
        if not said:
            return []
        self._before = ""
        return [Extras(self._family, said)]


class MessagesDecoder:
    """One stream; see codec.StreamDecoder. Events of kinds that are not known are passed over, as the format asks."""

    def __init__(self, family: str) -> None:
        self.skipped = 0
        self._family = family
        self._blocks = BlockEvents(family)
        self._usage: JsonObject = {}
        self._has_begun = False
        self._is_over = False
        self._end: JsonObject | None = None

    def feed(self, event: ServerEvent) -> list[Event]:
        """What the event says."""
        told = json_in(event.data)
        if not isinstance(told, dict):
            if self._blocks.in_call:
                raise broken("an event amid a tool's call could not be read")
            self.skipped += 1
            return []
        kind = told.get("type") or event.event
        if kind == "error" or isinstance(told.get("error"), dict):
            raise ProviderFailure(read_error(told))
        if self._is_over:
            self.skipped += 1
            return []
        return self._told(str(kind), told)

    def finish(self) -> list[Event]:
        """What the stream's end settles."""
        if self._is_over:
            return []
        if self._end is None:
            raise broken("the stream ended before the answer did")
        return self._ended()  # third parties leave out the last event

    def _told(self, kind: str, told: JsonObject) -> list[Event]:
        index = told.get("index", 0)
        match kind:
            case "message_start":
                return self._begin(told.get("message"))
            case "content_block_start" if isinstance(block := told.get("content_block"), dict):
                return self._begun() + self._blocks.start(index, block)
            case "content_block_delta" if isinstance(delta := told.get("delta"), dict):
                return self._begun() + self._blocks.delta(index, delta)
            case "content_block_stop":
                return self._begun() + self._blocks.stop()
            case "message_delta":
                return self._begun() + self._settle(told)
            case "message_stop":
                return self._begun() + self._ended()
            case "ping":
                return []
        self.skipped += 1
        return []

    def _begin(self, message: object) -> list[Event]:
        if self._has_begun or not isinstance(message, dict):
            self.skipped += 1
            return []
        self._has_begun = True
        found: list[Event] = [Began(text_in(message.get("id")), text_in(message.get("model")))]
        self._count(message.get("usage"))
        if self._usage:
            # The tokens of the answer are told at its end; here stands how many there are so far.
            found.append(usage_of({name: n for name, n in self._usage.items() if not name.startswith("output_")}))
        return found

    def _begun(self) -> list[Event]:
        if self._has_begun:
            return []
        self._has_begun = True
        return [Began()]

    def _count(self, usage: object) -> None:
        if isinstance(usage, dict):
            self._usage |= {name: value for name, value in usage.items() if value is not None}

    def _settle(self, told: JsonObject) -> list[Event]:
        self._count(told.get("usage"))
        delta = told.get("delta")
        if isinstance(delta, dict) and (delta.get("stop_reason") or self._end is None):
            self._end = {**(self._end or {}), **delta}
        return []

    def _ended(self) -> list[Event]:
        self._is_over = True
        found = self._blocks.stop()
        found += ends_of(self._end or {}, self._family, has_calls=self._blocks.num_calls > 0, usage=self._usage)
        return found


def ends_of(end: JsonObject, family: str, *, has_calls: bool, usage: JsonObject) -> list[Event]:
    """The last events: what else was said of the whole answer, its usage, how it ended."""
    found: list[Event] = []
    said = {name: end[name] for name in ("stop_details", "container") if end.get(name) is not None}
    if said:
        found.append(Extras(family, said))
    native = text_in(end.get("stop_reason"))
    finish = _FINISHES.get(native, "tool_calls" if has_calls else "stop")
    stop_text = end.get("stop_sequence")
    found.append(usage_of(usage))
    return [*found, Ended(finish, native, stop_text if isinstance(stop_text, str) else None)]


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """Anthropic's input_tokens are those that no cache had, and none that were put into one."""
    fresh, read, written = (
        count_in(usage.get(name)) for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    )
    details = object_in(usage.get("output_tokens_details"))
    uses = {name: n for name, value in object_in(usage.get("server_tool_use")).items() if (n := count_in(value))}
    return Usage(
        input_tokens=None if fresh is None else fresh + (read or 0) + (written or 0),
        output_tokens=count_in(usage.get("output_tokens")),
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count_in(details.get("thinking_tokens")),
        cache_write_1h_tokens=count_in(object_in(usage.get("cache_creation")).get("ephemeral_1h_input_tokens")),
        web_searches=uses.pop(_SEARCHES, None),
        other_tools=sum(n for name, n in uses.items() if name not in _FREE) or None,
    )
