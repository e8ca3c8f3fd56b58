"""What is wrong with an answer that is not what its type takes, field by field: for a person, a program, the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

MAX_FOUND_CHARS = 200
MAX_MESSAGE_CHARS = 500
MAX_ERRORS = 20  # that are told
_MOST_READ = 2000  # of pydantic's, before those of unions are chosen among
_WRONG_VALUE = 3  # a word that is none of those named weighs so many times a field that is missing
_HINTS = {
    "missing": "add this field",
    "extra_forbidden": "leave this field out",
    "json_invalid": "answer with one JSON value and nothing else",
    "too_deep": "nest no deeper than 200 levels",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number without quotes",
    "int_from_float": "write a whole number",
    "finite_number": "write a number that JSON has, without NaN and Infinity",
    "float_type": "write a number without quotes",
    "string_type": "write a text in quotes",
    "bool_type": "write true or false",
    "list_type": "write a list in brackets",
    "set_type": "write a list in brackets",
    "tuple_type": "write a list in brackets",
    "dict_type": "write an object in braces",
    "model_type": "write an object in braces",
    "dataclass_type": "write an object in braces",
    "none_required": "write null",
    "literal_error": "use one of the values that are named",
    "enum": "use one of the values that are named",
    "date_from_datetime_parsing": "write YYYY-MM-DD",
    "date_parsing": "write YYYY-MM-DD",
    "datetime_parsing": "write YYYY-MM-DDTHH:MM:SSZ",
    "datetime_from_date_parsing": "write YYYY-MM-DDTHH:MM:SSZ",
    "time_parsing": "write HH:MM:SS",
    "uuid_parsing": "write 32 hexadecimal digits as 8-4-4-4-12",
}
_KEY = "[key]"  # pydantic's last step where an object's key is wrong, not its value


@dataclass(frozen=True, slots=True)
class FieldError:
    """`path` is a JSON pointer (RFC 6901), empty for the whole; `found` the JSON text that stands there, cut."""

    path: str
    kind: str
    message: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{_cut(self.path) or 'the answer'}: {self.message}; found {self.found}{hint}"


@dataclass(frozen=True, slots=True)
class Report:
    """`text` is the answer that was looked at, whole; `value` what JSON it holds, where it holds any (`has_value`).
    `num_more` errors are not among `errors`.
    """

    errors: tuple[FieldError, ...]
    text: str = field(repr=False)
    value: Any = field(default=None, repr=False)
    has_value: bool = False
    num_more: int = 0

    def __str__(self) -> str:
        more = [f"- and {self.num_more} more"] if self.num_more else []
        return "\n".join([*(f"- {error}" for error in self.errors), *more])

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the fields that are wrong."""
        return tuple(error.path for error in self.errors)


