"""How much of an answer's JSON can be kept: up to the value of the first wrong field, or up to where it was cut off.

reasking.py asks for it where a target goes on from a beginning within its form. It knows no requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from .reports import Report

_decoder = json.JSONDecoder()
_SPACE = " \t\n\r"
_NOT_IN_PLACE = frozenset({"missing", "extra_forbidden", "json_invalid"})  # no value stands where these are wrong
_OPEN_NUMBER = re.compile(r"-?[0-9][-+.0-9eE]*$|-$")


def kept(report: Report, root: str = "") -> str:
    """The beginning of the answer, up to where the value of the first wrong field begins; empty where that would keep
    nothing of worth, or where the answer as a whole is wrong (`root`: the path of the whole).
    """
    if not report.has_value or any(one.path == root or one.kind in _NOT_IN_PLACE for one in report.errors):
        return ""
    places = [place_of(report.text, steps_of(one.path)) for one in report.errors]
    if not places or None in places:
        return ""
    first = report.text[: min(place for place in places if place is not None)].rstrip()
    return first if _says_something(known(first)) else ""


def steps_of(path: str) -> list[str]:
    """Of a JSON pointer."""
    return [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")[1:]]


def place_of(text: str, steps: Sequence[str]) -> int | None:
    """Where in the JSON `text` the value at `steps` begins; None where there is none, or more than one. Raises nothing
    for a text that is no JSON up to there.
    """
    at = _after_space(text, 0)
    try:
        for step in steps:
            found = _member(text, at, step) if text[at] == "{" else _item(text, at, step)
            if found is None:
                return None
            at = found
    except (ValueError, IndexError, RecursionError):
        return None
    return at


def resumable(text: str) -> str:
    """`text`, which was cut off, as far as an answer goes on from it; empty where there is nothing to go on from. Half
    a character, and spaces that are the next token's or a loop's, are left out.
    """
    return text.rstrip("\ufffd").rstrip()


def known(text: str) -> Any:
    """What JSON that was cut off says, in plain values: members and items that are complete. None: nothing."""
    places = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    if not places:
        return None
    begun = _OPEN_NUMBER.sub("", text[min(places) :].rstrip())  # more digits might have come
    try:
        return from_json(begun, allow_partial=True)
    except ValueError:
        return None


def _says_something(value: Any) -> bool:
    """Whether there is more than open braces and brackets."""
    if isinstance(value, dict):
        return any(_says_something(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_says_something(inner) for inner in value)
    return value is not None


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at


def _member(text: str, at: int, name: str) -> int | None:
    """Of the object that begins at `at`, where the value of `name` begins."""
    found: int | None = None
    at = _after_space(text, at + 1)
    while text[at] != "}":
        key, at = _decoder.raw_decode(text, at)
        at = _after_space(text, at)
        if text[at] != ":":
            raise ValueError(text[at])
        at = _after_space(text, at + 1)
        if key == name:
            if found is not None:
                return None
            found = at
        _, at = _decoder.raw_decode(text, at)
        at = _after_comma(text, at)
    return found


def _item(text: str, at: int, step: str) -> int | None:
    """Of the list that begins at `at`, where item `step` begins."""
    if text[at] != "[" or not (step.isascii() and step.isdigit()):
        return None
    at = _after_space(text, at + 1)
    for _ in range(int(step)):
        if text[at] == "]":
            return None
        _, at = _decoder.raw_decode(text, at)
        at = _after_comma(text, at)
    return None if text[at] == "]" else at


def _after_comma(text: str, at: int) -> int:
    at = _after_space(text, at)
    return _after_space(text, at + 1) if text[at] == "," else at
