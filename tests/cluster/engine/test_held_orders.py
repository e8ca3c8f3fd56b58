"""Orders that wait in a session until their guides are made: each ends once, whatever happens meanwhile, and leaves
nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from diptych.cluster.engine import session as session_module
from diptych.cluster.engine.inbox import CancelRequest, Inbox
from diptych.cluster.engine.outbox import Outbox
from diptych.cluster.engine.session import EngineSessions
from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.constraint import Constraint, Guide
from diptych.protos.errors import InvalidRequest
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.testing import FakeGuide
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    GenerateRequest,
    PrefillOrder,
    Role,
    SamplingParams,
    TransferKey,
)

ROLES = sorted(Role)
ME = EngineRef(EngineId("engine-0"), 7, "unix:/e")


def key(n: int) -> TransferKey:
    return TransferKey(n.to_bytes(16, "big"))


def a_guide() -> FakeGuide:
    return FakeGuide(3, lambda known: ((), ()))


class HeldGuides:
    """Guides that are there, or fail, when the test says so."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Guide]] = []

    async def open(self, request: GenerateRequest) -> Guide:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


class Engine:
    """EngineSessions with one session, whose frames the test sends and reads itself, between two steps of the loop."""

    def __init__(self) -> None:
        self.inbox = Inbox(max_orders=4)
        self.guides = HeldGuides()
        self.abandoned: list[tuple[TransferKey, str]] = []
        self.sessions = EngineSessions(
            info=EngineInfo(
                ref=ME,
                roles=frozenset(Role),
                model="m",
                pid=1,
                host="h",
                block_tokens=16,
                num_blocks=9,
                max_context_tokens=99,
                dtype="x",
            ),
            inbox=self.inbox,
            outbox=Outbox(8),
            reading=EngineStatus,
            abandon=lambda key, error: self.abandoned.append((key, error.code)),
            guides=self.guides,  # type: ignore[arg-type]
            clock=lambda: 50.0,
        )
        writer = asyncio.current_task()
        assert writer is not None
        self.session = session_module._Session("r", writer)
        self.sessions._sessions.add(self.session)

    def submit(self, handle: int, n: int, *, role: Role = Role.DECODE, guided: bool = True, left_s: float = 9) -> None:
        request = GenerateRequest(
            key=key(n),
            prompt=(1, 2, 3),
            sampling=SamplingParams(max_tokens=5),
            deadline=left_s,
            constraint=Constraint(grammar="g") if guided else None,
        )
        order: PrefillOrder | DecodeOrder = DecodeOrder(request=request, prefill=None)
        if role is Role.PREFILL:
            order = PrefillOrder(request=request, decode=ME)
        self.sessions._submit(self.session, codec.submit_to_pb(handle, order, 0.0))

    def cancel(self, n: int) -> None:
        self.sessions._cancel(self.session, pb.Cancel(transfer_id=key(n).transfer_id))

    async def settle(self) -> None:
        """All that can happen now has happened."""
        for _ in range(20):
            await asyncio.sleep(0)

    def ends(self) -> Iterator[tuple[int, str]]:
        """Handles, and how they ended."""
        while self.session.frames:
            for one in self.session.frames.popleft().tokens.finishes:
                yield one.handle, one.error.code or one.reason

    def is_clean(self) -> bool:
        return not (self.sessions.num_requests or self.sessions._held or self.session.handles)


async def test_an_order_waits_for_its_guide_and_then_comes_with_it() -> None:
    engine = Engine()
    engine.submit(1, 1)
    engine.submit(2, 1)  # the key is in work though no worker has it
    engine.submit(1, 1)
    await engine.settle()
    assert list(engine.ends()) == [(2, "invalid_request")]
    assert engine.sessions.duplicates == 1
    assert engine.inbox.take_all(0.0) == []
    assert len(engine.guides.asked) == 1
    engine.guides.asked[0].set_result(guide := a_guide())
    await engine.settle()
    [order] = engine.inbox.take_all(0.0)
    assert isinstance(order, DecodeOrder)
    assert order.guide is guide
    engine.cancel(1)
    assert engine.inbox.take_all(0.0) == [CancelRequest(Role.DECODE, key(1))]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("moment", ["at once", "while it is made", "when it is made"])
