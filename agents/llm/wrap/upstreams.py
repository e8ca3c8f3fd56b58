"""A maker's client as a place that answers: bodies from the codec go out by it, its objects come back through that.

asking.py makes one for each call. It tries nothing again: the client's own attempts are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Codec, Outgoing, ServerEvent
from diptych.protos.providers.codecs import by_name
from diptych.protos.replies import Event, Reply, Usage

from ..network import check_network
from ..profiles import profile_of
from ..upstream import Limits, Wire
from ..usage import public_cost
from .makers import Maker
from .threads import Closable, Pump, in_thread

_LIMITS = ("max_tokens", "max_completion_tokens")
_BROKEN = frozenset({"TransportError", "StreamError"})  # of httpx and httpx2


class SdkUpstream:
    """See Upstream. `given` are the caller's own arguments of `create`, which go out as they are: what the codec has to
    say inside one of them (output_config) is put into it. `native` is the maker's last object, of a stream the list of
    its events.
    """

    def __init__(
        self,
        maker: Maker,
        *,
        given: Mapping[str, Any],
        has_schemas: bool | None,
        limit_name: str = "",
    ) -> None:
        provider, quirks = maker.provider(), maker.quirks()
        self.name = maker.package if provider is None else provider.name
        self.family = quirks.family or self.name
        self.codec: Codec = by_name(maker.codec_name)
        self.quirks = quirks
        profile = profile_of(quirks)
        self.profile = profile if has_schemas is None else replace(profile, has_schemas=has_schemas)
        self.native: Any = None
        self._maker = maker
        self._given = given
        self._limit_name = limit_name  # of the most tokens, as the caller says it
        self._has_prices = provider is not None

    def kwargs(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What `create` is called with; fields that it does not know go by extra_body."""
        known: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for field, value in body.items():
            name = (self._limit_name or field) if field in _LIMITS else field
            (known if name in self._maker.known else others)[name] = value
        for name, value in self._given.items():
            ours = known.get(name)
            known[name] = {**value, **ours} if isinstance(ours, dict) and isinstance(value, dict) else value
        found = known
        if others:
            found["extra_body"] = {**others, **(found.get("extra_body") or {})}
        return found

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """See Upstream."""
        kwargs = self._begun(outgoing, limits)
        create = self._maker.create
        try:
            async with asyncio.timeout(limits.total_s):
                native = await (create(**kwargs) if self._maker.is_async else in_thread(lambda: create(**kwargs)))
            wire.status, wire.request_id = 200, getattr(native, "_request_id", None) or ""
            body = _json_of(native)
            wire.raw.append(body)
            self.native = native
            reply = self.codec.reply(body, self.quirks)
        except Exception as exc:
            if (failure := self._failed(exc, wire)) is None:
                raise
            raise failure from exc
        return reply

    async def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """See Upstream."""
        kwargs = self._begun(outgoing, limits)
        decoder = self.codec.decoder(self.quirks)
        self.native = natives = []
        pieces = self._pieces(kwargs)
        try:
            async for native in _in_time(pieces, limits):
                wire.status = 200
                natives.append(native)
                body = _json_of(native)
                wire.raw.append(body)
                said = ServerEvent(json.dumps(body), str(body.get("type", "")) if _is_named(self.codec) else "")
                for event in decoder.feed(said):
                    yield event
            for event in decoder.finish():
                yield event
        except Exception as exc:
            if (failure := self._failed(exc, wire)) is None:
                raise
            raise failure from exc
        finally:
            await pieces.aclose()

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """What is in the messages goes out as it is, addresses included."""
        return request

    def identity(self) -> str:
        """See Upstream; of the maker's key a digest."""
        client = self._maker.client
        secrets = [getattr(client, name, None) or "" for name in ("api_key", "auth_token", "organization", "project")]
        told = hashlib.sha256("\0".join(map(str, secrets)).encode()).hexdigest()
        return f"{self._maker.base_url} {self.codec.name} {told}"

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """By public prices, of a provider of the table; others' prices nobody knows."""
        return public_cost(self.name, model, usage) if self._has_prices else None

    async def _pieces(self, kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        create = self._maker.create
        if not self._maker.is_async:
            begin: Callable[[], Closable[Any]] = lambda: create(**kwargs)  # noqa: E731  it needs its type
            pumped = Pump(begin, _interrupt).pieces()
            try:
                async for piece in pumped:
                    yield piece
            finally:
                await pumped.aclose()
            return
        native = await create(**kwargs)
        try:
            async for piece in native:
                yield piece
        finally:
            await native.close()

    def _begun(self, outgoing: Outgoing, limits: Limits) -> dict[str, Any]:
        check_network(self._maker.base_url, f"the client of {self._maker.package}")
        self.native = None
        kwargs = self.kwargs(outgoing.body)
        if outgoing.headers:
            kwargs["extra_headers"] = {**outgoing.headers, **(kwargs.get("extra_headers") or {})}
        if limits.total_s is not None:
            kwargs["timeout"] = limits.total_s
        return kwargs

    def _failed(self, exc: Exception, wire: Wire) -> ProviderFailure | None:
        """As everywhere; None where it may go on as it is: it is one, or no target's (a wrong argument)."""
        failure = None if isinstance(exc, ProviderFailure) else failure_of(exc, self._maker, self.codec)
        if failure is None:
            return None
        wire.status = failure.status
        wire.request_id = getattr(exc, "request_id", None) or wire.request_id
        return ProviderFailure(failure, self.name)


async def _in_time(pieces: AsyncGenerator[Any, None], limits: Limits) -> AsyncGenerator[Any, None]:
    """Raises TimeoutError; the client's own limits are those of one read alone."""
    now = asyncio.get_running_loop().time()
    end = None if limits.total_s is None else now + limits.total_s
    until = end if limits.first_token_s is None else min(now + limits.first_token_s, end or math.inf)
    while True:
        try:
            async with asyncio.timeout_at(until):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        yield piece
        until = end


def failure_of(exc: Exception, maker: Maker, codec: Codec) -> Failure | None:
    """What an error of the maker's client says; None for one that no target made."""
    sdk = maker.sdk
    if isinstance(exc, sdk.APIStatusError):
        headers = {name.lower(): value for name, value in exc.response.headers.items()}
        body = exc.response.content if exc.response.is_stream_consumed or exc.response.is_closed else b""
        return codec.failure(exc.status_code, headers, body or _body_of(exc))
    words = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, TimeoutError):
        return Failure(kind=FailureKind.TOTAL_TIMEOUT, message="no answer within the time of the call", code="timeout")
    if isinstance(exc, sdk.APITimeoutError):
        return Failure(kind=FailureKind.TOTAL_TIMEOUT, message=words, code="timeout")
    if isinstance(exc, sdk.APIConnectionError):
        cause = f": {exc.__cause__}" if exc.__cause__ is not None else ""
        return Failure(kind=FailureKind.CONNECT, message=f"{words.removesuffix('.')}{cause}", code="connect")
    if isinstance(exc, sdk.APIError):  # told by an event of a stream, or a body that cannot be read
        kind = FailureKind.RATE_LIMITED if "rate_limit" in str(exc.body) else FailureKind.SERVER
        return Failure(kind=kind, message=words)
    if isinstance(exc, json.JSONDecodeError | UnicodeDecodeError):
        return Failure(kind=FailureKind.SERVER, message=f"what came is no JSON: {words}", code="malformed")
    names = {kind.__name__ for kind in type(exc).__mro__ if kind.__module__.startswith(("httpx", "httpx2"))}
    if names & _BROKEN:
        kind = FailureKind.IDLE_TIMEOUT if "TimeoutException" in names else FailureKind.SERVER
        return Failure(kind=kind, message=f"the connection broke: {words}", code="cut")
    return None


def _body_of(exc: Any) -> bytes:
    return json.dumps(exc.body).encode() if exc.body is not None else b""


def _json_of(native: Any) -> dict[str, Any]:
    if not hasattr(native, "to_dict"):
        words = f"the client gave a {type(native).__name__} where an answer was due; does base_url lead to its API?"
        raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=words, code="malformed"))
    found: dict[str, Any] = native.to_dict(mode="json", warnings=False)
    return found


def _is_named(codec: Codec) -> bool:
    return codec.name == "anthropic.messages"


def _interrupt(source: Any) -> None:
    """A read that waits in another thread ends only with its connection."""
    network = getattr(source.response, "extensions", {}).get("network_stream")
    found = None if network is None else network.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)
