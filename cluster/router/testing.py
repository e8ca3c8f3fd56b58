"""Fakes of what stands around a router: an engine that echoes the prompt over the real protocol, and a directory.

EchoEngine serves engine.proto in this process or, as `python -m diptych.cluster.router.testing`, in one of its own.
Token i of an answer is the prompt's token i modulo its length. Used by tests and bench/router.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import grpc

from diptych.protos import engine_pb2 as pb
from diptych.protos.codec import (
    finish_to_pb,
    key_from_pb,
    logprobs_to_pb,
    order_from_pb,
    prompt_logprobs_to_pb,
    status_to_pb,
)
from diptych.protos.engine_pb2_grpc import EngineServicer, add_EngineServicer_to_server
from diptych.protos.errors import DiptychError, EngineFault
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    Finish,
    FinishReason,
    PoolCounts,
    PrefillOrder,
    PromptLogprobs,
    Role,
    StageTimes,
    TokenLogprobs,
    TransferKey,
)

STATUS_PERIOD_S = 0.25
ECHO_ROOT = b"echo"  # of an echo engine's block names


@dataclass
class Faults:
    """What goes wrong, until changed. The numbers count generated tokens of a request."""

    silent: bool = False  # take orders, answer nothing
    error: DiptychError | None = None  # end each order with it ...
    error_at: int = 0  # ... before this token index
    error_count: int = 1 << 30  # ... for so many orders
    drop_stream_at: int | None = None  # end the session before this index, or the end, with all tokens before it sent
    no_first_token: bool = False  # prefill: hand over without having sent token 0
    also_first_token: bool = False  # decode: send token 0 although prefill did
    swap_pairs: bool = False  # decode: tokens 2,1, 4,3, ...
    no_prompt_logprobs: bool = False  # although they were asked for
    wrong_first_token: bool = False  # decode: with also_first_token, another one than prefill's
    dies_at: int | None = None  # the whole engine ends before this index, and takes with it what is not sent yet
    poison: int | None = None  # it ends when it gets an order whose prompt holds this token
    raises_on: int | None = None  # a step with a prompt that holds this token ends all orders with engine_fault
    is_stopped: bool = False  # it keeps its connections, and neither reads nor writes


class _Tokens(NamedTuple):
    handles: list[int]  # the same one, as often as there are tokens
    indexes: list[int]
    tokens: list[int]
    top: int | None = None  # SamplingParams.logprobs


def echo_logprobs(token: int, top: int) -> TokenLogprobs:
    """What an echo engine tells of a token: certain of itself, and of its successors a little less."""
    return TokenLogprobs(-0.25, 1, tuple((token + i, -0.25 - i) for i in range(top)))


@dataclass(eq=False)
class _Session:
    outbox: asyncio.Queue[pb.EngineFrame | _Tokens | None] = field(default_factory=asyncio.Queue)
    jobs: dict[TransferKey, set[asyncio.Task[None]]] = field(default_factory=dict)
    kept: pb.EngineFrame | _Tokens | None = None  # taken from the outbox, but part of the next frame
    is_dead: bool = False  # its engine was killed: nothing more goes out

    def end_job(self, key: TransferKey, task: asyncio.Task[None]) -> None:
        """A phase is over."""
        tasks = self.jobs.get(key, set())
        tasks.discard(task)
        if not tasks:
            self.jobs.pop(key, None)

    async def next_frame(self) -> pb.EngineFrame | None:
        """As an engine packs it: one step's tokens of all requests together, each request in it once."""
        first, self.kept = self.kept, None
        if first is None:
            first = await self.outbox.get()
        if not isinstance(first, _Tokens):
            return first
        handles, indexes, tokens = list(first.handles), list(first.indexes), list(first.tokens)
        logprobs = _rows(first, 0)
        seen = {first.handles[0]}
        while not self.outbox.empty():
            piece = self.outbox.get_nowait()
            if not isinstance(piece, _Tokens) or piece.handles[0] in seen:
                self.kept = piece
                if piece is None:
                    self.outbox.put_nowait(None)
                break
            seen.add(piece.handles[0])
            logprobs += _rows(piece, len(handles))
            handles += piece.handles
            indexes += piece.indexes
            tokens += piece.tokens
        step = pb.StepTokens(handle=handles, index=indexes, token=tokens, logprobs=logprobs)
        return pb.EngineFrame(tokens=step)


