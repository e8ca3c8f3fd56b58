"""How fast requests may come: buckets of requests and of tokens, and requests in work, for each account of each limit.

ledger.py admits and settles with it. Each router keeps its part by itself, the limit divided by the routers that live.
Tokens are taken by what a request may have, and put right when it is known what it had.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from diptych.protos.errors import RateLimited

from .money_settings import LimitSettings
from .shared_state import Demand

Kind = Literal["requests", "input-tokens", "output-tokens"]
MAX_METERS: Final = 65_536
FIRST_DURATION_S: Final = 1.0  # of a request, until one was seen
_WEIGHT: Final = 0.2  # of the last request in the mean of durations
_DEMAND_WEIGHT: Final = 0.3  # of the last second or so in the mean of demands
_LEAST_DEMAND: Final = 0.01  # a second; less is none
_EQUAL: Final = 0.5  # of a limit is divided equally among the routers
_WORDS: Final[Mapping[Kind, str]] = {
    "requests": "requests",
    "input-tokens": "tokens of prompts",
    "output-tokens": "tokens of answers",
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of one limit at this router: for the headers x-ratelimit-*-KIND."""

    kind: Kind
    limit: int
    remaining: int
    reset_s: float  # until it is whole again, if nobody asks


class LimitReached(RateLimited):
    """A limit of requests or tokens."""

    def __init__(
        self, message: str, retry_after_s: float, detail: str = "", allowances: tuple[Allowance, ...] = ()
    ) -> None:
        RateLimited.__init__(self, message, retry_after_s, detail)
        self.args = (message, retry_after_s, detail, allowances)
        self.allowances = allowances


