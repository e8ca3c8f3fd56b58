"""The places that answer: something that takes an encoded request and gives a whole answer, or its events.

registry.py finds them by their names. HttpUpstream reaches providers and clusters by the providers' client of the
gateway, so that keys, addresses, limits and failures are handled in one place; the testing kit has others.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Codec, Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Event, Reply, Usage

from .background import let_go, of_this_loop
from .network import check_network
from .profiles import Profile, profile_of
from .usage import public_cost

if TYPE_CHECKING:
    from diptych.cluster.providers.clients import Clients
    from diptych.cluster.providers.provider import Provider
    from diptych.cluster.providers.registry import Registry as Providers

JsonObject = dict[str, Any]


@dataclass(slots=True)
class Wire:
    """What one request saw of its way: filled in while it is answered. `raw` is the provider's own JSON: one body of a
    whole answer, each event of a stream.
    """

    raw: list[Any] = field(default_factory=list)
    status: int = 0
    request_id: str = ""
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds, for one attempt; None: the client's own."""

    total_s: float | None = None
    first_token_s: float | None = None


class Upstream(Protocol):
    """A target's place."""

    @property
    def name(self) -> str:
        """The prefix of references."""

    @property
    def family(self) -> str:
        """Chooses among a call's `options`."""

    @property
    def codec(self) -> Codec:
        """Of its wire format."""

    @property
    def quirks(self) -> Quirks:
        """How it differs from the format."""

    @property
    def profile(self) -> Profile:
        """What it can do."""

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """A whole answer. Raises ProviderFailure."""

    def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """Its events, in the order of protos/replies.py. Raises ProviderFailure. Closing it closes the connection."""

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """`request` with what the target cannot fetch itself put into it. Raises InvalidRequest."""

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """Dollars; None where nobody knows."""

    def identity(self) -> str:
        """Another text for another address, format, account or tenant: answers are kept by it. It holds no key."""


class HttpUpstream:
    """A provider of the table, an own server, or a Diptych cluster."""

    def __init__(self, provider: Provider, providers: Providers, profile: Profile | None = None) -> None:
        self.name = provider.name
        self.family = provider.quirks.family or provider.name
        self.provider = provider
        self.codec = by_name(provider.codec)
        self.quirks = provider.quirks
        self.profile = profile_of(provider.quirks) if profile is None else profile
        self.keys = providers.keys
        self._providers = providers

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """See Upstream."""
        from diptych.cluster.providers.terms import HttpExchange

        client = (await self._clients()).of(self.provider)
        exchange = HttpExchange(keeps=wire.raw)
        try:
            return await client.whole(outgoing, _terms(limits), exchange)
        finally:
            _note(wire, exchange)

    async def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """See Upstream."""
        from diptych.cluster.providers.terms import HttpExchange

        client = (await self._clients()).of(self.provider)
        exchange = HttpExchange(keeps=wire.raw)
        events = client.stream(outgoing, _terms(limits), exchange)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
            _note(wire, exchange)

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """Media behind addresses that the provider does not read are fetched: public hosts alone, bounded in size."""
        reads = self.provider.reads_urls
        if all(not media.url or media.url.startswith(reads) for message in request.messages for media in message.media):
            return request
        for message in request.messages:
            for media in message.media:
                if media.url and not media.url.startswith(reads):
                    check_network(media.url, f"the {media.kind} of {media.path or 'a message'}")
        from diptych.cluster.providers.fetch import Fetcher
        from diptych.cluster.providers.inlined_media import inlined

        fetcher = await of_this_loop("fetcher", Fetcher, _nothing)
        return await inlined(request, fetcher.fetch, reads=reads)

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """By public prices; what an own cluster costs is told by the registry's prices alone."""
        return None if self.profile.is_own else public_cost(self.name, model, usage)

    def identity(self) -> str:
        """See Upstream. The same in all processes, but for keys that a cloud's own package finds."""
        provider, keys = self.provider, self._providers.keys
        if provider.auth in ("aws", "google"):
            from diptych.cluster.providers.auth import auth_for

            account = auth_for(provider, keys).key_id()
        else:
            from diptych.cluster.providers.secrets import KeyUnreadable

            try:
                secret = keys.read(provider.key)
            except KeyUnreadable:
                secret = None
            account = "" if secret is None else _digest(secret.reveal())
        told = (
            provider.name,
            provider.base_url,
            provider.codec,
            provider.auth,
            account,
            *sorted(provider.headers.items()),
        )
        return _digest(repr(told))

    def server(self) -> dict[str, str | int]:
        """Its address, by OpenTelemetry's names."""
        parts = urlsplit(self.provider.base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return {"server.address": parts.hostname or "", "server.port": port}

    async def close(self) -> None:
        """Closes its connections of the running loop, and those of the other places that its registry knows."""
        await let_go(self._providers)

    async def _clients(self) -> Clients:
        check_network(self.provider.base_url, self.name)
        from diptych.cluster.providers.clients import Clients

        return await of_this_loop(self._providers, lambda: Clients(self._providers), Clients.close)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=20, person=b"diptych-identity").hexdigest()


async def _nothing(_: object) -> None:
    """There is nothing to close."""


def _terms(limits: Limits) -> Any:
    from diptych.cluster.providers.terms import Terms, Timeouts

    timeouts = Timeouts()
    if limits.total_s is not None:
        total = limits.total_s
        timeouts = replace(timeouts, total_s=total, answer_s=total, first_token_s=total, headers_s=total, idle_s=total)
    if limits.first_token_s is not None:
        first = limits.first_token_s
        timeouts = replace(timeouts, first_token_s=first, headers_s=min(timeouts.headers_s, first))
    return Terms.within(timeouts)


def _note(wire: Wire, exchange: Any) -> None:
    wire.status, wire.request_id = exchange.status, exchange.request_id
    if exchange.first_token_at is not None and exchange.began_at is not None:
        wire.first_token_s = exchange.first_token_at - exchange.began_at


def with_extra(outgoing: Outgoing, extra: Mapping[str, Any], headers: Mapping[str, str]) -> Outgoing:
    """`extra` goes into the body as it is and wins."""
    if not extra and not headers:
        return outgoing
    return replace(outgoing, body={**outgoing.body, **extra}, headers={**outgoing.headers, **headers})
