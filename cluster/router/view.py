"""What this router knows of the engines: members from the directory, one session to each, their last status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from diptych.protos.status import EngineDirectory, EngineInfo
from diptych.protos.types import ANSWERING, EngineRef, Role

from .incident import Incident
from .placement import EngineLoad
from .session import EngineSession, SessionTerms

log = logging.getLogger(__name__)

_DIRECTORY_RETRY_S = 0.5
COMEBACK_S = 30.0  # an engine that died unasked is expected back for so long
_MAX_DEAD = 256  # lives that are remembered as dead


class SessionFactory(Protocol):
    """Makes the session to one engine life; it is started and stopped by the view."""

    def __call__(self, info: EngineInfo, terms: SessionTerms, *, on_change: Callable[[], None]) -> EngineSession:
        """`on_change` is to be called after every change of `is_ready`."""


class ClusterView:
    """Follows the directory and keeps one session per living engine. One event loop."""

    def __init__(
        self,
        directory: EngineDirectory,
        terms: SessionTerms,
        *,
        on_loss: Callable[[EngineSession], None],
        connect: SessionFactory = EngineSession,
    ) -> None:
        self._directory = directory
        self._terms = terms
        self._connect = connect
        self._clock = terms.clock
        self._on_loss = on_loss
        self._sessions: dict[EngineRef, EngineSession] = {}
        self._losses: dict[EngineRef, int] = {}
        self._died_at: dict[
            str, float
        ] = {}  # by model: when the last engine that answers vanished that was not draining
        self._dead: dict[EngineRef, None] = {}  # lives that the directory let go without having drained them
        self._version = 0
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.is_stopped = False
        self.is_complete = False  # it has known all engines that were asked for when it began; stays true

    async def start(self) -> None:
        """Learn the members and begin to dial them; then follow changes."""
        version, members = await self._directory.engines()
        await self._apply(version, members)
        self._tasks.append(asyncio.create_task(self._follow(), name="engine view"))
        self._tasks.append(asyncio.create_task(self._complete(), name="first engine view"))

    async def stop(self) -> None:
        """End all sessions."""
        self.is_stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await asyncio.gather(*(session.stop() for session in self._sessions.values()))
        self._sessions.clear()
        self._changed.set()

    @property
    def version(self) -> int:
        """Of the membership in use."""
        return self._version

    def sessions(self) -> Iterable[EngineSession]:
        """All members, connected or not."""
        return self._sessions.values()

    def session(self, ref: EngineRef) -> EngineSession | None:
        """The session to one life of an engine, or None when it is gone."""
        return self._sessions.get(ref)

    def has_died(self, incident: Incident) -> bool | None:
        """Whether the engine that was lost is dead, by the directory's word; None while nobody knows. A stream that
        came back, or an engine that left because it was drained, is no death.
        """
        if incident.nobody_died or not incident.is_loss:
            return False
        session = self._sessions.get(incident.engine)
        if session is None:
            return incident.engine in self._dead
        return False if session.is_ready or session.losses > incident.losses else None

    def live(self, model: str, role: Role) -> list[EngineLoad]:
        """Connected engines of a model that have a role and take new requests."""
        now = self._clock()
        return [
            _load_of(session, role, now)
            for session in self._sessions.values()
            if session.is_ready
            and not session.info.draining
            and session.info.model == model
            and role in session.info.roles
        ]

    def has_pool(self, model: str, role: Role) -> bool:
        """Whether any member, connected or not, has this role for this model."""
        return any(s.info.model == model and role in s.info.roles for s in self._sessions.values())

    def expects(self, model: str) -> bool:
        """Whether an engine that answers for `model` may be connected soon: the first ones are starting, one is being
        dialled, or one has just died.
        """
        if not self.is_complete or any(self.has_pool(model, role) for role in ANSWERING):
            return True
        died_at = self._died_at.get(model)
        return died_at is not None and self._clock() - died_at < COMEBACK_S

    def num_decoding(self) -> int:
        """Requests that all decode engines together can hold the KV of, and an eighth of them waits for a seat; 0: not
        known of each of them, or there is none.
        """
        infos = [one.info for one in self._sessions.values() if one.is_ready and Role.DECODE in one.info.roles]
        seats = [info.seats for info in infos if not info.draining]
        return sum(number + number // 8 for number in seats) if all(seats) else 0

    def capacity_tokens(self, model: str) -> int | None:
        """Tokens that every decode engine of a model can hold for one request; None while there is no engine."""
        members = [s.info for s in self._sessions.values() if s.info.model == model and Role.DECODE in s.info.roles]
        return min((min(i.max_context_tokens, i.num_blocks * i.block_tokens) for i in members), default=None)

    async def wait_change(self, timeout_s: float) -> None:
        """Returns when an engine came or went, or after `timeout_s`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _follow(self) -> None:
        while True:
            try:
                version, members = await self._directory.wait_change(self._version)
            except Exception:  # the directory is another process: whatever it raises, the known engines stay in use
                log.warning("the engine directory does not answer; going on with the known engines", exc_info=True)
                await asyncio.sleep(_DIRECTORY_RETRY_S)
                continue
            if version > self._version:
                await self._apply(version, members)

    async def _complete(self) -> None:
        """Until the engines that were starting are members, and every member was connected once or has gone.

        One that does not answer for twice the time to dial is waited for no longer: the others can serve.
        """
        while True:
            try:
                await self._directory.settled()
                version, members = await self._directory.engines()
                break
            except Exception:  # as above
                log.warning("the engine directory does not answer; nobody knows which engines are starting")
                await asyncio.sleep(_DIRECTORY_RETRY_S)
        missing = {info.ref for info in members}
        give_up = self._clock() + 2 * self._terms.connect_timeout_s
        while missing and (left := give_up - self._clock()) > 0:
            if self._version >= version:
                missing = {ref for ref in missing if (s := self._sessions.get(ref)) is not None and not s.is_ready}
            if missing:
                await self.wait_change(left)
        self.is_complete = True

    async def _apply(self, version: int, members: list[EngineInfo]) -> None:
        wanted = {info.ref: info for info in members}
        gone = [self._sessions.pop(ref) for ref in list(self._sessions) if ref not in wanted]
        for session in gone:
            self._note_death(session)
        for ref, info in wanted.items():
            if ref in self._sessions:
                self._sessions[ref].info = info  # a draining engine keeps its session, and what runs on it
            else:
                session = self._connect(info, self._terms, on_change=self._on_change)
                self._sessions[ref] = session
                session.start()
        self._version = version
        await asyncio.gather(*(session.stop() for session in gone))
        self._on_change()

    def _note_death(self, session: EngineSession) -> None:
        if session.info.draining:
            return
        self._dead[session.info.ref] = None
        while len(self._dead) > _MAX_DEAD:
            del self._dead[next(iter(self._dead))]
        if ANSWERING & session.info.roles:
            self._died_at[session.info.model] = self._clock()
        if session.is_ready:  # the directory knew before the stream broke
            session.loss_cause = "removed"
            self._on_loss(session)

    def _on_change(self) -> None:
        for ref, session in self._sessions.items():
            if session.losses > self._losses.get(ref, 0):
                self._losses[ref] = session.losses
                self._on_loss(session)
        self._losses = {ref: count for ref, count in self._losses.items() if ref in self._sessions}
        self._changed.set()


def _load_of(session: EngineSession, role: Role, now: float) -> EngineLoad:
    info, status, counters = session.info, session.status, session.status.counters
    return EngineLoad(
        ref=info.ref,
        in_flight=session.in_flight,
        same_role=session.in_flight_as(role),
        reported=status.running + status.waiting,
        reserved=session.meter.reserved(now),
        queued_tokens=int(counters.get("prefill_queued_tokens", 0) + counters.get("decode_queued_tokens", 0)),
        sequences=int(counters.get("decode_running", 0)),
        kv_tokens=int(counters.get("decode_kv_tokens", 0)),
        used_blocks=status.blocks.used,
        num_blocks=info.num_blocks,
        block_tokens=info.block_tokens,
        rates=session.meter.rates,
        mirror=session.mirror,
    )
