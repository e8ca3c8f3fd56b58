"""Engines die, hang or are replaced: another one serves before or soon after, and no pool is emptied."""

from __future__ import annotations

import asyncio

import pytest

from diptych.cluster.control.faults import pass_point
from diptych.cluster.control.memory import MIB
from diptych.cluster.control.pools import Pools
from diptych.cluster.control.restarts import Restarts, RestartTerms
from diptych.cluster.control.testing import FakeProcess, World, plan, started
from diptych.protos.errors import DiptychError, EngineLost, InvalidRequest, StartupError, UnknownModel
from diptych.protos.faults import Action, FaultPlan, FaultRule, FaultSettings, Point
from diptych.protos.types import EngineId, Role


async def test_an_engine_that_dies_comes_back_by_its_name_in_a_new_epoch() -> None:
    world = await started("models.m.decode.engines=2")
    dead = world.process("decode-0")
    dead.death.set_result("killed by signal 9")
    await world.until(lambda: len(world.made) == 4 and world.states()["decode-0"] == "ready")
    again = world.process("decode-0")
    assert again.spec.epoch > max(p.spec.epoch for p in world.made[:3])
    assert dead.calls[-1] == "kill"
    await world.until(lambda: len(world.pools.news(-1)) == 2)
    (first, died), (_, back) = world.pools.news(-1)
    assert died.startswith(f"engine decode-0 (epoch {dead.spec.epoch}) died: killed by signal 9. Another one starts")
    assert back == f"engine decode-0 serves again, in epoch {again.spec.epoch}"
    assert [sentence for _, sentence in world.pools.news(first)] == [back]


async def test_a_report_about_the_dead_life_changes_nothing_for_its_successor() -> None:
    world = await started()
    dead = world.process("decode-0").spec
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: len(world.made) == 3 and world.states()["decode-0"] == "ready")
    assert not world.manager.report_dead("decode-0", dead.epoch, "gone, again")
    world.manager.report_left("decode-0", dead.epoch)
    with pytest.raises(DiptychError, match="the report is about epoch"):
        world.manager.report_draining("decode-0", dead.epoch)
    assert world.states()["decode-0"] == "ready"


async def test_an_engine_that_hangs_is_killed_and_replaced() -> None:
    world = await started("engines.silence_s=0.01")
    hung = world.process("decode-0")
    hung.stopped = True
    hung.answers.clear()
    await world.until(lambda: len(world.made) == 3 and world.states()["decode-0"] == "ready")
    assert hung.calls[-1] == "kill"
    assert "its process was stopped" in world.pools.news(-1)[0][1]


async def test_one_that_is_merely_slow_gets_more_patience_than_one_that_is_stopped() -> None:
    world = await started("engines.silence_s=0.01")
    slow = world.process("decode-0")
    slow.answers.clear()
    await world.until(lambda: len(world.made) == 3)
    assert "it hung: no answer for 0.06 s" in world.pools.news(-1)[0][1]


async def test_an_engine_that_dies_as_it_starts_is_tried_again_later_and_later() -> None:
    terms = RestartTerms(enabled=True, limit=3, backoff_s=0.5)
    restarts, name = Restarts(), EngineId("decode-0")
    assert [restarts.delay(name, 0.0, float(now), terms) for now in (0, 1, 2)] == [0.0, 0.5, 1.0]
    assert restarts.delay(name, 0.0, 10.0, terms) == 590.0, "beyond the limit: when the first is ten minutes ago"
    assert restarts.delay(EngineId("decode-1"), 0.0, 10.0, terms) == 0.0, "each name has its own count"
    assert restarts.delay(name, 60.0, 100.0, terms) == 0.0, "it served: what killed it was not its start"


async def test_engines_killed_again_and_again_under_load_are_replaced_each_time() -> None:
    restarts, terms = Restarts(), RestartTerms(enabled=True, limit=5, backoff_s=0.5)
    assert {restarts.delay(EngineId("decode-0"), 25.0, 30.0 * i, terms) for i in range(20)} == {0.0}


async def test_a_replacement_that_cannot_start_is_replaced_in_turn() -> None:
    world = await started("engines.restart_backoff_s=0.001")
    failures = [True, True]

    def fail(process: FakeProcess) -> None:
        process.start_error = EngineLost("killed") if failures and failures.pop() else None

    world.on_launch = fail
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: len(world.made) == 5 and world.states()["decode-0"] == "ready")
    assert sum("died" in sentence for _, sentence in world.pools.news(-1)) == 3


