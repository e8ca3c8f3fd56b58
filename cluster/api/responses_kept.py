"""Responses in the store: what goes on from them, what is looked up, what becomes of those whose router is gone.

Called by responses.py, responses_background.py and responses_pages.py. Another tenant's response is as unknown as one
that never was; ids are checked before they are looked for.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping
from sqlalchemy.exc import IntegrityError

from diptych.cluster.config import ResponsesSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.cluster.store import responses as table
from diptych.cluster.store.database import Store
from diptych.protos.errors import DiptychError, InvalidRequest, RateLimited
from diptych.protos.openai_files import QuotaExceeded
from diptych.protos.openai_replies import JsonObject
from diptych.protos.responses_items import MAX_ITEMS, RESPONSE_ID, response_of
from diptych.protos.responses_replies import UNFINISHED, Event, Status, ended
from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import compact_in_pieces

from .responses_seal import KEY_BYTES, Seal

MAX_CHAIN: Final = 1024  # responses that one goes on from
MAX_READ_CHARS: Final = 16 << 20  # JSON of stored responses that one request may go on from
PURGE_EVERY_S: Final = 60.0
BUSY_RETRY_S: Final = 5.0
# What a tenant's responses take is asked of the store so often, which looks at all of them; beyond a share of what they
# may take, where others' and deleted ones decide, more often.
MEASURED_S: Final = 30.0
MEASURED_NEAR_S: Final = 2.0
NEAR: Final = 0.9
MAX_MEASURED: Final = 4096  # tenants of which it is remembered
PREVIOUS: Final = "previous_response_id"


class UnknownResponse(InvalidRequest):
    """The tenant has no such response."""

    code = "response_not_found"
    http_status = 404


class UnknownPrevious(UnknownResponse):
    """Or none to go on from."""

    code = "previous_response_not_found"


class ResponseLost(DiptychError):
    """The router that worked on a background response is gone."""

    code = "response_lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A stored response. `text`, `input_text`: JSON, read where what they hold is needed."""

    id: str
    status: str
    text: str
    input_text: str
    in_background: bool
    has_events: bool
    lease_until: int  # of one in work

    @property
    def is_over(self) -> bool:
        """Whether nothing changes any more."""
        return self.status not in UNFINISHED

    @property
    def body(self) -> JsonObject:
        """As clients get it; read anew at each look."""
        found: JsonObject = json.loads(self.text)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What a response goes on from: `chain`, the ids of the responses before it, and all their items."""

    chain: tuple[str, ...] = ()
    items: tuple[JsonObject, ...] = ()


@dataclass(slots=True)
class _Taken:
    """Bytes that a tenant's responses took at a time, with what was kept and deleted here since then."""

    num_bytes: int
    at: float


