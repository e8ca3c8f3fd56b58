"""Checks a finished answer against the client's own schema: what the grammar could not enforce is found here.

The router calls it after every answer of a JSON form and for the arguments of every call. Patterns are searched in
linear time; those with lookarounds, which no linear engine reads, by a search that gives up after a bounded number of steps.
Other documents are never fetched.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from itertools import islice
from typing import Final

import jsonschema_rs

from diptych.cluster.constraints import patterns
from diptych.cluster.constraints.check import check, compact
from diptych.cluster.constraints.kept import Newest, key_of
from diptych.cluster.constraints.keywords import Draft
from diptych.cluster.constraints.paths import shortened, step
from diptych.cluster.constraints.references import parts

MAX_ERRORS: Final = 8  # told of one answer
MAX_MESSAGE: Final = 300

_CLASSES: Final = {
    Draft.DRAFT_4: jsonschema_rs.Draft4Validator,
    Draft.DRAFT_6: jsonschema_rs.Draft6Validator,
    Draft.DRAFT_7: jsonschema_rs.Draft7Validator,
    Draft.DRAFT_2019_09: jsonschema_rs.Draft201909Validator,
    Draft.DRAFT_2020_12: jsonschema_rs.Draft202012Validator,
}


class Validator:
    """A client's schema, ready to check answers. Raises InvalidRequest as `check` does, with `where` in it."""

    def __init__(self, schema: object, where: str = "") -> None:
        checked = check(schema, where)
        options = patterns.backtracking_options() if _looks_around(schema) else patterns.linear_options()
        plain = schema if isinstance(schema, bool | dict) else True
        self._validator = _CLASSES[checked.draft](
            plain, validate_formats=True, pattern_options=options, offline=True
        )

    def errors(self, text: str) -> list[str]:
        """What is wrong with an answer's text, each with its place in the answer; empty where it matches.

        At most MAX_ERRORS; text that is no JSON is one error. Never raises.
        """
        try:
            value = _parsed(text)
        except RecursionError:
            return ["the answer nests too deep to be checked"]
        except ValueError as error:
            return [f"the answer is no JSON: {error}"]
        try:
            return [_told(error) for error in islice(self._validator.iter_errors(value), MAX_ERRORS)]
        except ValueError as error:  # nests deeper than the library goes, or holds half a character
            return [f"the answer cannot be checked: {error}"]


_VALIDATORS: Final = Newest[Validator](max_count=256, max_bytes=4 << 20)


def validator(schema: object, where: str = "", kept: Newest[Validator] = _VALIDATORS) -> Validator:
    """The validator of a schema that `judge` takes, from this process's cache."""
    text = compact(schema)
    key = key_of(text)
    found = kept.get(key)
    if found is None:
        found = Validator(schema, where)
        kept.put(key, found, len(text))
    return found


def _looks_around(schema: object) -> bool:
    if not isinstance(schema, dict):
        return False
    named = schema.get("patternProperties")
    own = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    if any(isinstance(pattern, str) and patterns.looks_around(pattern) for pattern in own):
        return True
    return any(_looks_around(part) for _, _, part in parts(schema))


def _parsed(text: str) -> object:
    return json.loads(text, object_pairs_hook=_members, parse_float=_number, parse_constant=_no_number)


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shortened(twice)!r} occurs twice in one object")
    return made


def _number(text: str) -> float | Decimal:
    value = float(text)
    return value if math.isfinite(value) else Decimal(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _told(error: jsonschema_rs.ValidationError) -> str:
    path = ""
    for key in error.instance_path:
        path = step(path, key)
    message = error.message  # begins with the whole value
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    return f"{path or 'the answer'}: {message}"
