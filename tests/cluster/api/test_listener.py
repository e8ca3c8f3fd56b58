"""The listener against slow, broken and greedy clients, on raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest

from diptych.cluster.api import listener
from diptych.cluster.api.address import bind
from diptych.cluster.api.listener import Listener, start_listener
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.router.rig import until
from diptych.protos.errors import StartupError

LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def send(door: FrontDoor, data: bytes, *, eof: bool = False) -> bytes:
    """Everything that comes back until the server closes."""
    async with dialled(door) as (reader, writer):
        writer.write(data)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(10):
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def dialled(door: FrontDoor) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def code_of(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return str(json.loads(body)["error"]["code"])


@pytest.fixture
async def strict() -> AsyncIterator[FrontDoor]:
    limits = LimitSettings(
        header_bytes=2048, header_timeout_s=0.15, body_timeout_s=0.15, idle_timeout_s=0.2, write_timeout_s=0.3
    )
    async with front_door(limits) as door:
        yield door


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"bad header\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: x\n\n\x00",
        b"BREW /health HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_a_malformed_request_is_400_once_and_the_connection_closes(strict: FrontDoor, data: bytes) -> None:
    answer = await send(strict, data)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 ", b"HTTP/1.1 408 "))
    assert strict.decode.orders == []


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"y" * 4096 + b"\r\n\r\n",
        b"x: " + b"y" * 100_000,
        b"".join(b"h%d: 1\r\n" % i for i in range(1000)) + b"\r\n",
        b"h: \r\n" * 200 + b"\r\n",
    ],
)
async def test_headers_over_the_limit_are_431(strict: FrontDoor, headers: bytes) -> None:
    answer = await send(strict, b"GET /health HTTP/1.1\r\n" + headers)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert code_of(answer) == "headers_too_large"


async def test_a_path_over_the_limit_is_431(strict: FrontDoor) -> None:
    answer = await send(strict, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_a_body_of_one_byte_chunks_is_refused(strict: FrontDoor) -> None:
    answer = await send(strict, HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")  # a reset may outrun the answer
    assert strict.decode.orders == []
    await until(lambda: strict.listener.connections == 0)


async def test_unfinished_headers_meet_their_deadline(strict: FrontDoor) -> None:
    answer = await send(strict, b"GET /health HTTP/1.1\r\nhost:")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert code_of(answer) == "header_timeout"


async def test_a_connection_that_asks_nothing_is_closed_without_a_word(strict: FrontDoor) -> None:
    assert await send(strict, b"") == b""


async def test_empty_lines_do_not_keep_a_connection_alive(strict: FrontDoor) -> None:
    async with dialled(strict) as (reader, writer), asyncio.timeout(10):
        end = asyncio.create_task(reader.read())
        while not end.done():
            writer.write(b"\r\n")
            await asyncio.wait([end], timeout=0.02)
        await asyncio.gather(end, return_exceptions=True)


async def test_an_unfinished_body_meets_its_deadline(strict: FrontDoor) -> None:
    answer = await send(strict, HEAD + b"content-length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert code_of(answer) == "body_timeout"


async def test_an_idle_connection_is_kept_for_the_next_request_and_then_closed(strict: FrontDoor) -> None:
    async with dialled(strict) as (reader, writer), asyncio.timeout(10):
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await reader.readline()
            while (await reader.readline()) != b"\r\n":
                pass
            assert await reader.readexactly(15) == b'{"status":"ok"}'
        assert await reader.read() == b""


async def test_a_client_that_reads_nothing_is_dropped_and_its_request_cancelled() -> None:
    async with front_door(LimitSettings(write_timeout_s=0.2)) as door:
        body = json.dumps({"model": "echo", "prompt": "x" * 1000, "max_tokens": 1000, "stream": True}).encode()
        many = (HEAD + b"content-length: %d\r\n\r\n" % len(body) + body) * 60  # more than the sockets' buffers hold
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (door.listener.host, door.listener.port))
        send_all = asyncio.create_task(loop.sock_sendall(sock, many))
        await until(lambda: len(door.decode.orders) > 0)
        await until(lambda: door.listener.connections == 0)
        assert len(door.decode.orders) < 60
        await until(lambda: door.router.in_flight == {})
        send_all.cancel()
        await asyncio.gather(send_all, return_exceptions=True)
        sock.close()


async def test_one_connection_too_many_is_refused_in_openais_shape() -> None:
    async with front_door(LimitSettings(max_connections=2)) as door, dialled(door), dialled(door):
        await until(lambda: door.listener.connections == 2)
        answer = await send(door, b"GET /health HTTP/1.1\r\n\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 503 ")


async def test_connections_that_ask_nothing_give_way_to_one_that_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps a thousand of them open kept everybody out; one with an answer in work stays."""
    monkeypatch.setattr(listener, "LINGER_S", 0.1)
    long = {"model": "echo", "prompt": "hello", "max_tokens": 200, "stream": True}
    async with (
        front_door(LimitSettings(max_connections=3), step_s=0.005) as door,
        dialled(door) as (reader, writer),
        dialled(door) as silent,
        dialled(door) as kept,
    ):
        writer.write(post(long))
        assert (await answer_to(*kept, ASK)).startswith(b"HTTP/1.1 200")
        await until(lambda: door.listener.connections == 3)
        async with asyncio.timeout(10):
            while not (await send(door, LAST)).startswith(b"HTTP/1.1 200"):
                pass
            assert await silent[0].read() == b"", "the one that was silent for longest"
            assert b"data: [DONE]" in await reader.readuntil(b"0\r\n\r\n")


