"""How often and how much at once a key, a tenant or an address may ask: token buckets and counts of this process.

Asked by access.py before a request's body is read. Each router replica counts for itself. Knows no keys' secrets.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.cluster.config import TenantSettings
from diptych.cluster.keys import Key
from diptych.protos.errors import RateLimited

if TYPE_CHECKING:
    from diptych.cluster.gateway.limits import Allowance

FAILED_ATTEMPTS_PER_MINUTE = 100  # of one address, with keys that open nothing
MAX_ADDRESSES = 4096  # remembered; the one that failed longest ago is forgotten first
MAX_METERS = 16_384  # keys and tenants remembered; idle ones with a full bucket are forgotten first
FIRST_DURATION_S = 1.0  # of a request, until one was seen
_WEIGHT = 0.2  # of the last request in the mean of durations
Headers = list[tuple[bytes, bytes]]
_OF_REQUESTS = re.compile(rb"x-ratelimit-[a-z]+-requests")
_REMAINING = b"x-ratelimit-remaining-requests"


class Bucket:
    """`per_minute` at once, and refilled so fast that a minute fills it. Times in seconds of the caller's clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Requests that may come now."""
        self._level = min(self._level + (now - self._at) * self.per_minute / 60.0, float(self.per_minute))
        self._at = now
        return self._level

    def take(self, now: float) -> None:
        """One; the caller has seen that there is one."""
        self._level = self.level(now) - 1.0

    def wait_s(self, now: float) -> float:
        """Until there is one; 0 where there is."""
        return max(1.0 - self.level(now), 0.0) * 60.0 / self.per_minute

    def full_in_s(self, now: float) -> float:
        """Until it is full again if nobody asks."""
        return (self.per_minute - self.level(now)) * 60.0 / self.per_minute


@dataclass(slots=True)
class _Meter:
    """One key's or one tenant's. `what` for the message."""

    what: str
    concurrency: int | None
    bucket: Bucket | None
    running: int = 0
    mean_s: float = FIRST_DURATION_S  # of its requests

    def refusal(self, now: float) -> RateLimited | None:
        if self.concurrency is not None and self.running >= self.concurrency:
            return RateLimited(
                f"{self.what} has {self.running} requests in work, and that is its limit; wait until one of them ends",
                self.mean_s / self.concurrency,
            )
        if self.bucket is not None and (wait_s := self.bucket.wait_s(now)) > 0:
            return RateLimited(
                f"{self.what} may make {self.bucket.per_minute} requests a minute and has made them; the next may come "
                f"in {duration(wait_s)}",
                wait_s,
            )
        return None

    def is_idle(self, now: float) -> bool:
        return not self.running and (self.bucket is None or self.bucket.full_in_s(now) == 0)


class Visit:
    """A request that may go on: `leave` once it is over. `headers` tell what is left, for its answer."""

    def __init__(self, meters: list[_Meter], clock: Callable[[], float]) -> None:
        self._meters = meters
        self._clock = clock
        self._began = clock()
        for meter in meters:
            meter.running += 1
            if meter.bucket is not None:
                meter.bucket.take(self._began)
        self.headers = headers_of(meters, self._began)

    def leave(self) -> None:
        """Once."""
        lasted_s = self._clock() - self._began
        for meter in self._meters:
            meter.running -= 1
            meter.mean_s += (lasted_s - meter.mean_s) * _WEIGHT


