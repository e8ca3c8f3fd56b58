"""One call through its attempts, as a machine: sends, reads, validates, asks again.

call.py and reply.py run it; streams.py is its twin for answers that come in pieces, and shares its Trying. retries.py
decides what follows a failure, reasking.py makes the request of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from diptych.cluster.gateway.restoring import restoring
from diptych.protos.errors import DiptychError
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply as Answer

from .assembling import known_parts
from .attempts import Attempt
from .cache import recalled
from .draft import Draft, Encoded, canonical_of, encoded
from .errors import CallFailed, EmptyAnswer, ProviderError, Refused, Truncated, UsageError
from .limiter import Place, distinct
from .machine import Machine, Sleep, take
from .reasking import beginning, following, joined
from .reply import UNSET, Reply, Unset
from .retries import Course, Next
from .upstream import Limits, Upstream, Wire
from .usage import attempt_spent, spent_of
from .watch import Watch, watching

T = TypeVar("T")


@dataclass(slots=True)
class Ready:
    """A step: the request with what its target cannot fetch itself."""

    upstream: Upstream
    request: ChatRequest

    async def perform(self) -> ChatRequest:
        """Fetch it."""
        return await self.upstream.ready(self.request)


@dataclass(slots=True)
class Whole:
    """A step: a whole answer."""

    sent: Encoded
    limits: Limits
    wire: Wire

    async def perform(self) -> Answer:
        """Ask for it."""
        try:
            async with asyncio.timeout(self.limits.total_s):
                answer = await self.sent.upstream.whole(self.sent.outgoing, self.limits, self.wire)
        except TimeoutError as exc:
            raise too_late() from exc
        undone = restoring(self.sent.request, self.sent.outgoing.notes)
        return answer if undone is None else undone.reply(answer)


class Trying(Generic[T]):
    """A call on its way: what the next attempt is, and what was before. `origin` is the developer's own draft."""

    def __init__(self, draft: Draft[T], watch: Watch) -> None:
        self.origin = self.draft = draft
        self.watch = watch
        self.course = Course(draft.retries, draft.budget, draft.model, time.monotonic())
        self.why = "first"
        self.wire = Wire()
        self._began = 0.0
        self._sent: Encoded | None = None
        for model in draft.retries.fallback:  # one that nobody can reach is told of now, not when it is needed
            draft.registry.resolve(model)

    @property
    def number(self) -> int:
        """Of the attempt that is on its way, or comes next."""
        return len(self.course.attempts) + 1

    def begin(self, *, stream: bool) -> Machine[tuple[Encoded, Limits]]:
        """The next attempt goes out. Raises UsageError; CallFailed where no fallback is left that could be asked."""
        sent = yield from self._prepared(stream)
        self._sent = sent = self.watch.asks(self.draft, sent, self.number, self.why)
        self.wire, self._began = Wire(), time.monotonic()
        return sent, self._limits()

    def place(self) -> Machine[Place]:
        """A place among the requests that may be on their way. Raises BudgetExceeded."""
        limiters = distinct((self.draft.limiter, self.draft.registry.limiter))
        place = Place(limiters, self.course.left_s(time.monotonic()))
        if limiters:
            try:
                yield from take(place)
            except TimeoutError as exc:
                raise self.course.out_of_time(time.monotonic()) from exc
            except BaseException:  # a Ctrl-C that came when the place was given already
                place.give()
                raise
        return place

    def value(self, answer: Answer) -> T | Unset:
        """In an answer; see value_of."""
        with self.watch.inside():
            return value_of(self.draft, answer)

    def succeeded(self, answer: Answer, result: T | Unset) -> Reply[T]:
        """The reply. What is gone on from has the developer's own parameters, and the model that worked."""
        self._add(answer, None)
        draft = self.draft
        if draft is not self.origin or draft.begun is not None:
            draft = replace(draft, params=self.origin.params, begun=None)
        reply = Reply(draft=draft, answer=answer, attempts=tuple(self.course.attempts), result=cast("T", result))
        return self.watch.ended(reply)

    def failed(self, answer: Answer | None, error: CallFailed) -> Next:
        """What comes next; the draft is that of it. Raises CallFailed where nothing does."""
        self._add(answer, error)
        step = self.watch.after(self.course, error)
        self._follow(step)
        return step

    def _add(self, answer: Answer | None, error: CallFailed | None) -> None:
        assert self._sent is not None
        sent, wire = self._sent, self.wire
        attempt = Attempt(
            number=self.number,
            model=self.draft.model,
            why=self.why,
            answer=answer,
            error=error,
            spent=attempt_spent(self.draft, sent.upstream, sent.model, answer, error),
            seconds=time.monotonic() - self._began,
            request_id=wire.request_id,
            raw=wire.raw,
        )
        self.watch.tried(attempt, wire)
        begun = "" if error is None else beginning(self.draft, sent.upstream.profile, answer, error)
        self.course.add(attempt, begun)

    def _follow(self, step: Next) -> None:
        self.draft = following(self.origin, self.draft, self.course.attempts[-1], step)
        self.why = step.why

    def _prepared(self, stream: bool) -> Machine[Encoded]:
        while True:
            try:
                return (yield from prepared(self.draft, stream=stream))
            except UsageError as exc:
                if self.why != "fallback":
                    raise
                self._follow(self.course.without(self.draft.model, str(exc)))

    def _limits(self) -> Limits:
        """Of the attempt: its own timeout, and what is left of the budget's time."""
        total_s, left_s = self.draft.params.get("timeout"), self.course.left_s(time.monotonic())
        if left_s is not None:
            total_s = max(0.001, left_s if total_s is None else min(total_s, left_s))
        return Limits(total_s=total_s, first_token_s=self.draft.params.get("first_token_timeout"))


