"""Where a router does what its fault plan says: placements, dials, orders and cancels. Unused without a plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from diptych.cluster.engine.faults import FaultyLine
from diptych.protos import engine_pb2 as pb
from diptych.protos.errors import EngineLost
from diptych.protos.faults import Action, FaultPlan, Point

_FRAMES = {"submit": Point.SESSION_SUBMIT, "cancel": Point.SESSION_CANCEL}


async def pass_point(plan: FaultPlan, point: Point, peer: str = "") -> None:
    """What can go wrong before a placement or a dial: it takes longer, or raises EngineLost."""
    fault = plan.at(point, peer)
    if fault is not None and fault.action is Action.DELAY:
        await asyncio.sleep(fault.delay_s)
    elif fault is not None:
        raise EngineLost("injected fault")


def faulty_post(plan: FaultPlan, peer: str, post: Callable[[pb.RouterFrame], None]) -> Callable[[pb.RouterFrame], None]:
    """`post` of a session in which orders and cancels get lost, late, doubled or out of order. An order that fails
    raises EngineLost; a cancel never does, it is lost.
    """
    line = FaultyLine(post, lambda seconds, action: asyncio.get_running_loop().call_later(seconds, action))

    def faulty(frame: pb.RouterFrame) -> None:
        point = _FRAMES.get(frame.WhichOneof("frame") or "")
        fault = None if point is None else plan.at(point, peer)
        if fault is None or fault.action is not Action.RAISE:
            line.put(frame, fault)
        elif point is Point.SESSION_SUBMIT:
            raise EngineLost("injected fault")

    return faulty
