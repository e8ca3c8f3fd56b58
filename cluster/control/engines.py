"""pools.EngineProcesses on Ray: every life of an engine is a named detached actor that Ray never restarts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray

from diptych.cluster.engine.actor import EngineActor
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import DiptychError, EngineLost, StartupError
from diptych.protos.status import EngineStatus
from diptych.protos.types import EngineId

from .gcs import NAMESPACE

_RETRY_S = 1.0
_CALL_TIMEOUT_S = 15.0

_T = TypeVar("_T")


def engine_actor_name(engine_id: EngineId, epoch: int) -> str:
    """The Ray name of one life of an engine."""
    return f"engine-{engine_id}-{epoch}"


class RayEngine:
    """pools.EngineProcess around an actor handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> EngineStarted:
        """See EngineActor.start."""
        try:
            return await self._answer(self._actor.start.remote())
        except ray.exceptions.RayTaskError as exc:
            cause = str(exc.cause) if isinstance(exc.cause, DiptychError) else repr(exc.cause)
            raise StartupError(cause, detail=str(exc)) from exc

    async def ended(self) -> str:
        """The cheapest death notice that Ray has: a call that returns after `stop` and fails when the process dies."""
        while True:
            try:
                await self._actor.wait_ended.remote()
                return "it was stopped"
            except ray.exceptions.ActorUnavailableError:  # Ray lost sight of it for a moment: no death
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayActorError as exc:
                return _cause(str(exc))

    async def status(self) -> EngineStatus:
        """See EngineActor.status."""
        return await self._answer(self._actor.status.remote())

    async def set_cores(self, cores: int) -> None:
        """See EngineActor.set_cores."""
        await self._answer(self._actor.set_cores.remote(cores))

    async def drain(self, grace_s: float) -> bool:
        """See Engine.drain."""
        return await self._answer(self._actor.drain.remote(grace_s))

    async def stop(self) -> None:
        """See EngineActor.stop."""
        try:
            await asyncio.wait_for(self._answer(self._actor.stop.remote()), _CALL_TIMEOUT_S)
        except TimeoutError as exc:
            raise EngineLost("the engine does not end") from exc

    def kill(self) -> None:
        """End the process."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor)

    async def _answer(self, reference: Awaitable[_T]) -> _T:
        try:
            return await reference
        except ray.exceptions.RayActorError as exc:
            raise EngineLost(_cause(str(exc))) from exc


class RayEngines:
    """Needs a process that is connected to Ray."""

    def launch(self, spec: EngineSpec) -> RayEngine:
        """Does not wait for the process; it says what goes wrong when it is asked to start."""
        # Unix sockets and shared memory are between processes of one machine: the one that the manager is on.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        return RayEngine(
            ray.remote(EngineActor)
            .options(
                name=engine_actor_name(spec.engine_id, spec.epoch),
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
                scheduling_strategy=here,
            )
            .remote(spec)
        )

    def find(self, engine_id: EngineId, epoch: int) -> RayEngine | None:
        """None when no such actor lives."""
        try:
            return RayEngine(ray.get_actor(engine_actor_name(engine_id, epoch), namespace=NAMESPACE))
        except ValueError:
            return None


def _cause(reason: str) -> str:
    """The telling part of what Ray says about a death."""
    words = " ".join(reason.split())
    _, found, detail = words.partition("Worker exit detail: ")
    return detail.split(". Some common causes")[0] if found else words[:300]
