"""A provider over HTTP: one pool of connections, a request out, an answer, its events or its bytes in.

The gateway calls it with what a codec has encoded. A key goes to the provider's own origin and nowhere else: the origin
is the provider's, whatever a request says, and no redirect is followed. It decides nothing about a second attempt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

import httpcore2

from diptych.protos.deltas import CallArguments, Content, Reasoning, Refusal
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.providers.codec import Codec, Outgoing, ServerEvent, StreamDecoder
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.loose_values import json_in
from diptych.protos.replies import Began, Ended, Event, Reply, Usage

from .answer import MAX_BODY_BYTES, Answer
from .auth import Auth, Sending, Shown
from .metrics import Counts
from .network import Network, Pool, Resolve, resolve
from .network_failures import before_headers, failed, one_line, too_late
from .provider import Provider
from .secrets import redacted
from .terms import HttpExchange, Terms

logger = logging.getLogger(__name__)
T = TypeVar("T")
_NETWORK_ERRORS: Final = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
)
_READING_ERRORS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_TOLD_AT_ONCE: Final = frozenset((Content, Reasoning, Refusal, CallArguments))
_USER_AGENT: Final = "diptych"
_KEEPALIVE_S: Final = {"https": 30.0, "http": 4.0}  # uvicorn, which local servers use, closes after 5
_JSON: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_STREAM_TYPES: Final = {
    "sse": ("text/event-stream", "text/plain", ""),
    "aws": ("application/vnd.amazon.eventstream", ""),
}


class Framing(Protocol):
    """Takes a stream apart."""

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that are complete with `piece`. Raises ProviderFailure."""


class Observer(Protocol):
    """Who reads along with a relay; protos/providers/openai_relay.py has one."""

    @property
    def has_content(self) -> bool:
        """Whether the first text, reasoning, refusal or tool call has come."""

    @property
    def is_done(self) -> bool:
        """Whether the stream said that it is over; what comes behind is read and dropped."""

    def feed(self, piece: bytes) -> bytes:
        """What to pass on for `piece`, which may be empty. Raises ProviderFailure."""

    def end(self) -> None:
        """There is no more. Raises ProviderFailure where the answer had not ended."""


