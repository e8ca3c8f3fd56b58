"""What follows a failed attempt: another one, at once or after a pause, or the failure as the answer.

Before the first token it is a retry, after it a move: the next engines go on behind the tokens that the client has.
Each costs a piece of the tenant's retry budget. Towards the limits count deaths that the directory confirms, and what
neither a lost engine nor a step that raised explains; an engine that was only silent counts for nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from diptych.cluster.config import RouterSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    Disagreement,
    ShuttingDown,
    TransferError,
)
from diptych.protos.types import EngineRef, GenerateRequest, Role

from .attempt import Attempt
from .budget import RetryBudget
from .call import GenerateCall
from .gate import MAX_STRIKES, Gate, Quarantine, Seat, Suspects
from .incident import Incident, Strike
from .placement import Ask
from .record import CallRecord
from .registry import TrackedRequest
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
    tracked: TrackedRequest
    deadline: float
    tenant: str  # as it is counted
    emitted: list[int] = field(default_factory=list)  # given to the client
    avoid: set[EngineRef] = field(default_factory=set)  # lives of engines that failed it
    tries: list[Incident | None] = field(default_factory=list)  # failures without a token to the client, but refusals
    moves: list[Incident | None] = field(default_factory=list)  # and those with one
    failures: int = 0  # since the last token, refusals included
    strikes: list[Strike] = field(default_factory=list)  # incidents since the last proof of its innocence
    last: Strike | None = None  # of the last attempt
    is_unproven: bool = False  # placed, and its decode engine made no token yet

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
        work.failures = 0
        if not work.is_unproven:
            return
        prefill = attempt.placement.prefill
        if attempt.is_proven:
            work.strikes.clear()
            self.closed(work, attempt)
        elif prefill is not None:
            work.strikes = [strike for strike in work.strikes if strike.role is not Role.PREFILL]
            self._suspects.cleared(work.name, [prefill])

    def failed(self, work: Work, attempt: Attempt) -> None:
        """It has failed: note what struck it, and in whose company. Before `closed`."""
        work.last = attempt.strike()
        if work.last is not None and not work.last.incident.nobody_died:
            work.last = replace(work.last, is_alone=self._suspects.is_alone(work.name, work.last.incident))
            work.strikes.append(work.last)

    def closed(self, work: Work, attempt: Attempt) -> None:
        """It is over, or its innocence is proven: what happens to its engines now is not its doing."""
        if work.is_unproven:
            work.is_unproven = False
            self._suspects.cleared(work.name, attempt.engines)

    def is_last(self, work: Work) -> bool:
        """Whether another failure could be the answer, as far as is known now."""
        failures, limit = self._counted(work)
        return 1 + self._num_counted(failures) > limit

    async def prepare(self, work: Work, attempt: Attempt, error: DiptychError) -> None:
        """Returns when the next attempt may be made, after `attempt` failed with `error`.

        Raises `error` when there is none, Quarantined when engines fail over the request, DeadlineExceeded.
        """
        work.avoid |= attempt.failed_engines()
        if isinstance(error, Disagreement):
            self._metrics.counters["disagreements"].labels(work.call.model).inc()
        if not error.retryable:
            raise error
        work.record.interrupted(attempt, error.code)
        if len(work.strikes) > 1 and work.last is work.strikes[-1]:
            await self._judge(work)
        if isinstance(error, ShuttingDown) or (work.emitted and isinstance(error, CapacityError)):
            if not work.emitted and work.failures >= MAX_PAUSES:
                raise error
        else:
            await self._charge(work, error)
        work.failures += 1
        await self._pause(work)
        work.record.again()

    async def _judge(self, work: Work) -> None:
        """Raises Quarantined after two incidents that happened beyond doubt if nobody else can have caused the last,
        nor any step that raised; after three in company. A loss is beyond doubt when the directory confirms that the
        engine is dead: silence convicts nobody.
        """
        is_alone = work.strikes[-1].is_alone
        if not is_alone and len(work.strikes) < MAX_STRIKES:
            return
        await self._find_out(work, [strike.incident for strike in work.strikes])
        work.strikes = [strike for strike in work.strikes if self._is_strike(strike) is not False]
        proven = [strike for strike in work.strikes if self._is_strike(strike)]
        # A step that raises costs its company little: another try tells more than a guess. A life ends once only.
        is_alone = bool(proven) and proven[-1].is_alone and all(one.is_alone or one.incident.is_loss for one in proven)
        count = len({one.incident.engine if one.incident.is_loss else one.incident for one in proven})
        if count >= (2 if is_alone else MAX_STRIKES):
            self._metrics.counters["quarantined"].labels(work.call.model).inc()
            raise self.quarantine.add(work.call)

    def _is_strike(self, strike: Strike) -> bool | None:
        return self._view.has_died(strike.incident) if strike.incident.is_loss else True

    async def _find_out(self, work: Work, incidents: list[Incident]) -> None:
        """Wait until the directory has said of each lost engine that it is dead, or its stream came back; not for ever:
        the directory may be away.
        """
        give_up = min(work.deadline, self._clock() + self._settings.connect_timeout_s)
        while any(one.is_loss and self._view.has_died(one) is None for one in incidents):
            left = give_up - self._clock()
            if left <= 0 or self._view.is_stopped:
                return
            await self._view.wait_change(left)

    def _counted(self, work: Work) -> tuple[list[Incident | None], int]:
        """The failures that a limit is for, and how many of them there may be."""
        if work.emitted:
            return work.moves, self._settings.migration_limit
        return work.tries, self._settings.max_attempts - 1

    def _num_counted(self, failures: list[Incident | None], *, unknown: bool = False) -> int:
        """Those that a limit counts; with `unknown` also losses of which nobody knows yet. A life ends once only,
        however often it was silent before.
        """
        verdicts = [(one.engine, self._view.has_died(one)) for one in failures if one is not None]
        dead = {engine for engine, has_died in verdicts if has_died or (unknown and has_died is None)}
        return failures.count(None) + len(dead)

    async def _charge(self, work: Work, error: DiptychError) -> None:
        """Raises `error` when nobody pays for another attempt."""
        failures, limit = self._counted(work)
        # Who has a strike was given no fallback: that the transfer failed is no failure of its own.
        if not (work.strikes and isinstance(error, TransferError)):
            failures.append(work.last.incident if work.last is not None else None)
        if not limit or (isinstance(error, CapacityError) and not self._has_other(work)):
            raise error
        if self._num_counted(failures, unknown=True) > limit:
            await self._find_out(work, [one for one in failures if one is not None])
            if self._num_counted(failures) > limit:
                raise error
        if not self.budget.try_take(work.call.tenant):
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
