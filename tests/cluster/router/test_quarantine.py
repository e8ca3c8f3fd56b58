"""A request that ends its engines is found among innocent ones: they are answered, it is refused, the pool lives."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.router.budget import MAX_TENANTS, RetryBudget
from diptych.cluster.router.gate import SEATS, Gate, Quarantine, Suspects
from diptych.cluster.router.incident import Incident
from diptych.cluster.router.rig import PROMPT, D, Rig, call, rig, until, wanted
from diptych.cluster.router.testing import EchoEngine
from diptych.protos.errors import DiptychError, Quarantined
from diptych.protos.types import EngineId, EngineRef, SamplingParams

POISON = 666
THREE = {"d0": D, "d1": D, "d2": D}
BAD = replace(call(), prompt=(*PROMPT[:5], POISON))


class Keeper:
    """Replaces engines that die, as the manager does."""

    def __init__(self, r: Rig, folder: Path) -> None:
        self.deaths = 0
        self._rig = r
        self._folder = folder
        self._alive = dict(r.engines)
        self._tasks: list[asyncio.Task[None]] = []
        for name, engine in r.engines.items():
            self._watch(name, engine)

    def _watch(self, name: str, engine: EchoEngine) -> None:
        engine.faults.poison = POISON

        def died() -> None:
            self.deaths += 1
            self._tasks.append(asyncio.create_task(self._replace(name, engine)))

        engine.on_death = died

    async def _replace(self, name: str, dead: EchoEngine) -> None:
        epoch = dead.info.ref.epoch + 1
        engine = EchoEngine(f"unix:{self._folder}/{name}.{epoch}", engine_id=name, roles=D, epoch=epoch, step_s=0.002)
        self._watch(name, engine)
        await engine.start()
        self._alive[name] = engine
        self._rig.directory.set([one.info for one in self._alive.values()])

    async def stop(self) -> None:
        await asyncio.gather(*self._tasks)
        await self._rig.router.stop()
        for engine in self._alive.values():
            await engine.stop()


async def test_a_request_that_ends_every_engine_is_refused_and_costs_no_other_its_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, THREE, step_s=0.002) as r:
        keeper = Keeper(r, tmp_path)

        async def poison() -> DiptychError | None:
            try:
                await r.deltas(BAD)
            except DiptychError as error:
                return error
            return None

        innocent = [asyncio.create_task(r.ask(40)) for _ in range(4)]
        guilty = asyncio.create_task(poison())
        innocent += [asyncio.create_task(r.ask(40)) for _ in range(4)]
        assert isinstance(await guilty, Quarantined)
        assert [tokens for tokens, _ in [await one for one in innocent]] == [wanted(40)] * 8
        assert 2 <= keeper.deaths <= 3
        assert r.metric("diptych_quarantined_total") == 1
        deaths = keeper.deaths
        with pytest.raises(Quarantined):
            await r.deltas(BAD)
        with pytest.raises(Quarantined):
            await r.deltas(replace(BAD, sampling=replace(BAD.sampling, seed=5)))
        assert keeper.deaths == deaths, "not tried again"
        assert (await r.ask(3))[0] == wanted(3)
        await keeper.stop()


async def test_two_lost_connections_to_an_engine_that_lives_quarantine_nobody(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, silence_s=0.4) as r:
        engine = r.engines["d"]
        engine.faults.silent = True
        asking = asyncio.create_task(r.ask(4))
        for number in (1, 2):
            await until(lambda number=number: len(engine.orders) == number)  # type: ignore[misc]
            engine.faults.is_stopped = True
            await until(lambda number=number: len(r.router.losses) == number)  # type: ignore[misc]
            engine.faults.silent = number == 1
            engine.faults.is_stopped = False
        assert (await asking)[0] == wanted(4)
        assert {loss.cause for loss in r.router.losses} == {"silent"}


async def test_seats_are_few_and_the_twice_suspected_go_one_by_one() -> None:
    gate = Gate()
    seats = [await gate.enter(1) for _ in range(SEATS)]
    late = asyncio.create_task(gate.enter(1))
    alone = await gate.enter(2)
    second = asyncio.create_task(gate.enter(3))
    await asyncio.sleep(0)
    assert not late.done()
    assert not second.done()
    seats[0].release()
    seats[0].release()
    alone.release()
    (await late).release()
    (await second).release()
    for seat in seats:
        seat.release()
    for _ in range(SEATS):
        await gate.enter(1)


def test_only_who_had_no_token_yet_is_a_suspect_and_the_company_is_that_of_the_incident() -> None:
    one, other = (EngineRef(EngineId(name), 1, "unix:x") for name in ("a", "b"))
    first, second = Incident(one, 1), Incident(other, 1)
    suspects = Suspects()
    suspects.placed(b"x", [one, other])
    suspects.placed(b"y", [one])
    suspects.placed(b"z", [other])
    suspects.cleared(b"z", [other])
    assert not suspects.is_alone(b"x", first)
    suspects.cleared(b"y", [one])
    assert not suspects.is_alone(b"x", first), "y was there when it died"
    assert suspects.is_alone(b"x", Incident(one, 2)), "a second loss of the same life has a company of its own"
    assert suspects.is_alone(b"x", second)
    suspects.cleared(b"x", [one, other])
    assert len(suspects) == 0


def test_the_company_in_a_step_that_raised_are_those_whom_it_ended() -> None:
    engine = EngineRef(EngineId("a"), 1, "unix:x")
    suspects = Suspects()
    for name in (b"x", b"y", b"z"):
        suspects.placed(name, [engine])
    suspects.cleared(b"z", [engine])
    assert suspects.is_alone(b"x", Incident(engine, 0, frozenset({b"x", b"z"}))), "z had tokens, y was not in it"
    assert not suspects.is_alone(b"x", Incident(engine, 0, frozenset({b"x", b"y"})))


def test_a_quarantine_ends_and_means_this_request_alone() -> None:
    now = 0.0
    quarantine = Quarantine(period_s=10, clock=lambda: now)
    quarantine.add(call())
    quarantine.check(replace(call(), prompt=(1, 2)))
    quarantine.check(replace(call(), sampling=SamplingParams(max_tokens=7)))
    with pytest.raises(Quarantined, match="10 s"):
        quarantine.check(replace(call(), tenant="another", timeout_s=3))
    now = 10.0
    quarantine.check(call())


def test_a_budget_fills_with_requests_and_each_tenant_has_its_own() -> None:
    budget = RetryBudget(fraction=0.5, burst=2)
    assert [budget.try_take("a") for _ in range(3)] == [True, True, False]
    assert budget.try_take("b")
    budget.admitted("a")
    assert not budget.try_take("a")
    budget.admitted("a")
    assert budget.try_take("a")
    for _ in range(9):
        budget.admitted("a")
    assert budget.left("a") == 2


def test_budgets_of_tenants_that_were_never_heard_of_again_are_forgotten() -> None:
    """Where no key is asked for, a header names tenants."""
    budget = RetryBudget(fraction=0.5, burst=2)
    assert budget.try_take("first")
    for number in range(MAX_TENANTS):
        budget.admitted(str(number))
    assert budget.left("first") == 2
    assert len(budget._left) == MAX_TENANTS
