"""API keys: what one opens and for whom, and the table of all that a router knows, from a file and from the store.

Used by the front door (api/access.py), key_file.py and the verb `diptych keys`. No key is ever kept, only SHA-256s.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from diptych.protos.errors import StartupError, StoreUnavailable

from .config import LABEL_RULE, DiptychConfig, is_label
from .store import keys as rows
from .store.database import Store
from .store.engines import reading_engine, url_of

MAX_KEY_BYTES = 512  # of what a client shows; ours have 46
PATIENCE_S = 5.0  # with a store that says nothing; then the keys from before hold without another wait
LOOK_S = 0.25  # a revoked key opens nothing so long after its file or row was changed
MAX_LIMIT = 1_000_000

log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a key opens. None of them holds another."""

    INFERENCE = "inference"  # requests to models
    FILES = "files"  # files and batches
    ADMIN = "admin"  # /info, /metrics


class Override(StrEnum):
    """What a request may want otherwise than its route has it, by a header."""

    TARGET = "target"  # x-route-target
    STRATEGY = "strategy"  # x-route-strategy
    CACHE = "cache"  # x-cache


USUAL_SCOPES = frozenset({Scope.INFERENCE, Scope.FILES})
MAX_TAGS = 8
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/=-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """All that is known of a key, which is not the key. Times in seconds since 1970. Raises ValueError."""

    id: str
    sha256: str = field(repr=False)  # of the key, 64 hexadecimal digits
    tenant: str
    name: str = ""  # for people
    scopes: frozenset[Scope] = USUAL_SCOPES
    created_at: int = 0
    expires_at: int | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None  # requests in work
    disabled: bool = False
    may_override: frozenset[Override] = frozenset()
    tags: tuple[str, ...] = ()  # for rules, budgets and limits

    def __post_init__(self) -> None:
        for name in ("id", "tenant", "name"):
            said = getattr(self, name)
            if not is_label(said) and (said or name != "name"):
                raise ValueError(f"{name} {LABEL_RULE}")
        if not self.scopes:
            raise ValueError(f"scopes must name at least one of {', '.join(Scope)}")
        if len(self.tags) > MAX_TAGS or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags must be at most {MAX_TAGS} different ones")
        if not all(_TAG.fullmatch(tag) for tag in self.tags):
            raise ValueError(
                "a tag must have 1 to 64 letters, digits, and '_', '.', ':', '/', '=' or '-' behind the first"
            )
        for name in ("requests_per_minute", "concurrency"):
            limit = getattr(self, name)
            if limit is not None and not 1 <= limit <= MAX_LIMIT:
                raise ValueError(f"{name} must be a whole number from 1 to {MAX_LIMIT:,}; leave it out for no limit")

    @property
    def opens_until(self) -> float:
        """From when on it opens nothing: infinity for one that never expires, minus that for a disabled one."""
        if self.disabled:
            return -math.inf
        return math.inf if self.expires_at is None else float(self.expires_at)


def make_key(tenant: str, **fields: Any) -> tuple[str, Key]:
    """A key, to be shown once, and what is kept of it: 256 random bits that can be told from other programs' keys.
    `fields` are Key's. Raises ValueError.
    """
    shown = "dk_" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(shown.encode()).hexdigest()
    at = {"created_at": int(time.time()), **fields}
    return shown, Key(id="key_" + secrets.token_hex(8), sha256=digest, tenant=tenant, **at)


def row_of(key: Key) -> dict[str, object]:
    """For store/keys.py."""
    told: dict[str, object] = {name: getattr(key, name) for name in Key.__slots__}
    words: dict[str, Sequence[str]] = {
        "scopes": sorted(key.scopes),
        "may_override": sorted(key.may_override),
        "tags": key.tags,
    }
    return told | {name: " ".join(values) for name, values in words.items()}


def key_of(row: Mapping[Any, Any]) -> Key:
    """The reverse. What another version of the program wrote and this one cannot read opens nothing."""
    told = {name: row[name] for name in Key.__slots__ if name not in ("scopes", "may_override", "tags")}
    scopes = frozenset(Scope(word) for word in row["scopes"].split() if word in set(Scope))
    may_override = frozenset(Override(word) for word in row["may_override"].split() if word in set(Override))
    try:
        return Key(scopes=scopes, may_override=may_override, tags=tuple(row["tags"].split()), **told)
    except ValueError:
        return Key(id=row["id"], sha256=row["sha256"], tenant=row["tenant"], disabled=True)


def time_of(text: str, now: float) -> int:
    """Seconds since 1970 of a day (its begin, UTC), a time with its zone, or a span from `now` such as 90d or 12h.
    Raises ValueError.
    """
    number, unit = text[:-1], text[-1:]
    if number.isdecimal() and unit in ("d", "h") and 0 < int(number) <= 100_000:
        return int(now) + int(number) * (86_400 if unit == "d" else 3600)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no time; write 90d, 12h, 2027-01-31 or 2027-01-31T12:00:00Z") from None
    if at.tzinfo is None:
        if len(text) > len("2027-01-31"):
            raise ValueError(f"{text[:40]!r} names no zone; write Z for UTC behind it")
        at = at.replace(tzinfo=UTC)
    return int(at.timestamp())


_Entry = tuple[bytes, float, Key | None]  # SHA-256, until when it opens, whose it is
_NOBODY: _Entry = (bytes(32), -math.inf, None)


