"""A gateway's side of what routers tell each other: it reports every second, and takes over what the others found out.

gateway.py starts and stops it where ports.py gives a SharedState. A request never waits for it; while the others cannot
be reached a gateway goes on with what it knows, and after ten seconds without what may have become wrong.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from diptych.protos.failures import FailureKind

from .course import Breakers
from .metrics import GatewayMetrics
from .retries import CONSEQUENCES
from .routes import Routes
from .shared_state import (
    MAX_ENTRIES,
    RECENT_S,
    STALE_S,
    BreakerNews,
    Demand,
    LoadNews,
    Report,
    SharedState,
    Snapshot,
)

INTERVAL_S: Final = 1.0
PATIENCE_S: Final = 2.0
_SAME_S: Final = 0.05  # changes that are so close together are one: reports take their time
logger = logging.getLogger(__name__)


class SharedLimits(Protocol):
    """What the ledger's limits have to tell, and take."""

    def demands(self) -> Sequence[Demand]:
        """Of the accounts that were asked for lately."""

    def lean(self, others: Mapping[tuple[str, str], float] | None, num_others: int) -> None:
        """So many requests a second asked the others for these accounts; None: nobody knows."""


class StateSync:
    """Of one gateway, for one event loop. `holder` names this life of it."""

    def __init__(
        self,
        state: SharedState,
        routes: Routes,
        breakers: Breakers,
        *,
        rng: random.Random,
        limits: SharedLimits | None = None,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        self.holder = f"gateway-{os.urandom(8).hex()}"
        self._state = state
        self._routes = routes
        self._breakers = breakers
        self._rng = rng
        self._limits = limits
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._silent_since: float | None = None
        self._is_forgotten = False

    def start(self) -> None:
        """Report from now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="state sync")

    async def stop(self) -> None:
        """No report after this. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def sync(self) -> bool:
        """Report once, and take over what the others say; False where they cannot be reached. Never raises."""
        try:
            snapshot = await asyncio.wait_for(self._state.exchange(self.report()), PATIENCE_S)
        except Exception as exc:  # of whatever carries it: nothing here may hurt requests
            self._unreached(exc)
            return False
        if self._silent_since is not None:
            logger.info("the other routers can be reached again")
        self._silent_since, self._is_forgotten = None, False
        self.apply(snapshot)
        if self._metrics is not None:
            self._metrics.state_exchanges.labels("ok").inc()
        return True

    def report(self) -> Report:
        """What this gateway found out itself and is recent."""
        loads = []
        for name, load in self._routes.loads.items():
            latency_s = load.measured_s(self._breakers.now, RECENT_S)
            if load.in_flight or latency_s is not None:
                loads.append(LoadNews(target=name, in_flight=load.in_flight, latency_s=latency_s))
        return Report(
            holder=self.holder,
            breakers=tuple(self._changes())[:MAX_ENTRIES],
            loads=tuple(loads)[:MAX_ENTRIES],
            demands=() if self._limits is None else tuple(self._limits.demands())[:MAX_ENTRIES],
        )

    def apply(self, snapshot: Snapshot) -> None:
        """Take over what others found out since."""
        now = self._breakers.now
        places = self._routes.places
        for news in snapshot.breakers:
            if news.target in places:
                self._adopt(news, now)
        told = {load.target: load for load in snapshot.loads}
        for name, load in self._routes.loads.items():
            other = told.get(name)
            load.heard(0 if other is None else other.in_flight, None if other is None else other.latency_s)
        if self._limits is not None:
            others = {(demand.limit, demand.scope): demand.per_s for demand in snapshot.demands}
            self._limits.lean(others, snapshot.num_others)

    async def _run(self) -> None:
        while True:
            await self.sync()
            await asyncio.sleep(INTERVAL_S * self._rng.uniform(0.75, 1.25))  # never all at once

    def _changes(self) -> Sequence[BreakerNews]:
        found = []
        now = self._breakers.now
        for name in self._routes.places:
            breaker = self._breakers.known(name)
            if breaker is None or breaker.found_at is None:
                continue
            if breaker.state == "closed" and now - breaker.found_at > RECENT_S:
                continue
            # Whose key was refused is known to none but who has it, and key ids differ from process to process.
            if breaker.why is not None and not _is_shared(breaker.why):
                continue
            found.append(
                BreakerNews(
                    target=name,
                    state="closed" if breaker.state == "closed" else "open",
                    ago_s=now - breaker.found_at,
                    opens_in_s=breaker.opens_in_s,
                    why="" if breaker.why is None else breaker.why.value,
                )
            )
        return found

    def _adopt(self, news: BreakerNews, now: float) -> None:
        breaker = self._breakers.of(self._routes.places[news.target])
        changed_at = now - news.ago_s
        if breaker.changed_at is not None and changed_at <= breaker.changed_at + _SAME_S:
            return
        if news.state == "closed":
            breaker.adopt_closing(changed_at)
        elif news.why in set(FailureKind) and _is_shared(FailureKind(news.why)) and 0 < news.opens_in_s < math.inf:
            breaker.adopt_opening(FailureKind(news.why), now + news.opens_in_s, changed_at)
            if self._metrics is not None:
                self._metrics.adopted.labels(news.target).inc()

    def _unreached(self, exc: Exception) -> None:
        now = self._breakers.now
        if self._silent_since is None:
            self._silent_since = now
            logger.warning("the other routers cannot be reached now (%r); this one goes on alone", exc)
        if not self._is_forgotten and now - self._silent_since >= STALE_S:
            self._is_forgotten = True
            for load in self._routes.loads.values():
                load.heard(0, None)
            if self._limits is not None:
                self._limits.lean(None, 0)
        if self._metrics is not None:
            self._metrics.state_exchanges.labels("failed").inc()


def _is_shared(why: FailureKind) -> bool:
    return CONSEQUENCES[why].opens != "until_key"
