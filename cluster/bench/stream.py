"""One streamed completion over HTTP/1.1, with the time of every event. Reads what the API writes and little more.

Made for rate: the client shares the machine with the server that it measures.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from diptych.protos.errors import StartupError

_MAX_ERROR_BYTES = 4096
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens, and the key that it asks for. `path` is what its URL has before /v1."""

    host: str
    port: int
    path: str
    tls: bool
    key: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str, key: str = "") -> Target:
        """Raises StartupError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise StartupError(f"--url {url}: {exc}") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartupError(f"--url {url}: write it as http://HOST:PORT")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), path, tls, key)

    def post(self, path: str, body: bytes) -> bytes:
        """A whole request."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        shown = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\nhost: {name}:{self.port}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{shown}\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Streamed:
    """How one request went. Times are on the clock of time.perf_counter."""

    sent: float
    texts: list[float] = field(default_factory=list)  # one for each event that brought text, or else the last event's
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: str = ""  # empty: whole


async def stream(target: Target, body: bytes, timeout_s: float) -> Streamed:
    """POST /v1/completions with a body that asks for a stream. Never raises for what the network or the server does."""
    sent = time.perf_counter()
    reply = _Reply(sent)
    try:
        async with asyncio.timeout(timeout_s):
            tls = ssl.create_default_context() if target.tls else None
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: reply, target.host, target.port, ssl=tls
            )
            try:
                transport.write(target.post("/v1/completions", body))
                await reply.ended.wait()
            finally:
                transport.abort()
    except TimeoutError:
        reply.fail(f"no end within {timeout_s:g} s")
    except OSError as exc:
        reply.fail(f"connection: {exc.strerror or type(exc).__name__}")
    return reply.outcome


class _Reply(asyncio.Protocol):
    """Bytes to events. Lines are cut by hand: a chunk may end anywhere."""

    def __init__(self, sent: float) -> None:
        self.outcome = Streamed(sent)
        self.ended = asyncio.Event()
        self._parser = httptools.HttpResponseParser(self)
        self._now = sent
        self._rest = b""
        self._is_done = False

    def fail(self, why: str) -> None:
        """The first reason stays."""
        if not self._is_done:
            self.outcome.failure = self.outcome.failure or why
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.fail(f"not HTTP: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the connection ended before the answer")

    def on_body(self, data: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._rest = (self._rest + data)[:_MAX_ERROR_BYTES]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._event(line[6:].rstrip())
        if len(self._rest) > _MAX_LINE_BYTES:
            self.fail("an event without an end")

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self.fail(f"status {status}: {_message(self._rest)}")
        self.fail("the stream ended before its end mark")

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._is_done = True
            self.ended.set()
            return
        try:  # here, because the parser replaces what its callbacks raise
            self._take(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            self.fail(f"an event that is no completion chunk: {type(exc).__name__}")

    def _take(self, event: Any) -> None:
        if "error" in event:
            self.fail(f"error event: {event['error']['message']}")
            return
        if use := event.get("usage"):
            self.outcome.prompt_tokens = int(use["prompt_tokens"])
            self.outcome.completion_tokens = int(use["completion_tokens"])
        for choice in event["choices"]:
            if choice["text"] or (choice.get("finish_reason") and not self.outcome.texts):
                self.outcome.texts.append(self._now)


def _message(body: bytes) -> str:
    try:
        answer: Any = json.loads(body)
        return str(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
