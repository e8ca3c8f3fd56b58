"""Which prompt computes how many of its tokens in the next step. Called by the worker only. A prompt here is all that
is known of a sequence: what another engine has generated already belongs to it.

Knows blocks, slots and tokens; knows nothing of transfers, clocks and what is told to anyone.

    waiting --admit: blocks of the whole prompt, a slot--> computing --plan, launched, chunk by chunk--> leave
   (FairLine)                                             (FairLine)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.protos.fair_line import FairLine, Place
from diptych.protos.lifecycle import RowMaker, StageTimer
from diptych.protos.step import MOST_TOLD, SlotPool, StepPlan, StepRow
from diptych.protos.types import GenerateRequest, PoolCounts, PrefillOrder, TransferKey


class State(Enum):
    """Where a prompt is; the picture is in the README."""

    WAITING = "waiting"  # holds nothing
    RUNNING = "running"  # blocks, a slot, an open transfer
    SENDING = "sending"  # token 0 is out; blocks and the transfer
    DRAINING = "draining"  # its Finish is out; blocks that the sender may still read, or a step write
    DONE = "done"


@dataclass(slots=True, eq=False)
class Job:
    """One prefill order on its way."""

    order: PrefillOrder
    place: Place
    timer: StageTimer
    rows: RowMaker
    known: tuple[int, ...] = field(init=False)  # request.known, put together once
    state: State = State.WAITING
    table: BlockTable | None = None  # set by admit, until the sender has released the blocks
    slot: int | None = None  # set by admit, until the prompt is computed
    computed: int = 0  # tokens whose KV is in the table
    under_way: int = 0  # tokens after these, in steps not collected yet
    in_flight: int = 0  # rows in these steps; slot and blocks stay while there are any
    released: bool = False  # the sender has let go of the blocks
    num_generated: int = field(init=False)  # in all, by others too
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        self.known = self.order.request.known
        self.num_generated = len(self.order.request.resume)

    @property
    def request(self) -> GenerateRequest:
        """What was asked for."""
        return self.order.request

    @property
    def key(self) -> TransferKey:
        """The request's name."""
        return self.order.request.key

    @property
    def launched(self) -> int:
        """Known tokens whose KV is computed or under way."""
        return self.computed + self.under_way

    @property
    def missing(self) -> int:
        """Known tokens whose KV nobody computes."""
        return len(self.known) - self.launched

    @property
    def blocks(self) -> Sequence[int]:
        """Of the known tokens' positions, in order."""
        assert self.table is not None
        return self.table.blocks


@dataclass(frozen=True, slots=True)
class Share:
    """A job's part of a step."""

    job: Job
    num_tokens: int


