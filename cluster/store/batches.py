"""Batches and their lines: who works on which, what is answered, what is left.

Called by cluster/api/batches.py and cluster/batches. A line is pending until one answer of it is committed; every later
one is refused here, whoever brings it. A lease tells which router works on a batch; it decides nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    func,
    insert,
    select,
    update,
)

from diptych.protos.errors import RateLimited
from diptych.protos.openai_batches import (
    CANCELLED,
    CANCELLING,
    ENDED,
    EXPIRED,
    FAILED,
    FINALIZING,
    IN_PROGRESS,
    LIVE,
    UNANSWERED,
    VALIDATING,
    Batch,
    BatchOver,
    BatchRequest,
    Usage,
    unknown_batch,
)
from diptych.protos.openai_files import BATCH, Paging
from diptych.protos.wire_checks import JsonObject, compact
from diptych.protos.wire_checks import refuse as wrong

from . import files
from .files import KeptFile
from .tables import METADATA

PENDING: Final = "pending"
DONE: Final = "done"  # its answer goes to the output file; one that FAILED to the error file
_TIMES: Final = (
    "created_at",
    "expires_at",
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
_COUNTS: Final = ("total", "completed", "failed")
_TOKENS: Final = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")

BATCHES = Table(
    "batches",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("id", String(64), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("key_id", String(128), nullable=False, server_default=""),  # of the key that made it; empty: there was none
    Column("key_tags", String(1024), nullable=False, server_default=""),  # that key's then, with spaces between
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("content", String(64), nullable=False, index=True),  # the file may be deleted while the batch reads it
    Column("sha256", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("labels", Text),
    Column("output_expires_s", Integer),
    Column("status", String(16), nullable=False, index=True),
    Column("model", String(256)),
    Column("errors", Text),
    *(Column(name, BigInteger, nullable=name not in ("created_at", "expires_at")) for name in _TIMES),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    *(Column(name, Integer, nullable=False) for name in _COUNTS),
    *(Column(name, BigInteger, nullable=False) for name in _TOKENS),
    Column("owner", String(64)),
    Column("lease_until_ms", BigInteger, nullable=False),  # since 1970
    UniqueConstraint("id"),
    Index("ix_batches_tenant", "tenant", "number"),
)
LINES = Table(
    "batch_lines",
    METADATA,
    Column("batch", Integer, ForeignKey("batches.number"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),  # of the input file, from 1
    Column("custom_id", String(512), nullable=False),
    Column("position", BigInteger, nullable=False),  # of its first byte in the input file
    Column("num_bytes", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("begun", Integer, nullable=False),  # times that a router took it up
    Column("answer", LargeBinary),  # the line of the result's file
)


@dataclass(frozen=True, slots=True)
class Maker:
    """Who made a batch: its tenant, and the id and the tags of the key that asked, where one did."""

    tenant: str
    key_id: str = ""
    key_tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A batch as who works on it sees it."""

    number: int
    maker: Maker
    content: str
    sha256: str
    output_expires_s: int | None
    batch: Batch


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a batch that is to be answered."""

    line: int
    custom_id: str
    position: int
    num_bytes: int
    begun: int  # times before this one


class FreeBatch(NamedTuple):
    """A batch that a router may take. `is_ending`: cancelled, or its window is over."""

    number: int
    tenant: str
    is_ending: bool


def add(
    connection: Connection,
    batch_id: str,
    request: BatchRequest,
    maker: Maker,
    *,
    most_live: int,
    most_bytes: int,
    now: int,
) -> Batch:
    """A new batch, to be validated. Raises UnknownFile, InvalidRequest for a file that is no input, RateLimited."""
    tenant = maker.tenant
    kept = files.find(connection, request.input_file_id, tenant, now=now, param="input_file_id", to_write=True)
    _check_input(kept, most_bytes)
    living = select(func.count()).where(BATCHES.c.tenant == tenant, BATCHES.c.status.in_(LIVE))
    if (number := connection.execute(living).scalar_one()) >= most_live:
        raise RateLimited(f"{number} batches are unfinished, the most that may be; wait for one, or cancel it", 60.0)
    fields: dict[str, Any] = dict.fromkeys((*_COUNTS, *_TOKENS), 0)
    fields |= {
        "id": batch_id,
        "tenant": tenant,
        "key_id": maker.key_id,
        "key_tags": " ".join(maker.key_tags),
        "endpoint": request.endpoint,
        "input_file_id": request.input_file_id,
        "content": kept.content,
        "sha256": kept.sha256,
        "completion_window": request.window,
        "labels": None if request.labels is None else compact(dict(request.labels)),
        "output_expires_s": request.output_expires_s,
        "status": VALIDATING,
        "created_at": now,
        "expires_at": now + request.window_s,
        "lease_until_ms": 0,
    }
    connection.execute(insert(BATCHES).values(**fields))
    return find(connection, batch_id, tenant)


def _check_input(kept: KeptFile, most_bytes: int) -> None:
    if kept.file.purpose != BATCH:
        raise wrong("input_file_id", f"names a file of purpose {kept.file.purpose}; upload it with purpose {BATCH}")
    if kept.file.num_bytes > most_bytes:
        raise wrong("input_file_id", f"names a file of {kept.file.num_bytes} bytes; the limit is {most_bytes}")


def find(connection: Connection, batch_id: str, tenant: str) -> Batch:
    """The tenant's batch. Raises UnknownBatch."""
    return _batch(_row(connection, batch_id, tenant))