class KeptResponses:
    """All tenants'. `clock` in Unix seconds; `metrics` count the background responses that end here."""

    def __init__(
        self,
        store: Store,
        settings: ResponsesSettings,
        clock: Callable[[], float] = time.time,
        *,
        metrics: RouterMetrics | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._metrics = metrics or RouterMetrics()
        self._key: bytes | None = None
        self._purged_at = 0.0
        self._taken: OrderedDict[str, _Taken] = OrderedDict()

    async def check_room(self, tenant: str) -> None:
        """Before a response is worked on: raises QuotaExceeded where the tenant's take all that they may. Those in work
        then end as they like.
        """
        taken, now, most = self._taken.get(tenant), self._clock(), self._settings.tenant_bytes
        if taken is not None:
            valid_s = MEASURED_S if taken.num_bytes < NEAR * most else MEASURED_NEAR_S
            taken = taken if 0 <= now - taken.at < valid_s else None
        if taken is None:
            found = await self._store.read(lambda c: table.taken(c, tenant))
            taken = self._taken[tenant] = _Taken(found, now)
            self._taken.move_to_end(tenant)
            if len(self._taken) > MAX_MEASURED:
                self._taken.popitem(last=False)
        if taken.num_bytes >= most:
            raise QuotaExceeded(
                f"the stored responses take {taken.num_bytes} bytes, and {most} may be kept: delete some, or send "
                "store: false",
                "store",
            )

    def _takes(self, tenant: str, row: Mapping[str, Any]) -> None:
        if (taken := self._taken.get(tenant)) is not None:
            taken.num_bytes += len(row["body"]) + len(row["input"])  # about: it is measured soon

    async def seal(self, tenant: str) -> Seal:
        """For the tenant's reasoning."""
        if self._key is None:
            self._key = await self._store.read(table.seal_key)
        if self._key is None:
            fresh = os.urandom(KEY_BYTES)
            try:
                self._key = await self._store.write(lambda c: table.make_seal_key(c, fresh))
            except IntegrityError:  # another router has just made it
                self._key = await self._store.read(table.seal_key)
        assert self._key is not None
        return Seal(self._key, tenant)

    async def before(self, tenant: str, last_id: str) -> Before:
        """Of the response that `previous_response_id` names. Raises UnknownPrevious, InvalidRequest."""
        found: Before | str = "missing"
        if RESPONSE_ID.fullmatch(last_id):
            now = self._now()
            found = await self._store.read(lambda c: _before(c, tenant, last_id, now))
        if isinstance(found, Before):
            return found
        if found == "missing":
            raise UnknownPrevious(self._unknown(last_id, PREVIOUS), PREVIOUS)
        if found in UNFINISHED:
            found = (await self.find(tenant, last_id)).status  # which ends it where its router is gone
        raise InvalidRequest(f"{PREVIOUS}: {last_id} {_WHY_NOT.get(found, found)}", PREVIOUS)

    async def items(self, tenant: str, ids: Collection[str]) -> Mapping[str, JsonObject]:
        """Those of `ids` that items of the tenant's responses have, with the items. Raises InvalidRequest where they
        stand in too many.
        """
        wanted = {response for item in ids if (response := response_of(item)) is not None}
        if not wanted:
            return {}
        now = self._now()

        def job(connection: Connection) -> dict[str, JsonObject] | None:
            found: dict[str, JsonObject] = {}
            there = table.sizes(connection, tenant, wanted, now)
            if sum(there.values()) > MAX_READ_CHARS:
                return None
            for given, body in table.contents(connection, there).values():
                items = json.loads(given) + json.loads(body)["output"]
                found |= {item["id"]: item for item in items if item["id"] in ids}
            return found

        found = await self._store.read(job)
        if found is None:
            raise InvalidRequest(
                "input: its item_references reach into too many large responses: send the items", "input"
            )
        return found

    async def find(self, tenant: str, response_id: str) -> Kept:
        """Raises UnknownResponse. One whose router is gone has failed."""
        kept = await self._read(tenant, response_id)
        if not kept.is_over and kept.lease_until < self._now():
            lost = ResponseLost("the router that worked on this response ended before it was done: send it again")
            await self.end(tenant, response_id, "failed", lost, only_lost=True)
            kept = await self._read(tenant, response_id)
        return kept

    async def is_over(self, tenant: str, response_id: str) -> bool:
        """Whether it has ended, as `find` tells it; to be asked often. Raises UnknownResponse."""
        found: tuple[str, int] | None = None
        if RESPONSE_ID.fullmatch(response_id):
            now = self._now()
            found = await self._store.read(lambda c: table.state(c, tenant, response_id, now))
        if found is None:
            raise UnknownResponse(self._unknown(response_id, "response_id"), "response_id")
        status, lease_until = found
        if status not in UNFINISHED:
            return True
        return lease_until < self._now() and (await self.find(tenant, response_id)).is_over

    async def _read(self, tenant: str, response_id: str) -> Kept:
        kept: Kept | None = None
        if RESPONSE_ID.fullmatch(response_id):
            now = self._now()
            kept = await self._store.read(lambda c: _kept(table.find(c, tenant, response_id, now)))
        if kept is None:
            raise UnknownResponse(self._unknown(response_id, "response_id"), "response_id")
        return kept

    async def keep(self, tenant: str, body: JsonObject, items: Sequence[JsonObject], chain: Collection[str]) -> None:
        """A response that is over."""
        row = await asyncio.to_thread(self._as_row, tenant, body, items)
        await self._store.write(lambda c: self._add(c, row, chain))
        self._takes(tenant, row)

    async def open(
        self,
        tenant: str,
        body: JsonObject,
        items: Sequence[JsonObject],
        chain: Collection[str],
        events: Sequence[Event],
    ) -> None:
        """A response that is worked on in the background from now on; `events` are its first, none where nobody is to
        be told of them. Raises RateLimited when the tenant has too many.
        """
        now, most = self._now(), self._settings.max_background
        row = await asyncio.to_thread(self._as_row, tenant, body, items)
        row |= {"in_background": True, "has_events": bool(events), "lease_until": self._lease()}
        frames = [(event["sequence_number"], frame_of(event)) for event in events]

        def job(connection: Connection) -> int:
            busy = table.working(connection, tenant, now)
            if busy < most:
                self._add(connection, row, chain)
                table.go_on(connection, body["id"], frames)
            return busy

        if (busy := await self._store.write(job)) >= most:
            told = f"{busy} background responses are in work, as many as a tenant may have: wait for one, or cancel it"
            raise RateLimited(told, BUSY_RETRY_S)
        self._takes(tenant, row)

    async def go_on(
        self,
        response_id: str,
        frames: Sequence[table.Frame],
        status: Status | None = None,
        body: JsonObject | None = None,
    ) -> bool:
        """More events, and what the response is now. False: somebody has ended or deleted it, or wants it to end."""
        text = None if body is None else await asyncio.to_thread(_dumped, body)
        goes_on = await self._store.write(lambda c: table.go_on(c, response_id, frames, status, text))
        if goes_on and status is not None and status not in UNFINISHED:
            self._count(status)
        return goes_on

    async def ask_to_end(self, tenant: str, response_id: str) -> bool:
        """Whoever works on it is to cancel it, and keep what there is. False: nobody works on it."""
        now = self._now()
        return await self._store.write(lambda c: table.ask_to_end(c, tenant, response_id, now))

    async def end(
        self,
        tenant: str,
        response_id: str,
        status: Status,
        error: DiptychError | None = None,
        *,
        only_lost: bool = False,
    ) -> None:
        """End an unfinished one, with an event where those are told; nothing happens to others. `only_lost`: those
        alone that nobody works on any more.
        """
        now = self._now()

        def job(connection: Connection) -> bool:
            row = table.find(connection, tenant, response_id, now)
            if row is None or row["status"] not in UNFINISHED or (only_lost and row["lease_until"] >= now):
                return False
            body = ended(json.loads(row["body"]), status, error)
            frames = []
            if row["has_events"]:
                number = table.last_sequence(connection, response_id) + 1
                told = {"type": f"response.{status}", "sequence_number": number, "response": body}
                frames = [(number, frame_of(told))]
            return table.go_on(connection, response_id, frames, status, _dumped(body))

        if await self._store.write(job):
            self._count(status)

    async def renew(self, ids: Collection[str]) -> set[str]:
        """The leases of those that have not ended; those of them that are still to be worked on are told."""
        until = self._lease()
        return await self._store.write(lambda c: table.renew(c, ids, until))

    async def wanted(self, ids: Collection[str]) -> set[str]:
        """As `renew` without renewing."""
        return await self._store.read(lambda c: table.wanted(c, ids))

    async def frames(self, response_id: str, after: int, most: int) -> list[table.Frame]:
        """The next stored events behind the number `after`."""
        return await self._store.read(lambda c: table.frames(c, response_id, after, most))

    async def remove(self, tenant: str, response_id: str) -> None:
        """Raises UnknownResponse."""
        await self._read(tenant, response_id)
        now = self._now()
        size = await self._store.write(lambda c: table.remove(c, tenant, response_id, now))
        if size is None:
            raise UnknownResponse(self._unknown(response_id, "response_id"), "response_id")
        if (taken := self._taken.get(tenant)) is not None:
            taken.num_bytes -= size

    def _count(self, status: Status) -> None:
        self._metrics.counters["background_responses"].labels(status).inc()

    def _add(self, connection: Connection, row: dict[str, Any], chain: Collection[str]) -> None:
        table.add(connection, row, chain)
        if self._clock() - self._purged_at > PURGE_EVERY_S and not table.purge(connection, self._now()):
            self._purged_at = self._clock()

    def _as_row(self, tenant: str, body: JsonObject, items: Sequence[JsonObject]) -> dict[str, Any]:
        return {
            "id": body["id"],
            "tenant": tenant,
            "previous_id": body[PREVIOUS],
            "status": body["status"],
            "created_at": body["created_at"],
            "expires_at": self._now() + self._settings.keep_days * 86_400 + table.SLACK_S,
            "in_background": False,
            "has_events": False,
            "lease_until": None,
            "body": _dumped(body),
            "input": _dumped(items),
        }

    def _unknown(self, response_id: str, field: str) -> str:
        days = self._settings.keep_days
        return f"{field}: there is no response {printable(response_id, 40)}; responses are kept for {days} days"

    def _lease(self) -> int:
        return self._now() + max(round(self._settings.lease_s), 1)

    def _now(self) -> int:
        return int(self._clock())


# What keeps a response from being gone on from, by its status or by what `_before` finds.
_WHY_NOT = {
    "queued": "is still in work: wait until it is done",
    "in_progress": "is still in work: wait until it is done",
    "failed": "has failed: go on from the response before it",
    "cancelled": "has been cancelled: go on from the response before it",
    "items": f"makes a conversation of more than {MAX_ITEMS} items: begin anew with what is still needed",
    "chain": f"goes on from more than {MAX_CHAIN} responses: begin anew with what is still needed",
    "large": f"goes on from more than {MAX_READ_CHARS >> 20} MiB of JSON: begin anew with what is still needed",
    "broken": "goes on from a response that is deleted or expired: send the conversation itself",
}


def _before(connection: Connection, tenant: str, last_id: str, now: int) -> Before | str:
    """A key of _WHY_NOT, or `missing`, where there is nothing to go on from."""
    rows = table.chain(connection, tenant, last_id, now, MAX_CHAIN)
    if not rows:
        return "missing"
    status: str = rows[-1]["status"]
    if status not in ("completed", "incomplete"):
        return status
    if rows[0]["previous_id"] is not None:
        return "chain" if len(rows) >= MAX_CHAIN else "broken"
    if sum(row["size"] for row in rows) > MAX_READ_CHARS:
        return "large"
    chain = tuple(row["id"] for row in rows)
    contents = table.contents(connection, chain)
    items: list[JsonObject] = []
    for name in chain:
        given, body = contents[name]
        items += json.loads(given)
        items += json.loads(body)["output"]
    return Before(chain=chain, items=tuple(items)) if len(items) <= MAX_ITEMS else "items"


def _kept(row: RowMapping | None) -> Kept | None:
    if row is None:
        return None
    return Kept(
        id=row["id"],
        status=row["status"],
        text=row["body"],
        input_text=row["input"],
        in_background=row["in_background"],
        has_events=row["has_events"],
        lease_until=row["lease_until"] or 0,
    )


def frame_of(event: Event) -> str:
    """An event as it is sent."""
    return f"event: {event['type']}\ndata: {compact_in_pieces(event)}\n\n"


def _dumped(value: object) -> str:
    """In a thread where it may be large."""
    return compact_in_pieces(value)
