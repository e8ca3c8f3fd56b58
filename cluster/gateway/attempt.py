"""One attempt at one target: what comes before the first content is held back, waits are bounded, the record kept, the
breaker told. exchange.py makes attempts and decides what follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from diptych.cluster.providers.terms import Terms
from diptych.protos.deltas import CallArguments, CallBegin, Content, Reasoning, Refusal, Signature
from diptych.protos.errors import DiptychError
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Ended, Event, Reply, Usage

from .calls import Calls
from .course import Step
from .metrics import GatewayMetrics
from .public import failure_of
from .record import AttemptRecord
from .relay import Relayed, Relaying, Verbatim
from .spans import RequestSpans
from .watch import Watch

MAX_HELD = 4096  # events before any content; who sends more sends no answer
MAX_EVENTS = 1 << 19  # of one answer, four times the tokens that the longest ones have: they are all kept until its end
_DRAIN_S = 1.0  # for the rest of a stream behind its end, so that its connection can be used again
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one attempt, on the gateway's clock. `first_by`: the first content, or the whole answer, must be there.
    `filter_fails`: an answer that a filter took away before any content is a failure.
    """

    deadline: float
    first_by: float
    terms: Terms
    filter_fails: bool = False


class Attempt:
    """Used by one task at a time. `close` must be called, whatever became of it."""

    def __init__(
        self,
        step: Step,
        limits: Limits,
        record: AttemptRecord,
        *,
        clock: Callable[[], float],
        metrics: GatewayMetrics | None,
        spans: RequestSpans | None = None,
    ) -> None:
        self.step = step
        self.record = record
        self._target = step.member.target
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._spans = spans
        self._watch = Watch()
        self._events: AsyncGenerator[Event | Relayed, None] | None = None
        self._began_at = clock()
        self._origin = self._began_at - record.began_ms / 1000
        self._calls = Calls(is_checked=not self._target.is_own)
        self._first_by = min(limits.deadline, limits.first_by)
        self._idle_s = limits.terms.timeouts.idle_s
        self._num_events = 0
        self._is_over = False  # the answer is
        self._is_closed = False
        step.member.load.in_flight += 1

    async def reply(self, request: ChatRequest) -> Reply:
        """The whole answer. Raises ProviderFailure."""
        answer = self._target.whole(request, self._limits.terms, self.record)
        reply = await self._bounded(answer, self._first_by, FailureKind.FIRST_TOKEN_TIMEOUT)
        self.record.usage = reply.usage
        for part in reply.message.parts:
            self.record.output_chars += len(getattr(part, "text", ""))
        self._calls.add_all(reply.message)
        self._check_end(reply.ended, is_empty=not reply.message.parts)
        self._first()
        self._is_over = True
        return reply

    async def open(self, request: ChatRequest, verbatim: Verbatim | None = None) -> list[Event | Relayed]:
        """Everything up to the first content, or to the end where there is none; as bytes, where `verbatim` is given
        and the target can. Raises ProviderFailure.
        """
        try:
            self._events = self._begun(request, verbatim)
        except Exception as exc:  # what it cannot express, it may say at once
            failure = self._translated(exc)
            raise failure from failure.__cause__
        held: list[Event | Relayed] = []
        while True:
            event = await self._bounded(anext(self._events, None), self._first_by, FailureKind.FIRST_TOKEN_TIMEOUT)
            self.record.phase = "B"
            if not isinstance(event, Relayed):
                event = self._known(event)
            held.append(event)
            if isinstance(event, Ended):
                self._check_end(event, is_empty=True)
                self._is_over = True
            if self._is_over or (event.has_content if isinstance(event, Relayed) else is_content(event)):
                break
            if len(held) > MAX_HELD:
                raise self._failed(FailureKind.SERVER, f"{self._target.name} sent {MAX_HELD} events and no answer")
        self._first()
        if not isinstance(held[-1], Relayed):
            self._calls.add(held[-1])
        return held

    def _begun(self, request: ChatRequest, verbatim: Verbatim | None) -> AsyncGenerator[Event | Relayed, None]:
        target, terms = self._target, self._limits.terms
        if verbatim is not None and isinstance(target, Relaying):
            relayed = target.relay(request, verbatim, terms, self.record)
            if relayed is not None:
                return relayed
        return target.stream(request, terms, self.record)

    async def next(self) -> Event | Relayed | None:
        """The next event behind the first content; None behind the end. Raises ProviderFailure."""
        if self._is_over:
            await self._drain()
            return None
        assert self._events is not None
        due = min(self._limits.deadline, self._clock() + self._idle_s)
        event = await self._bounded(anext(self._events, None), due, FailureKind.IDLE_TIMEOUT)
        self._num_events += 1
        if self._num_events > MAX_EVENTS:
            raise self._failed(FailureKind.SERVER, f"{self._target.name} sent more than {MAX_EVENTS} events")
        if type(event) is Content:  # most are
            self.record.output_chars += len(event.text)
            return event
        if isinstance(event, Relayed):  # or these
            return event
        event = self._known(event)
        if isinstance(event, Ended):
            self._check_end(event, is_empty=False)
            self._is_over = True
        else:
            self._calls.add(event)
        return event

    def _known(self, event: Event | None) -> Event:
        if event is None:
            raise self._failed(FailureKind.SERVER, f"{self._target.name} ended its stream before the answer's end")
        if isinstance(event, Usage):
            self.record.usage = self.record.usage.merged(event)
        elif isinstance(event, Content | Reasoning | Refusal | CallArguments):
            self.record.output_chars += len(event.text)
        return event

    async def close(self) -> None:
        """What is under way is ended. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._watch.close()
        self.step.member.load.in_flight -= 1
        if self.record.outcome == "running":
            self.record.outcome = "answered" if self._is_over else "left"
        self.record.ended_ms = (self._clock() - self._origin) * 1000
        if self.record.outcome == "answered":
            self.step.passage.answered()
        else:
            self.step.passage.close()
        if self._metrics is not None:
            self._metrics.attempted(self.record, self._clock() - self._began_at, is_direct=self.step.group.is_direct)
        try:
            if self._events is not None:
                await self._events.aclose()
        except Exception:  # as in _translated; the answer, or what failed before, is what counts
            logger.exception("target %s could not be closed", self._target.name)
        finally:
            if self._spans is not None:
                self._spans.ended(self.record)

    async def _bounded(self, awaitable: Awaitable[T], due: float, late: FailureKind) -> T:
        """What `awaitable` gives until `due`, on the gateway's clock; all failures booked and in their own form."""
        watch, left_s = self._watch, due - self._clock()
        watch.begin(left_s if left_s > 0 else 0.0)
        try:
            value = await awaitable
        except BaseException as exc:
            if watch.end():
                raise self._too_late(late, left_s) from None
            if not isinstance(exc, Exception):
                raise
            failure = self._translated(exc)
            raise failure from failure.__cause__
        watch.end()
        return value

    def _translated(self, exc: Exception) -> ProviderFailure:
        """With what the client of an own pool is told as its cause."""
        if isinstance(exc, ProviderFailure):
            return self._booked(exc)
        if isinstance(exc, DiptychError):
            failure = self._booked(failure_of(exc, self._target.name))
        else:  # a defect of a target must not take the others' chance away
            logger.error("target %s failed by a defect", self._target.name, exc_info=exc)
            failure = self._failed(FailureKind.SERVER, f"{self._target.name} failed inside this server")
        failure.__cause__ = exc
        return failure

    def _too_late(self, late: FailureKind, waited_s: float) -> ProviderFailure:
        name = self._target.name
        if self._clock() >= self._limits.deadline:
            return self._failed(FailureKind.TOTAL_TIMEOUT, f"{name} was still answering when the time was over")
        what = "nothing" if late is FailureKind.FIRST_TOKEN_TIMEOUT else "nothing more"
        return self._failed(late, f"{name} said {what} for {max(waited_s, 0.0):.3g} s")

    def _failed(self, kind: FailureKind, message: str) -> ProviderFailure:
        return self._booked(ProviderFailure(Failure(kind=kind, message=message), self._target.name))

    def _booked(self, exc: ProviderFailure) -> ProviderFailure:
        exc.target = self._target.name
        self.record.failure = exc.failure
        self.record.outcome = "failed"
        self.step.passage.failed(exc.failure)
        return exc

    def _first(self) -> None:
        now = self._clock()
        self.record.phase = "C"
        self.record.first_ms = (now - self._origin) * 1000
        self.step.passage.began()
        self.step.member.load.measured(now - self._began_at, now, is_stream=self._events is not None)

    def _check_end(self, ended: Ended, *, is_empty: bool) -> None:
        if is_empty and ended.finish == "content_filter" and self._limits.filter_fails:
            raise self._failed(FailureKind.CONTENT_POLICY, f"a filter of {self._target.name} took the answer away")
        if self._calls.broken and ended.finish != "length":
            told = f"{self._target.name} called {self._calls.broken} with arguments that are no JSON object"
            raise self._failed(FailureKind.SERVER, told)

    async def _drain(self) -> None:
        """What a provider sends behind the end counts for nothing."""
        assert self._events is not None
        try:
            async with asyncio.timeout(_DRAIN_S):
                while await anext(self._events, None) is not None:
                    pass
        except (TimeoutError, DiptychError):
            pass


def is_content(event: Event) -> bool:
    """Whether a client would show it, so that it cannot be taken back."""
    match event:
        case Content(text) | Reasoning(text) | Refusal(text):
            return bool(text)
        case CallBegin():
            return True
        case Signature(is_redacted=is_redacted):
            return is_redacted
    return False
