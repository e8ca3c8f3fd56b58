"""Plain JSON values checked piece by piece, each error naming the path; openai_*.py read with these.

They know no field of any API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, TypeVar

from .errors import InvalidRequest
from .strict_json import printable

PIECE_BYTES = 4 << 10  # that are written as JSON in one go where others wait for the interpreter
JsonObject = dict[str, Any]
ChoiceT = TypeVar("ChoiceT", bound=str)


def refuse(path: str, words: str) -> InvalidRequest:
    """The error that says `path` and what is wrong with it, for the caller to raise."""
    return InvalidRequest(f"{path} {words}", path)


def an_object(value: object, path: str, known: Collection[str] | None = None) -> JsonObject:
    """`value`, which must be an object; with `known`, one without other fields. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise refuse(path, "must be an object")
    for name in value if known is not None else ():
        if name not in (known or ()):
            inner = f"{path}.{printable(name)}"
            raise InvalidRequest(f"unknown field {inner}; here may stand: {', '.join(sorted(known or ()))}", inner)
    return value


def a_list(value: object, path: str, *, most: int, what: str, may_be_empty: bool = False) -> list[Any]:
    """`value`, which must be a list of 1 to `most` of `what`. Raises InvalidRequest."""
    if not isinstance(value, list) or not (value or may_be_empty):
        raise refuse(path, f"must be a list of {what}")
    if len(value) > most:
        raise refuse(path, f"has {len(value)} {what}; the limit is {most}")
    return value


def a_text(value: object, path: str, *, most: int | None = None, least: int = 1) -> str:
    """`value`, which must be a string of `least` to `most` characters. Raises InvalidRequest."""
    if value is None:
        raise refuse(path, "is missing")
    if not isinstance(value, str):
        raise refuse(path, "must be a string")
    if len(value) < least:
        raise refuse(path, "is empty" if least == 1 else f"must have {least} characters or more")
    if most is not None and len(value) > most:
        raise refuse(path, f"has {len(value)} characters; the limit is {most}")
    return value


def a_flag(value: object, path: str) -> bool | None:
    """`value`, which must be true, false or null. Raises InvalidRequest."""
    if value is not None and not isinstance(value, bool):
        raise refuse(path, "must be true or false")
    return value


def is_default(value: object, defaults: Collection[object]) -> bool:
    """Whether `value` is one of `defaults`; true and 1 are two values, as they are in JSON."""
    return any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in defaults)


def one_of(value: object, path: str, choices: tuple[ChoiceT, ...]) -> ChoiceT:
    """`value`, which must be one of `choices`. Raises InvalidRequest."""
    for choice in choices:
        if value == choice:
            return choice
    wanted = ", ".join(choices[:-1]) + (" or " if len(choices) > 1 else "") + choices[-1]
    raise refuse(path, "is missing" if value is None else f"must be {wanted}")


def a_name(value: object, path: str, pattern: re.Pattern[str], words: str) -> str:
    """`value`, which must be a string that `pattern` matches, as `words` tell. Raises InvalidRequest."""
    if value is None:
        raise refuse(path, "is missing")
    if not isinstance(value, str) or not pattern.fullmatch(value):
        told = f" ({printable(value, 40)})" if isinstance(value, str) else ""
        raise refuse(path, f"must be {words}{told}")
    return value


def compact(value: object) -> str:
    """`value` as JSON without spaces, keys in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def compact_in_pieces(value: object) -> str:
    """As `compact`, for threads: the interpreter's lock is held for no longer than a piece of it or one text takes."""
    pieces: list[str] = []
    _add_pieces(value, pieces)
    return "".join(pieces)


def _add_pieces(value: object, pieces: list[str]) -> None:
    if not isinstance(value, dict | list) or not value or may_fit(value, PIECE_BYTES):
        pieces.append(compact(value))
    elif isinstance(value, dict):
        lead = "{"
        for name, inner in value.items():
            pieces.append(f"{lead}{compact(name)}:")
            _add_pieces(inner, pieces)
            lead = ","
        pieces.append("}")
    else:
        lead = "["
        for inner in value:
            pieces.append(lead)
            _add_pieces(inner, pieces)
            lead = ","
        pieces.append("]")


def may_fit(value: object, most: int) -> bool:
    """False where `value`, plain JSON, takes surely more than `most` bytes as JSON; looks no further than that takes.

    Asked before `compact`, which holds the interpreter's lock until it is through, and everybody's streams with it.
    """
    left: list[object] = [value]
    size = -1  # every value but the outermost is followed by a comma or a bracket
    while left:
        part = left.pop()
        size += len(part) + 3 if isinstance(part, str) else 2
        if isinstance(part, dict):
            left.extend(part)
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
        if size > most:
            return False
    return True
