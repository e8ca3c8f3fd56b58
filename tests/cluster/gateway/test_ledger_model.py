"""Ledgers of several routers against a model that knows everything: money is neither made nor lost, whoever dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from tills import MICRO, answered, budget_of, ledger_of, reserve, settings_of

from diptych.cluster.gateway.accounts import BudgetExceeded
from diptych.cluster.gateway.books import AccountId, Batch, MemoryBooks
from diptych.cluster.gateway.ledger import Ledger, Reserved

ALL = AccountId("all", "", "")
BUDGET = 200
ROUTERS = 3
# What happens (a request comes, is settled, a router flushes, gives back, is killed), where, and a number for it.
HAPPENINGS = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "settle", "settle", "flush", "idle", "kill"]),
    st.integers(0, ROUTERS - 1),
    st.integers(0, 40),
)


@dataclass
class Life:
    """A router's, and what the model knows of it: micro-dollars."""

    ledger: Ledger
    open: list[tuple[Reserved, int]] = field(default_factory=list)
    settled: int = 0


class Written(MemoryBooks):
    """Knows what each router has written, by itself or before it was refused: micro-dollars."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    async def flush(self, batch: Batch) -> int:
        self.by[batch.holder] += sum(tally.cost_nanos for tally in batch.spend.values()) // MICRO
        return await super().flush(batch)


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.books = Written()
        self.settings = settings_of(budgets=budget_of(BUDGET, period="total", lease_usd=20e-6))
        self.routers = [self.life() for _ in range(ROUTERS)]
        self.dead: list[Life] = []
        self.beyond = 0  # what requests cost beyond their reservations

    def life(self) -> Life:
        return Life(ledger_of(self.settings, self.books, clock=lambda: self.now))

    @property
    def committed(self) -> int:
        kept = self.books.accounts.get(ALL)
        return 0 if kept is None else kept.committed

    async def happen(self, what: str, which: int, number: int) -> None:
        self.now += 1.0  # longer than a refusal is remembered
        life = self.routers[which]
        if what == "ask":
            await self.ask(life, number)
        elif what == "settle" and life.open:
            reserved, held = life.open.pop(number % len(life.open))
            self.beyond += max(number - held, 0)
            life.settled += number
            await reserved.settle(answered(number))
        elif what == "flush":
            await life.ledger.flush()
            assert self.books.by[life.ledger.holder] == life.settled
        elif what == "idle":
            self.now += 60.0
            life.ledger._accounts.give_back_idle()
        elif what == "kill":
            self.dead.append(life)
            self.routers[which] = self.life()
        await quiet(life)
        for life in self.routers:
            for account in life.ledger._accounts._accounts.values():
                assert 0 <= account.reserved <= account.leased
                assert account.reserved == sum(held for _, held in life.open) * MICRO

    async def ask(self, life: Life, tokens: int) -> None:
        account = life.ledger._accounts._accounts.get(ALL)
        free = 0 if account is None else account.free
        try:
            life.open.append((await reserve(life.ledger, tokens + 1), tokens + 1))
        except BudgetExceeded:
            assert (tokens + 1) * MICRO > free + BUDGET * MICRO - self.committed, "it was there"


async def quiet(life: Life) -> None:
    """Until no lease is being fetched."""
    await asyncio.gather(*life.ledger._accounts._tasks)


@given(st.lists(HAPPENINGS, min_size=5, max_size=60))
@bounds(max_examples=150, deadline=None)
def test_money_is_neither_made_nor_lost(happenings: list[tuple[str, int, int]]) -> None:
    """At any moment all routers together keep the budget; in the end the books have every settled micro-dollar, and
    of a router that was killed at least what it owed.
    """

    async def job() -> None:
        world = World()
        for what, which, number in happenings:
            await world.happen(what, which, number)
            assert world.committed <= (BUDGET + world.beyond) * MICRO
        for life in world.routers:
            for reserved, held in life.open:
                await reserved.settle(answered(held))
                life.settled += held
            await life.ledger.stop()
        kept = world.books.accounts.get(ALL)
        if kept is None:
            return
        spent = sum(life.settled for life in world.routers) + sum(
            world.books.by[life.ledger.holder] for life in world.dead
        )
        assert kept.spent == spent * MICRO
        lost = {life.ledger.holder: life for life in world.dead}
        for holder, nanos in kept.leases.items():
            if holder in lost:
                life = lost[holder]
                owed = life.settled - world.books.by[holder] + sum(held for _, held in life.open)
                assert nanos >= min(owed, owed - world.beyond) * MICRO
            else:
                assert nanos == 0
        assert kept.committed <= (BUDGET + world.beyond) * MICRO

    asyncio.run(job())
