"""A router's life in a process of its own, for tests that kill it: it pays for requests out of a store's budget."""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tills import MICRO, answered, budget_of, ledger_of, reserve, settings_of

from diptych.cluster.gateway.accounts import BudgetExceeded
from diptych.cluster.gateway.books import Batch
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.store.database import Store, open_store
from diptych.cluster.store.testing import prepared


class Told(StoredBooks):
    """Tells how many micro-dollars were written, behind each flush."""

    def __init__(self, store: Store, pipe: Connection) -> None:
        super().__init__(store)
        self.pipe = pipe
        self.written = 0

    async def flush(self, batch: Batch) -> int:
        found = await super().flush(batch)
        self.written += sum(tally.cost_nanos for tally in batch.spend.values())
        self.pipe.send(("written", self.written // MICRO, self.written))
        return found


def run_router(folder: str, budget: int, tokens: int, pipe: Connection) -> None:
    """Answers requests until the budget is used up, and tells of each before and after it is settled."""

    async def work() -> None:
        store = open_store(prepared(Path(folder)), Path(folder))
        await store.start()
        settings = settings_of(budgets=budget_of(budget, period="total", lease_usd=50e-6))
        async with ledger_of(settings, Told(store, pipe)) as ledger:
            try:
                while True:
                    reserved = await reserve(ledger, tokens)
                    pipe.send(("asked", tokens, time.monotonic()))
                    await asyncio.sleep(0.0005)
                    await reserved.settle(answered(7))
                    pipe.send(("settled", 7, time.monotonic()))
            except BudgetExceeded:
                pass
        await store.stop()
        pipe.send(("end", 0, 0.0))

    asyncio.run(work())
