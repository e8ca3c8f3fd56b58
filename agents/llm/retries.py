"""How often a call is tried, and what decides it: one owner for everything that may be tried again.

exchange.py and streams.py ask a Course after each failure; reasking.py makes the next request. A number of attempts
counts all requests of a call, the first included. It knows no messages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from diptych.protos.failures import FailureKind

from .attempts import Attempt
from .errors import BudgetExceeded, CallFailed, EmptyAnswer, InvalidOutput, ProviderError, Truncated, UsageError
from .usage import total

_LATE = frozenset({FailureKind.FIRST_TOKEN_TIMEOUT, FailureKind.IDLE_TIMEOUT, FailureKind.TOTAL_TIMEOUT})
_SAME = _LATE | {FailureKind.RATE_LIMITED, FailureKind.OVERLOADED, FailureKind.SERVER, FailureKind.CONNECT}
_NOWHERE = frozenset({FailureKind.BAD_REQUEST, FailureKind.CANCELLED})
_NOT_GONE_ON_WITH = frozenset({FailureKind.BAD_REQUEST, FailureKind.UNSUPPORTED})
MAX_RETRY_AFTER_S = 120.0  # who asks for a longer pause is left for another model, or given up
_CHANCE = random.SystemRandom()  # has no state, which forked processes would share
_CLOCK_S = 0.001  # a timer may ring this much before its time


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most of a call, over all its attempts; of an agent's run, over all its calls. None: no limit. A value that
    came counts, also where it went over. What a failed attempt used counts as far as it is known; a model without a
    price costs nothing here.
    """

    tokens: int | None = None
    dollars: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "dollars", "seconds"):
            most = getattr(self, name)
            if most is not None and (not _is_number(most) or not most > 0):
                raise UsageError(f"Budget: {name} is a number above 0, or None for no limit, not {most!r}", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """attempts   the most requests of one call to one model, the first included
    fallback   models that are asked in turn when one cannot answer; each has `attempts` of its own, and begins with
               the call's own messages
    repair     on own clusters: a field that is wrong is generated anew, what stands before it is kept
    longer     an answer that was cut off at `max_tokens` gets as many once more: on own clusters it goes on where it
               stands, elsewhere it is asked for anew with twice as many
    base_s, most_s   the pause before attempt n of the same: between half of and all of base_s * 2 ** (n - 2), at most
               most_s; where a target says Retry-After, that long and up to half of base_s more
    """

    attempts: int = 3
    fallback: Sequence[str] = ()
    repair: bool = True
    longer: bool = True
    base_s: float = 0.5
    most_s: float = 30.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise UsageError(
                f"Retries: attempts counts the first one, too: a whole number, at least 1, not {self.attempts!r}",
                "attempts",
            )
        if isinstance(self.fallback, str):
            raise UsageError(f"Retries: fallback is a list of models: [{self.fallback!r}]", "fallback")
        if not isinstance(self.fallback, Sequence) or not all(isinstance(model, str) for model in self.fallback):
            raise UsageError(
                f"Retries: fallback is a list of models, PREFIX/MODEL each, not {self.fallback!r}", "fallback"
            )
        for name in ("base_s", "most_s"):
            seconds = getattr(self, name)
            if not _is_number(seconds) or not 0 <= seconds < math.inf:
                raise UsageError(f"Retries: {name} is a number of seconds, at least 0, not {seconds!r}", name)


Why = Literal["retry", "reask", "repair", "longer", "fallback"]


@dataclass(frozen=True, slots=True)
class Next:
    """What is tried next: why, at which model, after how many seconds. `begun`: the text that the answer goes on from;
    empty: it begins anew.
    """

    why: Why
    model: str
    pause_s: float = 0.0
    begun: str = ""


@dataclass(slots=True)
class Course:
    """Of one call: its attempts so far, and what comes after a failure. `now` is a monotonic clock's. `left_out` tells
    of fallbacks that cannot be asked such a thing.
    """

    retries: Retries
    budget: Budget | None
    model: str
    began_at: float
    chance: random.Random = _CHANCE
    attempts: list[Attempt] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _here: int = 0  # attempts at the present model
    _asked: set[str] = field(default_factory=set)  # models that had their turn
    _was_longer: bool = False
    _begun: str = ""  # from where the last answer can be gone on with
    _went_on: Why | None = None  # what the last attempt was for, where it went on from a beginning
    _goes_on: bool = True  # the present model can

    def add(self, attempt: Attempt, begun: str = "") -> None:
        """An attempt is over; `begun` is the part of its answer that another can go on from."""
        self.attempts.append(attempt)
        self._asked.add(self.model)
        self._here += 1
        self._begun = begun if self._goes_on else ""

    def after(self, error: CallFailed, now: float) -> Next:
        """What follows the last attempt's `error`. Raises it, with all attempts, where nothing does; BudgetExceeded
        where something would and may not.
        """
        if isinstance(error, ProviderError) and error.failure.kind in _LATE and self.is_late(now + _CLOCK_S):
            raise self._exceeded("seconds", now - self.began_at, error) from error
        step = self._again(error)
        if step is None or self.is_late(now + step.pause_s):
            step = self._fallback(error) or step
        if step is None:
            raise self.failed(error)
        self._check_budget(error, now + step.pause_s)
        if step.why != "retry":  # which sends the same again
            self._went_on = step.why if step.begun else None
        return step

    def without(self, model: str, words: str) -> Next:
        """`model`, a fallback, cannot be asked: the next one. Raises the last attempt's error where there is none."""
        self.left_out.append(f"{model} was left out: {words}")
        error = self.attempts[-1].error
        assert error is not None
        step = self._fallback(error)
        if step is None:
            raise self.failed(error)
        return step

    def failed(self, error: CallFailed) -> CallFailed:
        """`error`, with the history of the call."""
        error.attempts, error.left_out = tuple(self.attempts), tuple(self.left_out)
        return error

    def left_s(self, now: float) -> float | None:
        """Of the budget's seconds; None: there is no limit."""
        if self.budget is None or self.budget.seconds is None:
            return None
        return self.began_at + self.budget.seconds - now

    def is_late(self, at: float) -> bool:
        """Whether the budget's time is over then."""
        left_s = self.left_s(at)
        return left_s is not None and left_s <= 0

    def out_of_time(self, now: float) -> BudgetExceeded:
        """The error of a call whose time ended while it waited for its turn."""
        return self._exceeded("seconds", now - self.began_at, self.attempts[-1].error if self.attempts else None)

    def _again(self, error: CallFailed) -> Next | None:
        """At the same model."""
        if self._here >= self.retries.attempts:
            return None
        kind = error.failure.kind if isinstance(error, ProviderError) else None
        if self._went_on is not None and kind in _NOT_GONE_ON_WITH:
            self._goes_on = False
            return Next("longer" if self._went_on == "longer" else "reask", self.model)
        if isinstance(error, InvalidOutput):
            if self._begun and self.retries.repair:
                return Next("repair", self.model, begun=self._begun)
            return Next("reask", self.model)
        if isinstance(error, Truncated) and self.retries.longer and not self._was_longer:
            self._was_longer = True
            return Next("longer", self.model, begun=self._begun)
        if isinstance(error, EmptyAnswer):
            return Next("retry", self.model, self._backoff())
        if kind in _SAME:
            assert isinstance(error, ProviderError)
            pause_s = self._pause(error.failure.retry_after_s)
            return None if pause_s is None else Next("retry", self.model, pause_s)
        return None

    def _fallback(self, error: CallFailed) -> Next | None:
        if isinstance(error, ProviderError) and error.failure.kind in _NOWHERE:
            return None
        for model in self.retries.fallback:
            if model not in self._asked:
                self._asked.add(model)
                self.model, self._here, self._was_longer, self._goes_on = model, 0, False, True
                return Next("fallback", model)
        return None

    def _pause(self, asked_s: float | None) -> float | None:
        if asked_s is None:
            return self._backoff()
        if asked_s > MAX_RETRY_AFTER_S:
            return None
        return max(asked_s, 0.0) + self.chance.random() * self.retries.base_s / 2

    def _backoff(self) -> float:
        most = min(self.retries.base_s * 2.0 ** min(self._here - 1, 60), self.retries.most_s)
        return most * (0.5 + self.chance.random() / 2)

    def _check_budget(self, error: CallFailed, at: float) -> None:
        budget = self.budget
        if budget is None:
            return
        if budget.tokens is not None:
            used = total(attempt.spent for attempt in self.attempts).tokens
            if used >= budget.tokens:
                raise self._exceeded("tokens", used, error) from error
        if budget.dollars is not None:
            dollars = float(sum(attempt.spent.dollars or 0 for attempt in self.attempts))
            if dollars >= budget.dollars:
                raise self._exceeded("dollars", dollars, error) from error
        if self.is_late(at):
            raise self._exceeded("seconds", at - self.began_at, error) from error

    def _exceeded(self, limit: str, used: float, error: CallFailed | None) -> BudgetExceeded:
        assert self.budget is not None
        last = "" if error is None else f"; the last error: {error.message}"
        words = (
            f"the budget of {getattr(self.budget, limit):g} {limit} lets no further attempt "
            f"({used:.6g} used or due){last}"
        )
        exceeded = BudgetExceeded(words, limit, tuple(self.attempts))
        exceeded.left_out = tuple(self.left_out)
        return exceeded
