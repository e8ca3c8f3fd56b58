"""The store of one process: reads in threads, writes through one thread that commits many of them together.

Made by cluster/entry.py and by commands; used by the API's endpoints with the functions of the nouns' modules
(keys.py, ...), which take a Connection. Makes no tables: schema.py does, before.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import Overloaded, ShuttingDown, StoreUnavailable

from . import schema
from .engines import CONTENTS, LOCK_TIMEOUT_S, reading_engine, shown, url_of, writing_engine
from .settings import StoreSettings

READERS: Final = 4
MAX_WAITING: Final = StoreSettings().max_waiting
# A transaction takes in what waits, up to so many jobs and so long: other processes wait for its lock meanwhile.
BATCH_JOBS: Final = 256
BATCH_S: Final = 0.05
RETRY_AFTER_S: Final = 1.0
CROSSED_TRIES: Final = 5  # of a job whose transaction and another router's waited for each other
_CROSSED: Final = ("40P01", "40001")  # deadlock_detected, serialization_failure
_FOREIGN = (SQLAlchemyError, sqlite3.Error)  # the second from settings of a fresh connection

T = TypeVar("T")
log = logging.getLogger(__name__)


class _Lost(Exception):
    """The transaction is gone, and with it what its earlier jobs did; none of it was committed."""


@dataclass(slots=True, eq=False)
class _Write:
    job: Callable[[Connection], Any]
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Store:
    """One per process, for the event loop that started it. `folder` is for contents of files, beside the database.

    Durable means: a process that is killed loses nothing that returned. SQLite's synchronous=NORMAL lets a machine that
    loses its power lose the last commits, never the database.
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path,
        metrics: RouterMetrics | None = None,
        max_waiting: int = MAX_WAITING,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        """`max_waiting` bounds reads and writes, each. Raises StartupError for a URL that names nothing usable."""
        self.folder = folder
        self._url = url
        self._metrics = metrics or RouterMetrics()
        self._max_waiting = max_waiting
        self._writer = writing_engine(url, lock_timeout_s)
        self._reader = reading_engine(url, lock_timeout_s, READERS + 1)
        self._threads = ThreadPoolExecutor(READERS, "store-reader")
        self._first = ThreadPoolExecutor(1, "store-first")
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._reading = 0
        self._waiting: deque[_Write] = deque()
        self._news = threading.Condition()
        self._is_open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._metrics.gauges["store_waiting_limit"].set(max_waiting)

    def __repr__(self) -> str:
        return f"Store({shown(self._url)})"

    async def start(self) -> None:
        """Raises StartupError when the store is not there, or not of this program's version."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(schema.check, self._reader, self._url)
        self._is_open = True
        self._thread.start()

    async def stop(self) -> None:
        """Once what waits has been written. Later calls of `read` and `write` raise ShuttingDown."""
        self._is_open = False
        with self._news:
            self._news.notify_all()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        for threads in (self._threads, self._first):
            await asyncio.to_thread(threads.shutdown)
        self._reader.dispose()
        self._writer.dispose()

    async def read(self, job: Callable[[Connection], T]) -> T:
        """What `job` returns; it sees one state of the database and changes nothing.

        Raises what it raises, Overloaded, ShuttingDown, and StoreUnavailable when the database cannot be read.
        """
        self._check_open()
        if self._reading >= self._max_waiting:
            raise Overloaded(f"{self._reading} reads of the store wait already", RETRY_AFTER_S)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, job)
        finally:
            self._reading -= 1

    async def read_first(self, job: Callable[[Connection], T]) -> T:
        """As `read`, past all that wait there: for what every request waits for, which takes turns here alone."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._first, self._read, job)

    async def write(self, job: Callable[[Connection], T]) -> T:
        """What `job` returns, once it is committed. `job` may be begun twice, the first time without an effect, and
        holds up every other write: no network, no waiting in it. One that raises changes nothing.

        Raises what it raises, Overloaded and ShuttingDown at once, StoreUnavailable when the database fails.
        A caller that is cancelled does not know whether its job was done.
        """
        self._check_open()
        write = _Write(job, asyncio.get_running_loop().create_future())
        with self._news:
            waiting = len(self._waiting)
            if waiting < self._max_waiting:
                self._waiting.append(write)
                self._news.notify()
        if waiting >= self._max_waiting:
            raise Overloaded(f"{waiting} writes to the store wait already", RETRY_AFTER_S)
        self._metrics.gauges["store_waiting"].set(waiting + 1)
        result: T = await write.done
        return result

    def _check_open(self) -> None:
        if not self._is_open:
            raise ShuttingDown("the store of this server is closed")

    # -- threads

    def _read(self, job: Callable[[Connection], T]) -> T:
        try:
            with self._reader.connect() as connection:
                return job(connection)
        except _FOREIGN as exc:
            raise self._told(exc, "read") from exc

    def _run(self) -> None:
        while batch := self._next_batch():
            began = time.monotonic()
            self._carry_out(batch)
            for write in batch:
                if isinstance(write.error, _FOREIGN):
                    write.error = self._told(write.error, "write")
            self._metrics.histograms["store_commit"].observe(time.monotonic() - began)
            self._metrics.histograms["store_batch"].observe(len(batch))
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(_settle, batch)
            except RuntimeError:  # the loop was closed: nobody waits any more
                log.warning("%d writes to the store were done for a loop that has ended", len(batch))

    def _next_batch(self) -> list[_Write]:
        """At least one; none when the store is closed and all is written."""
        with self._news:
            while not self._waiting:
                if not self._is_open:
                    return []
                self._news.wait()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH_JOBS))]
            self._metrics.gauges["store_waiting"].set(len(self._waiting))
        return batch

    def _carry_out(self, batch: list[_Write], tries: int = CROSSED_TRIES) -> None:
        """Every write has a result or an error afterwards."""
        rest = [write for write in batch if not write.done.cancelled()]
        while rest:
            try:
                rest = rest[self._transaction(rest) :]
            except _Lost as lost:
                if len(rest) > 1:  # one of them does it: each for itself, and only that one fails
                    for write in rest:
                        self._carry_out([write])
                elif tries > 1 and _is_crossed(lost.__cause__):
                    self._carry_out(rest, tries - 1)
                return

    def _transaction(self, writes: list[_Write]) -> int:
        """How many of `writes` were carried out, from the first on. Raises _Lost, and `error` says why."""
        number, deadline = 0, time.monotonic() + BATCH_S
        for write in writes:
            write.error = None
        try:
            with self._writer.connect() as connection, connection.begin():
                while number < len(writes) and (not number or time.monotonic() < deadline):
                    self._one(connection, writes[number])
                    number += 1
        except _Lost:
            raise
        except Exception as exc:  # of connecting, beginning or committing: nothing of it was done
            number = number or len(writes)
            for write in writes[:number]:
                write.error = write.error or exc
        return number

    def _one(self, connection: Connection, write: _Write) -> None:
        try:
            with connection.begin_nested():
                try:
                    write.result = write.job(connection)
                except BaseException as exc:  # its caller's, whatever it is
                    write.error = exc
                    raise
        except BaseException as exc:  # the same, or why its savepoint could not be left
            write.error = write.error or exc
            if _is_lost(connection) or _is_crossed(exc):
                raise _Lost from exc

    def _told(self, exc: Exception, kind: str) -> Exception:
        """What callers may handle goes on as it is; that the database cannot be used becomes StoreUnavailable."""
        if not isinstance(exc, (DBAPIError, PoolTimeout, sqlite3.Error)) or isinstance(exc, IntegrityError):
            return exc
        self._metrics.counters["store_failures"].labels(kind).inc()
        why = " ".join(str(exc.orig if isinstance(exc, DBAPIError) else exc).split())[:300]
        log.error("the store %s cannot be used to %s: %s", shown(self._url), kind, why)
        return StoreUnavailable("the server's store cannot be used now; try again later", RETRY_AFTER_S, detail=why)


