"""Garbage, truncated, oversized, replayed and unauthenticated bytes on every socket that a cluster listens on.

Refused before they are parsed, counted where anybody can count them, logged once; nothing else changes: the same tokens
before and after, no block, slot, task or session more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import random
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from small_cluster import SmallCluster, connected, small_cluster
from strangers import ANSWER_S, METHODS, Bomb, body_of, call, listening, refusals, throw, unchanged

from diptych.cluster.router.session import EngineSession, SessionTerms
from diptych.protos.channels import (
    MAX_MESSAGE_BYTES,
    SESSION,
)
from diptych.protos.trust import PROOF_KEY, Trust
from diptych.protos.types import GENERATING, EngineId, EngineRef, Role

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS_FRAME = b"\0\0\0\4\0\0\0\0\0"


def frame(kind: int, payload: bytes, *, stream: int = 1, flags: int = 0, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def garbage(canary: Path) -> dict[str, bytes]:
    rng = random.Random(5)
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    return {
        "nothing": b"",
        "one byte": b"\0",
        "noise": rng.randbytes(200_000),
        "zeros": bytes(100_000),
        "a pickle": pickle.dumps(Bomb(canary)),
        "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300),
        "half a preface": PREFACE[:10],
        "a preface and noise": PREFACE + rng.randbytes(50_000),
        "a frame that says 16 MiB": PREFACE + SETTINGS_FRAME + frame(0, b"x" * 100, length=(1 << 24) - 1),
        "a frame cut short": PREFACE + SETTINGS_FRAME + frame(1, b"\x82\x86", length=200),
        "headers that cannot be decoded": PREFACE + SETTINGS_FRAME + frame(1, b"\xff" * 200, flags=4),
        "a stream reset 500 times": PREFACE + SETTINGS_FRAME + frame(3, b"\0\0\0\x08") * 500,
        "half a request": request[:-20],
        "a body cut short": request + b"100\r\n\r\n{",
        "a body that is no JSON": request + b"6\r\nconnection: close\r\n\r\n\x80\x05\x95..",
        "headers without an end": request + b"1\r\nx: " + b"a" * 100_000,
        "two lengths": request + b"2\r\ncontent-length: 3\r\n\r\n{}",
    }


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


async def test_garbage_on_every_listening_socket_changes_nothing(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture, tmp_path: Path, run_dir: Path
) -> None:
    canary = tmp_path / "canary"
    targets = listening()
    ring = {f"unix:{run_dir / path}" for path in os.listdir(run_dir) if path.startswith("kv-")}
    engines = {ref.target for ref in cluster.refs.values()}
    assert len(ring) == 1
    assert targets >= ring | engines | {f"tcp:{cluster.listener.port}"}
    foreign = targets - ring - engines - {f"tcp:{cluster.listener.port}"}
    assert not foreign, f"sockets that this test does not know: {foreign}"
    payloads = garbage(canary)
    async with unchanged(cluster, caplog):
        for target in sorted(targets):
            for what, data in payloads.items():
                answer = await throw(target, data)
                assert b"Traceback" not in answer, (target, what)
                if target in engines:
                    assert PROOF_KEY.encode() not in answer, (target, what)
    assert not canary.exists()
    assert cluster.count(Role.PREFILL, "kv_refused_attachments_total") == len(payloads)
    assert await cluster.metric("diptych_listener_refused_total") >= 8
    told = refusals(caplog)
    assert len(told) == 2, told
    assert all("refused" in line for line in told)


async def test_a_silent_and_a_slow_caller_keep_nobody_out(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with unchanged(cluster, caplog, asks=True):
        held = []
        for target in listening():
            kind, _, where = target.partition(":")
            caller = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
            caller.connect(where if kind == "unix" else ("127.0.0.1", int(where)))
            held.append(caller)
        assert await cluster.answer("t5 t6 t7") == await cluster.answer("t5 t6 t7")
        for caller in held:
            caller.close()
        await cluster.at_rest()


async def test_calls_without_the_secret_end_before_their_body_is_read(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Every method of every engine, and methods that do not exist: with no proof, a wrong one, one for another."""
    stranger = Trust(bytes(32), "router")
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    async with unchanged(cluster, caplog):
        num_calls = dict.fromkeys(GENERATING, 0)
        for role, ref in cluster.refs.items():
            elsewhere = EngineRef(EngineId("prefill-9"), ref.epoch, ref.target)
            earlier = replace(ref, epoch=ref.epoch - 1)
            reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            for method, name in [*METHODS.items(), (reflection, "router"), ("/x/y", "router")]:
                holder = Trust(cluster.secret, name)
                for metadata in (
                    None,
                    ((PROOF_KEY, ""),),
                    ((PROOF_KEY, "1 router 1 " + "0" * 32 + " " + "0" * 64),),
                    ((PROOF_KEY, "x" * 4000),),
                    ((f"{PROOF_KEY}-bin", b"\xff" * 100),),
                    stranger.proof(method, ref),
                    holder.proof(method, elsewhere),
                    holder.proof(method, earlier),
                    holder.proof("/x/z", ref),
                    holder.proof(method, ref) + holder.proof(method, ref),
                ):
                    code = await asyncio.to_thread(call, ref, method, body_of(method, ref), metadata, stranger)
                    assert code is unauthenticated, (role, method, metadata, code)
                    num_calls[role] += 1
        # 64 MiB that nobody reads.
        ref = cluster.refs[Role.DECODE]
        code = await asyncio.to_thread(call, ref, SESSION, bytes(64 << 20), None, stranger)
        assert code in (unauthenticated, grpc.StatusCode.RESOURCE_EXHAUSTED)
        num_calls[Role.DECODE] += 1
        # Each body would have opened a session: the router's are the only ones.
        assert [engine._sessions.num_sessions for engine in cluster.engines.values()] == [1, 1]
    for role, count in num_calls.items():
        counted = cluster.count(role, "engine_refused_calls_total") + cluster.count(role, "kv_refused_calls_total")
        assert counted == count
    told = refusals(caplog)
    assert len(told) == 4, told  # two services of two engines, one peer each
    assert cluster.secret.hex() not in caplog.text