def _rows(piece: _Tokens, row: int) -> list[pb.Logprobs]:
    if piece.top is None:
        return []
    return [logprobs_to_pb(echo_logprobs(token, piece.top), row + i) for i, token in enumerate(piece.tokens)]


class EchoEngine(EngineServicer):
    """A gRPC server with an engine's manners. `orders` and `cancels` log what routers sent."""

    def __init__(
        self,
        target: str,
        *,
        engine_id: str,
        roles: frozenset[Role],
        epoch: int = 1,
        model: str = "echo",
        step_s: float = 0.0,
        tokens_per_step: int = 1,
        block_tokens: int = 16,
        num_blocks: int = 4096,
        max_context_tokens: int = 8192,
        keeps_orders: bool = True,
    ) -> None:
        self.info = EngineInfo(
            ref=EngineRef(EngineId(engine_id), epoch, target),
            roles=roles,
            model=model,
            pid=os.getpid(),
            host="localhost",
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            max_context_tokens=max_context_tokens,
            dtype="none",
            degraded=("echo engine: nothing is computed",),
        )
        self.faults = Faults()
        self.orders: list[PrefillOrder | DecodeOrder] = []
        self.cancels: list[TransferKey] = []
        self.on_death: Callable[[], None] = lambda: None
        self.on_order: Callable[[], None] = lambda: None
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._sessions: set[_Session] = set()
        self._server: grpc.aio.Server | None = None
        self._steps = 0
        self.stepped_at = 0.0  # loop time of the last step
        self.num_raised = 0  # steps
        self._working: dict[asyncio.Task[None], tuple[_Session, int, PrefillOrder | DecodeOrder]] = {}
        self._death: asyncio.Task[None] | None = None
        self._keeps_orders = keeps_orders

    async def start(self) -> None:
        """Listen."""
        self._server = grpc.aio.server()
        add_EngineServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(self.info.ref.target)
        await self._server.start()

    async def stop(self) -> None:
        """End all sessions and the server."""
        self.faults.is_stopped = False
        if self._death is not None:
            await self._death
        self.drop_streams()
        await self._close()

    def die(self) -> None:
        """As a killed process does: connections break in mid-frame, nothing is said."""
        if self._death is None:
            for session in self._sessions:
                session.is_dead = True
            self._death = asyncio.create_task(self._close())
            self.on_death()

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace=None)

    @property
    def open_orders(self) -> int:
        """Phases in work, over all sessions."""
        return sum(len(tasks) for session in self._sessions for tasks in session.jobs.values())

    def tell_names(self, added: tuple[int, ...], removed: tuple[int, ...] = (), *, reset: bool = False) -> None:
        """To every session: blocks that its prefix index gained and lost."""
        for session in self._sessions:
            change = pb.PrefixChange(reset=reset, added=added, removed=removed)
            session.outbox.put_nowait(pb.EngineFrame(prefix=change))

    def drop_streams(self) -> None:
        """End every session."""
        for session in list(self._sessions):
            self._end(session)

    def send_status(self, status: EngineStatus) -> None:
        """To every router."""
        for session in self._sessions:
            session.outbox.put_nowait(pb.EngineFrame(status=status_to_pb(status)))

    def status(self) -> EngineStatus:
        """A plausible reading."""
        blocks = PoolCounts(total=self.info.num_blocks, free=self.info.num_blocks, cached=0, used=0)
        return EngineStatus(
            running=self.open_orders, blocks=blocks, steps=self._steps, counters={"generated_tokens_total": self._steps}
        )

    async def Session(self, requests: AsyncIterator[pb.RouterFrame], context: Any) -> AsyncIterator[pb.EngineFrame]:
        """The RPC."""
        first = await anext(aiter(requests))
        if first.open.engine_epoch not in (0, self.info.ref.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another life of this engine was meant")
        session = _Session()
        await self._continued()
        self._sessions.add(session)
        session.outbox.put_nowait(pb.EngineFrame(welcome=self._welcome()))
        session.outbox.put_nowait(pb.EngineFrame(status=status_to_pb(self.status())))
        tasks = [asyncio.create_task(part) for part in (self._read(requests, session), self._tell(session))]
        try:
            while (frame := await session.next_frame()) is not None:
                await self._continued()
                if session.is_dead:
                    await asyncio.Event().wait()  # until the server has broken the connection
                yield frame
        finally:
            self._end(session)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _continued(self) -> None:
        while self.faults.is_stopped:  # noqa: ASYNC110 - tests set a plain flag
            await asyncio.sleep(0.01)

    async def _tell(self, session: _Session) -> None:
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            session.outbox.put_nowait(pb.EngineFrame(status=status_to_pb(self.status())))

    def _welcome(self) -> pb.Welcome:
        info = self.info
        return pb.Welcome(
            me=pb.EngineRef(engine_id=info.ref.engine_id, epoch=info.ref.epoch, target=info.ref.target),
            roles=sorted(info.roles),
            model=info.model,
            block_tokens=info.block_tokens,
            num_blocks=info.num_blocks,
            max_context_tokens=info.max_context_tokens,
            prefix_root=ECHO_ROOT,
        )

    def _end(self, session: _Session) -> None:
        self._sessions.discard(session)
        for tasks in list(session.jobs.values()):
            for task in list(tasks):
                task.cancel()
        session.outbox.put_nowait(None)

    async def _read(self, requests: AsyncIterator[pb.RouterFrame], session: _Session) -> None:
        async for frame in requests:
            await self._continued()
            if frame.WhichOneof("frame") == "submit":
                order = order_from_pb(frame.submit, asyncio.get_running_loop().time())
                if self._keeps_orders:
                    self.orders.append(order)
                self.on_order()
                if self.faults.poison in order.request.prompt:
                    self.die()
                task = asyncio.create_task(self._work(session, frame.submit.handle, order))
                session.jobs.setdefault(order.request.key, set()).add(task)
                task.add_done_callback(partial(session.end_job, order.request.key))
                self._working[task] = session, frame.submit.handle, order
                task.add_done_callback(self._working.pop)
            elif frame.WhichOneof("frame") == "cancel":
                key = key_from_pb(frame.cancel)
                self.cancels.append(key)
                for task in session.jobs.pop(key, set()):
                    task.cancel()
        session.outbox.put_nowait(None)

    async def _work(self, session: _Session, handle: int, order: PrefillOrder | DecodeOrder) -> None:
        """One phase of one request, a step at a time."""
        request = order.request
        is_prefill = isinstance(order, PrefillOrder)
        has_peer = isinstance(order, PrefillOrder) or order.prefill is not None
        total, reason = _length(request.prompt, request.sampling.max_tokens, request.sampling.stop_token_ids)
        first = len(request.resume)
        begin = first if is_prefill or not has_peer or self.faults.also_first_token else first + 1
        end = first + 1 if is_prefill else total
        if self.faults.silent:
            return
        if is_prefill and self.faults.no_first_token:
            begin = first + 1
        if not is_prefill and has_peer and total == first + 1:
            self._finish(session, handle, order, FinishReason.CANCELLED, 0)
            return
        if (is_prefill or begin == first) and not self.faults.no_prompt_logprobs:
            self._tell_prompt(session, handle, order)
        if is_prefill or not has_peer:
            session.outbox.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(started=[handle])))
        for index in range(begin, end, self._tokens_per_step):
            await asyncio.sleep(self._step_s)
            if self._breaks(session, index):
                return
            self.stepped_at = asyncio.get_running_loop().time()
            if self.faults.raises_on in request.prompt:
                self._raise()
                return
            if self.faults.error is not None and index >= self.faults.error_at and self.faults.error_count > 0:
                self.faults.error_count -= 1
                self._finish(session, handle, order, FinishReason.ERROR, index, self.faults.error)
                return
            indexes = list(range(index, min(index + self._tokens_per_step, end)))
            self._steps += 1
            session.outbox.put_nowait(self._tokens(handle, order, indexes, end))
        if is_prefill and total > end:
            reason = FinishReason.HANDOFF
        if not self._breaks(session, end):
            self._finish(session, handle, order, reason, end)

    def _raise(self) -> None:
        self.num_raised += 1
        ends: dict[_Session, list[pb.Finish]] = {}
        for task, (session, handle, order) in list(self._working.items()):
            end = _end_of(order, FinishReason.ERROR, 0, self._step_s, EngineFault("the step raised"))
            ends.setdefault(session, []).append(finish_to_pb(handle, end))
            if task is not asyncio.current_task():
                task.cancel()
        for session, finishes in ends.items():
            session.outbox.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(finishes=finishes)))

    def _breaks(self, session: _Session, index: int) -> bool:
        """Whether nothing is sent any more, from token `index` on."""
        faults = self.faults
        if faults.drop_stream_at is not None and index >= faults.drop_stream_at:
            self._end(session)
            return True
        if faults.dies_at is not None and index >= faults.dies_at:
            self.die()
        return session.is_dead

    def _tokens(self, handle: int, order: PrefillOrder | DecodeOrder, indexes: list[int], end: int) -> _Tokens:
        prompt = order.request.prompt
        if self.faults.swap_pairs and isinstance(order, DecodeOrder):  # 1<->2, 3<->4; the last one stays
            indexes = [min(i + 1, end - 1) if i % 2 else i - 1 if i and i < end else i for i in indexes]
        tokens = [prompt[i % len(prompt)] for i in indexes]
        if self.faults.wrong_first_token and isinstance(order, DecodeOrder) and 0 in indexes:
            tokens[indexes.index(0)] += 1
        return _Tokens([handle] * len(indexes), indexes, tokens, order.request.sampling.logprobs)

    def _tell_prompt(self, session: _Session, handle: int, order: PrefillOrder | DecodeOrder) -> None:
        prompt, top = order.request.prompt, order.request.sampling.prompt_logprobs
        if top is None:
            return
        half = (len(prompt) + 1) // 2
        for first, tokens in ((1, prompt[1:half]), (max(half, 1), prompt[max(half, 1) :])):
            piece = PromptLogprobs(order.request.key, first, tuple(echo_logprobs(token, top) for token in tokens))
            step = pb.StepTokens(prompt_logprobs=[prompt_logprobs_to_pb(handle, piece)])
            session.outbox.put_nowait(pb.EngineFrame(tokens=step))

    def _finish(
        self,
        session: _Session,
        handle: int,
        order: PrefillOrder | DecodeOrder,
        reason: FinishReason,
        num_tokens: int,
        error: DiptychError | None = None,
    ) -> None:
        finish = _end_of(order, reason, num_tokens, self._step_s, error)
        session.outbox.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(finishes=[finish_to_pb(handle, finish)])))


