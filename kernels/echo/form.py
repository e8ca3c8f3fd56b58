"""What the echo model answers where a guide leaves no free choice: the shortest text of the form that it can see.

It looks at the mask and at what it wrote last, byte by byte: it ends where it may, closes what is open, and begins what
it must with the simplest value. So a JSON schema gets its minimal instance, whatever the temperature. Bytes that it has
not written for longest come first, so that a repetition ends.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diptych.protos.echo import END, FIRST_BYTE

Allowed = NDArray[np.bool_]  # of every token of the vocabulary

_CONTROL = 0x0A  # may stand in free text and not in a JSON string
_ANYTHING = b"aQ~ "  # all of them may stand in a JSON string, and hardly anywhere else
_QUOTE, _COMMA = b'",'
_CLOSING = b'}]"'
_BETWEEN = b",:"
_NUMBER = string.digits.encode() + b".eE+-" + string.whitespace.encode() + _CLOSING + _BETWEEN  # and what may follow it
_STRUCTURE = b'{}[]",:'
_BEYOND_ASCII = bytes(range(0x80, 0x100))
_LETTERS = (string.ascii_lowercase + string.ascii_uppercase).encode()
_DIGITS = string.digits.encode()
_LAST = b"[{-" + string.whitespace.encode()  # begin what is long, or say nothing
_LOOKS_BACK = 256  # tokens: every byte once
_SHORT = 64  # bytes in which a value begins like the one before
_PLAIN = 160  # bytes in which a repetition of ASCII is not varied by other characters
_WORN = 24  # whatever closes so often in a row closes nothing


def is_free(allowed: Allowed) -> bool:
    """Whether anything may come: then the echo model goes on as it would without a guide."""
    return bool(allowed[FIRST_BYTE + _CONTROL] and all(allowed[FIRST_BYTE + byte] for byte in _ANYTHING))


def shortest(allowed: Allowed, known: Sequence[int]) -> int | None:
    """The token to write after the tokens `known`; None where none is allowed."""
    if allowed[END]:
        return END
    able = np.flatnonzero(allowed[FIRST_BYTE : FIRST_BYTE + 256]).astype(np.uint8).tobytes()
    if not able:
        others = np.flatnonzero(allowed)
        return int(others[0]) if len(others) else None
    written = _written(known)
    in_string = all(byte in able for byte in _ANYTHING) or (_QUOTE in able and _COMMA in able)
    if (closing := _closing(able, written, in_string=in_string)) is not None:
        return FIRST_BYTE + closing
    if len(written) <= _PLAIN:
        able = able.translate(None, _BEYOND_ASCII) or able
    order = _order(_LETTERS + _DIGITS if in_string else _DIGITS + b"ntf" + _LETTERS)
    if len(written) <= _SHORT:
        written = written[1 + max(written.rfind(byte) for byte in _STRUCTURE) :]
    unable = order.translate(None, able)
    fresh = order.translate(None, written + unable)
    return FIRST_BYTE + (fresh[0] if fresh else min(able, key=written.rfind))


def _closing(able: bytes, written: bytes, *, in_string: bool) -> int | None:
    """What ends the value that is open, or leads to the next one where that must come."""
    if written[-_WORN:].strip(_CLOSING + _BETWEEN) == b"" and len(written) >= _WORN:
        return None
    found = b'"' if in_string else b'}]"'
    if not able.translate(None, _NUMBER):
        found += _BETWEEN
    if written.endswith(b'""'):  # no value of JSON goes on with a third one
        found = found.replace(b'"', b"")
    return next((byte for byte in found if byte in able), None)


def _written(known: Sequence[int]) -> bytes:
    """The bytes at the end of a text, as far as it is bytes."""
    last = np.array(known[-_LOOKS_BACK:], np.int64) - FIRST_BYTE
    others = np.flatnonzero(last >> 8)  # no bytes
    return last[others[-1] + 1 if len(others) else 0 :].astype(np.uint8).tobytes()


@cache
def _order(first: bytes) -> bytes:
    """All bytes, those first, then what else can be read."""
    rest = bytes(byte for byte in (*range(0x20, 0x7F), *range(0x20), *range(0x7F, 0x100)) if byte not in first + _LAST)
    return first + rest + _LAST
