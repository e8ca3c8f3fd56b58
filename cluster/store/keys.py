"""API keys in the store: their rows, and which of them changed since a router looked.

Called by cluster/keys.py and the verb `diptych keys`. A row is never deleted: a revoked key stays known as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Integer,
    RowMapping,
    String,
    Table,
    UniqueConstraint,
    insert,
    select,
    update,
)

from .tables import METADATA

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("scopes", String(256), nullable=False),  # words with a space between them
    Column("created_at", BigInteger, nullable=False),  # seconds since 1970, as all times here
    Column("expires_at", BigInteger),
    Column("requests_per_minute", Integer),
    Column("concurrency", Integer),
    Column("disabled", Boolean, nullable=False),
    Column("may_override", String(64), nullable=False, server_default=""),  # words likewise
    Column("tags", String(1024), nullable=False, server_default=""),
    Column("changed", BigInteger, nullable=False, index=True),
    UniqueConstraint("sha256"),
)
# One row. Counted up before a key is written, so that writers stand in line and no number is seen before its key.
CHANGES = Table(
    "key_changes",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("number", BigInteger, nullable=False),
)


def add(connection: Connection, row: dict[str, object]) -> None:
    """A row of KEYS without `changed`. Raises IntegrityError for an id or a hash that is there."""
    connection.execute(insert(KEYS).values(**row, changed=_next_number(connection)))


def disable(connection: Connection, key_id: str) -> bool:
    """From now on it opens nothing; False: there is no such key. Again is no mistake."""
    number = _next_number(connection)
    done = connection.execute(update(KEYS).where(KEYS.c.id == key_id).values(disabled=True, changed=number))
    return done.rowcount == 1


def changed_since(connection: Connection, number: int) -> tuple[int, Sequence[RowMapping]]:
    """The number to ask with next time, and the rows that changed after `number`; 0: all of them."""
    latest: int = connection.execute(select(CHANGES.c.number)).scalar_one()
    if latest == number:
        return number, ()
    return latest, connection.execute(select(KEYS).where(KEYS.c.changed > number)).mappings().all()


def listed(connection: Connection, tenant: str | None = None) -> Sequence[RowMapping]:
    """Oldest first; of one tenant, or of all."""
    asked = select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)
    if tenant is not None:
        asked = asked.where(KEYS.c.tenant == tenant)
    return connection.execute(asked).mappings().all()


def _next_number(connection: Connection) -> int:
    connection.execute(update(CHANGES).values(number=CHANGES.c.number + 1))
    number: int = connection.execute(select(CHANGES.c.number)).scalar_one()
    return number