async def test_slow_clients_do_not_disturb_others() -> None:
    async with front_door(LimitSettings(header_timeout_s=5)) as door:
        writers = [(await asyncio.open_connection(door.listener.host, door.listener.port))[1] for _ in range(200)]
        for writer in writers:
            writer.write(b"GET /health HTTP/1.1\r\nx")
        async with httpx2.AsyncClient(base_url=door.listener.url, timeout=10) as http:
            for _ in range(20):
                reply = await http.post("/v1/completions", json={"model": "echo", "prompt": "hello"})
                assert reply.status_code == 200
        for writer in writers:
            writer.close()


async def test_a_port_in_use_is_a_startup_error_that_says_what_to_do(door: FrontDoor) -> None:
    with pytest.raises(StartupError, match=rf"port {door.listener.port} .* in use .* router\.port"):
        await start_listener(_app, host="127.0.0.1", port=door.listener.port, limits=LimitSettings())


async def test_what_a_connection_is_answered_is_sent_without_delay() -> None:
    """asyncio takes the delay off only where a socket names its protocol: from the second answer of a connection on,
    each waited 40 ms for the acknowledgement of its head.
    """
    found: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        await writer.wait_closed()

    sock = bind("127.0.0.1", 0)
    async with await asyncio.start_server(serve, sock=sock):
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert found == [1]


async def _app(scope: object, receive: object, send: object) -> None:
    raise AssertionError


async def test_stopping_lets_running_answers_end() -> None:
    async with front_door(step_s=0.005) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=10) as http:
        body = {"model": "echo", "prompt": "hello", "max_tokens": 60, "stream": True}
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(lambda: door.decode.status().steps > 2)
        await door.listener.stop(10)
        assert (await task).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx2.ConnectError):
            await http.get("/health")