class _Table:
    """Keys by a name of their hash that nobody outside can compute: a comparison that ends early tells nothing."""

    def __init__(self, blind: bytes) -> None:
        self._blind = blind
        self._keys: dict[bytes, _Entry] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, keys: Iterable[Key]) -> None:
        """Others stay."""
        for key in keys:
            digest = bytes.fromhex(key.sha256)
            self._keys[hmac.digest(self._blind, digest, "sha256")] = digest, key.opens_until, key

    def get(self, name: bytes, otherwise: _Entry) -> _Entry:
        return self._keys.get(name, otherwise)


class ApiKeys:
    """The keys of a file, of a store, or of both; a key that both know is what the store says.

    Looks at its sources as it is asked to, at most every LOOK_S; a source that cannot be read any more changes nothing
    but `fault`: the keys from before hold. For one event loop.
    """

    def __init__(
        self,
        file: Path | None = None,
        store: Store | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`clock` in seconds, `now` since 1970. Raises StartupError for a file that cannot be used."""
        self._file = file
        self._store = store
        self._clock = clock
        self._now = now
        self._blind = os.urandom(32)
        self._seen = _signature(file)
        self._of_file = self._read_file()
        self._of_store = _Table(self._blind)
        self._number = 0  # of the store's last change that is in the table
        self._was_read = store is None
        self._faults: dict[str, str] = {}
        self._looked_at = float("-inf")  # when the last look that is over began
        self._looking: asyncio.Task[None] | None = None
        self._is_stuck = False  # that look has taken longer than PATIENCE_S

    @property
    def fault(self) -> str:
        """Why a source as it is now does not count; empty: all do."""
        return "; ".join(self._faults.values())

    @property
    def is_asked(self) -> bool:
        """Whether there is a key, or was one: with the last one revoked nobody gets in, rather than everybody."""
        return bool(len(self._of_file) or len(self._of_store))

    async def start(self) -> None:
        """Raises StoreUnavailable."""
        await self._look()
        if not self._was_read:
            raise StoreUnavailable("the API keys cannot be read now; try again later")

    async def look(self) -> None:
        """What changed LOOK_S ago counts when this returns. Raises StoreUnavailable while the store's keys were never
        read.
        """
        asked_at = self._clock()
        while asked_at - self._looked_at >= LOOK_S:  # twice, where a look was under way that began too early
            if self._looking is None:
                self._looking = asyncio.create_task(self._look(), name="look at keys")
            if not await self._has_looked(self._looking):
                break
        if not self._was_read:
            raise StoreUnavailable("the API keys cannot be read now; try again later")

    def holder(self, shown: bytes) -> Key | None:
        """The key that opens now; None for an unknown, disabled or expired one. How long it takes tells nothing of the
        keys that exist.
        """
        digest = hashlib.sha256(shown).digest()
        name = hmac.digest(self._blind, digest, "sha256")
        # No branch before the end: whoever is refused took the same way.
        kept, until, key = self._of_store.get(name, self._of_file.get(name, _NOBODY))
        opens = hmac.compare_digest(kept, digest) & (len(shown) <= MAX_KEY_BYTES) & (self._now() < until)
        return key if opens else None

    async def _has_looked(self, looking: asyncio.Task[None]) -> bool:
        if not self._is_stuck:
            await asyncio.wait({looking}, timeout=PATIENCE_S)
        if looking.done():
            looking.result()
            return True
        self._is_stuck = True
        self._note_silence("it does not answer")
        return False

    def _note_silence(self, why: object) -> None:
        if "store" not in self._faults:
            log.error("the API keys cannot be read from the store (%s); those from before still hold", why)
        self._faults["store"] = "the API keys cannot be read from the store; those from before still hold"

    async def _look(self) -> None:
        began_at = self._clock()
        try:
            self._look_at_file()
            await self._look_at_store()
            self._looked_at = began_at
        finally:
            self._looking, self._is_stuck = None, False

    def _look_at_file(self) -> None:
        if (seen := _signature(self._file)) == self._seen:
            return
        self._seen = seen
        try:
            self._of_file = self._read_file()
            self._faults.pop("file", None)
            log.info("security.api_keys: %s was read again, %d keys", self._file, len(self._of_file))
        except StartupError as exc:
            self._faults["file"] = f"{exc}; the keys from before still hold"
            log.error("%s", self._faults["file"])

    async def _look_at_store(self) -> None:
        if self._store is None:
            return
        number = self._number
        try:
            # Past the reads of tenants: every request waits for this one.
            latest, changed = await self._store.read_first(lambda connection: rows.changed_since(connection, number))
        except Exception as exc:  # of a store that is full, closed or broken: it is told, and tried again
            self._note_silence(exc)
            return
        self._of_store.put(key_of(row) for row in changed)
        self._number, self._was_read = latest, True
        self._faults.pop("store", None)

    def _read_file(self) -> _Table:
        from .key_file import read_keys

        table = _Table(self._blind)
        if self._file is not None:
            table.put(read_keys(self._file))
        return table


def check_exposed(config: DiptychConfig) -> None:
    """Raises StartupError where other machines can reach the API and no key opens it. The store must be there."""
    if not config.router.leaves_host:
        return
    from .key_file import read_keys

    known = [] if config.security.api_keys is None else read_keys(config.security.api_keys)
    engine = reading_engine(url_of(config.store, config.data_dir), config.store.lock_timeout_s, connections=1)
    try:
        with engine.connect() as connection:
            known += [key_of(row) for row in rows.listed(connection)]
    finally:
        engine.dispose()
    if not any(time.time() < key.opens_until for key in known):
        raise StartupError(
            f"router.host {config.router.host} is reachable from other machines, and no key opens the API: make one "
            "with `diptych keys create TENANT`, or use 127.0.0.1"
        )


def _signature(file: Path | None) -> tuple[int, ...]:
    if file is None:
        return ()
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
