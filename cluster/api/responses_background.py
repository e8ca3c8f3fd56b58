"""Responses that are worked on while nobody waits for them. One BackgroundResponses per app; responses.py begins them.

The store is the truth: an event is stored before anybody is sent it, so that a stream goes on behind any number at any
router; and who ends a response there ends the work on it, which its lease tells the others of.

    queued --> in_progress --> completed | incomplete | failed | cancelled
       '-----------'---------> cancelled by who works on it, asked by anybody; failed when the lease runs out
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from diptych.cluster.config import ResponsesSettings
from diptych.cluster.router.router import Router
from diptych.protos.errors import Cancelled, CapacityError, DiptychError, ShuttingDown
from diptych.protos.responses_replies import Status

from .answer import Answer
from .answering import Answerer
from .errors import public
from .responses_endpoint import ResponseEndpoint
from .responses_kept import KeptResponses, UnknownResponse

POLL_S: Final = 0.25  # between looks at a response that another router works on
BEAT_S: Final = 1.0  # between looks at who ended or deleted a response, or wants it to end
ENDS_IN_S: Final = 3 * BEAT_S  # what another router works on, once it is asked; then it ends without that router
ENDS_POLL_S: Final = 0.1
FRAMES_AT_ONCE: Final = 256
STORE_PATIENCE_S: Final = 10.0  # an end that cannot be stored is tried again for so long
STORE_RETRY_S: Final = 0.5
STOPPED: Final = "the server that worked on this response was stopped: send it again"

if TYPE_CHECKING:
    from .routed import RoutedAnswer

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A response in work. `life`: what is closed behind it."""

    tenant: str
    endpoint: ResponseEndpoint
    answerer: Answerer
    answer: Answer | RoutedAnswer
    life: ExitStack
    why: DiptychError | None = None  # it is to end, and for what
    task: asyncio.Task[None] | None = None
    work: asyncio.Task[DiptychError | None] | None = None  # the part of it that may be cancelled
    waiting: list[tuple[int, str]] = field(default_factory=list)  # events that the store does not have yet
    news: asyncio.Event = field(default_factory=asyncio.Event)  # replaced whenever it is set


