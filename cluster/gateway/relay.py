"""Answers that pass as their bytes, where client and provider both speak OpenAI's chat format.

`Gateway.relay` gives them to the HTTP front under the same promises as events: attempts, phases, records, money.
exchange.py asks `Relaying` targets; one that has to encode the request anew answers in events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from diptych.cluster.providers.client import ProviderClient
from diptych.cluster.providers.terms import Terms
from diptych.protos.deltas import CallArguments, Content, Reasoning, Refusal
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.openai_chat_stream import ChatDecoder, finish_of
from diptych.protos.providers.openai_relay import RelayObserver, wants_usage
from diptych.protos.providers.quirks import Quirks
from diptych.protos.providers.relay_names import Names
from diptych.protos.replies import Began, Ended, Event, Reply, Usage

from .calls import Calls
from .record import AttemptRecord
from .signals import StreamItem

MAX_BYTES: Final = 64 << 20  # of one relayed answer; who sends more sends no answer
INLINE_BYTES: Final = 64 << 10  # of one that is read again in the event loop; for more everybody would wait
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verbatim:
    """A client's request as it came: `body` is the parsed JSON of the ChatRequest beside it, unchanged. `id` and
    `model` are what the answer's chunks shall say in place of the provider's.
    """

    body: Mapping[str, Any]
    id: str
    model: str


@dataclass(frozen=True, slots=True)
class Relayed:
    """Whole events of text/event-stream, to be written as they are: chunks of chat.completion.chunk with the id and
    the model of `Verbatim`, the role and the finish among them, token counts where the client asked for them; never
    pings, errors or the last line [DONE]. `has_content`: the client has seen a part of the answer.
    """

    data: bytes
    has_content: bool = True


RelayItem = StreamItem | Relayed


@runtime_checkable
class Relaying(Protocol):
    """A target that may pass bytes on."""

    def relay(
        self, request: ChatRequest, verbatim: Verbatim, terms: Terms, record: AttemptRecord
    ) -> AsyncGenerator[Event | Relayed, None] | None:
        """The answer: Relayed, then Usage where it was told, and Ended last, which say again what stood in the bytes;
        or events alone, where the provider gave no stream. None: this request has to be encoded. Raises ProviderFailure
        at once for what the target cannot do, and while it is read.
        """


async def relayed(
    client: ProviderClient, outgoing: Outgoing, verbatim: Verbatim, *, terms: Terms, record: AttemptRecord
) -> AsyncGenerator[Event | Relayed, None]:
    """What Relaying.relay gives, of a provider."""
    reader = _Reader(verbatim, client.provider.quirks)
    pieces = client.relay(outgoing, terms, reader, record.http)
    try:
        async for piece in pieces:
            if isinstance(piece, Reply):
                for event in piece.events():
                    yield event
                return
            yield Relayed(piece, reader.has_content)
        if reader.usage != Usage():
            yield reader.usage
        yield reader.ended
    finally:
        await pieces.aclose()
        if reader.usage.output_tokens is None:

            def count() -> None:
                record.output_chars += _num_chars(reader.kept)

            await aside(count, reader.size_bytes)


class _Reader:
    """Reads along for the client, see providers/client.Observer, and keeps what passed."""

    def __init__(self, verbatim: Verbatim, quirks: Quirks) -> None:
        self.kept: list[bytes] = []
        self.size_bytes = 0
        self._names = Names(id=verbatim.id, model=verbatim.model, reasoning_field=quirks.reasoning_field)
        self._observer = RelayObserver(drops_usage=not wants_usage(verbatim.body), rewrite=self._names)
        self._calls: _PassingCalls | None = None  # from the piece with the first call on

    @property
    def has_content(self) -> bool:
        return self._observer.has_content

    @property
    def is_done(self) -> bool:
        return self._observer.is_done or self._observer.failure is not None

    @property
    def usage(self) -> Usage:
        return self._observer.usage

    @property
    def ended(self) -> Ended:
        native = self._observer.finish
        return Ended(finish_of(native, has_calls=self._names.has_calls), native)

    def feed(self, piece: bytes) -> bytes:
        observer = self._observer
        passed = observer.feed(piece)
        if passed:
            self.kept.append(passed)
            self.size_bytes += len(passed)
            if self.size_bytes > MAX_BYTES:
                raise _failed(f"the provider sent an answer of more than {MAX_BYTES >> 20} MiB")
            if self._names.has_calls:
                self._look_at_calls(passed)
        elif observer.failure is not None:
            raise observer.failure
        return passed

    def end(self) -> None:
        self._observer.end()

    def _look_at_calls(self, passed: bytes) -> None:
        """Before the client is told that they are complete."""
        if self._calls is None:
            self._calls = _PassingCalls()
        broken = self._calls.feed(passed, is_last=bool(self._observer.finish))
        if broken and self.ended.finish != "length":
            del self.kept[-1]
            raise _failed(f"the provider called {broken} with arguments that are no JSON object")


class _Again:
    """Relayed bytes read once more. Never raises: what cannot be read ends it."""

    def __init__(self) -> None:
        self._frames, self._decoder = EventStream(), ChatDecoder(Quirks())
        self._is_over = False

    def feed(self, piece: bytes) -> list[Event]:
        found: list[Event] = []
        try:
            for frame in () if self._is_over else self._frames.feed(piece):
                found += self._decoder.feed(frame)
        except ProviderFailure:
            self._is_over = True
        return found

    def end(self) -> list[Event]:
        try:
            return [] if self._is_over else self._decoder.finish()
        except ProviderFailure:
            return []  # it has not ended, or what failed was told when it did
        finally:
            self._is_over = True


class _PassingCalls:
    """Read as they pass, so that their end does not wait until the whole answer has been read a second time."""

    def __init__(self) -> None:
        self._again = _Again()
        self._calls = Calls(is_checked=True)

    def feed(self, piece: bytes, *, is_last: bool) -> str:
        """The name of a call that cannot be run, once the last piece is there; empty: there is none."""
        for event in self._again.feed(piece) + (self._again.end() if is_last else []):
            self._calls.add(event)
        return self._calls.broken if is_last else ""


def read_again(pieces: Iterable[bytes]) -> list[Event]:
    """What relayed bytes said, as events, from their first piece on. Never raises: what cannot be read ends it."""
    again = _Again()
    return [event for piece in pieces for event in again.feed(piece)] + again.end()


def _num_chars(pieces: Iterable[bytes]) -> int:
    told = (event for event in read_again(pieces) if isinstance(event, Content | Reasoning | Refusal | CallArguments))
    return sum(len(event.text) for event in told)


async def aside(work: Callable[[], T], num_bytes: int) -> T:
    """What `work` gives, which reads so many relayed bytes: in a thread, where that takes its time. Who is cancelled
    meanwhile waits for its end: what it counts is counted.
    """
    if num_bytes <= INLINE_BYTES:
        return work()
    reading = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(reading)
    finally:
        await asyncio.wait([reading])


def num_relayed(items: Iterable[object]) -> int:
    """The bytes among them, which have to be read for what they say."""
    return sum(len(item.data) for item in items if isinstance(item, Relayed))


def as_events(items: Iterable[Event | Relayed]) -> Iterator[Event]:
    """The same without bytes: what they said in their place, but for what is told of them behind them."""
    run: list[bytes] = []
    for item in items:
        if isinstance(item, Relayed):
            run.append(item.data)
            continue
        if run:
            yield from _said(run)
            run = []
        yield item
    if run:
        yield from _said(run)


def _said(run: list[bytes]) -> Iterator[Event]:
    return (event for event in read_again(run) if not isinstance(event, Began | Usage | Ended))


def _failed(words: str) -> ProviderFailure:
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
