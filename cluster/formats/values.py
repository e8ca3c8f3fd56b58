"""How far a JSON string, object or array reaches, in a text that comes in pieces.

The reader of calls uses them. Only quotes, backslashes and brackets count: depth is a number, so nothing recurses,
and a bracket of the wrong kind is a bracket.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from diptych.cluster.formats.markers import Markers

search_in_string = re.compile(r'["\\]').search


class StringReader:
    """State of one string whose opening quote is behind."""

    __slots__ = ("_is_escaped", "is_closed")

    def __init__(self) -> None:
        self._is_escaped = False
        self.is_closed = False

    def read(self, text: str, pos: int) -> int:
        """How far the string is known to reach: behind its quote once `is_closed`, else to the end of the text."""
        size, i = len(text), pos + self._is_escaped
        self._is_escaped = False
        while i < size:
            found = search_in_string(text, i)
            if found is None:
                return size
            i = found.end()
            if text[i - 1] == '"':
                self.is_closed = True
                return i
            i += 1
        self._is_escaped = i > size
        return size


class NestedReader:
    """State of one object or array, from its opening bracket on. `stops` end it outside its strings."""

    __slots__ = ("_depth", "_stops", "_string", "is_closed", "is_cut")

    def __init__(self, stops: Markers) -> None:
        self._stops = stops
        self._depth = 0
        self._string: StringReader | None = None
        self.is_closed = False
        self.is_cut = False

    def read(self, text: str, pos: int) -> int:
        """How far it is known to reach: behind its last bracket (`is_closed`) or up to a stop (`is_cut`).

        Neither: up to where a stop may begin, or to the end of the text.
        """
        stops, size, i = self._stops, len(text), pos
        while i < size:
            if self._string:
                i = self._string.read(text, i)
                if self._string.is_closed:
                    self._string = None
                continue
            found = stops.search_structure(text, i)
            if found is None:
                return stops.held_from(text, i)
            i = found.start()
            mark = found.group()
            if len(mark) > 1:
                self.is_cut = True
                return i
            if stops.may_begin(text, i):
                return i
            i += 1
            if mark == '"':
                self._string = StringReader()
            else:
                self._depth += 1 if mark in "{[" else -1
                if not self._depth:
                    self.is_closed = True
                    return i
        return i


def num_hopeful(raw: str, wanted: Collection[str]) -> int:
    """How many characters of a string may still become one of `wanted`; escapes are not looked into before the end."""
    plain = raw.partition("\\")[0]
    if any(word.startswith(plain) for word in wanted):
        return len(raw)
    return max((_num_equal(plain, word) for word in wanted), default=0)


def _num_equal(text: str, other: str) -> int:
    """The length of what both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(text), len(other)))
