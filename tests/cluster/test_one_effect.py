"""Every message between processes may get lost, its reply may, and it may come twice: the effect is one, or one error.

The messages are those of the descriptors: a new one without a row fails the first test. What the hinge's machines say
is tried in virtual time, the rest between a router and two engines over gRPC.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from small_cluster import SmallCluster, connected, small_cluster

import diptych.cluster.router.session as router_session
import diptych.kvtransfer.dial as dial
import diptych.kvtransfer.transports.grpc as grpc_transport
from diptych.kernels.echo.testing import expected_tokens
from diptych.kvtransfer.messages import Message
from diptych.kvtransfer.testing import HingePair, Weather
from diptych.kvtransfer.wire import to_pb
from diptych.protos import engine_pb2, kv_pb2
from diptych.protos.errors import Cancelled
from diptych.protos.ports import Committed
from diptych.protos.types import Role, TransferKey

# What each message asks for; None: nothing, it is news or an answer itself.
REPLIES: dict[str, str | None] = {
    "open": "welcome",
    "submit": "tokens",
    "cancel": "tokens",
    "ping": None,
    "welcome": None,
    "tokens": None,
    "status": None,
    "prefix": None,
    "hello": "hello_ack",
    "hello_ack": None,
    "expect": "ready",
    "ready": "ack",
    "ack": None,
    "finished": "final_ack",
    "final_ack": None,
    "abort": "abort_ack",
    "abort_ack": None,
    "heartbeat": "heartbeat",
    "FetchBytes": "KvBytes",
}
OF_MACHINES = ("expect", "ready", "ack", "finished", "final_ack", "abort", "abort_ack", "heartbeat")
OF_SESSIONS = ("open", "submit", "cancel", "ping", "welcome", "tokens", "status", "prefix")


def kinds(message: Any, oneof: str) -> list[str]:
    return [field.name for field in message.DESCRIPTOR.oneofs_by_name[oneof].fields]


def test_every_message_has_a_row_and_is_tried() -> None:
    session = [*kinds(engine_pb2.RouterFrame, "frame"), *kinds(engine_pb2.EngineFrame, "frame")]
    hinge = kinds(kv_pb2.KvMsg, "msg")
    methods = {
        method.name
        for module in (engine_pb2, kv_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    } - {"Session", "Embed"}  # a call by itself, which changes nothing; tests/cluster/router/test_embedding.py
    assert set(REPLIES) == {*session, *hinge, *methods}
    assert set(OF_SESSIONS) == set(session)
    assert {*OF_MACHINES, "hello", "hello_ack"} == set(hinge)
    assert methods == {"FetchBytes"}


# ---- the hinge's machines, in virtual time --------------------------------------------------------------------------

A, B, C = (TransferKey(bytes([n]) * 16) for n in (1, 2, 3))


@dataclass
class Meddled(HingePair):
    """The message number `nth` of one kind, either way, is lost or comes twice, the second time later."""

    kind: str = ""
    action: str = "lost"
    nth: int = 1
    seen: int = 0

    def _transmit(self, by: str, pair_epoch: int, message: Message) -> None:
        if to_pb(message).WhichOneof("msg") == self.kind:
            self.seen += 1
            if self.seen == self.nth and self.action == "lost":
                return
            if self.action == "twice":
                self._after(self.rng.uniform(0.0, 1.0), lambda: self._arrive(by, pair_epoch, message))
        super()._transmit(by, pair_epoch, message)


ON_THE_HINGE = [
    (kind, action)
    for kind in OF_MACHINES
    for action in ("lost", "reply lost", "twice")
    if action != "reply lost" or REPLIES[kind]
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(("kind", "action"), ON_THE_HINGE)
def test_a_message_of_the_hinge_has_one_effect(kind: str, action: str, nth: int, seed: int) -> None:
    """The pair itself checks that nothing is released, told or written twice, and that all KV is the right one."""
    struck = (REPLIES[kind] or "") if action == "reply lost" else kind
    how = "twice" if action == "twice" else "lost"
    pair = Meddled(seed=seed, kind=struck, action=how, nth=nth, weather=Weather(delay_s=0.05, copy_s=0.02))
    pair.whole(A, 30)  # eight chunks through four slots
    pair.expect(B, 20)
    pair.open(B, 20)
    pair.compute(B, 9)
    pair.run(1.0)
    pair.abort_d(B, Cancelled("the client went away"))
    pair.run(pair.settings.lease_s + pair.settings.stall_s + 2)
    assert set(pair.outcomes) == {A, B}
    assert pair.seen >= (nth if how == "lost" and struck in ("ready", "ack", "heartbeat") else 1)
    pair.kind = ""
    pair.whole(C, 30)
    pair.run(5.0)
    assert pair.committed(C)
    if how == "twice":
        assert isinstance(pair.outcomes[A], Committed)
        assert pair.released[A].error is None
    pair.check_quiet()


# ---- a router's session and the calls around a transfer, over gRPC --------------------------------------------------


@dataclass
class Meddler:
    """Stands between a stub and its caller: the frame number `nth` of one kind is lost, or comes twice."""

    kind: str = ""
    action: str = "lost"
    nth: int = 1
    done: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def times(self, kind: str) -> int:
        self.seen[kind] += 1
        if kind != self.kind or self.seen[kind] != self.nth:
            return 1
        self.done[self.action] += 1
        return 0 if self.action == "lost" else 2


def kind_of(frame: Any) -> str:
    return str(frame.WhichOneof("msg" if isinstance(frame, kv_pb2.KvMsg) else "frame"))


class Call:
    """A stream through a meddler."""

    def __init__(self, call: Any, meddler: Meddler) -> None:
        self._call = call
        self._meddler = meddler
        self._again: list[Any] = []

    async def write(self, frame: Any) -> None:
        for _ in range(self._meddler.times(kind_of(frame))):
            await self._call.write(frame)

    async def read(self) -> Any:
        while not self._again:
            frame = await self._call.read()
            if frame is grpc.aio.EOF:
                return frame
            self._again = [frame] * self._meddler.times(kind_of(frame))
        return self._again.pop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@asynccontextmanager
async def meddled(
    run_dir: Path, meddler: Meddler, monkeypatch: pytest.MonkeyPatch, transport: str = "shm"
) -> AsyncIterator[SmallCluster]:
    """A cluster all of whose frames pass `meddler`, at the router and at the decode engine."""
    real_engine, real_kv = router_session.EngineStub, dial.kv_pb2_grpc.KvChannelStub
    real_init = router_session.EngineSession.__init__

    class EngineStub:
        def __init__(self, channel: Any) -> None:
            stub = real_engine(channel)
            self.Session = lambda **how: Call(stub.Session(**how), meddler)

    class KvStub:
        def __init__(self, channel: Any) -> None:
            stub = real_kv(channel)
            self.Session = lambda **how: Call(stub.Session(**how), meddler)
            self.FetchBytes = lambda request, **how: fetch(stub, request, how)

    def fetch(stub: Any, request: Any, how: Any) -> Iterator[Any]:
        times = meddler.times("FetchBytes")
        if times == 2:
            metadata = how.pop("metadata")
            key, proof = metadata[0]
            assert list(stub.FetchBytes(request, metadata=metadata, **how))
            with pytest.raises(grpc.RpcError):  # the same bytes again: a proof is good once
                list(stub.FetchBytes(request, metadata=((key, proof),), **how))
            raise Again
        if not times:
            return iter(())
        frames = list(stub.FetchBytes(request, **how))
        return iter(frames if meddler.times("KvBytes") else ())

    class Again(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    def init(self: Any, *args: Any, **how: Any) -> None:
        real_init(self, *args, **how)
        self._connect_timeout_s = 0.5

    monkeypatch.setattr(router_session, "EngineStub", EngineStub)
    monkeypatch.setattr(router_session, "PING_PERIOD_S", 0.05)
    monkeypatch.setattr(router_session.EngineSession, "__init__", init)
    monkeypatch.setattr(dial.kv_pb2_grpc, "KvChannelStub", KvStub)
    assert grpc_transport.kv_pb2_grpc is dial.kv_pb2_grpc
    async with small_cluster(run_dir, run_dir, transport=transport) as cluster:  # type: ignore[arg-type]
        yield await connected(cluster)


PROMPT = list(range(40, 140))
DEADLINE_S = 3.0
ACTIONS = [pytest.param("lost", marks=pytest.mark.slow), "twice"]  # what is lost is waited for


async def ask(cluster: SmallCluster, prompt: list[int], *, num: int = 12) -> tuple[int, Any]:
    """Status, and the tokens of an answer or the code of an error."""
    body = {"model": "echo", "prompt": prompt, "max_tokens": num, "temperature": 0, "timeout_s": DEADLINE_S}
    async with httpx2.AsyncClient(timeout=30) as client:
        reply = await client.post(f"{cluster.listener.url}/v1/completions", json=body)
    if reply.status_code != 200:
        return reply.status_code, reply.json()["error"]["code"]
    return 200, [int(word[1:]) for word in reply.json()["choices"][0]["text"].split()]


async def leave(cluster: SmallCluster) -> None:
    """Ask for a long answer and go away after its first event."""
    body = {"model": "echo", "prompt": PROMPT[:20], "max_tokens": 6000, "stream": True, "timeout_s": DEADLINE_S}
    async with (
        httpx2.AsyncClient(timeout=30) as client,
        client.stream("POST", f"{cluster.listener.url}/v1/completions", json=body) as reply,
    ):
        await anext(reply.aiter_bytes())


def orders(cluster: SmallCluster) -> dict[str, float]:
    return {
        role: cluster.count(role, f"{role}_requests_total") + cluster.count(role, "kv_thread_faults_total") * 1000
        for role in cluster.engines
    }


async def check_one_effect(cluster: SmallCluster, meddler: Meddler) -> None:
    """One request under the meddler, one client that leaves, one request after it."""
    right = list(expected_tokens(PROMPT, 12))
    status, got = await ask(cluster, PROMPT)
    if status == 200:
        assert got == right
    else:
        assert meddler.action == "lost"
        assert status in (503, 504), got
    if meddler.action == "twice" and meddler.kind not in ("open", "welcome"):
        assert orders(cluster) == {Role.PREFILL: 1, Role.DECODE: 1}
    await leave(cluster)
    await cluster.at_rest()
    meddler.kind = ""
    await connected(cluster)
    assert await ask(cluster, PROMPT) == (200, right)
    other = [token + 1 for token in PROMPT]
    assert await ask(cluster, other) == (200, list(expected_tokens(other, 12)))
    await cluster.at_rest()
    assert meddler.done[meddler.action] == 1


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", OF_SESSIONS)
async def test_a_frame_of_a_session_has_one_effect(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, action: str
) -> None:
    """That a reply is lost is a row of the reply: `open` and its welcome, `submit` and its tokens."""
    meddler = Meddler(kind, action)
    async with meddled(run_dir, meddler, monkeypatch) as cluster:
        await check_one_effect(cluster, meddler)


# A stream of gRPC repeats no frame: that bytes are asked for a second time is the row of FetchBytes.
AROUND = [
    pytest.param(kind, "lost", marks=pytest.mark.slow) for kind in ("hello", "hello_ack", "FetchBytes", "KvBytes")
]
AROUND += [pytest.param(kind, "twice") for kind in ("hello", "hello_ack", "FetchBytes")]


@pytest.mark.parametrize(("kind", "action"), AROUND)
async def test_a_call_around_a_transfer_has_one_effect(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, action: str
) -> None:
    meddler = Meddler(kind, action)
    async with meddled(run_dir, meddler, monkeypatch, transport="grpc") as cluster:
        await check_one_effect(cluster, meddler)
