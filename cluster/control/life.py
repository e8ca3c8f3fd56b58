"""One life of an engine, from its launch to its end: what is asked of its process, and how long each answer may take.

launch -> start -> ready -> (sent away) drain -> stop -> end
             `-> failed   `-> died, or killed because it hung
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.protos.errors import DiptychError, EngineLost, Fenced, InvalidRequest, StartupError
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

from .manager import PoolManager
from .watchdog import Watched, watch, watch_held

ANSWER_MARGIN_S = 5.0  # beyond what a call may take by itself: the process hangs

log = logging.getLogger(__name__)


class EngineProcess(Watched, Protocol):
    """One life of an engine. Every call raises EngineLost when the process is gone."""

    async def start(self) -> EngineStarted:
        """Load and listen; asking again gives the same answer. Raises StartupError when it cannot."""

    async def ended(self) -> str:
        """Returns when the process is gone or was stopped: why, in words."""

    async def status(self) -> EngineStatus:
        """A reading of the engine."""

    async def set_cores(self, cores: int) -> None:
        """Its share of the machine's cores has changed."""

    async def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        """Other roles with the same model in memory; what a leaving role has not ended by then ends with EngineLost.

        Raises InvalidRequest for roles that the engine was not made for.
        """

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, wait for the running ones and their transfers. False: some were left."""

    async def stop(self) -> None:
        """End sessions and threads."""

    def kill(self) -> None:
        """End the process, also one that is stopped. Never raises."""


class EngineProcesses(Protocol):
    """Where engines run."""

    def launch(self, spec: EngineSpec) -> EngineProcess:
        """A new process; does not wait for it. Raises EngineLost when nobody takes the order."""

    def find(self, engine_id: EngineId, epoch: int, pid: int | None = None) -> EngineProcess | None:
        """The process of a life that another manager launched, `pid` if it said so, or None when it is gone."""

    def num_gpus(self) -> float:
        """Cards there, whoever has them."""


@dataclass(eq=False, slots=True)
class Life:
    """`pool` is the model and the role that it was launched for."""

    engine_id: EngineId
    epoch: int
    pool: tuple[str, Role]
    process: EngineProcess
    is_replacement: bool = False  # of one that died: it is replaced in turn, even if it never served
    is_asked: bool = False  # somebody else told its process to end: it goes when another serves
    is_stale: bool = False  # of a plan that is no more: it serves until its successors do
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    grace_s: float = 0.0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # ready, or never going to be
    is_serving: bool = False  # it has been ready
    ready_at: float | None = None  # on the event loop's clock
    started: EngineStarted | None = None
    failure: str = ""
    task: asyncio.Task[None] | None = None

    async def load(self) -> int:
        """Requests that it has; -1 before it serves and when it does not answer."""
        if not self.is_serving:
            return -1
        try:
            status = await asyncio.wait_for(self.process.status(), ANSWER_MARGIN_S)
        except (TimeoutError, EngineLost):
            return -1
        return status.running + status.waiting

    async def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        """See EngineProcess.set_roles. Raises EngineLost, too, when the process hangs or fails: it may take orders of
        neither role then, and is killed.
        """
        try:
            async with asyncio.timeout(grace_s + ANSWER_MARGIN_S):
                return await self.process.set_roles(roles, grace_s)
        except InvalidRequest:  # refused before anything changed
            raise
        except (TimeoutError, DiptychError) as exc:
            self.process.kill()
            what = f"failed: {exc}" if isinstance(exc, DiptychError) else "hung"
            raise EngineLost(f"engine {self.engine_id} {what} while its role changed") from exc

    def send_away(self, grace_s: float) -> asyncio.Task[None]:
        """Let it finish its requests within `grace_s` and end; the task that is over when it has ended."""
        self.grace_s = grace_s
        self.leave.set()
        assert self.task is not None
        return self.task


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the lives of a cluster have in common. Called in the event loop."""

    manager: PoolManager
    changed: Callable[[], None]
    known: Callable[[int], Awaitable[None]]  # returns when the routers have read that version of the membership
    reporting: Callable[[EngineId, str], Awaitable[None]]  # before it is told that an engine is ready or draining
    died: Callable[[Life, str], None]  # unasked, with the reason; after the manager knows
    asked: Callable[[Life], None]  # the process was asked to end

    async def live(self, life: Life, *, start_timeout_s: float | None, silence_s: float) -> None:
        """To its end, whatever that is."""
        leave = asyncio.create_task(life.leave.wait())
        work = asyncio.create_task(self._run(life, start_timeout_s, silence_s))
        reason = ""
        try:
            await asyncio.wait({leave, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                fault = work.exception()
                reason = (work.result() if fault is None else repr(fault)) or "nobody says why"
                if not (life.is_serving or life.failure):
                    life.failure = f"engine {life.engine_id} cannot start: {reason}"
                if self.manager.report_dead(life.engine_id, life.epoch, reason):
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
            if reason:
                self.died(life, reason)
            self.changed()

    async def _run(self, life: Life, start_timeout_s: float | None, silence_s: float) -> str:
        """From launch to an end that nobody asked for: the reason."""
        if life.started is None:
            failure = await self._start(life, start_timeout_s, silence_s)
            if failure:
                life.failure = failure  # `live` tells when the manager knows that it is dead
                return failure
        life.is_serving, life.ready_at = True, asyncio.get_running_loop().time()
        life.settled.set()
        self.changed()
        return await self._serve(life, silence_s)

    async def _start(self, life: Life, start_timeout_s: float | None, silence_s: float) -> str:
        """Until it is ready: why it never will be, or nothing."""
        start = asyncio.ensure_future(life.process.start())
        held = asyncio.ensure_future(watch_held(life.process, silence_s=silence_s))
        try:
            async with asyncio.timeout(start_timeout_s):  # not wait_for, which may lose a cancellation (Python 3.11)
                await asyncio.wait({start, held}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                raise StartupError(held.result())
            started = start.result()
            await self.reporting(life.engine_id, "ready")
        except TimeoutError:
            return (
                f"engine {life.engine_id} was not ready within {start_timeout_s:g} s; on a slow machine raise "
                "ray.engine_timeout_s"
            )
        except StartupError as error:
            return f"engine {life.engine_id} cannot start: {error}"
        except EngineLost as error:
            return (
                f"the process of engine {life.engine_id} ended while it started, most likely for lack of memory: "
                f"{error}"
            )
        finally:
            start.cancel()
            held.cancel()
            await asyncio.gather(start, held, return_exceptions=True)
        with contextlib.suppress(Fenced):  # one that was begun under another manager may be ready already
            self.manager.report_ready(started.info)
        life.started = started
        return ""

    async def _serve(self, life: Life, silence_s: float) -> str:
        """Until the process ends or hangs."""
        ended = asyncio.ensure_future(life.process.ended())
        hung = asyncio.ensure_future(watch(life.process, silence_s=silence_s, on_asked=lambda: self.asked(life)))
        try:
            await asyncio.wait({ended, hung}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else hung.result()
        except EngineLost as error:
            return str(error)
        finally:
            ended.cancel()
            hung.cancel()
            await asyncio.gather(ended, hung, return_exceptions=True)

    async def _dismiss(self, life: Life) -> None:
        """The end that was asked for. What still runs after the grace ends with the sessions; routers move it."""
        try:
            await self.reporting(life.engine_id, "draining")
            with contextlib.suppress(Fenced):
                self.manager.report_draining(life.engine_id, life.epoch)
            self.changed()
            if life.is_serving:
                if life.grace_s:  # or routers would go on sending, and have to ask elsewhere
                    await self.known(self.manager.version)
                async with asyncio.timeout(life.grace_s + ANSWER_MARGIN_S):
                    is_empty = await life.process.drain(life.grace_s)
                if not is_empty:
                    log.warning("engine %s still had requests after %g s", life.engine_id, life.grace_s)
                await life.process.stop()
        except EngineLost:
            pass
        except DiptychError as error:
            log.warning("engine %s failed while it drained: %s", life.engine_id, error)
        except TimeoutError:
            log.warning("engine %s hung while it drained; it is killed", life.engine_id)
        self.manager.report_left(life.engine_id, life.epoch)