def pointer(steps: Sequence[object]) -> str:
    """As RFC 6901 writes it."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


def report_of(error: Exception, document: str, text: str, prefix: tuple[str, ...] = (), base: str = "") -> Report:
    """Of what parsing `document`, found in `text`, raised. `prefix` leads to where the type's own paths begin, if the
    document has it; `base` is the pointer to the document, where it is a part of the answer.
    """
    try:
        value, has_value = from_json(document), True
    except ValueError:
        value, has_value = None, False
    if not isinstance(error, ValidationError) or not has_value:
        return Report((_of_whole(error, document, has_value, base),), text, value, has_value)
    inner = value
    if prefix and isinstance(value, dict) and value.keys() == set(prefix):
        inner, base = value[prefix[0]], base + pointer(prefix)
    raw = error.errors(include_url=False, include_input=False)
    trails = [_Trail.of(inner, one) for one in raw[:_MOST_READ]]
    errors = [_field_error(inner, members, base) for members in _chosen(trails)]
    num_more = len(errors[MAX_ERRORS:]) + len(raw[_MOST_READ:])
    return Report(tuple(errors[:MAX_ERRORS]), text, value, has_value, num_more)


def _of_whole(error: Exception, document: str, has_value: bool, base: str) -> FieldError:
    if has_value:
        return FieldError(base, "value", _cut(_first_line(error), MAX_MESSAGE_CHARS), _cut(document))
    message = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else _first_line(error)
    if "recursion limit" in message or isinstance(error, RecursionError):
        return FieldError(base, "too_deep", "it is nested too deeply to be read", _cut(document), _HINTS["too_deep"])
    return FieldError(base, "json_invalid", message, _around(document), _HINTS["json_invalid"])


def _around(document: str) -> str:
    """The text where it stops being JSON."""
    try:
        json.loads(document)
    except json.JSONDecodeError as exc:
        begin = max(0, min(exc.pos, len(document)) - MAX_FOUND_CHARS // 2)
        return ("..." if begin else "") + _cut(document[begin : begin + MAX_FOUND_CHARS + 1])
    except (ValueError, RecursionError):
        pass
    return _cut(document)


@dataclass(frozen=True, slots=True)
class _Trail:
    """An error's way into the value: keys and indexes, and between them the names that pydantic has for the members of
    unions and for validators (`labels`, by how many steps lie before them). Pydantic does not tell the two apart: a
    key of the answer that is named like a member of the union around it counts as a step.
    """

    error: ErrorDetails
    steps: tuple[object, ...]
    labels: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, value: Any, error: ErrorDetails) -> _Trail:
        """Follows the error into the value."""
        steps: list[object] = []
        labels: list[tuple[int, str]] = []
        loc = error["loc"]
        for at, step in enumerate(loc):
            is_last = at == len(loc) - 1
            if isinstance(value, list) and isinstance(step, int) and step < len(value):
                value = value[step]
            elif isinstance(value, dict) and str(step) in value:
                value = value[str(step)]
            elif is_last and step != _KEY and error["type"] == "missing":
                value = None
            else:
                labels.append((len(steps), str(step)))
                continue
            steps.append(step)
        return cls(error, tuple(steps), tuple(labels))

    @property
    def weight(self) -> int:
        return _WRONG_VALUE if self.error["type"] in ("literal_error", "enum") else 1


def _chosen(trails: Sequence[_Trail], level: int = 0) -> list[list[_Trail]]:
    """What is told together, in the order of the fields: each error alone, but of a union only those of the member that
    fits best.
    """
    groups: dict[tuple[object, ...], list[_Trail]] = {}
    for at, trail in enumerate(trails):
        is_union = len(trail.labels) > level and trail.labels[level][1] != _KEY
        way: tuple[object, ...] = (
            ("union", trail.labels[:level], trail.steps[: trail.labels[level][0]]) if is_union else ("field", at)
        )
        groups.setdefault(way, []).append(trail)
    found: list[list[_Trail]] = []
    for way, group in groups.items():
        found += _of_union(group, level) if way[0] == "union" else [group]
    return found


def _of_union(trails: Sequence[_Trail], level: int) -> list[list[_Trail]]:
    """Where not even the kind of value is any member's, all in one."""
    members: dict[str, list[_Trail]] = {}
    for trail in trails:
        members.setdefault(trail.labels[level][1], []).append(trail)

    def misfit(trails: list[_Trail]) -> tuple[bool, int]:
        is_other = any(len(one.steps) == one.labels[level][0] for one in trails)
        return is_other, sum(one.weight for one in trails)

    best = min(members.values(), key=misfit)
    if len(members) > 1 and misfit(best)[0]:
        return [[group[0] for group in members.values() if len(group) == 1] or best[:1]]
    return _chosen(best, level + 1)


def _field_error(value: Any, group: Sequence[_Trail], base: str) -> FieldError:
    first = group[0]
    words = list(dict.fromkeys(_message(one.error) for one in group))
    hints = list(dict.fromkeys(hint for one in group if (hint := _HINTS.get(one.error["type"]))))
    return FieldError(
        base + pointer(first.steps),
        first.error["type"],
        _cut("; or ".join(words), MAX_MESSAGE_CHARS),
        _found(value, first.steps),
        _cut(", or ".join(hints), MAX_MESSAGE_CHARS) if len(group) == 1 or len(hints) > 1 else "",
    )


def _message(error: ErrorDetails) -> str:
    message = error["msg"]
    for prefix in ("Value error, ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    return message or "it is not accepted"


def _found(value: Any, steps: Sequence[object]) -> str:
    for step in steps:
        try:
            value = value[int(str(step))] if isinstance(value, list) else value[str(step)]
        except (KeyError, IndexError, TypeError, ValueError):
            return "nothing"
    return _told(value)


def _told(value: Any) -> str:
    """As JSON, cut: no more of it is written than is shown."""
    if isinstance(value, str):
        return _cut(json.dumps(value[: MAX_FOUND_CHARS + 1], ensure_ascii=False))
    text = ""
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += piece[: MAX_FOUND_CHARS + 1]
        if len(text) > MAX_FOUND_CHARS:
            break
    return _cut(text)


def _cut(text: str, most: int = MAX_FOUND_CHARS) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
