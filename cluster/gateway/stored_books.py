"""Budgets and spend in the store, for all routers that share it. The one module here that imports cluster/store.

Made by whoever opens the store; a gateway without one has MemoryBooks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from diptych.cluster.store import budgets, spend
from diptych.cluster.store.database import Store

from .books import AccountId, Batch, Grant, SpendKey

BUDGETS_KEPT_DAYS: Final = 62  # after the end of their period
SPEND_KEPT_DAYS: Final = 400
_TIDY_S: Final = 3600.0
T = TypeVar("T")


class StoredBooks:
    """Books over a started Store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tidied_at = 0.0

    async def take(self, holder: str, account: AccountId, *, amount: int, want: int, need: int) -> Grant:
        """As Books'; raises StoreUnavailable, Overloaded, ShuttingDown."""

        def job(connection: Connection) -> budgets.Taken:
            return budgets.take(connection, holder, account, amount=amount, want=want, need=need)

        taken = await self._write(job)
        return Grant(taken.nanos, taken.spent)

    async def flush(self, batch: Batch) -> int:
        """As Books', in one transaction."""
        now_ms = round(batch.now * 1000)
        # In one order everywhere: two routers' flushes wait for each other's rows otherwise, a second and more.
        moves = [
            budgets.Move(account, flow.spent, flow.leased) for account, flow in sorted(batch.flows.items(), key=_key)
        ]
        rows = [{**key._asdict(), **tally.told()} for key, tally in sorted(batch.spend.items(), key=_key)]
        is_untidy = batch.now - self._tidied_at >= _TIDY_S

        def job(connection: Connection) -> int:
            if budgets.is_new(connection, batch.holder, batch.number, now_ms):
                budgets.move(connection, batch.holder, moves)
                spend.add(connection, rows)
            if batch.is_last:
                budgets.leave(connection, batch.holder)
            if is_untidy:
                _tidy(connection, batch.now)
            return max(budgets.num_holders(connection, now_ms), 1)

        num_routers = await self._write(job)
        if is_untidy:
            self._tidied_at = batch.now
        return num_routers

    async def _write(self, job: Callable[[Connection], T]) -> T:
        """Two processes may make the same row at once on PostgreSQL; the second time it is there."""
        for _ in range(4):
            try:
                return await self._store.write(job)
            except IntegrityError:
                continue
        return await self._store.write(job)


def _key(item: tuple[AccountId | SpendKey, object]) -> tuple[object, ...]:
    return item[0]


def _tidy(connection: Connection, now: float) -> None:
    today = datetime.fromtimestamp(now, UTC)
    budgets.forget(connection, round(now * 1000), (today - timedelta(days=BUDGETS_KEPT_DAYS)).strftime("%Y-%m-%d"))
    spend.forget(connection, int(now) - SPEND_KEPT_DAYS * 86_400)
