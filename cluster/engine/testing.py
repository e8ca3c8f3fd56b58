"""Both ends of an engine's session for tests: sessions behind a real server, and a router that speaks frame by frame.

The test plays the step thread through inbox and outbox.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc

from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.engine_pb2_grpc import EngineStub
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    Role,
    SamplingParams,
    StageTimes,
    StepOutput,
    TransferKey,
)

from .inbox import Inbox, InboxItem
from .outbox import Outbox
from .session import EngineSessions

EPOCH = 7
WAIT_S = 20


def key(n: int) -> TransferKey:
    """Of request number `n`."""
    return TransferKey(n.to_bytes(16, "big"))


class Harness:
    """EngineSessions behind a real server; the test plays the step thread through inbox and outbox."""

    def __init__(self, folder: Path, roles: frozenset[Role], max_outputs: int) -> None:
        ref = EngineRef(EngineId("decode-0"), EPOCH, f"unix:{folder}/e.sock")
        self.info = EngineInfo(
            ref=ref,
            roles=roles,
            model="m",
            pid=1,
            host="h",
            block_tokens=16,
            num_blocks=9,
            max_context_tokens=99,
            dtype="x",
        )
        self.inbox = Inbox(max_orders=8)
        self.outbox = Outbox(max_outputs)
        self.status = EngineStatus(running=1)
        self.abandoned: list[tuple[TransferKey, str]] = []
        self.sessions = EngineSessions(
            info=self.info,
            inbox=self.inbox,
            outbox=self.outbox,
            reading=lambda: self.status,
            prefix_root=b"root",
            abandon=lambda key, error: self.abandoned.append((key, error.code)),
            clock=lambda: 50.0,
        )
        self._taken: list[InboxItem] = []

    async def items(self, count: int) -> list[InboxItem]:
        """The next `count` items of the inbox."""
        async with asyncio.timeout(WAIT_S):
            while len(self._taken) < count:
                self._taken += self.inbox.take_all(0.0)
                await asyncio.sleep(0.001)
        taken, self._taken = self._taken[:count], self._taken[count:]
        return taken

    async def until(self, condition: Callable[[], bool]) -> None:
        """Poll until it holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - it asks the code under test, which has no event for it
                await asyncio.sleep(0.001)

    @contextlib.asynccontextmanager
    async def router(self, epoch: int = EPOCH) -> AsyncIterator[Router]:
        """A stream that has said its first frame."""
        async with grpc.aio.insecure_channel(self.info.ref.target) as channel:
            call = EngineStub(channel).Session()  # type: ignore[no-untyped-call]
            router = Router(call)
            await router.send(pb.RouterFrame(open=pb.Open(router_id="r", engine_epoch=epoch)))
            yield router
            call.cancel()


class Router:
    """A client's end, frame by frame."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call

    async def send(self, frame: pb.RouterFrame) -> None:
        """Any frame."""
        await self.call.write(frame)

    async def submit(self, handle: int, n: int, *, role: Role = Role.DECODE) -> None:
        """Order number `n`."""
        request = GenerateRequest(
            key=key(n), prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=5), deadline=12.0, traceparent="00-ab"
        )
        order: PrefillOrder | DecodeOrder = DecodeOrder(request=request, prefill=None)
        if role is Role.PREFILL:
            order = PrefillOrder(request=request, decode=EngineRef(EngineId("d"), 1, "unix:/d"))
        await self.send(pb.RouterFrame(submit=codec.submit_to_pb(handle, order, 10.0)))

    async def cancel(self, n: int) -> None:
        """Of order number `n`."""
        await self.send(pb.RouterFrame(cancel=pb.Cancel(transfer_id=key(n).transfer_id)))

    async def read(self) -> pb.EngineFrame:
        """The next frame."""
        async with asyncio.timeout(WAIT_S):
            frame = await self.call.read()
        assert isinstance(frame, pb.EngineFrame), f"the stream ended: {await self.call.code()}"
        return frame

    async def tokens(self) -> pb.StepTokens:
        """The next StepTokens message; status and welcome are skipped."""
        while (frame := await self.read()).WhichOneof("frame") != "tokens":
            pass
        return frame.tokens

    async def names(self) -> tuple[bool, list[int], list[int]]:
        """The next PrefixChange: reset, added, removed."""
        while (frame := await self.read()).WhichOneof("frame") != "prefix":
            pass
        return frame.prefix.reset, sorted(frame.prefix.added), sorted(frame.prefix.removed)

    async def refused(self) -> tuple[grpc.StatusCode, str]:
        """The status that ended the stream."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(grpc.RpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code(), await self.call.details()


Start = Callable[..., Awaitable[Harness]]


@contextlib.asynccontextmanager
async def harnesses(folder: Path) -> AsyncIterator[Start]:
    """Makes one, started; all of them are stopped afterwards."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(roles: frozenset[Role] = frozenset({Role.DECODE}), max_outputs: int = 100) -> Harness:
            harness = Harness(folder, roles, max_outputs)
            server = grpc.aio.server()
            harness.sessions.attach(server)
            server.add_insecure_port(harness.info.ref.target)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            stack.push_async_callback(harness.sessions.close)
            return harness

        yield make


def output(*rows: tuple[int, int, int], finishes: list[Finish] | None = None) -> StepOutput:
    """Of rows (request, index, token)."""
    out = StepOutput(finishes=finishes or [])
    for n, index, token in rows:
        out.add(key(n), index, token)
    return out


def finish(n: int, reason: FinishReason = FinishReason.STOP, role: Role = Role.DECODE) -> Finish:
    """The end of request number `n`."""
    return Finish(key=key(n), role=role, reason=reason, num_tokens=2, times=StageTimes(decode=1.5))
