"""Whether the calls of an answer can be run: their arguments must be the text of a JSON object.

attempt.py asks of events, relay.py of an answer that passes as bytes.
"""

from __future__ import annotations

import json

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd
from diptych.protos.messages import Message, ToolCall

from .signals import StreamItem


class Calls:
    """Of one answer. Own pools make no calls that are broken: theirs are not looked at."""

    def __init__(self, *, is_checked: bool) -> None:
        self.broken = ""  # the name of one that cannot be run
        self._is_checked = is_checked
        self._name = ""
        self._pieces: list[str] = []

    def add(self, event: StreamItem) -> None:
        """The next event of the answer."""
        if not self._is_checked:
            return
        if isinstance(event, CallBegin):
            self._name, self._pieces = event.name, []
        elif isinstance(event, CallArguments):
            self._pieces.append(event.text)
        elif isinstance(event, CallEnd):
            self._check(self._name, "".join(self._pieces))

    def add_all(self, message: Message) -> None:
        """Those of a whole answer."""
        if self._is_checked:
            for part in message.parts:
                if isinstance(part, ToolCall):
                    self._check(part.name, part.text)

    def _check(self, name: str, text: str) -> None:
        if not _is_object(text):
            self.broken = name or "a tool"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        return False
