"""Brings the engines of a cluster into being and takes them away again: one task per life, from launch to end.

    launch -> start -> ready -> (scale down) drain -> end -> forgotten
                 `-> failed         `-> died: dead, with a reason

The PoolManager actor is the shell around it; Ray is behind EngineProcesses. asyncio, one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pydantic import TypeAdapter

from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import EngineLost, Fenced, InvalidRequest, StartupError, UnknownModel
from diptych.protos.status import EngineStatus
from diptych.protos.types import EngineId, Role

from .manager import EngineState, KeyValue, Member, PoolManager
from .memory import Available, check_more
from .plan import ClusterPlan, Pool, cores_per_engine

_PLAN_KEY = "plan"
CALL_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class EngineProcess(Protocol):
    """One life of an engine. Every call raises EngineLost when the process is gone."""

    async def start(self) -> EngineStarted:
        """Load and listen; asking again gives the same answer. Raises StartupError when it cannot."""

    async def ended(self) -> str:
        """Returns when the process is gone or was stopped: why, in words."""

    async def status(self) -> EngineStatus:
        """A reading of the engine."""

    async def set_cores(self, cores: int) -> None:
        """Its share of the machine's cores has changed."""

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, wait for the running ones and their transfers. False: some were left."""

    async def stop(self) -> None:
        """End sessions and threads."""

    def kill(self) -> None:
        """End the process. Never raises."""


class EngineProcesses(Protocol):
    """Where engines run."""

    def launch(self, spec: EngineSpec) -> EngineProcess:
        """A new process; does not wait for it."""

    def find(self, engine_id: EngineId, epoch: int) -> EngineProcess | None:
        """The process of a life that another manager launched, or None when it is gone."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a change of pools did."""

    started: tuple[EngineStarted, ...] = ()
    failed: tuple[str, ...] = ()  # sentences
    ended: tuple[EngineId, ...] = ()


@dataclass(eq=False, slots=True)
class _Life:
    engine_id: EngineId
    epoch: int
    process: EngineProcess
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    grace_s: float = 0.0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # ready, or never going to be
    is_serving: bool = False  # it has been ready
    started: EngineStarted | None = None
    failure: str = ""
    task: asyncio.Task[None] | None = None


