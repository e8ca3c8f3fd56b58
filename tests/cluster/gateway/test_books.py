"""Books, in memory and in the store: the same promises, whoever keeps them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from diptych.cluster.gateway.books import AccountId, Batch, Books, Flow, Grant, MemoryBooks, SpendKey, Tally
from diptych.cluster.gateway.matching import period_of
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.store import budgets, spend
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import temporary_store

ALL = AccountId("all", "tenant=a", "2026-11")
NOW = 1_795_000_000.0


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with temporary_store() as store:
        yield store


@pytest.fixture(params=["memory", "store"])
def books(request: pytest.FixtureRequest) -> Books:
    return MemoryBooks() if request.param == "memory" else StoredBooks(request.getfixturevalue("store"))


def told(number: int, spent: int = 0, leased: int = 0, holder: str = "r1", **given: object) -> Batch:
    tally = {SpendKey(3600, "a", "k", "chat", "p/a"): Tally(requests=1, cost_nanos=spent)} if spent else {}
    flows = {ALL: Flow(spent, leased)} if spent or leased else {}
    return Batch(holder=holder, number=number, now=NOW, flows=flows, spend=tally, **given)  # type: ignore[arg-type]


async def test_leases_of_all_together_are_no_more_than_the_budget(books: Books) -> None:
    """Routers that take at the same time must not each get the last dollar."""
    grants = await asyncio.gather(*(books.take(f"r{i}", ALL, amount=1000, want=300, need=50) for i in range(40)))
    assert 950 < sum(grant.nanos for grant in grants) <= 1000
    assert grants[0].nanos == 250  # no more than a quarter of what is left: others want some
    assert all(grant.nanos == 0 or grant.nanos >= 50 for grant in grants)


async def test_books_in_memory_do_not_grow_for_ever() -> None:
    """A program with an account of each user and day kept them all until it had no memory left."""
    books = MemoryBooks(max_rows=50)
    for day in range(100):
        now = NOW + day * 86_400
        flows = {AccountId("each", f"tenant={i}", period_of("day", now)): Flow(5) for i in range(10)}
        spend = {SpendKey(int(now), f"{i}", "k", "chat", "p/a"): Tally(requests=1) for i in range(10)}
        await books.flush(Batch(holder="r1", number=day + 1, now=now, flows=flows, spend=spend))
    assert max(len(books.spend), len(books.accounts)) <= 60
    assert sum(found.period == period_of("day", now) for found in books.accounts) == 10


async def test_a_batch_that_comes_twice_counts_once(books: Books) -> None:
    """A router that was not told whether its flush was done sends it again."""
    await books.take("r1", ALL, amount=1000, want=100, need=1)
    for _ in range(2):
        assert await books.flush(told(1, spent=30, leased=-30)) == 1
    assert await books.flush(told(2, leased=-70)) == 1
    assert await books.take("r2", ALL, amount=1000, want=970, need=970) == Grant(970, 30)
    assert await books.take("r3", ALL, amount=1000, want=5, need=1) == Grant(0, 30)


async def test_what_was_spent_beyond_a_lease_is_gone_from_the_budget(books: Books) -> None:
    """And an account may begin with it."""
    await books.flush(told(1, spent=30))
    assert (await books.take("r1", ALL, amount=100, want=71, need=71)).nanos == 0
    assert (await books.take("r1", ALL, amount=100, want=70, need=70)).nanos == 70


async def test_limits_are_shared_by_the_routers_that_live(books: Books) -> None:
    """One that ended has no part of them."""
    assert await books.flush(told(1)) == 1
    assert await books.flush(told(1, holder="r2")) == 2
    assert await books.flush(told(2, holder="r2", is_last=True)) == 1


async def test_flushes_write_their_rows_in_one_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two routers whose flushes had the same rows in other orders waited for each other on PostgreSQL, which broke one
    of them off after a second, again and again.
    """
    written: list[object] = []
    monkeypatch.setattr(budgets, "move", lambda c, holder, moves: written.append([one.account for one in moves]))
    monkeypatch.setattr(spend, "add", lambda c, rows: written.append([row["target"] for row in rows]))
    for number, names in enumerate(("cab", "bca")):
        flows = {AccountId("all", name, ""): Flow(1) for name in names}
        sums = {SpendKey(3600, "a", "k", "chat", name): Tally(requests=1) for name in names}
        await StoredBooks(store).flush(Batch(holder=f"r{number}", number=1, now=NOW, flows=flows, spend=sums))
    assert written == [[AccountId("all", name, "") for name in "abc"], ["a", "b", "c"]] * 2


