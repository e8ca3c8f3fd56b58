"""Where a router does what its fault plan says: dialling engines, orders and cancels. Unused without a plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from diptych.cluster.engine.faults import FaultyLine
from diptych.protos import engine_pb2 as pb
from diptych.protos.faults import Action, FaultPlan, Point, injected

_FRAMES = {"submit": Point.SESSION_SUBMIT, "cancel": Point.SESSION_CANCEL}


async def opening(plan: FaultPlan, peer: str) -> None:
    """What happens before an engine is dialled. May raise EngineLost."""
    fault = plan.at(Point.SESSION_OPEN, peer)
    if fault is not None and fault.action is Action.DELAY:
        await asyncio.sleep(fault.delay_s)
    elif fault is not None:
        raise injected(Point.SESSION_OPEN)


def faulty_post(plan: FaultPlan, peer: str, post: Callable[[pb.RouterFrame], None]) -> Callable[[pb.RouterFrame], None]:
    """`post` of a session in which orders and cancels get lost, late, doubled or out of order."""
    line = FaultyLine(post, lambda seconds, action: asyncio.get_running_loop().call_later(seconds, action))

    def faulty(frame: pb.RouterFrame) -> None:
        point = _FRAMES.get(frame.WhichOneof("frame") or "")
        line.put(frame, None if point is None else plan.at(point, peer))

    return faulty
