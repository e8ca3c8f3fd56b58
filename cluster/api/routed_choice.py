"""One choice of a routed answer: the gateway's events as what clients are told, and what is known at its end.

Made by routed.py. It knows no wire format.
"""

from __future__ import annotations

from collections.abc import Sequence

from diptych.cluster.gateway.record import ExchangeRecord
from diptych.cluster.gateway.signals import Continued, Restarted, StreamItem
from diptych.protos.closed_paths import ClosedPaths
from diptych.protos.deltas import CallBegin, Content, Logprobs, Reasoning, Signature
from diptych.protos.messages import Message
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_carried import carried
from diptych.protos.openai_replies import JsonObject
from diptych.protos.replies import Began, Ended, ReplyBuilder, Usage

from .reading import Parts, Said, new_call_id


class RoutedChoice:
    """See ChoiceView. `record`: what became of it so far, once it has begun."""

    def __init__(self, index: int, request: ChatRequest) -> None:
        self.index = index
        self.record: ExchangeRecord | None = None
        self._request = request
        self._shows_reasoning = request.include_reasoning is not False
        self._is_legacy = request.tool_use is not None and request.tool_use.is_legacy
        self._wants_logprobs = request.wanted_logprobs is not None
        self.begin_again()

    def begin_again(self) -> None:
        """What was told is void."""
        self.usage = Usage()
        self.has_calls = False
        self.prompt_logprobs: Sequence[JsonObject | None] | None = None
        self._ended: Ended | None = None
        self._builder = ReplyBuilder()
        self._message: Message | None = None
        self._logprobs: list[JsonObject] = []  # of tokens whose text has not come
        self._paths = ClosedPaths() if self._request.structured else None
        if self._paths is not None and self._request.template.continue_final:
            self._paths.feed(self._request.messages[-1].content)

    def told(self, item: StreamItem) -> list[Said]:
        """What clients are told of an event."""
        match item:
            case Content(text):
                self._builder.add(item)
                if self._paths is not None and (events := self._paths.feed(text)):
                    return [item, Parts(events)]
                return [item]
            case Usage():
                self.usage = self.usage.merged(item)
            case Ended():
                self._ended = item
            case Logprobs():
                self._logprobs += item.content
                self.prompt_logprobs = item.prompt if item.prompt is not None else self.prompt_logprobs
            case Reasoning() | Signature() if not self._shows_reasoning:
                pass
            case Began() | Restarted() | Continued():
                pass
            case CallBegin(index, name, call_id):
                self.has_calls = True
                begin = item if call_id else CallBegin(index, name, new_call_id())
                self._builder.add(begin)
                return [begin]
            case _:
                self._builder.add(item)
                return [item]
        return []

    def rest(self) -> list[Said]:
        """What the end settles."""
        if self._paths is not None and (events := self._paths.finish()):
            return [Parts(events)]
        return []

    def taken_logprobs(self) -> JsonObject | None:
        """Those that came since the last time."""
        if not self._logprobs:
            return None
        taken, self._logprobs = self._logprobs, []
        return {"content": taken, "refusal": None}

    @property
    def all_logprobs(self) -> JsonObject | None:
        """Of a whole answer; None where they were not asked for."""
        return {"content": self._logprobs, "refusal": None} if self._wants_logprobs else None

    @property
    def message(self) -> Message:
        """All that was said. At the end alone."""
        if self._message is None:
            self._message = self._builder.reply().message
        return self._message

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself, so that it can be held against its form."""
        return self._ended is not None and self._ended.finish in ("stop", "tool_calls") and self.stop_text is None

    @property
    def end_reason(self) -> str:
        """OpenAI's word."""
        finish = "stop" if self._ended is None else self._ended.finish
        return "function_call" if finish == "tool_calls" and self._is_legacy else finish

    @property
    def stop_text(self) -> str | None:
        """Where the target told it."""
        return None if self._ended is None else self._ended.stop_text

    @property
    def is_cut(self) -> bool:
        """Where the provider says so."""
        return self._ended is not None and self._ended.native == "model_context_window_exceeded"

    @property
    def carried(self) -> JsonObject | None:
        """What the provider wants back."""
        return carried(self.message)
