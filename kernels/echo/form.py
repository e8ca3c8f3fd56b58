"""What the echo model answers where a guide leaves no free choice: the shortest text of the form that it can see.

It looks at the mask alone, byte by byte: it ends where it may, closes what is open, and begins what it must with the
simplest value. So a JSON schema gets its minimal instance, whatever the temperature. Letters and digits take turns with
the position, so that a repetition ends.
"""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

from diptych.protos.echo import END, FIRST_BYTE

Allowed = NDArray[np.bool_]  # of every token of the vocabulary

_CONTROL = 0x0A  # may stand in free text and not in a JSON string
_ANYTHING = b"aQ~ "  # all of them may stand in a JSON string, and hardly anywhere else
_CLOSING = b"}],:"
_SIMPLE = b'"0123456789ntf'
_ROTATED = (string.ascii_lowercase + string.digits + string.ascii_uppercase).encode()
_LAST = b"[{-"


def is_free(allowed: Allowed) -> bool:
    """Whether anything may come: then the echo model goes on as it would without a guide."""
    return bool(allowed[FIRST_BYTE + _CONTROL] and all(allowed[FIRST_BYTE + byte] for byte in _ANYTHING))


def shortest(allowed: Allowed, position: int) -> int | None:
    """The token to write at `position`; None where none is allowed."""
    if allowed[END]:
        return END
    in_string = all(allowed[FIRST_BYTE + byte] for byte in _ANYTHING)
    turn = position % len(_ROTATED)
    rotated = _ROTATED[turn:] + _ROTATED[:turn]
    order = (b'"' + rotated) if in_string else (_CLOSING + _SIMPLE + rotated)
    rest = bytes(byte for byte in range(256) if byte not in order and byte not in _LAST and byte != 0x20)
    for byte in order + rest + _LAST + b" ":
        if allowed[FIRST_BYTE + byte]:
            return FIRST_BYTE + byte
    others = np.flatnonzero(allowed)
    return int(others[0]) if len(others) else None