class Limiter:
    """For one event loop. `tenants`: those with limits of their own, beside their keys'."""

    def __init__(self, tenants: Mapping[str, TenantSettings], clock: Callable[[], float] = time.monotonic) -> None:
        self._tenants = tenants
        self._clock = clock
        self._meters: OrderedDict[tuple[str, str], _Meter] = OrderedDict()
        self._failed: OrderedDict[str, Bucket] = OrderedDict()

    def admit(self, key: Key | None, tenant: str) -> tuple[Visit | None, RateLimited | None, Headers]:
        """A visit, None where nothing limits the request; or why it may not come. The headers are of either answer."""
        meters = []
        if key is not None and (key.requests_per_minute or key.concurrency):
            meters.append(self._meter("key", key.id, "this key", key.requests_per_minute, key.concurrency))
        of = self._tenants.get(tenant)
        if of is not None and (of.requests_per_minute or of.concurrency):
            meters.append(self._meter("tenant", tenant, "this tenant", of.requests_per_minute, of.concurrency))
        if not meters:
            return None, None, []
        now = self._clock()
        refusals = [refusal for meter in meters if (refusal := meter.refusal(now)) is not None]
        if refusals:
            return None, max(refusals, key=lambda refusal: refusal.retry_after_s), headers_of(meters, now)
        visit = Visit(meters, self._clock)
        return visit, None, visit.headers

    def failed(self, address: str) -> RateLimited | None:
        """Note an attempt with a key that opens nothing; what to answer instead of 401 where there were too many."""
        now, who = self._clock(), _neighbourhood(address)
        bucket = self._failed.pop(who, None) or Bucket(FAILED_ATTEMPTS_PER_MINUTE, now)
        self._failed[who] = bucket
        if len(self._failed) > MAX_ADDRESSES:
            self._failed.popitem(last=False)
        if (wait_s := bucket.wait_s(now)) > 0:
            return RateLimited("too many requests with keys that open nothing came from this address", wait_s)
        bucket.take(now)
        return None

    def _meter(self, kind: str, name: str, what: str, per_minute: int | None, concurrency: int | None) -> _Meter:
        now = self._clock()
        meter = self._meters.get((kind, name))
        if meter is None:
            meter = _Meter(what, concurrency, None)
            self._meters[kind, name] = meter
            self._forget(now)
        self._meters.move_to_end((kind, name))
        meter.concurrency = concurrency
        if (meter.bucket.per_minute if meter.bucket is not None else None) != per_minute:  # its line was changed
            meter.bucket = None if per_minute is None else Bucket(per_minute, now)
        return meter

    def _forget(self, now: float) -> None:
        if len(self._meters) > MAX_METERS:
            oldest = next(iter(self._meters))
            if self._meters[oldest].is_idle(now):
                del self._meters[oldest]
            else:
                self._meters.move_to_end(oldest)


def headers_of(meters: list[_Meter], now: float) -> Headers:
    """OpenAI's, of the bucket with the least in it; none where only concurrency is limited."""
    buckets = [meter.bucket for meter in meters if meter.bucket is not None]
    if not buckets:
        return []
    bucket = min(buckets, key=lambda bucket: bucket.level(now))
    return [
        (b"x-ratelimit-limit-requests", str(bucket.per_minute).encode()),
        (b"x-ratelimit-remaining-requests", str(math.floor(bucket.level(now))).encode()),
        (b"x-ratelimit-reset-requests", duration(bucket.full_in_s(now)).encode()),
    ]


def allowance_headers(allowances: Sequence[Allowance]) -> Headers:
    """The same of a gateway's limits."""
    found: Headers = []
    for one in allowances:
        for name, value in (("limit", one.limit), ("remaining", one.remaining), ("reset", duration(one.reset_s))):
            found.append((f"x-ratelimit-{name}-{one.kind}".encode(), str(value).encode()))
    return found


def together(first: Headers, second: Headers) -> Headers:
    """Headers of two kinds of limits: of requests those of the limit with less left, which both may tell."""
    left = [next((int(value) for name, value in some if name == _REMAINING), None) for some in (first, second)]
    if left[0] is None or left[1] is None:
        return [*first, *second]
    if left[0] <= left[1]:
        return [*first, *_but_of_requests(second)]
    return [*_but_of_requests(first), *second]


def _but_of_requests(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if not _OF_REQUESTS.fullmatch(name)]


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s; rounded up."""
    millis = math.ceil(seconds * 1000 - 1e-6)
    if millis < 1000:
        return f"{max(millis, 0)}ms"
    minutes, rest = divmod(millis, 60_000)
    return f"{minutes}m{math.ceil(rest / 1000)}s" if minutes else f"{rest / 1000:g}s"


def _neighbourhood(address: str) -> str:
    """The address; of IPv6 the network of 64 bits that one customer has."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
