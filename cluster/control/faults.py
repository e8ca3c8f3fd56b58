"""Where the manager and those that ask it do what a fault plan says. Unused without a plan."""

from __future__ import annotations

import asyncio

from diptych.protos.faults import Action, FaultPlan, Point, injected


async def pass_point(plan: FaultPlan, point: Point, *, peer: str = "", message: str = "") -> None:
    """What can go wrong at a moment of a coroutine: it takes longer, or raises `injected(point)`."""
    fault = plan.at(point, peer, message)
    if fault is not None and fault.action is Action.DELAY:
        await asyncio.sleep(fault.delay_s)
    elif fault is not None:
        raise injected(point)