async def test_routers_that_take_and_flush_at_once_lose_and_overspend_nothing(tmp_path: Path) -> None:
    """Each with connections of its own, as two processes have them; on PostgreSQL they write at the same time."""
    accounts = [AccountId("all", f"tenant={i}", "2026-11") for i in range(4)]
    hour = int(NOW) // 3600 * 3600

    async def router(store: Store, holder: str, order: int) -> int:
        books, spent = StoredBooks(store), 0
        for number in range(1, 6):
            grants = await asyncio.gather(
                *(books.take(holder, one, amount=200, want=40, need=1) for one in accounts[::order])
            )
            flows = {one: Flow(2, -2) for one, grant in zip(accounts[::order], grants, strict=True) if grant.nanos >= 2}
            key = SpendKey(hour, "a", "k", "chat", "p/a")
            sums = {key: Tally(requests=len(flows), cost_nanos=2 * len(flows))} if flows else {}
            await books.flush(Batch(holder=holder, number=number, now=NOW, flows=flows, spend=sums))
            spent += 2 * len(flows)
        return spent

    async with temporary_store(data_dir=tmp_path) as one, temporary_store(data_dir=tmp_path) as other:
        spent = sum(await asyncio.gather(router(one, "r1", 1), router(other, "r2", -1)))
        rows = await one.read(lambda c: budgets.listed(c, round(NOW * 1000), periods=("2026-11",)))
        (total,) = await other.read(lambda c: spend.summed(c, "tenant", since=0, until=2**40))
    assert spent > 0
    assert sum(row["spent_nanos"] for row in rows) == total["cost_nanos"] == spent
    assert all(row["spent_nanos"] + row["held_nanos"] <= 200 for row in rows)


async def test_a_silent_router_has_no_part_of_limits_and_keeps_its_lease(store: Store) -> None:
    """Nobody knows what of it is owed; an admin sees how much it is."""
    books = StoredBooks(store)
    await books.take("dead", ALL, amount=1000, want=100, need=1)
    await books.flush(told(1, spent=20, leased=-20, holder="dead"))
    await books.take("r1", ALL, amount=1000, want=200, need=1)
    later = NOW + budgets.LIVE_MS / 1000 + 1
    assert await books.flush(Batch(holder="r1", number=1, now=later)) == 1
    (row,) = await store.read(lambda c: budgets.listed(c, round(later * 1000), periods=("2026-11",)))
    assert (row["spent_nanos"], row["held_nanos"], row["lost_nanos"]) == (20, 200, 80)
    assert (await books.take("r1", ALL, amount=1000, want=701, need=701)).nanos == 0


async def test_old_rows_are_dropped_and_present_ones_are_not(store: Store) -> None:
    """A row per hour, tenant, key, route and target grows for ever otherwise."""
    books = StoredBooks(store)
    old, new = int(NOW) - 500 * 86_400, int(NOW) // 3600 * 3600
    rows = {SpendKey(hour, "a", "k", "chat", "p/a"): Tally(requests=1) for hour in (old, new)}
    flows = {AccountId("all", "", period): Flow(5) for period in ("", "2025-01", "2025-01-31", "2026-11")}
    await books.flush(Batch(holder="r1", number=1, now=NOW - 7200, flows=flows, spend=rows))
    await books.flush(Batch(holder="r1", number=2, now=NOW))
    found = await store.read(lambda c: spend.summed(c, "day", since=0, until=int(NOW) + 1))
    assert [row["name"] for row in found] == [new // 86_400 * 86_400]
    periods = ("", "2025-01", "2025-01-31", "2026-11")
    kept = await store.read(lambda c: budgets.listed(c, 0, periods=periods))
    assert [row["period"] for row in kept] == ["", "2026-11"]