async def test_without_memory_for_it_a_dead_engine_waits() -> None:
    world = await started("engines.restart_backoff_s=0.001")
    world.memory = 0
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: any("not enough memory" in sentence for _, sentence in world.pools.news(-1)))
    assert len(world.made) == 2
    world.memory = 100_000 * MIB
    await world.until(lambda: len(world.made) == 3)


async def test_with_restarts_off_a_dead_engine_stays_away_until_somebody_scales() -> None:
    world = await started("engines.restart=false")
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: world.states()["decode-0"] == "dead")
    assert "engines.restart is off" in world.pools.news(-1)[0][1]
    await world.pools.scale("m", Role.DECODE, 1)
    assert world.states()["decode-0"] == "ready"


async def test_a_dead_engine_of_a_pool_that_was_scaled_meanwhile_is_not_started_twice() -> None:
    world = await started("models.m.decode.engines=2")
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: world.states()["decode-0"] == "dead")
    await world.pools.scale("m", Role.DECODE, 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert world.states() == {"prefill-0": "ready", "decode-0": "dead", "decode-1": "ready"}


async def test_a_restart_replaces_every_engine_and_never_leaves_a_pool_smaller() -> None:
    world = await started("models.m.decode.engines=2")
    before = {p.spec.epoch for p in world.made}
    sizes = []

    def look(process: FakeProcess) -> None:
        ready = [i for i in world.manager.engines() if not i.draining]
        sizes.append(sorted(role.value for i in ready for role in i.roles))

    world.on_launch = look
    done = await world.pools.restart()
    assert (len(done.started), len(done.ended), done.failed) == (3, 3, ())
    assert sizes == [["decode", "decode", "prefill"]] * 3, "at each launch the pools were whole"
    alive = [p for p in world.made if "kill" not in p.calls]
    assert len(alive) == 3
    assert not before & {p.spec.epoch for p in alive}
    assert all(p.calls == ["start", "drain", "stop", "kill"] for p in world.made if p not in alive)


async def test_the_old_engine_stays_until_the_routers_know_the_new_one() -> None:
    world = await started()
    known = asyncio.Event()
    asked: list[int] = []

    async def wait(version: int) -> None:
        asked.append(version)
        await known.wait()

    world.pools._known = wait
    old = world.process("decode-0")
    going = asyncio.create_task(world.pools.restart("m", Role.DECODE))
    await world.until(lambda: bool(asked))
    assert old.calls == ["start"]
    assert asked == [world.manager.version]
    known.set()
    await going
    assert old.calls == ["start", "drain", "stop", "kill"]


async def test_a_restart_ends_at_the_first_engine_that_cannot_be_replaced_and_keeps_the_old_ones() -> None:
    world = await started("models.m.decode.engines=2")

    def fail(process: FakeProcess) -> None:
        process.start_error = StartupError("no weights")

    world.on_launch = fail
    done = await world.pools.restart("m", Role.DECODE)
    assert done.failed == ("engine decode-2 cannot start: no weights",)
    assert done.ended == ()
    assert {name for name, state in world.states().items() if state == "ready"} == {"prefill-0", "decode-0", "decode-1"}


async def test_without_memory_for_one_more_a_restart_goes_one_by_one_and_spares_the_last_decode_engine() -> None:
    world = await started("models.m.decode.engines=2")
    world.memory = 0
    done = await world.pools.restart("m", Role.DECODE)
    assert done.ended == ("decode-0", "decode-1")
    assert [p.spec.engine_id for p in world.made[3:]] == ["decode-0", "decode-1"]
    await world.pools.scale("m", Role.DECODE, 1)
    done = await world.pools.restart("m", Role.DECODE)
    assert done.ended == ()
    assert "stays, it is the only one of its pool: not enough memory" in done.failed[0]


async def test_a_restart_of_what_is_not_served_is_refused_by_name() -> None:
    world = await started("models.b.layout=colocated", names=("a", "b"))
    with pytest.raises(UnknownModel, match="c is not served"):
        await world.pools.restart("c")
    with pytest.raises(InvalidRequest, match="b has no prefill pool; it has decode"):
        await world.pools.restart("b", Role.PREFILL)
    assert len((await world.pools.restart(None, Role.PREFILL)).ended) == 1


async def test_an_engine_whose_process_was_asked_to_end_goes_when_another_serves() -> None:
    world = await started("engines.silence_s=0.01")
    old = world.process("decode-0")
    world.on_launch = lambda process: process.may_start.clear()
    old.asked = True
    await world.until(lambda: len(world.made) == 3)
    assert old.calls == ["start"]
    world.made[2].may_start.set()
    await world.until(lambda: old.calls == ["start", "drain", "stop", "kill"])
    assert world.states() == {"prefill-0": "ready", "decode-1": "ready"}


async def test_an_engine_that_hangs_while_it_drains_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.cluster.control.life.ANSWER_MARGIN_S", 0.01)
    world = await started("models.m.decode.engines=2", "router.drain_grace_s=0.01")
    process = world.process("decode-1")

    async def hang(grace_s: float) -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(process, "drain", hang)
    assert (await world.pools.scale("m", Role.DECODE, 1)).ended == ("decode-1",)
    assert process.calls == ["start", "kill"]
    assert "decode-1" not in world.states()


async def test_a_restarted_manager_replaces_what_died_meanwhile() -> None:
    world = await started()
    world.process("decode-0").calls.append("kill")  # it died while there was no manager
    world.begin()
    world.pools.adopt()
    await world.until(lambda: world.states() == {"prefill-0": "ready", "decode-0": "ready"})
    assert len(world.made) == 3


async def test_a_restarted_manager_ends_what_a_broken_off_restart_left_over() -> None:
    world = await started()
    world.process("decode-0").may_finish.clear()
    world.on_launch = lambda process: process.may_finish.set()
    hold = asyncio.Event()
    world.pools._known = lambda version: hold.wait()  # type: ignore[assignment,return-value]
    going = asyncio.create_task(world.pools.restart("m", Role.DECODE))
    await world.until(lambda: world.states().get("decode-1") == "ready")
    going.cancel()  # the manager ends here: both serve
    await asyncio.gather(going, return_exceptions=True)
    old = world.process("decode-0")
    old.may_finish.set()
    world.begin()
    world.pools.adopt()
    await world.until(lambda: world.states() == {"prefill-0": "ready", "decode-1": "ready"})


async def test_without_memory_for_both_another_plan_replaces_engines_one_by_one() -> None:
    world = await started("models.m.decode.engines=2")
    world.memory = 0
    await world.pools.apply(plan("models.m.decode.engines=2", "models.m.decode.kv.memory_mib=64"))
    done = await world.pools.settled()
    assert not done.failed
    assert [p.spec.engine_id for p in world.made[3:]] == ["prefill-0", "decode-0", "decode-1"]
    assert all(p.spec.settings.decode.kv is not None for p in world.made[3:])
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "ready"}


