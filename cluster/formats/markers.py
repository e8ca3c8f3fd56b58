"""Finding any of a few strings in a text that comes in pieces, and the beginning of one at its end.

The parser and the reader of calls use it. The patterns are alternations of literals and classes: none backtracks.
"""

from __future__ import annotations

import re
from functools import lru_cache

SPACES = " \t\n\r"  # JSON's white space
MAX_DROPPED_SPACES = 16  # so much white space before a marker goes with it, and is held until it is known what follows


class Markers:
    """Some strings, none of them empty, none the beginning of another."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._longest = max(map(len, strings), default=0)
        self._prefixes = frozenset(s[:size] for s in strings for size in range(1, len(s)))
        # `(?!)` matches nowhere: without strings nothing is found.
        self.search = re.compile("|".join(map(re.escape, strings)) or "(?!)").search
        firsts = sorted({s[0] for s in strings})
        self.search_first = re.compile(f"[{re.escape(''.join(firsts))}]" if firsts else "(?!)").search
        amid = "|".join((*map(re.escape, strings), r'["{}\[\]]'))
        self.search_structure = re.compile(amid).search  # the strings, and what gives JSON its structure

    def at(self, text: str, pos: int) -> str | None:
        """The string that stands at `pos`."""
        for string in self._strings:
            if text.startswith(string, pos):
                return string
        return None

    def may_begin(self, text: str, pos: int) -> bool:
        """Whether all that stands from `pos` on is the beginning of one of the strings, but not the whole."""
        return len(text) - pos < self._longest and text[pos:] in self._prefixes

    def held_from(self, text: str, pos: int) -> int:
        """Where, at `pos` or later, the end of `text` may be the beginning of a string; its length if nowhere."""
        found = self.search_first(text, max(pos, len(text) - self._longest + 1))
        while found:
            if text[found.start() :] in self._prefixes:
                return found.start()
            found = self.search_first(text, found.end())
        return len(text)


@lru_cache(64)
def markers_of(strings: tuple[str, ...]) -> Markers:
    """The same object for the same strings: formats are few, answers many."""
    return Markers(strings)


def after_spaces(text: str, pos: int) -> int:
    """The first place from `pos` on without white space."""
    found = _NO_SPACE(text, pos)
    return found.start() if found else len(text)


def before_spaces(text: str, pos: int, end: int) -> int:
    """Where the white space begins that would be dropped before a marker at `end`; not before `pos`."""
    if end <= pos or text[end - 1] not in SPACES:
        return end
    lowest = max(pos, end - MAX_DROPPED_SPACES)
    return lowest + len(text[lowest:end].rstrip(SPACES))


_NO_SPACE = re.compile(f"[^{SPACES}]").search
