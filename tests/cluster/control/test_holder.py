"""The listening socket outlives those who accept from it: handed out, shared, and shown to a later holder."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from diptych.cluster.api.address import bind
from diptych.cluster.control.held import HeldSocket
from diptych.cluster.control.holder import SocketHolder, holder_path
from diptych.protos.errors import StartupError

HOST = "127.0.0.1"
PATIENCE_S = 20.0


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dt-") as folder:
        yield holder_path(Path(folder))


@pytest.fixture
def holder(path: Path) -> Iterator[SocketHolder]:
    made = SocketHolder(path)
    made.start()
    yield made
    made.close()


@asynccontextmanager
async def replica(path: Path, name: str = "one", port: int = 0) -> AsyncIterator[tuple[HeldSocket, asyncio.Server]]:
    """Asks, and greets every connection by its name."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name.encode())
        writer.close()

    held = await HeldSocket.ask(path, HOST, port)
    server = await asyncio.start_server(greet, sock=held.listening())
    try:
        yield held, server
    finally:
        server.close()
        await held.close()


async def said(connection: socket.socket) -> str:
    reader, writer = await asyncio.open_connection(sock=connection)
    async with asyncio.timeout(PATIENCE_S):
        data = await reader.read()
    writer.close()
    await writer.wait_closed()
    return data.decode()


def address(server: asyncio.Server) -> tuple[str, int]:
    host, port = server.sockets[0].getsockname()
    return str(host), int(port)


async def test_a_holder_that_begins_while_the_one_before_lives_has_its_sockets(path: Path) -> None:
    """As when Serve replaces holder and replicas at once: the next replica may ask before the old holder ends."""
    old, new = SocketHolder(path), SocketHolder(path)
    old.start()
    async with replica(path) as (first, server):
        await first.accepts()
        new.start()
        async with replica(path, "two") as (second, other):
            assert address(other) == address(server)
            assert not second.is_first
            await second.accepts()
            old.close()
            await first.leaves()
            assert await first.successor(PATIENCE_S) == os.getpid()
    new.close()


async def test_all_replicas_of_an_address_accept_from_one_queue(holder: SocketHolder) -> None:
    async with replica(holder.path) as (first, server), replica(holder.path, "two") as (second, other):
        assert first.is_first
        assert second.is_first  # none has said that it accepts
        assert address(server) == address(other)
        server.close()
        assert await said(socket.create_connection(address(other))) == "two"


async def test_connections_wait_while_nobody_accepts(holder: SocketHolder) -> None:
    async with replica(holder.path) as (held, server):
        await held.accepts()
        where = address(server)
    waiting = [socket.create_connection(where) for _ in range(20)]
    async with replica(holder.path, "next") as (held, server):
        assert address(server) == where
        assert not held.is_first
        assert [await said(one) for one in waiting] == ["next"] * 20


REPLICA = """
import socket, sys
from pathlib import Path
from diptych.cluster.control import held
connection, before, sock = held._dial(Path(sys.argv[1]), ("127.0.0.1", 0), None)
connection.sendall(b'{"state": "accepts"}')
print(sock.getsockname()[1], flush=True)
sock.setblocking(True)
while True:
    kept = sock.accept()  # and says nothing
"""


