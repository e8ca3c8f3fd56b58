"""What gRPC ports answer to abuse by a holder of the secret: a code and words, never a crash; limits are named."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from small_cluster import SmallCluster, connected, small_cluster
from strangers import METHODS, body_of, throw, told, unchanged
from text_cluster import SECRET as TEXT_SECRET
from text_cluster import make_encoder, text_cluster

from diptych.cluster.config import SecuritySettings, TlsSettings
from diptych.cluster.security import trust_of
from diptych.protos.channels import EMBED, FETCH_BYTES, KV_SESSION, MAX_MESSAGE_BYTES, SESSION
from diptych.protos.trust import Trust
from diptych.protos.types import Role

SECRET = bytes(range(32))
CODES = grpc.StatusCode
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health/Check"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def cluster(run_dir: Path) -> AsyncIterator[SmallCluster]:
    async with small_cluster(run_dir, run_dir) as made:
        yield await connected(made)


def nested(depth: int) -> bytes:
    """A message within a message within ..., as deep as that, in a field that nobody knows."""
    body = b""
    for _ in range(depth):
        body = b"\x7a" + _varint(len(body)) + body
    return body


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


ABUSE: dict[str, tuple[bytes, set[grpc.StatusCode], str]] = {
    "groups 10,000 deep": (b"\x0b" * 10_000, {CODES.INVALID_ARGUMENT}, "no message"),
    "64 MiB": (bytes(64 << 20), {CODES.RESOURCE_EXHAUSTED}, str(MAX_MESSAGE_BYTES)),
    "one byte over the limit": (bytes(MAX_MESSAGE_BYTES + 1), {CODES.RESOURCE_EXHAUSTED}, str(MAX_MESSAGE_BYTES)),
    "a length without an end": (b"\x0a" + b"\xff" * 20, {CODES.INVALID_ARGUMENT}, "no message"),
    # Of a field that nobody knows the content is not looked at: a message without a word.
    "messages 10,000 deep": (
        nested(10_000),
        {CODES.INVALID_ARGUMENT, CODES.FAILED_PRECONDITION, CODES.PERMISSION_DENIED, CODES.NOT_FOUND, CODES.ABORTED},
        "",
    ),
}


@pytest.mark.parametrize("what", ABUSE)
async def test_a_message_that_is_too_much_has_a_code_and_its_limit_a_name(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    body, codes, words = ABUSE[what]
    async with unchanged(cluster, caplog):
        for role, ref in cluster.refs.items():
            for method, name in METHODS.items():
                trust = Trust(cluster.secret, name)
                code, details = await asyncio.to_thread(told, ref, method, [body], trust.proof(method, ref), trust)
                if role is Role.DECODE and method != SESSION:  # it gives nobody KV
                    assert code in {CODES.UNIMPLEMENTED, CODES.RESOURCE_EXHAUSTED}, (method, code, details)
                    continue
                assert code in codes, (method, code, details)
                assert words in details, (method, details)


@pytest.mark.parametrize("what", ABUSE)
async def test_an_engine_of_texts_refuses_it_as_well(run_dir: Path, what: str) -> None:
    body, codes, words = ABUSE[what]
    folder = await asyncio.to_thread(make_encoder, run_dir / "model")
    async with text_cluster(run_dir, {"m": folder}) as made:
        before = (await made.post("/v1/embeddings", model="m", input="the cat sat")).json()
        assert before["data"]
        trust = Trust(TEXT_SECRET, "router")
        for ref in made.infos:
            code, details = await asyncio.to_thread(told, ref, EMBED, [body], trust.proof(EMBED, ref), trust)
            assert code in codes | {CODES.OK}, (code, details)  # OK: the answer is an error's part
            assert code is CODES.OK or words in details, details
            code, _ = await asyncio.to_thread(told, ref, EMBED, [b""], (), trust)
            assert code is CODES.UNAUTHENTICATED
        after = (await made.post("/v1/embeddings", model="m", input="the cat sat")).json()
        assert after["data"] == before["data"]


async def test_what_is_no_method_is_refused_in_words_and_there_is_no_reflection(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Also to who holds the secret: a service that nobody may call is known to nobody."""
    unknown = [REFLECTION, REFLECTION.replace("v1", "v1alpha"), HEALTH, "/x/y"]
    service = SESSION.rpartition("/")[0]
    async with unchanged(cluster, caplog):
        for ref in cluster.refs.values():
            for method in [*unknown, f"{service}/Shutdown", SESSION.lower(), f"{SESSION}/", f"/{SESSION}"]:
                trust = Trust(cluster.secret, "router")
                code, details = await asyncio.to_thread(told, ref, method, [b""], trust.proof(method, ref), trust)
                assert code in {CODES.PERMISSION_DENIED, CODES.UNIMPLEMENTED, CODES.UNAUTHENTICATED}, (method, code)
                assert details, method


