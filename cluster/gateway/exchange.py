"""One request through its attempts, to an answer or to the one error that its client gets: the phases A to E.

gateway.py makes one per request. Which target is next: course.py; one attempt: attempt.py; going on from a text:
continuation.py. A finish is never made up, and no attempt outlives its exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from diptych.cluster.providers.terms import Terms
from diptych.protos.deltas import Content
from diptych.protos.errors import CapacityError, DeadlineExceeded, DiptychError, FirstTokenTimeout
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Event, Reply

from .attempt import Attempt, Limits
from .continuation import Seam, Told, continued, may_go_on, why_not
from .course import Course, Step
from .hedging import may_be_hedged
from .metrics import GatewayMetrics
from .planning import Plan
from .ports import Reservation
from .public import broken, public_error
from .record import AttemptRecord, Cause, Watcher
from .relay import Relayed, RelayItem, Verbatim
from .signals import Continued, Restarted
from .spans import RequestSpans
from .target import Target

# While there are other targets, one that says nothing gets this part of the time that is left.
_PART_OF_FIRST = 0.5
_PART_OF_WHOLE = 2 / 3
T = TypeVar("T")


class Exchange:
    """Of one request, for one of `whole` and `stream`, once. `record` may be read at any time."""

    def __init__(
        self,
        plan: Plan,
        *,
        reservation: Reservation | None = None,
        metrics: GatewayMetrics | None,
        watcher: Watcher | None = None,
        spans: RequestSpans | None = None,
    ) -> None:
        shared, group, request = plan.shared, plan.group, plan.request
        self.request = request
        self._reservation = reservation
        self._context = plan.context
        self.record = plan.record
        self._group = group
        self._metrics = metrics
        self._watcher = watcher
        self._spans = spans
        self._clock = shared.clock
        self._began_at = plan.began_at
        self._deadline = plan.deadline
        self._first_by = plan.first_by
        self._course = Course(shared, group, request, self.record, session=plan.context.session, until=self._first_by)
        self._may_be_hedged = may_be_hedged(request)
        shared.retries.admitted()
        if group.hedges is not None:
            group.hedges.admitted()

    @property
    def left_s(self) -> float:
        """Until the deadline, which all attempts share."""
        return self._deadline - self._clock()

    async def whole(self) -> Reply:
        """The answer. Raises the error for the client."""
        try:
            self._check_time()
            step = await self._course.next()
            while True:
                try:
                    attempt, reply = await self._raced(step, _replied(self.request), is_stream=False)
                except ProviderFailure as exc:
                    step = await self._further(exc)
                    continue
                await attempt.close()
                self._end("answered", attempt)
                return reply
        except ProviderFailure as exc:
            error = public_error(exc)
            self._end(error.code)
            raise error from exc
        except DiptychError as exc:
            self._end(exc.code)
            raise
        finally:
            self._end("cancelled")

    async def stream(
        self, *, restarts: bool = False, verbatim: Verbatim | None = None
    ) -> AsyncGenerator[RelayItem, None]:
        """The answer's events, and with `verbatim` its bytes where a target passes them on. With `restarts`, a failure
        after the first content makes the answer begin again at another target, which Restarted tells; without, the
        route's `midstream` holds. Raises the error for the client: AnswerBroken where it has seen a part. Closing it
        ends what is under way.
        """
        tale = _Tale(self.request, verbatim)
        attempt: Attempt | None = None
        try:
            self._check_time()
            step = await self._course.next()
            while True:
                try:
                    attempt = None
                    attempt, held = await self._raced(step, _opened(tale), is_stream=True)
                    self._course.extend(self._deadline)
                    for item in tale.opened(attempt.step.member.target, held):
                        yield item
                    while (event := await attempt.next()) is not None:
                        if (shown := tale.shown(event)) is not None:
                            yield shown
                    self._end("answered", attempt)
                    return
                except ProviderFailure as exc:
                    if attempt is not None:
                        self._course.failed(attempt.step, exc)
                        await attempt.close()
                    step = await self._after(exc, tale, restarts=restarts)
        except ProviderFailure as exc:
            seen = not tale.told.is_empty
            error = broken(exc, self.record.usage, tale.why_not) if seen else public_error(exc)
            self._end(error.code)
            raise error from exc
        except DiptychError as exc:
            self._end(exc.code)
            raise
        finally:
            if attempt is not None:
                await attempt.close()
            self._end("cancelled")

    def _check_time(self) -> None:
        """Before the first attempt. Raises the error for the client where it would come too late."""
        now = self._clock()
        if now >= self._deadline:
            raise DeadlineExceeded("the request's time was over before a target could be asked")
        if now >= self._first_by:
            raise FirstTokenTimeout("first_token_timeout_s was over before a target could be asked")

    async def _after(self, exc: ProviderFailure, tale: _Tale, *, restarts: bool) -> Step:
        """The next attempt behind a failure, and what it is asked. Raises `exc` or the like where there is none."""
        if tale.told.is_empty:
            return await self._further(exc)
        # Who has seen a text waits no longer for the rest than for any other piece.
        self._course.extend(min(self._deadline, self._clock() + self._group.timeouts.idle_s))
        if restarts:
            step = await self._further(exc, "restart")
            tale.begin_again(self.request, exc)
            return step
        await tale.told.read_relayed()
        writer = tale.writer
        midstream = self._group.settings.midstream
        tale.why_not = why_not(self.request, tale.told, exc.failure, midstream)
        if tale.why_not or writer is None:
            raise exc
        step = await self._further(exc, "continue", only=lambda target: may_go_on(writer, target, midstream))
        tale.go_on(self.request, exc)
        return step

    async def _further(
        self, exc: ProviderFailure, cause: Cause = "retry", *, only: Callable[[Target], bool] | None = None
    ) -> Step:
        """The next attempt behind the failure `exc`. Raises as Course.next, and `exc` where no money is left for it."""
        step = await self._course.next(cause, only)
        if not await self._is_covered(step):
            raise exc
        return step

    async def _is_covered(self, step: Step) -> bool:
        """Whether what the attempts so far cost could be set aside besides what `step` may cost; it is void if not."""
        if self._reservation is None:
            return True
        try:
            async with asyncio.timeout(max(self.left_s, 0.0)):
                await self._reservation.again(self.record)
        except (CapacityError, TimeoutError) as exc:
            step.passage.close()
            why = exc.message if isinstance(exc, CapacityError) else "the budgets could not be asked in time"
            self.record.words.append(f"{step.member.target.name} was not tried: {why}")
            return False
        except BaseException:
            step.passage.close()
            raise
        return True

    async def _raced(
        self, step: Step, begin: Callable[[Attempt], Awaitable[T]], *, is_stream: bool
    ) -> tuple[Attempt, T]:
        """An attempt that has begun well, of one or of two. The others are closed, their failures told to the course.
        Raises ProviderFailure, the last one.
        """
        delay_s = self._hedge_delay_s(step, is_stream=is_stream)
        first = self._attempt(step, is_stream=is_stream)
        if delay_s is not None:
            return await self._race(first, begin, delay_s, is_stream=is_stream)
        try:
            return first, await begin(first)
        except ProviderFailure as exc:
            self._course.failed(step, exc)
            await first.close()
            raise
        except BaseException:
            await first.close()
            raise

    async def _race(
        self, first: Attempt, begin: Callable[[Attempt], Awaitable[T]], delay_s: float, *, is_stream: bool
    ) -> tuple[Attempt, T]:
        running: dict[asyncio.Task[T], Attempt] = {_task(begin(first)): first}
        winner: Attempt | None = None
        attempts = [first]
        last: ProviderFailure | None = None
        try:
            done, _ = await asyncio.wait(running, timeout=delay_s)
            if not done and (beside := await self._beside(first.step, running)) is not None:
                rival = self._attempt(beside, is_stream=is_stream)
                attempts.append(rival)
                running[_task(begin(rival))] = rival
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: attempts.index(running[task])):
                    attempt = running.pop(task)
                    exc = task.exception()
                    if exc is None:
                        winner = attempt
                        return attempt, task.result()
                    if not isinstance(exc, ProviderFailure):
                        raise exc
                    self._course.failed(attempt.step, exc)
                    last = exc
            assert last is not None
            raise last
        finally:
            for task in running:
                task.cancel()
            losers = [attempt for attempt in attempts if attempt is not winner]
            try:
                await asyncio.gather(*running, return_exceptions=True)
                for attempt in losers:
                    if winner is not None and attempt.record.outcome == "running":
                        attempt.record.outcome = "lost"
                    await attempt.close()
            except BaseException:  # who leaves amid it takes no winner, which nobody else could close
                await asyncio.gather(*running, return_exceptions=True)
                for attempt in attempts:
                    await attempt.close()
                raise

    def _hedge_delay_s(self, step: Step, *, is_stream: bool) -> float | None:
        hedges = step.group.hedges
        if hedges is None or not self._may_be_hedged or step.cause in ("continue", "restart"):
            return None
        if len(step.group.members) < 2:
            return None
        return hedges.delay_s(step.member.load, is_stream=is_stream)

    async def _beside(self, step: Step, running: Iterable[asyncio.Task[Any]]) -> Step | None:
        """A second attempt beside that of `step`, where there may be one. An answer that comes while money is being set
        aside for it waits for no books.
        """
        hedges = step.group.hedges
        assert hedges is not None
        if not hedges.is_left or (beside := self._course.beside(step)) is None:
            return None
        covering: asyncio.Task[Any] = _task(self._is_covered(beside))
        begins = False
        try:
            done, _ = await asyncio.wait({covering, *running}, return_when=asyncio.FIRST_COMPLETED)
            begins = done == {covering} and covering.result()
        finally:
            covering.cancel()
            await asyncio.gather(covering, return_exceptions=True)
            if not begins:
                self._course.take_back(beside)
        if begins:
            hedges.take()
        return beside if begins else None

    def _attempt(self, step: Step, *, is_stream: bool) -> Attempt:
        now = self._clock()
        timeouts = step.group.timeouts
        if is_stream:
            wait_s = timeouts.first_token_s
            until, part = self._course.until, _PART_OF_FIRST
        else:
            wait_s = timeouts.answer_s
            until, part = self._deadline, _PART_OF_WHOLE
        if self._course.has_others(step):
            wait_s = min(wait_s, part * (until - now))
        first_by, ahead_s = min(now + wait_s, until), asyncio.get_running_loop().time() - now
        limits = Limits(
            deadline=self._deadline,
            first_by=first_by,
            terms=Terms(self._deadline + ahead_s, timeouts, first_by + ahead_s),
            filter_fails=self._course.has_content_policy_chain,
        )
        record = AttemptRecord(
            target=step.member.target.name,
            group=step.group.name,
            cause=step.cause,
            began_ms=(now - self._began_at) * 1000,
            context=self._context,
            traceparent=self._context.traceparent,
        )
        self.record.attempts.append(record)
        if self._spans is not None:
            self._spans.began(record, len(self.record.attempts))
        if self._watcher is not None:
            self._watcher(self.record)
        return Attempt(step, limits, record, clock=self._clock, metrics=self._metrics, spans=self._spans)

    def _end(self, outcome: str, attempt: Attempt | None = None) -> None:
        if self.record.outcome != "running":
            return
        self.record.outcome = outcome
        if attempt is not None:
            self.record.target = attempt.record.target
        if self._metrics is not None:
            self._metrics.exchanged(self.record, is_route=not self._group.is_direct)


class _Tale:
    """What the client of a stream has been told over all attempts, and what the next attempt is asked."""

    def __init__(self, request: ChatRequest, verbatim: Verbatim | None = None) -> None:
        self.request = request
        self.verbatim = verbatim
        self.told = Told()
        self.writer: Target | None = None  # of the last content
        self.why_not = ""
        self._seam: Seam | None = None
        self._after: FailureKind | None = None
        self._begins_again = False

    def begin_again(self, request: ChatRequest, exc: ProviderFailure) -> None:
        """The next attempt is asked for the whole answer, and what was told is void once it has begun."""
        self.request = request
        self._after, self._begins_again = exc.failure.kind, True

    def go_on(self, request: ChatRequest, exc: ProviderFailure) -> None:
        """The next attempt is asked to go on with what was told."""
        self.request, self.verbatim = continued(request, self.told), None
        self._seam = Seam(self.told)
        self._after = exc.failure.kind

    def opened(self, target: Target, held: list[Event | Relayed]) -> list[RelayItem]:
        """What the client is told when an attempt at `target` has begun."""
        found: list[RelayItem] = []
        if self._after is not None:
            if self._begins_again:
                self.told = Told()
            signal = Restarted if self._begins_again else Continued
            found.append(signal(target.name, self._after))
            self._after, self._begins_again = None, False
        self.writer = target
        if not self.told.has_begun and not isinstance(held[0], Began):
            held = [Began(), *held]
        return [*found, *(shown for event in held if (shown := self.shown(event)) is not None)]

    def shown(self, event: Event | Relayed) -> Event | Relayed | None:
        """`event` as the client sees it; None where it has seen it already."""
        if self._seam is None and type(event) is Content:  # most are
            self.told.add(event)
            return event
        if isinstance(event, Began) and self.told.has_begun:
            return None
        if self._seam is not None:
            joined = self._seam.joined(event)
            if joined is None:
                return None
            event = joined
        self.told.add(event)
        return event


def _replied(request: ChatRequest) -> Callable[[Attempt], Awaitable[Reply]]:
    return lambda attempt: attempt.reply(request)


def _opened(tale: _Tale) -> Callable[[Attempt], Awaitable[list[Event | Relayed]]]:
    return lambda attempt: attempt.open(tale.request, tale.verbatim)


def _task(awaitable: Awaitable[T]) -> asyncio.Task[T]:
    async def run() -> T:
        return await awaitable

    return asyncio.get_running_loop().create_task(run())
