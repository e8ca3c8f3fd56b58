"""Engines come and go: every life is watched, nothing is lost, nothing is started twice. Processes are fakes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.cluster.config import load_config
from diptych.cluster.control.manager import EngineState, PoolManager
from diptych.cluster.control.memory import MIB
from diptych.cluster.control.plan import ClusterPlan, plan_cluster
from diptych.cluster.control.pools import Pools
from diptych.cluster.control.restarts import Restarts, RestartTerms
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.cluster.models import ModelFacts, ModelFolder
from diptych.protos.errors import DiptychError, EngineLost, InvalidRequest, StartupError, UnknownModel
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

FACTS = ModelFacts(
    name="m",
    architecture="LlamaForCausalLM",
    layers=2,
    kv_heads=1,
    head_dim=8,
    vocab_size=100,
    max_context_tokens=512,
    weights_bytes=1,
    num_parameters=100,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="float32",
    chat_template=None,
)


class FakeStore(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value


class FakeProcess:
    """Starts at once unless held; the test lets it die or finish its requests."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.start_error: DiptychError | None = None
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.running = 0
        self.calls: list[str] = []
        self.cores = [spec.cores]
        self.pings = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = self.stopped = False

    async def start(self) -> EngineStarted:
        self.calls.append("start")
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        info = EngineInfo(
            ref=self.spec.ref,
            roles=self.spec.roles,
            model=self.spec.model,
            pid=1,
            host="h",
            block_tokens=16,
            num_blocks=10,
            max_context_tokens=100,
            dtype="float32",
        )
        return EngineStarted(info, ())

    async def ended(self) -> str:
        return await asyncio.shield(self.death)

    async def ping(self) -> bool:
        self.pings += 1
        await self.answers.wait()
        return self.asked

    def is_stopped(self) -> bool:
        return self.stopped

    async def status(self) -> EngineStatus:
        return EngineStatus(running=self.running)

    async def set_cores(self, cores: int) -> None:
        self.cores.append(cores)

    async def drain(self, grace_s: float) -> bool:
        self.calls.append("drain")
        try:
            async with asyncio.timeout(grace_s):
                await self.may_finish.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")


class World:
    """What outlives a manager: the store and the processes."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.made: list[FakeProcess] = []
        self.on_launch: Callable[[FakeProcess], None] = lambda process: None
        self.memory = 100_000 * MIB
        self.changes = 0
        self.begin()

    def begin(self) -> None:
        """A (new) life of the manager."""
        self.manager = PoolManager(self.store)
        self.pools = Pools(
            self.manager,
            self.store,
            self,
            available=lambda pids: (self.memory, "free memory of the machine"),
            changed=self.changed,
        )

    def changed(self) -> None:
        self.changes += 1

    def launch(self, spec: EngineSpec) -> FakeProcess:
        process = FakeProcess(spec)
        self.on_launch(process)
        self.made.append(process)
        return process

    def find(self, engine_id: EngineId, epoch: int) -> FakeProcess | None:
        for process in self.made:
            if (process.spec.engine_id, process.spec.epoch) == (engine_id, epoch) and "kill" not in process.calls:
                return process
        return None

    def process(self, engine_id: str) -> FakeProcess:
        [found] = [p for p in self.made if p.spec.engine_id == engine_id and "kill" not in p.calls]
        return found

    def states(self) -> dict[str, str]:
        return {member.engine_id: member.state.value for member in self.manager.members()}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - fakes tell nobody
                await asyncio.sleep(0)


def plan(*overrides: str, names: tuple[str, ...] = ("m",)) -> ClusterPlan:
    sources = [f"models.{name}.source=/{name}" for name in names]
    config = load_config(None, [*sources, *overrides])
    only = config.model_copy(update={"models": {name: config.models[name] for name in names}})
    folders = {name: ModelFolder(Path(f"/{name}"), dataclasses.replace(FACTS, name=name)) for name in names}
    return plan_cluster(only, folders, Path("/r"))


async def started(*overrides: str, names: tuple[str, ...] = ("m",)) -> World:
    world = World()
    await world.pools.apply(plan(*overrides, names=names))
    done = await world.pools.settled()
    assert not done.failed
    return world


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
    with pytest.raises(InvalidRequest, match="b has the layout colocated"):
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


# ---- engines that die, hang or are replaced ----


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
    with pytest.raises(InvalidRequest, match="b has the layout colocated"):
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
