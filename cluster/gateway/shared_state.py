"""What gateways of several routers tell each other, off the hot path: which targets failed them, how busy they are.

state_sync.py reports and applies; the board is kept by an actor (cluster/control/gateway_board.py), or in memory. A
report replaces its sender's last one and says all that is recent, so that a board may be lost at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

RECENT_S: Final = 60.0  # changes and loads that are older are not told
STALE_S: Final = 10.0  # of a router that is silent for so long nothing counts
MAX_ENTRIES: Final = 1024  # of each kind, of one report and of what is answered
MAX_HOLDERS: Final = 256
MAX_NAME: Final = 1100  # characters, of scopes


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerNews:
    """A breaker that changed `ago_s` seconds ago. `why`: the kind of failure that opened it."""

    target: str
    state: Literal["open", "closed"]
    ago_s: float
    opens_in_s: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadNews:
    """A target that was used lately."""

    target: str
    in_flight: int
    latency_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests a second that asked for an account of a limit, whether they were let through or not."""

    limit: str
    scope: str
    per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of one router's life, named `holder`."""

    holder: str
    breakers: tuple[BreakerNews, ...] = ()
    loads: tuple[LoadNews, ...] = ()
    demands: tuple[Demand, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All others together: of each breaker the newest change; requests in work and demands added up."""

    num_others: int
    breakers: tuple[BreakerNews, ...] = ()
    loads: tuple[LoadNews, ...] = ()
    demands: tuple[Demand, ...] = ()


class SharedState(Protocol):
    """Where routers meet."""

    async def exchange(self, report: Report) -> Snapshot:
        """Keep `report` instead of its holder's last one; what the others said. Raises whatever keeps it from that: the
        caller goes on with what it knows.
        """


class Board:
    """The reports of all routers, bounded in number and size."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Report]] = {}

    def exchange(self, report: Report) -> Snapshot:
        """See SharedState."""
        now = self._clock()
        self._reports.pop(report.holder, None)
        self._reports[report.holder] = now, _bounded(report)
        for holder in [name for name, (at, _) in self._reports.items() if now - at > STALE_S]:
            del self._reports[holder]
        while len(self._reports) > MAX_HOLDERS:
            del self._reports[next(iter(self._reports))]
        others = [_aged(kept, now - at) for name, (at, kept) in self._reports.items() if name != report.holder]
        return Snapshot(
            num_others=len(others),
            breakers=_newest(news for other in others for news in other.breakers),
            loads=_added(load for other in others for load in other.loads),
            demands=_summed(demand for other in others for demand in other.demands),
        )


class LocalState:
    """In memory, for gateways of one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = Board(clock)

    async def exchange(self, report: Report) -> Snapshot:
        """See SharedState."""
        return self._board.exchange(report)


def _bounded(report: Report) -> Report:
    return replace(
        report,
        breakers=tuple(news for news in report.breakers[:MAX_ENTRIES] if len(news.target) <= MAX_NAME),
        loads=tuple(load for load in report.loads[:MAX_ENTRIES] if len(load.target) <= MAX_NAME),
        demands=tuple(one for one in report.demands[:MAX_ENTRIES] if len(one.limit) + len(one.scope) <= MAX_NAME),
    )


def _aged(report: Report, age_s: float) -> Report:
    breakers = tuple(
        replace(news, ago_s=news.ago_s + age_s, opens_in_s=max(news.opens_in_s - age_s, 0.0))
        for news in report.breakers
    )
    return replace(report, breakers=breakers)


def _newest(news: Iterable[BreakerNews]) -> tuple[BreakerNews, ...]:
    found: dict[str, BreakerNews] = {}
    for one in news:
        known = found.get(one.target)
        if known is None or one.ago_s < known.ago_s:
            found[one.target] = one
    return tuple(found.values())[:MAX_ENTRIES]


def _added(loads: Iterable[LoadNews]) -> tuple[LoadNews, ...]:
    in_flight: dict[str, int] = {}
    latencies: dict[str, list[float]] = {}
    for load in loads:
        in_flight[load.target] = in_flight.get(load.target, 0) + load.in_flight
        if load.latency_s is not None:
            latencies.setdefault(load.target, []).append(load.latency_s)
    return tuple(
        LoadNews(
            target=target,
            in_flight=number,
            latency_s=sum(latencies[target]) / len(latencies[target]) if target in latencies else None,
        )
        for target, number in list(in_flight.items())[:MAX_ENTRIES]
    )


def _summed(demands: Iterable[Demand]) -> tuple[Demand, ...]:
    found: dict[tuple[str, str], float] = {}
    for demand in demands:
        key = demand.limit, demand.scope
        found[key] = found.get(key, 0.0) + demand.per_s
    return tuple(
        Demand(limit=limit, scope=scope, per_s=per_s) for (limit, scope), per_s in list(found.items())[:MAX_ENTRIES]
    )