async def test_the_wrong_role_with_the_right_secret_is_refused(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with unchanged(cluster, caplog):
        for ref in cluster.refs.values():
            for method, name in METHODS.items():
                for other in {"router", "prefill", "decode"} - {name}:
                    proof = Trust(cluster.secret, other).proof(method, ref)
                    code = await asyncio.to_thread(
                        call, ref, method, body_of(method, ref), proof, Trust(bytes(32), "x")
                    )
                    assert code is grpc.StatusCode.PERMISSION_DENIED, (method, other, code)


async def test_a_recorded_session_opens_nothing_when_it_is_played_again(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture, run_dir: Path
) -> None:
    """Every byte that a router sent, through a socket that listens in, again to the same engine."""
    ref = cluster.refs[Role.DECODE]
    spoken = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(ref.target.removeprefix("unix:"))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, copy: bytearray | None) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    if copy is not None:
                        copy += data
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, forth, spoken), pump(back, writer, None))

    async with unchanged(cluster, caplog):
        ear = await asyncio.start_unix_server(relay, run_dir / "ear.sock")
        ready = asyncio.Event()
        infos = {session.info.ref: session.info for session in cluster.router.view.sessions()}
        heard = replace(infos[ref], ref=replace(ref, target=f"unix:{run_dir / 'ear.sock'}"))
        terms = SessionTerms(
            router_id="listened to",
            connect_timeout_s=ANSWER_S,
            silence_s=ANSWER_S,
            clock=asyncio.get_running_loop().time,
            trust=Trust(cluster.secret, "router"),
        )
        session = EngineSession(heard, terms, on_change=ready.set)
        session.start()
        async with asyncio.timeout(ANSWER_S):
            await ready.wait()
        await session.stop()
        ear.close()
        assert PROOF_KEY.encode() in spoken or len(spoken) > 200  # its name may be compressed
        for times in range(1, 101):
            await throw(ref.target, bytes(spoken))
            async with asyncio.timeout(ANSWER_S):
                while cluster.count(Role.DECODE, "engine_refused_calls_total") < times:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    assert cluster.count(Role.DECODE, "engine_refused_calls_total") == 100
    (told,) = refusals(caplog)
    assert "used before" in told


async def test_a_holder_of_the_secret_that_talks_nonsense_loses_its_own_stream_only(
    cluster: SmallCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no message, messages over the limit, frames out of order; on every method."""
    rng = random.Random(6)
    bodies = {
        "noise": rng.randbytes(1000),
        "an endless varint": b"\xff" * 100,
        "a message that says 2 GiB": b"\x0a\xff\xff\xff\xff\x07" + b"x" * 50,
        "groups 10,000 deep": b"\x0b" * 10_000,
        "nothing": b"",
        "over the limit": bytes(MAX_MESSAGE_BYTES + 1),
        "a pickle": pickle.dumps({"a": [1]}),
        "JSON": json.dumps({"open": {}}).encode(),
    }
    async with unchanged(cluster, caplog):
        for ref in cluster.refs.values():
            for method, name in METHODS.items():
                trust = Trust(cluster.secret, name)
                for what, body in bodies.items():
                    code = await asyncio.to_thread(call, ref, method, body, trust.proof(method, ref), trust)
                    assert code is not grpc.StatusCode.OK, (method, what)
                    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, (method, what)
