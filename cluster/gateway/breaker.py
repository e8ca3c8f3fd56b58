"""Whether a target gets requests: closed, open for a while after failures, half open while one request finds out.

One breaker per target and key of it. attempt.py asks for a Pass and tells it what became of the attempt; course.py
looks at who is open. A breaker knows no other target and waits for nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Literal

from diptych.protos.failures import Failure, FailureKind

from .retries import CONSEQUENCES, SlidingCount
from .settings import BreakerSettings

MAX_RETRY_AFTER_S = 3600.0  # what a provider asks for beyond it is taken for a mistake
State = Literal["closed", "open", "half_open"]


class Pass:
    """The right to one attempt, and the duty to tell how it went; `close` where nothing can be said of the target."""

    def __init__(self, breaker: Breaker, *, is_probe: bool, life: int) -> None:
        self.is_probe = is_probe
        self._breaker = breaker
        self._life = life
        self._is_told = False

    def began(self) -> None:
        """The target's answer has begun: a probe has found out enough."""
        if self.is_probe:
            self._breaker._probe_answered(self._life)

    def answered(self) -> None:
        """It was answered to its end."""
        if not self._is_told:
            self._is_told = True
            self.began()
            self._breaker._answered(self._life)

    def failed(self, failure: Failure) -> None:
        """It failed."""
        if not self._is_told:
            self._is_told = True
            self._breaker._failed(failure, self._life, is_probe=self.is_probe)

    def close(self) -> None:
        """It was given up, which says nothing of the target. Idempotent, and nothing after one of the others."""
        if not self._is_told:
            self._is_told = True
            self._breaker._dropped(self._life, is_probe=self.is_probe)


class Breaker:
    """Of one target with one key."""

    def __init__(self, settings: BreakerSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._requests = SlidingCount(settings.window_s)
        self._failures = SlidingCount(settings.window_s)
        self._until: float | None = None  # closed
        self._why: FailureKind | None = None
        self._failure: Failure | None = None
        self._is_probing = False
        self._times_opened = 0  # in a row
        self.changed_at: float | None = None  # when it was opened or closed last
        self.found_at: float | None = None  # the same, where it was an attempt here that did it
        self._life = 0  # counts changes between closed and open: an attempt of an earlier one changes nothing
        self._watchers: list[asyncio.Future[None]] = []

    @property
    def state(self) -> State:
        """Now."""
        if self._until is None:
            return "closed"
        return "half_open" if self._is_probing else "open"

    @property
    def why(self) -> FailureKind | None:
        """What opened it; None while it is closed."""
        return None if self._until is None else self._why

    @property
    def lasting(self) -> Failure | None:
        """What waiting does not end, as it was told here: a key that is missing or refused."""
        return self._failure if self._until is not None and math.isinf(self._until) else None

    @property
    def admits(self) -> bool:
        """Whether `enter` would give a Pass."""
        return self._until is None or (not self._is_probing and self._clock() >= self._until)

    @property
    def opens_in_s(self) -> float:
        """Until it may admit somebody: 0 where it does; infinite where a new key is needed. While a probe is under way
        nobody knows, and it is what the probe's failure would make of it.
        """
        if self._until is None or self.admits:
            return 0.0
        if self._is_probing:
            return self._next_open_s()
        return max(self._until - self._clock(), 0.0)

    @property
    def is_failing(self) -> bool:
        """Whether it is not closed, or as many recent requests failed as would open it."""
        if self._until is not None:
            return True
        now = self._clock()
        failures = self._failures.total(now)
        return failures > 1 and failures >= self._settings.failures * self._requests.total(now)

    def enter(self) -> Pass | None:
        """The right to an attempt; the first one after it was open is a probe. None where it admits nobody."""
        if not self.admits:
            return None
        is_probe = self._until is not None
        if is_probe:
            self._is_probing = True
        return Pass(self, is_probe=is_probe, life=self._life)

    def adopt_opening(self, why: FailureKind, until: float, changed_at: float) -> None:
        """Another router's was opened at `changed_at`, until then, both on this clock. A probe here goes on."""
        if self._is_probing or (self._until is not None and until <= self._until):
            return
        self._why = why
        self._until = until
        self._times_opened += 1
        self._turn(changed_at)

    def adopt_closing(self, changed_at: float) -> None:
        """Another router's was closed then: the target answers again. Nothing where a new key is needed."""
        if self._until is not None and math.isfinite(self._until):
            self._clear()
            self._turn(changed_at)

    def changed(self) -> asyncio.Future[None]:
        """Done with the next change; for who waits for a probe of another request."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers = [old for old in self._watchers if not old.done()]
        self._watchers.append(watcher)
        return watcher

    def _probe_answered(self, life: int) -> None:
        if life == self._life and self._is_probing:
            self._close()

    def _answered(self, life: int) -> None:
        if life == self._life or self._until is None:
            self._requests.add(self._clock())

    def _failed(self, failure: Failure, life: int, *, is_probe: bool) -> None:
        consequence = CONSEQUENCES[failure.kind]
        now = self._clock()
        if is_probe and life == self._life and self._is_probing:
            if consequence.weight or consequence.opens:
                self._open(failure)
            else:  # it answered, if only that the request is wrong
                self._close()
            return
        if self._until is not None:
            return  # an attempt from before: what it says is known
        count = max(consequence.weight, 1)
        self._requests.add(now, count)
        if consequence.opens:
            self._open(failure)
        elif consequence.weight:
            self._failures.add(now, count)
            requests, failures = self._requests.total(now), self._failures.total(now)
            if requests >= self._settings.min_requests and failures >= self._settings.failures * requests:
                self._open(failure)

    def _dropped(self, life: int, *, is_probe: bool) -> None:
        if is_probe and life == self._life and self._is_probing:
            self._is_probing = False
            self._tell()

    def _open(self, failure: Failure) -> None:
        self._why, self._failure = failure.kind, failure
        self._until = self._clock() + self._duration_s(failure)
        self._times_opened += 1
        self._turn()

    def _close(self) -> None:
        self._clear()
        self._turn()

    def _clear(self) -> None:
        self._until = None
        self._times_opened = 0
        self._requests.clear()
        self._failures.clear()

    def _turn(self, adopted_at: float | None = None) -> None:
        self.found_at = self._clock() if adopted_at is None else None
        self.changed_at = self.found_at if adopted_at is None else adopted_at
        self._is_probing = False
        self._life += 1
        self._tell()

    def _tell(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _next_open_s(self) -> float:
        return min(self._settings.open_s * 2.0 ** min(self._times_opened, 16), self._settings.max_open_s)

    def _duration_s(self, failure: Failure) -> float:
        settings = self._settings
        match CONSEQUENCES[failure.kind].opens:
            case "until_key":
                return math.inf
            case "not_found":
                return settings.not_found_s
            case "quota":
                return settings.quota_s
            case "cooldown":
                if failure.retry_after_s is not None:
                    return min(max(failure.retry_after_s, 0.001), MAX_RETRY_AFTER_S)
                return min(settings.cooldown_s * 2.0 ** min(self._times_opened, 16), settings.max_open_s)
            case "":
                return self._next_open_s()
