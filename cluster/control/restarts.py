"""When an engine that died may be started again. Pure: the caller gives the time."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.types import EngineId

WINDOW_S = 600.0
STEADY_S = 10.0  # a life that served so long died of something else than its start: it does not count
MAX_DELAY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartTerms:
    """Of a cluster: whether at all, how many short lives of one name within WINDOW_S, the first wait in seconds."""

    enabled: bool
    limit: int
    backoff_s: float


class Restarts:
    """Counts short lives by engine name, so that an engine that dies as it starts does not take the machine."""

    def __init__(self) -> None:
        self._short: dict[EngineId, list[float]] = {}

    def delay(self, engine_id: EngineId, served_s: float, now: float, terms: RestartTerms) -> float:
        """Seconds from `now`, at which a life ended that served for `served_s`, until the next one may begin.

        The first time and after a long life at once, then twice as long each time; beyond the limit when the oldest
        short life is WINDOW_S ago.
        """
        if served_s >= STEADY_S:
            self._short.pop(engine_id, None)
            return 0.0
        short = [at for at in self._short.get(engine_id, ()) if at > now - WINDOW_S]
        self._short[engine_id] = [*short, now]
        if len(short) >= terms.limit:
            return max(short[-terms.limit] + WINDOW_S - now, terms.backoff_s)
        return min(terms.backoff_s * 2 ** (len(short) - 1), MAX_DELAY_S) if short else 0.0
