"""The router's own HTTP listener: uvicorn on the running loop, with deadlines and bounds that uvicorn does not have.

connection -> headers (bytes, count, deadline) -> app (body: bytes, deadline) -> writes (stall) -> keep-alive (idle)

Handing over, it leaves the address to another that has the same socket: connections that are open are served on, each
to its next answer. While it stops, running answers end as they would, and a new request is refused with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from diptych.cluster.config import LimitSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import (
    DiptychError,
    InvalidRequest,
    Overloaded,
    RequestError,
    ShuttingDown,
    StartupError,
)
from diptych.protos.trust import Refusals

from .address import BACKLOG, bind
from .body import refuse_body
from .errors import response_of

MAX_HEADERS = 128
# Bytes that are neither header nor body: the frames of a chunked body. Honest clients need 1 in 100 of the body.
FRAMING_BYTES = 64 << 10
FRAMING_SHARE = 64  # large uploads in chunks may have one byte in so many more
LINGER_S = 1.0  # a connection that is silent for longer has no request on its way
HAND_OVER_POLL_S = 0.05


class HeadersTooLarge(RequestError):
    """The request line and headers are over the limit."""

    code = "headers_too_large"
    http_status = 431


class HeaderTimeout(RequestError):
    """The client did not send its headers in time."""

    code = "header_timeout"
    http_status = 408


class _BoundedProtocol(HttpToolsProtocol):
    """One connection. Refusals are written and the connection closed; nothing reaches the app then."""

    # Set on a subclass per listener: uvicorn makes the instances.
    limits: LimitSettings
    refusals: Refusals
    metrics: RouterMetrics | None
    is_handing_over = False  # also set on that subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._is_refused = False
        self._head_bytes = 0  # since the request began, until its headers were complete
        self._extra_bytes = 0  # of the request's body that were not body
        self._heard_at = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self._has_made_room():
            self._refuse(Overloaded(f"this listener has {self.limits.max_connections} connections, its limit"))
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._header_timer)
        self._stop(self._write_timer)
        if self._in_headers and self._head_bytes and not self._is_refused:
            self._count("truncated_headers")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._heard_at = self.loop.time()
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        if self._in_headers:
            self._head_bytes += len(data)
        else:
            self._extra_bytes += len(data)
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._in_headers and self._head_bytes > self.limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._extra_bytes > FRAMING_BYTES:
            self._refuse(InvalidRequest("the body's chunks carry more framing than content"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._extra_bytes = 0

    def on_headers_complete(self) -> None:
        self._stop(self._header_timer)
        self._header_timer = None
        self._in_headers = False
        self._head_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes or len(self.headers) > MAX_HEADERS:
            self._refuse(self._headers_too_large())
        else:
            super().on_headers_complete()
            if self.is_handing_over:
                self.cycle.keep_alive = False  # its answer says so

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            self._extra_bytes -= len(body) + len(body) // FRAMING_SHARE
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            self._refuse(InvalidRequest(msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self._write_timer)
        super().resume_writing()

    def on_response_complete(self) -> None:
        self._heard_at = self.loop.time()
        super().on_response_complete()

    def end_soon(self) -> None:
        """An answer that has not begun is the last one here; one that has begun could not say so, the next one does."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def close_if_silent(self) -> None:
        """Close when nothing is asked, was asked lately, or lies unread in the kernel."""
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if self._head_bytes or self.loop.time() - self._heard_at < LINGER_S or self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        if not poll.poll(0):
            self.transport.close()

    def _has_made_room(self) -> bool:
        """Whether a connection was closed on which nothing is asked: who keeps many of them keeps nobody out."""
        ours = [one for one in self.connections if isinstance(one, _BoundedProtocol)]
        for connection in sorted(ours, key=lambda one: one._heard_at):
            connection.close_if_silent()
            if connection.transport.is_closing():
                return True
        return False

    def refuse_further(self) -> None:
        """The answer in work goes on; requests to come are told that the server ends."""
        self.app = _shutting_down

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._head_bytes = 0
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._on_header_timeout)

    def _on_header_timeout(self) -> None:
        if self._head_bytes == 0:
            self.transport.close()  # nothing was asked: nothing to answer
        else:
            self._refuse(HeaderTimeout(f"the headers did not arrive within {self.limits.header_timeout_s:g} s"))

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"the headers exceed {self.limits.header_bytes} bytes or {MAX_HEADERS} lines")

    def _refuse(self, error: DiptychError) -> None:
        """Answer unless an answer is under way, and close."""
        self._is_refused = True
        self._count(error.code)
        self._stop(self._header_timer)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            path = (getattr(self, "url", None) or b"").partition(b"?")[0].decode("latin-1")
            answer = response_of(error, {"path": path, "headers": self.headers or []})
            headers = [*answer.raw_headers, (b"connection", b"close")]
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + answer.body)
        self.transport.close()

    def _count(self, code: str) -> None:
        self.refusals.note(self.client[0] if self.client else "", code)
        if self.metrics is not None:
            self.metrics.counters["refused"].labels(code).inc()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


