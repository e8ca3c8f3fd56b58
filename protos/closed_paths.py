"""Which parts of a JSON text are complete, told as its pieces come: the `structured` events of a stream.

Each character is looked at once. Fed with text that is JSON by construction; where it is not, nothing more is told.
"""

from __future__ import annotations

from typing import Any

from .json_scanner import JsonScanner
from .openai_replies import JsonObject


class ClosedPaths:
    """State of one answer. An event is {"path": JSON pointer (RFC 6901), "value": ...} for a scalar and for an empty
    object or list; {"path", "closed": "object" or "array"} where one with contents ends, its parts having been told.
    """

    def __init__(self) -> None:
        self._path: list[str | int] = []  # keys and indexes of the open containers' present parts
        self._told: list[JsonObject] = []
        self._scanner = JsonScanner(self)
        self._is_broken = False

    def feed(self, text: str) -> list[JsonObject]:
        """What `text` completes."""
        if self._is_broken:
            return []
        try:
            self._scanner.feed(text)
        except ValueError:  # no JSON: say nothing more of it
            self._is_broken = True
        return self._taken()

    def finish(self) -> list[JsonObject]:
        """The end of the text: a number or a word at the top has no other."""
        if self._is_broken:
            return []
        try:
            self._scanner.finish()
        except ValueError:
            self._is_broken = True
        return self._taken()

    def opens(self, kind: str) -> None:
        """See Sink."""
        self._path.append(0 if kind == "[" else "")

    def key(self, name: str) -> None:
        """See Sink."""
        self._path[-1] = name

    def value(self, value: Any) -> None:
        """See Sink."""
        self._told.append({"path": self._pointer(), "value": value})
        self._pass()

    def closes(self, *, is_empty: bool) -> None:
        """See Sink."""
        kind = "array" if isinstance(self._path.pop(), int) else "object"
        path = self._pointer()
        if is_empty:
            self._told.append({"path": path, "value": [] if kind == "array" else {}})
        else:
            self._told.append({"path": path, "closed": kind})
        self._pass()

    def _pass(self) -> None:
        if self._path and isinstance(index := self._path[-1], int):
            self._path[-1] = index + 1

    def _taken(self) -> list[JsonObject]:
        taken, self._told = self._told, []
        return taken

    def _pointer(self) -> str:
        return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in self._path)
