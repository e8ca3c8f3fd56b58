"""Checks a finished answer against the client's own schema: what the grammar could not enforce is found here.

The router calls it after every answer of a JSON form and for the arguments of every call. Patterns are searched in
linear time; those with lookarounds, which no linear engine reads, by a search that gives up after a number of steps.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Final

import jsonschema_rs

from diptych.cluster.constraints import patterns
from diptych.cluster.constraints.check import check, compact
from diptych.cluster.constraints.kept import Newest, key_of
from diptych.cluster.constraints.keywords import SCHEMA_MAPS, Draft
from diptych.cluster.constraints.paths import shortened, step
from diptych.cluster.constraints.references import parts
from diptych.protos.errors import InvalidRequest

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
    """A client's schema, ready to check answers.

    Raises InvalidRequest as `check` does, with `where` in it, and where the draft's own meta-schema refuses the schema.
    """

    def __init__(self, schema: object, where: str = "") -> None:
        checked = check(schema, where)
        options = patterns.linear_options() if _is_linear(schema) else patterns.backtracking_options()
        plain = schema if isinstance(schema, bool | dict) else True
        make = _CLASSES[checked.draft]
        try:
            self._validator = make(plain, validate_formats=True, pattern_options=options, offline=True)
        except ValueError:
            self._validator = _second_try(make, _portable(plain), options, where)

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


def _second_try(
    make: type[jsonschema_rs.Validator],
    schema: bool | dict[str, object],
    options: jsonschema_rs.RegexOptions | jsonschema_rs.FancyRegexOptions,
    where: str,
) -> jsonschema_rs.Validator:
    try:
        return make(schema, validate_formats=True, pattern_options=options, offline=True)
    except ValueError as error:
        told = shortened(str(error).split("\n\nFailed", 1)[0], 200)
        raise InvalidRequest(f"{where or 'the schema'}: not by its draft: {told}", where or None) from error


def _portable(schema: bool | dict[str, object]) -> bool | dict[str, object]:
    """The schema with its patterns as meta-schemas want them."""
    made = _mapped(schema)
    return made if isinstance(made, bool | dict) else True


def _mapped(schema: object) -> object:
    if isinstance(schema, list):
        return [_mapped(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, object] = {}
    for word, value in schema.items():
        if word == "pattern" and isinstance(value, str):
            made[word] = patterns.portable(value)
        elif word in SCHEMA_MAPS and isinstance(value, dict):
            named = word == "patternProperties"
            made[word] = {patterns.portable(name) if named else name: _mapped(part) for name, part in value.items()}
        else:
            made[word] = value if word in ("const", "enum", "default", "examples") else _mapped(value)
    return made


def _is_linear(schema: object) -> bool:
    if not isinstance(schema, dict):
        return True
    named = schema.get("patternProperties")
    own = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    if any(isinstance(pattern, str) and not patterns.linear(pattern) for pattern in own):
        return False
    return all(_is_linear(part) for _, _, part in parts(schema))


def _parsed(text: str) -> object:
    # Of equal names in an object the last one counts, as it does for whoever reads the answer.
    return json.loads(text, parse_float=_number, parse_constant=_no_number)


def _number(text: str) -> float:
    # What is beyond floats counts as the largest of them: infinity would not be a number to the library.
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


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