class PrefillScheduler:
    """At most `max_running` jobs hold blocks, at most `step_tokens` tokens are computed in a step."""

    def __init__(self, *, pool: BlockPool, slots: SlotPool, max_running: int, step_tokens: int) -> None:
        self.waiting: FairLine[Job] = FairLine()
        self.computing: FairLine[Job] = FairLine()
        self.num_holding = 0  # jobs with a table, those whose KV is on its way included
        self.num_in_flight = 0  # rows in steps that were not collected yet
        self._pool = pool
        self._slots = slots
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._next_step = 0
        self._blocked: tuple[Job, PoolCounts] | None = None  # the head that did not fit, and how the pool was then
        self._failed: list[tuple[Job, BaseException]] = []

    def take_failed(self) -> list[tuple[Job, BaseException]]:
        """Jobs whose own part of the scheduler's work raised; they compute nothing more, the worker ends them."""
        failed, self._failed = self._failed, []
        return failed

    def _fail(self, job: Job, exc: BaseException) -> None:
        self.waiting.discard(job.key)
        self.computing.discard(job.key)
        self._failed.append((job, exc))

    def add(self, job: Job) -> None:
        """Join the line."""
        self.waiting.add(job.key, job, job.place)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that wait or are in computation; what the cache saves is known of the latter only."""
        return sum(job.missing for line in (self.waiting, self.computing) for job in line)

    def admit(self) -> list[Job]:
        """Take jobs from the head of the line while they fit. Nobody overtakes a head that does not fit."""
        admitted: list[Job] = []
        while self.num_holding < self._max_running and self._slots.num_free:
            job = self.waiting.head()
            try:
                if job is None or not self._try_place(job):
                    break
            except BaseException as exc:
                assert job is not None
                self._fail(job, exc)
                continue
            self.waiting.take(job.key)
            self.waiting.charge(job.place, job.missing)
            self.computing.add(job.key, job, job.place)
            self.num_holding += 1
            admitted.append(job)
        return admitted

    def plan(self) -> tuple[StepPlan, list[Share]] | None:
        """The next step: jobs by turn, each as much of its prompt as the budget allows. None: no work."""
        left, room = self._step_tokens, MOST_TOLD
        shares: list[Share] = []
        seen: list[Job] = []
        while left and (job := self.computing.head()) is not None:
            self.computing.take(job.key)
            try:
                if not job.in_flight:
                    self._extend_prefix(job)
            except BaseException as exc:
                self._fail(job, exc)
                continue
            seen.append(job)
            num_tokens = min(left, job.missing)
            if job.rows.asks_of_prompt:
                if not room:
                    continue
                num_tokens = min(num_tokens, room)
                room -= num_tokens
            share = Share(job, num_tokens)
            self.computing.charge(job.place, share.num_tokens)
            shares.append(share)
            left -= share.num_tokens
        for job in seen:
            self.computing.add(job.key, job, job.place)  # until it is launched or stopped
        rows: list[StepRow] = []
        sound: list[Share] = []
        for share in shares:
            try:
                rows.append(self._row(share))
            except BaseException as exc:
                self._fail(share.job, exc)
            else:
                sound.append(share)
        if not sound:
            return None
        self._next_step += 1
        return StepPlan(self._next_step, tuple(rows)), sound

    def launched(self, shares: Iterable[Share]) -> None:
        """A step with these is under way: the next one is planned as if it were done."""
        for share in shares:
            job = share.job
            job.in_flight += 1
            job.under_way += share.num_tokens
            self.num_in_flight += 1
            if not job.missing:
                self.computing.discard(job.key)
            assert job.table is not None
            try:
                job.table.foresee(job.known, job.launched)
            except BaseException as exc:
                self._fail(job, exc)

    def collected(self, share: Share) -> None:
        """Its step is over, well or not; before `advance`, and also if the job has ended meanwhile."""
        job = share.job
        job.in_flight -= 1
        job.under_way -= share.num_tokens
        self.num_in_flight -= 1

    def advance(self, share: Share) -> None:
        """The share is computed: its full blocks can be found by others from now on."""
        job = share.job
        assert job.table is not None
        job.computed += share.num_tokens
        job.table.commit(job.known, job.computed)
        if not job.missing:
            self.stop(job)

    def stop(self, job: Job) -> None:
        """The job computes nothing more: it leaves the lines, its blocks stay. Its slot becomes free,
        now or, if called again, when no row of it is in flight any more.
        """
        self.waiting.discard(job.key)
        self.computing.discard(job.key)
        if job.slot is not None and not job.in_flight:
            self._slots.give(job.slot)
            job.slot = None

    def close(self, job: Job) -> None:
        """Nobody computes with or reads the job's blocks any more."""
        assert not job.in_flight, f"{job.key} gives up blocks that a step still uses"
        if job.table is not None:
            job.table.close()
            job.table = None
            self.num_holding -= 1

    def _try_place(self, job: Job) -> bool:
        if self._blocked == (job, self._pool.counts()):
            return False  # naming the prompt's blocks costs time; nothing has changed since the last try
        known = job.known
        table = self._pool.open(known, job.request.salt, max_cached_tokens=job.rows.max_cached_tokens(len(known)))
        try:
            fits = table.try_grow(len(known))
        except BaseException:
            table.close()
            raise
        if not fits:
            table.close()
            self._blocked = (job, self._pool.counts())
            return False
        self._blocked = None
        job.table = table
        job.slot = self._slots.try_take()
        job.computed = job.cached_tokens = table.cached_tokens
        return True

    def _extend_prefix(self, job: Job) -> None:
        """What others have computed since this prompt was admitted, need not be computed again."""
        assert job.table is not None
        limit = job.rows.max_cached_tokens(len(job.known))
        valid = job.table.extend_prefix(job.known, job.computed, max_cached_tokens=limit)
        job.cached_tokens += valid - job.computed
        job.computed = valid

    def _row(self, share: Share) -> StepRow:
        job = share.job
        assert job.slot is not None
        return job.rows.next_row(job.known, job.launched, share.num_tokens, slot=job.slot, blocks=job.blocks)
