"""The router's end of one engine's Session stream: submits and cancels out, step messages in, all multiplexed.

    submit/cancel -> outbox -> writer --gRPC--> engine
    sinks <- one call per token, one wake-up for what came together <- inbox <--gRPC-- engine

A broken stream fails its open requests at once and is dialled again until the view stops the session. So does one
that is silent: a stopped process keeps its connections, and nothing but its frames shows that it lives.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import grpc

from diptych.protos import engine_pb2 as pb
from diptych.protos.channels import EMBED, SESSION, open_channel
from diptych.protos.codec import (
    finish_from_pb,
    logprobs_from_pb,
    prompt_logprobs_from_pb,
    status_from_pb,
    submit_to_pb,
)
from diptych.protos.engine_pb2_grpc import EngineStub
from diptych.protos.errors import DiptychError, EngineLost, Fenced, Overloaded
from diptych.protos.faults import FaultPlan, Point
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.trust import ROUTER, Trust
from diptych.protos.types import DecodeOrder, Finish, PrefillOrder, PromptLogprobs, Role, TokenLogprobs, TransferKey

from .estimate import EngineMeter
from .faults import faulty_post, pass_point
from .inbox import Inbox
from .incident import Incident, raised
from .mirror import PrefixMirror

log = logging.getLogger(__name__)

MAX_OUTBOX = 4096  # frames waiting for the stream; an engine that reads none for so long is as good as lost
PING_PERIOD_S = 0.5
_OWN_WORDS = re.compile(r"is shutting down|fell silent")  # of engines that end a stream; else its connection broke
LossCause = Literal["broken", "silent", "removed", "ended"]  # ended: by the engine itself, with a word of its own
_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a new dial after a loss must not wait for the old channel's back-off
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Sink(Protocol):
    """Where one phase of one request goes. Called in the event loop; must not block or raise."""

    def on_start(self) -> None:
        """The engine has begun to compute the prompt."""

    def on_token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Generated token number `index`."""

    def on_prompt(self, piece: PromptLogprobs) -> None:
        """Logprobs of some of the prompt's tokens."""

    def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """The phase is over, or its engine is lost; nothing follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerms:
    """What all sessions of one router share. Times in seconds."""

    router_id: str
    connect_timeout_s: float  # from the dial to the engine's welcome
    silence_s: float  # without a frame for so long the engine is lost; it sends its status several times a second
    clock: Callable[[], float]
    trust: Trust = field(default_factory=lambda: Trust.alone(ROUTER))  # reaches only servers that ask for no proof
    faults: FaultPlan | None = None


class EngineSession:
    """One engine life. `start` once, `stop` once; owns its task."""

    def __init__(self, info: EngineInfo, terms: SessionTerms, *, on_change: Callable[[], None]) -> None:
        self._trust = terms.trust
        self.info = info
        self.status = EngineStatus()
        self.mirror = PrefixMirror()
        self.meter = EngineMeter()
        self.losses = 0
        self.loss_cause: LossCause = "broken"  # of the last one
        self.incident: Incident | None = None  # of the ends that sinks are told now; None: nothing like that
        self._router_id = terms.router_id
        self._connect_timeout_s = terms.connect_timeout_s
        self._silence_s = terms.silence_s
        self._clock = terms.clock
        self._on_change = on_change  # after every change of `is_ready`
        self._sinks: dict[int, tuple[Sink, Role, TransferKey]] = {}
        self._per_role = dict.fromkeys(Role, 0)
        self._outbox: deque[pb.RouterFrame] = deque()
        self._has_mail = asyncio.Event()
        self._next_handle = 1
        self._faults = terms.faults
        self._post = self._put if self._faults is None else faulty_post(self._faults, info.ref.engine_id, self._put)
        self._task: asyncio.Task[None] | None = None
        self._stub: EngineStub | None = None  # of the connection that lives
        self._heard_at = 0.0
        self._gave_reason = False  # the engine ends, or has heard nothing of this router for long
        self.is_ready = False

    @property
    def in_flight(self) -> int:
        """Phases of requests that the engine works on for this router."""
        return len(self._sinks)

    def in_flight_as(self, role: Role) -> int:
        """Those of one role."""
        return self._per_role[role]

    def start(self) -> None:
        """Begin to dial; the engine is usable when `is_ready`."""
        self._task = asyncio.create_task(self._run(), name=f"session {self.info.ref.engine_id}")

    async def stop(self) -> None:
        """End the stream and fail what is open on it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def submit(self, order: PrefillOrder | DecodeOrder, sink: Sink) -> int:
        """Send an order; its events go to `sink` until its end or `release`. Raises EngineLost, Overloaded."""
        if not self.is_ready:
            raise EngineLost(f"engine {self.info.ref.engine_id} is not connected")
        if len(self._outbox) >= MAX_OUTBOX:
            raise Overloaded(f"engine {self.info.ref.engine_id} does not take requests")
        handle = self._next_handle
        self._next_handle = handle + 1 & 0xFFFF_FFFF or 1
        role = Role.PREFILL if isinstance(order, PrefillOrder) else Role.DECODE
        self._post(pb.RouterFrame(submit=submit_to_pb(handle, order, self._clock())))
        self._sinks[handle] = (sink, role, order.request.key)
        self._per_role[role] += 1
        return handle

    def attach(self, role: Role, key: TransferKey, sink: Sink) -> int:
        """Tell `sink` when the engine is lost, until `release`: it waits there for something that is no order."""
        handle = self._next_handle
        self._next_handle = handle + 1 & 0xFFFF_FFFF or 1
        self._sinks[handle] = (sink, role, key)
        self._per_role[role] += 1
        return handle

    def embed(self, order: pb.EmbedOrder) -> Any:
        """A call of Engine.Embed on this session's connection: an iterator of parts. Raises EngineLost."""
        if self._stub is None or not self.is_ready:
            raise EngineLost(f"engine {self.info.ref.engine_id} is not connected")
        return self._stub.Embed(order, metadata=self._trust.proof(EMBED, self.info.ref))

    def cancel(self, key: TransferKey) -> None:
        """Ask the engine to stop working on `key`; harmless when it has ended or the stream is gone."""
        if self.is_ready:
            self._post(pb.RouterFrame(cancel=pb.Cancel(transfer_id=key.transfer_id, attempt=key.attempt)))

    def release(self, handle: int) -> None:
        """Nobody wants the events of `handle` any more."""
        self._pop(handle)

    def _pop(self, handle: int) -> tuple[Sink, Role, TransferKey] | None:
        entry = self._sinks.pop(handle, None)
        if entry is not None:
            self._per_role[entry[1]] -= 1
        return entry

    def _put(self, frame: pb.RouterFrame) -> None:
        self._outbox.append(frame)
        self._has_mail.set()

    async def _run(self) -> None:
        failures = 0
        try:
            while True:
                self.loss_cause, self._gave_reason = "broken", False
                try:
                    await self._live()
                except (grpc.RpcError, DiptychError, OSError, TimeoutError) as exc:
                    log.log(
                        logging.INFO if failures else logging.WARNING, "%s: %s", self.info.ref.engine_id, _word(exc)
                    )
                failures = 0 if self.is_ready else failures + 1
                self._fail_open(EngineLost(f"the connection to engine {self.info.ref.engine_id} broke"))
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
        except Exception:  # a defect: without a word the engine would seem removed
            log.exception("the session to engine %s ends", self.info.ref.engine_id)
            raise
        finally:
            if self.is_ready:
                self.loss_cause = "removed"
            self._fail_open(EngineLost(f"engine {self.info.ref.engine_id} was removed"))

    async def _live(self) -> None:
        """One stream from dial to loss; raises what ended it."""
        if self._faults is not None:
            await pass_point(self._faults, Point.SESSION_OPEN, self.info.ref.engine_id)
        ref, role = self.info.ref, min(self.info.roles).value
        async with open_channel(self._trust, ref.target, role=role, options=_OPTIONS) as channel:
            stub = self._stub = EngineStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Session(metadata=self._trust.proof(SESSION, ref))
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await call.write(
                        pb.RouterFrame(open=pb.Open(router_id=self._router_id, engine_epoch=self.info.ref.epoch))
                    )
                    welcome = self._check(await self._read(call))
                self.mirror.begin(welcome.prefix_root, max(welcome.block_tokens, 1))
                self._outbox.clear()
                self.is_ready = True
                self._on_change()
                await self._pump(call)
            finally:
                self._stub = None
                call.cancel()

    async def _pump(self, call: Any) -> None:
        inbox = Inbox(partial(self._read, call), self._take, self._clock)
        parts = (self._write_all(call), inbox.run(), self._watch(), self._ping())
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Raises EngineLost when the engine was silent too long. Time in which this loop stood does not count."""
        self._heard_at, pause = self._clock(), self._silence_s / 8
        while True:
            began = self._clock()
            await asyncio.sleep(pause)
            now = self._clock()
            self._heard_at = min(self._heard_at + max(now - began - pause, 0), now)
            if now - self._heard_at > self._silence_s:
                self.loss_cause = "silent"
                raise EngineLost(f"no word for {now - self._heard_at:.2f} s")

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_PERIOD_S)
            self._post(pb.RouterFrame(ping=pb.Ping()))

    def _check(self, frame: pb.EngineFrame) -> pb.Welcome:
        me, ref = frame.welcome.me, self.info.ref
        if frame.WhichOneof("frame") != "welcome" or (me.engine_id, me.epoch) != (ref.engine_id, ref.epoch):
            raise Fenced(f"{ref.target} is not {ref.engine_id} of epoch {ref.epoch}")
        return frame.welcome

    async def _read(self, call: Any) -> pb.EngineFrame:
        try:
            frame = await call.read()
        except grpc.aio.AioRpcError as exc:
            self._gave_reason = _OWN_WORDS.search(exc.details() or "") is not None
            if exc.code() is not grpc.StatusCode.UNAVAILABLE or self._gave_reason:
                self.loss_cause = "ended"
            raise
        if frame is grpc.aio.EOF:
            self.loss_cause = "ended"
            raise EngineLost(f"the engine ended the stream: {await call.details()}")
        assert isinstance(frame, pb.EngineFrame)
        self._heard_at = self._clock()
        return frame

    async def _write_all(self, call: Any) -> None:
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while self._outbox:
                try:
                    await call.write(self._outbox.popleft())
                except asyncio.InvalidStateError as exc:  # grpc's word for a call that ended before the reader saw it
                    raise EngineLost("the stream has ended") from exc

    def _take(self, frame: pb.EngineFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "tokens":
            try:
                self._deliver(frame.tokens)
            except ValueError as exc:
                self.loss_cause = "ended"
                raise EngineLost(f"the engine sent a step that makes no sense: {exc}") from exc
        elif kind == "status":
            self.status = status_from_pb(frame.status)
            self.meter.read(self.status)
        elif kind == "prefix":
            change = frame.prefix
            self.mirror.apply(reset=change.reset, added=change.added, removed=change.removed)

    def _deliver(self, step: pb.StepTokens) -> None:
        """Raises ValueError for a message that makes no sense."""
        sinks = self._sinks
        for handle in step.started:
            entry = sinks.get(handle)
            if entry is not None:
                entry[0].on_start()
        for piece in step.prompt_logprobs:
            entry = sinks.get(piece.handle)
            if entry is not None:
                entry[0].on_prompt(prompt_logprobs_from_pb(piece, entry[2]))
        rows: Iterable[TokenLogprobs | None] = itertools.repeat(None)
        if step.logprobs:
            by_row = {message.row: logprobs_from_pb(message) for message in step.logprobs}
            rows = map(by_row.get, itertools.count())
        for (handle, index, token), logprobs in zip(
            zip(step.handle, step.index, step.token, strict=True), rows, strict=False
        ):
            entry = sinks.get(handle)
            if entry is not None:  # else: cancelled, and its last tokens were on the way
                entry[0].on_token(index, token, logprobs)
        ends: dict[int, Finish] = {}  # all of them are read before the first is told: what makes no sense ends nobody
        for message in step.finishes:
            entry = sinks.get(message.handle)
            if entry is not None:
                _, role, key = entry
                ends[message.handle] = finish_from_pb(message, lambda _, key=key: key, role)  # type: ignore[misc]
        self.incident = raised(self.info.ref, self.losses, ends.values())
        for handle, finish in ends.items():
            entry = self._pop(handle)
            if entry is not None:  # else: a sink that was told before let go of it
                entry[0].on_end(finish.role, finish)

    def _fail_open(self, error: EngineLost) -> None:
        self._outbox.clear()
        self.mirror.begin(b"", 1)
        if self.is_ready:
            self.is_ready = False
            self.losses += 1
            self._on_change()
        harmless = self.info.draining or self._gave_reason
        is_odd = self.loss_cause == "ended" and not harmless
        self.incident = None if is_odd else Incident(self.info.ref, self.losses, nobody_died=harmless)
        sinks, self._sinks = self._sinks, {}
        self._per_role = dict.fromkeys(Role, 0)
        for sink, role, _ in sinks.values():
            sink.on_end(role, error)


def _word(exc: BaseException) -> str:
    if isinstance(exc, grpc.aio.AioRpcError):
        return f"{exc.code().name} {exc.details()}"
    return str(exc) or type(exc).__name__
