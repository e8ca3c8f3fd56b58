"""A chat answer's text read as what it says: reasoning, content, calls; and, where asked for, its finished JSON parts.

One AnswerReader for each choice, fed with the text as it settles. It gives the fields of OpenAI's deltas, and in the
end the message of a whole answer. What a format looks like: cluster/formats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.cluster.formats.deltas import CallArguments, CallBegin, Content, Delta, Reasoning
from diptych.cluster.formats.format import Format
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.openai_replies import JsonObject

from .closed_paths import ClosedPaths


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers of one request are read."""

    format: Format
    in_reasoning: bool = False  # the prompt ends inside it
    tool_names: tuple[str, ...] = ()
    is_named: bool = False  # the request named the function, so that its call is no reason to end
    is_legacy: bool = False  # functions, not tools: one call, as `function_call`
    shows_reasoning: bool = True
    tells_parts: bool = False  # `structured` in deltas
    prefix: str = ""  # the beginning of the content, which the prompt ends with


class AnswerReader:
    """State of one choice."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parser = OutputParser(
            reading.format, in_reasoning=reading.in_reasoning, tool_names=reading.tool_names or None
        )
        self._paths = ClosedPaths() if reading.tells_parts else None
        if self._paths is not None:
            self._paths.feed(reading.prefix)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []

    @property
    def content(self) -> str:
        """What the answer says, without reasoning and calls."""
        return "".join(self._content)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Names and arguments."""
        return [(call.name, "".join(call.arguments)) for call in self._calls]

    @property
    def is_reasoning(self) -> bool:
        """Whether what was fed ends inside the reasoning."""
        return self._parser.is_reasoning

    def feed(self, text: str) -> list[JsonObject]:
        """The deltas that `text` settles."""
        return self._deltas(self._parser.feed(text))

    def finish(self) -> list[JsonObject]:
        """Those that the end of the text settles."""
        deltas = self._deltas(self._parser.finish())
        if self._paths is not None and (events := self._paths.finish()):
            deltas.append({"structured": events})
        return deltas

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word for an answer that ended for `reason`: a call that the model chose is one of its own."""
        if reason != "stop" or not self._calls or self._reading.is_named:
            return reason
        return "function_call" if self._reading.is_legacy else "tool_calls"

    def message(self) -> JsonObject:
        """Of a whole answer."""
        content = self.content
        message: JsonObject = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message["content"] = content or None
            if self._reading.is_legacy:
                message["function_call"] = self._calls[0].function()
            else:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": call.function()} for call in self._calls
                ]
        if self._reading.shows_reasoning and self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        return message

    def _deltas(self, deltas: Sequence[Delta]) -> list[JsonObject]:
        shaped = []
        for delta in deltas:
            match delta:
                case Content(text):
                    shaped.append(self._said(text))
                case Reasoning(text):
                    self._reasoning.append(text)
                    if self._reading.shows_reasoning:
                        shaped.append({"reasoning_content": text})
                case CallBegin(index, name):
                    call = _Call(index, f"call_{os.urandom(12).hex()}", name, [])
                    self._calls.append(call)
                    shaped.append(self._begun(call))
                case CallArguments(index, text):
                    self._calls[index].arguments.append(text)
                    shaped.append(self._called(index, {"arguments": text}))
        return shaped

    def _said(self, text: str) -> JsonObject:
        self._content.append(text)
        delta: JsonObject = {"content": text}
        if self._paths is not None and (events := self._paths.feed(text)):
            delta["structured"] = events
        return delta

    def _begun(self, call: _Call) -> JsonObject:
        function = {"name": call.name, "arguments": ""}
        if self._reading.is_legacy:
            return {"function_call": function}
        return {"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]}

    def _called(self, index: int, function: JsonObject) -> JsonObject:
        if self._reading.is_legacy:
            return {"function_call": function}
        return {"tool_calls": [{"index": index, "function": function}]}


@dataclass(slots=True)
class _Call:
    index: int
    id: str
    name: str
    arguments: list[str]

    def function(self) -> JsonObject:
        return {"name": self.name, "arguments": "".join(self.arguments)}