def post(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(data) + data


async def answer_to(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    """One whole answer of known length on a connection that stays open."""
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    (size,) = [int(line.split()[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(size)


async def test_kept_connections_are_told_of_the_shutdown_while_answers_still_run() -> None:
    """A client that reuses a connection would see a reset and not know whether its request was taken."""
    long = {"model": "echo", "prompt": "hello", "max_tokens": 1000, "stream": True}
    async with (
        front_door(step_s=0.002) as door,
        dialled(door) as (reader, writer),
        dialled(door) as (idle_reader, idle_writer),
        dialled(door) as (large_reader, large_writer),
        dialled(door) as (_, silent_writer),
    ):
        ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        for kept in ((idle_reader, idle_writer), (large_reader, large_writer)):
            assert (await answer_to(*kept, ask)).startswith(b"HTTP/1.1 200")
        writer.write(post(long))
        await until(lambda: door.decode.status().steps > 2)
        stopping = asyncio.create_task(door.listener.stop(20))
        await until(lambda: door.listener.is_stopping)
        idle_writer.write(ask)
        large_writer.write(post({"model": "echo", "prompt": "x" * 3_000_000}))
        writer.write(post(long))  # behind the answer that runs
        async with asyncio.timeout(10):
            for one in (idle_reader, large_reader):
                refusal = await one.read()
                assert refusal.startswith(b"HTTP/1.1 503")
                assert b"connection: close" in refusal
                assert b"retry-after: 1" in refusal
                assert code_of(refusal) == "shutting_down"
            assert not stopping.done()
            answered, _, refusal = (await reader.read()).partition(b"data: [DONE]")
            assert answered.startswith(b"HTTP/1.1 200")
            assert answered.count(b"data: ") > 100
            assert code_of(refusal[refusal.index(b"HTTP/1.1 503") :]) == "shutting_down"
            await stopping  # a connection that asks nothing does not hold it up
        assert len(door.decode.orders) == 1
        assert not silent_writer.is_closing()


async def test_stopping_cancels_what_outlives_the_grace() -> None:
    async with front_door(step_s=0.05) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=10) as http:
        body = {"model": "echo", "prompt": "hello", "max_tokens": 1000, "stream": True}
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(lambda: door.decode.status().steps > 2)
        await door.listener.stop(0.1)
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: door.decode.open_orders == 0 and door.router.in_flight == {})


ASK = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def test_a_listener_that_hands_over_leaves_new_connections_to_the_other_and_serves_its_own() -> None:
    """The kept connection gets its answer, which says that it is the last; the stream that runs ends as it would."""
    async with front_door(step_s=0.005) as door, dialled(door) as kept, dialled(door) as (reader, writer):
        assert b"connection: close" not in await answer_to(*kept, ASK)
        writer.write(post({"model": "echo", "prompt": "hello", "max_tokens": 200, "stream": True}))
        await until(lambda: door.decode.status().steps > 2)
        assert door.listener.is_accepting
        handing_over = asyncio.create_task(door.listener.hand_over(20))
        await until(lambda: not door.listener.is_accepting)
        with pytest.raises(ConnectionRefusedError):  # this socket was its alone
            await asyncio.open_connection(door.listener.host, door.listener.port)
        last = await answer_to(*kept, ASK)
        assert last.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in last
        assert await kept[0].read() == b""
        assert not handing_over.done()
        async with asyncio.timeout(10):
            text = await reader.readuntil(b"data: [DONE]")
            # The stream began before anybody knew: the connection stays for one more answer, which can say so.
            await reader.readuntil(b"0\r\n\r\n")
            assert b"connection: close" in await answer_to(reader, writer, ASK)
            await handing_over
        assert text.count(b"data: ") > 100
        assert door.listener.connections == 0


async def test_connections_of_a_shared_socket_never_meet_a_closed_door() -> None:
    """Each of many new connections is answered while listeners take turns."""
    with bind("127.0.0.1", 0) as sock:
        host, port = sock.getsockname()
        over = asyncio.Event()
        answered = 0

        async def client() -> None:
            nonlocal answered
            while not over.is_set():
                reader, writer = await asyncio.open_connection(host, port)
                answer = await answer_to(reader, writer, ASK)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                answered += 1
                writer.close()
                await writer.wait_closed()

        async def turns() -> Listener:
            old = await start_listener(_well, host=host, port=port, limits=LimitSettings(), sock=sock.dup())
            for _ in range(5):
                before = answered
                await until(lambda: answered > before + 20)  # noqa: B023 - called here and now
                new = await start_listener(_well, host=host, port=port, limits=LimitSettings(), sock=sock.dup())
                await old.hand_over(10)
                assert old.connections == 0
                await old.stop(0)
                old = new
            over.set()
            return old

        async with asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(client())
                last = await turns()  # goes on until every client has its answer: nobody comes after it
            await last.hand_over(10)
            await last.stop(0)


async def test_a_silent_connection_is_closed_last_and_one_with_an_unread_request_is_not(
    door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.cluster.api.listener.LINGER_S", 0.0)
    async with dialled(door) as (reader, writer), dialled(door) as (_, silent):
        await answer_to(reader, writer, ASK)
        await until(lambda: door.listener.connections == 2)
        [asking] = [
            one
            for one in door.listener._server.server_state.connections
            if one.client == writer.get_extra_info("sockname")  # type: ignore[union-attr]
        ]
        writer.write(ASK)  # lies in the kernel: nothing has run since
        asking.close_if_silent()  # type: ignore[union-attr]
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await door.listener.hand_over(10)
        assert door.listener.connections == 0
        assert not silent.is_closing()


async def _well(scope: object, receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})
