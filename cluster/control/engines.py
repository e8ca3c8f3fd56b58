"""Starts, watches and ends the engine actors of one cluster, on behalf of the PoolManager. Needs a driver on Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import Any, cast

import ray

from diptych.cluster.engine.actor import EngineActor
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import DiptychError, StartupError

from .manager_actor import MANAGER_NAME, NAMESPACE, PoolManagerActor, engine_actor_name

_CALL_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class _Launched:
    spec: EngineSpec
    actor: Any  # Ray's handles are typed by generics that no stub of ours fills
    started: Any


class EngineFleet:
    """The manager actor and all engines that this process started."""

    def __init__(self) -> None:
        self._manager: Any = (
            cast("Any", ray.remote(PoolManagerActor))
            .options(
                name=MANAGER_NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=1000,
            )
            .remote()
        )
        ray.get(self._manager.members.remote(), timeout=_CALL_TIMEOUT_S)
        self._engines: list[_Launched] = []

    def launch(self, spec: EngineSpec) -> None:
        """Begin a new life of an engine: a fresh epoch, a fresh process. Does not wait for it."""
        register = self._manager.register.remote(spec.engine_id, spec.roles, spec.model)
        spec = dataclasses.replace(spec, epoch=ray.get(register, timeout=_CALL_TIMEOUT_S))
        actor: Any = (
            ray.remote(EngineActor)
            .options(
                name=engine_actor_name(spec.engine_id, spec.epoch),
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
            )
            .remote(spec)
        )
        self._engines.append(_Launched(spec, actor, actor.start.remote()))

    def wait_ready(self, timeout_s: float) -> list[EngineStarted]:
        """Until every launched engine is ready and the manager knows it, in order of launch. Raises StartupError."""
        deadline = time.monotonic() + timeout_s
        ready = []
        for engine in self._engines:
            started = self._wait_started(engine, max(deadline - time.monotonic(), 0.1), timeout_s)
            ray.get(self._manager.report_ready.remote(started.info), timeout=_CALL_TIMEOUT_S)
            ready.append(started)
        return ready

    def changes(self, version: int) -> Any:
        """A reference that resolves to (version, engines) when the membership is newer than `version`."""
        return self._manager.wait_change.remote(version)

    def obituaries(self) -> list[str]:
        """A sentence for each engine that has died."""
        members = ray.get(self._manager.members.remote(), timeout=_CALL_TIMEOUT_S)
        return [
            f"engine {m.engine_id} (epoch {m.epoch}) died: {_cause(m.reason)}" for m in members if m.state == "dead"
        ]

    def stop(self) -> None:
        """End engines and manager by handle. Never raises: whatever is left ends with Ray."""
        for engine in self._engines:
            with contextlib.suppress(ray.exceptions.RayError):
                self._manager.report_draining.remote(engine.spec.engine_id, engine.spec.epoch)
        for stopping in [engine.actor.stop.remote() for engine in self._engines]:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(stopping, timeout=_CALL_TIMEOUT_S)
        for actor in [*(engine.actor for engine in self._engines), self._manager]:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def _wait_started(self, engine: _Launched, timeout_s: float, whole_s: float) -> EngineStarted:
        engine_id = engine.spec.engine_id
        try:
            started: EngineStarted = ray.get(engine.started, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as exc:
            raise StartupError(
                f"engine {engine_id} was not ready within {whole_s:g} s; on a slow machine raise ray.engine_timeout_s"
            ) from exc
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, DiptychError):
                raise StartupError(f"engine {engine_id} cannot start: {exc.cause}") from exc
            raise StartupError(f"engine {engine_id} cannot start: {exc.cause!r}", detail=str(exc)) from exc
        except ray.exceptions.RayActorError as exc:
            raise StartupError(
                f"the process of engine {engine_id} ended while it started, most likely for lack of memory: "
                f"{' '.join(str(exc).split())[:400]}"
            ) from exc
        return started


def _cause(reason: str) -> str:
    """The telling part of what Ray says about a death."""
    _, found, detail = reason.partition("Worker exit detail: ")
    return detail.split(". Some common causes")[0] if found else reason[:200]