def _is_lost(connection: Connection) -> bool:
    """SQLite takes back a whole transaction by itself when the disk is full or fails."""
    if connection.invalidated or connection.closed or not connection.in_transaction():
        return True
    raw: Any = connection.connection.dbapi_connection
    return connection.dialect.name == "sqlite" and not raw.in_transaction


def _is_crossed(exc: BaseException | None) -> bool:
    """Whether PostgreSQL ended a wait of two routers' transactions for each other: their jobs are done one by one then,
    which hold no rows while they wait for others.
    """
    return isinstance(exc, DBAPIError) and getattr(exc.orig, "sqlstate", None) in _CROSSED


def _settle(batch: list[_Write]) -> None:
    for write in batch:
        if write.done.done():
            continue
        if write.error is None:
            write.done.set_result(write.result)
        elif isinstance(write.error, StopIteration):  # a future takes none
            write.done.set_exception(RuntimeError("a job of the store raised StopIteration"))
        else:
            write.done.set_exception(write.error)


def open_store(settings: StoreSettings, data_dir: Path, metrics: RouterMetrics | None = None) -> Store:
    """The store of a configuration, to be started. Raises StartupError."""
    return Store(
        url_of(settings, data_dir),
        folder=data_dir / CONTENTS,
        metrics=metrics,
        max_waiting=settings.max_waiting,
        lock_timeout_s=settings.lock_timeout_s,
    )