def _end_of(
    order: PrefillOrder | DecodeOrder,
    reason: FinishReason,
    num_tokens: int,
    step_s: float,
    error: DiptychError | None,
) -> Finish:
    is_prefill = isinstance(order, PrefillOrder)
    crossed = isinstance(order, DecodeOrder) and order.prefill is not None
    return Finish(
        key=order.request.key,
        role=Role.PREFILL if is_prefill else Role.DECODE,
        reason=reason,
        num_tokens=num_tokens,
        cached_tokens=len(order.request.prompt) // 16 * 16 if is_prefill else 0,
        error_code=error.code if error is not None else "",
        error_message=str(error) if error is not None else "",
        times=StageTimes(prefill=step_s) if is_prefill else StageTimes(decode=step_s * num_tokens),
        transfer_bytes=1024 * len(order.request.prompt) if crossed else 0,
        transport="echo" if crossed else "",
    )


def _length(prompt: tuple[int, ...], max_tokens: int, stops: frozenset[int]) -> tuple[int, FinishReason]:
    for i in range(min(max_tokens, len(prompt))):
        if prompt[i] in stops:
            return i + 1, FinishReason.STOP
    return max_tokens, FinishReason.LENGTH


class StaticDirectory:
    """An EngineDirectory that tests write to."""

    def __init__(self, members: list[EngineInfo] | None = None) -> None:
        self._members = members or []
        self._version = 1
        self._changed = asyncio.Event()
        self.is_settled = asyncio.Event()  # clear it: some engine is still starting
        self.is_settled.set()

    def set(self, members: list[EngineInfo]) -> None:
        """A new membership."""
        self._members = members
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        """The present membership and its version."""
        return self._version, list(self._members)

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        """Waits for a version newer than `version`."""
        while self._version <= version:
            await self._changed.wait()
        return await self.engines()

    async def settled(self) -> None:
        """Waits for `is_settled`."""
        await self.is_settled.wait()


async def _serve(args: argparse.Namespace) -> None:
    engine = EchoEngine(
        args.target,
        engine_id=args.engine_id,
        roles=frozenset(Role(name) for name in args.roles.split(",")),
        step_s=args.step_ms / 1e3,
        num_blocks=args.num_blocks,
        keeps_orders=False,
    )
    await engine.start()
    print("ready", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await engine.stop()


def main() -> None:
    """Serve one echo engine until SIGTERM; prints `ready` when it listens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--engine-id", required=True)
    parser.add_argument("--roles", default="prefill,decode")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--num-blocks", type=int, default=1 << 16)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
