"""The text that the inside of a JSON string stands for, piece by piece.

The reader of calls uses it for names, keys, and arguments that a model wrote as a string. It never fails: what is no
escape stays as written, and so does half a surrogate pair, which no text can hold.
"""

from __future__ import annotations

_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = frozenset("0123456789abcdefABCDEF")
_HIGH, _LOW, _END = 0xD800, 0xDC00, 0xE000


def unescape_at(text: str, pos: int, *, final: bool = False) -> tuple[str, int] | None:
    """The escape whose backslash is at `pos`: what it stands for, and where it ends.

    None where more text is needed to tell; with `final` no more comes, and there is always an answer.
    """
    kind = text[pos + 1 : pos + 2]
    if kind != "u":
        if not kind:
            return ("\\", pos + 1) if final else None
        return _ESCAPES.get(kind, "\\" + kind), pos + 2
    code, known = _code(text, pos)
    if code is None:
        if not known and not final:
            return None
        return "\\u", pos + 2
    if not _HIGH <= code < _END:
        return chr(code), pos + 6
    as_written = text[pos : pos + 6], pos + 6
    if code >= _LOW:
        return as_written
    low, known = _code(text, pos + 6)
    if low is None:
        return None if not known and not final else as_written
    if not _LOW <= low < _END:
        return as_written
    return chr(0x10000 + ((code - _HIGH) << 10) + (low - _LOW)), pos + 12


def _code(text: str, pos: int) -> tuple[int | None, bool]:
    """The number in `\\uXXXX` at `pos`; else None, and whether it is known that none comes."""
    digits = text[pos + 2 : pos + 6]
    if text[pos : pos + 2] not in ("\\u", "\\", "") or not _HEX.issuperset(digits):
        return None, True
    if len(digits) < 4:
        return None, False
    return int(digits, 16), True


def unescape(raw: str) -> str:
    """The whole inside of a string."""
    at = raw.find("\\")
    if at < 0:
        return raw
    pieces: list[str] = []
    pos = 0
    while at >= 0:
        found = unescape_at(raw, at, final=True)
        assert found is not None
        pieces += (raw[pos:at], found[0])
        pos = found[1]
        at = raw.find("\\", pos)
    return "".join((*pieces, raw[pos:]))
