"""pools.EngineProcesses on Ray: every life of an engine is a named detached actor that Ray never restarts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import psutil
import ray

from diptych.cluster.engine.actor import EngineActor
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import DiptychError, EngineLost, StartupError
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

from .gcs import NAMESPACE

_RETRY_S = 1.0
_CALL_TIMEOUT_S = 15.0
# A held call ends by itself, so that a manager that is no more holds no thread of the engine for ever.
_HOLD_S = 20.0
# Threads of their own in the engine: calls that take long there must not keep these waiting.
_GROUPS = {"hold": 4, "ping": 2}

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

_T = TypeVar("_T")


def engine_actor_name(engine_id: EngineId, epoch: int) -> str:
    """The Ray name of one life of an engine."""
    return f"engine-{engine_id}-{epoch}"


class RayEngine:
    """pools.EngineProcess around an actor handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._os_process: psutil.Process | None = None  # once it has said which it is

    async def start(self) -> EngineStarted:
        """See EngineActor.start."""
        try:
            started: EngineStarted = await self._answer(self._actor.start.remote())
            with contextlib.suppress(psutil.Error):
                self._os_process = psutil.Process(started.info.pid)
            return started
        except ray.exceptions.RayTaskError as exc:
            cause = str(exc.cause) if isinstance(exc.cause, DiptychError) else repr(exc.cause)
            raise StartupError(cause, detail=str(exc)) from exc

    async def ended(self) -> str:
        """The cheapest death notice that Ray has: a call that returns after `stop` and fails when the process dies."""
        while True:
            try:
                if await self._actor.wait_ended.options(concurrency_group="hold").remote(_HOLD_S):
                    return "it was stopped"
            except ray.exceptions.ActorUnavailableError:  # Ray lost sight of it for a moment: no death
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayActorError as exc:
                return _cause(str(exc))

    async def ping(self) -> bool:
        """See EngineActor.ping."""
        while True:
            try:
                return bool(await self._actor.ping.options(concurrency_group="ping").remote())
            except ray.exceptions.ActorUnavailableError:  # no answer, and no death
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayActorError as exc:
                raise EngineLost(_cause(str(exc))) from exc

    def is_stopped(self) -> bool:
        """As the kernel says of this life's process."""
        try:
            return self._os_process is not None and self._os_process.status() in _STOPPED
        except psutil.Error:
            return False

    async def status(self) -> EngineStatus:
        """See EngineActor.status."""
        return await self._answer(self._actor.status.remote())

    async def set_cores(self, cores: int) -> None:
        """See EngineActor.set_cores."""
        await self._answer(self._actor.set_cores.remote(cores))

    async def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        """See EngineActor.set_roles."""
        try:
            return await self._answer(self._actor.set_roles.remote(roles, grace_s))
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, DiptychError):
                raise exc.cause from exc
            raise

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
        """End the process: by Ray, or by the kernel where it is stopped and does not hear Ray."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor)
        if self._os_process is not None and self.is_stopped():
            with contextlib.suppress(psutil.Error):  # which tells a later process of the same number by its start
                self._os_process.send_signal(signal.SIGKILL)

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
            cast("Any", ray.remote)(concurrency_groups=_GROUPS)(EngineActor)
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
