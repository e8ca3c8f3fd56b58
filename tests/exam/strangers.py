"""How a stranger reaches a cluster: raw bytes, gRPC calls, and what must be the same afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest
from small_cluster import SmallCluster

from diptych.protos import engine_pb2 as pb
from diptych.protos import kv_pb2
from diptych.protos.channels import FETCH_BYTES, KV_SESSION, SESSION, open_blocking_channel
from diptych.protos.trust import Trust
from diptych.protos.types import EngineRef

PROMPT = "t1 t2 t3 t4 t5 t6 t7 t8 " * 20
OTHER = "t9 t8 t7 t6 " * 30
ANSWER_S = 10
_MOVES = re.compile(r"refused|seconds|collector|_s$")


class Bomb:
    """Whoever unpickles it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._canary}",)


def listening() -> set[str]:
    """Unix paths and 127.0.0.1:port of every socket on which this process listens, as the kernel says."""
    own = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(entry))
    found = set()
    for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
        columns = line.split()
        if int(columns[3], 16) & 0x10000 and f"socket:[{columns[6]}]" in own:
            found.add(f"unix:{columns[7]}")
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in own:
                found.add(f"tcp:{int(columns[1].rpartition(':')[2], 16)}")
    return found


async def throw(target: str, data: bytes) -> bytes:
    """Send, close our half, read until the other side closes or some seconds have passed."""
    kind, _, where = target.partition(":")
    opened = asyncio.open_unix_connection(where) if kind == "unix" else asyncio.open_connection("127.0.0.1", int(where))
    reader, writer = await opened
    try:
        writer.write(data)
        with contextlib.suppress(OSError):
            writer.write_eof()
        async with asyncio.timeout(ANSWER_S):
            return await reader.read()
    except (OSError, TimeoutError):
        return b""
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def digest(cluster: SmallCluster) -> dict[str, dict[str, object]]:
    """All that an engine holds and counts, but for time and for what it refused."""
    found: dict[str, dict[str, object]] = {}
    for ref, engine in cluster.alive.items():
        status = engine.status()
        counters = {name: count for name, count in status.counters.items() if not _MOVES.search(name)}
        found[ref.engine_id] = {
            "blocks": status.blocks,
            "held": (status.running, status.waiting, status.transfers, status.ring_slots_busy, status.steps),
            "counters": counters,
            "sessions": engine._sessions.num_sessions,
            "requests": engine._sessions.num_requests,
            "names": frozenset(engine._sessions._names),
        }
    return found


@contextlib.asynccontextmanager
async def unchanged(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture, *, asks: bool = False
) -> AsyncIterator[None]:
    """What happens inside leaves tokens, pools, sessions and tasks as they were, and no error in the log; and all that
    engines hold and count, unless it `asks` for answers.
    """
    before = await cluster.answer(PROMPT)
    assert await cluster.answer(PROMPT) == before
    await cluster.answer(OTHER)
    pools = await cluster.at_rest()
    sessions = list(cluster.router.view.sessions())
    async with asyncio.timeout(ANSWER_S):
        while any(len(e._sessions._names) != e.status().blocks.cached for e in cluster.alive.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the names of the last blocks are on their way to the routers
    tasks, sockets, state = len(asyncio.all_tasks()), listening(), digest(cluster)
    yield
    for engine, held in ({} if asks else digest(cluster)).items():
        changed = {key: (state[engine][key], now) for key, now in held.items() if state[engine][key] != now}
        assert not changed, (engine, changed)
    assert await cluster.answer(PROMPT) == before
    assert await cluster.at_rest() == pools
    assert list(cluster.router.view.sessions()) == sessions
    assert all(session.is_ready and session.losses == 0 for session in sessions)
    assert listening() == sockets
    async with asyncio.timeout(ANSWER_S):
        while len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110  connections end a little after their last byte
            await asyncio.sleep(0.01)
    loud = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert not loud, [record.getMessage() for record in loud]


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "diptych.protos.trust"]


def call(ref: EngineRef, method: str, body: bytes, metadata: object, trust: Trust) -> grpc.StatusCode:
    """One call with one message, as raw bytes; how it ends."""
    return told(ref, method, [body], metadata, trust)[0]


def told(
    ref: EngineRef,
    method: str,
    bodies: Iterable[bytes],
    metadata: object,
    trust: Trust,
    timeout_s: float | None = ANSWER_S,
) -> tuple[grpc.StatusCode, str]:
    """One call with some messages; how it ends, and in which words."""
    with open_blocking_channel(
        trust, ref.target, role="any", options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        stream = channel.stream_stream(method)(iter(bodies), metadata=metadata, timeout=timeout_s)
        try:
            for _ in stream:
                pass
        except grpc.RpcError:
            pass
        code = stream.code()
        assert isinstance(code, grpc.StatusCode)
        return code, str(stream.details())


def body_of(method: str, ref: EngineRef) -> bytes:
    """What would open a session if it were read."""
    if method == SESSION:
        return pb.RouterFrame(open=pb.Open(router_id="stranger", engine_epoch=ref.epoch)).SerializeToString()
    if method == KV_SESSION:
        hello = kv_pb2.Hello(engine_id="decode-0", engine_epoch=1 << 40, peer_epoch=ref.epoch, transports=["grpc"])
        return kv_pb2.KvMsg(src_epoch=1 << 40, pair_epoch=1 << 30, hello=hello).SerializeToString()
    return kv_pb2.FetchRequest(key=kv_pb2.TransferKey(transfer_id=bytes(16))).SerializeToString()


METHODS = {SESSION: "router", KV_SESSION: "decode", FETCH_BYTES: "decode"}
