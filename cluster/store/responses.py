"""Stored responses: their bodies, their input, the events of those that are made in the background, one key.

Called by cluster/api/responses_kept.py with a tenant on every way in. A response that is worked on in the background
has a lease; who finds it expired knows that its router is gone. Who wants it to end asks for that, and whoever works
on it ends it with what there is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    RowMapping,
    String,
    Table,
    Text,
    and_,
    cast,
    delete,
    false,
    func,
    insert,
    literal,
    select,
    update,
)

from .tables import METADATA

UNFINISHED = ("queued", "in_progress")
PURGED_AT_ONCE = 20  # expired rows that one write takes away, each with thousands of events at most
SLACK_S = 86_400  # rows are kept so much longer, and so need not be written again at every turn of a conversation

RESPONSES = Table(
    "responses",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("previous_id", String(64)),
    Column("status", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("in_background", Boolean, nullable=False),
    Column("has_events", Boolean, nullable=False),
    Column("lease_until", BigInteger),
    Column("body", Text, nullable=False),  # JSON, as a client gets it
    Column("input", Text, nullable=False),  # JSON, the items of this response's own request
    Column("num_bytes", BigInteger, nullable=False, server_default="0"),  # of the two, and in the end of its events
    Column("is_to_end", Boolean, nullable=False, server_default=false()),  # whoever works on it is to cancel it
    Index("ix_responses_tenant_status", "tenant", "status"),
    Index("ix_responses_tenant_bytes", "tenant", "num_bytes"),
)
EVENTS = Table(
    "response_events",
    METADATA,
    Column("response_id", String(64), ForeignKey("responses.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("frame", Text, nullable=False),  # as it is sent
)
# One row, made when it is first needed; what routers seal with it outlives them.
SEALS = Table(
    "response_seals",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("key", LargeBinary, nullable=False),
)
Frame = tuple[int, str]


def add(connection: Connection, row: dict[str, Any], chain: Collection[str]) -> None:
    """A row of RESPONSES but `num_bytes`. Those of `chain`, which it goes on from, are kept for as long as it is."""
    num_bytes = sum(len(row[name].encode()) for name in ("body", "input"))
    connection.execute(insert(RESPONSES).values(**row, num_bytes=num_bytes))
    if chain:
        expires_at: int = row["expires_at"]
        older = and_(RESPONSES.c.id.in_(chain), RESPONSES.c.expires_at < expires_at - SLACK_S)
        connection.execute(update(RESPONSES).where(older).values(expires_at=expires_at))


def find(connection: Connection, tenant: str, response_id: str, now: int) -> RowMapping | None:
    """None: never there, another tenant's, deleted or expired."""
    asked = select(RESPONSES).where(RESPONSES.c.id == response_id, _of(tenant, now))
    return connection.execute(asked).mappings().one_or_none()


def state(connection: Connection, tenant: str, response_id: str, now: int) -> tuple[str, int] | None:
    """Status and lease (0: none) of what `find` finds, of which nothing large is read."""
    asked = select(RESPONSES.c.status, RESPONSES.c.lease_until).where(RESPONSES.c.id == response_id, _of(tenant, now))
    row = connection.execute(asked).one_or_none()
    return None if row is None else (row.status, row.lease_until or 0)


def taken(connection: Connection, tenant: str) -> int:
    """Bytes of all the tenant's responses; those that expired count until they are purged."""
    asked = select(func.coalesce(func.sum(RESPONSES.c.num_bytes), 0)).where(RESPONSES.c.tenant == tenant)
    found: int = connection.execute(asked).scalar_one()
    return found


def sizes(connection: Connection, tenant: str, ids: Collection[str], now: int) -> dict[str, int]:
    """`num_bytes` of those of `ids` that are there: their texts are not read for it."""
    asked = select(RESPONSES.c.id, RESPONSES.c.num_bytes).where(RESPONSES.c.id.in_(ids), _of(tenant, now))
    return {row[0]: row[1] for row in connection.execute(asked)}


def contents(connection: Connection, ids: Collection[str]) -> dict[str, tuple[str, str]]:
    """Input and body of each, which the caller has found before."""
    asked = select(RESPONSES.c.id, RESPONSES.c.input, RESPONSES.c.body).where(RESPONSES.c.id.in_(ids))
    return {row.id: (row.input, row.body) for row in connection.execute(asked)}


def chain(connection: Connection, tenant: str, last_id: str, now: int, most: int) -> Sequence[RowMapping]:
    """The response `last_id` and those before it, the oldest first, `most` of them from the end; each as id,
    previous_id, status, size (characters of body and input). Empty where `last_id` is not there.
    """
    line = select(RESPONSES.c.id, RESPONSES.c.previous_id, literal(0).label("back"))
    line = line.where(RESPONSES.c.id == last_id, _of(tenant, now))
    walked = line.cte("line", recursive=True)
    before = select(RESPONSES.c.id, RESPONSES.c.previous_id, walked.c.back + 1)
    before = before.where(RESPONSES.c.id == walked.c.previous_id, _of(tenant, now), walked.c.back < most - 1)
    walked = walked.union_all(before)
    asked = select(RESPONSES.c.id, RESPONSES.c.previous_id, RESPONSES.c.status, _SIZE)
    asked = asked.join(walked, RESPONSES.c.id == walked.c.id).order_by(walked.c.back.desc())
    return connection.execute(asked).mappings().all()


