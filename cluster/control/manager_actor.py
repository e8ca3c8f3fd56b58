"""The Ray shell of the PoolManager: a named detached actor that watches engines, and the routers' long poll on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import ray
from ray.experimental import internal_kv

from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, Role

from .manager import EngineState, Member, PoolManager

NAMESPACE = "diptych"
MANAGER_NAME = "pool-manager"
POLL_S = 10.0  # a long poll returns after this long at the latest

log = logging.getLogger(__name__)


def engine_actor_name(engine_id: EngineId, epoch: int) -> str:
    """The Ray name of one life of an engine."""
    return f"engine-{engine_id}-{epoch}"


class GcsStore:
    """manager.KeyValue in Ray's global control store: it outlives the actor, not the cluster."""

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Durable when it returns."""
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)


class PoolManagerActor:
    """One per cluster. A restarted one adopts the engines that its store knows."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._manager = PoolManager(GcsStore())
        self._changed = asyncio.Event()
        self._watches: dict[tuple[EngineId, int], asyncio.Task[None]] = {}
        for member in self._manager.members():
            if member.state is not EngineState.DEAD:
                self._watch(member.engine_id, member.epoch)

    async def register(self, engine_id: EngineId, roles: frozenset[Role], model: str) -> int:
        """See PoolManager.register."""
        return self._manager.register(engine_id, roles, model)

    async def report_ready(self, info: EngineInfo) -> None:
        """The engine is ready; from now on it is watched."""
        self._manager.report_ready(info)
        self._watch(info.ref.engine_id, info.ref.epoch)
        self._wake()

    async def report_draining(self, engine_id: EngineId, epoch: int) -> None:
        """See PoolManager.report_draining."""
        self._manager.report_draining(engine_id, epoch)
        self._wake()

    async def report_dead(self, engine_id: EngineId, epoch: int, reason: str) -> None:
        """See PoolManager.report_dead."""
        if self._manager.report_dead(engine_id, epoch, reason):
            log.warning("engine %s, epoch %d, is dead: %s", engine_id, epoch, reason)
            self._wake()

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        """The engines that take requests, and the version of that list."""
        return self._manager.version, self._manager.ready()

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        """`engines()` as soon as its version is newer, or after POLL_S."""
        if self._manager.version <= version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), POLL_S)
        return await self.engines()

    async def members(self) -> list[Member]:
        """All known engines, the dead ones included."""
        return self._manager.members()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _watch(self, engine_id: EngineId, epoch: int) -> None:
        self._watches[engine_id, epoch] = asyncio.get_running_loop().create_task(self._until_end(engine_id, epoch))

    async def _until_end(self, engine_id: EngineId, epoch: int) -> None:
        reason = "it was stopped"
        try:
            actor = ray.get_actor(engine_actor_name(engine_id, epoch), namespace=NAMESPACE)
            await actor.wait_ended.remote()
        except (ray.exceptions.RayActorError, ValueError) as exc:
            reason = " ".join(str(exc).split())
        await self.report_dead(engine_id, epoch, reason)
        del self._watches[engine_id, epoch]
