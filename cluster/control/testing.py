"""Fakes around Pools: engine processes that a test starts, holds, stops and lets die, and what outlives a manager."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from diptych.cluster.config import load_config
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.cluster.models import ModelFacts, ModelFolder
from diptych.protos.errors import DiptychError
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

from .cards import Card, Cards
from .manager import PoolManager
from .memory import MIB
from .plan import ClusterPlan, plan_cluster
from .pools import Pools

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
    """A store in memory."""

    def put(self, key: str, value: bytes) -> None:
        """As KeyValue."""
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
        """When `may_start` is set; raises `start_error`."""
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
        """When the test sets `death`."""
        return await asyncio.shield(self.death)

    async def ping(self) -> bool:
        """While `answers` is set: whether it was `asked` to end."""
        self.pings += 1
        await self.answers.wait()
        return self.asked

    def is_stopped(self) -> bool:
        """As the test says."""
        return self.stopped

    async def status(self) -> EngineStatus:
        """`running` requests."""
        return EngineStatus(running=self.running)

    async def set_cores(self, cores: int) -> None:
        """Kept in `cores`."""
        self.cores.append(cores)

    async def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        """At once."""
        return dataclasses.replace((await self.start()).info, roles=roles)

    async def drain(self, grace_s: float) -> bool:
        """Until `may_finish` is set."""
        self.calls.append("drain")
        try:
            async with asyncio.timeout(grace_s):
                await self.may_finish.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Kept in `calls`, as every call of consequence."""
        self.calls.append("stop")

    def kill(self) -> None:
        """It is found no more."""
        self.calls.append("kill")


class World:
    """What outlives a manager: the store and the processes."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.made: list[FakeProcess] = []
        self.on_launch: Callable[[FakeProcess], None] = lambda process: None
        self.memory = 100_000 * MIB
        self.gpus = 0.0
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
        """Counts."""
        self.changes += 1

    def launch(self, spec: EngineSpec) -> FakeProcess:
        """As EngineProcesses; `on_launch` sees the process first."""
        process = FakeProcess(spec)
        self.on_launch(process)
        self.made.append(process)
        return process

    def find(self, engine_id: EngineId, epoch: int, pid: int | None = None) -> FakeProcess | None:
        """As EngineProcesses."""
        for process in self.made:
            if (process.spec.engine_id, process.spec.epoch) == (engine_id, epoch) and "kill" not in process.calls:
                return process
        return None

    def num_gpus(self) -> float:
        """As EngineProcesses."""
        return self.gpus

    def process(self, engine_id: str) -> FakeProcess:
        """The one of that name that lives."""
        [found] = [p for p in self.made if p.spec.engine_id == engine_id and "kill" not in p.calls]
        return found

    def states(self) -> dict[str, str]:
        """Of all members, by name."""
        return {member.engine_id: member.state.value for member in self.manager.members()}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets everything run until the condition holds; raises TimeoutError after 10 s."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - fakes tell nobody
                await asyncio.sleep(0)


def plan(*overrides: str, names: tuple[str, ...] = ("m",), num_cards: int = 0) -> ClusterPlan:
    """Of echo-sized models by `names`; `overrides` are those of a configuration. On a machine with so many cards."""
    sources = [f"models.{name}.source=/{name}" for name in names]
    config = load_config(None, [*sources, *overrides])
    only = config.model_copy(update={"models": {name: config.models[name] for name in names}})
    folders = {name: ModelFolder(Path(f"/{name}"), dataclasses.replace(FACTS, name=name)) for name in names}
    return plan_cluster(only, folders, Path("/r"), present=Cards((Card("fake"),) * num_cards, why_none="it is a test"))


async def started(*overrides: str, names: tuple[str, ...] = ("m",)) -> World:
    """Pools of such a plan whose engines are all ready."""
    world = World()
    await world.pools.apply(plan(*overrides, names=names))
    done = await world.pools.settled()
    assert not done.failed
    return world