async def test_a_dismissed_engine_refuses_nothing_until_the_routers_know_that_it_goes() -> None:
    known = asyncio.Event()
    world = World()
    world.pools = Pools(
        world.manager,
        world.store,
        world,
        available=lambda pids: (world.memory, "free memory of the machine"),
        changed=world.changed,
        known=lambda version: known.wait(),  # type: ignore[arg-type,return-value]
    )
    await world.pools.apply(plan("models.m.decode.engines=2"))
    await world.pools.settled()
    going = asyncio.create_task(world.pools.scale("m", Role.DECODE, 1))
    await world.until(lambda: world.states()["decode-1"] == "draining")
    assert world.process("decode-1").calls == ["start"]
    known.set()
    await going
    assert world.made[2].calls == ["start", "drain", "stop", "kill"]


async def test_a_report_that_fails_by_plan_is_the_end_of_its_engine_and_of_nothing_else() -> None:
    rule = FaultRule(point=Point.MANAGER_REPORT, action=Action.RAISE, message="ready", nth=(3,))
    faults = FaultPlan(FaultSettings(rules=(rule,)), me="manager")
    world = World()
    world.pools = Pools(
        world.manager,
        world.store,
        world,
        available=lambda pids: (world.memory, "free memory of the machine"),
        changed=world.changed,
        reporting=lambda name, report: pass_point(faults, Point.MANAGER_REPORT, peer=name, message=report),
    )
    await world.pools.apply(plan())
    assert not (await world.pools.settled()).failed
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: len(world.made) == 4 and world.states()["decode-0"] == "ready")
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}
    assert faults.counts == {"manager.report/raise": 1}


async def test_who_asks_the_manager_gets_a_planned_delay_or_error() -> None:
    rules = (
        FaultRule(point=Point.MANAGER_LIST, action=Action.DELAY, nth=(1,), delay_s=0.001),
        FaultRule(point=Point.MANAGER_LIST, action=Action.RAISE, nth=(2,)),
    )
    faults = FaultPlan(FaultSettings(rules=rules), me="router")
    await pass_point(faults, Point.MANAGER_LIST)
    with pytest.raises(EngineLost, match="injected fault"):
        await pass_point(faults, Point.MANAGER_LIST)
    await pass_point(faults, Point.MANAGER_LIST)
