"""Values of an answer's JSON as what a format says that they are, or empty: providers, and proxies before them, send
more than formats have.

For decoders, which pass over what they cannot read, and for who reads whole answers.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .codec import JsonObject

MAX_COUNT: Final = 10**9  # of tokens: no honest answer has more, and sums of larger ones cannot be told
MAX_KEPT: Final = 1024  # things of one answer that are told together: what is told anew with each costs their square
# Escapes one after the other, so that what stands behind an escaped backslash is none.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)


def text_in(value: object) -> str:
    """A text."""
    return value if isinstance(value, str) else ""


def object_in(value: object) -> JsonObject:
    """An object."""
    return value if isinstance(value, dict) else {}


def list_in(value: object) -> list[Any]:
    """A list."""
    return value if isinstance(value, list) else []


def count_in(value: object) -> int | None:
    """A number of things, where it can be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT else None


def json_in(text: str) -> Any:
    """What a text of JSON holds; None where it is none."""
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return None


def read_json(text: str) -> Any:
    """What a text of JSON holds, such as it can be passed on: numbers that JSON cannot say are None, halves of
    characters (lone surrogates), which UTF-8 cannot carry, are U+FFFD. Raises ValueError, RecursionError.
    """
    if "\\ud" in text or "\\uD" in text:
        text = _ESCAPE.sub(_whole, text)
    return _READER.decode(text)


def check_kept(things: list[Any]) -> None:
    """Raises ProviderFailure (SERVER) for more than MAX_KEPT of them."""
    if len(things) > MAX_KEPT:
        words = f"the provider's answer holds more than {MAX_KEPT} blocks, or notes on one of them"
        raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))


def _whole(found: re.Match[str]) -> str:
    return "\\ufffd" if found[1] else found[0]


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _none(word: str) -> None:
    """In place of NaN and Infinity."""


_READER: Final = json.JSONDecoder(parse_constant=_none, parse_float=_finite)
