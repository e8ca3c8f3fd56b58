"""An answer as every floor knows it: its events in their order, and the whole that they make.

Decoders of providers' wire formats make them (providers/), routers pass them on, the served wire formats are written
from them. They know no wire shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .deltas import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Delta,
    Extras,
    Logprobs,
    Reasoning,
    Signature,
    Structured,
)
from .deltas import Refusal as RefusalDelta
from .messages import Message, Part, ProviderData, Refusal, Text, ToolCall
from .messages import Reasoning as ReasoningPart

# OpenAI's words. `content_filter`: a provider's filter cut the answer off, or gave none.
Finish = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Began:
    """The first event: by which id and name the provider knows the answer and its model; either may be empty."""

    id: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one answer; None: not told. `input_tokens` are all of the prompt, those that a cache had included, of
    `output_tokens` the reasoning is a part, of `cache_write_tokens` those that the cache keeps for an hour. Of tools
    that the provider ran itself: `web_searches`, and the uses of `other_tools`, whose prices nobody here knows.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    input_audio_tokens: int | None = None
    output_audio_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    web_searches: int | None = None
    other_tools: int | None = None

    def merged(self, later: Usage) -> Usage:
        """What two reports of one answer say together; the later one has the last word."""
        if self == UNTOLD:
            return later
        told = {name: value for name in self.__slots__ if (value := getattr(later, name)) is not None}
        return replace(self, **told)


UNTOLD = Usage()  # for all to begin with


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event, behind everything the answer says. `native` is the provider's own word for it; `stop_text` the
    stop string that ended it, where that is told.
    """

    finish: Finish
    native: str = ""
    stop_text: str | None = None


Event = Began | Delta | Usage | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer. `message` is the assistant's; a call whose arguments are no JSON object has their text alone."""

    message: Message
    ended: Ended
    usage: Usage = Usage()
    began: Began = Began()
    logprobs: Logprobs | None = None  # of all tokens, where they were asked for and told

    def events(self) -> list[Event]:
        """The stream that makes this reply."""
        found: list[Event] = [self.began] if self.logprobs is None else [self.began, self.logprobs]
        found += _extras(self.message.provider_data)
        num_calls = 0
        before: Part | None = None
        for part in self.message.parts:
            if isinstance(part, Text | Refusal) and type(part) is type(before) and not _data_of(before):
                found.append(Extras(""))
            before = part
            match part:
                case Text():
                    found.append(Content(part.text))
                case Refusal():
                    found.append(RefusalDelta(part.text))
                case ReasoningPart(is_redacted=True):
                    found.append(Signature(part.text, True))
                case ReasoningPart():
                    found += [Reasoning(part.text)] if part.text else []
                    found.append(Signature(part.signature))
                case ToolCall():
                    found.append(CallBegin(num_calls, part.name, part.id))
                    found += [CallArguments(num_calls, part.text)] if part.text else []
                    found.append(CallEnd(num_calls))
                    num_calls += 1
                case _:
                    raise ValueError(f"an answer holds no {type(part).__name__}")
            found += _extras(_data_of(part))
        return [*found, self.usage, self.ended]


def _data_of(part: Part | None) -> ProviderData:
    return part.provider_data if isinstance(part, Text | ReasoningPart | ToolCall) else {}


def _extras(data: ProviderData) -> list[Event]:
    return [Extras(provider, dict(said)) for provider, said in data.items()]


@dataclass(slots=True)
class _Open:
    """The part that is being told."""

    kind: str = ""
    pieces: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    call: CallBegin | None = None


_KINDS: Mapping[type[Event], str] = {Content: "text", RefusalDelta: "refusal", Reasoning: "reasoning"}


class ReplyBuilder:
    """The whole of a stream's events, in the order of the stream."""

    def __init__(self) -> None:
        self.usage = UNTOLD
        self.began = Began()
        self.ended: Ended | None = None
        self._parts: list[Part] = []
        self._message_data: dict[str, Any] = {}
        self._open = _Open()
        self._logprobs: list[Logprobs] = []

    def add(self, event: Event) -> None:
        """The next event."""
        match event:
            case Began():
                self.began = event
            case Usage():
                self.usage = self.usage.merged(event)
            case Ended():
                self.ended = event
            case Content(text) | RefusalDelta(text) | Reasoning(text):
                self._say(_KINDS[type(event)], text)
            case Signature():
                self._sign(event)
            case CallBegin():
                self._close()
                self._open = _Open("call", call=event)
            case CallArguments(_, text):
                self._open.pieces.append(text)
            case CallEnd():
                pass  # extras may follow; the next part closes it
            case Structured():
                pass  # it is said of the contents, which are kept
            case Logprobs():
                self._logprobs.append(event)
            case Extras(provider, data):
                kept = self._open.data if self._open.kind else self._message_data
                kept[provider] = {**kept.get(provider, {}), **data}

    def reply(self) -> Reply:
        """The answer so far; one that has not ended counts as ended by `length`."""
        self._close()
        message = Message(role="assistant", parts=tuple(self._parts), provider_data=self._message_data)
        ended = self.ended or Ended("length")
        return Reply(
            message=message, ended=ended, usage=self.usage, began=self.began, logprobs=_together(self._logprobs)
        )

    def _say(self, kind: str, text: str) -> None:
        if self._open.kind != kind or self._open.data:  # what was said of a part came behind its last piece
            self._close()
            self._open = _Open(kind)
        self._open.pieces.append(text)

    def _sign(self, event: Signature) -> None:
        if event.is_redacted:
            self._close()
            self._open = _Open("redacted", [event.signature])
            return
        if self._open.kind != "reasoning":
            self._close()
            self._open = _Open("reasoning")
        text = "".join(self._open.pieces)
        self._open = _Open("signed", [text, event.signature], self._open.data)

    def _close(self) -> None:
        part, self._open = self._open, _Open()
        text, data = "".join(part.pieces), {name: said for name, said in part.data.items() if said}
        match part.kind:
            case "text":
                self._parts.append(Text(text, data))
            case "refusal":
                self._parts.append(Refusal(text))
            case "reasoning":
                self._parts.append(ReasoningPart(text, provider_data=data))
            case "signed":
                self._parts.append(ReasoningPart(part.pieces[0], part.pieces[1], provider_data=data))
            case "redacted":
                self._parts.append(ReasoningPart(text, is_redacted=True, provider_data=data))
            case "call":
                assert part.call is not None
                self._parts.append(_call(part.call, text, data))


def _together(told: list[Logprobs]) -> Logprobs | None:
    if not told:
        return None
    prompt = next((one.prompt for one in told if one.prompt is not None), None)
    return Logprobs([entry for one in told for entry in one.content], prompt)


def _call(begin: CallBegin, text: str, data: dict[str, Any]) -> ToolCall:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = {}
    if not isinstance(arguments, dict):
        arguments = {}
    return ToolCall(id=begin.id, name=begin.name, arguments=arguments, text=text, provider_data=data)
