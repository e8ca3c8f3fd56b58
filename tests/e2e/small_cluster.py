"""A prefill and a decode engine of the echo model, a router and its HTTP listener in this process, without Ray.

Echo tokens hash all KV that was read: one altered byte changes the answer, or is the token BAD.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx2
from pair import FixedDirectory, raise_failure

from diptych.cluster.api.app import create_app
from diptych.cluster.api.listener import Listener, start_listener
from diptych.cluster.api.served import ServedModel
from diptych.cluster.config import ModelSettings, RouterSettings, SecuritySettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.router.router import Router
from diptych.cluster.security import engine_name, trust_of
from diptych.protos.settings import DecodeSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.trust import ROUTER, Trust
from diptych.protos.types import EngineId, EngineRef, PoolCounts, Role

ECHO = "echo"
SETTINGS = ModelSettings(
    source=ECHO,
    kv=KvSettings(memory_mib=2, block_tokens=16),
    prefill=PrefillSettings(step_tokens=32, threads=1),
    decode=DecodeSettings(step_tokens=32, threads=1),
)
WAIT_S = 30


@dataclass
class SmallCluster:
    """Running; made by `small_cluster`."""

    engines: dict[Role, Engine]
    refs: dict[Role, EngineRef]
    router: Router
    listener: Listener
    secret: bytes

    async def answer(self, prompt: str) -> list[int]:
        """The generated tokens of one greedy completion over HTTP; 429, 503 and the like are assertions."""
        body = {"model": ECHO, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0}
        async with httpx2.AsyncClient() as client:
            reply = await client.post(f"{self.listener.url}/v1/completions", json=body, timeout=WAIT_S)
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        return [int(word.removeprefix("t")) for word in str(choice["text"]).split()]

    async def at_rest(self) -> dict[Role, PoolCounts]:
        """The pools once nothing runs, waits or is transferred."""
        async with asyncio.timeout(WAIT_S):
            while True:
                readings = {role: engine.status() for role, engine in self.engines.items()}
                if not any(r.running or r.waiting or r.transfers or r.ring_slots_busy for r in readings.values()):
                    return {role: reading.blocks for role, reading in readings.items()}
                await asyncio.sleep(0.01)

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
) -> AsyncIterator[SmallCluster]:
    """`trust` makes each process's by its name; without it all share one secret and the files of `security`."""
    folder = await asyncio.to_thread(resolve, ECHO, cache_dir)
    security, secret = security or SecuritySettings(), os.urandom(32)

    def own(name: str) -> Trust:
        return trust(name) if trust is not None else trust_of(security, secret, name)

    async with AsyncExitStack() as stack:
        engines: dict[Role, Engine] = {}
        infos = []
        for role in Role:
            spec = replace(_spec(folder, run_dir, role, transport), host=host, security=security)
            engine = Engine(spec, on_failure=raise_failure, trust=own(engine_name(spec.roles)))
            infos.append((await asyncio.to_thread(engine.start)).info)
            stack.push_async_callback(asyncio.to_thread, engine.stop)
            engines[role] = engine
        settings = RouterSettings()
        router = Router(directory=FixedDirectory(infos), settings=settings, trust=own(ROUTER))
        await router.start()
        stack.push_async_callback(router.stop)
        app = create_app(router, [ServedModel.load(ECHO, folder, max_context_tokens=None, seed=None)])
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits, metrics=router.metrics)
        stack.push_async_callback(listener.stop, 0.2)
        refs = {role: info.ref for role, info in zip(Role, infos, strict=True)}
        yield SmallCluster(engines, refs, router, listener, secret)


async def connected(cluster: SmallCluster) -> SmallCluster:
    """Once the router has a session to both engines."""
    async with asyncio.timeout(WAIT_S):
        while not all(cluster.router.view.live(ECHO, role) for role in Role):  # noqa: ASYNC110  the view tells nobody
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
