"""JSON that comes in pieces, told as it comes: what opens, each key and each value, what closes.

closed_paths.py and the assembler of partial results listen. Each character is looked at once, however the text is cut,
and nothing is nested in calls, so that depth costs nothing. It keeps no value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

_SPACES = " \t\n\r"
_SPECIAL = re.compile(r'["\\]')
_WORD = re.compile(r'[^ \t\n\r,\]}\[{":]*')
_BEGINS = frozenset("-0123456789tfn")
# What may come next.
_VALUE, _ITEM_OR_END, _KEY, _KEY_OR_END, _COLON, _COMMA_OR_END = range(6)


def _finite(text: str) -> float:
    """ValueError for a number that JSON could not tell again."""
    if math.isinf(number := float(text)):
        raise ValueError("beyond any float")
    return number


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


_value_of: Callable[[str], Any] = json.JSONDecoder(parse_float=_finite, parse_constant=_refused).decode


class Sink(Protocol):
    """Who is told. A ValueError that it raises ends the scan as one of the text does."""

    def opens(self, kind: str) -> None:
        """A value begins that is an object, "{", or a list, "["."""

    def key(self, name: str) -> None:
        """The next value of the open object has this name."""

    def value(self, value: Any) -> None:
        """A string, number or word is complete."""

    def closes(self, *, is_empty: bool) -> None:
        """The innermost open object or list is complete."""


class JsonScanner:
    """State of one text. `at` is where the scan stands in the piece that was fed last: behind what the sink is told of,
    and where a ValueError was raised.
    """

    __slots__ = ("_escaped", "_is_key", "_kinds", "_next", "_sink", "at", "in_string", "is_over", "scalar")

    def __init__(self, sink: Sink) -> None:
        self.at = 0
        self.is_over = False
        self.in_string = False
        self.scalar: list[str] = []  # pieces of the string, number or word that is open, its first quote included
        self._sink = sink
        self._kinds: list[str] = []
        self._next = _VALUE
        self._escaped = self._is_key = False

    @property
    def in_text(self) -> bool:
        """Whether the text so far ends inside a string that is a value."""
        return self.in_string and not self._is_key

    def feed(self, text: str, at: int = 0) -> int:
        """Reads `text` from `at` on; where it ends, or where the value at the top is complete. Raises ValueError for
        what is no JSON; the scan cannot go on then.
        """
        self.at, size = at, len(text)
        while self.at < size and not self.is_over:
            if self.in_string:
                self._string(text)
            elif self.scalar:
                self._word(text)
            else:
                self._outside(text)
        return self.at

    def finish(self) -> None:
        """The end of the text: a number or a word at the top has no other. Raises ValueError."""
        if self.scalar and not self.in_string and not self._kinds and not self.is_over:
            self._end_scalar()

    def _string(self, text: str) -> None:
        begin = at = self.at
        if self._escaped:
            at, self._escaped = at + 1, False
        while (found := _SPECIAL.search(text, at)) is not None:
            at = found.end()
            if text[at - 1] == '"':
                self.scalar.append(text[begin:at])
                self.in_string, self.at = False, at
                self._end_scalar()
                return
            if at == len(text):
                self._escaped = True
                break
            at += 1
        self.scalar.append(text[begin:])
        self.at = len(text)

    def _word(self, text: str) -> None:
        found = _WORD.match(text, self.at)
        assert found is not None
        self.scalar.append(found.group())
        self.at = found.end()
        if self.at < len(text):
            self._end_scalar()

    def _outside(self, text: str) -> None:
        character, expected = text[self.at], self._next
        if character in _SPACES:
            pass
        elif character == '"':
            self._is_key = expected in (_KEY, _KEY_OR_END)
            if not self._is_key and expected > _ITEM_OR_END:
                raise ValueError("a string out of place")
            self.scalar, self.in_string = ['"'], True
        elif character == ":":
            if expected != _COLON:
                raise ValueError("a colon out of place")
            self._next = _VALUE
        elif character == ",":
            if expected != _COMMA_OR_END:
                raise ValueError("a comma out of place")
            self._next = _VALUE if self._kinds[-1] == "[" else _KEY
        elif character in "}]":
            self._close(character, expected)
            return
        elif expected > _ITEM_OR_END:
            raise ValueError("a value out of place")
        elif character in "{[":
            self.at += 1
            self._kinds.append(character)
            self._next = _ITEM_OR_END if character == "[" else _KEY_OR_END
            self._sink.opens(character)
            return
        elif character in _BEGINS:
            self.scalar = [character]
        else:
            raise ValueError("no JSON")
        self.at += 1

    def _close(self, character: str, expected: int) -> None:
        is_empty = expected in (_ITEM_OR_END, _KEY_OR_END)
        if not (is_empty or expected == _COMMA_OR_END) or not self._kinds:
            raise ValueError("an end out of place")
        if self._kinds[-1] != ("[" if character == "]" else "{"):
            raise ValueError("the end of something else")
        self.at += 1
        self._kinds.pop()
        self._after()
        self._sink.closes(is_empty=is_empty)

    def _end_scalar(self) -> None:
        value = _value_of("".join(self.scalar))
        self.scalar = []
        if self._is_key:
            self._is_key, self._next = False, _COLON
            self._sink.key(value)
            return
        self._after()
        self._sink.value(value)

    def _after(self) -> None:
        self._next = _COMMA_OR_END
        self.is_over = not self._kinds