def exchange(draft: Draft[T]) -> Machine[Reply[T]]:
    """The reply. Raises the last attempt's CallFailed with all attempts; UsageError before anything is sent."""
    with watching(draft) as watch:
        memory = yield from recalled(draft)
        if memory.reply is not None:
            return watch.ended(memory.reply)
        trying = Trying(draft, watch)
        while True:
            answer: Answer | None = None
            try:
                answer = yield from _answered(trying)
                result = trying.value(answer)
            except ProviderFailure as exc:
                error: CallFailed = provider_error(exc, trying.draft)
            except CallFailed as exc:
                if answer is None or exc.attempts:  # there was no attempt, or it is a validator's own call that failed
                    raise
                error = exc
            else:
                return (yield from memory.keep(trying.succeeded(answer, result)))
            step = trying.failed(answer, error)
            if step.pause_s:
                yield from take(Sleep(step.pause_s))


def _answered(trying: Trying[Any]) -> Machine[Answer]:
    with (yield from trying.place()) as place:
        sent, limits = yield from trying.begin(stream=False)
        answer = joined(trying.draft.begun, (yield from take(Whole(sent, limits, trying.wire))))
        if place.limiters:
            place.tokens = spent_of(answer.usage, None).tokens
        return answer


def prepared(draft: Draft[Any], *, stream: bool = False) -> Machine[Encoded]:
    """The request as its target takes it; media that it cannot fetch are in it. Raises UsageError."""
    upstream, model = draft.target()
    request = canonical_of(draft, upstream, model)
    if any(message.media for message in request.messages):
        try:
            request = yield from take(Ready(upstream, request))
        except DiptychError as exc:
            raise UsageError(f"{draft.name}: {exc}", getattr(exc, "param", None) or "") from exc
    return encoded(draft, upstream, model, request, stream=stream)


def too_late() -> ProviderFailure:
    """An upstream that does not look at its limits."""
    words = "the answer was not finished in time"
    return ProviderFailure(Failure(kind=FailureKind.TOTAL_TIMEOUT, message=words))


def provider_error(exc: ProviderFailure, draft: Draft[Any]) -> ProviderError:
    """As the developer sees it."""
    error = ProviderError(exc.failure, draft.model)
    error.__cause__ = exc
    return error


def value_of(draft: Draft[T], answer: Answer) -> T | Unset:
    """The value in an answer; Unset where it calls tools. Raises CallFailed of the kind that fits."""
    message, finish = answer.message, answer.ended.finish
    if message.refusal is not None or finish == "content_filter":
        words = message.refusal or ""
        raise Refused(f"{draft.model} declined{': ' + words if words else ''}", words)
    text = message.content
    if message.tool_calls:
        if finish == "length" and not _is_json(message.tool_calls[-1].text):
            name = message.tool_calls[-1].name
            raise Truncated(f"{draft.model} was cut off in its call of {name}; raise max_tokens", text)
        return UNSET
    if not text.strip():
        if finish == "length" and not text:
            where = " in its reasoning" if message.reasoning_content else ""
            raise Truncated(f"{draft.model} was cut off{where} before it said anything; raise max_tokens")
        raise EmptyAnswer(f"{draft.model} answered with nothing" + (" but spaces" if text else ""))
    if draft.output is None:
        return cast("T", text)
    if finish == "length":
        words = f"{draft.model} was cut off at its limit of tokens, after {len(text)} characters; raise max_tokens"
        raise Truncated(words, text, known_parts(draft.output, text))
    return draft.output.parse(text, draft.validation)


def _is_json(text: str) -> bool:
    try:
        json.loads(text or "{}")
    except (ValueError, RecursionError):
        return False
    return True
