"""Which target a request goes to next, after which failures: the table of retries.py, strategies, breakers and bounds
put together. One Course per request, used by exchange.py alone; it sends nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from diptych.protos.errors import CapacityError, Overloaded
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest

from .breaker import Breaker, Pass
from .record import Cause, ExchangeRecord
from .retries import CONSEQUENCES, Consequence, RetryBudget
from .routes import Chain, Group, Ways
from .settings import BreakerSettings
from .strategies import Asked, Member
from .target import Target

BACKOFF_S = 0.1  # before the first try at the same target; doubled each time, and half of it more or less by chance
MAX_BACKOFF_S = 2.0
MAX_BREAKERS = 8192  # far beyond any configuration; clients may name targets themselves
_LONGEST_RETRY_AFTER_S = 60.0  # told to clients where nobody knows better


class Breakers:
    """Of all targets, each with its present key. `configured`: those that stay known however many others are named."""

    def __init__(
        self, settings: BreakerSettings, clock: Callable[[], float], configured: Set[str] = frozenset()
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._configured = configured
        self._breakers: dict[str, tuple[str, Breaker]] = {}

    def of(self, target: Target) -> Breaker:
        """The target's; a new one when its key is another than before."""
        known = self._breakers.get(target.name)
        if known is not None and known[1].state == "closed":
            return known[1]  # whatever key it has: nothing is held against it
        key_id = target.key_id
        if known is not None and known[0] == key_id:
            return known[1]
        breaker = Breaker(self._settings, self._clock)
        if known is not None:
            breaker.changed_at = self._clock()  # what others found out before then, they did with the old key
        if len(self._breakers) >= MAX_BREAKERS and target.name not in self._breakers:
            others = (name for name in self._breakers if name not in self._configured)
            del self._breakers[next(others, None) or next(iter(self._breakers))]
        self._breakers[target.name] = (key_id, breaker)
        return breaker

    @property
    def now(self) -> float:
        """On their clock."""
        return self._clock()

    def known(self, target: str) -> Breaker | None:
        """By name; None where it was never used."""
        found = self._breakers.get(target)
        return None if found is None else found[1]

    def states(self) -> Mapping[str, str]:
        """Of all targets that were used, by name."""
        return {name: breaker.state for name, (_, breaker) in self._breakers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all requests of a gateway share."""

    routes: Ways
    breakers: Breakers
    retries: RetryBudget
    clock: Callable[[], float]
    rng: random.Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One attempt to make. `passage` is to be used or closed."""

    group: Group
    member: Member
    cause: Cause
    passage: Pass


class Course:
    """Of one request, which first goes to `group`. `until` is when nothing can be tried any more, on the clock."""

    def __init__(
        self, shared: Shared, group: Group, request: ChatRequest, record: ExchangeRecord, *, session: str, until: float
    ) -> None:
        self._shared = shared
        self._asked = Asked(request=request, session=session, now=shared.clock())
        self._record = record
        self._groups = [group, *shared.routes.behind(group, "general")]
        self._origin = group
        self.until = until
        self._retries_left = group.settings.retries
        self._tries: dict[str, int] = {}
        self._barred: set[str] = set()
        self._begun: set[str] = set()  # began an answer that failed, and may send a bill for it
        self._entered: set[str] = set()
        self._visited = {group.name}
        self._last: FailureKind | None = None
        self._told: ProviderFailure | None = None  # what the client hears in the end
        self._is_over = False

    @property
    def has_content_policy_chain(self) -> bool:
        """Whether an answer that a filter took away may be asked for elsewhere."""
        return any(self._shared.routes.behind(group, "content_policy") for group in (self._groups[0], self._origin))

    def extend(self, until: float) -> None:
        """From now on attempts may begin until then."""
        self.until = until

    def has_others(self, step: Step) -> bool:
        """Whether another target could be tried at once, if this one failed."""
        return any(
            member.target.name != step.member.target.name
            and member.target.name not in self._tries
            and self._breaker(member).admits
            for group in self._groups
            for member in group.members
            if self._retries_left > 0 or group.name not in self._entered
        )

    def failed(self, step: Step, exc: ProviderFailure) -> None:
        """The attempt of `step` failed; what may follow is settled here."""
        failure = exc.failure
        consequence = CONSEQUENCES[failure.kind]
        name = step.member.target.name
        self._last = failure.kind
        if self._told is None or failure.kind is not FailureKind.UNSUPPORTED:
            self._told = exc
        if not self._may_repeat(consequence, failure, self._tries.get(name, 1)):
            self._barred.add(name)
        if self._had_begun(name):
            self._begun.add(name)
        if consequence.others == "no":
            self._is_over = True
        elif consequence.others != "general":
            self._turn_off(step.group, consequence.others)

    def _had_begun(self, name: str) -> bool:
        """Whether the last attempt at a target had an answer of a good status, whatever came in it."""
        last = next((entry for entry in reversed(self._record.attempts) if entry.target == name), None)
        return last is not None and last.http is not None and 200 <= last.http.status < 300

    def beside(self, step: Step) -> Step | None:
        """A second attempt beside the one of `step`, at another target of its group; None where there is none."""
        fresh = [m for m in step.group.members if m.target.name not in self._tries and not self._breaker(m).is_failing]
        return self._enter(step.group, fresh, "hedge") if fresh else None

    def take_back(self, step: Step) -> None:
        """The step of `beside` is not made after all: its target is as new as before."""
        step.passage.close()
        self._tries.pop(step.member.target.name, None)

    async def next(self, cause: Cause = "retry", only: Callable[[Target], bool] | None = None) -> Step:
        """The next attempt, of `cause` where it is not a first one or a fallback, at a target that
        `only` lets. Raises ProviderFailure, the last one, where there shall be no further attempt; CapacityError where
        none could be made at all.
        """
        while True:
            if self._is_over or (self._last is not None and self._left_s() <= 0):
                raise self._the_end()
            rounds: list[set[str]] = [self._begun, set()] if self._begun else [set()]
            for spared in rounds:
                for group in self._groups:
                    members = [m for m in self._candidates(group, only) if m.target.name not in spared]
                    if members and (step := await self._step(group, members, cause)) is not None:
                        return step
            await self._wait(only)

    def _candidates(self, group: Group, only: Callable[[Target], bool] | None) -> list[Member]:
        """Who may be tried in `group`, whether its breaker lets it or not."""
        if group.name in self._entered and self._retries_left <= 0 and not self._is_free:
            return []
        return [
            member
            for member in group.members
            if member.target.name not in self._barred and (only is None or only(member.target))
        ]

    @property
    def _is_free(self) -> bool:
        """Whether the last attempt sent nothing."""
        return self._last is FailureKind.UNSUPPORTED

    @property
    def _has_failed(self) -> bool:
        """Whether any attempt that sent something did."""
        return self._told is not None and self._told.failure.kind is not FailureKind.UNSUPPORTED

    async def _step(self, group: Group, members: list[Member], cause: Cause) -> Step | None:
        ready = []
        for member in members:
            if self._breaker(member).admits:
                ready.append(member)
            else:
                self._skip(member)
        fresh = [member for member in ready if member.target.name not in self._tries]
        if self._has_failed:
            fresh = [member for member in fresh if not self._breaker(member).is_failing] or fresh
        if chosen := fresh or ready:
            if self._last is not None and not self._is_free:
                self._pay(chosen, is_again=not fresh)
            if not fresh:
                await self._back_off(chosen)
            return self._enter(group, [m for m in chosen if self._breaker(m).admits], cause)
        return None

    def _enter(self, group: Group, members: list[Member], cause: Cause) -> Step | None:
        if not members:
            return None
        now = self._shared.clock()
        member = group.strategy.pick(members, Asked(request=self._asked.request, session=self._asked.session, now=now))
        passage = self._breaker(member).enter()
        if passage is None:
            return None
        name = member.target.name
        if self._last is None and not self._tries:
            cause = "first"
        elif cause == "retry" and group.name not in self._entered:
            cause = "fallback"
        if group.name in self._entered and cause != "hedge" and not self._is_free:
            self._retries_left -= 1
        self._entered.add(group.name)
        self._tries[name] = self._tries.get(name, 0) + 1
        return Step(group=group, member=member, cause=cause, passage=passage)

    def _pay(self, members: list[Member], *, is_again: bool) -> None:
        """Raises the last failure where too many requests are being tried again."""
        if not is_again and not all(self._breaker(member).is_failing for member in members):
            return
        if not self._shared.retries.try_take():
            self._record.words.append("not tried again: too many requests are, and the targets are failing")
            raise self._the_end()

    async def _back_off(self, members: list[Member]) -> None:
        if self._last is FailureKind.RATE_LIMITED:
            return  # the time that it asked for has passed
        tries = min(self._tries[member.target.name] for member in members)
        pause_s = min(BACKOFF_S * 2.0 ** (tries - 1), MAX_BACKOFF_S) * self._shared.rng.uniform(0.5, 1.5)
        if pause_s >= self._left_s():
            raise self._the_end()
        await asyncio.sleep(pause_s)

    async def _wait(self, only: Callable[[Target], bool] | None) -> None:
        """Until the first target of all may be open again. Raises where that is too late."""
        members = [member for group in self._groups for member in self._candidates(group, only)]
        if not members:
            raise self._the_end()
        closed = [self._breaker(member) for member in members]
        delay_s = min(breaker.opens_in_s for breaker in closed)
        if delay_s >= self._left_s():
            lasting = closed[0].lasting
            if self._told is None and lasting is not None and math.isinf(delay_s):
                raise ProviderFailure(lasting, members[0].target.name)
            raise self._the_end(delay_s)
        changes = [breaker.changed() for breaker in closed]
        await asyncio.wait(changes, timeout=max(delay_s, 0.001), return_when=asyncio.FIRST_COMPLETED)
        for change in changes:
            change.cancel()

    def _the_end(self, opens_in_s: float = math.inf) -> ProviderFailure | CapacityError:
        if self._told is not None:
            return self._told
        retry_after_s = min(max(opens_in_s, 1.0), _LONGEST_RETRY_AFTER_S)
        return Overloaded(
            f"no target of {self._origin.name} takes requests now, after failures of all of them; try again later",
            retry_after_s,
            detail="; ".join(f"{name}: {why}" for name, why in self._record.skipped.items()),
        )

    def _turn_off(self, group: Group, chain: Chain) -> None:
        """From general fallbacks to those of one kind."""
        found = self._shared.routes.behind(group, chain) or self._shared.routes.behind(self._origin, chain)
        self._groups = [other for other in found if other.name not in self._visited]
        self._visited |= {other.name for other in self._groups}
        self._is_over = not self._groups

    def _may_repeat(self, consequence: Consequence, failure: Failure, tries: int) -> bool:
        match consequence.same:
            case "no":
                return False
            case "once":
                return tries < 2
            case "yes":
                return True
            case "later":
                return failure.retry_after_s is not None and failure.retry_after_s < self._left_s()

    def _skip(self, member: Member) -> None:
        why = self._breaker(member).why
        if why is not None:
            self._record.skipped[member.target.name] = f"open after {why.value}"

    def _breaker(self, member: Member) -> Breaker:
        return self._shared.breakers.of(member.target)

    def _left_s(self) -> float:
        return self.until - self._shared.clock()
