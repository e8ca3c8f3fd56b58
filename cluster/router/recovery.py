"""What follows a failed attempt: another one, at once or after a pause, or the failure as the answer.

Before the first token it is a retry, after it a move: the next engines go on behind the tokens that the client has.
Both cost a token of the tenant's retry budget; a refusal of an engine that drains or is full costs a move nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.cluster.config import RouterSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import CapacityError, DeadlineExceeded, DiptychError, Disagreement, ShuttingDown
from diptych.protos.types import EngineRef, GenerateRequest, Role

from .attempt import Attempt
from .budget import RetryBudget
from .call import GenerateCall
from .gate import MAX_STRIKES, Gate, Quarantine, Seat, Suspects
from .placement import Ask
from .record import CallRecord
from .view import ClusterView

MAX_PAUSES = 6  # for engines that are full or drain, before the first token: about 3 s
_PAUSE_S = 0.05  # before the second further attempt without a token in between; each one more doubles it
_LONGEST_PAUSE_S = 1.0
_JITTER = 0.2


@dataclass(slots=True)
class Work:
    """One call on its way through its attempts."""

    call: GenerateCall
    request: GenerateRequest  # of the present attempt
    ask: Ask
    record: CallRecord
    deadline: float
    tenant: str  # as it is counted
    emitted: list[int] = field(default_factory=list)  # given to the client
    avoid: set[EngineRef] = field(default_factory=set)  # lives of engines that failed it
    tries: int = 0  # failed attempts without a token to the client, but for refusals
    moves: int = 0
    failures: int = 0  # since the last token, refusals included
    strikes: list[EngineRef] = field(default_factory=list)  # engines that died since the last token
    is_unproven: bool = False  # placed, and no token of this attempt came yet
    is_suspect: bool = False  # nobody else can have killed the last of these engines, or there are too many of them

    @property
    def name(self) -> bytes:
        """The same for all attempts."""
        return self.request.key.transfer_id


class Recovery:
    """One per router, one event loop. `clock` in seconds; `rng` spreads the pauses."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        view: ClusterView,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.quarantine = Quarantine(period_s=settings.quarantine_s, clock=clock)
        self.budget = RetryBudget(
            fraction=settings.retry_budget, burst=settings.retry_burst or settings.limits.max_running
        )
        self._settings = settings
        self._view = view
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._gate = Gate()
        self._suspects = Suspects()

    @property
    def num_unproven(self) -> int:
        """Orders without a token yet."""
        return len(self._suspects)

    async def enter(self, work: Work) -> Seat:
        """Wait until `work` may be placed: at once, unless engines died with it. Raises DeadlineExceeded."""
        if not work.strikes:
            return Seat()
        try:
            async with asyncio.timeout(max(work.deadline - self._clock(), 0)):
                return await self._gate.enter(len(work.strikes))
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed while its engines were replaced") from None

    def placed(self, work: Work, attempt: Attempt) -> None:
        """The attempt is about to begin."""
        work.is_unproven = True
        self._suspects.placed(work.name, attempt.engines)

    def told(self, work: Work, attempt: Attempt, tokens: list[int]) -> None:
        """Its engines have made tokens, which go to the client now."""
        work.emitted += tokens
        if work.is_unproven:
            work.failures = 0
            work.strikes.clear()
            self.closed(work, attempt)

    def failed(self, work: Work, attempt: Attempt) -> None:
        """It has failed: note which engine died with it, and in whose company. Before `closed`."""
        work.is_suspect = False
        dead = attempt.killed()
        if dead is not None:
            work.strikes.append(dead)
            work.is_suspect = self._suspects.is_alone(work.name, dead) or len(work.strikes) >= MAX_STRIKES

    def closed(self, work: Work, attempt: Attempt) -> None:
        """It is over, or its first token came: what happens to its engines now is not its doing."""
        if work.is_unproven:
            work.is_unproven = False
            self._suspects.cleared(work.name, attempt.engines)

    def is_last(self, work: Work) -> bool:
        """Whether no other attempt would follow a failure of this one."""
        if work.emitted:
            return work.moves >= self._settings.migration_limit
        return work.tries + 1 >= self._settings.max_attempts

    async def prepare(self, work: Work, attempt: Attempt, error: DiptychError) -> None:
        """Returns when the next attempt may be made, after `attempt` failed with `error`.

        Raises `error` when there is none, Quarantined when the request ends engines, DeadlineExceeded.
        """
        work.avoid |= attempt.failed_engines()
        if isinstance(error, Disagreement):
            self._metrics.counters["disagreements"].labels(work.call.model).inc()
        if not error.retryable:
            raise error
        work.record.interrupted(attempt, error.code)
        if work.is_suspect and len(work.strikes) > 1:
            await self._judge(work)
        if isinstance(error, ShuttingDown) or (work.emitted and isinstance(error, CapacityError)):
            if not work.emitted and work.failures >= MAX_PAUSES:
                raise error
        else:
            self._charge(work, error)
        work.failures += 1
        await self._pause(work)
        work.record.again()

    async def _judge(self, work: Work) -> None:
        """Raises Quarantined, unless one of the engines turns out to live: then only its connection was lost."""
        give_up = min(work.deadline, self._clock() + self._settings.connect_timeout_s)
        while True:
            work.strikes = [ref for ref in work.strikes if not self._lives(ref)]
            if len(work.strikes) < 2:
                return
            left = give_up - self._clock()
            if left <= 0 or all(self._view.session(ref) is None for ref in work.strikes):
                self._metrics.counters["quarantined"].labels(work.call.model).inc()
                raise self.quarantine.add(work.call)
            await self._view.wait_change(left)

    def _lives(self, ref: EngineRef) -> bool:
        session = self._view.session(ref)
        return session is not None and session.is_ready

    def _charge(self, work: Work, error: DiptychError) -> None:
        """Raises `error` when nobody pays for another attempt."""
        is_last = self.is_last(work)
        if work.emitted:
            work.moves += 1
        else:
            work.tries += 1
        if is_last or (isinstance(error, CapacityError) and not self._has_other(work)):
            raise error
        if not self.budget.try_take(work.tenant):
            self._metrics.counters["retry_budget_refused"].labels(work.call.model, work.tenant).inc()
            raise error
        if not work.emitted:
            self._metrics.counters["retries"].labels(work.call.model, error.code).inc()

    def _has_other(self, work: Work) -> bool:
        """Asking the same full engine again at once only adds load."""
        live = self._view.live(work.call.model, Role.DECODE)
        return any(engine.ref not in work.avoid for engine in live)

    async def _pause(self, work: Work) -> None:
        if work.failures == 1:
            return
        pause = min(_PAUSE_S * 2 ** (work.failures - 2), _LONGEST_PAUSE_S)
        pause *= 1 + _JITTER * (2 * self._rng.random() - 1)
        left = work.deadline - self._clock()
        await asyncio.sleep(max(min(pause, left), 0))
        if pause >= left:
            raise DeadlineExceeded("the request's deadline passed while its engines were replaced")
