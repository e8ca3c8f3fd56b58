"""JSON from outside, read strictly: one object, UTF-8, no duplicate keys, no NaN, no lone surrogates, bounded depth.

The vendors' schemas stand on it. Everything wrong raises InvalidRequest with a sentence for the client.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .errors import InvalidRequest

MAX_DEPTH = 64  # the deepest honest body, a tool schema, stays below 30
MAX_CONTAINERS = 65_536  # objects and lists in one body: bounds the time that the parser holds the interpreter
MAX_MEMBERS = 131_072  # of all objects in one body, for the same reason
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A text, which is a member's name where the group is there; or a bracket. Brackets within texts do not count.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+"([ \t\r\n]*:)?|[\[{]|[\]}]', re.DOTALL)


def parse_object(body: bytes) -> dict[str, Any]:
    """The one JSON object in `body`. Raises InvalidRequest; `param` is None, as no field can be blamed."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is not UTF-8 (byte {exc.start})") from None
    return _object(text, body, MAX_CONTAINERS)[0]


def parse_inner(text: str, path: str, most_containers: int = MAX_CONTAINERS) -> tuple[dict[str, Any], int]:
    """The one JSON object in a string of a body that was parsed already, by the same rules, and the number of its
    objects and lists, 0 where they are few: a body with many such strings has one `most_containers` for all. Raises
    InvalidRequest, which blames `path`.
    """
    try:
        return _object(text, text.encode(), most_containers)
    except InvalidRequest as exc:
        why = exc.message.replace("the body", "the text", 1)
        if most_containers < MAX_CONTAINERS and "objects and lists" in why:
            why = f"with the calls before it there are more than {MAX_CONTAINERS} objects and lists"
        raise InvalidRequest(f"{path} must hold the JSON of an object: {why}", path) from None


def _object(text: str, body: bytes, most_containers: int) -> tuple[dict[str, Any], int]:
    containers = _check_size(body, most_containers)
    odd = _OddNumbers()
    try:
        value = json.loads(text, object_pairs_hook=odd.pairs, parse_constant=odd.constant, parse_float=odd.number)
        odd.check()
    except json.JSONDecodeError as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc.msg} (line {exc.lineno} column {exc.colno})") from None
    except ValueError:  # CPython's limit on the digits of an integer
        raise InvalidRequest("the body holds an integer with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    if _ESCAPED_SURROGATE.search(body):
        _check_surrogates(value)
    return value, containers


def _check_size(body: bytes, most_containers: int) -> int:
    """The number of objects and lists, 0 where they are few."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b":") <= MAX_MEMBERS:
        return 0
    depth = containers = members = 0
    field = b""  # of the outermost object, in which the parser is
    for match in _TOKEN.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            containers += 1
            if containers > most_containers:
                raise _too_much(field, f"holds more than {most_containers} objects and lists")
            if depth > MAX_DEPTH:
                raise _too_much(field, f"is nested more than {MAX_DEPTH} levels deep")
        elif first in b"]}":
            depth -= 1
        elif match.lastindex is not None:
            members += 1
            if depth == 1:
                field = match[0].removesuffix(match[1])
            if members > MAX_MEMBERS:
                raise _too_much(field, f"holds objects with more than {MAX_MEMBERS} members together")
    return containers


def _too_much(field: bytes, words: str) -> InvalidRequest:
    name = printable(field[1:-1].decode()) or None
    return InvalidRequest(f"the body {words}" + (f", where {name} is" if name else ""), name)


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds half of a surrogate pair, which is no character") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {printable(key)} appears twice", printable(key))
            seen.add(key)
    return found


class _OddNumbers:
    """Of one text: numbers that JSON does not have, or that no float holds, are an error of the field that has them."""

    def __init__(self) -> None:
        self._words = ""  # of the first one

    def constant(self, name: str) -> object:
        """NaN and the infinities, which Python's parser reads."""
        self._words = self._words or f"{name} is not a JSON number"
        return self

    def number(self, text: str) -> object:
        value = float(text)
        if math.isfinite(value):
            return value
        self._words = self._words or f"{text[:32]} is too large for a number"
        return self

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object, its members known."""
        if self._words:
            for key, value in pairs:
                if value is self:
                    name = printable(key)
                    raise InvalidRequest(f"{name}: {self._words}", name)
        return _unique_keys(pairs)

    def check(self) -> None:
        """One that is no member of an object: in a list, or all there is."""
        if self._words:
            raise InvalidRequest(self._words)


def printable(text: str, limit: int = 80) -> str:
    """`text` made safe to repeat in a message: one line, UTF-8, at most `limit` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return clean + ("..." if len(text) > limit else "")
