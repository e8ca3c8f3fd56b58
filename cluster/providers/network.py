"""Connections for httpcore2 straight on asyncio's transports, with addresses that the caller may choose and refuse.

Its own backend reads through two more layers, each with a pass of the event loop; this one costs half the CPU of a
streamed piece. client.py and fetch.py make pools with it. It knows neither HTTP nor keys.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final

import httpcore2

_HIGH_WATER_BYTES: Final = 256 << 10
_READ_BYTES: Final = 16 << 10  # at once: what is made of it is made without a pause
_TURN_S: Final = 0.01
# Given a host and a port, the IP addresses to try, in order. Raises AddressRefused, NameUnknown.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NameUnknown(httpcore2.ConnectError):
    """The host has no address."""


class AddressRefused(httpcore2.ConnectError):
    """The host's address is one that must not be reached."""


class TlsFailed(httpcore2.ConnectError):
    """TLS did not come about: above all a certificate that is not the host's."""


async def resolve(host: str, port: int, threads: Executor | None = None) -> list[str]:
    """The system's answer, for which it waits in one of `threads`, the event loop's own by default. Raises
    NameUnknown.
    """
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(threads, ask)
    except (OSError, UnicodeError) as exc:
        raise NameUnknown(f"the name {host} has no address") from exc
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Stream(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """One connection, read by one request at a time. `read_until` ends a wait for bytes with httpcore2.ReadTimeout, on
    the event loop's clock; None: no end.
    """

    def __init__(self, network: Network) -> None:
        self.read_until: float | None = None
        self._waited_at = 0.0  # when it last had to wait, and others ran
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._is_over = False
        self._is_paused = False
        self._fault: Exception | None = None
        self._reader: asyncio.Future[bool] | None = None
        self._writer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self._network.open.add(self)

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        self._buffer += data
        self._wake(True)
        if len(self._buffer) > _HIGH_WATER_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """Of asyncio."""
        self._is_over = True
        self._wake(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._is_over = True
        self._fault = exc
        self._network.open.discard(self)
        self._wake(True)
        self.resume_writing()

    def pause_writing(self) -> None:
        """Of asyncio."""
        self._writer = self._loop.create_future()

    def resume_writing(self) -> None:
        """Of asyncio."""
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            writer.set_result(None)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come; empty at the end."""
        if self._buffer or self._is_over:
            await self.take_turns()
        elif not await self._more(timeout):
            raise httpcore2.ReadTimeout("no bytes came in time")
        if self._buffer:
            size_bytes = min(max_bytes, _READ_BYTES)
            data = bytes(self._buffer[:size_bytes])
            del self._buffer[:size_bytes]
            if self._is_paused and len(self._buffer) <= _HIGH_WATER_BYTES and self._transport is not None:
                self._is_paused = False
                self._transport.resume_reading()
            return data
        if self._fault is not None:
            raise httpcore2.ReadError("the connection broke") from self._fault
        return b""

    async def take_turns(self) -> None:
        """Lets others run where this connection's reader has for long: a peer whose bytes cost more time than it takes
        to send them would have the event loop to itself.
        """
        if self._loop.time() - self._waited_at > _TURN_S:
            await asyncio.sleep(0)
            self._waited_at = self._loop.time()

    async def _more(self, timeout: float | None) -> bool:
        ends = [end for end in (self.read_until, timeout and self._loop.time() + timeout) if end is not None]
        reader = self._reader = self._loop.create_future()
        timer = self._loop.call_at(min(ends), self._wake, False) if ends else None
        try:
            has_come: bool = await reader
            return has_come
        finally:
            self._reader = None
            self._waited_at = self._loop.time()
            if timer is not None:
                timer.cancel()

    def _wake(self, has_come: bool) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(has_come)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Returns when the peer keeps up."""
        if self._is_over or self._transport is None:
            raise httpcore2.WriteError("the connection is closed") from self._fault
        self._transport.write(buffer)
        if self._writer is not None:
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.shield(self._writer)
            except TimeoutError as exc:
                raise httpcore2.WriteTimeout("the peer did not read in time") from exc

    async def aclose(self) -> None:
        """At once; what was not sent is lost."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        """This stream, from now on under TLS."""
        assert self._transport is not None
        try:
            async with asyncio.timeout(timeout):
                upgraded = await self._loop.start_tls(
                    self._transport, self, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError as exc:
            await self.aclose()
            raise httpcore2.ConnectTimeout("TLS took too long") from exc
        except (OSError, ssl.SSLError) as exc:
            await self.aclose()
            raise TlsFailed(tls_words(exc)) from exc
        except BaseException:
            await self.aclose()
            raise
        if upgraded is None:
            raise TlsFailed("the peer closed the connection while TLS was negotiated")
        self._transport = upgraded
        return self

    def get_extra_info(self, info: str) -> Any:
        """What httpcore2 asks for: whether an idle connection has ended, and which protocol TLS chose."""
        if info == "is_readable":
            return self._is_over or bool(self._buffer)
        if info in ("ssl_object", "socket") and self._transport is not None:
            return self._transport.get_extra_info(info)
        return None


def tls_words(exc: Exception) -> str:
    """Why TLS failed, in the words of the verification where it was that."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {exc.verify_message}"
    reason = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or "the connection broke"
    return f"TLS failed: {reason}".replace("_", " ")


class Pool(httpcore2.AsyncConnectionPool):
    """Its connections; they are closed when there are some to close. httpcore2 looks twice for each request, and makes
    a scope that cannot be cancelled even where it closes none: 30 us.
    """

    async def _close_connections(self, closing: list[httpcore2.AsyncConnectionInterface]) -> None:
        if closing:
            await super()._close_connections(closing)


class Network(httpcore2.AsyncNetworkBackend):
    """Where a pool's connections come from. `open` are those that there are."""

    def __init__(self, resolve: Resolve = resolve) -> None:
        # Its debug lines hold the headers of answers, and there are providers that repeat a key in them.
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        self.open: set[Stream] = set()
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Stream:
        """A connection to the first address of the host that answers; each gets half of the time that is left, the last
        one all of it.
        """
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        try:
            async with asyncio.timeout_at(end):
                addresses = await self._resolve(host, port)
        except TimeoutError as exc:
            raise httpcore2.ConnectTimeout(f"the name {host} could not be resolved in time") from exc
        fault: OSError | None = None
        for left, address in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
            until = end if end is None or not left else loop.time() + (end - loop.time()) / 2
            try:
                async with asyncio.timeout_at(until):
                    _, stream = await loop.create_connection(lambda: Stream(self), address, port)
                return stream
            except (TimeoutError, OSError) as exc:
                fault = exc
        if isinstance(fault, TimeoutError) and fault.errno is None:
            raise httpcore2.ConnectTimeout(f"{host} did not answer") from fault
        reason = os.strerror(fault.errno) if fault is not None and fault.errno else "there is no address to try"
        raise httpcore2.ConnectError(f"{host} cannot be reached: {reason}") from fault

    async def sleep(self, seconds: float) -> None:
        """Of httpcore2's own retries, which are off."""
        await asyncio.sleep(seconds)
