"""Which prompt computes how many of its tokens in the next step. First come, first served; called by the worker only.

Knows blocks, slots and tokens; knows nothing of transfers, clocks and what is told to anyone.

    waiting --admit: blocks of the whole prompt, a slot--> computing --plan/advance, chunk by chunk--> leave
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.protos.lifecycle import StageTimer, next_row
from diptych.protos.step import SlotPool, StepPlan, StepRow
from diptych.protos.types import GenerateRequest, PoolCounts, PrefillOrder, TransferKey


class State(Enum):
    """Where a prompt is; the picture is in the README."""

    WAITING = "waiting"  # holds nothing
    RUNNING = "running"  # blocks, a slot, an open transfer
    SENDING = "sending"  # token 0 is out; blocks and the transfer
    DRAINING = "draining"  # its Finish is out; blocks that the sender may still read
    DONE = "done"


@dataclass(slots=True, eq=False)
class Job:
    """One prefill order on its way."""

    order: PrefillOrder
    timer: StageTimer
    state: State = State.WAITING
    table: BlockTable | None = None  # set by admit, until the sender has released the blocks
    slot: int | None = None  # set by admit, until the prompt is computed
    computed: int = 0  # tokens whose KV is in the table
    num_generated: int = 0
    cached_tokens: int = 0

    @property
    def request(self) -> GenerateRequest:
        """What was asked for."""
        return self.order.request

    @property
    def key(self) -> TransferKey:
        """The request's name."""
        return self.order.request.key

    @property
    def blocks(self) -> Sequence[int]:
        """Of the prompt's positions, in order."""
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
        self.waiting: OrderedDict[TransferKey, Job] = OrderedDict()
        self.computing: dict[TransferKey, Job] = {}  # in order of admission
        self.num_holding = 0  # jobs with a table, those whose KV is on its way included
        self._pool = pool
        self._slots = slots
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._next_step = 0
        self._blocked: tuple[Job, PoolCounts] | None = None  # the head that did not fit, and how the pool was then

    def add(self, job: Job) -> None:
        """Join the end of the line."""
        self.waiting[job.key] = job

    def admit(self) -> list[Job]:
        """Take jobs from the head of the line while they fit. Nobody overtakes a head that does not fit."""
        admitted: list[Job] = []
        while self.waiting and self.num_holding < self._max_running and self._slots.num_free:
            job = next(iter(self.waiting.values()))
            if not self._try_place(job):
                break
            del self.waiting[job.key]
            self.computing[job.key] = job
            self.num_holding += 1
            admitted.append(job)
        return admitted

    def plan(self) -> tuple[StepPlan, list[Share]] | None:
        """The next step: the oldest jobs first, each as much of its prompt as the budget allows. None: no work."""
        left = self._step_tokens
        shares: list[Share] = []
        for job in self.computing.values():
            if left == 0:
                break
            share = Share(job, min(left, len(job.request.prompt) - job.computed))
            shares.append(share)
            left -= share.num_tokens
        if not shares:
            return None
        self._next_step += 1
        return StepPlan(self._next_step, tuple(self._row(share) for share in shares)), shares

    def advance(self, share: Share) -> None:
        """The share is computed: its full blocks can be found by others from now on."""
        job = share.job
        assert job.table is not None
        job.computed += share.num_tokens
        job.table.commit(job.request.prompt, job.computed)
        if job.computed == len(job.request.prompt):
            self.stop(job)

    def stop(self, job: Job) -> None:
        """The job computes nothing any more: its slot is free, its blocks stay. Leaves the line if it still waits."""
        self.waiting.pop(job.key, None)
        self.computing.pop(job.key, None)
        if job.slot is not None:
            self._slots.give(job.slot)
            job.slot = None

    def close(self, job: Job) -> None:
        """Nobody computes with or reads the job's blocks any more."""
        if job.table is not None:
            job.table.close()
            job.table = None
            self.num_holding -= 1

    def _try_place(self, job: Job) -> bool:
        if self._blocked == (job, self._pool.counts()):
            return False  # naming the prompt's blocks costs time; nothing has changed since the last try
        prompt = job.request.prompt
        # One token at least is computed, so that there is something to sample from.
        table = self._pool.open(prompt, job.request.salt, max_cached_tokens=len(prompt) - 1)
        if not table.try_grow(len(prompt)):
            table.close()
            self._blocked = (job, self._pool.counts())
            return False
        self._blocked = None
        job.table = table
        job.slot = self._slots.try_take()
        job.computed = job.cached_tokens = table.cached_tokens
        return True

    def _row(self, share: Share) -> StepRow:
        job = share.job
        assert job.slot is not None
        request = job.request
        return next_row(
            request.sampling, request.prompt, job.computed, share.num_tokens, slot=job.slot, blocks=job.blocks
        )
