"""What the store keeps of responses: for how long, in which order, for whom; and the key that it seals with.

Guards against a conversation that is forgotten while it is gone on with, rows that are never taken away, and two
routers that seal with two keys.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import func, select

from diptych.cluster.api import responses_kept
from diptych.cluster.api.responses_kept import MEASURED_S, KeptResponses, UnknownPrevious, UnknownResponse
from diptych.cluster.api.responses_seal import Seal
from diptych.cluster.config import ResponsesSettings
from diptych.cluster.store import responses as table
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import temporary_store
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_files import QuotaExceeded

DAY = 86_400


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with temporary_store() as store:
        yield store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(store: Store, clock: Clock) -> KeptResponses:
    return KeptResponses(store, ResponsesSettings(keep_days=30), clock)


def name_of(number: int) -> str:
    return f"resp_{number:024x}"


async def keep(kept: KeptResponses, number: int, previous: int | None = None, tenant: str = "a") -> None:
    body: dict[str, Any] = {"id": name_of(number), "status": "completed", "created_at": number}
    body["previous_response_id"] = None if previous is None else name_of(previous)
    body["output"] = [{"id": f"out{number}"}]
    chain = () if previous is None else (await kept.before(tenant, name_of(previous))).chain
    await kept.keep(tenant, body, [{"id": f"in{number}"}], chain)


async def rows(store: Store, of: Any) -> int:
    return int(await store.read(lambda c: c.execute(select(func.count()).select_from(of)).scalar_one()))


async def test_a_chain_is_read_in_its_order(kept: KeptResponses) -> None:
    for number in range(5):
        await keep(kept, number, number - 1 if number else None)
    before = await kept.before("a", name_of(4))
    assert before.chain == tuple(name_of(number) for number in range(5))
    assert [item["id"] for item in before.items] == [f"{side}{n}" for n in range(5) for side in ("in", "out")]


async def test_what_is_gone_on_with_is_kept(kept: KeptResponses, clock: Clock) -> None:
    await keep(kept, 0)
    await keep(kept, 9)
    clock.now += 20 * DAY
    await keep(kept, 1, 0)
    clock.now += 20 * DAY
    assert (await kept.before("a", name_of(1))).chain == (name_of(0), name_of(1))
    with pytest.raises(UnknownResponse):
        await kept.find("a", name_of(9))
    clock.now += 20 * DAY
    with pytest.raises(UnknownPrevious, match="30 days"):
        await kept.before("a", name_of(1))


async def test_what_has_expired_is_taken_away(kept: KeptResponses, store: Store, clock: Clock) -> None:
    for number in range(table.PURGED_AT_ONCE + 5):
        await keep(kept, number)
    clock.now += 31 * DAY
    await keep(kept, 1000)
    assert await rows(store, table.RESPONSES) == 6
    await keep(kept, 1001)
    assert await rows(store, table.RESPONSES) == 2


async def test_events_go_with_their_response(kept: KeptResponses, store: Store) -> None:
    body = {"id": name_of(1), "status": "queued", "created_at": 1, "previous_response_id": None, "output": []}
    await kept.open("a", body, [], (), [{"type": "response.created", "sequence_number": 0, "response": body}])
    assert await rows(store, table.EVENTS) == 1
    with pytest.raises(UnknownResponse):
        await kept.remove("b", name_of(1))
    await kept.remove("a", name_of(1))
    assert (await rows(store, table.EVENTS), await rows(store, table.RESPONSES)) == (0, 0)
    with pytest.raises(UnknownResponse):
        await kept.remove("a", name_of(1))


async def test_a_tenant_has_room_for_so_many_bytes(store: Store, clock: Clock) -> None:
    """Guards against one tenant's responses that fill the disk of all. What is deleted makes room at once, what ends
    elsewhere counts soon, and the events of a background response count, too.
    """
    kept, other = (KeptResponses(store, ResponsesSettings(tenant_bytes=1000), clock) for _ in range(2))
    for number in range(5):
        await kept.check_room("a")
        await keep(kept, number)
    while (await store.read(lambda c: table.taken(c, "a"))) < 1000:
        number += 1
        await keep(kept, number)
    with pytest.raises(QuotaExceeded, match=r"take 1\d{3} bytes, and 1000 may be kept: delete some") as refusal:
        await kept.check_room("a")
    assert (refusal.value.http_status, refusal.value.param) == (403, "store")
    await kept.check_room("b")
    with pytest.raises(QuotaExceeded):
        await other.check_room("a")
    for gone in (number, number - 1):
        await kept.remove("a", name_of(gone))
    await kept.check_room("a")
    clock.now += MEASURED_S
    await other.check_room("a")
    body = {"id": name_of(200), "status": "queued", "created_at": 1, "previous_response_id": None, "output": []}
    await kept.open("a", body, [], (), [])
    await kept.check_room("a")
    before = await store.read(lambda c: table.taken(c, "a"))
    await kept.go_on(name_of(200), [(number, "\u00e9" * 50) for number in range(10)], "completed", body)
    size = len(json.dumps(body, separators=(",", ":")))
    assert await store.read(lambda c: table.taken(c, "a")) == before + size + 1000
    await kept.check_room("a")
    clock.now += MEASURED_S
    with pytest.raises(QuotaExceeded):
        await kept.check_room("a")


async def test_what_tenants_take_is_remembered_of_so_many(kept: KeptResponses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys a client may name a new tenant with each request."""
    monkeypatch.setattr(responses_kept, "MAX_MEASURED", 10)
    for number in range(30):
        await kept.check_room(f"tenant {number}")
    assert len(kept._taken) == 10


