"""What a token of an own pool costs in seconds of a device, from the counters that its engines report.

prices.py asks; readings come from whoever sees the engines (cluster/api/pool_readings.py). Measured are the seconds of
engines' steps and the tokens computed in them: a request pays for its tokens' part of the steps, so that all requests
together pay for the time that engines computed. Time in which an engine had nothing to do is nobody's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

HALF_LIFE_S: Final = 60.0  # what was measured so long ago counts half
LOOK_S: Final = 1.0  # as often readings are taken, while somebody asks
LEAST_TOKENS: Final = 16.0  # fewer tell nothing
_ROLES = ("prefill", "decode")


class Reading(NamedTuple):
    """Of one engine (its id with its epoch) of a pool: the counters of its Status frames, `prefill_tokens_total`,
    `prefill_step_seconds_total`, and the same of decode.
    """

    pool: str
    engine: str
    counters: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Seconds of one engine for a token of a prompt that no cache had, and for one of an answer."""

    input_s: float
    output_s: float


@dataclass(slots=True)
class _Sums:
    seconds: float = 0.0
    tokens: float = 0.0

    @property
    def per_token(self) -> float | None:
        return self.seconds / self.tokens if self.tokens >= LEAST_TOKENS else None


@dataclass(slots=True)
class _Pool:
    at: float
    sums: dict[str, _Sums] = field(default_factory=lambda: {role: _Sums() for role in _ROLES})

    def fade(self, now: float) -> None:
        part = math.exp2(-max(now - self.at, 0.0) / HALF_LIFE_S)
        self.at = now
        for sums in self.sums.values():
            if sums.tokens * part >= LEAST_TOKENS:  # an idle pool keeps its last measurement
                sums.seconds *= part
                sums.tokens *= part


class DeviceMeter:
    """Of all own pools of a process. `readings`: those of all engines that live now."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, readings: Callable[[], Iterable[Reading]] | None = None
    ) -> None:
        self._clock = clock
        self._readings = readings
        self._look_at = clock()
        self._last: dict[tuple[str, str], Mapping[str, float]] = {}
        self._pools: dict[str, _Pool] = {}

    def look(self) -> None:
        """Take the readings now."""
        if self._readings is None:
            return
        living = set()
        for reading in self._readings():
            living.add((reading.pool, reading.engine))
            self.read(*reading)
        for gone in self._last.keys() - living:  # what it did counts on
            del self._last[gone]

    def read(self, pool: str, engine: str, counters: Mapping[str, float]) -> None:
        """One reading."""
        now = self._clock()
        entry = self._pools.setdefault(pool, _Pool(now))
        entry.fade(now)
        before = self._last.get((pool, engine))
        self._last[pool, engine] = dict(counters)
        if before is None:  # what it did before we looked is of another time
            return
        for role, sums in entry.sums.items():
            tokens, seconds = f"{role}_tokens_total", f"{role}_step_seconds_total"
            more = counters.get(tokens, 0.0) - before.get(tokens, 0.0)
            took = counters.get(seconds, 0.0) - before.get(seconds, 0.0)
            if more > 0 and took > 0:
                sums.tokens += more
                sums.seconds += took

    def of(self, pool: str) -> DeviceTime | None:
        """None until enough was measured. Where no engine is for prompts alone, the others compute both."""
        if (now := self._clock()) >= self._look_at:
            self._look_at = now + LOOK_S
            self.look()
        entry = self._pools.get(pool)
        if entry is None or (output_s := entry.sums["decode"].per_token) is None:
            return None
        input_s = entry.sums["prefill"].per_token
        return DeviceTime(output_s if input_s is None else input_s, output_s)
