"""The file of API keys that `security.api_keys` names, one JSON object a line: the source for who keeps keys in git.

Read by keys.py and before a start; the program only ever appends to it (`diptych keys create --file`).
"""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diptych.protos.errors import StartupError

from .keys import USUAL_SCOPES, Key, Override, Scope, time_of
from .security import read_file

KEY = "security.api_keys"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {
    "id",
    "sha256",
    "tenant",
    "name",
    "scopes",
    "created_at",
    "expires_at",
    "requests_per_minute",
    "concurrency",
    "disabled",
    "may_override",
    "tags",
}


def key_line(key: Key) -> str:
    """What the file holds for a key, without a line end."""
    told: dict[str, Any] = {"id": key.id, "sha256": key.sha256, "tenant": key.tenant}
    told |= {"name": key.name} if key.name else {}
    told["scopes"] = sorted(key.scopes)
    for name in ("created_at", "expires_at"):
        if (at := getattr(key, name)) is not None:
            told[name] = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
    for name in ("requests_per_minute", "concurrency"):
        if (limit := getattr(key, name)) is not None:
            told[name] = limit
    told |= {"may_override": sorted(key.may_override)} if key.may_override else {}
    told |= {"tags": list(key.tags)} if key.tags else {}
    return json.dumps(told | ({"disabled": True} if key.disabled else {}))


def add_key(file: Path, line: str) -> None:
    """Append a line; a new file is nobody else's. Raises StartupError when it cannot, or when the file is spoilt."""
    try:
        opened = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(opened).st_size
            before = b"\n" if size and os.pread(opened, 1, size - 1) != b"\n" else b""
            os.write(opened, before + line.encode() + b"\n")  # one write: a router sees all of it or none
        finally:
            os.close(opened)
    except OSError as exc:
        raise StartupError(f"cannot write {file}: {exc.strerror or exc}") from exc
    read_keys(file)


def read_keys(file: Path) -> list[Key]:
    """In the order of the lines. Raises StartupError with the line to blame, which it does not quote."""
    found: dict[str, Key] = {}
    ids: set[str] = set()
    for number, line in enumerate(read_file(KEY, file, is_private=True).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            key = _entry(json.loads(line))
        except (ValueError, RecursionError) as exc:
            why = "not JSON" if isinstance(exc, (json.JSONDecodeError, UnicodeError, RecursionError)) else exc
            raise StartupError(
                f"{KEY}: line {number} of {file}: {why}; write one line for each key, as `diptych keys create TENANT "
                "--file` does"
            ) from exc
        if key.sha256 in found or key.id in ids:
            what = "key" if key.sha256 in found else "id"
            raise StartupError(f"{KEY}: line {number} of {file}: the same {what} stands on an earlier line")
        found[key.sha256] = key
        ids.add(key.id)
    if not found:
        raise StartupError(f"{KEY}: {file} holds no key; make one with `diptych keys create TENANT --file {file}`")
    return list(found.values())


def _entry(told: object) -> Key:
    if not isinstance(told, dict) or not told.keys() <= _FIELDS:
        raise ValueError(f"there are the fields {', '.join(sorted(_FIELDS))}")
    digest = told.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError("sha256 must be the 64 lower-case hexadecimal digits of the key's SHA-256")
    texts = {name: told.get(name, "") for name in ("tenant", "name")} | {"id": told.get("id", f"key_{digest[:16]}")}
    for name, said in texts.items():
        if not isinstance(said, str):
            raise ValueError(f"{name} must be a text")
    per_minute, concurrency = (_limit(name, told.get(name)) for name in ("requests_per_minute", "concurrency"))
    disabled = told.get("disabled", False)
    if not isinstance(disabled, bool):
        raise ValueError("disabled must be true or false")
    return Key(
        sha256=digest,
        scopes=_scopes(told.get("scopes", sorted(USUAL_SCOPES))),
        created_at=_time("created_at", told.get("created_at")) or 0,
        expires_at=_time("expires_at", told.get("expires_at")),
        requests_per_minute=per_minute,
        concurrency=concurrency,
        disabled=disabled,
        may_override=frozenset(Override(word) for word in _words("may_override", told, set(Override))),
        tags=tuple(_words("tags", told)),
        **texts,
    )


def _limit(name: str, told: object) -> int | None:
    if told is not None and type(told) is not int:
        raise ValueError(f"{name} must be a whole number")
    return told


def _words(name: str, told: dict[str, Any], known: set[Override] | None = None) -> list[str]:
    words = told.get(name, [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{name} must be a list of texts")
    if known is not None and (wrong := [word for word in words if word not in known]):
        raise ValueError(f"{name} must be a list of {', '.join(Override)}, not {wrong[0][:40]!r}")
    return words


def _scopes(told: object) -> frozenset[Scope]:
    if not isinstance(told, list) or not all(isinstance(word, str) and word in set(Scope) for word in told):
        raise ValueError(f"scopes must be a list of {', '.join(Scope)}")
    return frozenset(Scope(word) for word in told)


def _time(name: str, told: object) -> int | None:
    if told is None:
        return None
    if not isinstance(told, str) or told[-1:] in ("d", "h"):
        raise ValueError(f"{name} must be a text such as 2027-01-31 or 2027-01-31T12:00:00Z")
    try:
        return time_of(told, time.time())
    except ValueError as exc:
        raise ValueError(f"{name}: {exc}") from None
