"""What a fault plan does between a router and its engines changes no token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diptych.cluster.config import RouterSettings
from diptych.cluster.router.rig import D, Rig, until, wanted
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.protos.faults import Action, FaultPlan, FaultRule, FaultSettings, Point


@pytest.mark.parametrize(
    ("point", "action"),
    [
        *[(Point.SESSION_SUBMIT, a) for a in (Action.DELAY, Action.REORDER, Action.RAISE)],
        *[(Point.SESSION_CANCEL, a) for a in (Action.DROP, Action.DUPLICATE, Action.RAISE)],
        *[(point, a) for point in (Point.SESSION_OPEN, Point.ROUTER_PLACE) for a in (Action.DELAY, Action.RAISE)],
    ],
)
async def test_a_fault_on_the_way_to_an_engine_costs_no_token(tmp_path: Path, point: Point, action: Action) -> None:
    rule = FaultRule(point=point, action=action, nth=(1, 3), delay_s=0.02)
    plan = FaultPlan(FaultSettings(rules=(rule,)), me="router")
    engines = [EchoEngine(f"unix:{tmp_path}/{name}", engine_id=name, roles=D, step_s=0.001) for name in ("d0", "d1")]
    for engine in engines:
        await engine.start()
    directory = StaticDirectory([engine.info for engine in engines])
    router = Router(directory=directory, settings=RouterSettings(connect_timeout_s=2), faults=plan)
    await router.start()
    rig = Rig(router, directory, {engine.info.ref.engine_id: engine for engine in engines})
    await until(lambda: rig.ready() == 2)
    answers = await asyncio.gather(*(rig.ask(6) for _ in range(4)), return_exceptions=True)
    whole = [one for one in answers if not isinstance(one, BaseException)]
    assert len(whole) >= (2 if point is Point.ROUTER_PLACE and action is Action.RAISE else 4)
    assert all(tokens == wanted(6) for tokens, _ in whole)
    if point is not Point.SESSION_CANCEL:
        assert plan.counts[f"{point}/{action}"] >= 1
    await router.stop()
    for engine in engines:
        await engine.stop()