def listed(connection: Connection, tenant: str, paging: Paging) -> tuple[list[Batch], bool]:
    """A page of the tenant's batches, the newest first, and whether there are more. Raises UnknownBatch for an `after`
    that is none.
    """
    asked = select(BATCHES).where(BATCHES.c.tenant == tenant)
    if paging.after is not None:
        asked = asked.where(BATCHES.c.number < _row(connection, paging.after, tenant).number)
    rows = connection.execute(asked.order_by(BATCHES.c.number.desc()).limit(paging.limit + 1)).all()
    return [_batch(row) for row in rows[: paging.limit]], len(rows) > paging.limit


def cancel(connection: Connection, batch_id: str, tenant: str, *, now: int) -> Batch:
    """The batch from then on: one that has answered all and writes its files goes on to its end. Raises UnknownBatch,
    BatchOver.
    """
    row = _row(connection, batch_id, tenant)
    if row.status in ENDED and row.status != CANCELLED:
        raise BatchOver(f"the batch is {row.status} and can be cancelled no more", "batch_id")
    if row.status in (VALIDATING, IN_PROGRESS):
        values = {"status": CANCELLING, "cancelling_at": now}
        connection.execute(update(BATCHES).where(BATCHES.c.number == row.number).values(**values))
    return find(connection, batch_id, tenant)


def reads(connection: Connection, contents: Collection[str]) -> set[str]:
    """Those of these contents that unfinished batches read."""
    asked = select(BATCHES.c.content).where(BATCHES.c.content.in_(contents), BATCHES.c.status.in_(LIVE))
    return set(connection.execute(asked).scalars())


# -- leases


