"""What each kind of failure means for the attempts after it, as data; and how many of them all requests may cause.

The table is read by course.py and breaker.py, and printed in README.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from diptych.protos.failures import FailureKind

WINDOW_S = 10.0
_KIND = FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Consequence:
    """Of one failure.

    same     whether the target may be tried again: no, once, as often as the route's `retries` let (yes), or when the
             time that it asked for has passed and the deadline has not (later)
    others   which targets may be tried: none, those of the route and of `fallback` (general), or those of one fallback
    weight   how many failures it counts for in the breaker's window
    opens    what opens the breaker at once, and for how long
    """

    same: Literal["no", "once", "yes", "later"] = "no"
    others: Literal["no", "general", "context", "content_policy"] = "no"
    weight: int = 0
    opens: Literal["", "until_key", "not_found", "quota", "cooldown"] = ""


CONSEQUENCES: Mapping[FailureKind, Consequence] = {
    _KIND.BAD_REQUEST: Consequence(),
    _KIND.UNSUPPORTED: Consequence(others="general"),
    _KIND.CONTEXT_LENGTH: Consequence(others="context"),
    _KIND.CONTENT_POLICY: Consequence(others="content_policy"),
    _KIND.AUTH: Consequence(others="general", opens="until_key"),
    _KIND.NOT_FOUND: Consequence(others="general", opens="not_found"),
    _KIND.RATE_LIMITED: Consequence(same="later", others="general", opens="cooldown"),
    _KIND.QUOTA: Consequence(others="general", opens="quota"),
    _KIND.OVERLOADED: Consequence(same="once", others="general", weight=1),
    _KIND.SERVER: Consequence(same="yes", others="general", weight=1),
    _KIND.CONNECT: Consequence(same="once", others="general", weight=2),
    _KIND.FIRST_TOKEN_TIMEOUT: Consequence(others="general", weight=1),
    _KIND.IDLE_TIMEOUT: Consequence(others="general", weight=1),
    _KIND.TOTAL_TIMEOUT: Consequence(),
    _KIND.CANCELLED: Consequence(),
}


class RetryBudget:
    """Of one gateway: further attempts at what is failing, per request of the last 10 seconds.

    A target that went down has its requests moved to others at no charge; where those fail too, every request would
    be sent several times, and this is what ends that.
    """

    def __init__(self, *, fraction: float, floor: int, clock: Callable[[], float]) -> None:
        self._fraction = fraction
        self._floor = floor
        self._clock = clock
        self._requests = SlidingCount(WINDOW_S)
        self._spent = SlidingCount(WINDOW_S)

    def admitted(self) -> None:
        """A request came."""
        self._requests.add(self._clock())

    def try_take(self) -> bool:
        """One further attempt; False: it would be one too many, and the failure is the answer."""
        now = self._clock()
        if self._spent.total(now) + 1 > self.allowance(now):
            return False
        self._spent.add(now)
        return True

    def allowance(self, now: float) -> float:
        """Of the present 10 seconds."""
        return max(self._floor, self._fraction * self._requests.total(now))


class SlidingCount:
    """How often something happened in the last `window_s`, in steps of a tenth of it."""

    def __init__(self, window_s: float) -> None:
        self._step_s = window_s / 10
        self._steps: deque[list[int]] = deque()  # [step, count]
        self._total = 0

    def add(self, now: float, count: int = 1) -> None:
        """It happened."""
        step = int(now / self._step_s)
        if self._steps and self._steps[-1][0] == step:
            self._steps[-1][1] += count
        else:
            self._steps.append([step, count])
        self._total += count

    def total(self, now: float) -> int:
        """The count."""
        oldest = int(now / self._step_s) - 10
        while self._steps and self._steps[0][0] <= oldest:
            self._total -= self._steps.popleft()[1]
        return self._total

    def clear(self) -> None:
        """As if it had never happened."""
        self._steps.clear()
        self._total = 0