async def test_an_order_that_is_cancelled_while_it_waits_ends_once(role: Role, moment: str) -> None:
    """A task that is cancelled before its first step runs nothing: route and key stayed for ever, and no end came."""
    engine = Engine()
    engine.submit(1, 1, role=role)
    if moment != "at once":
        await engine.settle()
    if moment == "when it is made":
        engine.guides.asked[0].set_result(a_guide())
    engine.cancel(1)
    assert engine.is_clean()
    assert list(engine.ends()) == [(1, "cancelled")]
    assert engine.abandoned == ([(key(1), "cancelled")] if role is Role.PREFILL else [])
    # The key is free at once, and what is left of the first order does not touch the second.
    engine.submit(2, 1, role=role)
    await engine.settle()
    assert list(engine.ends()) == []
    engine.guides.asked[-1].set_result(guide := a_guide())
    await engine.settle()
    [order] = engine.inbox.take_all(0.0)
    assert isinstance(order, DecodeOrder | PrefillOrder)
    assert order.guide is guide
    assert not engine.sessions._held


class Panic(BaseException):
    """As a library's Rust side raises it: no Exception."""


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (InvalidRequest("too odd"), "invalid_request"),
        (ValueError("unforeseen"), "engine_fault"),
        (Panic("index out of bounds"), "engine_fault"),
        (asyncio.CancelledError(), "shutting_down"),
    ],
)
async def test_whatever_keeps_a_guide_from_being_made_ends_its_order(failure: BaseException, code: str) -> None:
    engine = Engine()
    engine.submit(1, 1, role=Role.PREFILL)
    await engine.settle()
    engine.guides.asked[0].set_exception(failure)
    await engine.settle()
    assert list(engine.ends()) == [(1, code)]
    assert engine.abandoned == [(key(1), code)]
    assert engine.is_clean()


async def test_a_deadline_passes_though_the_guide_is_not_there() -> None:
    """A backend may take a minute to start, and no worker has the order yet."""
    engine = Engine()
    engine.submit(1, 1, left_s=1e-6)
    async with asyncio.timeout(20):
        await asyncio.gather(*engine.sessions._held.values())
    assert list(engine.ends()) == [(1, "deadline_exceeded")]
    assert engine.guides.asked[0].cancelled()
    assert engine.is_clean()


async def test_an_order_is_given_away_with_its_role_and_ends_with_its_session() -> None:
    engine = Engine()
    engine.submit(1, 1, role=Role.PREFILL)
    engine.submit(2, 2, role=Role.PREFILL)
    engine.submit(3, 3)
    engine.submit(4, 4)
    await engine.sessions.give_away(Role.PREFILL)
    await engine.settle()
    assert list(engine.ends()) == [(1, "shutting_down"), (2, "shutting_down")]
    assert engine.sessions.num_requests == 2
    engine.sessions._forget(engine.session)
    await engine.settle()
    assert engine.is_clean()
    assert engine.inbox.take_all(0.0) == []
    assert list(engine.ends()) == [], "nobody reads that session any more"


async def test_an_order_that_waits_when_the_engine_goes_is_for_others_to_go_on_with() -> None:
    """Not cancelled: nobody has done that."""
    engine = Engine()
    engine.submit(1, 1, role=Role.PREFILL)
    await engine.settle()
    await engine.sessions.close()
    assert engine.abandoned == [(key(1), "shutting_down")]
    assert list(engine.ends()) == [(1, "shutting_down")]
    assert engine.is_clean()


async def test_an_inbox_that_is_full_when_the_guide_is_there_ends_the_order() -> None:
    engine = Engine()
    engine.submit(1, 1, role=Role.PREFILL)
    await engine.settle()
    for n in range(2, 6):
        engine.submit(n, n, guided=False)
    engine.guides.asked[0].set_result(a_guide())
    await engine.settle()
    assert list(engine.ends()) == [(1, "overloaded")]
    assert engine.abandoned == [(key(1), "overloaded")]
    assert len(engine.inbox.take_all(0.0)) == 4
    engine.submit(1, 1, role=Role.PREFILL)  # a copy of it begins nothing
    await engine.settle()
    assert len(engine.guides.asked) == 1
