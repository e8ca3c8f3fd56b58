"""The gRPC Engine service: one stream per router, every request multiplexed, one StepTokens message per step.

Lives in the asyncio thread. It knows inbox, outbox and the engine's readings; of workers and devices it knows nothing.
A stream that breaks, and one whose router has fallen silent, cancels the requests that came through it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field, replace

import grpc
from google.protobuf.message import DecodeError

from diptych.cluster.observability.tracing import record_phase
from diptych.protos import codec, engine_pb2_grpc
from diptych.protos import engine_pb2 as pb
from diptych.protos.barrier import fault_of
from diptych.protos.constraint import Guide
from diptych.protos.errors import (
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineError,
    EngineFault,
    InvalidRequest,
    Overloaded,
    ShuttingDown,
    param_of,
)
from diptych.protos.faults import FaultPlan
from diptych.protos.ports import Clock
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import (
    DecodeOrder,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    Role,
    StepOutput,
    TransferKey,
)

from .faults import FaultyFrames, FaultyLine
from .guides.guides import Guides
from .inbox import CancelRequest, Inbox
from .outbox import Outbox

STATUS_PERIOD_S = 0.25
LOAD_CHECK_S = 0.05  # a change of load is told after this long at most
MAX_FRAMES_BEHIND = 4096  # a router that reads so slowly loses its session
MAX_NAMES_PER_FRAME = 65_536
MAX_ENDED = 1024  # orders of a session that are known to have ended, so that a late copy of one begins nothing
ROUTER_SILENCE_S = 3.0  # a router that pings sends something twice a second

log = logging.getLogger(__name__)


class SessionRefused(Exception):
    """Ends a stream with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


@dataclass(eq=False, slots=True)
class _Session:
    """One router's stream."""

    router_id: str
    writer: asyncio.Task[None]  # the stream's handler
    frames: deque[pb.EngineFrame] = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    handles: dict[int, tuple[Role, TransferKey]] = field(default_factory=dict)
    failure: SessionRefused | None = None
    ended: dict[int, TransferKey] = field(default_factory=dict)  # the last handles that were given up, and their keys
    has_names: bool = False  # told all block names, and every change since
    pings: bool = False  # the router has shown that it pings; other callers are told by their stream's end alone
    silent_s: float = 0.0
    send: Callable[[pb.EngineFrame], None] = field(init=False)

    def __post_init__(self) -> None:
        self.send = self.put

    @property
    def is_slow(self) -> bool:
        """A router that lags behind needs its tokens more than readings."""
        return len(self.frames) >= MAX_FRAMES_BEHIND // 2

    def put(self, frame: pb.EngineFrame) -> None:
        """Send `frame`, in order; never blocks."""
        if len(self.frames) >= MAX_FRAMES_BEHIND:
            self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router does not read its session")
            self.writer.cancel()  # it waits for the router to read
        else:
            self.frames.append(frame)
            self.ready.set()

    def give_up(self, handle: int, key: TransferKey) -> None:
        """The order of `handle` has ended, or was refused."""
        self.handles.pop(handle, None)
        self.ended[handle] = key
        if len(self.ended) > MAX_ENDED:
            del self.ended[next(iter(self.ended))]

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        self.failure = self.failure or SessionRefused(code, message)
        self.ready.set()


