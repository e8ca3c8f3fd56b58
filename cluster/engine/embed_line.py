"""The texts that wait for an engine's steps, and whose are computed next. Filled by the asyncio thread, read by the
step thread; knows no model.

Every step takes of all requests that wait, those of the most urgent priority first, then of the tenant that has had
least for its weight, then of the request that has had least: one with a single text waits for no batch of a thousand.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diptych.protos.embedding import EmbedKind, EmbedOrder, EmbedTimes, TextRow
from diptych.protos.errors import Cancelled, DeadlineExceeded, DiptychError, Overloaded, ShuttingDown
from diptych.protos.ports import Clock

Outcome = tuple[NDArray[np.float32], EmbedTimes] | DiptychError


@dataclass(eq=False, slots=True)
class Job:
    """One order on its way. `tell` is called once, from any thread, when it is over."""

    order: EmbedOrder
    tell: Callable[[Outcome], None]
    arrived_at: float
    num_tokens: int = 0
    number: int = 0
    began_at: float = 0.0
    served: int = 0  # tokens that steps took of it
    left: list[int] = field(default_factory=list)  # texts that no step has taken, the longest last
    open: int = 0  # texts that have no numbers yet
    values: NDArray[np.float32] | None = None
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """Texts of one job for one step, by their numbers."""

    job: Job
    texts: list[int]

    @property
    def rows(self) -> list[TextRow]:
        """The texts."""
        return [self.job.order.rows[number] for number in self.texts]


class EmbedLine:
    """Bounded in requests: one more than `max_waiting` is refused."""

    def __init__(self, *, max_waiting: int, step_tokens: int, clock: Clock) -> None:
        self._max_waiting = max_waiting
        self._step_tokens = step_tokens
        self._clock = clock
        self._jobs: dict[Job, None] = {}  # not over
        self._virtual: dict[str, float] = {}  # tokens by weight that a tenant with work has had
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self.is_draining = False

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def num_jobs(self) -> int:
        """Requests that are not over."""
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Those of them that no step has taken anything of."""
        with self._changed:
            return sum(not job.served for job in self._jobs)

    @property
    def queued_tokens(self) -> int:
        """Tokens that no step has taken."""
        with self._changed:
            return sum(job.num_tokens - job.served for job in self._jobs)

    def put(self, order: EmbedOrder, tell: Callable[[Outcome], None]) -> Job:
        """Take an order in. Raises ShuttingDown, Overloaded, DeadlineExceeded."""
        now = self._clock()
        if order.deadline is not None and now >= order.deadline:
            raise DeadlineExceeded("the request's deadline passed before an engine had it")
        lengths = [len(row.ids) for row in order.rows]
        left = sorted(range(len(lengths)), key=lengths.__getitem__)
        job = Job(order, tell, now, num_tokens=sum(lengths), left=left, open=len(lengths))
        with self._changed:
            if self.is_draining or self._is_closed:
                raise ShuttingDown("this engine takes no new requests: it is shutting down")
            if len(self._jobs) >= self._max_waiting:
                raise Overloaded(f"this engine has {len(self._jobs)} requests, which is its limit")
            job.number = next(self._numbers)
            if all(other.order.tenant != order.tenant for other in self._jobs):
                # Nobody saves up credit while it has no work.
                self._virtual[order.tenant] = min((self._virtual[j.order.tenant] for j in self._jobs), default=0.0)
            self._jobs[job] = None
            self._changed.notify()
        return job

    def take(self, timeout_s: float | None) -> list[Slice]:
        """The texts of the next step, at least one and of up to `step_tokens` tokens where one text is not longer.
        Empty after `timeout_s` (None: never), and when the line is closed.
        """
        with self._changed:
            if not self._is_closed:
                self._changed.wait_for(lambda: self._is_closed or self._has_work(), timeout_s)
            self._drop_late()
            return [] if self._is_closed else self._take()

    def finish(self, part: Slice, values: NDArray[np.float32]) -> None:
        """The numbers of a slice. What was ended meanwhile takes none."""
        job = part.job
        with self._changed:
            if job.is_over:
                return
            if job.values is None:
                job.values = np.empty((len(job.order.rows), values.shape[1]), dtype=np.float32)
            job.values[part.texts] = values
            job.open -= len(part.texts)
            if job.open:
                return
        times = EmbedTimes(job.began_at - job.arrived_at, self._clock() - job.began_at)
        assert job.values is not None
        self.end(job, (_answer(job.order, job.values), times))

    def end(self, job: Job, outcome: Outcome) -> None:
        """The job is over, with its answer or an error; repeating it does nothing."""
        with self._changed:
            if job.is_over:
                return
            job.is_over = True
            self._jobs.pop(job, None)
            if all(other.order.tenant != job.order.tenant for other in self._jobs):
                self._virtual.pop(job.order.tenant, None)
        job.tell(outcome)

    def cancel(self, job: Job) -> None:
        """Nobody wants its answer: what no step has taken is not computed."""
        self.end(job, Cancelled("the request was cancelled"))

    def end_all(self, error: DiptychError) -> None:
        """Of every job."""
        for job in list(self._jobs):
            self.end(job, error)

    def close(self) -> None:
        """The reader gets nothing more; new orders are refused."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_work(self) -> bool:
        return any(job.left for job in self._jobs)

    def _drop_late(self) -> None:
        now = self._clock()
        for job in [job for job in self._jobs if job.order.deadline is not None and now >= job.order.deadline]:
            self.end(job, DeadlineExceeded("the request's deadline passed before its texts were computed"))

    def _take(self) -> list[Slice]:
        waiting = [job for job in self._jobs if job.left]
        slices: dict[Job, list[int]] = {}
        room, total = self._step_tokens, 0
        share = max(room // max(len(waiting), 1), 1)
        while waiting:
            job = min(waiting, key=self._rank)
            size = len(job.order.rows[job.left[-1]].ids)
            if total and total + size > room:
                # A shorter text of somebody less urgent would fill the step, and the long one wait for ever.
                break
            taken = 0
            while job.left and taken < share:
                size = len(job.order.rows[job.left[-1]].ids)
                if total and total + size > room:
                    break
                slices.setdefault(job, []).append(job.left.pop())
                taken += size
                total += size
            if not job.served:
                job.began_at = self._clock()
            job.served += taken
            self._virtual[job.order.tenant] += taken / job.order.weight
            waiting = [other for other in waiting if other.left]
        return [Slice(job, texts) for job, texts in slices.items()]

    def _rank(self, job: Job) -> tuple[int, float, int, int]:
        return job.order.priority, self._virtual[job.order.tenant], job.served, job.number


def _answer(order: EmbedOrder, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What was asked for, of the numbers of all texts."""
    if order.kind is not EmbedKind.SIMILARITIES:
        return values
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.maximum(lengths, 1e-12)
    cosines: NDArray[np.float32] = (unit[1:] @ unit[0]).astype(np.float32)[:, None]
    return cosines