async def test_a_write_that_is_sent_again_adds_no_event_twice(kept: KeptResponses) -> None:
    body = {"id": name_of(1), "status": "queued", "created_at": 1, "previous_response_id": None, "output": []}
    await kept.open("a", body, [], (), [{"type": "response.created", "sequence_number": 0, "response": body}])
    assert await kept.go_on(name_of(1), [(1, "a"), (2, "b")])
    assert await kept.go_on(name_of(1), [(1, "a"), (2, "b"), (3, "c")], "completed", body)
    assert await kept.frames(name_of(1), 0, 10) == [(1, "a"), (2, "b"), (3, "c")]
    assert await kept.frames(name_of(1), 1, 1) == [(2, "b")]


async def test_no_chain_crosses_tenants(kept: KeptResponses) -> None:
    await keep(kept, 0, tenant="b")
    body = {"id": name_of(1), "status": "completed", "created_at": 1, "previous_response_id": name_of(0), "output": []}
    await kept.keep("a", body, [], ())
    with pytest.raises(InvalidRequest, match="deleted or expired"):
        await kept.before("a", name_of(1))


async def test_all_routers_seal_with_one_key(store: Store) -> None:
    several = [KeptResponses(store, ResponsesSettings()) for _ in range(8)]
    seals = await asyncio.gather(*(one.seal("a") for one in several))
    sealed = seals[0].close("hm \u00e9")
    assert {seal.open(sealed) for seal in seals} == {"hm \u00e9"}
    assert (await several[0].seal("b")).open(sealed) is None
    assert await rows(store, table.SEALS) == 1


def test_a_seal_opens_nothing_but_its_own() -> None:
    seal, sealed = Seal(b"k" * 32, "a"), Seal(b"k" * 32, "a").close("text")
    assert seal.open(sealed) == "text"
    assert sealed != seal.close("text")
    assert Seal(b"j" * 32, "a").open(sealed) is None
    for wrong in ("", "AQ==", sealed[:-1], sealed + "A", sealed[:20], "AA" + sealed[2:], "\u00e9" * 9, "!" * 40):
        assert seal.open(wrong) is None
