"""A provider on loopback that misbehaves in more than sixty ways, in five wire formats.

The model that a request names is the behaviour; the first part of its path is the format. `BEHAVIOURS` says what each
does and what a client of the gateway must see of it; test_provider_behaviours.py asks for every one.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from dialects import DIALECTS, Dialect

_STREAM_PATH = re.compile(r"/converse-stream$|:streamGenerateContent")
HALF, REST = "half an ", "answer"
TEXT = HALF + REST
# answers: the text, whole; moves: another target's; breaks: half of it and an error; refuses: an error at once.
Outcome = Literal["answers", "moves", "breaks", "refuses"]


@dataclass
class Wire:
    """One request, and the connection to answer on."""

    dialect: Dialect
    is_stream: bool
    number: int  # how many requests of this behaviour came before
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keeps: bool = False

    async def send(self, *pieces: bytes) -> None:
        """As they are."""
        for piece in pieces:
            self.writer.write(piece)
        await self.writer.drain()

    async def head(self, status: str = "200 OK", **headers: str) -> None:
        """Status line and headers; underscores are hyphens."""
        lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def body(self, content: Any, status: str = "200 OK", **headers: str) -> None:
        """A whole body: JSON, or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        told = {"content_type": "application/json", "content_length": str(len(data)), **headers}
        await self.head(status, **told)
        await self.send(data)
        self.keeps = True

    async def chunks(self, *pieces: bytes) -> None:
        """Pieces of a body in chunks."""
        for piece in pieces:
            if piece:
                await self.send(b"%x\r\n%s\r\n" % (len(piece), piece))

    async def begin(self, **headers: str) -> None:
        """The headers of a stream."""
        await self.head(
            content_type=headers.pop("content_type", self.dialect.stream_type), transfer_encoding="chunked", **headers
        )

    async def end(self) -> None:
        """Of a body in chunks."""
        await self.send(b"0\r\n\r\n")
        self.keeps = True

    async def hang(self) -> None:
        """Until the client leaves."""
        while await self.reader.read(1 << 16):
            pass

    def cut(self) -> None:
        """A reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER of zero seconds
        self.writer.transport.abort()

    async def well(self, text: str = TEXT) -> None:
        """As it should be."""
        if not self.is_stream:
            return await self.body(self.dialect.whole(text))
        await self.begin()
        await self.chunks(*self.dialect.stream(text[: len(HALF)], text[len(HALF) :]))
        await self.end()

    async def frames(self, *frames: bytes) -> None:
        """A whole stream of these; of a whole answer the same bytes would be no answer, and it is well there."""
        if not self.is_stream:
            return await self.well()
        await self.begin()
        await self.chunks(*frames)
        await self.end()

    async def started(self) -> bool:
        """A stream with half of the text; False, and an answer as it should be, where a whole one was asked for."""
        if not self.is_stream:
            await self.well()
            return False
        await self.begin()
        await self.chunks(*self.dialect.opening(), self.dialect.piece(HALF))
        return True


Act = Callable[[Wire], Awaitable[None]]


@dataclass(frozen=True)
class Behaviour:
    """`stream` and `whole`: the outcome of both kinds of requests. `kind`: of the failure, where there is one. `hangs`:
    before or behind the first content, so that it is to be asked for with short timeouts. `has_tools`: the request has
    some. `only`: the formats that can do it.
    """

    act: Act
    stream: Outcome
    whole: Outcome
    kind: str = "server"
    hangs: Literal["", "first", "later"] = ""
    has_tools: bool = False
    only: tuple[str, ...] = ()


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(stream: Outcome, whole: Outcome | None = None, kind: str = "server", **more: Any) -> Callable[[Act], Act]:
    """Under the function's name."""

    def named(act: Act) -> Act:
        assert act.__name__ not in BEHAVIOURS
        BEHAVIOURS[act.__name__] = Behaviour(act, stream, whole or stream, kind, **more)
        return act

    return named


@dataclass
class Rig:
    """The provider, started. `calls`: requests by format, behaviour and kind; `heads`: their headers, as they came;
    `open`: connections.
    """

    port: int = 0
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    heads: list[str] = field(default_factory=list)
    open: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set while there is none
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Rig:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def providers(self, closed_port: int) -> dict[str, dict[str, Any]]:
        """For a configuration: rig-FORMAT, gone-FORMAT (nobody listens), nowhere-FORMAT (no such name)."""
        found: dict[str, dict[str, Any]] = {}
        for dialect in DIALECTS:
            places = {
                "rig": f"127.0.0.1:{self.port}",
                "gone": f"127.0.0.1:{closed_port}",
                "nowhere": "nowhere.test:80",
            }
            for name, place in places.items():
                found[f"{name}-{dialect.codec}"] = {
                    "base_url": f"http://{place}/{dialect.codec}",
                    "codec": dialect.codec,
                    "api_key": "none",
                    "auth": "none",
                }
        return found

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.left.clear()
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self.open -= 1
            if not self.open:
                self.left.set()
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        path = head.split(" ", 2)[1]
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
        codec = path.split("/")[1]
        dialect = next(one for one in DIALECTS if one.codec == codec)
        model = body.get("model") or re.split(r"/models?/", path, maxsplit=1)[1].split("/")[0].split(":")[0]
        is_stream = bool(body.get("stream")) or bool(_STREAM_PATH.search(path))
        case = (codec, model, "stream" if is_stream else "whole")
        wire = Wire(dialect, is_stream, self.calls[case], reader, writer)
        self.calls[case] += 1
        if model == "well":
            await wire.well("another answer")
        elif model.startswith("missing-"):
            await wire.body(dialect.error("missing", "as told"), "404 Not Found")
        else:
            await BEHAVIOURS[model].act(wire)
        return wire.keeps
