"""Engines come and go: every life is watched, nothing is lost, nothing is started twice. Processes are fakes."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from diptych.cluster.control.manager import EngineState
from diptych.cluster.control.memory import MIB
from diptych.cluster.control.testing import FakeProcess, World, plan, started
from diptych.protos.errors import EngineLost, InvalidRequest, StartupError, UnknownModel
from diptych.protos.types import Role


async def test_a_plan_brings_up_every_engine_of_every_model_once() -> None:
    world = await started("models.a.decode.engines=2", "models.b.layout=colocated", names=("a", "b"))
    assert world.states() == dict.fromkeys(["prefill-0", "decode-0", "decode-1", "decode-2"], "ready")
    assert {m.engine_id: m.model for m in world.manager.members()}["decode-2"] == "b"
    assert len({p.spec.epoch for p in world.made}) == 4
    await world.pools.apply(plan("models.a.decode.engines=2", "models.b.layout=colocated", names=("a", "b")))
    assert len(world.made) == 4, "the same plan again starts nothing"


async def test_an_engine_that_cannot_start_is_told_and_its_process_ended() -> None:
    world = World()

    def fail(process: FakeProcess) -> None:
        if Role.DECODE in process.spec.roles:
            process.start_error = StartupError("no weights")

    world.on_launch = fail
    await world.pools.apply(plan())
    done = await world.pools.settled()
    assert done.failed == ("engine decode-0 cannot start: no weights",)
    assert [s.info.ref.engine_id for s in done.started] == ["prefill-0"]
    await world.until(lambda: world.states()["decode-0"] == "dead")
    assert world.made[1].calls[-1] == "kill"


async def test_a_death_is_told_to_routers_with_its_reason() -> None:
    world = await started()
    before = world.manager.version
    world.process("decode-0").death.set_result("killed by signal 9")
    await world.until(lambda: world.states()["decode-0"] == "dead")
    assert world.manager.version > before
    [dead] = [m for m in world.manager.members() if m.state is EngineState.DEAD]
    assert dead.reason == "killed by signal 9"


async def test_a_pool_grows_and_the_new_engine_is_told_when_it_is_ready() -> None:
    world = await started()
    world.on_launch = lambda process: process.may_start.clear()
    growing = asyncio.create_task(world.pools.scale("m", Role.DECODE, 2))
    await world.until(lambda: len(world.made) == 3)
    assert [i.ref.engine_id for i in world.manager.engines()] == ["prefill-0", "decode-0"]
    world.made[-1].may_start.set()
    done = await growing
    assert [s.info.ref.engine_id for s in done.started] == ["decode-1"]
    assert world.states()["decode-1"] == "ready"


async def test_a_dismissed_engine_finishes_its_requests_before_it_ends() -> None:
    world = await started("models.m.decode.engines=2")
    process = world.process("decode-1")
    process.may_finish.clear()
    shrinking = asyncio.create_task(world.pools.scale("m", Role.DECODE, 1))
    await world.until(lambda: "drain" in process.calls)
    assert {i.ref.engine_id: i.draining for i in world.manager.engines()} == {
        "prefill-0": False,
        "decode-0": False,
        "decode-1": True,
    }
    assert "stop" not in process.calls
    process.may_finish.set()
    done = await shrinking
    assert done.ended == ("decode-1",)
    assert process.calls == ["start", "drain", "stop", "kill"]
    assert "decode-1" not in world.states()


async def test_engines_share_the_cores_anew_when_their_number_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    world = await started("models.m.layout=colocated")
    await world.pools.scale("m", Role.DECODE, 4)
    assert [process.cores for process in world.made] == [[8, 2], [2], [2], [2]]
    await world.pools.scale("m", Role.DECODE, 1)
    assert world.process("decode-0").cores == [8, 2, 8]


async def test_requests_that_outlast_the_grace_end_with_the_engine() -> None:
    world = World()
    await world.pools.apply(dataclasses.replace(plan("models.m.decode.engines=2"), drain_grace_s=0.01))
    await world.pools.settled()
    world.process("decode-1").may_finish.clear()
    assert (await world.pools.scale("m", Role.DECODE, 1)).ended == ("decode-1",)
    assert world.made[2].calls == ["start", "drain", "stop", "kill"]


async def test_the_least_loaded_engine_goes_and_among_equals_the_youngest() -> None:
    world = await started("models.m.decode.engines=3")
    for name, running in (("decode-0", 3), ("decode-1", 0), ("decode-2", 0)):
        world.process(name).running = running
    assert (await world.pools.scale("m", Role.DECODE, 2)).ended == ("decode-2",)
    world.process("decode-1").running = 9
    assert (await world.pools.scale("m", Role.DECODE, 1)).ended == ("decode-0",)


async def test_the_last_decode_engine_stays_and_prefill_may_go_to_zero() -> None:
    world = await started()
    with pytest.raises(InvalidRequest, match="needs at least 1 engine"):
        await world.pools.scale("m", Role.DECODE, 0)
    assert (await world.pools.scale("m", Role.PREFILL, 0)).ended == ("prefill-0",)
    assert world.states() == {"decode-0": "ready"}
    assert [s.info.ref.engine_id for s in (await world.pools.scale("m", Role.PREFILL, 1)).started] == ["prefill-0"]


async def test_impossible_wishes_are_refused_by_name_and_change_nothing() -> None:
    world = await started("models.b.layout=colocated", names=("a", "b"))
    before = world.states()
    with pytest.raises(UnknownModel, match="c is not served; served here: a, b"):
        await world.pools.scale("c", Role.DECODE, 2)
    with pytest.raises(InvalidRequest, match="b has no prefill pool; it has decode"):
        await world.pools.scale("b", Role.PREFILL, 1)
    world.memory = 1000 * MIB
    with pytest.raises(StartupError, match=r"not enough memory for 3 more engines of \d+ MiB"):
        await world.pools.scale("a", Role.DECODE, 4)
    assert world.states() == before
    assert len(world.made) == 3


async def test_a_new_engine_that_cannot_start_leaves_the_pool_as_it_was() -> None:
    world = await started()

    def fail(process: FakeProcess) -> None:
        process.start_error = EngineLost("killed")

    world.on_launch = fail
    done = await world.pools.scale("m", Role.DECODE, 2)
    assert "most likely for lack of memory: killed" in done.failed[0]
    world.on_launch = lambda process: None
    await world.until(lambda: world.states()["decode-1"] == "dead")
    await world.pools.apply(plan())
    assert world.states()["decode-0"] == "ready"
    assert len(world.made) == 3, "the failed engine is not wanted any more"


async def test_an_engine_dismissed_while_it_starts_is_ended_at_once() -> None:
    world = await started()
    world.on_launch = lambda process: process.may_start.clear()
    growing = asyncio.create_task(world.pools.scale("m", Role.DECODE, 2))
    await world.until(lambda: len(world.made) == 3)
    assert (await world.pools.scale("m", Role.DECODE, 1)).ended == ("decode-1",)
    assert (await growing).failed == ("engine decode-1 was sent away before it was ready",)
    assert world.made[2].calls == ["start", "kill"]
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}


async def test_a_caller_that_goes_away_does_not_end_what_it_asked_for() -> None:
    world = await started("models.m.decode.engines=2")
    process = world.process("decode-1")
    process.may_finish.clear()
    shrinking = asyncio.create_task(world.pools.scale("m", Role.DECODE, 1))
    await world.until(lambda: "drain" in process.calls)
    shrinking.cancel()
    await asyncio.gather(shrinking, return_exceptions=True)
    assert process.calls == ["start", "drain"]
    process.may_finish.set()
    await world.until(lambda: "kill" in process.calls)


async def test_a_restarted_manager_adopts_what_lives_and_goes_on_draining() -> None:
    world = await started("models.m.decode.engines=2")
    world.process("decode-1").may_finish.clear()
    shrinking = asyncio.create_task(world.pools.scale("m", Role.DECODE, 1))
    await world.until(lambda: "drain" in world.process("decode-1").calls)
    draining = world.process("decode-1")
    gone = world.process("prefill-0")
    gone.calls.append("kill")  # it died while there was no manager
    world.begin()
    world.pools.adopt()
    world.pools.adopt()
    assert world.states() == {"prefill-0": "dead", "decode-0": "ready", "decode-1": "draining"}
    await world.until(lambda: draining.calls.count("drain") == 2)
    draining.may_finish.set()
    await world.until(lambda: "decode-1" not in world.states())
    await shrinking
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: world.states()["decode-0"] == "dead")


async def test_another_plan_replaces_only_what_differs() -> None:
    world = await started(names=("a", "b"))
    await world.pools.apply(plan("models.b.kv.memory_mib=64", names=("b", "c")))
    await world.pools.settled()
    assert [p.spec.model for p in world.made if "kill" in p.calls] == [], "those before serve until the new ones do"
    await world.until(lambda: len(world.states()) == 4)
    models = [(m.model, m.state.value) for m in world.manager.members()]
    assert sorted(models) == [("b", "ready"), ("b", "ready"), ("c", "ready"), ("c", "ready")]
    ended = [p for p in world.made if "kill" in p.calls]
    assert [p.spec.model for p in ended] == ["a", "a", "b", "b"]


async def test_only_the_present_owner_ends_the_pools() -> None:
    world = World()
    await world.pools.apply(plan(), "first")
    await world.pools.apply(plan(), "second")
    await world.pools.settled()
    assert not await world.pools.release("first", 0.0)
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}
    assert await world.pools.release("second", 0.0)
    assert world.states() == {}
    assert all(p.calls[-1] == "kill" for p in world.made)


async def test_pools_that_another_owner_takes_over_while_the_engines_end_are_not_released() -> None:
    world = World()
    await world.pools.apply(plan(), "first")
    await world.pools.settled()
    world.process("decode-0").may_finish.clear()
    release = asyncio.create_task(world.pools.release("first", 60.0))
    await world.until(lambda: "drain" in world.process("decode-0").calls)
    taking_over = asyncio.create_task(world.pools.apply(plan(), "second"))
    await asyncio.sleep(0)
    world.process("decode-0").may_finish.set()
    assert not await release, "whoever asked would end the manager, and with it the successor's pools"
    await taking_over
    await world.pools.settled()
    assert set(world.states().values()) == {"ready"}
    assert len(world.states()) == 2


async def test_a_plan_without_an_owner_leaves_the_pools_to_the_one_before() -> None:
    world = World()
    await world.pools.apply(plan(), "first")
    await world.pools.apply(plan("models.m.decode.engines=2"))
    await world.pools.settled()
    assert not await world.pools.release("another", 0.0)
    assert await world.pools.release("first", 0.0)


async def test_who_applied_nothing_releases_nothing_of_an_owner_who_is_about_to() -> None:
    world = World()
    launching = asyncio.create_task(world.pools.apply(plan(), "first"))
    await asyncio.sleep(0)
    assert not await world.pools.release("another", 0.0)
    await launching
    await world.pools.settled()
    assert set(world.states().values()) == {"ready"}


async def test_another_plan_is_in_force_when_the_engines_of_the_one_before_have_ended() -> None:
    world = await started("models.m.decode.engines=2")
    world.process("decode-0").may_finish.clear()
    await world.pools.apply(plan("models.m.decode.engines=2", "models.m.decode.kv={memory_mib: 9}"))
    waiting = asyncio.create_task(world.pools.exchanged())
    await world.until(lambda: "drain" in world.process("decode-0").calls)
    assert {started.info.ref.engine_id for started in (await world.pools.settled()).started} == {
        "decode-2",
        "decode-3",
        "prefill-1",
    }, "an engine may take the other role one day: it is told of both"
    assert not waiting.done(), "one of them still has requests"
    world.process("decode-0").may_finish.set()
    assert sorted((await waiting).ended) == ["decode-0", "decode-1", "prefill-0"]
    assert sorted(world.states()) == ["decode-2", "decode-3", "prefill-1"]


async def test_a_plan_of_other_sizes_alone_replaces_nothing() -> None:
    world = await started("models.m.decode.engines=2")
    await world.pools.apply(plan("models.m.decode.engines=3"))
    done = await world.pools.exchanged()
    assert done.ended == ()
    assert sorted(world.states()) == ["decode-0", "decode-1", "decode-2", "prefill-0"]