def accepting_process(path: Path) -> tuple[subprocess.Popen[str], tuple[str, int]]:
    process = subprocess.Popen([sys.executable, "-c", REPLICA, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, (HOST, int(process.stdout.readline()))


async def test_a_killed_replica_takes_no_waiting_connection_with_it(holder: SocketHolder) -> None:
    process, where = accepting_process(holder.path)
    os.kill(process.pid, signal.SIGSTOP)  # it takes no more of them
    waiting = [socket.create_connection(where) for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    late = socket.create_connection(where)
    async with asyncio.timeout(PATIENCE_S):
        while True:  # the holder notices in a thread of its own
            async with replica(holder.path, "next") as (held, _):
                if held.replicas_before["died"]:
                    assert held.replicas_before == {"handed_over": 0, "died": 1}
                    assert not held.is_first
                    told = [await said(one) for one in [*waiting, late]]
                    break
    assert set(told[1:]) == {"next"}  # the first one may have been in the arms of the dead


async def test_who_leaves_is_told_as_soon_as_another_accepts(holder: SocketHolder) -> None:
    async with replica(holder.path) as (old, _):
        await old.accepts()
        await old.leaves()
        assert await old.successor(0.05) is None
        async with replica(holder.path, "two") as (new, _):
            assert new.replicas_before == {"handed_over": 1, "died": 0}
            assert await old.successor(0.05) is None, "it does not accept yet"
            await new.accepts()
            assert await old.successor(PATIENCE_S) == os.getpid()
            async with replica(holder.path, "three") as (third, _):
                assert third.replicas_before == {"handed_over": 1, "died": 0}


async def test_who_leaves_while_another_accepts_is_told_at_once(holder: SocketHolder) -> None:
    async with replica(holder.path) as (one, _), replica(holder.path, "two") as (other, _):
        await one.accepts()
        await other.accepts()
        await other.leaves()
        assert await other.successor(PATIENCE_S) == os.getpid()
        assert await one.successor(0.05) is None, "who stays has no successor"


async def test_those_who_leave_do_not_succeed_each_other(holder: SocketHolder) -> None:
    async with replica(holder.path) as (one, _), replica(holder.path, "two") as (other, _):
        await one.accepts()
        await one.leaves()
        await other.accepts()
        assert await one.successor(PATIENCE_S) == os.getpid()
        await other.leaves()
        assert await other.successor(0.05) is None


async def test_an_orderly_end_is_no_death(holder: SocketHolder) -> None:
    async with replica(holder.path) as (held, _):
        await held.accepts()
    async with replica(holder.path) as (held, _):
        assert held.replicas_before == {"handed_over": 0, "died": 0}


async def test_a_port_in_use_is_refused_with_the_sentence_of_a_listener(holder: SocketHolder) -> None:
    with bind(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"port {port} .* in use .* router\.port"):
            await HeldSocket.ask(holder.path, HOST, port)
    async with replica(holder.path, port=port) as (_, server):  # and bound when it is free
        assert address(server) == (HOST, port)


async def test_different_addresses_are_different_sockets(holder: SocketHolder) -> None:
    with bind(HOST, 0) as taken:
        port = taken.getsockname()[1]
    async with replica(holder.path) as (_, one), replica(holder.path, port=port) as (_, other):
        assert address(one) != address(other) == (HOST, port)


async def test_without_a_holder_asking_is_an_error_of_the_system(path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        await HeldSocket.ask(path, HOST, 0)


async def test_the_end_of_the_holder_closes_an_address_that_no_replica_has(holder: SocketHolder) -> None:
    async with replica(holder.path) as (_, server):
        where = address(server)
    socket.create_connection(where).close()
    await asyncio.to_thread(holder.close)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where)
    assert not holder.path.exists()


async def test_a_replica_serves_on_without_its_holder_and_shows_the_next_one_its_socket(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diptych.cluster.control.held.RETRY_S", 0.01)
    caplog.set_level(logging.INFO)
    first, second = SocketHolder(path), SocketHolder(path)
    first.start()
    async with replica(path) as (held, server):
        await held.accepts()
        await asyncio.to_thread(first.close)
        assert await said(socket.create_connection(address(server))) == "one"
        await held.leaves()
        second.start()
        async with asyncio.timeout(PATIENCE_S):
            while "another holder has the listening socket" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with replica(path, "two") as (new, other):
            assert address(other) == address(server)
            assert not new.is_first
            await new.accepts()
            assert await held.successor(PATIENCE_S) == os.getpid()
    await asyncio.to_thread(second.close)


async def test_a_later_holder_at_the_same_path_is_not_undone_by_the_end_of_the_earlier_one(path: Path) -> None:
    first, second = SocketHolder(path), SocketHolder(path)
    first.start()
    second.start()
    await asyncio.to_thread(first.close)
    async with replica(path):  # there is one still
        pass
    await asyncio.to_thread(second.close)


@pytest.mark.parametrize(
    "words",
    [b"\0", b"[]", b"{}", b'{"host": "127.0.0.1", "port": "x", "pid": 1}', b"{" * 5000, b'{"state": "accepts"}'],
    ids=["zero", "list", "nothing", "no port", "too long", "no question"],
)
async def test_senseless_words_end_their_connection_alone(holder: SocketHolder, words: bytes) -> None:
    async with replica(holder.path) as (held, server):
        await held.accepts()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(PATIENCE_S)
            stranger.connect(str(holder.path))
            stranger.send(words)
            assert stranger.recv(10) == b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(PATIENCE_S)
            stranger.connect(str(holder.path))
            stranger.send(json.dumps({"host": HOST, "port": 0, "pid": 1}).encode())
            _, fds, _, _ = socket.recv_fds(stranger, 4096, 1)
            os.close(fds[0])
            stranger.send(b'{"state": "rules"}')
            assert stranger.recv(10) == b""
        assert await said(socket.create_connection(address(server))) == "one"


def test_a_path_that_cannot_be_is_a_sentence() -> None:
    with pytest.raises(StartupError, match=r"cannot create /nonexistent/listen\.sock"):
        SocketHolder(holder_path(Path("/nonexistent"))).start()
