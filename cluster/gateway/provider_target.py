"""A provider's model as a target: the request encoded in the provider's format, what it cannot do refused or left out.

gateway.py makes them. Connections, keys and timeouts are the client's; wire formats are the codec's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from diptych.cluster.providers.auth import needs_key
from diptych.cluster.providers.client import ProviderClient
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.fetch import Fetcher
from diptych.cluster.providers.inlined_media import inlined_for
from diptych.cluster.providers.provider import Provider
from diptych.cluster.providers.terms import HttpExchange, Terms
from diptych.protos.errors import Overloaded, RequestError, param_of
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Note, Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.openai_relay import can_relay
from diptych.protos.providers.openai_relay import relay as relay_body
from diptych.protos.replies import Event, Reply

from .record import AttemptRecord
from .relay import Relayed, Verbatim, relayed
from .restoring import restoring
from .settings import OnUnsupported
from .target import Continues

_WAIT = 0.9  # of the time that is left: for room, where there is none
logger = logging.getLogger(__name__)


class ProviderTarget:
    """`model` at `provider`. `on_unsupported`: what becomes of a request with fields that the provider
    has no words for: the target fails (error), or they are left out, with a line in the log (warn) or without (drop);
    the record's notes tell in both cases.
    """

    is_own = False
    weights = ""

    def __init__(
        self,
        clients: Clients,
        provider: Provider,
        model: str,
        *,
        fetcher: Fetcher,
        on_unsupported: OnUnsupported = "error",
    ) -> None:
        self.name = f"{provider.name}/{model}"
        self.provider = provider
        self.model = model
        self.on_unsupported = on_unsupported
        self._clients = clients
        self._fetcher = fetcher
        self._codec = by_name(provider.codec)
        self._quirks = provider.quirks

    @property
    def continues(self) -> Continues:
        """By prefill, where the provider is known to go on from a last assistant message."""
        return "prefill" if self._quirks.prefill else "no"

    @property
    def key_id(self) -> str:
        """Of the key that it has now."""
        return "" if self.provider.lacks else self._clients.of(self.provider).key_id()

    @property
    def lacks(self) -> str:
        """Its key, where there is none now: what to set, and how to do without."""
        provider = self.provider
        if provider.lacks:
            return provider.lacks
        may_lack = provider.keyless or provider.auth == "none" or provider.key.kind == "none"
        needs = not may_lack and not self.key_id
        return needs_key(provider) if needs else ""

    def check(self, request: ChatRequest) -> None:
        """Nothing, where the request can be expressed; whether that is so of media that would have to be fetched is not
        looked at. Raises ProviderFailure (UNSUPPORTED).
        """
        if not self._must_fetch(request):
            self._encoded(request, stream=bool(request.stream))

    async def whole(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> Reply:
        """The whole answer. Raises ProviderFailure."""
        async with AsyncExitStack() as held:
            if self._must_fetch(request):
                request = await self._fetched(request, terms, record, held)
            outgoing = self._outgoing(request, record, stream=False)
            reply = await self._clients.of(self.provider).whole(outgoing, terms, record.http)
        undone = restoring(request, outgoing.notes)
        return reply if undone is None else undone.reply(reply)

    def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Event, None]:
        """The answer's events. Raises ProviderFailure, where it cannot be asked for at once."""
        if self._must_fetch(request):
            return self._stream_of_fetched(request, terms, record)
        outgoing = self._outgoing(request, record, stream=True)
        events = self._clients.of(self.provider).stream(outgoing, terms, record.http)
        undone = restoring(request, outgoing.notes)
        return events if undone is None else undone.events(events)

    def relay(
        self, request: ChatRequest, verbatim: Verbatim, terms: Terms, record: AttemptRecord
    ) -> AsyncGenerator[Event | Relayed, None] | None:
        """See relay.Relaying."""
        client = self._clients.of(self.provider)
        if not isinstance(client, ProviderClient):
            return None  # a library's answers are no bytes
        if self._codec.name != "openai.chat" or request.wanted_logprobs is not None or self._must_fetch(request):
            return None
        form = request.output_form
        if form is not None and form.kind == "json_schema" and self._quirks.schema_dialect != "openai":
            return None  # its dialect, and what it makes of the answer, are the codec's
        if not can_relay(verbatim.body, self._quirks):
            return None
        try:
            outgoing = relay_body(verbatim.body, model=self.model, stream=True, quirks=self._quirks)
        except RequestError as exc:
            raise _unsupported(exc, self.name) from exc
        self._begin(self._permitted(outgoing), record)
        return relayed(client, outgoing, verbatim, terms=terms, record=record)

    async def _stream_of_fetched(
        self, request: ChatRequest, terms: Terms, record: AttemptRecord
    ) -> AsyncGenerator[Event, None]:
        async with AsyncExitStack() as held:
            request = await self._fetched(request, terms, record, held)
            assert not self._must_fetch(request)
            async with aclosing(self.stream(request, terms, record)) as events:
                async for event in events:
                    yield event

    def _must_fetch(self, request: ChatRequest) -> bool:
        """Whether there are media behind addresses that the provider does not read."""
        reads = self.provider.reads_urls
        return any(
            media.url and not media.url.startswith(reads) for message in request.messages for media in message.media
        )

    async def _fetched(
        self, request: ChatRequest, terms: Terms, record: AttemptRecord, held: AsyncExitStack
    ) -> ChatRequest:
        """Its bytes have their room as long as `held` is open. A refusal for lack of it comes before the attempt's
        time is over, which would look like the provider's fault.
        """
        record.is_sent = False
        left_s = min(terms.deadline, terms.first_by) - asyncio.get_running_loop().time()
        wait_s = min(self._fetcher.settings.timeout_s, _WAIT * left_s)
        try:
            return await held.enter_async_context(inlined_for(self.provider, request, self._fetcher, wait_s=wait_s))
        except (RequestError, Overloaded) as exc:  # neither is the provider's fault
            raise _unsupported(exc, self.name) from exc

    def _outgoing(self, request: ChatRequest, record: AttemptRecord, *, stream: bool) -> Outgoing:
        outgoing = self._encoded(request, stream=stream)
        self._begin(outgoing, record)
        return outgoing

    def _begin(self, outgoing: Outgoing, record: AttemptRecord) -> None:
        record.notes.extend(outgoing.notes)
        record.http, record.is_sent = HttpExchange(), True
        if self.on_unsupported == "warn" and outgoing.unsupported:
            logger.warning("%s is not told of %s", self.name, _listed(outgoing.unsupported))

    def _encoded(self, request: ChatRequest, *, stream: bool) -> Outgoing:
        try:
            outgoing = self._codec.encode(request, model=self.model, stream=stream, quirks=self._quirks)
        except RequestError as exc:
            raise _unsupported(exc, self.name) from exc
        return self._permitted(outgoing)

    def _permitted(self, outgoing: Outgoing) -> Outgoing:
        if outgoing.unsupported and self.on_unsupported == "error":
            lacking = outgoing.unsupported
            words = (
                f"{self.name} cannot do what {_listed(lacking)} {'asks' if len(lacking) == 1 else 'ask'} for: leave "
                f"{'it' if len(lacking) == 1 else 'them'} out, or let the route say on_unsupported: warn or drop"
            )
            raise ProviderFailure(
                Failure(kind=FailureKind.UNSUPPORTED, message=words, param=lacking[0].field), self.name
            )
        return outgoing


def _unsupported(exc: RequestError | Overloaded, name: str) -> ProviderFailure:
    """Another target may have words for it, or read the address itself; if none has, the client is told `exc`."""
    failure = Failure(kind=FailureKind.UNSUPPORTED, message=exc.message, param=param_of(exc) or "")
    return ProviderFailure(failure, name, exc.detail)


def _listed(notes: tuple[Note, ...]) -> str:
    return ", ".join(f"{note.field} ({note.words})" if note.words else note.field for note in notes)
