"""One batch in the hands of one router:  validate -> work on its lines -> write its results.

At any moment the process may die: the next owner goes on from what the store has. A line's answer counts once it is
settled there, which happens once, so that whoever did it in vain does no harm. Called by runner.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeVar

from sqlalchemy import Connection

from diptych.cluster.api.errors import public
from diptych.cluster.api.files import new_file
from diptych.cluster.keys import Key
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.cluster.store import batches
from diptych.cluster.store.batches import Job, Line, Maker
from diptych.cluster.store.contents import Content, Contents, ContentsLost, at_disk
from diptych.cluster.store.database import Store
from diptych.cluster.store.files import KeptFile
from diptych.protos.errors import CapacityError, DeadlineExceeded, DiptychError, RateLimited, ShuttingDown
from diptych.protos.openai_batches import (
    CANCELLING,
    FINALIZING,
    Usage,
    WrongLine,
    line_id_of,
    parse_line,
    refused_line,
    result_line,
    schema_faults,
    usage_of,
)
from diptych.protos.openai_files import BATCH_OUTPUT
from diptych.protos.wire_checks import JsonObject, may_fit

from .reading import InputReader
from .results import write_results
from .seats import Seats
from .settings import BatchSettings
from .targets import Attempt, BatchTarget

MAX_BEGUN: Final = 20  # routers that may end while they work on a line: the line itself may be what ends them
MAX_UNSTARTED: Final = 20  # times that a line's deadline may pass before its first token
QUOTA: Final = "insufficient_quota"  # of a budget of the gateway
SHORTEST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 30.0
FORGET_LINES: Final = 2000
INLINE_BYTES: Final = 8 << 10

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """What all batches of a router share. `clock`: seconds since 1970."""

    store: Store
    contents: Contents
    targets: dict[str, BatchTarget]
    settings: BatchSettings
    output_expires_s: float
    seats: Seats
    metrics: RouterMetrics
    clock: Callable[[], float]
    owner: str

    @property
    def now(self) -> int:
        """Seconds since 1970."""
        return int(self.clock())


@dataclass(frozen=True, slots=True)
class _Result:
    """What is kept of a line."""

    data: bytes
    usage: Usage
    is_done: bool


class BatchRun:
    """One batch from when it is claimed until it is over or given up."""

    def __init__(self, job: Job, place: Workplace) -> None:
        self.number = job.number
        self.tenant = job.maker.tenant
        self._key = _key_of(job.maker)
        self._job = job
        self._place = place
        self._target = place.targets.get(job.batch.endpoint)
        self._stopped = asyncio.Event()
        self._is_expired = False
        self.is_ending = False  # nothing is left but writes that fail where the batch is another's
        self._pause_s = 0.0
        self._paused_until = 0.0  # on the event loop's clock
        self.tick(job.batch.status)

    def tick(self, status: str) -> None:
        """Called now and then with the state that the store tells: no line is begun any more once it is cancelled, or
        its window is over.
        """
        if self._stopped.is_set():
            return
        if status == CANCELLING:
            self._stopped.set()
        elif self._place.clock() >= self._job.batch.expires_at:
            self._is_expired = True
            self._stopped.set()

    async def go(self) -> None:
        """To the batch's end, or until it turns out to be another's. Raises what the store raises, and ContentsLost."""
        place, batch = self._place, self._job.batch
        has_lines = batch.in_progress_at is not None
        if not self._stopped.is_set() and batch.status != FINALIZING:
            with contextlib.closing(await at_disk(place.contents.open, self._job.content)) as source:
                if not has_lines:
                    has_lines = await self._until_stopped(self._validate(source)) is True
                    if not has_lines and not self._stopped.is_set():
                        return
                if has_lines:
                    await self._until_stopped(self._work(source))
        if not has_lines:
            await self._forget_lines()
        if self._stopped.is_set():
            is_expired, now = self._is_expired, place.now
            await place.store.write(lambda c: batches.stop(c, self.number, place.owner, is_expired=is_expired, now=now))
        await self._finish()

    async def lost(self, why: ContentsLost) -> None:
        """The input is gone: nothing can be answered any more."""
        log.error("batch %s: %s", self._job.batch.id, why)
        wrong = WrongLine("input_lost", "the contents of the input file are lost on the server; upload it again")
        await self._refuse([wrong.told(None)])

    async def _until_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` returns; None when it was stopped before its end."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            stopped.cancel()
            task.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    # -- the input

    async def _validate(self, source: BinaryIO) -> bool:
        """Whether every line is right and kept; what is wrong ends the batch."""
        place, endpoint = self._place, self._job.batch.endpoint
        await self._forget_lines()  # of a router that died at this
        if self._target is None:
            wrong = WrongLine("invalid_endpoint", f"no batches for {endpoint} are served here any more")
            await self._refuse([wrong.told(None)])
            return False
        reader = InputReader(source, endpoint, self._target.check, place.settings)
        is_last = False
        while not is_last:
            piece = await asyncio.to_thread(reader.next_piece)
            is_last = piece.is_last
            if piece.lines and not reader.errors:
                add = functools.partial(batches.add_lines, number=self.number, owner=place.owner, lines=piece.lines)
                if not await place.store.write(add):
                    return False
        if reader.errors:
            await self._forget_lines()
            await self._refuse(reader.errors)
            return False
        if reader.sha256 != self._job.sha256:
            raise ContentsLost(f"the contents {self._job.content} are not what was uploaded")
        model = reader.models.pop() if len(reader.models) == 1 else None
        number, now = reader.num_lines, place.now
        return await place.store.write(
            lambda c: batches.begin(c, self.number, place.owner, total=number, model=model, now=now)
        )

    async def _refuse(self, errors: list[JsonObject]) -> None:
        place, now = self._place, self._place.now
        await place.store.write(lambda c: batches.refuse(c, self.number, place.owner, errors, now=now))

    async def _forget_lines(self, *, is_over: bool = False) -> None:
        """Unless the batch went to another router, which may have them in work."""
        owner = None if is_over else self._place.owner
        forget = functools.partial(batches.forget_lines, number=self.number, most=FORGET_LINES, owner=owner)
        while await self._place.store.write(forget):
            pass

    # -- the lines

    async def _work(self, source: BinaryIO) -> None:
        lines = _Pending(self._take)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._place.settings.batch_concurrency):
                    group.create_task(self._work_off(lines, source))
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from exc

    async def _work_off(self, lines: _Pending, source: BinaryIO) -> None:
        while (line := await lines.next()) is not None:
            result = await self._result(line, source)
            await self._settle(line, result)

    async def _take(self, after: int) -> list[Line]:
        place, most = self._place, self._place.settings.batch_concurrency
        return await self._patiently(lambda c: batches.take(c, self.number, place.owner, after=after, most=most))

    async def _settle(self, line: Line, result: _Result) -> None:
        settle = functools.partial(
            batches.settle,
            number=self.number,
            line=line.line,
            answer=result.data,
            usage=result.usage,
            is_done=result.is_done,
        )
        if await self._patiently(settle):
            outcome = "completed" if result.is_done else "failed"
            self._place.metrics.counters["batch_lines"].labels(outcome).inc()

    async def _patiently(self, job: Callable[[Connection], T]) -> T:
        """An answer is not thrown away because the store is busy or cannot be reached for a while."""
        while True:
            try:
                return await self._place.store.write(job)
            except ShuttingDown:
                raise
            except CapacityError as exc:
                await asyncio.sleep(exc.retry_after_s)

    async def _result(self, line: Line, source: BinaryIO) -> _Result:
        """What became of a line, in the end. Waits and tries again as long as that makes sense."""
        assert self._target is not None
        line_id = line_id_of(self._job.batch.id, line.line)
        if line.begun >= MAX_BEGUN:
            words = f"{MAX_BEGUN} routers ended while they worked on this request; it is not tried again"
            return _failed(line_id, line, "request_lost", words)
        body = await self._body(line, source)
        failures = unstarted = 0
        while True:
            await self._until_unpaused()
            async with self._place.seats.seat(self.tenant):
                attempt = self._target.attempt(self.tenant, self._key)
                try:
                    answer = await self._target.answer(body, attempt, self.tenant)
                except Exception as exc:
                    error = public(exc)
                else:
                    self._pause_s = 0.0
                    if may_fit(answer, INLINE_BYTES):
                        return _answered(line_id, line, attempt, answer)
                    return await asyncio.to_thread(_answered, line_id, line, attempt, answer)
            if self._waits_in_vain(error):
                return _Result(refused_line(line_id, line.custom_id, error, attempt.id), Usage(), False)
            if isinstance(error, CapacityError) or (error.retryable and not attempt.was_placed):
                self._pause(getattr(error, "retry_after_s", SHORTEST_PAUSE_S))
                continue
            if isinstance(error, DeadlineExceeded):
                unstarted += 1
                if not attempt.was_placed or (not attempt.has_tokens and unstarted < MAX_UNSTARTED):
                    continue
                return _failed(line_id, line, "request_timeout", error.message)
            failures += 1
            if not error.retryable or failures >= self._place.settings.max_attempts:
                return _Result(refused_line(line_id, line.custom_id, error, attempt.id), Usage(), False)
            self._place.metrics.counters["batch_retries"].labels(error.code).inc()
            await asyncio.sleep(min(SHORTEST_PAUSE_S * 2**failures, LONGEST_PAUSE_S))

    def _waits_in_vain(self, error: DiptychError) -> bool:
        """Whether a budget has no money for the line before the batch's window is over."""
        if not isinstance(error, RateLimited) or error.code != QUOTA:
            return False
        return self._place.clock() + error.retry_after_s >= self._job.batch.expires_at

    async def _body(self, line: Line, source: BinaryIO) -> bytes:
        raw = await at_disk(os.pread, source.fileno(), line.num_bytes, line.position)
        try:
            if len(raw) <= INLINE_BYTES:
                return parse_line(raw, self._job.batch.endpoint).body
            return (await asyncio.to_thread(parse_line, raw, self._job.batch.endpoint)).body
        except WrongLine as exc:
            raise ContentsLost(f"line {line.line} is not what was validated: {exc.message}") from exc

    def _pause(self, seconds: float) -> None:
        """There is no room: the batch's other lines would be refused as well."""
        now = asyncio.get_running_loop().time()
        if now >= self._paused_until:
            self._pause_s = min(max(2 * self._pause_s, seconds), LONGEST_PAUSE_S)
            self._paused_until = now + self._pause_s

    async def _until_unpaused(self) -> None:
        left = self._paused_until - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.sleep(left)

    # -- the end

    async def _finish(self) -> None:
        place, now = self._place, self._place.now
        status = await place.store.write(lambda c: batches.finalize(c, self.number, place.owner, now=now))
        if status is None:
            return
        self.is_ending = True
        results = await write_results(place.store, place.contents, self.number, self._job.batch.id)
        output, error = self._kept(results.output, "output"), self._kept(results.error, "error")
        now = place.now
        if not await place.store.write(
            lambda c: batches.finish(c, self.number, place.owner, status, output=output, error=error, now=now)
        ):
            for content in results.contents():
                await at_disk(place.contents.remove, content.name)
            return
        log.info("batch %s: %s", self._job.batch.id, status)
        await self._forget_lines(is_over=True)

    def _kept(self, content: Content | None, kind: str) -> KeptFile | None:
        if content is None:
            return None
        place = self._place
        return new_file(
            BATCH_OUTPUT,
            f"{self._job.batch.id}_{kind}.jsonl",
            content,
            tenant=self.tenant,
            expires_after_s=self._job.output_expires_s or place.output_expires_s,
            now=place.now,
        )