class Pools:
    """`changed` is called after every change that a router or a waiting caller may want to know of."""

    def __init__(
        self,
        manager: PoolManager,
        store: KeyValue,
        processes: EngineProcesses,
        *,
        available: Available,
        changed: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._store = store
        self._processes = processes
        self._available = available
        self._changed = changed
        self._lives: dict[EngineId, _Life] = {}
        self._latest: list[_Life] = []  # what the last `apply` launched or found
        self._lock = asyncio.Lock()
        self._adopted = False
        self._owner = ""
        self._plan: ClusterPlan | None = None  # as it was applied
        self._pools: dict[tuple[str, Role], Pool] = {}  # as it stands, with the sizes that `scale` set
        stored = store.get(_PLAN_KEY)
        if stored:
            self._owner, self._plan, pools = _kept_form().validate_json(stored)
            self._pools = {(pool.model, pool.role): pool for pool in pools}

    def adopt(self) -> None:
        """Watch again what an earlier life of the manager launched. In the event loop; repeating it does nothing."""
        if self._adopted:
            return
        self._adopted = True
        for member in self._manager.members():
            if member.state is EngineState.DEAD:
                continue
            process = self._processes.find(member.engine_id, member.epoch)
            if process is None:
                self._manager.report_dead(member.engine_id, member.epoch, "it ended while nobody watched")
                continue
            life = self._watch(member.engine_id, member.epoch, process)
            life.is_serving = member.state is not EngineState.STARTING
            if member.state is EngineState.DRAINING and self._plan is not None:
                self._send_away(life, self._plan.drain_grace_s)

    async def apply(self, plan: ClusterPlan, owner: str = "") -> None:
        """Make the pools be `plan`'s; returns when missing engines are launched, see `settled`.

        The plan that was applied last changes no sizes. Engines of pools that are gone or different are drained first.
        `owner` is who may `release` the pools.
        """
        self.adopt()
        async with self._lock:
            self._owner = owner
            if plan != self._plan:
                old, self._plan = self._pools, plan
                self._pools = {(pool.model, pool.role): pool for pool in plan.pools}
                stale = [
                    k for k, pool in old.items() if k not in self._pools or self._pools[k].template != pool.template
                ]
                leaving = [self._send_away(self._lives[m.engine_id]) for k in stale for m in self._present(*k)]
                await _end_of(leaving)
            self._keep()
            for pool in self._pools.values():
                for _ in range(pool.engines - len(self._present(pool.model, pool.role))):
                    self._launch(pool)
            self._latest = list(self._lives.values())

    async def settled(self) -> Scaled:
        """Returns when every engine of the plan that was applied last is ready or has failed."""
        lives = self._latest
        await asyncio.gather(*(life.settled.wait() for life in lives))
        return _told(lives)

    async def scale(self, model: str, role: Role, engines: int) -> Scaled:
        """Change the size of one pool; returns when new engines are ready and dismissed ones have ended.

        New engines that cannot start are told in `failed`, and the pool keeps what it has. Raises UnknownModel,
        InvalidRequest for a size that would lose requests, StartupError when the memory does not suffice.
        """
        self.adopt()
        async with self._lock:
            pool = self._pool(model, role)
            if engines < 0 or (engines == 0 and role is Role.DECODE):
                raise InvalidRequest(
                    f"the decode pool of {model} needs at least 1 engine, or its requests would have nowhere to go; "
                    "to serve the model no more, take it out of the configuration",
                    role.value,
                )
            present = self._present(model, role)
            more = engines - len(present)
            if more > 0:
                check_more(pool.template, more, self._planned(), self._pids(), self._available)
            self._pools[model, role] = replace(pool, engines=engines)
            self._keep()
            if more > 0:
                await self._share_cores()
            launched = [self._launch(pool) for _ in range(more)]
            dismissed = [self._lives[member.engine_id] for member in await self._least_loaded(present, -more)]
            leaving = [self._send_away(life) for life in dismissed]
        await _end_of(leaving)
        await asyncio.gather(*(life.settled.wait() for life in launched))
        done = _told(launched)
        async with self._lock:
            if done.failed:
                self._pools[model, role] = replace(pool, engines=len(self._present(model, role)))
                self._keep()
            if done.failed or dismissed:
                await self._share_cores()
        return replace(done, ended=tuple(life.engine_id for life in dismissed))

    async def release(self, owner: str, grace_s: float) -> bool:
        """End all engines, if the pools still belong to `owner`. False: somebody else applied a plan since."""
        self.adopt()
        if self._plan is not None and owner != self._owner:
            return False
        async with self._lock:
            self._plan, self._pools = None, {}
            self._keep()
            await _end_of([self._send_away(life, grace_s) for life in list(self._lives.values())])
        return True

    # ---- one life ----

    def _launch(self, pool: Pool) -> _Life:
        engine_id = self._manager.free_id(pool.role)
        epoch = self._manager.register(engine_id, pool.template.roles, pool.model)
        total = sum(p.engines for p in self._pools.values())
        spec = replace(pool.template, engine_id=engine_id, epoch=epoch, cores=cores_per_engine(total))
        return self._watch(engine_id, epoch, self._processes.launch(spec))

    def _watch(self, engine_id: EngineId, epoch: int, process: EngineProcess) -> _Life:
        life = _Life(engine_id, epoch, process)
        self._lives[engine_id] = life
        life.task = asyncio.create_task(self._live(life), name=f"life of {engine_id}-{epoch}")
        return life

    def _send_away(self, life: _Life, grace_s: float | None = None) -> asyncio.Task[None]:
        life.grace_s = grace_s if grace_s is not None else self._plan.drain_grace_s if self._plan is not None else 0.0
        life.leave.set()
        assert life.task is not None
        return life.task

    async def _live(self, life: _Life) -> None:
        leave = asyncio.create_task(life.leave.wait())
        work = asyncio.create_task(self._run(life))
        try:
            await asyncio.wait({leave, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                fault = work.exception()
                reason = work.result() if fault is None else repr(fault)
                if self._manager.report_dead(life.engine_id, life.epoch, reason):
                    log.warning("engine %s, epoch %d, is dead: %s", life.engine_id, life.epoch, reason)
            else:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                life.failure = "" if life.is_serving else f"engine {life.engine_id} was sent away before it was ready"
                await self._dismiss(life)
        finally:
            for task in (leave, work):
                task.cancel()
            life.process.kill()
            life.settled.set()
            if self._lives.get(life.engine_id) is life:
                del self._lives[life.engine_id]
            self._changed()

    async def _run(self, life: _Life) -> str:
        """From launch to an end that nobody asked for: the reason."""
        timeout_s = self._plan.start_timeout_s if self._plan is not None else None
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for, which may lose a cancellation (Python 3.11)
                started = await life.process.start()
        except TimeoutError:
            life.failure = (
                f"engine {life.engine_id} was not ready within {timeout_s:g} s; on a slow machine raise "
                "ray.engine_timeout_s"
            )
        except StartupError as error:
            life.failure = f"engine {life.engine_id} cannot start: {error}"
        except EngineLost as error:
            life.failure = (
                f"the process of engine {life.engine_id} ended while it started, most likely for lack of memory: "
                f"{error}"
            )
        if life.failure:
            life.settled.set()
            return life.failure
        with contextlib.suppress(Fenced):  # an adopted one is ready already
            self._manager.report_ready(started.info)
        life.started, life.is_serving = started, True
        life.settled.set()
        self._changed()
        return await life.process.ended()

    async def _dismiss(self, life: _Life) -> None:
        """The end that was asked for. What still runs after the grace ends with the sessions; routers retry it."""
        with contextlib.suppress(Fenced):
            self._manager.report_draining(life.engine_id, life.epoch)
        self._changed()
        with contextlib.suppress(EngineLost):
            if life.is_serving:
                if not await life.process.drain(life.grace_s):
                    log.warning("engine %s still had requests after %g s", life.engine_id, life.grace_s)
                await life.process.stop()
        self._manager.report_left(life.engine_id, life.epoch)

    # ---- what there is ----

    async def _share_cores(self) -> None:
        """Tell the engines that serve how many cores each has now: more threads than cores is slower than fewer."""
        cores = cores_per_engine(sum(pool.engines for pool in self._pools.values()))
        serving = [life for life in self._lives.values() if life.is_serving and not life.leave.is_set()]
        with contextlib.suppress(TimeoutError):  # one that is gone or hangs is its own task's business
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await asyncio.gather(*(life.process.set_cores(cores) for life in serving), return_exceptions=True)

    def _pool(self, model: str, role: Role) -> Pool:
        if model not in {name for name, _ in self._pools}:
            names = ", ".join(sorted({name for name, _ in self._pools}))
            raise UnknownModel(f"the model {model} is not served; served here: {names or 'none'}", "model")
        if (model, role) not in self._pools:
            raise InvalidRequest(f"{model} has the layout colocated, which has no {role} pool", role.value)
        return self._pools[model, role]

    def _present(self, model: str, role: Role) -> list[Member]:
        """Engines of a pool that serve or are about to."""
        return [
            member
            for member in self._manager.members()
            if member.model == model
            and role in member.roles
            and member.state in (EngineState.STARTING, EngineState.READY)
            and (life := self._lives.get(member.engine_id)) is not None
            and not life.leave.is_set()
        ]

    async def _least_loaded(self, members: list[Member], count: int) -> list[Member]:
        """Those whose end disturbs least: still starting, then with the fewest requests, then the youngest."""
        if count <= 0:
            return []
        loads = await asyncio.gather(*(self._load(member) for member in members))
        order = sorted(zip(loads, members, strict=True), key=lambda pair: (pair[0], -pair[1].epoch))
        return [member for _, member in order[:count]]

    async def _load(self, member: Member) -> int:
        if member.state is EngineState.STARTING:
            return -1
        try:
            status = await asyncio.wait_for(self._lives[member.engine_id].process.status(), CALL_TIMEOUT_S)
        except (TimeoutError, EngineLost, KeyError):
            return -1
        return status.running + status.waiting

    def _planned(self) -> list[EngineSpec]:
        return [
            replace(pool.template, engine_id=member.engine_id)
            for pool in self._pools.values()
            for member in self._present(pool.model, pool.role)
        ]

    def _pids(self) -> list[int]:
        return [info.pid for info in self._manager.engines() if not info.draining]

    def _keep(self) -> None:
        kept = (self._owner, self._plan, tuple(self._pools.values()))
        self._store.put(_PLAN_KEY, _kept_form().dump_json(kept))


@functools.cache
def _kept_form() -> TypeAdapter[tuple[str, ClusterPlan | None, tuple[Pool, ...]]]:
    """JSON, so that what lies in the store is data whoever wrote it."""
    return TypeAdapter(tuple[str, ClusterPlan | None, tuple[Pool, ...]])


async def _end_of(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Not gather, which would cancel the tasks, and so kill their engines, when the caller goes away."""
    if tasks:
        await asyncio.wait(tasks)


def _told(lives: list[_Life]) -> Scaled:
    return Scaled(
        started=tuple(life.started for life in lives if life.started is not None),
        failed=tuple(life.failure for life in lives if life.failure),
    )
