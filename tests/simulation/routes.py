"""The engine's end of the routers' streams, with the manners of cluster/engine/session.py and without its gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from network import End
from wire import Bye, Cancel, Names, Open, Ping, Status, Submit, Tokens, Welcome

from diptych.protos.errors import DiptychError, InvalidRequest, Overloaded, ShuttingDown
from diptych.protos.types import (
    GENERATING,
    DecodeOrder,
    Finish,
    FinishReason,
    PrefillOrder,
    Role,
    StepOutput,
    TransferKey,
)

if TYPE_CHECKING:
    from engine import SimEngine

STATUS_PERIOD_S = 0.25
TWICE = 0.02  # of orders, and of transfer events
ROUTER_SILENCE_S = 3.0


class _Stream:
    """One router's stream."""

    __slots__ = ("end", "handles", "has_names", "heard_at")

    def __init__(self, end: End, now: float) -> None:
        self.end = end
        self.handles: dict[int, tuple[Role, TransferKey]] = {}
        self.has_names = False
        self.heard_at = now


class Routes:
    """Where the output of each (role, key) goes."""

    def __init__(self, engine: SimEngine) -> None:
        self.draining = False
        self._engine = engine
        self._routes: dict[Role, dict[TransferKey, tuple[_Stream, int]]] = {role: {} for role in GENERATING}
        self._streams: list[_Stream] = []
        self._known: dict[int, None] = {}  # names of blocks, in order
        self._ticks = False

    @property
    def num_requests(self) -> int:
        return sum(len(routes) for routes in self._routes.values())

    def accept(self, end: End, opened: object) -> None:
        """The first frame of a router."""
        engine = self._engine
        assert isinstance(opened, Open)
        if opened.epoch != engine.ref.epoch:
            end.close()
            return
        stream = _Stream(end, engine.clock())
        self._streams.append(stream)
        end.on_frame = lambda frame: self._read(stream, frame)
        end.on_break = lambda: self._forget(stream)
        end.send(Welcome(engine.pool.prefix_root, engine.pool.block_tokens))
        end.send(Status(engine.status()))
        if not self._ticks:
            self._ticks = True
            engine.after(STATUS_PERIOD_S, self._tick)

    def close_all(self, *, politely: bool = False) -> None:
        """The process ends."""
        for stream in self._streams:
            if politely:
                stream.end.send(Bye())
            stream.end.close()
        self._streams.clear()

    def break_one(self) -> None:
        """The engine gives its oldest stream up."""
        if self._streams:
            stream = self._streams[0]
            stream.end.send(Bye(has_reason=False))
            stream.end.close()
            self._forget(stream)

    def _read(self, stream: _Stream, frame: object) -> None:
        stream.heard_at = self._engine.clock()
        match frame:
            case Submit(handle, order):
                self._submit(stream, handle, order)
            case Cancel(key):
                for role, routes in self._routes.items():
                    if routes.get(key, (None, 0))[0] is stream:
                        self._engine.put("cancel", role, key)
            case Ping():
                pass

    def _submit(self, stream: _Stream, handle: int, order: PrefillOrder | DecodeOrder) -> None:
        role = Role.PREFILL if isinstance(order, PrefillOrder) else Role.DECODE
        key, engine = order.request.key, self._engine
        engine.world.note(engine, "submit", key, role.value)
        if stream.handles.get(handle) == (role, key):
            return  # said twice
        error: DiptychError | None = None
        if key in self._routes[role]:
            error = InvalidRequest(f"{key} is in work already", "transfer_id")
        elif self.draining:
            error = ShuttingDown(f"engine {engine.name} takes no new requests")
        elif self.num_requests >= 60:
            error = Overloaded("the inbox is full")
        if error is None:
            stream.handles[handle] = (role, key)
            self._routes[role][key] = (stream, handle)
            engine.put("order", role, order)
            if engine.rng.random() < TWICE:
                engine.after(0.03 * engine.rng.random(), lambda: engine.put("again", role, order))
            return
        if not isinstance(error, InvalidRequest) and role is Role.PREFILL and engine.sender is not None:
            sender, known = engine.sender, error
            engine.mail(lambda: sender.abort(key, known, engine.clock()))
        finish = Finish(
            key=key, role=role, reason=FinishReason.ERROR, error_code=error.code, error_message=error.message
        )
        stream.end.send(Tokens((), ((handle, finish),)))

    def has(self, role: Role, key: TransferKey) -> bool:
        """Whether the request is in work."""
        return key in self._routes[role]

    def _forget(self, stream: _Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
        for role, key in stream.handles.values():
            self._engine.put("cancel", role, key)

    def told(self, role: Role, out: StepOutput) -> None:
        """What a worker emitted, to the streams that it is for."""
        routes = self._routes[role]
        tokens: dict[_Stream, list[tuple[int, int, int]]] = {}
        ends: dict[_Stream, list[tuple[int, Finish]]] = {}
        for key, index, token in zip(out.keys, out.indexes, out.tokens, strict=True):
            route = routes.get(key)
            if route is not None:
                tokens.setdefault(route[0], []).append((route[1], index, token))
        for finish in out.finishes:
            route = routes.pop(finish.key, None)
            self._engine.world.note(self._engine, "finish", finish.key, finish.reason.value)
            if route is not None:
                route[0].handles.pop(route[1], None)
                ends.setdefault(route[0], []).append((route[1], finish))
        for stream in tokens | ends:
            stream.end.send(Tokens(tuple(tokens.get(stream, ())), tuple(ends.get(stream, ()))))

    def _tick(self) -> None:
        engine = self._engine
        for stream in [one for one in self._streams if engine.clock() - one.heard_at > ROUTER_SILENCE_S]:
            stream.end.send(Bye())
            stream.end.close()
            self._forget(stream)
        change = engine.names.drain()
        if change is not None:
            if change.reset:
                self._known.clear()
            for name in change.removed:
                self._known.pop(name, None)
            self._known |= dict.fromkeys(change.added)
        status = Status(engine.status())
        for stream in self._streams:
            stream.end.send(status)
            if not stream.has_names:
                stream.has_names = True
                stream.end.send(Names(True, tuple(self._known), ()))
            elif change is not None:
                stream.end.send(Names(change.reset, change.added, change.removed))
        self._ticks = bool(self._streams)
        if self._ticks:
            engine.after(STATUS_PERIOD_S, self._tick)
