"""Silence is no death: what engines that were only slow to speak cost, and who says that one is dead."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diptych.cluster.config import RouterSettings
from diptych.cluster.router.incident import Incident
from diptych.cluster.router.rig import D, Rig, call, rig, until, wanted
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.protos.errors import DeadlineExceeded, EngineLost
from diptych.protos.types import EngineId, EngineRef

COUNT = 12


async def stand(r: Rig, name: str) -> None:
    """The engine is stopped until the router has given it up, and goes on."""
    faults, before = r.engines[name].faults, len(r.router.losses)
    faults.is_stopped = True
    await until(lambda: len(r.router.losses) > before)
    faults.is_stopped = False
    await until(lambda: r.ready() == len(r.engines))


async def test_more_silences_than_a_request_may_move_cost_it_no_token(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, step_s=0.02, silence_s=0.4, migration_limit=2) as r:
        engine = r.engines["d"]
        asking = asyncio.create_task(r.ask(200))
        for number in range(1, 5):
            await until(lambda number=number: len(engine.orders) == number and engine.open_orders > 0)  # type: ignore[misc]
            await asyncio.sleep(0.05)
            await stand(r, "d")
        tokens, finish = await asking
        assert tokens == wanted(200)
        assert finish.migrations + finish.attempts - 1 == 4
        assert {loss.cause for loss in r.router.losses} == {"silent"}


async def test_silences_before_the_first_token_use_up_no_attempts_either(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, silence_s=0.4, max_attempts=2) as r:
        engine = r.engines["d"]
        engine.faults.silent = True
        asking = asyncio.create_task(r.ask(COUNT))
        for number in (1, 2, 3):
            await until(lambda number=number: len(engine.orders) == number)  # type: ignore[misc]
            engine.faults.silent = number < 3
            await stand(r, "d")
        tokens, finish = await asking
        assert tokens == wanted(COUNT)
        assert finish.attempts == 4
        assert r.metric("diptych_quarantined_total") == 0


async def test_a_life_ends_once_however_often_it_was_silent_before(tmp_path: Path) -> None:
    """Its death made three failures of the two silences before it."""
    async with rig(tmp_path, {"d": D}, step_s=0.02, silence_s=0.4, migration_limit=2) as r:
        engine = r.engines["d"]
        asking = asyncio.create_task(r.ask(200))
        for number in (1, 2):
            await until(lambda number=number: len(engine.orders) == number and engine.open_orders > 0)  # type: ignore[misc]
            await asyncio.sleep(0.05)
            await stand(r, "d")
        await until(lambda: len(engine.orders) == 3)
        await asyncio.sleep(0.05)
        reborn = EchoEngine(f"unix:{tmp_path}/2", engine_id="d", roles=D, epoch=2)
        await reborn.start()
        engine.die()
        r.directory.set([reborn.info])
        assert (await asking)[0] == wanted(200)
        await r.router.stop()
        await reborn.stop()


def dying(r: Rig, at: int, *, is_told: bool) -> None:
    """Engines die at token `at` of an order or later, one after the other. `is_told`: the directory hears of it."""
    alive = dict(r.engines)

    def died(name: str) -> None:
        del alive[name]
        if is_told:
            r.directory.set([engine.info for engine in alive.values()])

    for name, engine in r.engines.items():
        engine.faults.dies_at = at + 3 * int(name[1:])
        engine.on_death = lambda name=name: died(name)  # type: ignore[misc]


async def test_deaths_that_the_directory_confirms_are_counted(tmp_path: Path) -> None:
    async with rig(tmp_path, {f"d{i}": D for i in range(4)}, step_s=0.01, migration_limit=2) as r:
        dying(r, 2, is_told=True)
        with pytest.raises(EngineLost):
            await r.ask(COUNT)
        assert sum(bool(engine.orders) for engine in r.engines.values()) == 3


async def test_without_the_directorys_word_a_request_goes_on_while_it_may(tmp_path: Path) -> None:
    names = {f"d{i}": D for i in range(5)}
    async with rig(tmp_path, names, step_s=0.01, migration_limit=2, connect_timeout_s=0.2) as r:
        dying(r, 2, is_told=False)
        r.engines["d4"].faults.dies_at = None
        tokens, finish = await r.ask(20)
        assert tokens == wanted(20)
        assert finish.migrations == 4


async def test_nobody_is_quarantined_while_the_directory_says_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d0": D, "d1": D, "d2": D}, connect_timeout_s=0.2) as r:
        dying(r, -9, is_told=False)
        with pytest.raises((EngineLost, DeadlineExceeded)):
            await r.deltas(call(COUNT, timeout_s=3))
        assert r.metric("diptych_quarantined_total") == 0


async def test_a_life_is_dead_when_the_directory_lets_it_go_and_alive_when_its_stream_comes_back(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        view, ref = r.router.view, r.engines["d"].info.ref
        assert view.has_died(Incident(ref, 1)) is False, "connected"
        assert view.has_died(Incident(ref, 0, nobody_died=True)) is False
        await r.engines["d"].stop()
        await until(lambda: bool(r.router.losses))
        session = view.session(ref)
        assert session is not None
        assert view.has_died(Incident(ref, session.losses)) is None, "nobody knows"
        assert view.has_died(Incident(ref, session.losses - 1)) is False, "it was back after that one"
        r.directory.set([])
        await until(lambda: view.session(ref) is None)
        assert view.has_died(Incident(ref, session.losses)) is True
        assert view.has_died(Incident(EngineRef(EngineId("x"), 1, "unix:x"), 1)) is False, "never heard of"


async def test_a_request_waits_for_engines_that_are_starting(tmp_path: Path) -> None:
    directory = StaticDirectory()
    directory.is_settled.clear()
    router = Router(directory=directory, settings=RouterSettings(connect_timeout_s=20))
    await router.start()
    made = Rig(router, directory, {})
    asking = asyncio.create_task(made.ask(COUNT))
    late = asyncio.create_task(made.deltas(call(COUNT, timeout_s=0.05)))
    with pytest.raises(DeadlineExceeded):
        await late
    engine = EchoEngine(f"unix:{tmp_path}/d", engine_id="d", roles=D)
    await engine.start()
    directory.set([engine.info])
    directory.is_settled.set()
    assert (await asking)[0] == wanted(COUNT)
    await router.stop()
    await engine.stop()
