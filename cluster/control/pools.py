"""The engines of a cluster: brings them into being, starts others in place of those that die, takes them away again.

life.py is the course of a single one. The PoolManager actor is the shell around it; Ray is behind EngineProcesses.
asyncio, one event loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from diptych.cluster.engine.spec import EngineStarted
from diptych.protos.errors import EngineLost, Fenced, InvalidRequest, StartupError, UnknownModel
from diptych.protos.status import EngineInfo
from diptych.protos.types import ANSWERING, EngineId, Role

from .kept import keep, read_kept
from .life import Course, EngineProcesses, Life
from .manager import EngineState, KeyValue, Member, PoolManager
from .memory import Available
from .plan import ClusterPlan, Pool, cores_per_engine
from .restarts import Restarts
from .room import Room, Taken
from .scaled import Scaled, told

CALL_TIMEOUT_S = 5.0
SUCCESSORS = 3  # are tried before an engine that was asked to end goes without one
_NEWS_KEPT = 64

log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def _nobody_reads(version: int) -> None:
    pass


async def _nothing_fails(engine_id: EngineId, report: str) -> None:
    pass


class Pools:
    """`changed` is called after every change that a router or a waiting caller may want to know of; `known` returns
    when the routers have read that version of the membership; `reporting` is awaited before an engine is reported ready
    or draining, and may raise EngineLost.
    """

    def __init__(
        self,
        manager: PoolManager,
        store: KeyValue,
        processes: EngineProcesses,
        *,
        available: Available,
        changed: Callable[[], None],
        known: Callable[[int], Awaitable[None]] = _nobody_reads,
        reporting: Callable[[EngineId, str], Awaitable[None]] = _nothing_fails,
    ) -> None:
        self._manager = manager
        self._store = store
        self._processes = processes
        self._room = Room(manager, available, processes)
        self._changed = changed
        self._known = known
        self._course = Course(
            manager=manager,
            changed=changed,
            known=known,
            reporting=reporting,
            died=self._died,
            asked=self._asked,
        )
        self._restarts = Restarts()
        self._lives: dict[EngineId, Life] = {}
        self._latest: list[Life] = []  # what the last `apply` launched or found
        self._stale: list[Life] = []  # what it found of earlier plans
        self._exchange: asyncio.Task[None] | None = None  # one after the other in place of those
        self._relief: asyncio.Task[None] | None = None  # or all of those when their successors serve
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = asyncio.Lock()  # for moments
        self._turn = asyncio.Lock()  # one engine after the other is replaced
        self._adopted = False
        self._plan: ClusterPlan | None  # as it was applied; the pools as they stand
        self._owner, self._plan, pools = read_kept(store)
        self._pools = {(pool.model, pool.role): pool for pool in pools}
        self._news: collections.deque[tuple[int, str]] = collections.deque(maxlen=_NEWS_KEPT)
        self._num_news = manager.version  # larger in each life of the manager

    def adopt(self) -> None:
        """Watch again what an earlier life of the manager launched. In the event loop; repeating it does nothing."""
        if self._adopted:
            return
        self._adopted = True
        for member in self._manager.members():
            if member.state is EngineState.DEAD:
                continue
            info = member.info
            process = self._processes.find(member.engine_id, member.epoch, None if info is None else info.pid)
            if process is None:
                self._manager.report_dead(member.engine_id, member.epoch, "it ended while nobody watched")
                continue
            key = self._key_of(member.model, member.roles)
            # A replacement: whoever launched it is not told by this manager when it cannot start.
            life = self._watch(Life(member.engine_id, member.epoch, key, process, is_replacement=True))
            if info is not None:
                life.is_serving, life.started = True, EngineStarted(info, ())
            if member.state is EngineState.DRAINING and self._plan is not None:
                life.send_away(self._plan.drain_grace_s)
        self._latest = list(self._lives.values())
        if self._plan is not None:
            self._go_on(self._even_out())

    async def apply(self, plan: ClusterPlan, owner: str | None = None) -> None:
        """Make the pools be `plan`'s; returns when missing engines are launched, see `settled`.

        The plan that was applied last changes no sizes. Engines of pools that are gone or different serve until their
        successors do, where the memory holds both; else they are replaced one after the other.
        `owner` is who may `release` the pools from now on; None: who might so far.
        """
        self.adopt()
        if owner is not None:
            self._owner = owner  # at once: a release in work must not end what comes now
        async with self._lock:
            if plan != self._plan:
                old, self._plan = self._pools, plan
                self._pools = {(pool.model, pool.role): pool for pool in plan.pools}
                for life in self._lives.values():
                    before, now = old.get(life.pool), self._pools.get(life.pool)
                    life.is_stale |= before is None or now is None or before.template != now.template
                for pool, missing in self._missing():
                    if missing < 0:  # the youngest of a pool that became smaller go like those of one that is gone
                        for member in sorted(self._present(pool.model, pool.role), key=lambda m: m.epoch)[missing:]:
                            self._lives[member.engine_id].is_stale = True
            self._keep()
            self._stale = stale = [life for life in self._lives.values() if life.is_stale and not life.leave.is_set()]
            self._exchange = self._relief = None
            if stale and not self._room.holds(self._missing(), self._planned()):  # beside the stale ones
                self._exchange = self._go_on(self._exchange_each(stale))
            else:
                self._launch_missing()
                if stale:
                    self._relief = self._go_on(self._relieve(stale, list(self._lives.values())))
            self._latest = [life for life in self._lives.values() if not life.is_stale]

    async def settled(self) -> Scaled:
        """Returns when every engine of the plan that was applied last is ready or has failed."""
        if self._exchange is not None:
            await asyncio.wait({self._exchange})
        lives = self._latest
        await asyncio.gather(*(life.settled.wait() for life in lives))
        return told(lives)

    async def exchanged(self) -> Scaled:
        """`settled`, when those of earlier plans have ended too. They stay when a successor cannot start."""
        done = await self.settled()
        if self._relief is not None:
            await asyncio.wait({self._relief})
        ended = tuple(life.engine_id for life in self._stale if life.task is not None and life.task.done())
        return replace(done, ended=ended)

    async def scale(self, model: str, role: Role, engines: int) -> Scaled:
        """Change the size of one pool; returns when new engines are ready and dismissed ones have ended.

        New engines that cannot start are told in `failed`, and the pool keeps what it has. Raises UnknownModel,
        InvalidRequest for a size that would lose requests, StartupError when the memory does not suffice.
        """
        self.adopt()
        async with self._lock:
            pool = self._pool(model, role)
            if engines < 0 or (engines == 0 and role in ANSWERING):
                raise InvalidRequest(
                    f"the {role} pool of {model} needs at least 1 engine, or its requests would have nowhere to go; "
                    "to serve the model no more, take it out of the configuration",
                    role.value,
                )
            plan, present = self._plan, self._staying(model, role)
            more = engines - len(present)
            if more > 0:
                self._check_more(pool, more)
            self._pools[model, role] = replace(pool, engines=engines)
            self._keep()
            if more > 0:
                await self._share_cores()
            launched: list[Life] = []
            try:
                launched.extend(self._launch(pool) for _ in range(more))
            except EngineLost:
                self._pools[model, role] = replace(pool, engines=max(pool.engines, len(present) + len(launched)))
                self._keep()
                raise
            dismissed = [self._lives[member.engine_id] for member in await self._least_loaded(present, -more)]
            leaving = [self._send_away(life) for life in dismissed]
        await _end_of(leaving)
        await asyncio.gather(*(life.settled.wait() for life in launched))
        done = told(launched)
        async with self._lock:
            failed = sum(bool(life.failure) and not life.leave.is_set() for life in launched)
            if failed and plan is self._plan:
                now = self._pools[model, role]
                self._pools[model, role] = replace(now, engines=now.engines - failed)
                self._keep()
            if done.failed or dismissed:
                await self._share_cores()
        return replace(done, ended=tuple(life.engine_id for life in dismissed))

    async def restart(self, model: str | None = None, role: Role | None = None, until: int | None = None) -> Scaled:
        """Replace every engine, of one model or role where they are given, one after the other. With `until` only those
        of this epoch or an earlier one: asked twice, each is replaced once.

        The old one goes when the new one serves and the routers know. Ends at the first that cannot be replaced:
        `failed` says why. Raises UnknownModel, InvalidRequest where there is no such pool.
        """
        self.adopt()
        done = Scaled()
        async with self._turn:
            present = [m for key in self._keys(model, role) for m in self._present(*key)]
            for life in [self._lives[m.engine_id] for m in present if until is None or m.epoch <= until]:
                done += await self._replace(life)
                if done.failed:
                    break
        self._fill_gaps()
        return done

    async def set_role(self, name: str, role: Role) -> EngineInfo:
        """Move an engine that serves to the other pool of its model; the model is not loaded again.

        It takes no new requests meanwhile; running ones get the time that a drain has, and routers go on elsewhere with
        what is left. Raises InvalidRequest for an engine that does not serve, that cannot have the role, holds too
        little KV for it, or without which no decode engine is left, StartupError without memory for what the role
        uses, EngineLost when it ends meanwhile.
        """
        self.adopt()
        # A caller that goes away must not leave the engine between two roles.
        return await asyncio.shield(self._go_on(self._set_role(name, role)))

    async def _set_role(self, name: str, role: Role) -> EngineInfo:
        async with self._turn:
            async with self._lock:
                life, info = self._serving(name)
                pool, target = self._pools[life.pool], self._pool(info.model, role)
                if pool is target:
                    return info
                if pool.role is Role.DECODE and len(self._present(*life.pool)) == 1:
                    raise InvalidRequest(f"{name} is the last decode engine of {info.model}", "engine")
                self._check_role(life, info, role)
                plan = self._plan
                self._pools[life.pool] = replace(pool, engines=pool.engines - 1)
                self._manager.report_draining(life.engine_id, life.epoch)
                self._changed()
            try:
                await self._known(self._manager.version)
                info = await life.set_roles(
                    frozenset({role}), self._plan.drain_grace_s if self._plan is not None else 0.0
                )
            finally:
                # Whatever came of it: it takes orders of the roles that it has now, if it lives and stays.
                async with self._lock:
                    self._settle_role(life, info, plan)
        return info

    def _check_role(self, life: Life, info: EngineInfo, role: Role) -> None:
        self._room.check_role(life, role, self._pools[life.pool], self._planned())
        members = {member.engine_id: member.info for member in self._present(info.model, role)}
        least = min((one.max_context_tokens for one in members.values() if one is not None), default=0)
        if role is Role.DECODE and info.max_context_tokens < least:  # answers in work may need what is promised now
            raise InvalidRequest(
                f"{life.engine_id} has KV for {info.max_context_tokens} tokens of a request, and the decode pool of "
                f"{info.model} takes requests of {least}",
                "engine",
            )

    def _serving(self, name: str) -> tuple[Life, EngineInfo]:
        life = self._lives.get(EngineId(name))
        member = next((m for m in self._manager.members() if m.engine_id == name), None)
        is_ready = member is not None and member.state is EngineState.READY
        if life is None or life.leave.is_set() or life.is_stale or not is_ready:
            ready = sorted(m.engine_id for m in self._manager.members() if m.state is EngineState.READY)
            raise InvalidRequest(f"no engine {name} is ready; ready here: {', '.join(ready) or 'none'}", "engine")
        assert member is not None
        assert member.info is not None
        return life, member.info

    def _settle_role(self, life: Life, info: EngineInfo, plan: ClusterPlan | None) -> None:
        """`plan`: as it was when the pool that the engine left became smaller."""
        key = self._key_of(info.model, info.roles)
        if key in self._pools and not life.leave.is_set():
            life.pool = key
            if plan is self._plan:
                self._pools[key] = replace(self._pools[key], engines=self._pools[key].engines + 1)
                self._keep()
            else:  # the present one says how large the pools are
                self._go_on(self._even_out())
            with contextlib.suppress(Fenced):  # it died meanwhile: its pool lacks one
                self._manager.report_roles(replace(info, draining=False))
        self._changed()
        self._fill_gaps()

    async def release(self, owner: str, grace_s: float) -> bool:
        """End all engines, if the pools belong to `owner`. False: somebody else applied a plan, also meanwhile."""
        self.adopt()
        async with self._lock:
            if not self._belong_to(owner):
                return False
            self._plan, self._pools = None, {}
            self._keep()
            await _end_of([life.send_away(grace_s) for life in list(self._lives.values())])
        return self._belong_to(owner)

    def _belong_to(self, owner: str) -> bool:
        return owner == self._owner or (self._plan is None and not self._owner)

    def news(self, after: int) -> list[tuple[int, str]]:
        """Numbered sentences about engines that died and came back, those with a number above `after`."""
        return [(number, sentence) for number, sentence in self._news if number > after]

    # ---- one life ----

    def _launch(self, pool: Pool, name: EngineId | None = None, *, is_replacement: bool = False) -> Life:
        engine_id = name or self._manager.free_id(pool.role)
        epoch = self._manager.register(engine_id, pool.template.roles, pool.model)
        total = sum(p.engines for p in self._pools.values())
        spec = replace(pool.template, engine_id=engine_id, epoch=epoch, cores=cores_per_engine(total))
        try:
            process = self._processes.launch(spec)
        except EngineLost:
            self._manager.report_left(engine_id, epoch)
            raise
        key = (pool.model, pool.role)
        return self._watch(Life(engine_id, epoch, key, process, is_replacement=is_replacement))

    def _watch(self, life: Life) -> Life:
        self._lives[life.engine_id] = life
        life.task = asyncio.create_task(self._live(life), name=f"life of {life.engine_id}-{life.epoch}")
        return life

    def _send_away(self, life: Life) -> asyncio.Task[None]:
        return life.send_away(self._plan.drain_grace_s if self._plan is not None else 0.0)

    async def _live(self, life: Life) -> None:
        plan = self._plan
        try:
            await self._course.live(
                life,
                start_timeout_s=plan.start_timeout_s if plan is not None else None,
                silence_s=plan.silence_s if plan is not None else math.inf,
            )
        finally:
            if self._lives.get(life.engine_id) is life:
                del self._lives[life.engine_id]

    def _died(self, life: Life, reason: str) -> None:
        sentence = f"engine {life.engine_id} (epoch {life.epoch}) died: {reason.rstrip('.')}. "
        if self._plan is None or life.pool not in self._pools or not (life.is_serving or life.is_replacement):
            return  # whoever launched it is told
        if not self._plan.restarts.enabled:
            self._tell(sentence + "Its pool goes on without it: engines.restart is off; `diptych scale` starts another")
            return
        wait_s = self._delay(life.engine_id, life.ready_at)
        self._tell(sentence + f"Another one starts {f'in {wait_s:.1f} s' if wait_s else 'at once'}")
        self._go_on(self._refill(life.pool, life.engine_id, wait_s))

    def _delay(self, name: EngineId, ready_at: float | None) -> float:
        assert self._plan is not None
        now = asyncio.get_running_loop().time()
        return self._restarts.delay(name, now - ready_at if ready_at else 0.0, now, self._plan.restarts)

    async def _refill(self, key: tuple[str, Role], name: EngineId, wait_s: float) -> None:
        """After `wait_s`, another engine for a pool that lacks one: by the name of the dead one, if it is free."""
        while True:
            await asyncio.sleep(wait_s)
            async with self._lock:
                pool = self._pools.get(key)
                if self._plan is None or pool is None or len(self._present(*key)) >= pool.engines:
                    return
                is_free = all(m.state is EngineState.DEAD for m in self._manager.members() if m.engine_id == name)
                try:
                    self._check_more(pool, 1)
                    life = self._launch(pool, name if is_free else None, is_replacement=True)
                    break
                except (StartupError, EngineLost) as error:
                    wait_s = self._delay(name, None)
                    self._tell(f"engine {name} is not started again, the next try is in {wait_s:.1f} s: {error}")
        await life.settled.wait()
        if not life.failure:
            self._tell(f"engine {life.engine_id} serves again, in epoch {life.epoch}")

    def _asked(self, life: Life) -> None:
        """Its process was asked to end, not by us."""
        if self._plan is None or life.leave.is_set():
            return
        life.is_asked = True
        self._tell(f"engine {life.engine_id} (epoch {life.epoch}) was asked to end: another one takes its place first")
        self._go_on(self._replace_asked(life))

    async def _replace_asked(self, life: Life) -> None:
        async with self._turn:
            done = await self._replace(life, must_end=True)
        for sentence in done.failed:
            self._tell(sentence)
        self._fill_gaps()

    async def _replace(self, life: Life, *, must_end: bool = False) -> Scaled:
        """Another engine in place of one that serves, before it ends where the memory holds both.

        Where it does not, the last decode engine of a pool is left alone, unless it `must_end`.
        """
        fresh: Life | None = None
        async with self._lock:
            pool = self._pools.get(life.pool)
            if pool is None or life.is_stale or life.leave.is_set() or self._lives.get(life.engine_id) is not life:
                if must_end and self._lives.get(life.engine_id) is life:
                    self._send_away(life)  # of an earlier plan: its successors come with the present one
                return Scaled()  # it goes, or is gone: what takes its place is new
            staying = [member.engine_id for member in self._staying(*life.pool) if member.engine_id != life.engine_id]
            try:
                if must_end and len(staying) >= pool.engines:  # one that `scale` asked for is there already
                    fresh = self._lives[staying[-1]]
                else:
                    self._check_more(pool, 1)
                    fresh = self._launch(pool)
            except StartupError as error:
                if not must_end and pool.role in ANSWERING and len(self._present(*life.pool)) == 1:
                    return Scaled(failed=(f"engine {life.engine_id} stays, it is the only one of its pool: {error}",))
                leaving = self._send_away(life)
        if fresh is None:
            await _end_of([leaving])
            fresh = await self._launch_one(life.pool)
            if fresh is None:
                return Scaled(ended=(life.engine_id,))
            await fresh.settled.wait()
            return replace(told([fresh]), ended=(life.engine_id,))
        await fresh.settled.wait()
        if fresh.failure and not must_end:
            return told([fresh])
        for _ in range(SUCCESSORS - 1):
            async with self._lock:  # what was to take its place may be among those that `scale` dismissed
                pool = self._pools.get(life.pool)
                serve = any(member.state is EngineState.READY for member in self._staying(*life.pool))
                if pool is None or serve or not fresh.failure:
                    break
                fresh = self._launch(pool)
            await fresh.settled.wait()
        await self._known(self._manager.version)
        await _end_of([self._send_away(life)])
        return replace(told([fresh]), ended=(life.engine_id,))

    async def _launch_one(self, key: tuple[str, Role]) -> Life | None:
        """One more, if the pool lacks any."""
        async with self._lock:
            pool = self._pools.get(key)
            if pool is None or len(self._present(*key)) >= pool.engines:
                return None
            life = self._launch(pool, is_replacement=True)
            self._latest.append(life)
            return life

    # ---- many lives ----

    def _launch_missing(self) -> None:
        for pool in self._pools.values():
            for _ in range(pool.engines - len(self._present(pool.model, pool.role))):
                self._launch(pool)

    def _fill_gaps(self) -> None:
        """What died while a pool had one more than it needed was not replaced then."""
        if self._plan is None or not self._plan.restarts.enabled:
            return
        for key, pool in self._pools.items():
            for _ in range(pool.engines - len(self._present(*key))):
                self._go_on(self._refill(key, self._manager.free_id(pool.role), 0.0))

    async def _relieve(self, stale: Sequence[Life], lives: Sequence[Life]) -> None:
        """Stale engines end when all others serve; if one cannot start they stay."""
        fresh = [life for life in lives if not life.is_stale]
        await asyncio.gather(*(life.settled.wait() for life in fresh))
        if any(life.failure for life in fresh):
            return
        await self._known(self._manager.version)
        await _end_of([self._send_away(life) for life in stale])

    async def _exchange_each(self, stale: Sequence[Life]) -> None:
        """Without memory for both: those of pools that are gone end, the others one after the other."""
        await _end_of([self._send_away(life) for life in stale if life.pool not in self._pools])
        for life in stale:
            if life.pool in self._pools:
                await _end_of([self._send_away(life)])
                if (fresh := await self._launch_one(life.pool)) is not None:
                    await fresh.settled.wait()
        for key, pool in list(self._pools.items()):
            for _ in range(pool.engines - len(self._present(*key))):
                await self._launch_one(key)

    async def _even_out(self) -> None:
        """After an earlier manager ended amid a change: the oldest beyond a pool's size go, what is missing comes."""
        lives = list(self._lives.values())
        await asyncio.gather(*(life.settled.wait() for life in lives))
        async with self._lock:
            for life in lives:
                if life.pool not in self._pools and not life.leave.is_set():
                    self._send_away(life)
            for key, pool in self._pools.items():
                present = sorted(self._present(*key), key=lambda member: member.epoch)
                for member in present[: max(len(present) - pool.engines, 0)]:
                    self._send_away(self._lives[member.engine_id])
        self._fill_gaps()

    # ---- what there is ----

    def _go_on(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop keeps no strong reference
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self, sentence: str) -> None:
        log.warning("%s", sentence)
        self._num_news += 1
        self._news.append((self._num_news, sentence))
        self._changed()

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
            pools = " and ".join(sorted(own for name, own in self._pools if name == model))
            raise InvalidRequest(f"{model} has no {role} pool; it has {pools}", role.value)
        return self._pools[model, role]

    def _keys(self, model: str | None, role: Role | None) -> list[tuple[str, Role]]:
        if model is not None:  # _pool raises where there is none
            self._pool(model, role or next((own for name, own in self._pools if name == model), Role.DECODE))
        return [key for key in self._pools if model in (None, key[0]) and role in (None, key[1])]

    def _key_of(self, model: str, roles: Collection[Role]) -> tuple[str, Role]:
        """An engine of both roles belongs to the pool that there is."""
        keys = [(model, role) for role in sorted(roles)]
        return next((key for key in keys if key in self._pools), keys[0])

    def _present(self, model: str, role: Role) -> list[Member]:
        """Engines of a pool that serve or are about to."""
        return [
            member
            for member in self._manager.members()
            if member.state in (EngineState.STARTING, EngineState.READY)
            and (life := self._lives.get(member.engine_id)) is not None
            and life.pool == (model, role)
            and not (life.leave.is_set() or life.is_stale)
        ]

    def _staying(self, model: str, role: Role) -> list[Member]:
        """The same without those whose processes were asked to end: the youngest last."""
        present = (member for member in self._present(model, role) if not self._lives[member.engine_id].is_asked)
        return sorted(present, key=lambda member: member.epoch)

    async def _least_loaded(self, members: list[Member], count: int) -> list[Member]:
        """Those whose end disturbs least: still starting, then with the fewest requests, then the youngest."""
        if count <= 0:
            return []
        loads = await asyncio.gather(*(self._lives[member.engine_id].load() for member in members))
        order = sorted(zip(loads, members, strict=True), key=lambda pair: (pair[0], -pair[1].epoch))
        return [member for _, member in order[:count]]

    def _check_more(self, pool: Pool, count: int) -> None:
        self._room.check(pool, count, self._planned())

    def _planned(self) -> Taken:
        return self._room.planned(self._lives.values(), self._pools)

    def _missing(self) -> list[tuple[Pool, int]]:
        return [(pool, pool.engines - len(self._present(*key))) for key, pool in self._pools.items()]

    def _keep(self) -> None:
        keep(self._store, (self._owner, self._plan, tuple(self._pools.values())))


async def _end_of(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Not gather, which would cancel the tasks, and so kill their engines, when the caller goes away."""
    if tasks:
        await asyncio.wait(tasks)
