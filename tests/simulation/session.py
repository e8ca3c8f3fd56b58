"""The router's end of the streams: EngineSession's surface over the simulated network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from network import End, stream
from wire import Bye, Cancel, Names, Open, Ping, Status, Submit, Tokens, Welcome

from diptych.cluster.router.attempt import Attempt
from diptych.cluster.router.estimate import EngineMeter
from diptych.cluster.router.incident import Incident, is_fault, raised
from diptych.cluster.router.mirror import PrefixMirror
from diptych.cluster.router.session import LossCause, SessionTerms, Sink
from diptych.protos.errors import EngineLost
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import DecodeOrder, Finish, PrefillOrder, Role, TransferKey

if TYPE_CHECKING:
    from world import World

PING_S = 0.5
_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ROUTER = "router"


class SimSession:
    """One engine life as the router sees it; dials until it is stopped."""

    def __init__(self, world: World, info: EngineInfo, terms: SessionTerms, *, on_change: Callable[[], None]) -> None:
        self.info = info
        self.status = EngineStatus()
        self.mirror = PrefixMirror()
        self.meter = EngineMeter()
        self.losses = 0
        self.loss_cause: LossCause = "broken"
        self.incident: Incident | None = None
        self._gave_reason = False
        self.is_ready = False
        self._world = world
        self._loop = world.loop
        self._timeout_s = terms.connect_timeout_s
        self._silence_s = terms.silence_s
        self._on_change = on_change
        self._sinks: dict[int, tuple[Sink, Role, TransferKey]] = {}
        self._next_handle = 1
        self._end: End | None = None
        self._heard_at = 0.0
        self._dials = 0
        self._failures = 0
        self._is_over = False

    @property
    def in_flight(self) -> int:
        return len(self._sinks)

    def in_flight_as(self, role: Role) -> int:
        return sum(entry[1] is role for entry in self._sinks.values())

    def start(self) -> None:
        self._dial()

    async def stop(self) -> None:
        self._is_over = True
        if self.is_ready:
            self.loss_cause = "removed"
        self._lose(EngineLost(f"engine {self.info.ref.engine_id} was removed"))

    def submit(self, order: PrefillOrder | DecodeOrder, sink: Sink) -> int:
        if not self.is_ready:
            raise EngineLost(f"engine {self.info.ref.engine_id} is not connected")
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        role = Role.PREFILL if isinstance(order, PrefillOrder) else Role.DECODE
        self._sinks[handle] = (sink, role, order.request.key)
        self._send(Submit(handle, order))
        return handle

    def cancel(self, key: TransferKey) -> None:
        if self.is_ready:
            self._send(Cancel(key))

    def release(self, handle: int) -> None:
        self._sinks.pop(handle, None)

    def _send(self, frame: object) -> None:
        assert self._end is not None
        self._end.send(frame)

    # ---- the stream -----------------------------------------------------------------------------

    def _dial(self) -> None:
        if self._is_over:
            return
        self._dials += 1
        dial = self._dials
        self.loss_cause, self._gave_reason = "broken", False
        there = self._world.life(self.info.ref)
        if there is None or not there.is_alive:
            self._loop.call_later(0.001, self._broken, dial)
            return
        mine = self._end = End(self._world.network, ROUTER, lambda job: job())
        other = End(self._world.network, there.name, there.post)
        stream(mine, other)
        mine.on_frame = self._read
        mine.on_break = lambda: self._broken(dial)
        other.on_frame = lambda opened: there.routes.accept(other, opened)
        self._heard_at = self._loop.time()
        mine.send(Open(self.info.ref.epoch))
        self._loop.call_later(self._timeout_s, self._welcome_due, dial)

    def _welcome_due(self, dial: int) -> None:
        if dial == self._dials and not self.is_ready:
            self._broken(dial)

    def _broken(self, dial: int) -> None:
        if dial != self._dials or self._is_over:
            return
        self._dials += 1  # whatever else comes of this stream is of the past
        self._failures = 0 if self.is_ready else self._failures + 1
        self._lose(EngineLost(f"the connection to engine {self.info.ref.engine_id} broke"))
        self._loop.call_later(_BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)], self._dial)

    def _watch(self, dial: int) -> None:
        """Silence for too long is a loss; a stopped process's streams stay open."""
        if dial != self._dials or not self.is_ready:
            return
        left = self._heard_at + self._silence_s - self._loop.time()
        if left <= 0:
            self.loss_cause = "silent"
            self._broken(dial)
            return
        self._send(Ping())
        self._loop.call_later(min(left, PING_S) + 0.001, self._watch, dial)

    def _read(self, frame: object) -> None:
        self._heard_at = self._loop.time()
        match frame:
            case Welcome(root, block_tokens):
                self.mirror.begin(root, block_tokens)
                self.is_ready = True
                self._on_change()
                self._watch(self._dials)
            case Bye(has_reason):
                self.loss_cause, self._gave_reason = "ended", has_reason
            case Tokens(rows, ends):
                self._deliver(rows, ends)
            case Status(status):
                self.status = status
                self.meter.read(status)
            case Names(reset, added, removed):
                self.mirror.apply(reset=reset, added=added, removed=removed)

    def _deliver(self, rows: tuple[tuple[int, int, int], ...], ends: tuple) -> None:  # type: ignore[type-arg]
        for handle, index, token in rows:
            entry = self._sinks.get(handle)
            if entry is not None:
                entry[0].on_token(index, token)
        known = [(handle, finish) for handle, finish in ends if handle in self._sinks]
        self.incident = raised(self.info.ref, self.losses, (finish for _, finish in known))
        for handle, finish in known:
            entry = self._sinks.pop(handle, None)
            if entry is not None:
                self._note(entry[0], finish)
                entry[0].on_end(entry[1], finish)

    def _note(self, sink: Sink, finish: Finish | None) -> None:
        """The world knows whom what has struck; what the router makes of it is compared with that."""
        assert isinstance(sink, Attempt)
        if finish is None:
            self._world.struck(sink.request.traceparent, self.info.ref, self.incident)
        elif is_fault(finish):
            self._world.struck(sink.request.traceparent, None, self.incident)

    def _lose(self, error: EngineLost) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None
        self.mirror.begin(b"", 1)
        if self.is_ready:
            self.is_ready = False
            self.losses += 1
            self._on_change()
        harmless = self.info.draining or self._gave_reason
        is_odd = self.loss_cause == "ended" and not harmless
        self.incident = None if is_odd else Incident(self.info.ref, self.losses, nobody_died=harmless)
        sinks, self._sinks = self._sinks, {}
        for sink, role, _ in sinks.values():
            self._note(sink, None)
            sink.on_end(role, error)
