"""pools.EngineProcesses on Ray: every life of an engine is a named detached actor that Ray never restarts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar, cast

import psutil
import ray

from diptych.cluster.engine.actor import EngineActor
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import DiptychError, EngineLost, StartupError
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

from .gcs import NAMESPACE
from .plan import num_gpus

_RETRY_S = 1.0
_CALL_TIMEOUT_S = 15.0
# A held call ends by itself, so that a manager that is no more holds no thread of the engine for ever.
_HOLD_S = 20.0
_ROUNDING = 1e-6  # of parts of a card that add up to a whole
# Threads of their own in the engine: calls that take long there must not keep these waiting.
_GROUPS = {"hold": 4, "ping": 2}

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

_T = TypeVar("_T")


def engine_actor_name(engine_id: EngineId, epoch: int) -> str:
    """The Ray name of one life of an engine."""
    return f"engine-{engine_id}-{epoch}"


class RayEngine:
    """pools.EngineProcess around an actor handle."""

    def __init__(self, actor: Any, os_process: psutil.Process | None = None) -> None:
        self._actor = actor
        self._os_process = os_process  # else once it has said which it is

    async def start(self) -> EngineStarted:
        """See EngineActor.start."""
        while True:
            try:
                if self._os_process is None:  # asked first: what loads for minutes may be stopped meanwhile
                    with contextlib.suppress(psutil.Error):
                        self._os_process = psutil.Process(await self._actor.pid.remote())
                return cast("EngineStarted", await self._actor.start.remote())
            except ray.exceptions.RayTaskError as exc:
                cause = str(exc.cause) if isinstance(exc.cause, DiptychError) else repr(exc.cause)
                raise StartupError(cause, detail=str(exc)) from exc
            except ray.exceptions.ActorUnavailableError:  # Ray lost sight of it for a moment: asking again is harmless
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayActorError as exc:
                raise EngineLost(_cause(str(exc))) from exc

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
        return await self._answer(self._actor.set_roles.remote(roles, grace_s))

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
        """Raises EngineLost, and what of the project's own errors the engine raised."""
        try:
            return await reference
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, DiptychError):
                raise exc.cause from exc
            raise EngineLost(f"the engine failed: {exc.cause!r}", detail=str(exc)) from exc
        except ray.exceptions.RayActorError as exc:
            raise EngineLost(_cause(str(exc))) from exc


class RayEngines:
    """Needs a process that is connected to Ray."""

    def launch(self, spec: EngineSpec) -> RayEngine:
        """Does not wait for the process; it says what goes wrong when it is asked to start. Raises EngineLost."""
        try:
            return self._launch(spec)
        except ray.exceptions.RayError as exc:
            raise EngineLost("Ray makes no process for an engine now", detail=str(exc)) from exc

    def _launch(self, spec: EngineSpec) -> RayEngine:
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
                num_gpus=num_gpus([spec]),
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
                scheduling_strategy=here,
            )
            .remote(spec)
        )

    def find(self, engine_id: EngineId, epoch: int, pid: int | None = None) -> RayEngine | None:
        """None when no such actor lives. One that was stopped can be killed by its `pid` alone."""
        try:
            actor = ray.get_actor(engine_actor_name(engine_id, epoch), namespace=NAMESPACE)
        except ValueError:
            return None
        return RayEngine(actor, None if pid is None else _engine_process(pid))

    def num_gpus(self) -> float:
        """See EngineProcesses."""
        return ray_gpus()


def ray_gpus() -> float:
    """Cards of the Ray cluster that this process is connected to, whoever has them."""
    return float(cast("Any", ray).cluster_resources().get("GPU", 0.0))


def free_resources() -> Mapping[str, float]:
    """What that cluster has that nobody holds now."""
    return cast("Mapping[str, float]", cast("Any", ray).available_resources())


def check_gpus(specs: Sequence[EngineSpec], free: Mapping[str, float]) -> None:
    """StartupError where engines want more cards than `free`, a Ray cluster's resources: Ray would let them wait."""
    wanted, have = num_gpus(specs), free.get("GPU", 0.0)
    if wanted <= have + _ROUNDING:
        return
    there = ", ".join(f"{name} {free[name]:g}" for name in ("CPU", "GPU") if name in free) or "nothing"
    raise StartupError(
        f"the engines take {wanted:g} GPU{'s' if wanted != 1 else ''} of Ray, and it has {have:g} free (it says: "
        f"{there}). Start its nodes with `ray start --num-gpus N`, end what holds its cards, or set "
        "models.NAME.device: cpu"
    )


def _engine_process(pid: int) -> psutil.Process | None:
    """None when no engine lives under that number (any more)."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if "".join(process.cmdline()[:1]).startswith(f"ray::{EngineActor.__name__}"):  # the title that Ray gives it
            return process
    return None


def _cause(reason: str) -> str:
    """The telling part of what Ray says about a death."""
    words = " ".join(reason.split())
    _, found, detail = words.partition("Worker exit detail: ")
    return detail.split(". Some common causes")[0] if found else words[:300]
