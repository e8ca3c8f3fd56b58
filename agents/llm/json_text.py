"""Where the JSON is in what a model said, whole or as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Generic, Literal, TypeVar

from diptych.protos.json_scanner import JsonScanner, Sink

S = TypeVar("S", bound=Sink)

_decoder = json.JSONDecoder()
_OPENS = re.compile(r"[{\[]")
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)


def last_json(text: str) -> str:
    """The last complete object or list in `text`, of those that do not lie inside another; the text itself where it
    is JSON as it stands, or holds none. So `I used {x}, then {"a": 1}` holds {"a": 1}, but what is complete inside an
    object that breaks off is not the answer: the text goes on where that stops being JSON. Linear in the text.
    """
    stripped = text.strip()
    found, at = "", 0
    while (begin := _OPENS.search(stripped, at)) is not None:
        at = begin.start()
        try:
            _, end = _decoder.raw_decode(stripped, at)
        except json.JSONDecodeError as exc:
            is_open = exc.msg.startswith("Unterminated string")  # its place is where that string begins
            at = len(stripped) if is_open else max(at + 1, exc.pos)
        except (ValueError, RecursionError):  # a number of thousands of digits; nested deeper than anybody reads
            end = _closed(stripped, at)
            found, at = stripped[at:end], end
        else:
            found, at = stripped[at:end], end
    return found or stripped


def _closed(text: str, at: int) -> int:
    """Where the object or list that begins at `at` ends; the text's end, where it does not."""
    depth = 0
    for mark in _MARKS.finditer(text, at):
        if mark.group() in ("{", "["):
            depth += 1
        elif mark.group() in ("}", "]"):
            depth -= 1
            if not depth:
                return mark.end()
    return len(text)


class JsonFinder(Generic[S]):
    """The same in pieces: each object or list at the top that begins gets a sink of its own, and of what is none the
    text goes on to be looked through where it stopped being one. `sink` and `scanner` are the present ones. A sink that
    raises RecursionError ends the search: what is nested too deeply has no part that is the answer.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self.sink: S | None = None
        self.scanner: JsonScanner | None = None
        self._make = make
        self._is_over = False

    @property
    def is_inside(self) -> bool:
        """Whether the text so far ends inside an object or list."""
        return self.scanner is not None and not self.scanner.is_over

    def feed(self, text: str) -> Iterator[Literal["open", "whole", "none"]]:
        """Reads `text`; says of each sink that was told something whether its value is open, whole, or none at all."""
        at = 0
        while at < len(text) and not self._is_over:
            if self.scanner is None:
                found = _OPENS.search(text, at)
                if found is None:
                    return
                at = found.start()
                self.sink = self._make()
                self.scanner = JsonScanner(self.sink)
            scanner = self.scanner
            try:
                at = scanner.feed(text, at)
            except ValueError:
                at, self.scanner = scanner.at, None
                yield "none"
            except RecursionError:
                self.scanner, self._is_over = None, True
                yield "none"
            else:
                self.scanner = None if scanner.is_over else scanner
                yield "whole" if scanner.is_over else "open"