async def _shutting_down(scope: Scope, receive: Receive, send: Send) -> None:
    await refuse_body(ShuttingDown("this server is shutting down; try again"), scope, receive, send)


class _Server(uvicorn.Server):
    grace_s = 0.0
    is_stopping = False
    protocol: type[_BoundedProtocol]

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals belong to the process's entry point

    async def hand_over(self, grace_s: float) -> None:
        """Accept nothing more; until `grace_s` has passed or every connection has ended."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        self.protocol.is_handing_over = True
        await self._stop_accepting()
        for connection in self.server_state.connections:
            assert isinstance(connection, _BoundedProtocol)
            connection.end_soon()
        while loop.time() < end and not self.should_exit:
            await asyncio.sleep(HAND_OVER_POLL_S)
            if not self.server_state.connections:
                break
            for connection in [] if self.server_state.tasks else list(self.server_state.connections):
                assert isinstance(connection, _BoundedProtocol)
                connection.close_if_silent()

    async def _stop_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())
        # asyncio drops a connection that was accepted just now when its server closes before the next round but one.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for server in self.servers:
            server.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, which closes idle connections first thing, after the running answers have had their time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.grace_s
        await self._stop_accepting()
        for connection in self.server_state.connections:
            assert isinstance(connection, _BoundedProtocol)
            connection.refuse_further()
        self.is_stopping = True
        while self.server_state.tasks and (left := end - loop.time()) > 0:
            await asyncio.wait(self.server_state.tasks, timeout=left)
        self.config.timeout_graceful_shutdown = max(end - loop.time(), 0)  # type: ignore[assignment]
        await super().shutdown(sockets)


class Listener:
    """A running listener; made by `start_listener`."""

    def __init__(self, server: _Server, task: asyncio.Task[None], address: tuple[str, int]) -> None:
        self._server = server
        self._task = task
        self.host, self.port = address

    @property
    def url(self) -> str:
        """Such as http://127.0.0.1:8000."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)

    @property
    def is_stopping(self) -> bool:
        """Whether new requests are refused because of `stop`."""
        return self._server.is_stopping

    @property
    def is_accepting(self) -> bool:
        """Whether new connections are taken."""
        return all(server.is_serving() for server in self._server.servers)

    async def hand_over(self, grace_s: float) -> None:
        """Leave the address to others that have its socket, and serve the connections that are open: each is closed
        after its next answer, which says so, or when nothing runs and it is silent. Returns when none is left, or after
        `grace_s` seconds. `stop` comes afterwards, or ends it early.
        """
        await self._server.hand_over(grace_s)

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, let running requests end for at most `grace_s` seconds, then cancel them.

        Until then a new request on an open connection is answered with 503, code shutting_down.
        """
        self._server.grace_s = grace_s
        self._server.should_exit = True
        await self._task


async def start_listener(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    limits: LimitSettings,
    metrics: RouterMetrics | None = None,
    sock: socket.socket | None = None,
) -> Listener:
    """Serve `app` on the running loop; port 0 takes a free one. Raises StartupError when the address is taken.

    Connections that it turns away before the app sees a request count in `metrics`. With `sock`, which listens there
    already and may be others' too, nothing is bound; it is closed in the end.
    """
    sock = sock or bind(host, port)
    own = {"limits": limits, "refusals": Refusals("the API listener"), "metrics": metrics}
    protocol = type("BoundedProtocol", (_BoundedProtocol,), own)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.idle_timeout_s,  # type: ignore[arg-type]
        backlog=BACKLOG,
    )
    server = _Server(config)
    server.protocol = protocol
    address = sock.getsockname()[:2]
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http listener")
    while not server.started:
        if task.done():
            task.result()
            raise StartupError(f"the listener on {host}:{port} ended at once")
        await asyncio.sleep(0)
    return Listener(server, task, address)
