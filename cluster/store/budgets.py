"""Budgets in the store: what was spent of each, and what routers have set aside of it for themselves.

Called by cluster/gateway/stored_books.py. Of an account, `committed` is all that is gone from it: what was spent, and
what lies in leases. A lease has no end: what a router that died had set aside counts as spent, for nobody knows how
much of it is owed. Knows neither amounts of budgets nor what they are for; money is nano-dollars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    RowMapping,
    String,
    Table,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from .tables import METADATA

ACCOUNTS = Table(
    "budget_accounts",
    METADATA,
    Column("budget", String(64), primary_key=True),
    Column("scope", String(1024), primary_key=True),  # whose, where each one has an account
    Column("period", String(10), primary_key=True),  # 2026-11-23, 2026-11, or nothing
    Column("spent_nanos", BigInteger, nullable=False),
    Column("committed_nanos", BigInteger, nullable=False),
)
LEASES = Table(
    "budget_leases",
    METADATA,
    Column("budget", String(64), primary_key=True),
    Column("scope", String(1024), primary_key=True),
    Column("period", String(10), primary_key=True),
    Column("holder", String(64), primary_key=True),
    Column("nanos", BigInteger, nullable=False),
)
HOLDERS = Table(
    "ledger_holders",
    METADATA,
    Column("holder", String(64), primary_key=True),
    Column("flushes", BigInteger, nullable=False),
    Column("seen_at_ms", BigInteger, nullable=False),
)
LIVE_MS = 10_000  # a router that was not seen for so long is gone
FORGOTTEN_MS = 7 * 86_400_000
_PARTS = 4  # of what is left, where it is less than so many leases: others want some, too
_A, _L, _H = ACCOUNTS.c, LEASES.c, HOLDERS.c
Account = tuple[str, str, str]  # budget, scope, period


@dataclass(frozen=True, slots=True)
class Taken:
    """`nanos` more are the holder's; 0: as many as it needs are not left. `spent`: of the account, by everybody."""

    nanos: int
    spent: int


@dataclass(frozen=True, slots=True)
class Move:
    """Since the holder's last one: what it spent of an account, and by how much its lease became larger or smaller."""

    account: Account
    spent: int
    leased: int


def take(connection: Connection, holder: str, account: Account, *, amount: int, want: int, need: int) -> Taken:
    """Into the lease of `holder`, `want` if they are left of `amount`, `need` at least. Raises IntegrityError where
    another process made the account in this moment.
    """
    while True:
        row = connection.execute(select(_A.spent_nanos, _A.committed_nanos).where(_is(ACCOUNTS, account))).first()
        if row is None:
            connection.execute(insert(ACCOUNTS).values(**_named(account), spent_nanos=0, committed_nanos=0))
            continue
        left = amount - row.committed_nanos
        if left < need:
            return Taken(0, row.spent_nanos)
        taken = want if left >= want * _PARTS else max(need, min(want, left // _PARTS))
        fits = _is(ACCOUNTS, account) & (_A.committed_nanos + taken <= amount)
        done = connection.execute(update(ACCOUNTS).where(fits).values(committed_nanos=_A.committed_nanos + taken))
        if done.rowcount:
            _lease(connection, holder, account, taken)
            return Taken(taken, row.spent_nanos)


def is_new(connection: Connection, holder: str, number: int, now_ms: int) -> bool:
    """Whether the flush `number` (from 1) of `holder` has not been applied yet; it counts as applied now."""
    mine = _H.holder == holder
    seen = {"flushes": number, "seen_at_ms": now_ms}
    if connection.execute(update(HOLDERS).where(mine & (_H.flushes < number)).values(**seen)).rowcount:
        return True
    if connection.execute(select(_H.holder).where(mine)).first() is not None:
        return False
    connection.execute(insert(HOLDERS).values(holder=holder, **seen))
    return True


def move(connection: Connection, holder: str, moves: Sequence[Move]) -> None:
    """Settle and give back."""
    for one in moves:
        changes = {
            "spent_nanos": _A.spent_nanos + one.spent,
            "committed_nanos": _A.committed_nanos + one.spent + one.leased,
        }
        if not connection.execute(update(ACCOUNTS).where(_is(ACCOUNTS, one.account)).values(**changes)).rowcount:
            fresh = {"spent_nanos": one.spent, "committed_nanos": one.spent + one.leased}
            connection.execute(insert(ACCOUNTS).values(**_named(one.account), **fresh))
        if one.leased:
            _lease(connection, holder, one.account, one.leased)


def num_holders(connection: Connection, now_ms: int) -> int:
    """Routers that live."""
    asked = select(func.count()).select_from(HOLDERS).where(_H.seen_at_ms > now_ms - LIVE_MS)
    return connection.execute(asked).scalar_one()


def leave(connection: Connection, holder: str) -> None:
    """It is over, and has given back what it had."""
    connection.execute(delete(LEASES).where((_L.holder == holder) & (_L.nanos == 0)))
    connection.execute(delete(HOLDERS).where(_H.holder == holder))


def listed(connection: Connection, now_ms: int, *, periods: Sequence[str]) -> Sequence[RowMapping]:
    """The accounts of these periods: budget, scope, period, spent_nanos, and held_nanos (in leases of routers that
    live) and lost_nanos (of those that died).
    """
    lives = _H.seen_at_ms > now_ms - LIVE_MS
    joined = ACCOUNTS.outerjoin(
        LEASES, (_A.budget == _L.budget) & (_A.scope == _L.scope) & (_A.period == _L.period)
    ).outerjoin(HOLDERS, _L.holder == _H.holder)
    held = func.coalesce(func.sum(case((lives, _L.nanos), else_=0)), 0)
    every = func.coalesce(func.sum(_L.nanos), 0)
    asked = (
        select(
            _A.budget, _A.scope, _A.period, _A.spent_nanos, held.label("held_nanos"), (every - held).label("lost_nanos")
        )
        .select_from(joined)
        .where(_A.period.in_(periods))
        .group_by(_A.budget, _A.scope, _A.period, _A.spent_nanos)
        .order_by(_A.budget, _A.scope, _A.period)
    )
    return connection.execute(asked).mappings().all()


def forget(connection: Connection, now_ms: int, before: str) -> None:
    """Drop accounts whose period was over before the day `before`, and routers that are gone."""
    for table in (LEASES, ACCOUNTS):
        connection.execute(delete(table).where((table.c.period != "") & (table.c.period < before)))
    held = select(_L.holder).where(_L.nanos != 0)
    gone = (_H.seen_at_ms < now_ms - FORGOTTEN_MS) & _H.holder.not_in(held)
    connection.execute(delete(HOLDERS).where(gone))


def _lease(connection: Connection, holder: str, account: Account, nanos: int) -> None:
    mine = _is(LEASES, account) & (_L.holder == holder)
    if not connection.execute(update(LEASES).where(mine).values(nanos=_L.nanos + nanos)).rowcount:
        connection.execute(insert(LEASES).values(**_named(account), holder=holder, nanos=nanos))


def _is(table: Table, account: Account) -> ColumnElement[bool]:
    budget, scope, period = account
    return (table.c.budget == budget) & (table.c.scope == scope) & (table.c.period == period)


def _named(account: Account) -> dict[str, str]:
    return dict(zip(("budget", "scope", "period"), account, strict=True))
