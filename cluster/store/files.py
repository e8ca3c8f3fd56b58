"""Files that tenants uploaded and that batches wrote: their rows. Their contents lie in contents.py.

Called by cluster/api/files.py and cluster/batches. A file that has expired is gone for everybody, swept or not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
)

from diptych.protos.openai_files import Paging, QuotaExceeded, StoredFile, unknown_file

from .tables import METADATA

FILES = Table(
    "files",
    METADATA,
    Column("number", Integer, primary_key=True),  # the order of lists: ids are random
    Column("id", String(64), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("name", String(255), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("content", String(64), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, index=True),
    UniqueConstraint("id"),
    Index("ix_files_tenant", "tenant", "number"),
)
_SHOWN = (
    FILES.c.id,
    FILES.c.purpose,
    FILES.c.name,
    FILES.c.num_bytes,
    FILES.c.created_at,
    FILES.c.expires_at,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """A file and where its contents are."""

    file: StoredFile
    tenant: str
    content: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant's files may take."""

    most_bytes: int
    most_files: int


def add(connection: Connection, kept: KeptFile, quota: Quota | None = None) -> None:
    """Raises QuotaExceeded; without `quota` there is always room."""
    file = kept.file
    if quota is not None:
        check_quota(connection, kept.tenant, quota, file.num_bytes)
    connection.execute(
        insert(FILES).values(
            id=file.id,
            tenant=kept.tenant,
            purpose=file.purpose,
            name=file.name,
            num_bytes=file.num_bytes,
            sha256=kept.sha256,
            content=kept.content,
            created_at=file.created_at,
            expires_at=file.expires_at,
        )
    )


def check_quota(connection: Connection, tenant: str, quota: Quota, more_bytes: int) -> None:
    """Raises QuotaExceeded where one more file of `more_bytes` does not fit."""
    asked = select(func.count(), func.coalesce(func.sum(FILES.c.num_bytes), 0)).where(FILES.c.tenant == tenant)
    number, taken = connection.execute(asked).one()
    if number >= quota.most_files:
        raise QuotaExceeded(f"there are {number} files, the most that may be kept; delete some")
    if taken + more_bytes > quota.most_bytes:
        raise QuotaExceeded(
            f"the files take {taken} bytes, this one {more_bytes} more, and {quota.most_bytes} may be kept; delete some"
        )


def find(
    connection: Connection, file_id: str, tenant: str, *, now: int, param: str = "file_id", to_write: bool = False
) -> KeptFile:
    """The tenant's file; with `to_write` it stays until the transaction ends. Raises UnknownFile."""
    asked = select(*_SHOWN, FILES.c.content, FILES.c.sha256).where(_is_there(file_id, tenant, now))
    row = connection.execute(asked.with_for_update() if to_write else asked).one_or_none()
    if row is None:
        raise unknown_file(file_id, param)
    return KeptFile(file=_file(row), tenant=tenant, content=row.content, sha256=row.sha256)


def listed(connection: Connection, tenant: str, paging: Paging, *, now: int) -> tuple[list[StoredFile], bool]:
    """A page of the tenant's files in the order of their making, and whether there are more. Raises UnknownFile for an
    `after` that is no file.
    """
    place = FILES.c.number
    asked = select(*_SHOWN).where(FILES.c.tenant == tenant, _lives(now))
    if paging.purpose is not None:
        asked = asked.where(FILES.c.purpose == paging.purpose)
    if paging.after is not None:
        begin = connection.execute(select(place).where(_is_there(paging.after, tenant, now))).scalar_one_or_none()
        if begin is None:
            raise unknown_file(paging.after, "after")
        asked = asked.where(place > begin if paging.is_ascending else place < begin)
    asked = asked.order_by(place if paging.is_ascending else place.desc()).limit(paging.limit + 1)
    rows = connection.execute(asked).all()
    return [_file(row) for row in rows[: paging.limit]], len(rows) > paging.limit


def remove(connection: Connection, file_id: str, tenant: str, *, now: int) -> str:
    """The name of the contents, which may be needed yet by a batch. Raises UnknownFile."""
    kept = find(connection, file_id, tenant, now=now, to_write=True)
    connection.execute(delete(FILES).where(FILES.c.id == file_id))
    return kept.content


def remove_expired(connection: Connection, *, now: int, most: int) -> list[str]:
    """The names of the contents of at most `most` files whose time is over."""
    rows = connection.execute(
        select(FILES.c.number, FILES.c.content).where(FILES.c.expires_at <= now).order_by(FILES.c.number).limit(most)
    ).all()
    connection.execute(delete(FILES).where(FILES.c.number.in_([row.number for row in rows])))
    return [row.content for row in rows]


def named(connection: Connection, contents: Collection[str]) -> set[str]:
    """Those of these contents that belong to files."""
    return set(connection.execute(select(FILES.c.content).where(FILES.c.content.in_(contents))).scalars())


def totals(connection: Connection) -> tuple[int, int]:
    """Number and bytes of all files."""
    number, size = connection.execute(select(func.count(), func.coalesce(func.sum(FILES.c.num_bytes), 0))).one()
    return number, size


def _lives(now: int) -> ColumnElement[bool]:
    return or_(FILES.c.expires_at.is_(None), FILES.c.expires_at > now)


def _is_there(file_id: str, tenant: str, now: int) -> ColumnElement[bool]:
    return and_(FILES.c.id == file_id, FILES.c.tenant == tenant, _lives(now))


def _file(row: Any) -> StoredFile:
    return StoredFile(
        id=row.id,
        purpose=row.purpose,
        name=row.name,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