class BackgroundResponses:
    """Of one router replica."""

    def __init__(self, router: Router, kept: KeptResponses, settings: ResponsesSettings) -> None:
        self._router = router
        self._kept = kept
        self._beat_s = min(BEAT_S, settings.lease_s / 4)
        self._renewal_s = settings.lease_s / 4
        self._in_work = router.metrics.gauges["background_responses_in_work"]
        self._jobs: dict[str, Job] = {}
        self._beating: asyncio.Task[None] | None = None
        self._is_stopped = False

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(self, job: Job) -> None:
        """Work on a response that is in the store as queued."""
        self._jobs[job.answer.id] = job
        self._in_work.inc()
        job.task = asyncio.create_task(self._run(job), name=f"background {job.answer.id}")
        if self._is_stopped:
            self._interrupt(job, ShuttingDown(STOPPED))
        if self._beating is None or self._beating.done():
            self._beating = asyncio.create_task(self._beat(), name="background responses")

    async def cancel(self, tenant: str, response_id: str) -> None:
        """End one, wherever it is worked on; nothing happens to one that is over. Returns once it is over."""
        job = self._jobs.get(response_id)
        if job is not None and job.tenant == tenant and job.task is not None:
            self._interrupt(job, Cancelled("this response was cancelled"))
            await asyncio.wait({job.task})
        elif await self._kept.ask_to_end(tenant, response_id):
            await self._until_over(tenant, response_id)
        await self._kept.end(tenant, response_id, "cancelled")

    async def _until_over(self, tenant: str, response_id: str) -> None:
        """Of one that another router works on and keeps, where that router lives."""
        with contextlib.suppress(TimeoutError, UnknownResponse):
            async with asyncio.timeout(ENDS_IN_S):
                while not await self._kept.is_over(tenant, response_id):  # noqa: ASYNC110  another process ends it
                    await asyncio.sleep(ENDS_POLL_S)

    async def stop(self, grace_s: float = 0.0) -> None:
        """What is in work after so long fails, and says so in the store. Before the store stops."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        self._is_stopped = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for job in list(self._jobs.values()):
            self._interrupt(job, ShuttingDown(STOPPED))
        if tasks:
            await asyncio.wait(tasks)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def frames(self, tenant: str, response_id: str, after: int) -> AsyncGenerator[bytes]:
        """The stored events behind number `after` as they come, until the response is over or deleted. Raises
        UnknownResponse before the first.
        """
        is_over = False
        while True:
            job = self._jobs.get(response_id)
            news = None if job is None else job.news
            batch = await self._kept.frames(response_id, after, FRAMES_AT_ONCE)
            if batch:
                after = batch[-1][0]
                yield "".join([frame for _, frame in batch]).encode()
            if len(batch) == FRAMES_AT_ONCE:
                continue
            if is_over:
                return
            try:
                is_over = await self._kept.is_over(tenant, response_id)
            except UnknownResponse:
                return
            if not is_over:
                await _either(news, POLL_S if news is None else BEAT_S)

    def _interrupt(self, job: Job, why: DiptychError) -> None:
        if job.why is None:
            job.why = why
            if job.work is not None:
                job.work.cancel()

    async def _run(self, job: Job) -> None:
        with job.life:
            try:
                if job.why is None:
                    job.work = asyncio.create_task(self._worked(job))
                    await asyncio.wait({job.work})
                is_done = job.work is not None and not job.work.cancelled()
                await self._end(job, job.work.result() if is_done and job.work is not None else job.why)
            finally:
                if job.work is not None and not job.work.done():
                    job.work.cancel()
                    await asyncio.gather(job.work, return_exceptions=True)
                del self._jobs[job.answer.id]
                self._in_work.dec()
                _tell(job)

    async def _worked(self, job: Job) -> DiptychError | None:
        """The answer, to its end; what ended it before."""
        status: Status | None = "in_progress"
        void = None if job.endpoint.request.streams else job.endpoint.begin_again
        try:
            async with aclosing(job.answerer.stream(job.answer, void)) as pieces:
                async for data in pieces:
                    if data and not await self._store(job, status):
                        return Cancelled("somebody else has ended this response")
                    status = None
        except Exception as exc:
            return public(exc)
        return job.endpoint.error

    async def _store(self, job: Job, status: Status | None) -> bool:
        """What is new of a response that goes on; what the store cannot take now comes with the next piece. False: the
        response has been ended.
        """
        is_behind = bool(job.waiting)
        job.waiting += job.endpoint.take()
        if not job.waiting and status is None:
            return True
        body = None if status is None else job.endpoint.open(job.answer).state(status)
        try:
            goes_on = await self._kept.go_on(job.answer.id, job.waiting, status, body)
        except CapacityError as exc:
            if not is_behind:
                log.warning("events of %s wait for the store: %s", job.answer.id, exc)
            return True
        job.waiting = []
        _tell(job)
        return goes_on

    async def _end(self, job: Job, error: DiptychError | None) -> None:
        body, last = job.endpoint.conclude(job.answer, error)
        await asyncio.to_thread(job.endpoint.emit, last)
        frames = job.waiting + job.endpoint.take()
        status: Status = body["status"]
        tries = int(STORE_PATIENCE_S / STORE_RETRY_S)
        for left in reversed(range(tries)):
            try:
                await self._kept.go_on(job.answer.id, frames, status, body)
                return
            except CapacityError as exc:  # its lease tells the others, should it come to that
                if not left or isinstance(exc, ShuttingDown):
                    log.error("the end of the background response %s is not stored: %s", job.answer.id, exc)
                    return
            await asyncio.sleep(STORE_RETRY_S)

    async def _beat(self) -> None:
        clock = asyncio.get_running_loop().time
        renewed_at = clock()  # a lease counts from when its response was stored
        while self._jobs:
            await asyncio.sleep(self._beat_s)
            if not (ids := list(self._jobs)):
                return
            is_due = clock() - renewed_at >= self._renewal_s
            try:
                wanted = await (self._kept.renew(ids) if is_due else self._kept.wanted(ids))
            except CapacityError as exc:
                log.warning("%d background responses are not looked after: %s", len(ids), exc)
                continue
            if is_due:
                renewed_at = clock()
            for name in set(ids) - wanted:
                if (job := self._jobs.get(name)) is not None:
                    self._interrupt(job, Cancelled("this response was cancelled"))


def _tell(job: Job) -> None:
    news, job.news = job.news, asyncio.Event()
    news.set()


async def _either(news: asyncio.Event | None, timeout_s: float) -> None:
    """Until there is news, for so long at most."""
    if news is None:
        await asyncio.sleep(timeout_s)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await news.wait()
