"""API keys: a file of their hashes, which is read again when it changes, and whose a key is that somebody shows.

Used by the router's front door (api/access.py), the check before a start and `diptych keygen`. No key is ever kept.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diptych.protos.errors import StartupError

from .config import LABEL_RULE, is_label
from .security import read_file

KEY = "security.api_keys"
MAX_KEY_BYTES = 512  # of what a client shows; ours have 46
LOOK_S = 0.25  # a revoked key opens nothing so long after the file was changed
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"sha256", "tenant", "admin"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who holds a key. An admin may also look at /info and /metrics."""

    tenant: str
    is_admin: bool = False


def make_key() -> str:
    """256 random bits that can be told from other programs' keys."""
    return "dk_" + secrets.token_urlsafe(32)


def key_line(key: str, caller: Caller) -> str:
    """What the file holds for a key, without a line end."""
    told = {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": caller.tenant, "admin": caller.is_admin}
    return json.dumps(told)


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


def read_keys(file: Path) -> dict[bytes, Caller]:
    """Callers by the SHA-256 of their keys. Raises StartupError with the line to blame, which it does not quote."""
    found: dict[bytes, Caller] = {}
    for number, line in enumerate(read_file(KEY, file, is_private=True).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            digest, caller = _entry(json.loads(line))
        except (ValueError, RecursionError) as exc:
            why = "not JSON" if isinstance(exc, (json.JSONDecodeError, UnicodeError, RecursionError)) else exc
            raise StartupError(
                f"{KEY}: line {number} of {file}: {why}; write one line for each key, as `diptych keygen` prints it"
            ) from exc
        if digest in found:
            raise StartupError(f"{KEY}: line {number} of {file}: the same key stands on an earlier line")
        found[digest] = caller
    if not found:
        raise StartupError(f"{KEY}: {file} holds no key; make one with `diptych keygen TENANT --file {file}`")
    return found


def _entry(told: object) -> tuple[bytes, Caller]:
    if not isinstance(told, dict) or not told.keys() <= _FIELDS:
        raise ValueError(f"there are the fields {', '.join(sorted(_FIELDS))}")
    digest, tenant, admin = told.get("sha256"), told.get("tenant"), told.get("admin", False)
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError("sha256 must be the 64 lower-case hexadecimal digits of the key's SHA-256")
    if not isinstance(tenant, str) or not is_label(tenant):
        raise ValueError(f"tenant {LABEL_RULE}")
    if not isinstance(admin, bool):
        raise ValueError("admin must be true or false")
    return bytes.fromhex(digest), Caller(tenant, admin)


class ApiKeys:
    """The keys of one file. Looks at it again as it is asked; a change that cannot be read changes nothing but `fault`.

    For one thread. `clock` in seconds.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises StartupError."""
        self.fault = ""  # why the file as it is now does not count; empty: it does
        self._file = file
        self._clock = clock
        self._blind = os.urandom(32)
        self._seen = self._signature()
        self._look_at = clock() + LOOK_S
        self._callers = self._table(read_keys(file))

    def caller(self, key: bytes) -> Caller | None:
        """Whose key it is; None for one that nobody has. How long it takes tells nothing of the keys that exist."""
        self._look()
        digest = hashlib.sha256(key).digest()
        # Found under a name that nobody outside can compute: a comparison that ends early tells nothing.
        kept, caller = self._callers.get(self._name(digest), (bytes(32), None))
        return caller if hmac.compare_digest(kept, digest) and len(key) <= MAX_KEY_BYTES else None

    def _look(self) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        if (seen := self._signature()) == self._seen:
            return
        self._seen = seen
        try:
            self._callers = self._table(read_keys(self._file))
            self.fault = ""
            log.info("%s: %s was read again, %d keys", KEY, self._file, len(self._callers))
        except StartupError as exc:
            self.fault = f"{exc}; the keys from before still hold"
            log.error("%s", self.fault)

    def _signature(self) -> tuple[int, ...]:
        try:
            found = self._file.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _table(self, keys: dict[bytes, Caller]) -> dict[bytes, tuple[bytes, Caller]]:
        return {self._name(digest): (digest, caller) for digest, caller in keys.items()}

    def _name(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")