@dataclass(slots=True)
class _Columns:
    """One session's share of a step."""

    handles: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finishes: list[pb.Finish] = field(default_factory=list)
    logprobs: list[pb.Logprobs] = field(default_factory=list)
    prompt_logprobs: list[pb.PromptLogprobs] = field(default_factory=list)
    started: list[int] = field(default_factory=list)

    def frame(self) -> pb.EngineFrame:
        step = pb.StepTokens(
            handle=self.handles,
            index=self.indexes,
            token=self.tokens,
            finishes=self.finishes,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            started=self.started,
        )
        return pb.EngineFrame(tokens=step)


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the output of one (role, key) goes."""

    session: _Session
    handle: int
    traceparent: str
    started_ns: int


class EngineSessions(engine_pb2_grpc.EngineServicer):
    """All sessions of one engine."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        inbox: Inbox,
        outbox: Outbox,
        reading: Callable[[], EngineStatus],
        possible_roles: Collection[Role] = (),  # that it may have later; empty: the present ones
        prefix_root: bytes = b"",
        abandon: Callable[[TransferKey, DiptychError], None] | None = None,
        guides: Guides | None = None,
        faults: FaultPlan | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._guides = guides
        self._held: dict[tuple[Role, TransferKey], asyncio.Task[None]] = {}  # orders whose guides are being made
        self._abandon = abandon  # SendPort.abort, where there is one
        self._info = info
        self._open_roles = info.roles  # those that take orders
        self._inbox = inbox
        self._outbox = outbox
        self._reading = reading
        self._prefix_root = prefix_root
        self._names: set[int] = set()  # of the blocks that can be found by their prefix, as told by the step thread
        self._clock = clock
        self._sessions: set[_Session] = set()
        self._routes: dict[Role, dict[TransferKey, _Route]] = {role: {} for role in possible_roles or info.roles}
        self._ticker: asyncio.Task[None] | None = None
        self._faults = faults
        self.draining = False
        self.duplicates = 0  # orders that came twice
        self.routers_lost = 0  # sessions that ended because their router fell silent

    def attach(self, server: grpc.aio.Server) -> None:
        """Register the service; call in the asyncio thread before the server starts."""
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        self._outbox.attach(asyncio.get_running_loop(), self._pump)
        self._ticker = asyncio.create_task(self._tell_status())

    async def close(self) -> None:
        """End every session; their requests are cancelled."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        for role, key in list(self._held):
            self._take_back(role, key, ShuttingDown(f"engine {self._info.ref.engine_id} is shutting down"))
        for session in self._sessions:
            session.fail(grpc.StatusCode.UNAVAILABLE, f"engine {self._info.ref.engine_id} is shutting down")

    @property
    def info(self) -> EngineInfo:
        """What the engine is, with its present roles."""
        return self._info

    def num_requests_of(self, role: Role) -> int:
        """Those of one role."""
        return len(self._routes.get(role, ()))

    # Coroutines, so that they run in the asyncio thread, between two frames.

    async def refuse_all(self) -> None:
        """Refuse new orders. One that was taken before is in the books when this returns."""
        self.draining = True

    async def leave_roles(self, roles: Collection[Role]) -> None:
        """Refuse new orders of these roles."""
        self._open_roles = self._open_roles - frozenset(roles)

    async def give_away(self, role: Role) -> None:
        """End what is left of a role with ShuttingDown, so that other engines go on with it: nobody pays for that."""
        lost = ShuttingDown(f"engine {self._info.ref.engine_id} is {role} no more")
        for key, route in list(self._routes[role].items()):
            if route.session in self._sessions:  # what the worker still says of it reaches a handle that nobody holds
                route.session.give_up(route.handle, key)
                route.session.send(self._refusal(route.handle, role, lost))
            self._take_back(role, key)

    async def take_roles(self, info: EngineInfo) -> None:
        """The engine is what `info` says from now on."""
        self._info, self._open_roles = info, info.roles

    @property
    def num_sessions(self) -> int:
        """Open streams."""
        return len(self._sessions)

    @property
    def num_unsent(self) -> int:
        """Frames that wait for their routers to read; from any thread."""
        return sum(len(session.frames) for session in tuple(self._sessions))

    @property
    def num_requests(self) -> int:
        """Requests that have not had their terminal event."""
        return sum(len(routes) for routes in self._routes.values())

    async def Session(self, request_iterator: AsyncIterator[pb.RouterFrame], context: grpc.aio.ServicerContext) -> None:
        """The stream of one router (the name is the proto's)."""
        # Written with context.write, not as a generator: a cancelled stream must reach the `finally` at once.
        try:
            session = await self._open(request_iterator)
        except SessionRefused as refused:
            await context.abort(refused.code, refused.message)
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            await context.write(self._welcome())
            await context.write(self._status_frame())
            while not reader.done() or session.frames:
                session.ready.clear()
                while session.frames:
                    await context.write(session.frames.popleft())
                if session.failure is None and not reader.done():
                    await session.ready.wait()
                if session.failure is not None:
                    break
        except asyncio.CancelledError:
            if session.failure is None:
                raise
            session.writer.uncancel()  # `send` took the handler out of a write, to end the stream below
        finally:
            reader.cancel()
            self._forget(session)
        if session.failure is not None:
            # Told also to a router that does not read now: without a status it would hold the session for alive later.
            await context.abort(session.failure.code, session.failure.message)

    async def Embed(self, request: pb.EmbedOrder, context: grpc.aio.ServicerContext) -> None:
        """Not of this engine: embed_service.py has it (the name is the proto's)."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"engine {self._info.ref.engine_id} has no role embed")

    async def _open(self, frames: AsyncIterator[pb.RouterFrame]) -> _Session:
        first = await anext(aiter(frames), None)
        if first is None or first.WhichOneof("frame") != "open":
            raise SessionRefused(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be Open")
        me = self._info.ref
        if first.open.engine_epoch not in (0, me.epoch):
            raise SessionRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"fenced: engine {me.engine_id} lives in epoch {me.epoch}, not {first.open.engine_epoch}",
            )
        handler = asyncio.current_task()
        assert handler is not None
        session = _Session(first.open.router_id, handler)
        if self._faults is not None:
            session.send = FaultyFrames(
                self._faults,
                router=session.router_id,
                line=FaultyLine(session.put, asyncio.get_running_loop().call_later),
                fail=lambda: session.fail(grpc.StatusCode.UNAVAILABLE, "injected fault"),
            )
        return session

    async def _read(self, session: _Session, frames: AsyncIterator[pb.RouterFrame]) -> None:
        try:
            async for frame in frames:
                session.silent_s = 0.0
                match frame.WhichOneof("frame"):
                    case "submit":
                        self._submit(session, frame.submit)
                    case "cancel":
                        self._cancel(session, frame.cancel)
                    case "ping":
                        session.pings = True
                    case other:
                        raise SessionRefused(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected frame {other}")
        except SessionRefused as refused:
            session.fail(refused.code, refused.message)
        except DecodeError:
            session.fail(grpc.StatusCode.INVALID_ARGUMENT, "bytes that are no frame")
        except grpc.aio.AioRpcError as lost:
            log.info("session of router %s broke: %s", session.router_id, lost.code())
        finally:
            session.ready.set()

    def _submit(self, session: _Session, msg: pb.Submit) -> None:
        role = Role.PREFILL if msg.phase == pb.PHASE_PREFILL else Role.DECODE
        if self._is_duplicate(session, msg, role):
            self.duplicates += 1
            return
        try:
            order = codec.order_from_pb(msg, self._clock())
            key = order.request.key
            if role not in self._routes:
                raise EngineError(f"engine {self._info.ref.engine_id} has no {role} worker")
            if key in self._routes[role]:
                raise InvalidRequest(f"{key} is in work already", "transfer_id")
            if role not in self._open_roles:
                raise ShuttingDown(f"engine {self._info.ref.engine_id} takes no new {role} requests")
            if self.draining:
                raise ShuttingDown(f"engine {self._info.ref.engine_id} takes no new requests: it is shutting down")
            if order.request.constraint is None:
                self._put(order)
        except BaseException as exc:
            key = TransferKey(msg.transfer_id, msg.attempt)
            error = fault_of(exc, key, "order")
            if isinstance(error, CapacityError):  # a copy of the order must not find room where this one did not
                session.give_up(msg.handle, key)
                if role is Role.PREFILL and self._abandon is not None:
                    self._abandon(key, error)  # else the decode engine would wait for it as long as a lease lasts
            session.send(self._refusal(msg.handle, role, error))
            return
        session.handles[msg.handle] = (role, key)
        self._routes[role][key] = route = _Route(session, msg.handle, order.request.traceparent, time.time_ns())
        if order.request.constraint is not None:
            self._held[role, key] = asyncio.create_task(self._guide(order, role, route))

    def _put(self, order: PrefillOrder | DecodeOrder) -> None:
        if not self._inbox.try_put(order):
            raise Overloaded(f"the inbox of engine {self._info.ref.engine_id} is full")

    async def _guide(self, order: PrefillOrder | DecodeOrder, role: Role, route: _Route) -> None:
        """The worker gets an order with a constraint once its guide is there."""
        key = order.request.key
        error: DiptychError | None = None
        try:
            guide = await self._guide_of(order.request)
        except asyncio.CancelledError:
            error = ShuttingDown(f"engine {self._info.ref.engine_id} is shutting down")
        except DiptychError as exc:
            error = exc
        except BaseException:  # a library's panic is no Exception; the order would be held for ever
            log.exception("%s: its guide could not be made", key)
            error = EngineFault("the form of the answer could not be prepared")
        if self._held.get((role, key)) is not asyncio.current_task():
            return  # it was taken back, and ended by whoever did that
        del self._held[role, key]
        try:
            if error is not None:
                raise error
            self._put(replace(order, guide=guide))
        except DiptychError as refused:
            self._end_held(role, key, route, refused)

    async def _guide_of(self, request: GenerateRequest) -> Guide:
        if self._guides is None:
            raise InvalidRequest(f"engine {self._info.ref.engine_id} keeps to no constraints")
        left_s = None if request.deadline is None else max(0.0, request.deadline - self._clock())
        try:
            async with asyncio.timeout(left_s):
                return await self._guides.open(request)
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before the form of its answer was prepared") from None

    def _end_held(self, role: Role, key: TransferKey, route: _Route, error: DiptychError) -> None:
        """An order that no worker has seen ends."""
        self._routes[role].pop(key, None)
        is_held = route.handle in route.session.handles  # else it was given away, and its router told
        route.session.give_up(route.handle, key)
        if role is Role.PREFILL and self._abandon is not None:
            self._abandon(key, error)
        if is_held and route.session in self._sessions:
            route.session.send(self._refusal(route.handle, role, error))

    def _take_back(self, role: Role, key: TransferKey, error: DiptychError | None = None) -> None:
        """End an order wherever it is, Cancelled unless `error` says otherwise; an unknown one is no error."""
        if (task := self._held.pop((role, key), None)) is not None:
            task.cancel()  # perhaps before it has begun: then nothing in it runs
            self._end_held(role, key, self._routes[role][key], error or Cancelled("the request was cancelled"))
        else:
            self._inbox.put(CancelRequest(role, key))

    def _is_duplicate(self, session: _Session, msg: pb.Submit, role: Role) -> bool:
        """Whether this order came before. One that has ended since does not begin again."""
        key = TransferKey(msg.transfer_id, msg.attempt)
        live = session.handles.get(msg.handle)
        if live is None:
            return session.ended.get(msg.handle) == key
        if live != (role, key):
            raise SessionRefused(grpc.StatusCode.INVALID_ARGUMENT, f"handle {msg.handle} is in use")
        return True

    def _cancel(self, session: _Session, msg: pb.Cancel) -> None:
        try:
            key = codec.key_from_pb(msg)
        except InvalidRequest as exc:
            raise SessionRefused(grpc.StatusCode.INVALID_ARGUMENT, exc.message) from exc
        for role, routes in self._routes.items():
            route = routes.get(key)
            if route is not None and route.session is session:
                self._take_back(role, key)

    def _refusal(self, handle: int, role: Role, error: DiptychError) -> pb.EngineFrame:
        finish = Finish(
            key=TransferKey(b""),
            role=role,
            reason=FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR,
            error_code=error.code,
            error_message=error.message,
            error_param=param_of(error),
        )
        return pb.EngineFrame(tokens=pb.StepTokens(finishes=[codec.finish_to_pb(handle, finish)]))

    def _forget(self, session: _Session) -> None:
        # Routes stay until the workers' terminal events: the keys are in use until then, their output goes nowhere.
        self._sessions.discard(session)
        for role, key in list(session.handles.values()):
            self._take_back(role, key)

    # ---- step outputs to frames ----

    def _pump(self) -> None:
        outputs, lost = self._outbox.drain()
        for role, output in outputs:
            self._route_step(role, output)
        if lost:
            for session in self._sessions:
                session.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the engine's sessions fell behind its steps")

    def _route_step(self, role: Role, output: StepOutput) -> None:
        routes = self._routes[role]
        columns: defaultdict[_Session, _Columns] = defaultdict(_Columns)
        for started in output.started:
            route = routes.get(started)
            if route is not None and route.session in self._sessions:
                columns[route.session].started.append(route.handle)
        self._route_prompts(role, output, columns)
        for row, (key, index, token) in enumerate(zip(output.keys, output.indexes, output.tokens, strict=True)):
            route = routes.get(key)
            if route is not None and route.session in self._sessions:
                own = columns[route.session]
                if output.logprobs and (logprobs := output.logprobs.get(row)) is not None:
                    try:
                        own.logprobs.append(codec.logprobs_to_pb(logprobs, len(own.handles)))
                    except BaseException as exc:
                        self._spoiled(role, key, route, exc)
                        continue
                own.handles.append(route.handle)
                own.indexes.append(index)
                own.tokens.append(token)
        self._route_ends(role, output, columns)
        for session, own in columns.items():
            session.send(own.frame())

    def _route_prompts(self, role: Role, output: StepOutput, columns: defaultdict[_Session, _Columns]) -> None:
        routes = self._routes[role]
        for piece in output.prompt_logprobs:
            route = routes.get(piece.key)
            if route is not None and route.session in self._sessions:
                try:
                    message = codec.prompt_logprobs_to_pb(route.handle, piece)
                except BaseException as exc:
                    self._spoiled(role, piece.key, route, exc)
                else:
                    columns[route.session].prompt_logprobs.append(message)

    def _route_ends(self, role: Role, output: StepOutput, columns: defaultdict[_Session, _Columns]) -> None:
        routes = self._routes[role]
        for finish in output.finishes:
            ended = routes.pop(finish.key, None)
            if ended is None:
                continue
            is_held = ended.handle in ended.session.handles  # else it was given away, and its router told
            ended.session.give_up(ended.handle, finish.key)
            engine = self._info.ref.engine_id
            try:
                record_phase(finish, ended.traceparent, engine, ended.started_ns, time.time_ns())
            except Exception:
                log.exception("%s: its span is lost", finish.key)
            if is_held and ended.session in self._sessions:
                columns[ended.session].finishes.append(codec.finish_to_pb(ended.handle, finish))

    def _spoiled(self, role: Role, key: TransferKey, route: _Route, exc: BaseException) -> None:
        """What the step has for one request cannot be told: that request ends, here and in its worker."""
        error = fault_of(exc, key, "output")
        self._inbox.put(CancelRequest(role, key))
        self._end_held(role, key, route, error)

    # ---- status and block names ----

    def _welcome(self) -> pb.EngineFrame:
        info = self._info
        return pb.EngineFrame(
            welcome=pb.Welcome(
                me=codec.ref_to_pb(info.ref),
                roles=sorted(role.value for role in info.roles),
                model=info.model,
                block_tokens=info.block_tokens,
                num_blocks=info.num_blocks,
                max_context_tokens=info.max_context_tokens,
                prefix_root=self._prefix_root,
            )
        )

    def _status_frame(self) -> pb.EngineFrame:
        return pb.EngineFrame(status=codec.status_to_pb(self._reading()))

    async def _tell_status(self) -> None:
        """To every session, each STATUS_PERIOD_S and soon after a change of load."""
        loop = asyncio.get_running_loop()
        told, told_at = (-1, -1), 0.0
        while True:
            began = loop.time()
            await asyncio.sleep(LOAD_CHECK_S)
            now = loop.time()
            # Time that this process itself did not get, be it stopped or starved, is no router's silence.
            self._end_silent(min(now - began, 2 * LOAD_CHECK_S))
            self._tell_names()
            reading = self._reading()
            load = (reading.running, reading.waiting)
            if load == told and now - told_at < STATUS_PERIOD_S - LOAD_CHECK_S / 2:
                continue
            told, told_at = load, now
            frame = pb.EngineFrame(status=codec.status_to_pb(reading))
            for session in self._sessions:
                if not session.is_slow:
                    session.send(frame)

    def _end_silent(self, elapsed_s: float) -> None:
        for session in self._sessions:
            if session.pings and session.failure is None:
                session.silent_s += elapsed_s
                if session.silent_s > ROUTER_SILENCE_S:
                    self.routers_lost += 1
                    log.warning("router %s fell silent; its requests are cancelled", session.router_id)
                    session.fail(grpc.StatusCode.UNAVAILABLE, "the router fell silent")
                    session.writer.cancel()  # it may wait for a router that reads nothing either

    def _tell_names(self) -> None:
        """What the prefix index gained and lost since the last time, to every session; all of it to a new one."""
        change = self._outbox.take_names()
        if change is not None:
            if change.reset:
                self._names.clear()
            self._names.difference_update(change.removed)
            self._names.update(change.added)
        for session in self._sessions:
            if session.is_slow:
                session.has_names = session.has_names and change is None
            elif not session.has_names or (change is not None and change.reset):
                _send_names(session, True, tuple(self._names), ())
                session.has_names = True
            elif change is not None:
                _send_names(session, False, change.added, change.removed)


def _send_names(session: _Session, reset: bool, added: tuple[int, ...], removed: tuple[int, ...]) -> None:
    """In frames of bounded size; what was removed goes first."""
    size = MAX_NAMES_PER_FRAME
    for start in range(0, max(len(added), len(removed), 1), size):
        stop = start + size
        change = pb.PrefixChange(reset=reset and start == 0, added=added[start:stop], removed=removed[start:stop])
        session.send(pb.EngineFrame(prefix=change))
