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
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKET = re.compile(rb'"(?:[^"\\]+|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


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
        if most_containers < MAX_CONTAINERS and why.endswith("lists"):
            why = f"with the calls before it there are more than {MAX_CONTAINERS} objects and lists"
        raise InvalidRequest(f"{path} must hold the JSON of an object: {why}", path) from None


def _object(text: str, body: bytes, most_containers: int) -> tuple[dict[str, Any], int]:
    containers = _check_depth(body, most_containers)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float)
    except json.JSONDecodeError as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc.msg} (line {exc.lineno} column {exc.colno})") from None
    except ValueError:  # CPython's limit on the digits of an integer
        raise InvalidRequest("the body holds an integer with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    if _ESCAPED_SURROGATE.search(body):
        _check_surrogates(value)
    return value, containers


def _check_depth(body: bytes, most_containers: int) -> int:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0
    depth = containers = 0
    for match in _BRACKET.finditer(body):  # strings match whole, so that brackets in them do not count
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            containers += 1
            if containers > most_containers:
                raise InvalidRequest(f"the body holds more than {most_containers} objects and lists")
            if depth > MAX_DEPTH:
                raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
        elif first in b"]}":
            depth -= 1
    return containers


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


def _no_constant(name: str) -> float:
    raise InvalidRequest(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(f"{text[:32]} is too large for a number")
    return value


def printable(text: str, limit: int = 80) -> str:
    """`text` made safe to repeat in a message: one line, UTF-8, at most `limit` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return clean + ("..." if len(text) > limit else "")
