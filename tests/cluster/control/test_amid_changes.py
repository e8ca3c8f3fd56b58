"""What goes wrong amid something else, a role change, a drain, a change of managers: nobody is left between."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from diptych.cluster.control.memory import MIB
from diptych.cluster.control.testing import FakeProcess, FakeStore, World, plan, started
from diptych.protos.errors import DiptychError, EngineFault, EngineLost, InvalidRequest, StartupError
from diptych.protos.status import EngineInfo
from diptych.protos.types import Role

TWO = ("models.m.prefill.engines=2", "models.m.decode.engines=2")


def held_role_change(world: World, name: str) -> asyncio.Event:
    """The engine changes its roles when the event is set."""
    process, may_change = world.process(name), asyncio.Event()
    change = process.set_roles

    async def hold(roles: frozenset[Role], grace_s: float) -> EngineInfo:
        await may_change.wait()
        return await change(roles, grace_s)

    process.set_roles = hold  # type: ignore[method-assign]
    return may_change


def sizes(world: World) -> dict[str, int]:
    """Of the pools, as a restarted manager would read them."""
    world.begin()
    return {role.value: pool.engines for (_, role), pool in world.pools._pools.items()}


async def next_manager(world: World) -> None:
    """This one ends without a word, as a process does, and another one begins."""
    tasks = [*world.pools._tasks, *(life.task for life in world.pools._lives.values() if life.task is not None)]
    calls, kept = {process: list(process.calls) for process in world.made}, dict(world.store)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for process, made in calls.items():
        process.calls = made  # nobody killed it
    world.store = FakeStore(kept)
    world.begin()
    world.pools.adopt()


@pytest.mark.parametrize("error", [EngineFault("injected fault"), EngineLost("it does not end")])
async def test_an_engine_whose_drain_fails_is_gone_all_the_same(error: DiptychError) -> None:
    world = await started(*TWO)
    process = world.process("decode-1")

    async def fail(grace_s: float) -> bool:
        raise error

    process.drain = fail  # type: ignore[method-assign]
    assert (await world.pools.scale("m", Role.DECODE, 1)).ended == ("decode-1",)
    assert "decode-1" not in world.states()
    assert process.calls[-1] == "kill"


async def test_an_engine_that_fails_between_two_roles_takes_no_orders_of_either_and_is_replaced() -> None:
    world = await started(*TWO)
    process = world.process("prefill-1")

    async def fail(roles: frozenset[Role], grace_s: float) -> EngineInfo:
        raise EngineFault("it took no more of the old ones, then something broke")

    process.set_roles = fail  # type: ignore[method-assign]
    kill = process.kill

    def dies() -> None:
        if not process.death.done():
            process.death.set_result("killed")
        kill()

    process.kill = dies  # type: ignore[method-assign]
    with pytest.raises(EngineLost, match="prefill-1"):
        await world.pools.set_role("prefill-1", Role.DECODE)
    await world.until(lambda: len(world.made) == 5 and world.states()["prefill-1"] == "ready")
    assert sizes(world) == {"prefill": 2, "decode": 2}


async def test_a_plan_that_comes_amid_a_role_change_says_how_large_the_pools_are() -> None:
    world = await started(*TWO)
    may_change = held_role_change(world, "prefill-1")
    change = asyncio.create_task(world.pools.set_role("prefill-1", Role.DECODE))
    await world.until(lambda: world.states()["prefill-1"] == "draining")
    await world.pools.apply(plan("models.m.prefill.engines=2", "models.m.decode.engines=1"))
    may_change.set()
    await change
    await world.until(lambda: sum(state == "ready" for state in world.states().values()) == 3)
    assert sorted(role.value for info in world.manager.engines() if not info.draining for role in info.roles) == [
        "decode",
        "prefill",
        "prefill",
    ]
    assert sizes(world) == {"prefill": 2, "decode": 1}


async def test_a_plan_with_a_smaller_pool_ends_what_is_too_many() -> None:
    world = await started("models.m.decode.engines=3")
    await world.pools.apply(plan("models.m.decode.engines=2"))
    assert (await world.pools.exchanged()).ended == ("decode-2",)
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "ready"}


async def test_an_engine_that_is_stopped_as_it_starts_is_killed_and_its_failure_told() -> None:
    world = World()
    world.on_launch = lambda process: process.may_start.clear()
    await world.pools.apply(plan("engines.silence_s=0.01"))
    world.process("decode-0").stopped = True
    world.process("prefill-0").may_start.set()
    done = await world.pools.settled()
    [told] = done.failed
    assert told.startswith("engine decode-0 cannot start: its process was stopped for 0.0")
    assert world.made[1].calls == ["start", "kill"]


async def test_an_engine_that_was_stopped_while_there_was_no_manager_is_killed_by_the_next_one() -> None:
    world = await started("engines.silence_s=0.01")
    stopped = world.process("decode-0")
    stopped.may_start.clear()  # it answers nothing, whatever is asked
    stopped.answers.clear()
    stopped.stopped = True
    await next_manager(world)
    await world.until(lambda: len(world.made) == 3 and world.states()["decode-0"] == "ready")
    assert stopped.calls[-1] == "kill"


async def test_an_engine_that_dies_as_it_starts_under_another_manager_than_launched_it_is_replaced() -> None:
    world = await started(*TWO, "engines.restart_backoff_s=0.001")
    world.on_launch = lambda process: process.may_start.clear()
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: len(world.made) == 5)
    await next_manager(world)
    orphan = world.process("decode-0")
    orphan.start_error = EngineLost("killed")
    world.on_launch = lambda process: None
    orphan.may_start.set()
    await world.until(lambda: len(world.made) == 6 and world.states()["decode-0"] == "ready")


async def test_who_waits_for_a_start_is_told_of_it_by_a_restarted_manager_too() -> None:
    world = World()
    world.on_launch = lambda process: process.may_start.clear()
    await world.pools.apply(plan())
    await next_manager(world)
    settled = asyncio.create_task(world.pools.settled())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not settled.done()
    for process in world.made:
        process.may_start.set()
    assert {told.info.ref.engine_id for told in (await settled).started} == {"prefill-0", "decode-0"}


async def test_who_is_told_of_a_failure_finds_the_engine_dead() -> None:
    world = await started()
    failed: list[dict[str, str]] = []

    def fail(process: FakeProcess) -> None:
        process.start_error = StartupError("no weights")

    world.on_launch = fail
    await world.pools.apply(plan("models.m.decode.engines=2"))
    [life] = [life for life in world.pools._lives.values() if life.engine_id == "decode-1"]
    await life.settled.wait()
    failed.append(world.states())
    assert failed[0]["decode-1"] == "dead"


async def test_a_pool_that_could_not_grow_keeps_its_size_also_when_one_of_it_died_meanwhile() -> None:
    world = await started("models.m.decode.engines=2", "engines.restart_backoff_s=0.001")
    launched: list[FakeProcess] = []

    def hold(process: FakeProcess) -> None:
        process.may_start.clear()
        process.start_error = StartupError("no weights")
        launched.append(process)

    world.on_launch = hold
    growing = asyncio.create_task(world.pools.scale("m", Role.DECODE, 3))
    await world.until(lambda: len(launched) == 1)
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: len(launched) == 2)
    launched[0].may_start.set()
    assert (await growing).failed
    world.on_launch = lambda process: None
    launched[1].may_start.set()
    await world.until(lambda: sum(state == "ready" for state in world.states().values()) == 3)
    assert sizes(world)["decode"] == 2


async def test_an_engine_of_an_earlier_plan_whose_process_was_asked_to_end_ends() -> None:
    world = await started("engines.silence_s=0.01")

    def fail(process: FakeProcess) -> None:
        process.start_error = StartupError("no weights")

    world.on_launch = fail
    await world.pools.apply(plan("models.m.decode.kv.memory_mib=64", "engines.silence_s=0.01"))
    assert (await world.pools.settled()).failed
    old = world.process("decode-0")
    assert world.states()["decode-0"] == "ready", "its successor cannot start"
    old.asked = True
    await world.until(lambda: old.calls == ["start", "drain", "stop", "kill"])


async def test_a_decode_engine_that_is_to_prefill_needs_memory_for_its_ring() -> None:
    world = await started(*TWO)
    template = world.process("decode-1").spec
    ring = template.transfer.slots * template.transfer.slot_kib * 1024
    planned = world.pools._planned().memory
    world.memory = int((planned + ring / 2) * 1.05)
    with pytest.raises(StartupError, match="not enough memory"):
        await world.pools.set_role("decode-1", Role.PREFILL)
    assert world.states()["decode-1"] == "ready"
    world.memory = int((planned + 2 * ring) * 1.05)
    await world.pools.set_role("decode-1", Role.PREFILL)
    counted = world.pools._planned().memory
    assert counted == planned + ring
    await world.pools.set_role("decode-1", Role.DECODE)
    counted = world.pools._planned().memory
    assert counted == planned + ring, "memory that was used once is not given back"
    await next_manager(world)
    assert counted == world.pools._planned().memory


async def test_an_engine_with_less_room_than_the_decode_pool_promises_does_not_join_it() -> None:
    world = await started(*TWO)
    small = world.process("prefill-1")
    start = small.start

    async def less() -> object:
        told = await start()
        return dataclasses.replace(told, info=dataclasses.replace(told.info, max_context_tokens=50))

    small.start = less  # type: ignore[method-assign,assignment]
    member = next(m for m in world.manager.members() if m.engine_id == "prefill-1")
    assert member.info is not None
    world.manager.report_roles(dataclasses.replace(member.info, max_context_tokens=50))
    with pytest.raises(InvalidRequest, match="50 tokens"):
        await world.pools.set_role("prefill-1", Role.DECODE)
    assert world.states()["prefill-1"] == "ready"


async def test_a_death_without_a_reason_is_a_death() -> None:
    world = await started()
    world.process("decode-0").death.set_result("")
    await world.until(lambda: len(world.made) == 3 and world.states()["decode-0"] == "ready")
    assert world.memory > MIB


async def test_a_launch_that_fails_leaves_no_member_behind_and_is_tried_again() -> None:
    world = await started("engines.restart_backoff_s=0.001")
    failures = [True, True]

    def fail(process: FakeProcess) -> None:
        if failures:
            failures.pop()
            raise EngineLost("nobody takes the order")

    world.on_launch = fail
    world.process("decode-0").death.set_result("gone")
    await world.until(lambda: world.states().get("decode-0") == "ready")
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}
    failures.append(True)
    with pytest.raises(EngineLost):
        await world.pools.scale("m", Role.DECODE, 2)
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}
    assert sizes(world)["decode"] == 1


async def test_a_pool_that_shrinks_amid_the_replacement_of_an_asked_engine_keeps_one_that_serves() -> None:
    world = await started("models.m.decode.engines=2", "engines.silence_s=0.01")
    world.on_launch = lambda process: process.may_start.clear()
    world.process("decode-0").asked = True
    await world.until(lambda: "decode-2" in world.states())
    done = await world.pools.scale("m", Role.DECODE, 1)
    assert done.ended == ("decode-2",), "it served nobody yet"
    await world.until(lambda: "decode-0" not in world.states())
    assert world.states() == {"prefill-0": "ready", "decode-1": "ready"}
    assert world.process("decode-1").calls == ["start"]


async def test_an_asked_engine_serves_until_a_successor_does_that_can_start() -> None:
    world = await started("engines.silence_s=0.01")
    failures = [StartupError("no memory"), StartupError("no memory")]

    def fail(process: FakeProcess) -> None:
        if failures:
            process.start_error = failures.pop()
            assert world.process("decode-0").calls == ["start"]

    world.on_launch = fail
    world.process("decode-0").asked = True
    await world.until(lambda: "decode-0" not in world.states())
    ready = [name for name, state in world.states().items() if state == "ready"]
    assert len(ready) == 2
    assert not failures


async def test_growing_while_an_asked_engine_waits_for_its_turn_makes_none_too_many() -> None:
    world = await started("models.m.decode.engines=2", "engines.silence_s=0.01")
    async with world.pools._turn:
        world.process("decode-0").asked = True
        await world.until(lambda: len(world.pools.news(-1)) == 1)
        done = await world.pools.scale("m", Role.DECODE, 2)
        assert [engine.info.ref.engine_id for engine in done.started] == ["decode-2"]
    await world.until(lambda: "decode-0" not in world.states())
    assert sizes(world)["decode"] == 2
    assert sum(state == "ready" for state in world.states().values()) == 3
