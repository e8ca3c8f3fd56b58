"""A chat answer's text read as what it says: reasoning, content, calls; and, where asked for, its finished JSON parts.

One AnswerReader for each choice, fed with the text as it settles. It knows no wire format: encoders and endpoints shape
what it says. What a model's format looks like: cluster/formats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.cluster.formats.format import Format
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.closed_paths import ClosedPaths
from diptych.protos.deltas import CallArguments, CallBegin, Content, Delta, Reasoning
from diptych.protos.openai_replies import JsonObject


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


@dataclass(frozen=True, slots=True)
class Parts:
    """What the content before it has finished: events of protos/closed_paths.py."""

    events: list[JsonObject]


@dataclass(slots=True)
class Call:
    """A call of the answer; `arguments` are the pieces so far."""

    index: int
    id: str
    name: str
    pieces: list[str]

    @property
    def arguments(self) -> str:
        """The JSON text, as the model wrote it."""
        return "".join(self.pieces)


Said = Delta | Parts


def new_call_id() -> str:
    """For a call whose maker gave it none."""
    return f"call_{os.urandom(12).hex()}"


class AnswerReader:
    """State of one choice."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.calls: list[Call] = []
        self._parser = OutputParser(
            reading.format, in_reasoning=reading.in_reasoning, tool_names=reading.tool_names or None
        )
        self._paths = ClosedPaths() if reading.tells_parts else None
        if self._paths is not None:
            self._paths.feed(reading.prefix)
        self._content: list[str] = []
        self._reasoning: list[str] = []

    @property
    def content(self) -> str:
        """What the answer says, without reasoning and calls."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """What it thought before, empty where the request does not want it told."""
        return "".join(self._reasoning)

    @property
    def is_reasoning(self) -> bool:
        """Whether what was fed ends inside the reasoning."""
        return self._parser.is_reasoning

    @property
    def may_reason(self) -> bool:
        """Whether reasoning goes on or may still begin."""
        return self._parser.may_reason

    def feed(self, text: str) -> list[Said]:
        """What `text` settles."""
        return self._told(self._parser.feed(text))

    def finish(self) -> list[Said]:
        """What the end of the text settles."""
        told = self._told(self._parser.finish())
        if self._paths is not None and (events := self._paths.finish()):
            told.append(Parts(events))
        return told

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word for an answer that ended for `reason`: a call that the model chose is one of its own."""
        if reason != "stop" or not self.calls or self.reading.is_named:
            return reason
        return "function_call" if self.reading.is_legacy else "tool_calls"

    def _told(self, deltas: Sequence[Delta]) -> list[Said]:
        told: list[Said] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    if not self.reading.shows_reasoning:
                        continue
                    self._reasoning.append(text)
                case CallBegin(index, name):
                    delta = CallBegin(index, name, new_call_id())
                    self.calls.append(Call(index, delta.id, name, []))
                case CallArguments(index, text):
                    self.calls[index].pieces.append(text)
            told.append(delta)
            if isinstance(delta, Content) and self._paths is not None and (events := self._paths.feed(delta.text)):
                told.append(Parts(events))
        return told
