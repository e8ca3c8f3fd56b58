"""Where the fault plan takes hold of the hinge: each function wraps one edge. Used only where there is a plan."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from diptych.protos import kv_pb2 as pb
from diptych.protos.faults import Action, Fault, FaultPlan, Point, injected, mutated

from . import probe
from .channel import Channel
from .messages import Message
from .ring import RingMemory, SlotRef
from .transports.base import RingReader
from .wire import to_pb

Read = Callable[[], Awaitable[pb.KvMsg | None]]
Write = Callable[[pb.KvMsg], Awaitable[None]]
Said = TypeVar("Said")
Copy = Callable[[Sequence[int], int, int, memoryview], None]


class FaultyReader:
    """A transport whose fetches are late, fail or bring other bytes."""

    def __init__(self, reader: RingReader, plan: FaultPlan, peer: str) -> None:
        # A late one must not hold up the transfer thread, so that no fetch is made there.
        self.inline = False
        self._reader = reader
        self._plan = plan
        self._peer = peer

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """See RingReader."""
        fault = self._plan.at(Point.HINGE_FETCH, self._peer, "probe" if ref.key == probe.KEY else "chunk")
        if fault is not None and fault.action is Action.RAISE:
            raise injected(Point.HINGE_FETCH)
        if fault is not None and fault.action is Action.DELAY:
            time.sleep(fault.delay_s)
        self._reader.read(ref, out)
        if fault is not None:
            mutated(out, fault)

    def close(self) -> None:
        """See RingReader."""
        self._reader.close()


def copying(copy: Copy, plan: FaultPlan, point: Point) -> Copy:
    """`copy`, into a slot or out of it, that fails at `point`."""

    def faulty(blocks: Sequence[int], tok_from: int, tok_to: int, data: memoryview) -> None:
        if plan.at(point) is not None:
            raise injected(point)
        copy(blocks, tok_from, tok_to, data)

    return faulty


def publishing(ring: RingMemory, plan: FaultPlan) -> Callable[[SlotRef], None]:
    """`ring.publish` of slots whose bytes change after their checksum was taken."""

    def faulty(ref: SlotRef) -> None:
        fault = plan.at(Point.HINGE_PUBLISH)
        if fault is not None and fault.action is Action.RAISE:
            raise injected(Point.HINGE_PUBLISH)
        if fault is not None:
            with ring.data(ref.slot, ref.size_bytes) as data:
                mutated(data, fault)
        ring.publish(ref)

    return faulty


async def dialing(plan: FaultPlan, peer: str) -> None:
    """What happens before a prefill engine is dialed. May raise TransferError."""
    fault = plan.at(Point.HINGE_DIAL, peer)
    if fault is not None and fault.action is Action.RAISE:
        raise injected(Point.HINGE_DIAL)
    if fault is not None:
        await asyncio.sleep(fault.delay_s)


class FaultyChannel(Channel):
    """A control channel whose messages, either way, get lost, late, doubled or into another order, or break it."""

    def __init__(self, plan: FaultPlan, peer: str, *, src_epoch: int, pair_epoch: int) -> None:
        super().__init__(src_epoch=src_epoch, pair_epoch=pair_epoch)
        self._plan = plan
        self._peer = peer
        self._leaving: _Edge[Message] = _Edge(plan, Point.HINGE_OUT, peer, pass_on=super().send, close=self.close)

    def send(self, message: Message) -> None:
        """See Channel."""
        self._leaving.cross(message, to_pb(message).WhichOneof("msg") or "")

    async def run(self, *, read: Read, write: Write, on_message: Callable[[pb.KvMsg], None]) -> None:
        """See Channel."""
        arriving: _Edge[pb.KvMsg] = _Edge(self._plan, Point.HINGE_IN, self._peer, pass_on=on_message, close=self.close)
        try:
            await super().run(
                read=read, write=write, on_message=lambda msg: arriving.cross(msg, msg.WhichOneof("msg") or "")
            )
        finally:
            arriving.end()
            self._leaving.end()


def make_channel(plan: FaultPlan | None, peer: str, *, src_epoch: int, pair_epoch: int) -> Channel:
    """A channel to `peer`; the common one where there is no plan."""
    if plan is None:
        return Channel(src_epoch=src_epoch, pair_epoch=pair_epoch)
    return FaultyChannel(plan, peer, src_epoch=src_epoch, pair_epoch=pair_epoch)


class _Edge(Generic[Said]):
    """One way of a channel, in the asyncio thread."""

    def __init__(
        self,
        plan: FaultPlan,
        point: Point,
        peer: str,
        *,
        pass_on: Callable[[Said], None],
        close: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._point = point
        self._peer = peer
        self._pass_on = pass_on
        self._close = close
        self._held: Said | None = None  # waits for the next one
        self._ended = False

    def cross(self, said: Said, kind: str) -> None:
        """Pass on what was said, or what the plan makes of it."""
        fault = self._plan.at(self._point, self._peer, kind)
        held, self._held = self._held, None
        if fault is None:
            self._pass_on(said)
        else:
            self._fail(said, fault)
        if held is not None:
            self._pass_on(held)

    def end(self) -> None:
        """The channel is gone, and what waits with it."""
        self._ended = True
        self._held = None

    def _fail(self, said: Said, fault: Fault) -> None:
        loop = asyncio.get_running_loop()
        match fault.action:
            case Action.DELAY:
                loop.call_later(fault.delay_s, self._late, said)
            case Action.DUPLICATE:
                self._pass_on(said)
                self._pass_on(said)
            case Action.REORDER:
                self._held = said
                loop.call_later(fault.delay_s, self._let_go, said)
            case Action.RAISE:
                self._close()
            case _:
                pass  # dropped

    def _let_go(self, said: Said) -> None:
        if self._held is said:
            self._held = None
            self._pass_on(said)

    def _late(self, said: Said) -> None:
        if not self._ended:
            self._pass_on(said)
