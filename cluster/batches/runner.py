"""The batches of one router: claims those that nobody works on, holds their leases, lets them go.

Made and stopped by cluster/entry.py. The store is all that routers share: they do not know of each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

from diptych.cluster.api.files import contents_of
from diptych.cluster.api.served import ServedModel
from diptych.cluster.api.text_model import TextModel
from diptych.cluster.router.router import Router
from diptych.cluster.store import batches
from diptych.cluster.store.contents import ContentsLost
from diptych.cluster.store.database import Store
from diptych.protos.errors import CapacityError

from .run import BatchRun, Workplace
from .seats import Seats
from .sweep import sweep, sweep_contents, tell_metrics
from .targets import targets_of

if TYPE_CHECKING:
    from diptych.cluster.api.routed import RoutedModels

LOOKED_AT: Final = 256  # free batches that one look considers, and tenants
BESIDE: Final = 4  # times `at_once`: so many at most, with those of tenants that have no other and those that end
SWEEP_S: Final = 60.0
SWEEP_CONTENTS_S: Final = 900.0
METRICS_S: Final = 5.0
AFTER_REFUSAL_S: Final = 2.0
AFTER_FAULT_S: Final = 30.0

log = logging.getLogger(__name__)


class BatchRunner:
    """One per router. `clock`: seconds since 1970."""

    def __init__(
        self,
        router: Router,
        models: Iterable[ServedModel | TextModel],
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        routes: RoutedModels | None = None,
    ) -> None:
        settings, files = router.settings.batches, router.settings.files
        self._settings = settings
        self._store = store
        self._clock = clock
        self._place = Workplace(
            store=store,
            contents=contents_of(store, files),
            targets=targets_of(router, models, store, routes),
            settings=settings,
            output_expires_s=files.batch_expires_s,
            seats=Seats(settings.concurrency),
            metrics=router.metrics,
            clock=clock,
            owner=f"{router.router_id}/{os.urandom(6).hex()}",
        )
        self._runs: dict[int, BatchRun] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look for batches from now on. The router and the store are started."""
        self._loops = [
            asyncio.create_task(self._again(self.look, self._settings.poll_s), name="batches"),
            asyncio.create_task(self._again(self._sweep, SWEEP_S), name="sweep of files and batches"),
            asyncio.create_task(self._again(self._sweep_contents, SWEEP_CONTENTS_S), name="sweep of contents"),
            asyncio.create_task(self._again(self._tell_metrics, METRICS_S), name="metrics of batches"),
        ]

    async def stop(self) -> None:
        """Let others have the batches: lines in work are begun anew there. The store is still started."""
        numbers = list(self._tasks)
        tasks = [*self._loops, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in numbers:
            await self._release(number, 0)

    async def look(self) -> None:
        """Hold on to the batches in work and take on more."""
        if self._runs:
            await self._renew()
        most = self._settings.at_once
        if len(self._runs) >= BESIDE * most:
            return
        now_ms = self._now_ms()
        waiting = await self._store.read(lambda c: batches.free(c, now_ms=now_ms, most=LOOKED_AT))
        held = Counter(run.tenant for run in self._runs.values())
        waiting = [one for one in waiting if one.number not in self._runs]
        while waiting and len(self._runs) < BESIDE * most:
            one = min(waiting, key=lambda one: (not one.is_ending, held[one.tenant], one.number))
            # Another may last a day: neither who has none here nor one that only has to end waits for it.
            if len(self._runs) >= most and held[one.tenant] and not one.is_ending:
                return
            waiting.remove(one)
            if await self._claim(one.number):
                held[one.tenant] += 1

    async def _claim(self, number: int) -> bool:
        now_ms = self._now_ms()
        until_ms, owner = now_ms + int(self._settings.lease_s * 1000), self._place.owner
        claimed = await self._store.write(lambda c: batches.claim(c, number, owner, now_ms=now_ms, until_ms=until_ms))
        if claimed is None:
            return False
        job, is_orphan = claimed
        if is_orphan:
            log.warning("batch %s: its router fell silent, this one goes on with it", job.batch.id)
            self._place.metrics.counters["batch_takeovers"].inc()
        run = self._runs[number] = BatchRun(job, self._place)
        self._tasks[number] = asyncio.create_task(self._carry(run), name=f"batch {job.batch.id}")
        return True

    async def _renew(self) -> None:
        until_ms, owner = self._now_ms() + int(self._settings.lease_s * 1000), self._place.owner
        numbers = list(self._runs)
        mine = await self._store.write(lambda c: batches.renew(c, owner, numbers, until_ms=until_ms))
        for number in numbers:
            run = self._runs.get(number)
            if run is not None and number in mine:
                run.tick(mine[number])
            elif run is not None and not run.is_ending:
                self._tasks[number].cancel()  # it went to another router, which thought this one dead

    async def _carry(self, run: BatchRun) -> None:
        pause_s = 0.0
        try:
            try:
                await run.go()
            except ContentsLost as exc:
                await run.lost(exc)
        except CapacityError as exc:
            log.warning("a batch waits: %s", exc)
            pause_s = max(exc.retry_after_s, AFTER_REFUSAL_S)
        except Exception:
            log.exception("a batch stopped unexpectedly and is tried again")
            pause_s = AFTER_FAULT_S
        finally:
            self._runs.pop(run.number, None)
            self._tasks.pop(run.number, None)
        await self._release(run.number, self._now_ms() + int(pause_s * 1000))

    async def _release(self, number: int, until_ms: int) -> None:
        owner = self._place.owner
        try:
            await self._store.write(lambda c: batches.release(c, number, owner, until_ms=until_ms))
        except CapacityError as exc:
            log.warning("a batch's lease is left to run out: %s", exc)

    async def _again(self, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            try:
                await work()
            except CapacityError as exc:
                log.warning("batches: %s", exc)
            except Exception:
                log.exception("batches: unexpected")
            await asyncio.sleep(every_s)

    async def _sweep(self) -> None:
        await sweep(self._place, kept_s=self._settings.kept_s)

    async def _sweep_contents(self) -> None:
        await sweep_contents(self._place)

    async def _tell_metrics(self) -> None:
        await tell_metrics(self._place)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