async def test_a_call_without_a_deadline_ends_with_its_reason(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for ever for what will not come."""
    async with unchanged(cluster, caplog):
        for ref in cluster.refs.values():
            for method, name in METHODS.items():
                trust, proof = Trust(cluster.secret, name), Trust(cluster.secret, name).proof(method, ref)
                body = b"" if method == SESSION else body_of(method, ref)
                if method == KV_SESSION:
                    body = b"\x08\x01"  # another life, and no word
                async with asyncio.timeout(20):
                    code, _ = await asyncio.to_thread(told, ref, method, [body], proof, trust, None)
                assert code is not CODES.OK, method


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
FRAMES = {
    "data before headers": frame(0, 0, 1, b"\0" * 64),
    "headers of stream 0": frame(1, 4, 0, b"\x82"),
    "an even stream": frame(1, 4, 2, b"\x82\x86\x84"),
    "a window of 2^31 - 1, twice": frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "settings of five bytes": frame(4, 0, 0, b"\0" * 5),
    "an unknown frame, 10,000 times": frame(0x77, 0, 0, b"x") * 10_000,
    "pings, 10,000 times": frame(6, 0, 0, b"12345678") * 10_000,
    "settings, 10,000 times": frame(4, 0, 0, b"") * 10_000,
    "continuations without an end": frame(1, 0, 1, b"\x82") + frame(9, 0, 1, b"\x82") * 5_000,
    "a pushed promise": frame(5, 4, 1, b"\0\0\0\2\x82"),
    "a priority on itself": frame(2, 0, 1, b"\0\0\0\1\0"),
    "a goodbye, and then a call": frame(7, 0, 0, b"\0" * 8) + frame(1, 4, 1, b"\x82"),
}


async def test_bad_frames_end_their_own_connection(cluster: SmallCluster, caplog: pytest.LogCaptureFixture) -> None:
    async with unchanged(cluster, caplog):
        for ref in cluster.refs.values():
            for what, data in FRAMES.items():
                answer = await throw(ref.target, PREFACE + data)
                assert b"Traceback" not in answer, what
                assert len(answer) < 1 << 20, what


async def test_plaintext_to_a_tls_port_is_closed_and_the_port_lives(run_dir: Path, authority: Path) -> None:
    security = SecuritySettings(
        tls=TlsSettings(ca=authority / "ca.crt", cert=authority / "{role}.crt", key=authority / "{role}.key")
    )

    def trust(name: str) -> Trust:
        return trust_of(security, SECRET, name)

    async with small_cluster(
        run_dir, run_dir, transport="grpc", host="127.0.0.1", security=security, trust=trust
    ) as made:
        cluster = await connected(made)
        before = await cluster.answer("t1 t2 t3")
        for ref in cluster.refs.values():
            for method, name in METHODS.items():
                plain = Trust(SECRET, name)
                code, details = await asyncio.to_thread(
                    told, ref, method, [body_of(method, ref)], plain.proof(method, ref), plain
                )
                assert code is CODES.UNAVAILABLE, (method, code)
                assert details
            host, _, port = ref.target.rpartition(":")
            for data in (PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 1000):
                with socket.create_connection((host, int(port)), timeout=10) as sock:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    while await asyncio.to_thread(sock.recv, 1 << 16):
                        pass
        assert await cluster.answer("t1 t2 t3") == before
        assert cluster.count(Role.PREFILL, "kv_thread_faults_total") == 0


def test_each_method_of_the_services_stands_in_the_tables() -> None:
    """So that a new one is abused, too."""
    from diptych.protos import engine_pb2, kv_pb2

    found = {
        f"/{service.full_name}/{method.name}"
        for module in (engine_pb2, kv_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert found == {*METHODS, EMBED} == {SESSION, KV_SESSION, FETCH_BYTES, EMBED}
