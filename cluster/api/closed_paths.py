"""Which parts of a JSON text are complete, told as its pieces come: the `structured` events of a stream.

Each character is looked at once. Fed with text that is JSON by construction; where it is not, nothing more is told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from diptych.protos.openai_replies import JsonObject

_SPACES = " \t\n\r"
_SCALAR_ENDS = _SPACES + ",]}"


def _finite(text: str) -> float:
    """ValueError for a number that JSON could not tell again."""
    if math.isinf(number := float(text)):
        raise ValueError("beyond any float")
    return number


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


_value_of: Callable[[str], Any] = json.JSONDecoder(parse_float=_finite, parse_constant=_refused).decode


class ClosedPaths:
    """State of one answer. An event is {"path": JSON pointer (RFC 6901), "value": ...} for a scalar and for an empty
    object or list; {"path", "closed": "object" or "array"} where one with contents ends, its parts having been told.
    """

    def __init__(self) -> None:
        self._path: list[str | int] = []  # keys and indexes of the open containers' present parts
        self._kinds: list[str] = []  # "{" or "[" of each open container
        self._empty: list[bool] = []
        self._scalar: list[str] = []  # pieces of the string, number or word that is open
        self._in_string = self._escaped = self._is_key = self._is_over = False

    def feed(self, text: str) -> list[JsonObject]:
        """What `text` completes."""
        events: list[JsonObject] = []
        at = 0
        try:
            while at < len(text) and not self._is_over:
                at = self._string(text, at, events) if self._in_string else self._outside(text, at, events)
        except (ValueError, IndexError):  # no JSON: say nothing of it
            self._is_over = True
        return events

    def finish(self) -> list[JsonObject]:
        """The end of the text: a number or a word at the top has no other."""
        events: list[JsonObject] = []
        if self._scalar and not self._in_string and not self._kinds and not self._is_over:
            try:
                self._tell(_value_of("".join(self._scalar)), events)
            except ValueError:
                return []
        return events

    def _string(self, text: str, at: int, events: list[JsonObject]) -> int:
        begin = at
        while at < len(text):
            character = text[at]
            at += 1
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._scalar.append(text[begin:at])
                self._in_string = False
                self._end_scalar(events)
                return at
        self._scalar.append(text[begin:at])
        return at

    def _outside(self, text: str, at: int, events: list[JsonObject]) -> int:
        character = text[at]
        if self._scalar:
            if character not in _SCALAR_ENDS:
                self._scalar.append(character)
                return at + 1
            self._end_scalar(events)
        if character in "{[":
            self._open(character)
        elif character in "}]":
            self._close(events)
        elif character == '"':
            self._scalar, self._in_string = ['"'], True
        elif character == ",":
            self._next()
        elif character not in _SPACES and character != ":":
            self._scalar = [character]
        return at + 1

    def _open(self, character: str) -> None:
        if self._empty:
            self._empty[-1] = False
        self._kinds.append(character)
        self._empty.append(True)
        self._path.append(0 if character == "[" else "")
        self._is_key = character == "{"

    def _close(self, events: list[JsonObject]) -> None:
        kind, is_empty = self._kinds.pop(), self._empty.pop()
        self._path.pop()
        self._is_key = False  # an empty object had none
        if is_empty:
            self._tell({} if kind == "{" else [], events)
        else:
            events.append({"path": self._pointer(), "closed": "object" if kind == "{" else "array"})
            self._is_over = not self._kinds

    def _next(self) -> None:
        if self._kinds[-1] == "[":
            index = self._path[-1]
            assert isinstance(index, int)
            self._path[-1] = index + 1
        else:
            self._is_key = True

    def _end_scalar(self, events: list[JsonObject]) -> None:
        value = _value_of("".join(self._scalar))
        self._scalar = []
        if self._is_key:
            self._path[-1], self._is_key = value, False
            return
        self._tell(value, events)

    def _tell(self, value: Any, events: list[JsonObject]) -> None:
        if self._empty:
            self._empty[-1] = False
        events.append({"path": self._pointer(), "value": value})
        self._is_over = not self._kinds

    def _pointer(self) -> str:
        return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in self._path)
