"""The store: writes that share a transaction share nothing else, and what returned is there after any crash."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, ForeignKey, Integer, MetaData, String, Table, func, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.cluster.store import database, engines
from diptych.cluster.store.database import Store, open_store
from diptych.cluster.store.engines import url_of
from diptych.cluster.store.schema import prepare_store
from diptych.cluster.store.settings import StoreSettings
from diptych.cluster.store.testing import POSTGRES, open_raw, prepared, temporary_store
from diptych.protos.errors import Overloaded, ShuttingDown, StoreUnavailable

SQLITES_OWN = pytest.mark.skipif(POSTGRES in os.environ, reason="what SQLite alone does")
META = MetaData()
NOTES = Table("notes", META, Column("id", Integer, primary_key=True), Column("text", String(64), nullable=False))
PARTS = Table("parts", META, Column("id", Integer, ForeignKey("notes.id"), primary_key=True))


def make(connection: Connection) -> None:
    META.create_all(connection)


def adds(number: int, fault: BaseException | None = None):  # type: ignore[no-untyped-def]
    def job(connection: Connection) -> int:
        connection.execute(insert(NOTES).values(id=number, text=f"note {number}"))
        if fault is not None:
            raise fault
        return number

    return job


def numbers(connection: Connection) -> list[int]:
    return list(connection.execute(select(NOTES.c.id).order_by(NOTES.c.id)).scalars())


async def hold(store: Store) -> threading.Event:
    """Keep the writer busy until the event is set, so that what is written meanwhile waits together."""
    began, go = threading.Event(), threading.Event()

    def job(connection: Connection) -> None:
        began.set()
        go.wait(20)

    task = asyncio.ensure_future(store.write(job))
    await asyncio.to_thread(began.wait, 20)
    held.append(task)
    return go


held: list[asyncio.Future[None]] = []


async def test_what_one_writes_the_others_read() -> None:
    async with temporary_store() as store:
        await store.write(make)
        assert await store.write(adds(1)) == 1
        assert await store.read(numbers) == [1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["fine", "raises", "panics", "twice", "stray"]), max_size=40))
async def test_a_job_that_fails_is_taken_back_alone(kinds: list[str]) -> None:
    """In one transaction with any others; also when what it raises is no Exception."""

    class Panic(BaseException):
        pass

    metrics = RouterMetrics()
    async with temporary_store(metrics) as store:
        await store.write(make)
        await store.write(adds(1000))
        go = await hold(store)
        jobs = {
            "fine": lambda n: adds(n),
            "raises": lambda n: adds(n, ValueError(n)),
            "panics": lambda n: adds(n, Panic(n)),
            "twice": lambda n: adds(1000),
            "stray": lambda n: lambda c: c.execute(insert(PARTS).values(id=5000 + n)).rowcount,
        }
        writes = [asyncio.ensure_future(store.write(jobs[kind](n))) for n, kind in enumerate(kinds)]
        await asyncio.sleep(0)
        go.set()
        done = await asyncio.gather(*writes, return_exceptions=True)
        wanted = {"fine": int, "raises": ValueError, "panics": Panic, "twice": IntegrityError, "stray": IntegrityError}
        assert [type(one) for one in done] == [wanted[kind] for kind in kinds]
        assert await store.read(numbers) == [*(n for n, kind in enumerate(kinds) if kind == "fine"), 1000]
        if kinds:
            page = metrics.render().decode()
            assert f"diptych_store_batch_writes_sum {len(kinds) + 3:.1f}" in page


async def test_writes_that_wait_share_a_transaction() -> None:
    metrics = RouterMetrics()
    async with temporary_store(metrics) as store:
        await store.write(make)
        go = await hold(store)
        writes = [asyncio.ensure_future(store.write(adds(n))) for n in range(200)]
        await asyncio.sleep(0)
        assert "diptych_store_waiting 200.0" in metrics.render().decode()
        go.set()
        await asyncio.gather(*writes)
        assert "diptych_store_commit_seconds_count 3.0" in metrics.render().decode()
        assert "diptych_store_waiting 0.0" in metrics.render().decode()


async def test_a_full_line_is_refused_at_once_and_loses_nothing(tmp_path: Path) -> None:
    store = Store(url_of(prepared(tmp_path), tmp_path), folder=tmp_path, max_waiting=3)
    await store.start()
    await store.write(make)
    go = await hold(store)
    writes = [asyncio.ensure_future(store.write(adds(n))) for n in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await store.write(adds(9))
    go.set()
    assert await asyncio.gather(*writes) == [0, 1, 2]
    assert await store.read(numbers) == [0, 1, 2]
    await store.stop()


@SQLITES_OWN
async def test_a_transaction_that_sqlite_took_back_costs_only_who_broke_it(tmp_path: Path) -> None:
    """A full disk makes SQLite roll back by itself; the savepoints of the others are gone with it."""

    def breaks(connection: Connection) -> None:
        connection.exec_driver_sql("ROLLBACK")
        raise ValueError("broken")

    async with temporary_store(data_dir=tmp_path) as store:
        await store.write(make)
        go = await hold(store)
        writes = [asyncio.ensure_future(store.write(job)) for job in (adds(1), breaks, adds(2))]
        await asyncio.sleep(0)
        go.set()
        done = await asyncio.gather(*writes, return_exceptions=True)
        assert done[0] == 1
        assert isinstance(done[1], ValueError | StoreUnavailable)
        assert done[2] == 2
        assert await store.read(numbers) == [1, 2]


class Deadlock(Exception):
    """As psycopg raises it."""

    sqlstate = "40P01"


@pytest.mark.parametrize("times", [1, 3, 100])
async def test_transactions_of_two_routers_that_wait_for_each_other_cost_no_write(tmp_path: Path, times: int) -> None:
    """Guards against writes of clients that PostgreSQL's end of a deadlock fails: they are done one by one then. One
    that never goes through is told in the end.
    """
    left = times

    def crosses(connection: Connection) -> int:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OperationalError("UPDATE", {}, Deadlock("deadlock detected"))
        return adds(5)(connection)

    async with temporary_store(data_dir=tmp_path) as store:
        await store.write(make)
        go = await hold(store)
        writes = [asyncio.ensure_future(store.write(job)) for job in (adds(1), crosses, adds(2))]
        await asyncio.sleep(0)
        go.set()
        done = await asyncio.gather(*writes, return_exceptions=True)
        if times < 100:
            assert done == [1, 5, 2]
            assert await store.read(numbers) == [1, 2, 5]
        else:
            assert (done[0], type(done[1]), done[2]) == (1, StoreUnavailable, 2)
            assert await store.read(numbers) == [1, 2]


@SQLITES_OWN
async def test_a_disk_that_is_full_is_told_and_serves_again(tmp_path: Path) -> None:
    """PRAGMA max_page_count is SQLite's own full disk."""
    metrics = RouterMetrics()

    def limited(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")

    def large(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE IF NOT EXISTS big (x BLOB)"))
        connection.execute(text("INSERT INTO big VALUES (zeroblob(100000))"))

    async with temporary_store(metrics, tmp_path) as store:
        await store.write(make)
        await store.write(limited)
        go = await hold(store)
        writes = [asyncio.ensure_future(store.write(job)) for job in (adds(1), large, adds(2))]
        await asyncio.sleep(0)
        go.set()
        done = await asyncio.gather(*writes, return_exceptions=True)
        assert [done[0], done[2]] == [1, 2]
        assert isinstance(done[1], StoreUnavailable)
        assert "full" in done[1].detail
        assert str(tmp_path) not in str(done[1])
        await store.write(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 100000") and None)
        await store.write(adds(3))
        assert await store.read(numbers) == [1, 2, 3]
        assert 'diptych_store_failures_total{kind="write"} 1.0' in metrics.render().decode()


async def test_another_process_that_keeps_the_lock_is_waited_for_and_then_told(tmp_path: Path) -> None:
    url = prepare_store(StoreSettings(), tmp_path)
    store = Store(url, folder=tmp_path, lock_timeout_s=0.05)
    await store.start()
    await store.write(make)
    other = sqlite3.connect(tmp_path / "diptych.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable) as told:
        await store.write(adds(1))
    assert "locked" in told.value.detail
    assert await store.read(numbers) == []
    other.execute("ROLLBACK")
    other.close()
    assert await store.write(adds(2)) == 2
    await store.stop()


async def test_readers_cannot_write_and_see_one_state() -> None:
    async with temporary_store() as store:
        await store.write(make)
        with pytest.raises(StoreUnavailable):
            await store.read(adds(1))
        first, go = threading.Event(), threading.Event()

        def twice(connection: Connection) -> tuple[int, int]:
            before = len(numbers(connection))
            first.set()
            go.wait(20)
            return before, len(numbers(connection))

        reading = asyncio.ensure_future(store.read(twice))
        await asyncio.to_thread(first.wait, 20)
        await store.write(adds(2))
        go.set()
        assert await reading == (0, 0)
        assert await store.read(lambda c: c.execute(select(func.count()).select_from(NOTES)).scalar_one()) == 1


async def test_a_stop_writes_what_waits_and_then_nothing_more() -> None:
    async with temporary_store() as store:
        await store.write(make)
        go = await hold(store)
        writes = [asyncio.ensure_future(store.write(adds(n))) for n in range(5)]
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(store.stop())
        await asyncio.sleep(0)
        go.set()
        await stopping
        assert await asyncio.gather(*writes) == [0, 1, 2, 3, 4]
        for call in (store.read(numbers), store.write(adds(9))):
            with pytest.raises(ShuttingDown):
                await call


async def test_who_goes_away_before_the_turn_is_left_out() -> None:
    async with temporary_store() as store:
        await store.write(make)
        go = await hold(store)
        gone, stays = asyncio.ensure_future(store.write(adds(1))), asyncio.ensure_future(store.write(adds(2)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        go.set()
        assert await stays == 2
        assert await store.read(numbers) == [2]


async def test_what_is_there_is_for_no_other_user(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        async with temporary_store(data_dir=tmp_path / "data") as store:
            await store.write(make)
            for file in (tmp_path / "data").iterdir():
                assert not stat.S_IMODE(file.stat().st_mode) & 0o077, file
    finally:
        os.umask(old)
    assert not stat.S_IMODE((tmp_path / "data").stat().st_mode) & 0o077


def test_a_server_that_says_nothing_is_not_waited_for_as_long_as_tcp_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a network that swallows packets: each write, and each look at keys, would wait for a quarter of an
    hour. What a URL says counts before that, and other drivers, which do not know the words, are told nothing.
    """
    told: dict[str, Any] = {}

    def making(url: Any, **how: Any) -> Any:
        told.update(how["connect_args"], pre_ping=how["pool_pre_ping"])
        return SimpleNamespace(dialect=SimpleNamespace(name="postgresql"))

    monkeypatch.setattr(engines, "create_engine", making)
    engines.writing_engine("postgresql+psycopg://u@h/d?connect_timeout=60")
    assert told.pop("pre_ping")
    assert told == {name: value for name, value in engines._SILENCE.items() if name != "connect_timeout"}
    told.clear()
    engines.writing_engine("postgresql+pg8000://u@h/d")
    assert told == {"pre_ping": True}


def test_the_password_is_in_no_repr(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    file = tmp_path / "password"
    file.write_text("s3cret\n")
    file.chmod(0o600)
    store = open_store(StoreSettings(url="postgresql+psycopg://u@localhost/d", password_file=file), tmp_path)
    assert "s3cret" not in repr(store)


CHILD = """
import asyncio, sys
from pathlib import Path
from sqlalchemy import text
from diptych.cluster.store.database import open_store
from diptych.cluster.store.testing import prepared

async def main(folder, who):
    store = open_store(prepared(Path(folder)), Path(folder))
    await store.start()
    async def one(number):
        said = {"n": number, "t": who}
        await store.write(lambda c: c.execute(text("INSERT INTO notes VALUES (:n, :t)"), said) and None)
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
    number = int(who) * 10_000_000
    while True:
        await asyncio.gather(*(one(number + i) for i in range(7)))
        number += 7

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("lines", [1, 60, 411])
def test_a_killed_process_loses_nothing_that_returned(tmp_path: Path, lines: int) -> None:
    """Two processes write to one file and are killed amid it; every number that they told is there, once."""
    prepared(tmp_path)
    engine = open_raw(tmp_path)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"))
    engine.dispose()
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    writers = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True) for who in ("1", "2")]
    told: list[int] = []
    try:
        for writer in writers:
            assert writer.stdout is not None
            told += [int(writer.stdout.readline()) for _ in range(lines)]
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
    for writer in writers:
        assert writer.stdout is not None
        rest = writer.stdout.read()
        told += [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        writer.wait()
        writer.stdout.close()
    with engine.begin() as connection:
        present = set(connection.execute(text("SELECT id FROM notes")).scalars())
        if engine.dialect.name == "sqlite":
            assert connection.execute(text("PRAGMA integrity_check")).scalars().all() == ["ok"]
    engine.dispose()
    assert len(told) >= 2 * lines
    assert set(told) <= present


def test_the_batch_is_bounded() -> None:
    """Other processes wait for the lock while a transaction takes in writes."""
    assert database.BATCH_JOBS <= 1024
    assert database.BATCH_S <= 0.1
