"""With `security.tls` the certificate decides who a process is, whatever else it knows; without TLS nothing leaves."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from small_cluster import SmallCluster, connected, small_cluster

from diptych.cluster.config import SecuritySettings, TlsSettings
from diptych.cluster.security import trust_of
from diptych.kvtransfer.transports.grpc import GrpcReader
from diptych.protos import engine_pb2 as pb
from diptych.protos import kv_pb2
from diptych.protos.channels import (
    FETCH_BYTES,
    KV_SESSION,
    SESSION,
    listen,
    make_server,
    open_blocking_channel,
    open_channel,
)
from diptych.protos.errors import StartupError
from diptych.protos.trust import Refusals, TlsIdentity, Trust
from diptych.protos.types import EngineId, EngineRef, Role

SECRET = bytes(range(32))
PROMPT = "t1 t2 t3 t4 t5 t6 t7 t8 " * 20


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def files(folder: Path) -> SecuritySettings:
    return SecuritySettings(
        tls=TlsSettings(ca=folder / "ca.crt", cert=folder / "{role}.crt", key=folder / "{role}.key")
    )


def identity(folder: Path, name: str, ca: Path) -> TlsIdentity:
    return TlsIdentity(*((f).read_bytes() for f in (ca / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")))


@asynccontextmanager
async def tls_cluster(run_dir: Path, authority: Path, host: str | None) -> AsyncIterator[SmallCluster]:
    security = files(authority)

    def trust(name: str) -> Trust:
        return trust_of(security, SECRET, name)

    async with small_cluster(run_dir, run_dir, transport="grpc", host=host, security=security, trust=trust) as cluster:
        yield await connected(cluster)


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::1"])
async def test_answers_are_the_same_with_tls_and_without(run_dir: Path, authority: Path, host: str | None) -> None:
    """On unix sockets and over TCP, KV bytes included: the transport is gRPC."""
    async with small_cluster(run_dir, run_dir) as plain:
        expected = await (await connected(plain)).answer(PROMPT)
    async with tls_cluster(run_dir, authority, host) as cluster:
        assert cluster.refs[Role.PREFILL].target.startswith("unix:" if host is None else ("127", "[::1]"))
        assert await cluster.answer(PROMPT) == expected
        assert cluster.count(Role.DECODE, "kv_pairs_grpc_total") == 1
        assert cluster.count(Role.PREFILL, "kv_transfers_total") == 1


async def status_of(trust: Trust, ref: EngineRef, method: str, role: str) -> tuple[grpc.StatusCode, str]:
    """How a call ends that this process makes with `trust`, by certificate and by proof; OK when it is answered."""
    return await asyncio.to_thread(_status_of, trust, ref, method, role)


def _status_of(trust: Trust, ref: EngineRef, method: str, role: str) -> tuple[grpc.StatusCode, str]:
    # What opens a session of either kind, so that only the refusal can end it. With a blocking channel: of a call that
    # ends before the first write, grpc.aio says INTERNAL instead of the status that came.
    first = pb.RouterFrame(open=pb.Open(router_id="r")) if method == SESSION else kv_pb2.KvMsg()
    with open_blocking_channel(trust, ref.target, role=role) as channel:
        frames = iter([first.SerializeToString()])
        call = channel.stream_stream(method)(frames, metadata=trust.proof(method, ref), timeout=10)
        try:
            next(call)
        except StopIteration:
            pass
        except grpc.RpcError:
            return call.code(), str(call.details())
        finally:
            call.cancel()
        return grpc.StatusCode.OK, ""


async def test_a_certificate_opens_the_calls_of_its_role_only(run_dir: Path, authority: Path) -> None:
    """The proof says `router` or whatever is allowed: the secret alone makes no decode engine a router."""
    allowed = {SESSION: "router", KV_SESSION: "decode", FETCH_BYTES: "decode"}
    refused = grpc.StatusCode.PERMISSION_DENIED
    async with tls_cluster(run_dir, authority, "127.0.0.1") as cluster:
        ref = cluster.refs[Role.PREFILL]
        for method, name in allowed.items():
            for shown in ("router", "prefill", "decode"):
                trust = Trust(SECRET, name, tls=identity(authority, shown, authority))
                code, words = await status_of(trust, ref, method, "prefill")
                assert (code is refused and "role" in words) is (shown != name), (method, shown, code, words)
        assert cluster.count(Role.PREFILL, "engine_refused_calls_total") == 2
        assert cluster.count(Role.PREFILL, "kv_refused_calls_total") == 4
        # The other way: a certificate of the right role, and a proof of another.
        trust = Trust(SECRET, "decode", tls=identity(authority, "router", authority))
        assert (await status_of(trust, ref, SESSION, "prefill"))[0] is refused
        assert await cluster.answer(PROMPT)


async def test_a_router_speaks_to_an_engine_of_the_expected_role_only(run_dir: Path, authority: Path) -> None:
    async with tls_cluster(run_dir, authority, "127.0.0.1") as cluster:
        trust = trust_of(files(authority), SECRET, "router")
        code, words = await status_of(trust, cluster.refs[Role.PREFILL], SESSION, "decode")
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "Hostname Verification" in words
        assert (await status_of(trust, cluster.refs[Role.DECODE], SESSION, "decode"))[0] is not code


async def test_strangers_expired_certificates_and_plaintext_are_refused_before_any_call(
    run_dir: Path, authority: Path, stranger: Path, expired: Path
) -> None:
    """Within a second, with the right secret, and nothing of the cluster changes."""
    async with tls_cluster(run_dir, authority, "127.0.0.1") as cluster:
        before = await cluster.answer(PROMPT)
        ref = cluster.refs[Role.PREFILL]
        callers = {
            "wrong authority": Trust(SECRET, "decode", tls=identity(stranger, "decode", authority)),
            "expired": Trust(SECRET, "decode", tls=identity(expired, "decode", authority)),
            "plaintext": Trust(SECRET, "decode"),
        }
        for what, trust in callers.items():
            began = time.monotonic()
            code, words = await status_of(trust, ref, KV_SESSION, "prefill")
            assert code is grpc.StatusCode.UNAVAILABLE, (what, code, words)
            assert time.monotonic() - began < 5, what
        believed = (authority / "ca.crt").read_bytes()
        assert await asyncio.to_thread(_is_refused_without_certificate, ref, believed)
        assert await cluster.answer(PROMPT) == before


def _is_refused_without_certificate(ref: EngineRef, ca: bytes) -> bool:
    name = [("grpc.ssl_target_name_override", "prefill.diptych.internal")]
    with grpc.secure_channel(ref.target, grpc.ssl_channel_credentials(ca), options=name) as channel:
        proof = Trust(SECRET, "decode").proof(KV_SESSION, ref)
        try:
            next(channel.stream_stream(KV_SESSION)(iter([b""]), metadata=proof, timeout=10))
        except grpc.RpcError as exc:
            return bool(exc.code() is grpc.StatusCode.UNAVAILABLE)
        return False


async def test_no_channel_leaves_the_machine_in_plaintext() -> None:
    me = EngineRef(EngineId("p"), 1, "192.0.2.1:1")
    trust = Trust(SECRET, "router")
    with pytest.raises(StartupError, match=r"192\.0\.2\.1:1 leaves this machine.*security\.tls"):
        open_channel(trust, me.target, role="prefill")
    with pytest.raises(StartupError, match="leaves this machine"):
        GrpcReader(me, 1, trust)
    server = make_server(trust, me, {"": Refusals("test")})
    with pytest.raises(StartupError, match="leaves this machine"):
        listen(server, trust, "0.0.0.0:0")
    allowed = Trust(SECRET, "router", allow_plaintext=True)
    await open_channel(allowed, me.target, role="prefill").close()
    await asyncio.sleep(0)


async def test_an_address_that_is_taken_is_named(run_dir: Path) -> None:
    me = EngineRef(EngineId("p"), 1, "")
    trust = Trust(SECRET, "prefill")
    first, second = (make_server(trust, me, {}) for _ in range(2))
    probe = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{probe}"):
        listen(second, trust, f"127.0.0.1:{probe}")
    await first.stop(None)
