"""A call of the manager that is made again, because its reply was lost or beside the first one, has one effect.

Ray makes it again by itself when the manager dies under it. The calls are those of the actor: a new one without a row
fails the first test. Processes are fakes.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.control.testing import World, plan, started
from diptych.protos.types import Role

ACTOR = Path(__file__).resolve().parents[3] / "cluster" / "control" / "manager_actor.py"
TWO = "models.m.decode.engines=2"
READ_ONLY = {"settled", "exchanged", "engines", "wait_change", "members", "news"}


async def apply(world: World) -> None:
    await world.pools.apply(plan(TWO, "models.m.prefill.engines=2"), "me")
    await world.pools.settled()


async def apply_another_layout(world: World) -> None:
    await world.pools.apply(plan(TWO, "models.m.kv.memory_mib=64"), "me")
    await world.pools.exchanged()


async def restart(world: World) -> None:
    """As connect.restart asks: for those that live when it is told to."""
    await world.pools.restart("m", None, UNTIL[id(world)])


UNTIL: dict[int, int] = {}
EFFECTS: dict[str, tuple[Callable[[World], Awaitable[Any]], ...]] = {
    "apply": (apply, apply_another_layout),
    "scale": (
        lambda world: world.pools.scale("m", Role.DECODE, 3),
        lambda world: world.pools.scale("m", Role.DECODE, 1),
        lambda world: world.pools.scale("m", Role.PREFILL, 0),
    ),
    "restart": (restart,),
    "set_role": (lambda world: world.pools.set_role("decode-1", Role.PREFILL),),
    "release": (lambda world: world.pools.release("me", 1.0),),
}


def test_every_call_of_the_actor_has_a_row() -> None:
    (actor,) = (
        node
        for node in ast.walk(ast.parse(ACTOR.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "PoolManagerActor"
    )
    calls = {node.name for node in actor.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name for name in calls if not name.startswith("_")} == READ_ONLY | EFFECTS.keys()


async def begun() -> World:
    world = await started(TWO)
    await world.pools.apply(plan(TWO), "me")
    UNTIL[id(world)] = max(member.epoch for member in world.manager.members())
    return world


def effect(world: World) -> dict[str, Any]:
    """What the call came to: who serves in which role, and how many processes began and ended."""
    members = [member for member in world.manager.members() if member.state.value == "ready"]
    return {
        "serving": sorted("-".join(sorted(member.roles)) for member in members),
        "begun": len(world.made),
        "ended": sum("kill" in process.calls for process in world.made),
        "drained": sum(process.calls.count("drain") for process in world.made),
    }


async def settled(world: World) -> dict[str, Any]:
    """After everything that goes on by itself."""
    before: dict[str, Any] = {}
    for _ in range(50):
        await asyncio.sleep(0)
    while (now := effect(world)) != before:
        before = now
        for _ in range(50):
            await asyncio.sleep(0)
    return before


CASES = [(name, number) for name, ways in EFFECTS.items() for number in range(len(ways))]


@pytest.mark.parametrize("how", ["reply lost", "twice at once", "manager lost"])
@pytest.mark.parametrize(("name", "way"), CASES, ids=str)
async def test_a_call_that_is_made_again_has_one_effect(name: str, way: int, how: str) -> None:
    """That the request itself is lost is the first call of `once`: nothing happened before it."""
    call = EFFECTS[name][way]
    once = await begun()
    untouched = effect(once)
    await call(once)
    expected = await settled(once)
    assert expected != untouched, "a call without an effect proves nothing"

    world = await begun()
    if how == "twice at once":
        await asyncio.gather(call(world), call(world))
    else:
        await call(world)
        if how == "manager lost":
            await settled(world)
            world.begin()
            world.pools.adopt()
            await settled(world)
        await call(world)
    assert await settled(world) == expected


async def test_restart_without_a_bound_means_whoever_lives_now() -> None:
    """What the bound is for: without it the second call replaces the successors."""
    world = await begun()
    before = len(world.made)
    for _ in range(2):
        await world.pools.restart("m", None)
    assert len(world.made) == before + 2 * 3


async def test_reading_changes_nothing() -> None:
    world = await begun()
    kept, was = dict(world.store), effect(world)
    for _ in range(3):
        await world.pools.settled()
        await world.pools.exchanged()
        world.pools.adopt()
        world.manager.engines()
        world.manager.members()
        world.pools.news(0)
    assert (dict(world.store), effect(world)) == (kept, was)
