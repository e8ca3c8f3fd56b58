"""Which requests with a key of their client's are in work or answered, so that a retry does no work twice.

Called by cluster/api/idempotency.py. A request in work has a holder, the router that works on it, and a lease that the
holder prolongs; of a router that died it runs out. Knows no HTTP but an answer's status, headers and bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)

from .tables import METADATA

IDEMPOTENCY = Table(
    "idempotency",
    METADATA,
    Column("tenant", String(128), primary_key=True),
    Column("key_sha256", String(64), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("holder", String(64), nullable=False, index=True),
    Column("run", String(32), nullable=False),
    Column("lease_until_ms", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("status", Integer),  # of the answer; null while there is none
    Column("headers", Text),
    Column("body", LargeBinary),  # null: it was too large to be kept
)
_T = IDEMPOTENCY.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One try of a request to be worked on. Times in milliseconds since 1970, the lease's in milliseconds."""

    tenant: str
    key_sha256: str
    request_sha256: str
    holder: str
    run: str
    now_ms: int
    lease_ms: int
    kept_s: int


@dataclass(frozen=True, slots=True)
class Mine:
    """The claim holds: do the work, then `finish` or `release`. `is_again`: a router died over it."""

    is_again: bool = False


@dataclass(frozen=True, slots=True)
class InWork:
    """Another run works on it; in so many milliseconds its lease is prolonged or has run out."""

    left_ms: int


@dataclass(frozen=True, slots=True)
class OtherRequest:
    """The key was used for a request with other bytes."""


@dataclass(frozen=True, slots=True)
class Answered:
    """There is an answer; `body` None: it was too large to be kept."""

    status: int
    headers: str
    body: bytes | None


def claim(connection: Connection, mine: Claim) -> Mine | InWork | OtherRequest | Answered:
    """Begin the work on a request, unless it is in work or answered. Raises IntegrityError where another process began
    it in this moment.
    """
    same = (_T.tenant == mine.tenant) & (_T.key_sha256 == mine.key_sha256)
    connection.execute(delete(IDEMPOTENCY).where(same & (_T.expires_at <= mine.now_ms // 1000)))
    row = connection.execute(select(IDEMPOTENCY).where(same)).mappings().first()
    held = {
        "holder": mine.holder,
        "run": mine.run,
        "lease_until_ms": mine.now_ms + mine.lease_ms,
        "expires_at": mine.now_ms // 1000 + mine.kept_s,
    }
    if row is None:
        named = {"tenant": mine.tenant, "key_sha256": mine.key_sha256, "request_sha256": mine.request_sha256}
        connection.execute(insert(IDEMPOTENCY).values(**named, **held))
        return Mine()
    if row["request_sha256"] != mine.request_sha256:
        return OtherRequest()
    if row["status"] is not None:
        return Answered(row["status"], row["headers"], row["body"])
    if row["lease_until_ms"] > mine.now_ms:
        return InWork(row["lease_until_ms"] - mine.now_ms)
    taken = connection.execute(update(IDEMPOTENCY).where(same & (_T.run == row["run"])).values(**held))
    return Mine(is_again=True) if taken.rowcount else InWork(mine.lease_ms)


def prolong(connection: Connection, holder: str, runs: Collection[str], until_ms: int) -> None:
    """These runs of `holder` are in work until then, those of them that still hold their request."""
    mine = (_T.holder == holder) & _T.run.in_(runs) & _T.status.is_(None)
    connection.execute(update(IDEMPOTENCY).where(mine).values(lease_until_ms=until_ms))


def finish(connection: Connection, mine: Claim, answer: Answered, expires_at: int) -> bool:
    """The answer, for `claim` to give until `expires_at` (Unix seconds). False: another run has taken the request
    over, whose answer counts.
    """
    values = {
        "status": answer.status,
        "headers": answer.headers,
        "body": answer.body,
        "expires_at": expires_at,
        "holder": "",
    }
    return bool(connection.execute(update(IDEMPOTENCY).where(_of(mine)).values(**values)).rowcount)


def release(connection: Connection, mine: Claim) -> None:
    """There is no answer: the next one with the key begins anew."""
    connection.execute(delete(IDEMPOTENCY).where(_of(mine) & _T.status.is_(None)))


def forget_expired(connection: Connection, now: int, *, most: int) -> int:
    """Drop at most `most` records that are too old at `now` (Unix seconds); how many there were."""
    asked = select(_T.tenant, _T.key_sha256).where(_T.expires_at <= now).order_by(_T.expires_at).limit(most)
    old = connection.execute(asked).all()
    for row in old:
        same = (_T.tenant == row.tenant) & (_T.key_sha256 == row.key_sha256)
        connection.execute(delete(IDEMPOTENCY).where(same & (_T.expires_at <= now)))  # another may have begun it anew
    return len(old)


def _of(mine: Claim) -> ColumnElement[bool]:
    return (_T.tenant == mine.tenant) & (_T.key_sha256 == mine.key_sha256) & (_T.run == mine.run)
