"""Prefill and decode engines of the echo model, a router and its HTTP listener in this process, without Ray.

Echo tokens hash all KV that was read: one altered byte changes the answer, or is the token BAD.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx2
from pair import raise_failure
from rest import at_rest

from diptych.cluster.api.app import create_app
from diptych.cluster.api.listener import Listener, start_listener
from diptych.cluster.api.served import ServedModel
from diptych.cluster.batches.runner import BatchRunner
from diptych.cluster.config import ModelSettings, RouterSettings, SecuritySettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.cluster.security import engine_name, trust_of
from diptych.cluster.store.testing import temporary_store
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import DecodeSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.status import EngineInfo
from diptych.protos.trust import ROUTER, Trust
from diptych.protos.types import GENERATING, EngineId, EngineRef, PoolCounts, Role

ECHO = "echo"
SETTINGS = ModelSettings(
    source=ECHO,
    kv=KvSettings(memory_mib=2, block_tokens=16),
    prefill=PrefillSettings(step_tokens=32, threads=1),
    decode=DecodeSettings(step_tokens=32, threads=1),
)
WAIT_S = 30
ONE_EACH = dict.fromkeys(GENERATING, 1)


@dataclass
class SmallCluster:
    """Running; made by `small_cluster`. `engines` and `refs` are the first of each role; `alive` are all."""

    engines: dict[Role, Engine]
    refs: dict[Role, EngineRef]
    router: Router
    listener: Listener
    secret: bytes
    alive: dict[EngineRef, Engine]
    directory: StaticDirectory
    begin: Callable[[Role, int, int], Awaitable[Engine]]
    infos: dict[EngineRef, EngineInfo]

    async def kill(self, ref: EngineRef) -> None:
        """Cut its connections in mid-frame, as the death of its process does; it is a member until `replace`."""
        engine = self.alive.pop(ref)
        await asyncio.to_thread(engine._asyncio_thread.call, engine._server.stop(None), WAIT_S)
        await asyncio.to_thread(engine.stop)

    async def replace(self, ref: EngineRef) -> None:
        """Start the next life of a killed engine and tell the router of it."""
        role, number = ref.engine_id.split("-")
        del self.infos[ref]
        await self.begin(Role(role), int(number), ref.epoch + 1)
        self.directory.set(list(self.infos.values()))

    async def answer(self, prompt: str) -> list[int]:
        """The generated tokens of one greedy completion over HTTP; 429, 503 and the like are assertions."""
        body = {"model": ECHO, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0}
        async with httpx2.AsyncClient() as client:
            reply = await client.post(f"{self.listener.url}/v1/completions", json=body, timeout=WAIT_S)
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        return [int(word.removeprefix("t")) for word in str(choice["text"]).split()]

    async def at_rest(self) -> dict[EngineRef, PoolCounts]:
        """The pools of the live engines once all of them are at rest."""
        readings = await at_rest(self.alive.values(), WAIT_S)
        return {ref: reading.blocks for ref, reading in zip(self.alive, readings, strict=True)}

    def count(self, role: Role, name: str) -> float:
        """A counter of an engine."""
        return self.engines[role].status().counters[name]

    async def metric(self, name: str) -> float:
        """The sum over all series of one metric of the router's page."""
        async with httpx2.AsyncClient() as client:
            page = (await client.get(f"{self.listener.url}/metrics")).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name}{{"))


@asynccontextmanager
async def small_cluster(
    run_dir: Path,
    cache_dir: Path,
    *,
    transport: Literal["auto", "shm", "grpc"] = "shm",
    host: str | None = None,
    security: SecuritySettings | None = None,
    trust: Callable[[str], Trust] | None = None,
    num: Mapping[Role, int] = ONE_EACH,
    settings: ModelSettings = SETTINGS,
    faults: FaultSettings | None = None,
) -> AsyncIterator[SmallCluster]:
    """`trust` makes each process's by its name; without it all share one secret and the files of `security`. `num`
    engines of each role, which all have `faults`.
    """
    folder = await asyncio.to_thread(resolve, ECHO, cache_dir)
    security, secret = security or SecuritySettings(), os.urandom(32)

    def own(name: str) -> Trust:
        return trust(name) if trust is not None else trust_of(security, secret, name)

    async with AsyncExitStack() as stack:
        alive: dict[EngineRef, Engine] = {}
        infos: dict[EngineRef, EngineInfo] = {}

        async def begin(role: Role, number: int, epoch: int) -> Engine:
            name = EngineId(f"{role.value}-{number}")
            spec = replace(_spec(folder, run_dir, role, transport), engine_id=name, epoch=epoch, settings=settings)
            spec = replace(spec, host=host, security=security, faults=faults or FaultSettings())
            engine = Engine(spec, on_failure=raise_failure, trust=own(engine_name(spec.roles)))
            info = (await asyncio.to_thread(engine.start)).info
            alive[info.ref], infos[info.ref] = engine, info
            return engine

        async def end() -> None:
            for engine in alive.values():
                await asyncio.to_thread(engine.stop)

        stack.push_async_callback(end)
        for role, count in num.items():
            for number in range(count):
                await begin(role, number, 5)
        directory = StaticDirectory(list(infos.values()))
        limits = RouterSettings().limits
        router = Router(directory=directory, settings=RouterSettings(), trust=own(ROUTER))
        await router.start()
        stack.push_async_callback(router.stop)
        store = await stack.enter_async_context(temporary_store(router.metrics))
        models = [ServedModel.load(ECHO, folder, max_context_tokens=None, seed=None)]
        app = create_app(router, models, store=store)
        stack.push_async_callback(app.state.background.stop)
        batches = BatchRunner(router, models, store)
        await batches.start()
        stack.push_async_callback(batches.stop)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=limits, metrics=router.metrics)
        stack.push_async_callback(listener.stop, 0.2)
        refs = {role: next(ref for ref in infos if ref.engine_id == f"{role.value}-0") for role in num}
        engines = {role: alive[ref] for role, ref in refs.items()}
        yield SmallCluster(engines, refs, router, listener, secret, alive, directory, begin, infos)


async def connected(cluster: SmallCluster) -> SmallCluster:
    """Once the router has a session to all engines."""
    async with asyncio.timeout(WAIT_S):
        while sum(session.is_ready for session in cluster.router.view.sessions()) < len(cluster.alive):  # noqa: ASYNC110  the view tells nobody
            await asyncio.sleep(0.01)
    return cluster


def _spec(folder: ModelFolder, run_dir: Path, role: Role, transport: str) -> EngineSpec:
    return EngineSpec(
        engine_id=EngineId(f"{role.value}-0"),
        epoch=5,
        roles=frozenset({role}),
        model=ECHO,
        settings=SETTINGS,
        transfer=TransferSettings.model_validate({"transport": transport, "slot_kib": 64, "slots": 4}),
        folder=folder.path,
        facts=folder.facts,
        dtype="float32",
        run_dir=run_dir,
        cores=1,
    )