class ProviderClient:
    """For any number of requests at once. `close` ends it; what is being read then breaks off."""

    def __init__(
        self,
        provider: Provider,
        auth: Auth,
        counts: Callable[[Callable[[], int]], Counts],
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        parts = urlsplit(provider.base_url)
        self.provider = provider
        self.codec: Codec = by_name(provider.codec)
        self._auth = auth
        self._origin = (parts.scheme.encode(), (parts.hostname or "").encode("idna"), parts.port)
        self._base_path = parts.path.rstrip("/")
        self._network = Network(resolve)
        self._pool = Pool(
            ssl_context=tls,
            proxy=_proxy(provider.proxy) if provider.proxy else None,
            max_connections=provider.max_connections,
            keepalive_expiry=_KEEPALIVE_S[parts.scheme],
            network_backend=self._network,
        )
        self._counts = counts(lambda: len(self._network.open))
        self._headers = {
            "host": parts.netloc,
            "user-agent": _USER_AGENT,
            "content-type": "application/json",
            "accept-encoding": "identity",
            **{name.lower(): value for name, value in provider.headers.items()},
        }

    @property
    def num_connections(self) -> int:
        """Open ones, idle ones included."""
        return len(self._network.open)

    def key_id(self) -> str:
        """Another text for another key, which tells nothing about it; empty where there is none."""
        return self._auth.key_id()

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.aclose()

    async def whole(self, outgoing: Outgoing, terms: Terms, exchange: HttpExchange | None = None) -> Reply:
        """The answer to a request that asks for a whole one. Raises ProviderFailure."""
        call = _Call(self, terms, exchange)
        try:
            answer = await call.send(outgoing, is_stream=False)
            reply = self._reply(await answer.whole(), answer.media_type, call.exchange.keeps)
            call.outcome = "answered"
            return reply
        except ProviderFailure as exc:
            raise call.told(exc) from None
        finally:
            await call.end()

    async def stream(
        self, outgoing: Outgoing, terms: Terms, exchange: HttpExchange | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of the answer to a request that asks for a stream. Raises ProviderFailure. Closing it closes the
        connection.
        """
        call = _Call(self, terms, exchange)
        try:
            answer = await call.send(outgoing, is_stream=True)
            if answer.media_type not in _STREAM_TYPES[self.codec.framing]:
                for event in self._reply(await answer.whole(), answer.media_type, call.exchange.keeps).events():
                    call.tell(event)
                    yield event
                call.outcome = "answered"
                return
            frames, decoder = _framing(self.codec.framing), self.codec.decoder(self.provider.quirks)
            has_ended = False
            while not has_ended:
                piece, cut = await _next(answer)
                for event in _said(call, frames, decoder, piece, cut):
                    has_ended = has_ended or isinstance(event, Ended)
                    call.tell(event)
                    yield event
                has_ended = has_ended or not piece
                call.exchange.skipped_events = decoder.skipped
            call.outcome = "answered"
            await answer.drain()
        except ProviderFailure as exc:
            raise call.told(exc) from None
        finally:
            await call.end()

    async def relay(
        self, outgoing: Outgoing, terms: Terms, observer: Observer, exchange: HttpExchange | None = None
    ) -> AsyncGenerator[bytes | Reply, None]:
        """The bytes of a stream, as `observer` passes them on; a Reply alone from a provider that sends a whole answer
        all the same. Raises ProviderFailure. Closing it closes the connection.
        """
        call = _Call(self, terms, exchange)
        try:
            answer = await call.send(outgoing, is_stream=True)
            if answer.media_type not in _STREAM_TYPES[self.codec.framing]:
                yield self._reply(await answer.whole(), answer.media_type)
                call.outcome = "answered"
                return
            piece, cut = await _next(answer)
            while piece:
                passed = observer.feed(piece)
                if call.exchange.first_token_at is None and observer.has_content:
                    call.exchange.first_token_at = call.loop.time()
                if passed:
                    yield passed
                if observer.is_done:
                    await answer.drain()
                    break
                piece, cut = await _next(answer)
            _ending(observer.end, cut)
            call.outcome = "answered"
        except ProviderFailure as exc:
            raise call.told(exc) from None
        finally:
            await call.end()

    def _reply(self, body: bytes, media_type: str, keeps: list[Any] | None = None) -> Reply:
        name = self.provider.name
        found = json_in(body.decode("utf-8", "replace").removeprefix("\ufeff"))
        if isinstance(found, dict):
            if keeps is not None:
                keeps.append(found)
            try:
                return self.codec.reply(found, self.provider.quirks)
            except _READING_ERRORS as exc:
                raise _unreadable(name, exc) from exc
        if media_type in ("application/json", ""):
            words = f"{name} sent an answer that is no JSON object" if body else f"{name} sent an empty answer"
            raise failed(FailureKind.SERVER, words, "malformed")
        words = (
            f"{name} answered with {one_line(media_type)[:80]}, which no model's answer is; is "
            f"providers.{name}.base_url right?"
        )
        raise failed(FailureKind.SERVER, words, "content_type")


class _Call:
    """One request on its way: what is known of it, what must not be told of it, and its end."""

    def __init__(self, client: ProviderClient, terms: Terms, exchange: HttpExchange | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.exchange = exchange if exchange is not None else HttpExchange()
        self.outcome = "left"
        self.name = client.provider.name
        self._kept_chars = 0
        self._client = client
        self._terms = terms
        self._answer: Answer | None = None
        self._shown = Shown()

    async def send(self, outgoing: Outgoing, *, is_stream: bool) -> Answer:
        """The answer, its headers read and its status a good one."""
        client, terms, exchange = self._client, self._terms, self.exchange
        exchange.began_at = self.loop.time()
        limit_s = terms.timeouts.headers_s if is_stream else terms.timeouts.answer_s
        if is_stream:
            limit_s = min(limit_s, terms.timeouts.first_token_s)
        try:
            async with asyncio.timeout_at(min(terms.deadline, exchange.began_at + limit_s)):
                response = await client._pool.handle_async_request(await self._request(outgoing, is_stream, limit_s))
        except TimeoutError:
            raise too_late(client.provider.name, terms, self.loop.time(), exchange, is_stream=is_stream) from None
        except (
            httpcore2.TimeoutException,
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.ProxyError,
        ) as exc:
            raise before_headers(client.provider.name, exc) from exc
        exchange.headers_at = self.loop.time()
        try:
            answer = self._answer = Answer(client.provider.name, response, terms, exchange)
        except BaseException:
            await response.aclose()
            raise
        answer.is_stream = is_stream
        self._hide_keys()
        if not 200 <= answer.status < 300:
            raise await self._refusal(answer)
        return answer

    def _hide_keys(self) -> None:
        """In what is kept of the headers: a provider may write there what it likes."""
        exchange, secrets = self.exchange, self._shown.secrets
        told = "\n".join((exchange.request_id, exchange.retry_after, *exchange.limits, *exchange.limits.values()))
        if redacted(told, secrets) != told:
            exchange.request_id = redacted(exchange.request_id, secrets)
            exchange.retry_after = redacted(exchange.retry_after, secrets)
            limits = exchange.limits.items()
            exchange.limits = {redacted(name, secrets): redacted(text, secrets) for name, text in limits}

    async def _request(self, outgoing: Outgoing, is_stream: bool, limit_s: float) -> httpcore2.Request:
        client = self._client
        body = _written(outgoing.body)
        self.exchange.bytes_out = len(body)
        headers = {
            **client._headers,
            "accept": "text/event-stream" if is_stream else "application/json",
            **{name.lower(): value for name, value in outgoing.headers.items()},
            "content-length": str(len(body)),
        }
        target = client._base_path + _path(client.provider, outgoing)
        scheme, host, port = client._origin
        sending = Sending(f"{scheme.decode()}://{headers['host']}{target}", headers, body)
        self._shown = shown = await client._auth.show(sending)
        if shown.query:
            target += ("&" if "?" in target else "?") + urlencode(shown.query)
        connect_s = self._terms.timeouts.connect_s
        timeouts = {"connect": connect_s, "pool": min(limit_s, connect_s)}
        return httpcore2.Request(
            "POST",
            httpcore2.URL(scheme=scheme, host=host, port=port, target=target.encode("ascii")),
            headers=[(name.encode("ascii"), value.encode()) for name, value in {**headers, **shown.headers}.items()],
            content=body,
            extensions={"timeout": timeouts},
        )

    async def _refusal(self, answer: Answer) -> ProviderFailure:
        client, name = self._client, self._client.provider.name
        if 300 <= answer.status < 400:
            words = (
                f"{name} answered with a redirect ({answer.status}), which is not followed: its key goes to "
                f"{client.provider.host} alone; set providers.{name}.base_url to the address that it has now"
            )
            return failed(FailureKind.NOT_FOUND, words, "redirect", answer.status)
        if answer.status < 200:
            return failed(FailureKind.SERVER, f"{name} changed the protocol", "not_http", answer.status)
        answer.is_stream = False
        return ProviderFailure(client.codec.failure(answer.status, answer.headers, await answer.beginning()))

    def keep(self, size_chars: int) -> None:
        """An event came that said nothing, or what its decoder keeps. Raises ProviderFailure where that has no end."""
        self._kept_chars += size_chars
        if self._kept_chars > MAX_BODY_BYTES:
            words = f"{self.name} sent more than {MAX_BODY_BYTES >> 20} MiB of a stream that say nothing"
            raise failed(FailureKind.SERVER, words, "too_large")

    def tell(self, event: Event) -> None:
        """The caller is about to get `event`."""
        if self.exchange.first_token_at is None and not isinstance(event, Began | Usage | Ended):
            self.exchange.first_token_at = self.loop.time()

    def told(self, exc: ProviderFailure) -> ProviderFailure:
        """The failure as others may read it: without keys, on one line, with what a log wants to know."""
        failure, exchange = exc.failure, self.exchange
        self.outcome = "failed"
        self._client._counts.failed(failure.kind.value)
        secrets = self._shown.secrets
        clean = Failure(
            kind=failure.kind,
            message=one_line(redacted(failure.message, secrets)),
            status=failure.status or exchange.status,
            retry_after_s=failure.retry_after_s,
            param=one_line(redacted(failure.param, secrets)),
            code=one_line(redacted(failure.code, secrets)),
        )
        known = {"status": exchange.status, "request id": exchange.request_id, "bytes": exchange.bytes_in}
        words = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        detail = one_line(redacted(f"{self._client.provider.host}: {words}; {exc.detail}", secrets))
        return ProviderFailure(clean, exc.target or self._client.provider.name, detail)

    async def end(self) -> None:
        """Closes what is open, and counts."""
        counts, exchange = self._client._counts, self.exchange
        exchange.ended_at = self.loop.time()
        counts.outcomes[self.outcome].inc()
        counts.bytes_out.inc(exchange.bytes_out)
        counts.bytes_in.inc(exchange.bytes_in)
        if exchange.skipped_events:
            counts.skipped.inc(exchange.skipped_events)
        if self._answer is not None:
            await self._answer.close()


def _proxy(url: str) -> httpcore2.Proxy:
    parts = urlsplit(url)
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return httpcore2.Proxy(
        httpcore2.URL(scheme=parts.scheme, host=parts.hostname or "", port=port, target="/"),
        auth=(auth[0].encode(), auth[1].encode()) if auth is not None else None,
    )


def _path(provider: Provider, outgoing: Outgoing) -> str:
    path = outgoing.path
    if not path.startswith("/") or path.startswith("//") or not path.isascii() or min(path) <= " ":
        words = f"{provider.name}: no address can be made of that model's name"
        raise failed(FailureKind.BAD_REQUEST, words, "path")
    return path


def _written(body: Mapping[str, Any]) -> bytes:
    try:
        return _JSON.encode(body).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot carry
        return json.dumps(body, separators=(",", ":")).encode()


def _framing(kind: Literal["sse", "aws"]) -> Framing:
    if kind == "sse":
        return EventStream()
    from diptych.protos.providers.aws_stream import AwsEventStream

    return AwsEventStream()


async def _next(answer: Answer) -> tuple[bytes, ProviderFailure | None]:
    """The next piece; none at the end, with the failure where the connection broke, or nothing came any more: an answer
    that had said that it is over is whole all the same.
    """
    try:
        return await answer.next(), None
    except ProviderFailure as exc:
        if exc.failure.code not in ("cut", "idle_timeout", "total_timeout"):
            raise
        return b"", exc


def _said(
    call: _Call, frames: Framing, decoder: StreamDecoder, piece: bytes, cut: ProviderFailure | None
) -> Iterator[Event]:
    """What a piece says, one by one: what comes before a failure is told before it."""
    if not piece:
        yield from _ending(decoder.finish, cut)
        return
    for frame in frames.feed(piece):
        try:
            said = decoder.feed(frame)
        except _READING_ERRORS as exc:
            raise _unreadable(call.name, exc) from exc
        if not said or type(said[-1]) not in _TOLD_AT_ONCE:
            call.keep(len(frame.data))
        if call.exchange.keeps is not None and (kept := json_in(frame.data)) is not None:
            call.exchange.keeps.append(kept)
        yield from said


def _unreadable(name: str, exc: Exception) -> ProviderFailure:
    """Of an answer that is valid JSON and so unlike its format that the codec stumbles."""
    logger.warning("the answer of %s made its codec raise %s", name, type(exc).__name__)
    return failed(FailureKind.SERVER, f"{name} sent an answer that cannot be read", "unreadable")


def _ending(finish: Callable[[], T], cut: ProviderFailure | None) -> T:
    """What the end settles; where the connection broke and the answer had not ended, that is the failure."""
    try:
        return finish()
    except ProviderFailure:
        if cut is not None:
            raise cut from None
        raise