def working(connection: Connection, tenant: str, now: int) -> int:
    """Responses of the tenant that somebody works on in the background."""
    asked = select(func.count()).select_from(RESPONSES)
    asked = asked.where(RESPONSES.c.tenant == tenant, _UNFINISHED, RESPONSES.c.lease_until >= now)
    found: int = connection.execute(asked).scalar_one()
    return found


def go_on(
    connection: Connection,
    response_id: str,
    frames: Sequence[Frame],
    status: str | None = None,
    body: str | None = None,
) -> bool:
    """More events of a response that is unfinished, and what it is now where that changes. False: it is to end, or has
    ended, and then nothing was done.
    """
    is_there = select(RESPONSES.c.is_to_end).where(RESPONSES.c.id == response_id, _UNFINISHED).with_for_update()
    row = connection.execute(is_there).one_or_none()
    if row is None:
        return False
    if frames:
        last = last_sequence(connection, response_id)  # a write may be sent again by one who did not hear of its end
        new = [frame for frame in frames if frame[0] > last]
        rows = [{"response_id": response_id, "sequence": number, "frame": frame} for number, frame in new]
        if rows:
            connection.execute(insert(EVENTS), rows)
    is_over = status is not None and status not in UNFINISHED
    if status is not None:
        ends: dict[str, Any] = {}
        if is_over:
            size = len((body or "").encode()) + _event_bytes(connection, response_id)
            ends = {"lease_until": None, "num_bytes": RESPONSES.c.num_bytes + size}
        changed = update(RESPONSES).where(RESPONSES.c.id == response_id)
        connection.execute(changed.values(status=status, body=body, **ends))
    return is_over or not row.is_to_end


def ask_to_end(connection: Connection, tenant: str, response_id: str, now: int) -> bool:
    """Whoever works on it is to cancel it. False: nobody does."""
    mine = and_(RESPONSES.c.id == response_id, _of(tenant, now), _UNFINISHED, RESPONSES.c.lease_until >= now)
    return connection.execute(update(RESPONSES).where(mine).values(is_to_end=True)).rowcount == 1


def last_sequence(connection: Connection, response_id: str) -> int:
    """Of the last event; -1 where there is none."""
    asked = select(func.max(EVENTS.c.sequence)).where(EVENTS.c.response_id == response_id)
    found: int | None = connection.execute(asked).scalar_one()
    return -1 if found is None else found


def _event_bytes(connection: Connection, response_id: str) -> int:
    is_sqlite = connection.dialect.name == "sqlite"  # which counts the characters of a text
    size = func.length(cast(EVENTS.c.frame, LargeBinary)) if is_sqlite else func.octet_length(EVENTS.c.frame)
    asked = select(func.coalesce(func.sum(size), 0)).where(EVENTS.c.response_id == response_id)
    return int(connection.execute(asked).scalar_one())


def frames(connection: Connection, response_id: str, after: int, most: int) -> list[Frame]:
    """The next events behind the number `after`."""
    asked = select(EVENTS.c.sequence, EVENTS.c.frame).order_by(EVENTS.c.sequence).limit(most)
    asked = asked.where(EVENTS.c.response_id == response_id, EVENTS.c.sequence > after)
    return [(row.sequence, row.frame) for row in connection.execute(asked)]


def renew(connection: Connection, ids: Collection[str], until: int) -> set[str]:
    """Leases of those that are still unfinished; those of them that are to be worked on are told. Writes their rows
    whole, input and all.
    """
    mine = and_(RESPONSES.c.id.in_(ids), _UNFINISHED)
    connection.execute(update(RESPONSES).where(mine).values(lease_until=until))
    return wanted(connection, ids)


def wanted(connection: Connection, ids: Collection[str]) -> set[str]:
    """Those that are to be worked on, nobody having ended or deleted them."""
    asked = select(RESPONSES.c.id).where(RESPONSES.c.id.in_(ids), _UNFINISHED, RESPONSES.c.is_to_end.is_(False))
    return set(connection.execute(asked).scalars())


def remove(connection: Connection, tenant: str, response_id: str, now: int) -> int | None:
    """Its `num_bytes`; None: it was not there."""
    mine = and_(RESPONSES.c.id == response_id, _of(tenant, now))
    size: int | None = connection.execute(select(RESPONSES.c.num_bytes).where(mine)).scalar_one_or_none()
    gone = connection.execute(delete(RESPONSES).where(mine))
    return size if gone.rowcount == 1 else None


def purge(connection: Connection, now: int) -> int:
    """Take away some of what has expired, the oldest first; how many."""
    old = select(RESPONSES.c.id).where(RESPONSES.c.expires_at <= now).order_by(RESPONSES.c.expires_at)
    ids = list(connection.execute(old.limit(PURGED_AT_ONCE)).scalars())
    if ids:
        connection.execute(delete(RESPONSES).where(RESPONSES.c.id.in_(ids)))
    return len(ids)


def seal_key(connection: Connection) -> bytes | None:
    """The key that all routers of the store seal with; None: not made yet."""
    found: bytes | None = connection.execute(select(SEALS.c.key)).scalar_one_or_none()
    return found


def make_seal_key(connection: Connection, key: bytes) -> bytes:
    """`key`, or the one that another router has made before."""
    found = seal_key(connection)
    if found is None:
        connection.execute(insert(SEALS).values(id=1, key=key))
    return found or key


def _of(tenant: str, now: int) -> ColumnElement[bool]:
    return and_(RESPONSES.c.tenant == tenant, RESPONSES.c.expires_at > now)


_SIZE = (func.length(RESPONSES.c.body) + func.length(RESPONSES.c.input)).label("size")
_UNFINISHED: ColumnElement[bool] = RESPONSES.c.status.in_(UNFINISHED)
