"""A target that does as it is told, for tests of what chooses among targets. No network, no wire format."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from diptych.cluster.providers.terms import Terms
from diptych.protos.deltas import Content
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

from .record import AttemptRecord
from .target import Continues

HANG = 1e9  # seconds


@dataclass(frozen=True, slots=True)
class Wait:
    """Virtual seconds in which nothing comes."""

    seconds: float


# What a call does, in order; an exception is raised where it stands.
Script = Sequence[Event | Wait | Exception]


def says(*texts: str, tokens: int | None = None) -> Script:
    """An answer of these pieces."""
    usage = Usage(input_tokens=7, output_tokens=len(texts) if tokens is None else tokens)
    return [Began("answer", "scripted"), *(Content(text) for text in texts), usage, Ended("stop")]


def fails(kind: FailureKind, *, retry_after_s: float | None = None, message: str = "as told") -> ProviderFailure:
    """A failure to raise."""
    return ProviderFailure(Failure(kind=kind, message=message, retry_after_s=retry_after_s))


@dataclass
class ScriptedTarget:
    """Each call does the next script; the last one for ever. `requests`: the calls so far; `open`: those under way."""

    name: str
    scripts: Sequence[Script | Callable[[ChatRequest], Script]] = ()
    is_own: bool = False
    continues: Continues = "no"
    weights: str = ""
    key_id: str = ""
    cannot: str = ""  # why it cannot do anything that is asked
    requests: list[ChatRequest] = field(default_factory=list)
    terms: list[Terms] = field(default_factory=list)
    open: int = 0

    def check(self, request: ChatRequest) -> None:
        """As `cannot` says."""
        if self.cannot:
            raise ProviderFailure(Failure(kind=FailureKind.UNSUPPORTED, message=self.cannot, param="seed"), self.name)

    async def whole(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> Reply:
        """All that the script says."""
        builder = ReplyBuilder()
        async for event in self.stream(request, terms, record):
            builder.add(event)
        return builder.reply()

    async def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Event, None]:
        """What the script says, as it says it."""
        self.check(request)
        script = self._next(request)
        self.requests.append(request)
        self.terms.append(terms)
        self.open += 1
        try:
            for step in script:
                if isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.open -= 1

    def _next(self, request: ChatRequest) -> Iterator[Event | Wait | Exception]:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        return iter(script(request) if callable(script) else script)
