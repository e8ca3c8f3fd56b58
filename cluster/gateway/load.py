"""How busy and how quick each target is, as this process sees it: what strategies and hedges decide by."""

from __future__ import annotations

import bisect
import math
from collections import deque

HALF_LIFE_S = 30.0  # what was measured so long ago counts half
_SMOOTHING = 0.3  # part of the newest sample
_KEPT = 256  # samples of which quantiles are taken
LEAST_SAMPLES = 20  # fewer have no quantile


class Quantiles:
    """Of the last 256 samples, kept in order."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, sample: float) -> None:
        """The newest one."""
        if len(self._samples) == _KEPT:
            del self._sorted[bisect.bisect_left(self._sorted, self._samples.popleft())]
        self._samples.append(sample)
        bisect.insort(self._sorted, sample)

    def at(self, part: float) -> float | None:
        """The sample that `part` of them do not exceed; None while there are too few."""
        count = len(self._sorted)
        return self._sorted[min(math.ceil(part * count), count) - 1] if count >= LEAST_SAMPLES else None


class Load:
    """Of one target."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._in_flight_elsewhere = 0
        self._latency_elsewhere_s: float | None = None
        self.first_content = Quantiles()  # seconds, of streams
        self.answer = Quantiles()  # seconds, of whole answers
        self._latency_s: float | None = None
        self._measured_at = 0.0

    def measured(self, latency_s: float, now: float, *, is_stream: bool) -> None:
        """An answer began, or a whole one came, after `latency_s`."""
        (self.first_content if is_stream else self.answer).add(latency_s)
        known = None if self._latency_s is None else self.latency_s(now)
        self._latency_s = latency_s if known is None else known + _SMOOTHING * (latency_s - known)
        self._measured_at = now

    @property
    def busy(self) -> int:
        """Requests in work, here and at other routers as far as they told."""
        return self.in_flight + self._in_flight_elsewhere

    def heard(self, in_flight: int, latency_s: float | None) -> None:
        """What other routers have in work there and measure; None: nothing."""
        self._in_flight_elsewhere = in_flight
        self._latency_elsewhere_s = latency_s

    def measured_s(self, now: float, recent_s: float) -> float | None:
        """As `latency_s`, where something was measured here lately."""
        return self.latency_s(now) if self._latency_s is not None and now - self._measured_at <= recent_s else None

    def latency_s(self, now: float) -> float | None:
        """Moving average of both. It falls while nothing is measured, so that who was slow is tried again; before the
        first measurement what other routers measure, or None.
        """
        if self._latency_s is None:
            return self._latency_elsewhere_s
        return self._latency_s * math.exp2(-max(now - self._measured_at, 0.0) / HALF_LIFE_S)
