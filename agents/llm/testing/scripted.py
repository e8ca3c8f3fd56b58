"""A model that says what a test wrote down; requests are those of the real wire formats.

    model = ScriptedModel(["hello", {"title": "Emma"}, tool_call("search", q="x"), failure("rate_limited")])
    registry = registry_of(test=model)

Each request takes the next entry; `requests` are those that came, as they would have gone out.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from diptych.protos.closed_paths import ClosedPaths
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning, Structured
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Finish, Reply, ReplyBuilder, Usage

from ..profiles import POOL, POOL_QUIRKS, Profile
from ..upstream import Limits, Wire
from .bodies import last_text

if TYPE_CHECKING:
    from .batches import ScriptedBatches

JsonObject = dict[str, Any]
_USAGE = Usage(input_tokens=10, output_tokens=5)


class ScriptExhausted(AssertionError):
    """More requests came than the script has entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer.

    text, thoughts, calls   what it says; a call is its name and its arguments
    finish     why it ends; None: `tool_calls` with calls, else `stop`
    usage      the tokens that it tells
    pieces     the text as it comes in a stream; None: in runs of 4 characters
    delay_s    seconds before it begins; a call's `timeout` and `first_token_timeout` end the wait as over a network
    cut        the failure that breaks it off, in a stream behind `cut_after` of its events; a whole answer gives the
               failure alone
    """

    text: str = ""
    thoughts: str = ""
    calls: tuple[tuple[str, JsonObject], ...] = ()
    finish: Finish | None = None
    usage: Usage = _USAGE
    pieces: tuple[str, ...] | None = None
    delay_s: float = 0.0
    cut: ProviderFailure | None = None
    cut_after: int = 0


def tool_call(name: str, /, **arguments: Any) -> Said:
    """An answer that is one call."""
    return Said(calls=((name, arguments),))


def failure(
    kind: str, *, retry_after_s: float | None = None, status: int = 0, message: str = "scripted"
) -> ProviderFailure:
    """A failed request; `kind` as in protos/failures.py. Raises ValueError that names the kinds."""
    try:
        known = FailureKind(kind)
    except ValueError:
        raise ValueError(f"{kind!r} is no kind of failure; those that are: {', '.join(FailureKind)}") from None
    told = Failure(kind=known, message=message, status=status, retry_after_s=retry_after_s)
    return ProviderFailure(told, "scripted")


def cut(answer: str | JsonObject | list[Any] | Said, *, after: int, kind: str = "server") -> Said:
    """`answer`, of which a stream gives the first `after` events and then fails; asked whole, it fails at once."""
    broken = failure(kind, message=f"scripted: the connection broke after {after} events")
    return replace(_said(answer), cut=broken, cut_after=after)


Entry = str | JsonObject | list[Any] | Said | ProviderFailure | Callable[[JsonObject], Any]


@dataclass
class ScriptedModel:
    """An upstream. An entry is a text, JSON (an answer of it), Said, a failure, or a function of the request's body
    that gives one of these. After the last entry `then` is taken again and again; without one, ScriptExhausted.

    codec_name, quirks, profile   whose wire format it speaks, and what it can do; a Diptych cluster's by default
    delay_s      seconds between the events of a stream
    requests     bodies that came, detached from what the caller goes on to change; `headers` and `limits` with them
    open_streams those that nobody has closed yet
    """

    entries: Iterable[Entry]
    name: str = "test"
    codec_name: str = "openai.chat"
    quirks: Quirks = POOL_QUIRKS
    profile: Profile = POOL
    delay_s: float = 0.0
    then: Entry | None = None
    requests: list[JsonObject] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    open_streams: int = 0
    _left: list[Entry] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _batches: ScriptedBatches | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.entries, (str, dict)):
            raise TypeError(f"a script is a list of entries; write ScriptedModel([{self.entries!r}])")
        self._left = list(self.entries)

    @property
    def family(self) -> str:
        """Whose options it gets."""
        return self.quirks.family or self.name

    @property
    def codec(self) -> Any:
        """Of its wire format."""
        return by_name(self.codec_name)

    @property
    def batches(self) -> ScriptedBatches:
        """Where `llm.batch` takes its requests to."""
        if self._batches is None:
            from .batches import ScriptedBatches

            self._batches = ScriptedBatches(self)
        return self._batches

    @property
    def left(self) -> int:
        """Entries that no request has taken."""
        return len(self._left)

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """See Upstream."""
        said = self._next(outgoing, limits)
        await _wait(said, limits.total_s, FailureKind.TOTAL_TIMEOUT)
        if said.cut is not None:
            raise said.cut
        builder = ReplyBuilder()
        for event in events_of(said):
            builder.add(event)
        wire.status = 200
        return builder.reply()

    async def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """See Upstream."""
        said = self._next(outgoing, limits)
        self.open_streams += 1
        try:
            first_s = limits.total_s if limits.first_token_s is None else limits.first_token_s
            await _wait(said, first_s, FailureKind.FIRST_TOKEN_TIMEOUT)
            wire.status = 200
            events = events_of(said)
            if outgoing.body.get("structured"):
                events = with_parts(events)
            for at, event in enumerate(events):
                if said.cut is not None and at == said.cut_after:
                    raise said.cut
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                yield event
            if said.cut is not None and said.cut_after >= len(events):
                raise ValueError(f"cut(after={said.cut_after}): the answer has {len(events)} events")
        finally:
            self.open_streams -= 1

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """Nothing has to be fetched."""
        return request

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """A thousandth of a cent for a token."""
        return Decimal((usage.input_tokens or 0) + (usage.output_tokens or 0)) / 100_000

    def identity(self) -> str:
        """Its name and its format."""
        return f"scripted {self.name} {self.codec_name}"

    def _next(self, outgoing: Outgoing, limits: Limits) -> Said:
        body: JsonObject = json.loads(json.dumps(outgoing.body))
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(outgoing.headers))
            self.limits.append(limits)
            number = len(self.requests)
            entry = self._left.pop(0) if self._left else self.then
        if entry is None:
            raise ScriptExhausted(
                f"the script of {self.name} has {number - 1} entries, and request {number} came: "
                f"{_short(last_text(body))!r}; .requests has all of them, then=... answers further ones"
            )
        if callable(entry) and not isinstance(entry, ProviderFailure):
            entry = entry(json.loads(json.dumps(body)))
        if isinstance(entry, ProviderFailure):
            raise entry
        return _said(entry)


def _said(entry: Any) -> Said:
    if isinstance(entry, Said):
        return entry
    return Said(text=entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False))


async def _wait(said: Said, limit_s: float | None, kind: FailureKind) -> None:
    if not said.delay_s:
        return
    if limit_s is None or said.delay_s < limit_s:
        await asyncio.sleep(said.delay_s)
        return
    await asyncio.sleep(limit_s)
    raise ProviderFailure(Failure(kind=kind, message=f"scripted: nothing came within {limit_s:g} s"), "scripted")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def events_of(said: Said) -> list[Event]:
    """As a stream of them."""
    events: list[Event] = [Began("scripted", "scripted")]
    if said.thoughts:
        events.append(Reasoning(said.thoughts))
    pieces = said.pieces
    if pieces is None:
        pieces = tuple(said.text[at : at + 4] for at in range(0, len(said.text), 4))
    events += [Content(piece) for piece in pieces]
    for at, (name, arguments) in enumerate(said.calls):
        events += [CallBegin(at, name, f"call_{at}"), CallArguments(at, json.dumps(arguments)), CallEnd(at)]
    finish: Finish = said.finish or ("tool_calls" if said.calls else "stop")
    return [*events, said.usage, Ended(finish)]


def with_parts(events: Iterable[Event]) -> list[Event]:
    """As a cluster that was asked for `structured` tells them: behind each content what it completes."""
    paths, found = ClosedPaths(), list[Event]()
    for event in events:
        found.append(event)
        if isinstance(event, Content) and (parts := paths.feed(event.text)):
            found.append(Structured(parts))
    return found
