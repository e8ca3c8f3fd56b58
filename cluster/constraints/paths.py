"""Places in a schema as a client would write them: `properties.age.type`, `anyOf[2]`, `properties['a b']`."""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")


def step(path: str, key: str | int) -> str:
    """The path of a member or item of what is at `path`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    if _PLAIN.fullmatch(key):
        return f"{path}.{key}" if path else key
    return f"{path}[{shortened(key, 60)!r}]"


def joined(field: str, path: str) -> str:
    """`path` inside of the request's `field`."""
    if not path or not field:
        return field or path
    return field + path if path.startswith("[") else f"{field}.{path}"


def shortened(text: str, length: int = 40) -> str:
    """At most `length` characters of `text`, for a message."""
    return text if len(text) <= length else text[: length - 3] + "..."