def free(connection: Connection, *, now_ms: int, most: int) -> list[FreeBatch]:
    """Unfinished batches that nobody works on: the `most` oldest, each tenant's oldest, and those that are to end."""
    number, table = BATCHES.c.number, BATCHES.c
    are_free = table.status.in_(LIVE) & (table.lease_until_ms < now_ms)
    is_ending = (table.status == CANCELLING) | (table.expires_at <= now_ms // 1000)
    asked = select(number, table.tenant, is_ending).where(are_free).order_by(number).limit(most)
    firsts = select(func.min(number)).where(are_free).group_by(table.tenant)
    found = {
        FreeBatch(row[0], row[1], bool(row[2]))
        for part in (asked, asked.where(is_ending), asked.where(number.in_(firsts)))
        for row in connection.execute(part)
    }
    return sorted(found)


def claim(connection: Connection, number: int, owner: str, *, now_ms: int, until_ms: int) -> tuple[Job, bool] | None:
    """Take a batch that is free, and whether its last owner fell silent with it; None: another was faster."""
    row = connection.execute(select(BATCHES).where(BATCHES.c.number == number).with_for_update()).one_or_none()
    if row is None or row.status not in LIVE or row.lease_until_ms >= now_ms:
        return None
    connection.execute(update(BATCHES).where(BATCHES.c.number == number).values(owner=owner, lease_until_ms=until_ms))
    job = Job(
        number=number,
        maker=Maker(row.tenant, row.key_id, tuple(row.key_tags.split())),
        content=row.content,
        sha256=row.sha256,
        output_expires_s=row.output_expires_s,
        batch=_batch(row),
    )
    return job, row.owner is not None


def renew(connection: Connection, owner: str, numbers: Collection[int], *, until_ms: int) -> dict[int, str]:
    """Those of these batches that are still the owner's, with their states."""
    mine = (BATCHES.c.owner == owner) & BATCHES.c.number.in_(numbers) & BATCHES.c.status.in_(LIVE)
    connection.execute(update(BATCHES).where(mine).values(lease_until_ms=until_ms))
    rows = connection.execute(select(BATCHES.c.number, BATCHES.c.status).where(mine))
    return {row.number: row.status for row in rows}


def release(connection: Connection, number: int, owner: str, *, until_ms: int = 0) -> None:
    """Let others have it, from `until_ms` on."""
    mine = (BATCHES.c.number == number) & (BATCHES.c.owner == owner)
    connection.execute(update(BATCHES).where(mine).values(owner=None, lease_until_ms=until_ms))


# -- work


def forget_lines(connection: Connection, number: int, *, most: int, owner: str | None = None) -> bool:
    """Delete at most `most` lines of a batch; whether any are left. With `owner` none where the batch is another's: its
    lines may be in work by now.
    """
    if owner is not None and not _is_owned(connection, number, owner):
        return False
    last = select(LINES.c.line).where(LINES.c.batch == number).order_by(LINES.c.line).limit(1).offset(most - 1)
    bound = connection.execute(last).scalar_one_or_none()
    mine = LINES.c.batch == number
    connection.execute(delete(LINES).where(mine if bound is None else mine & (LINES.c.line <= bound)))
    return bound is not None


def add_lines(connection: Connection, number: int, owner: str, *, lines: Sequence[Line]) -> bool:
    """Pending ones. False: the batch is not the owner's."""
    if not _is_owned(connection, number, owner):
        return False
    rows = [
        {
            "batch": number,
            "line": line.line,
            "custom_id": line.custom_id,
            "position": line.position,
            "num_bytes": line.num_bytes,
            "state": PENDING,
            "begun": 0,
        }
        for line in lines
    ]
    connection.execute(insert(LINES), rows)
    return True


def begin(connection: Connection, number: int, owner: str, *, total: int, model: str | None, now: int) -> bool:
    """The input is right: from validating to in progress. False: the batch is not the owner's, or was cancelled."""
    return _move(
        connection, number, owner, (VALIDATING,), status=IN_PROGRESS, total=total, model=model, in_progress_at=now
    )


def refuse(connection: Connection, number: int, owner: str, errors: Sequence[JsonObject], *, now: int) -> bool:
    """The input is wrong. False: as in `begin`."""
    told = json.dumps(list(errors))
    return _move(connection, number, owner, LIVE, status=FAILED, errors=told, failed_at=now, owner=None)


def take(connection: Connection, number: int, owner: str, *, after: int, most: int) -> list[Line]:
    """The next pending lines behind `after`; each counts as begun once more. None where it is another's."""
    if not _is_owned(connection, number, owner):
        return []
    pending = (LINES.c.batch == number) & (LINES.c.state == PENDING) & (LINES.c.line > after)
    rows = connection.execute(select(LINES).where(pending).order_by(LINES.c.line).limit(most)).all()
    if rows:
        connection.execute(
            update(LINES).where(pending & (LINES.c.line <= rows[-1].line)).values(begun=LINES.c.begun + 1)
        )
    return [Line(row.line, row.custom_id, row.position, row.num_bytes, row.begun) for row in rows]


def settle(connection: Connection, number: int, line: int, answer: bytes, usage: Usage, *, is_done: bool) -> bool:
    """Keep the one answer of a line. False: it has one already, or the batch is over; nothing changes then."""
    pending = (LINES.c.batch == number) & (LINES.c.line == line) & (LINES.c.state == PENDING)
    kept = connection.execute(update(LINES).where(pending).values(state=DONE if is_done else FAILED, answer=answer))
    if kept.rowcount != 1:
        return False
    table = BATCHES.c
    counts: dict[Any, Any] = {table.completed: table.completed + 1} if is_done else {table.failed: table.failed + 1}
    counts |= {table[name]: table[name] + getattr(usage, name) for name in _TOKENS}
    connection.execute(update(BATCHES).where(table.number == number).values(counts))
    return True


def stop(connection: Connection, number: int, owner: str, *, is_expired: bool, now: int) -> None:
    """What is pending stays unanswered: the window is over, or the batch was cancelled."""
    if not _is_owned(connection, number, owner):
        return
    pending = (LINES.c.batch == number) & (LINES.c.state == PENDING)
    state = EXPIRED if is_expired else CANCELLED
    left = connection.execute(update(LINES).where(pending).values(state=state)).rowcount
    table = BATCHES.c
    values: dict[Any, Any] = {table.failed: table.failed + left}
    if is_expired:
        values |= {table.expired_at: func.coalesce(table.expired_at, now)}
    connection.execute(update(BATCHES).where(table.number == number).values(values))


def finalize(connection: Connection, number: int, owner: str, *, now: int) -> str | None:
    """Everything is answered or stopped: the results are written next. How the batch will end; None: it is not the
    owner's, or lines are pending. Called again it tells the same, unless the batch was cancelled in between.
    """
    row = connection.execute(select(BATCHES).where(BATCHES.c.number == number).with_for_update()).one_or_none()
    if row is None or row.owner != owner or row.status in ENDED:
        return None
    left = select(LINES.c.line).where(LINES.c.batch == number, LINES.c.state == PENDING).limit(1)
    if connection.execute(left).first() is not None:
        return None
    if row.status == CANCELLING:
        return CANCELLED
    values = {"status": FINALIZING, "finalizing_at": row.finalizing_at or now}
    connection.execute(update(BATCHES).where(BATCHES.c.number == number).values(**values))
    return EXPIRED if row.expired_at is not None else "completed"


def results(
    connection: Connection, number: int, *, after: int, most: int, most_bytes: int
) -> list[tuple[int, str, str, bytes]]:
    """Line, custom_id, state and answer of the next lines, in their order; those without an answer have b"". Fewer
    where their answers have `most_bytes` together, but one.
    """
    asked = select(LINES).where(LINES.c.batch == number, LINES.c.line > after, LINES.c.state != PENDING)
    found: list[tuple[int, str, str, bytes]] = []
    size = 0
    with connection.execute(asked.order_by(LINES.c.line).limit(most)) as rows:
        for row in rows:
            found.append((row.line, row.custom_id, row.state, row.answer or b""))
            size += len(found[-1][3])
            if size >= most_bytes:
                break
    return found


def finish(
    connection: Connection,
    number: int,
    owner: str,
    status: str,
    *,
    output: KeptFile | None,
    error: KeptFile | None,
    now: int,
) -> bool:
    """The results' files are there and the batch has ended. False: it is not the owner's any more; nothing changes."""
    done = _move(
        connection,
        number,
        owner,
        (FINALIZING, CANCELLING),
        status=status,
        output_file_id=None if output is None else output.file.id,
        error_file_id=None if error is None else error.file.id,
        owner=None,
        **{f"{status}_at": now},
    )
    for kept in (output, error) if done else ():
        if kept is not None:
            files.add(connection, kept)
    return done


# -- what is over


def ended_with_lines(connection: Connection, *, most: int) -> list[int]:
    """Ended batches whose lines are still there."""
    asked = select(BATCHES.c.number).where(BATCHES.c.status.in_(ENDED))
    lines = select(LINES.c.batch).where(LINES.c.batch == BATCHES.c.number).exists()
    return list(connection.execute(asked.where(lines).limit(most)).scalars())


def forget_old(connection: Connection, *, before: int, most: int) -> int:
    """Delete batches that were made before then, have ended, and have no lines; how many."""
    lines = select(LINES.c.batch).where(LINES.c.batch == BATCHES.c.number).exists()
    old = select(BATCHES.c.number).where(BATCHES.c.status.in_(ENDED), BATCHES.c.created_at < before, ~lines)
    numbers = list(connection.execute(old.limit(most)).scalars())
    connection.execute(delete(BATCHES).where(BATCHES.c.number.in_(numbers)))
    return len(numbers)


def by_state(connection: Connection) -> Mapping[str, int]:
    """How many batches are in each state."""
    rows = connection.execute(select(BATCHES.c.status, func.count()).group_by(BATCHES.c.status)).all()
    return dict.fromkeys((*LIVE, *ENDED), 0) | {row[0]: row[1] for row in rows}


def unanswered(state: str) -> tuple[str, str]:
    """Code and sentence for a line that was left in this state."""
    return UNANSWERED[state]


def _is_owned(connection: Connection, number: int, owner: str) -> bool:
    asked = select(BATCHES.c.owner).where(BATCHES.c.number == number, BATCHES.c.status.in_(LIVE)).with_for_update()
    return bool(connection.execute(asked).scalar_one_or_none() == owner)


def _move(connection: Connection, number: int, owner_now: str, states: Collection[str], **values: object) -> bool:
    mine = (BATCHES.c.number == number) & (BATCHES.c.owner == owner_now) & BATCHES.c.status.in_(states)
    return connection.execute(update(BATCHES).where(mine).values(**values)).rowcount == 1


def _row(connection: Connection, batch_id: str, tenant: str) -> Row[Any]:
    row = connection.execute(select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.tenant == tenant)).one_or_none()
    if row is None:
        raise unknown_batch(batch_id)
    return row


def _batch(row: Row[Any]) -> Batch:
    plain = ("id", "endpoint", "input_file_id", "status", "model", "output_file_id", "error_file_id")
    fields = {name: getattr(row, name) for name in (*plain, *_TIMES, *_COUNTS, *_TOKENS)}
    return Batch(
        **fields,
        window=row.completion_window,
        labels=None if row.labels is None else json.loads(row.labels),
        errors=None if row.errors is None else json.loads(row.errors),
    )