class _Pending:
    """The lines of a batch for many workers, read from the store a few at a time."""

    def __init__(self, take: Callable[[int], Awaitable[list[Line]]]) -> None:
        self._take = take
        self._lock = asyncio.Lock()
        self._lines: deque[Line] = deque()
        self._last = 0
        self._is_over = False

    async def next(self) -> Line | None:
        """None: there are no more."""
        async with self._lock:
            if not self._lines and not self._is_over:
                self._lines.extend(await self._take(self._last))
                self._is_over = not self._lines
            if not self._lines:
                return None
            line = self._lines.popleft()
            self._last = line.line
            return line


def _key_of(maker: Maker) -> Key | None:
    """The key that made the batch, as far as that is kept: it opens nothing, and says whose requests these are."""
    if not maker.key_id:
        return None
    return Key(id=maker.key_id, sha256="", tenant=maker.tenant, tags=maker.key_tags, disabled=True)


def _answered(line_id: str, line: Line, attempt: Attempt, answer: JsonObject) -> _Result:
    faults = schema_faults(answer)
    error = ("schema_mismatch", "the answer fails its schema: " + "; ".join(faults)) if faults else None
    data = result_line(line_id, line.custom_id, status=200, request_id=attempt.id, body=answer, error=error)
    return _Result(data, usage_of(answer), not faults)


def _failed(line_id: str, line: Line, code: str, words: str) -> _Result:
    return _Result(result_line(line_id, line.custom_id, error=(code, words)), Usage(), False)
