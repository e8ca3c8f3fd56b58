"""An answer as it comes from the connection: its headers read, its body in pieces, each within its time and size.

client.py makes one for each request and closes it. It knows no wire formats; it closes what it opened.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Final, cast

import httpcore2

from diptych.protos.failures import FailureKind, ProviderFailure

from .network import Stream
from .network_failures import failed, in_body, too_late
from .terms import HttpExchange, Terms

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable

MAX_BODY_BYTES: Final = 32 << 20
MAX_STREAM_BYTES: Final = 512 << 20
MAX_ERROR_BYTES: Final = 64 << 10
MAX_ERROR_S = 3.0
# What may come behind a stream's last event for the connection to be used again.
_MAX_TAIL_BYTES: Final = 64 << 10
_MAX_TAIL_S: Final = 0.5
_REQUEST_IDS: Final = frozenset(
    (b"x-request-id", b"request-id", b"x-amzn-requestid", b"apim-request-id", b"x-goog-request-id", b"cf-ray")
)


class Answer:
    """One response. `media_type` is without its parameters, in lower case; empty: not told."""

    def __init__(self, name: str, response: httpcore2.Response, terms: Terms, exchange: HttpExchange) -> None:
        self.status = response.status
        self.media_type = ""
        self.is_stream = False  # set by who reads it as one: the time to the first token counts then
        self._name = name
        self._response = response
        self._terms = terms
        self._exchange = exchange
        self._loop = asyncio.get_running_loop()
        self._connection = cast("Stream", response.extensions["network_stream"])
        stream = cast("AsyncIterable[bytes]", response.stream)  # its aiter_stream() is one more generator around it
        self._pieces = cast("AsyncGenerator[bytes, None]", aiter(stream))
        self._unpacker: _Unpacker | None = None
        self._read_headers()

    def _read_headers(self) -> None:
        exchange = self._exchange
        exchange.status = self.status
        for raw_name, raw_value in self._response.headers:
            name = raw_name.lower()
            if b"ratelimit" in name:
                exchange.limits[_printable(name)] = _printable(raw_value)
            elif name in _REQUEST_IDS:
                if not exchange.request_id or name != b"cf-ray":
                    exchange.request_id = _printable(raw_value)
            elif name == b"content-type":
                self.media_type = raw_value.split(b";", 1)[0].strip().lower().decode("latin-1")
            elif name == b"content-encoding":
                self._unpacker = _unpacker(self._name, raw_value.strip().lower().decode("latin-1"))
            elif name == b"retry-after":
                exchange.retry_after = _printable(raw_value)

    @property
    def headers(self) -> dict[str, str]:
        """All of them, their names in lower case."""
        return {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in self._response.headers}

    async def next(self) -> bytes:
        """The next piece of the body; empty at its end. Raises ProviderFailure."""
        while True:
            await self._connection.take_turns()
            self._connection.read_until = self._until()
            try:
                piece = await anext(self._pieces, b"")
            except httpcore2.ReadTimeout:
                now = self._loop.time()
                raise too_late(self._name, self._terms, now, self._exchange, is_stream=self.is_stream) from None
            except (httpcore2.NetworkError, httpcore2.ProtocolError) as exc:
                raise in_body(self._name, exc) from exc
            if not piece:
                return b""
            self._exchange.bytes_in += len(piece)
            if self._unpacker is not None:
                piece = self._unpacker.feed(piece)
            if self._exchange.bytes_in > MAX_STREAM_BYTES:
                words = f"{self._name} sent more than {MAX_STREAM_BYTES >> 20} MiB"
                raise failed(FailureKind.SERVER, words, "too_large")
            if piece:
                return piece

    def _until(self) -> float:
        now = self._loop.time()
        terms, exchange = self._terms, self._exchange
        until = min(terms.deadline, now + terms.timeouts.idle_s)
        if self.is_stream and exchange.first_token_at is None and exchange.began_at is not None:
            until = min(until, exchange.began_at + terms.timeouts.first_token_s)
        if now >= until:  # whatever has come already
            raise too_late(self._name, terms, now, exchange, is_stream=self.is_stream)
        return until

    async def whole(self, max_bytes: int = MAX_BODY_BYTES) -> bytes:
        """The rest of the body. Raises ProviderFailure, also for one that is larger."""
        first = await self.next()
        pieces, size_bytes = [first], len(first)
        while first:
            if size_bytes > max_bytes:
                words = f"{self._name} sent an answer of more than {max_bytes >> 20} MiB"
                raise failed(FailureKind.SERVER, words, "too_large", self.status)
            first = await self.next()
            pieces.append(first)
            size_bytes += len(first)
        return b"".join(pieces)

    async def beginning(self, max_bytes: int = MAX_ERROR_BYTES) -> bytes:
        """As much of the body as tells what the matter is, and comes soon: another attempt waits for it. What fails on
        the way is not told.
        """
        pieces, size_bytes = [], 0
        try:
            async with asyncio.timeout(MAX_ERROR_S):
                while size_bytes < max_bytes and (piece := await self.next()):
                    pieces.append(piece)
                    size_bytes += len(piece)
        except (ProviderFailure, TimeoutError):
            pass
        return b"".join(pieces)[:max_bytes]

    async def drain(self) -> None:
        """Whatever comes behind the end of a stream, shortly: so the connection can be used again."""
        end = min(self._terms.deadline, self._loop.time() + _MAX_TAIL_S)
        left_bytes = _MAX_TAIL_BYTES
        try:
            while left_bytes > 0 and self._loop.time() < end:
                self._connection.read_until = end
                piece = await anext(self._pieces, b"")
                if not piece:
                    return
                left_bytes -= len(piece)
                self._exchange.bytes_in += len(piece)
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
            pass

    async def close(self) -> None:
        """Closes the connection unless all of the body was read."""
        self._connection.read_until = None
        await self._pieces.aclose()
        await self._response.aclose()


def _printable(raw: bytes) -> str:
    """What our own headers and logs can repeat."""
    text = raw[:200].decode("latin-1")
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


class _Unpacker:
    """gzip or deflate, never more than the cap: a bomb fails when its first part has been read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inflater = zlib.decompressobj(47)  # a header of either kind
        self._left_bytes = MAX_BODY_BYTES

    def feed(self, piece: bytes) -> bytes:
        try:
            unpacked = self._inflater.decompress(piece, self._left_bytes + 1)
        except zlib.error:
            words = f"{self._name} sent a compressed answer that cannot be unpacked"
            raise failed(FailureKind.SERVER, words, "encoding") from None
        self._left_bytes -= len(unpacked)
        if self._left_bytes < 0:
            words = f"{self._name} sent an answer of more than {MAX_BODY_BYTES >> 20} MiB, compressed"
            raise failed(FailureKind.SERVER, words, "too_large")
        return unpacked


def _unpacker(name: str, encoding: str) -> _Unpacker | None:
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Unpacker(name)
    words = f"{name} sent its answer in the encoding {encoding[:32]!r}, which was not asked for"
    raise failed(FailureKind.SERVER, words, "encoding")
