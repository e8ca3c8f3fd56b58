"""What requests used and cost, added up by hour, tenant, key, route and target.

Written by cluster/gateway/stored_books.py, read by cluster/usage.py. Money is nano-dollars, an hour its first second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    RowMapping,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from .tables import METADATA

SPEND = Table(
    "spend",
    METADATA,
    Column("hour", BigInteger, primary_key=True),
    Column("tenant", String(128), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("route", String(256), primary_key=True),
    Column("target", String(384), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cache_read_tokens", BigInteger, nullable=False),
    Column("cache_write_tokens", BigInteger, nullable=False),
    Column("cost_nanos", BigInteger, nullable=False),
    Column("unpriced", BigInteger, nullable=False),  # exchanges whose cost nobody knows
    Column("estimated", BigInteger, nullable=False),  # exchanges whose tokens nobody told
)
KEYS: Final = ("hour", "tenant", "key_id", "route", "target")
SUMS: Final = tuple(column.name for column in SPEND.columns if column.name not in KEYS)
HOUR_S: Final = 3600
DAY_S: Final = 86_400
By = Literal["tenant", "key", "route", "target", "day"]
_S = SPEND.c


def add(connection: Connection, rows: Iterable[Mapping[str, object]]) -> None:
    """To what is there; each row has all columns. Raises IntegrityError where another process made a row just now."""
    for row in rows:
        mine = _of(row)
        more = {name: _S[name] + row[name] for name in SUMS}
        if not connection.execute(update(SPEND).where(mine).values(**more)).rowcount:
            connection.execute(insert(SPEND).values(**row))


def summed(
    connection: Connection, by: By, *, since: int, until: int, tenant: str | None = None, key: str | None = None
) -> Sequence[RowMapping]:
    """SUMS from `since` until before `until`, rounded to hours, for each of `by` (column `name`; of days their first
    second); the dearest first, days in order.
    """
    name: ColumnElement[object]
    if by == "day":
        name = (_S.hour - _S.hour % DAY_S).label("name")
    else:
        name = _S["key_id" if by == "key" else by].label("name")
    asked = select(name, *(func.sum(_S[column]).label(column) for column in SUMS)).where(
        (_S.hour >= since - since % HOUR_S) & (_S.hour < until)
    )
    if tenant is not None:
        asked = asked.where(_S.tenant == tenant)
    if key is not None:
        asked = asked.where(_S.key_id == key)
    order = [name] if by == "day" else [func.sum(_S.cost_nanos).desc(), func.sum(_S.input_tokens).desc(), name]
    return connection.execute(asked.group_by(name).order_by(*order)).mappings().all()


def forget(connection: Connection, before: int) -> int:
    """Drop what is older (seconds since 1970); how many rows."""
    return connection.execute(delete(SPEND).where(_S.hour < before)).rowcount


def _of(row: Mapping[str, object]) -> ColumnElement[bool]:
    found = _S.hour == row["hour"]
    for name in KEYS[1:]:
        found = found & (_S[name] == row[name])
    return found
