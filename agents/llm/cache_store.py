"""Where kept answers lie: in this process's memory, or in a file of SQLite that several processes share.

cache.py says what is kept, by which key; here are bytes by keys, bounded, the least used ones leaving first.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from .errors import UsageError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_WAIT_S = 5.0  # for another process that writes
_USED_S = 60.0  # so exact is the order of use in a file: a hit need not write each time
_LEAVES = 0.1  # so much of the file's bound goes at once
_VERSION = 1
_ENTRY_BYTES = 200  # of a key, and of what holds it


class Store(Protocol):
    """Bytes by keys, for any number of threads. `since` is a time in seconds since 1970: what is older is not there."""

    def get(self, key: str, since: float) -> bytes | None:
        """None where it is not there."""

    def put(self, key: str, value: bytes, now: float) -> None:
        """In place of what was there."""

    def drop(self, key: str) -> None:
        """It is not there any more."""

    def clear(self) -> None:
        """Nothing is there any more."""

    def num_bytes(self) -> int:
        """That are taken."""

    def close(self) -> None:
        """Gives back what is open."""


class MemoryStore:
    """Of this process. What is larger than the whole bound is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, since: float) -> bytes | None:
        """See Store."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            if found[0] < since:
                self._drop(key)
                return None
            self._kept.move_to_end(key)
            return found[1]

    def put(self, key: str, value: bytes, now: float) -> None:
        """See Store."""
        with self._lock:
            self._drop(key)
            self._kept[key] = now, value
            self._bytes += len(value) + _ENTRY_BYTES
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def drop(self, key: str) -> None:
        """See Store."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= len(found[1]) + _ENTRY_BYTES

    def clear(self) -> None:
        """See Store."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def num_bytes(self) -> int:
        """See Store."""
        return self._bytes

    def close(self) -> None:
        """There is nothing open."""


class FileStore:
    """A file that only its owner may read. A file that cannot be read or written in time is told of in the log, and
    counts as one that has nothing. Raises UsageError at once for a file that is no such store.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pid = 0
        self._open: sqlite3.Connection | None = None
        self._left_behind: list[sqlite3.Connection] = []
        try:
            with self._lock:
                self._connection()
        except (sqlite3.Error, OSError) as exc:
            raise UsageError(f"Cache({str(path)!r}): this is no file of kept answers: {exc}", "path") from exc

    def _connection(self) -> sqlite3.Connection:
        """This process's. One that a fork has copied is its parent's and must not even be closed here."""
        if self._open is not None and self._pid == os.getpid():
            return self._open
        if self._open is not None:
            self._left_behind.append(self._open)
            self._open = None
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        made = sqlite3.connect(self.path, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        try:
            (version,) = made.execute("PRAGMA user_version").fetchone()
            (num_tables,) = made.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version != _VERSION and num_tables:
                raise sqlite3.DatabaseError(f"its version is {version}, and this program writes {_VERSION}")
            made.execute("PRAGMA journal_mode=WAL")
            made.execute("PRAGMA synchronous=NORMAL")
            made.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, value BLOB NOT NULL, made REAL NOT NULL, used REAL NOT NULL) WITHOUT ROWID"
            )
            made.execute("CREATE INDEX IF NOT EXISTS by_use ON answers (used)")
            made.execute(f"PRAGMA user_version={_VERSION}")
        except BaseException:
            made.close()
            raise
        self._open, self._pid = made, os.getpid()
        return made

    def get(self, key: str, since: float) -> bytes | None:
        """See Store."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            found = connection.execute("SELECT value, made, used FROM answers WHERE key = ?", (key,)).fetchone()
            if found is None or found[1] < since:
                return None
            now = time.time()
            if not 0 <= now - found[2] < _USED_S:
                connection.execute("UPDATE answers SET used = ? WHERE key = ?", (now, key))
            return bytes(found[0])

        return self._done(read, None)

    def put(self, key: str, value: bytes, now: float) -> None:
        """See Store."""

        def write(connection: sqlite3.Connection) -> None:
            if len(value) > self._max_bytes:
                return
            row = (key, value, now, time.time())
            connection.execute("INSERT OR REPLACE INTO answers (key, value, made, used) VALUES (?, ?, ?, ?)", row)
            while _taken(connection) > self._max_bytes:
                (count,) = connection.execute("SELECT count(*) FROM answers").fetchone()
                if count == 0:
                    return
                connection.execute(
                    "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT ?)",
                    (max(1, int(count * _LEAVES)),),
                )

        self._done(write, None)

    def drop(self, key: str) -> None:
        """See Store."""
        self._done(lambda connection: connection.execute("DELETE FROM answers WHERE key = ?", (key,)), None)

    def clear(self) -> None:
        """See Store."""
        self._done(lambda connection: connection.execute("DELETE FROM answers"), None)

    def num_bytes(self) -> int:
        """See Store."""
        return self._done(_taken, 0)

    def close(self) -> None:
        """See Store; it is opened again where it is used again."""
        with self._lock:
            found, self._open = self._open, None
            if found is not None and self._pid == os.getpid():
                found.close()

    def _done(self, do: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        try:
            with self._lock:
                return do(self._connection())
        except (sqlite3.Error, OSError) as exc:
            logger.warning("the answers kept in %s are out of reach: %s", self.path, exc)
            return otherwise


def _taken(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)
