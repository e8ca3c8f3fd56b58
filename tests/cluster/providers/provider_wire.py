"""A provider on loopback that does as a test says: each request gets the next of the answers, byte for byte.

The gateway's tests have a rig with many more ways to misbehave; this one is for the client alone.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.metrics import ProviderMetrics
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.providers.terms import Terms, Timeouts
from diptych.protos.providers.codec import Outgoing

REPLY = {
    "id": "c1",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
KEY = "sk-test-0123456789abcdefghij"
OUTGOING = Outgoing(path="/chat/completions", body={"model": "m", "messages": [{"role": "user", "content": "hi"}]})
STREAMED = Outgoing(path="/chat/completions", body={**OUTGOING.body, "stream": True})
# What a test does with a connection once the request was read; true: it is kept.
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]


def head(status: str = "200 OK", **headers: str) -> bytes:
    """A status line and headers; underscores are hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def sends(*pieces: bytes, then: str = "keep") -> Behaviour:
    """All pieces, then: keep the connection, close it, or hang until the client leaves."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if then == "hang":
            await reader.read(1)
        return then == "keep"

    return behave


def answers(body: object, status: str = "200 OK", **headers: str) -> Behaviour:
    """JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = {"content_type": "application/json", "content_length": str(len(content)), **headers}
    return sends(head(status, **told) + content)


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """An event of a chat stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    data = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
SSE = {"content_type": "text/event-stream", "transfer_encoding": "chunked"}
WHOLE_STREAM = (chunk({"role": "assistant", "content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop"), DONE)


def framed(piece: bytes) -> bytes:
    """A piece of a body with transfer-encoding chunked."""
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def streams(*pieces: bytes, then: str = "keep", is_cut: bool = False) -> Behaviour:
    """A stream of events; `is_cut`: without the end of the body."""
    return sends(head(**SSE), *map(framed, pieces), *(() if is_cut else (b"0\r\n\r\n",)), then=then)


@dataclass
class Seen:
    """A request that came."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Wire:
    """The server. `behaviours` are taken in order; the last one goes on."""

    behaviours: list[Behaviour]
    seen: list[Seen] = field(default_factory=list)
    num_accepted: int = 0
    num_open: int = 0
    port: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _num_awaited: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        self.num_open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.num_open -= 1
            self.changed.set()
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.seen.append(Seen(lines[0], headers, body))
        self.changed.set()
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        return await behaviour(reader, writer)

    async def asked(self) -> None:
        """Waits until a request has come that none was waited for before."""
        async with asyncio.timeout(30):
            while len(self.seen) == self._num_awaited:
                self.changed.clear()
                await self.changed.wait()
        self._num_awaited = len(self.seen)

    async def all_closed(self) -> None:
        """Waits until no connection is open."""
        async with asyncio.timeout(30):
            while self.num_open:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def wire(*behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    """A server while the test runs."""
    told = Wire(list(behaviours))
    server = await asyncio.start_server(told.serve, "127.0.0.1", 0, ssl=tls)
    told.port = server.sockets[0].getsockname()[1]
    try:
        yield told
    finally:
        server.close()
        await told.all_closed()
        await asyncio.sleep(0)


@asynccontextmanager
async def clients_of(told: Wire, **settings: Any) -> AsyncIterator[Clients]:
    """Clients that know it as the provider `lab`, with the key KEY."""
    lab = {"base_url": f"http://127.0.0.1:{told.port}/v1", "api_key": "env:LAB_KEY", **settings}
    registry = Registry.load({"lab": ProviderSettings(**lab)}, {"LAB_KEY": KEY})
    clients = Clients(registry, ProviderMetrics(CollectorRegistry()))
    try:
        yield clients
    finally:
        await clients.close()


def terms(**timeouts: float) -> Terms:
    """Generous ones, but for those that a test names."""
    return Terms.within(Timeouts(**timeouts))