class Bucket:
    """A minute fills it. Times in seconds of the caller's clock."""

    __slots__ = ("_at", "_level", "_per_s", "capacity", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute  # of all routers
        self.capacity = self._level = float(per_minute)
        self._per_s = per_minute / 60.0
        self._at = now

    def share(self, num_routers: float, now: float) -> None:
        """This router's part, if they all had an equal one. What was used stays used."""
        capacity = max(self.per_minute / num_routers, 1.0)
        if capacity != self.capacity:
            self._level = self.level(now) * capacity / self.capacity
            self.capacity, self._per_s = capacity, capacity / 60.0

    def level(self, now: float) -> float:
        """What may be taken now; below 0 where requests had more than they seemed to have."""
        self._level = min(self._level + (now - self._at) * self._per_s, self.capacity)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Less than 0 gives back."""
        self._level = min(self.level(now) - amount, self.capacity)

    def wait_s(self, amount: float, now: float) -> float:
        """Until so much is there; 0 where it is. More than it holds is there when it is full."""
        lacking = min(amount, self.capacity) - self.level(now)
        return 0.0 if lacking <= 1e-9 else lacking / self._per_s

    def full_in_s(self, now: float) -> float:
        """Until it is full if nobody asks."""
        return (self.capacity - self.level(now)) / self._per_s


class _Meter:
    """Of one account of one limit."""

    __slots__ = ("asked", "buckets", "concurrency", "demand", "mean_s", "name", "part", "running", "settings")

    def __init__(self, name: str, settings: LimitSettings, now: float) -> None:
        per_minute: Mapping[Kind, int | None] = {
            "requests": settings.requests_per_minute,
            "input-tokens": settings.input_tokens_per_minute,
            "output-tokens": settings.output_tokens_per_minute,
        }
        self.name = name
        self.settings = settings
        self.buckets: dict[Kind, Bucket] = {
            kind: Bucket(number, now) for kind, number in per_minute.items() if number is not None
        }
        self.concurrency = settings.concurrency
        self.running = 0
        self.mean_s = FIRST_DURATION_S
        self.asked = 0  # since the demand was told
        self.demand = 0.0  # requests a second
        self.part: float | None = None  # of the limit, by demand; None: an equal one

    def share(self, num_routers: int, now: float) -> None:
        shares = num_routers if self.part is None else 1.0 / self.part
        for bucket in self.buckets.values():
            bucket.share(shares, now)
        whole = self.settings.concurrency
        self.concurrency = None if whole is None else max(math.floor(whole / shares + 1e-9), 1)

    def refusal(self, wanted: Mapping[Kind, int], now: float) -> tuple[str, float] | None:
        if self.concurrency is not None and self.running >= self.concurrency:
            words = f"the limit {self.name} lets {self.settings.concurrency} requests be in work; wait until one ends"
            return words, self.mean_s / self.concurrency
        for kind, bucket in self.buckets.items():
            if (wait_s := bucket.wait_s(wanted[kind], now)) > 0:
                more = "" if kind == "requests" else f", and this request may have {wanted[kind]}"
                return f"the limit {self.name} is {bucket.per_minute} {_WORDS[kind]} a minute{more}", wait_s
        return None

    def allowances(self, now: float) -> list[Allowance]:
        return [
            Allowance(kind, bucket.per_minute, max(math.floor(bucket.level(now)), 0), bucket.full_in_s(now))
            for kind, bucket in self.buckets.items()
        ]

    def is_idle(self, now: float) -> bool:
        return not self.running and all(bucket.full_in_s(now) <= 0 for bucket in self.buckets.values())


class Visit:
    """A request that may go on: `leave` once it is over. `allowances`: of each kind the one with the least left."""

    def __init__(self, meters: Sequence[_Meter], wanted: Mapping[Kind, int], clock: Callable[[], float]) -> None:
        self._meters = meters
        self._wanted = wanted
        self._clock = clock
        self._began = now = clock()
        for meter in meters:
            meter.running += 1
            for kind, bucket in meter.buckets.items():
                bucket.take(wanted[kind], now)
        self.allowances = _least(meters, now)

    def leave(self, *, input_tokens: int, output_tokens: int) -> None:
        """Once; with what it had."""
        now = self._clock()
        for meter in self._meters:
            meter.mean_s += (now - self._began - meter.mean_s) * _WEIGHT
        self._put_right({"requests": 1, "input-tokens": input_tokens, "output-tokens": output_tokens}, now)

    def withdraw(self) -> None:
        """Instead of `leave`: the request was refused by something else, and had nothing."""
        self._put_right({"requests": 0, "input-tokens": 0, "output-tokens": 0}, self._clock())

    def _put_right(self, had: Mapping[Kind, int], now: float) -> None:
        for meter in self._meters:
            meter.running -= 1
            for kind, bucket in meter.buckets.items():
                bucket.take(had[kind] - self._wanted[kind], now)


class Limits:
    """Of one router. `over` is told of each limit that refused, or would have, were it not a shadow."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, over: Callable[[str, bool], None] | None = None
    ) -> None:
        self._clock = clock
        self._over = over
        self._num_routers = 1
        self._told_at = clock()
        self._meters: OrderedDict[tuple[str, str], _Meter] = OrderedDict()

    def share(self, num_routers: int) -> None:
        """So many routers keep the limits together."""
        if num_routers != self._num_routers:
            self._num_routers = num_routers
            for meter in self._meters.values():
                meter.share(num_routers, self._clock())

    def demands(self) -> tuple[Demand, ...]:
        """Of the accounts that were asked for since the last time: how often."""
        now = self._clock()
        elapsed_s = max(now - self._told_at, 1e-3)
        self._told_at = now
        found = []
        for (name, scope), meter in self._meters.items():
            meter.demand += (meter.asked / elapsed_s - meter.demand) * _DEMAND_WEIGHT
            meter.asked = 0
            if meter.demand > _LEAST_DEMAND:
                found.append(Demand(limit=name, scope=scope, per_s=meter.demand))
        return tuple(found)

    def lean(self, others: Mapping[tuple[str, str], float] | None, num_others: int) -> None:
        """Divide each limit by what the routers are asked for, not equally: half of an equal part is everybody's, the
        rest goes by demand. None: nobody knows what the others are asked for, so that equal parts hold.
        """
        now = self._clock()
        for key, meter in self._meters.items():
            part = None
            if others is not None and num_others and (total := others.get(key, 0.0) + meter.demand) > 0:
                part = _EQUAL / (num_others + 1) + (1.0 - _EQUAL) * meter.demand / total
            meter.part = part
            meter.share(self._num_routers, now)

    def admit(self, rules: Sequence[tuple[str, LimitSettings, str]], *, input_tokens: int, output_tokens: int) -> Visit:
        """Under `rules`: name, limit, scope. Raises LimitReached, and takes nothing then."""
        now = self._clock()
        wanted: dict[Kind, int] = {"requests": 1, "input-tokens": input_tokens, "output-tokens": output_tokens}
        meters = [self._meter(name, limit, scope, now) for name, limit, scope in rules]
        for meter in meters:
            meter.asked += 1
        refusals = []
        for meter in meters:
            if (refusal := meter.refusal(wanted, now)) is None:
                continue
            if self._over is not None:
                self._over(meter.name, meter.settings.shadow)
            if not meter.settings.shadow:
                refusals.append(refusal)
        if refusals:
            words, wait_s = max(refusals, key=lambda refusal: refusal[1])
            raise LimitReached(f"{words}; try again later", wait_s, allowances=_least(meters, now))
        return Visit(meters, wanted, self._clock)

    def _meter(self, name: str, limit: LimitSettings, scope: str, now: float) -> _Meter:
        meter = self._meters.get((name, scope))
        if meter is None:
            meter = self._meters[name, scope] = _Meter(name, limit, now)
            meter.share(self._num_routers, now)
            if len(self._meters) > MAX_METERS:
                self._forget(now)
        self._meters.move_to_end((name, scope))
        return meter

    def _forget(self, now: float) -> None:
        found, oldest = next(iter(self._meters.items()))
        if oldest.is_idle(now):
            del self._meters[found]
        else:
            self._meters.move_to_end(found)


def _least(meters: Sequence[_Meter], now: float) -> tuple[Allowance, ...]:
    found: dict[Kind, Allowance] = {}
    for meter in meters:
        if meter.settings.shadow:
            continue
        for allowance in meter.allowances(now):
            known = found.get(allowance.kind)
            if known is None or allowance.remaining < known.remaining:
                found[allowance.kind] = allowance
    return tuple(found.values())
