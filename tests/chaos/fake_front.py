"""A front door that answers as echo does, or as badly as a test wants: doubled, wrong, missing tokens, broken ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from diptych.kernels.echo.testing import expected_tokens

Spoil = Callable[[list[int]], list[int]]


@dataclass
class FakeFront:
    """`spoil` changes the tokens of an answer; `end` says how a stream ends after them."""

    spoil: Spoil = list
    end: str = "done"  # done, error, cut, hang
    status: int = 200
    together: int = 1  # tokens in one event
    engines: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_left: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if head.startswith("GET"):
                page = {"engines": self.engines, "routers": [{"pid": 1, "in_flight": {"echo": 0}, "waiting": 0}]}
                self._whole(writer, 200, page)
            else:
                length = next(
                    int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length")
                )
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self._complete(reader, writer, self.bodies[-1])
        finally:
            writer.close()

    async def _complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if self.status != 200:
            return self._whole(writer, self.status, {"error": {"code": "overloaded", "message": "full"}})
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        for index, prompt in enumerate([prompt for prompt in prompts for _ in range(body["n"])]):
            tokens = self.spoil(expected_tokens(prompt, body["max_tokens"]))
            for at in range(0, len(tokens), self.together):
                text = "".join(f" t{token}" for token in tokens[at : at + self.together])
                self._event(writer, {"choices": [{"text": text if at else text[1:], "index": index}]})
                await writer.drain()
        if self.end == "error":
            self._event(writer, {"error": {"code": "engine_lost", "message": "gone"}})
        if self.end == "hang":
            await reader.read()  # until the client leaves
            self.num_left += 1
        if self.end == "done":
            told = {"migrations": 1, "decode_engine": "decode-0"}
            self._event(writer, {"choices": [], "diptych": {"choices": [told]}})
            self._chunk(writer, b"data: [DONE]\n\n")
            self._chunk(writer, b"")
        return None

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _whole(self, writer: asyncio.StreamWriter, status: int, page: dict[str, Any]) -> None:
        data = json.dumps(page).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)


@asynccontextmanager
async def fake_front(**settings: Any) -> AsyncIterator[FakeFront]:
    """Listening on loopback."""
    front = FakeFront(**settings)
    server = await asyncio.start_server(front.serve, "127.0.0.1", 0)
    front.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield front
