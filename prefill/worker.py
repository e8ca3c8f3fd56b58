"""The prefill role of an engine: computes prompts, emits token 0, keeps the KV until the sender has handed it over.

ports.Worker, driven by the engine's step thread; deliberately ignorant of threads, sockets, torch and of who asks.
The states and who may leave them are drawn in the README.
"""

from __future__ import annotations

import logging
from functools import partial

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.errors import (
    Cancelled,
    DeadlineExceeded,
    DiptychError,
    EngineFault,
    InvalidRequest,
    NoBlocks,
    Overloaded,
    TransferError,
)
from diptych.protos.lifecycle import Books, finish_reason, refusal, row_fault
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Clock, Emit, ReceiveEvent, Released, SendEvent, SendPort, WorkerLoad
from diptych.protos.settings import PrefillSettings
from diptych.protos.step import SlotPool, StepPlan, StepResult
from diptych.protos.types import (
    DecodeOrder,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    Role,
    TransferKey,
)

from .scheduler import Job, PrefillScheduler, Share, State

# Ended jobs whose peers have not let go of them. A silent peer is given up after 1.2 s: so many clients may leave then.
MAX_DRAINING = 2048

log = logging.getLogger(__name__)


class PrefillWorker:
    """See ports.Worker. After a job's Finish its blocks stay until the sender's `Released`, which is sure to come, and
    until no step writes into them. With a runner of depth 2 a step is launched before the one before it is collected.
    """

    role = Role.PREFILL

    def __init__(
        self,
        *,
        settings: PrefillSettings,
        pipeline: StepPipeline,
        pool: BlockPool,
        slots: SlotPool,
        sender: SendPort,
        emit: Emit,
        clock: Clock,
        max_context_tokens: int,
    ) -> None:
        self._pipeline = pipeline
        self._pool = pool
        self._sender = sender
        self._clock = clock
        self._max_context_tokens = max_context_tokens
        self._max_jobs = settings.max_running + settings.max_waiting
        self._scheduler = PrefillScheduler(
            pool=pool,
            slots=slots,
            max_running=settings.max_running,
            step_tokens=min(settings.step_tokens, pipeline.runner.max_step_tokens),
        )
        self._jobs: dict[TransferKey, Job] = {}  # every state but DONE
        self._books = Books(self.role, emit, clock, ("steps", "step_faults", "row_faults", "tokens"))

    def submit(self, order: PrefillOrder | DecodeOrder) -> None:
        """Take a prefill order. A key that is in work already is ignored: its first order will end."""
        assert isinstance(order, PrefillOrder)
        key = order.request.key
        earlier = self._jobs.get(key)
        if earlier is not None and earlier.state is not State.DRAINING:
            log.warning("%s: a second prefill order for a request in work is ignored", key)
            return
        try:
            job = Job(order, *self._books.begin(order))
        except BaseException as exc:
            error: DiptychError | None = self._books.fault(exc, key, "order")
            assert error is not None
            self._books.refuse(key, error)
        else:
            error = self._taken(job, is_again=earlier is not None)
        if error is not None and earlier is None:
            self._sender.abort(key, error)  # never opened: tells the decode engine not to wait
        self._books.flush()

    def _taken(self, job: Job, *, is_again: bool) -> DiptychError | None:
        """Take `job` into the line, or end it and tell why."""
        key, request = job.key, job.request
        try:
            error = InvalidRequest(f"{key} was used before", "key") if is_again else self._refusal(request)
        except BaseException as exc:
            error = self._books.fault(exc, key, "order")
        if error is not None:
            self._finish(job, FinishReason.ERROR, error)
            return error
        self._jobs[key] = job
        try:
            self._books.deadlines.add(key, request.deadline)
            self._scheduler.add(job)
            # At once, not when its turn comes: the decode engine's Expect must find it however long the queue is.
            self._sender.open(key, job.order.decode, len(job.known))
        except BaseException as exc:  # no blocks were told to the sender, which will never say that it let go of them
            error = self._books.fault(exc, key, "order")
            self._finish(job, FinishReason.ERROR, error)
            self._forget(job)
        return error

    def _failed(self, job: Job, exc: BaseException, stage: str) -> None:
        """The barrier: what raised in one job's work ends that job alone."""
        self._end(job, FinishReason.ERROR, self._books.fault(exc, job.key, stage))

    def cancel(self, key: TransferKey) -> None:
        """End a job in any state; its blocks follow when the sender lets go of them."""
        if (job := self._jobs.get(key)) is not None:
            self._end(job, FinishReason.CANCELLED, Cancelled("the request was cancelled"))
        self._books.flush()

    def on_transfer(self, event: SendEvent | ReceiveEvent) -> None:
        """The sender released a job's blocks."""
        assert isinstance(event, Released)
        job = self._jobs.get(event.key)
        if job is None:
            return
        if job.state is State.SENDING and event.error is None:
            self._finish(job, FinishReason.HANDOFF, released=event)
        elif job.state is not State.DRAINING:
            error = event.error or TransferError("the transfer ended before the prompt was computed")
            reason = FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR
            self._finish(job, reason, error, event)
        if job.in_flight:
            self._scheduler.stop(job)
            job.state, job.released = State.DRAINING, True
        else:
            self._forget(job)
        self._books.flush()

    def step(self) -> bool:
        """See ports.Worker."""
        for key in self._books.deadlines.pop_due(self._clock()):
            error = DeadlineExceeded("the request's deadline passed before its prompt was handed over")
            self._end(self._jobs[key], FinishReason.ERROR, error)
        for job in self._scheduler.admit():
            try:
                self._start(job)
            except BaseException as exc:
                self._failed(job, exc, "start")
        planned = self._scheduler.plan()
        self._end_failed()
        collected = False
        if planned is not None:
            self._launch(*planned)
            self._pipeline.settle(leave=self._pipeline.runner.depth - 1)
        elif self._scheduler.num_in_flight:
            collected = self._pipeline.settle(leave=self._pipeline.num_outstanding - 1)
        self._books.flush()
        return planned is not None or collected

    def _launch(self, plan: StepPlan, shares: list[Share]) -> None:
        self._books.totals["steps"] += 1
        self._books.totals["tokens"] += plan.num_tokens
        self._pipeline.launch(plan, partial(self._done, plan, shares, self._clock()))
        self._scheduler.launched(shares)
        self._end_failed()

    def _end_failed(self) -> None:
        for job, exc in self._scheduler.take_failed():
            self._failed(job, exc, "part of a step")

    def _done(self, plan: StepPlan, shares: list[Share], began: float, outcome: StepResult | EngineFault) -> None:
        self._books.totals["step_faults"] += isinstance(outcome, EngineFault)
        for at, share in enumerate(shares):
            job = share.job
            self._scheduler.collected(share)
            if job.state is State.DRAINING:  # it ended while this was under way
                if not job.in_flight:
                    self._drained(job)
            elif isinstance(outcome, EngineFault):
                self._end(job, FinishReason.ERROR, outcome)
            else:
                try:
                    self._computed(share, plan, outcome, at)
                except BaseException as exc:
                    self._failed(job, exc, "result")
        self._books.flush()  # now: another worker of the engine may have called
        self._books.step_seconds += self._pipeline.seconds_since(began)

    def next_wake(self) -> float | None:
        """The earliest deadline."""
        return self._books.deadlines.earliest()

    def load(self) -> WorkerLoad:
        """Jobs that compute or send, and jobs that wait. Ended ones whose blocks are still read count as neither."""
        waiting = len(self._scheduler.waiting)
        return WorkerLoad(running=self._books.num_live - waiting, waiting=waiting)

    def counters(self) -> dict[str, float]:
        """Totals since the start, and prefill_queued_tokens as of now. `tokens` were computed in `step_seconds`."""
        counters = self._books.counters()
        counters["prefill_queued_tokens"] = float(self._scheduler.num_queued_tokens)
        return counters

    def _refusal(self, request: GenerateRequest) -> DiptychError | None:
        live = self._books.num_live  # this one included, which is no job yet
        if live > self._max_jobs or len(self._jobs) + 1 - live > MAX_DRAINING:
            return Overloaded("the prefill engine's queue is full")
        if error := refusal(request, self._max_context_tokens, self._pipeline.runner.vocab_size):
            return error
        if not self._pool.can_hold(len(request.known)):
            return NoBlocks(f"the prefill engine's KV pool cannot hold a prompt of {len(request.known)} tokens")
        return None

    def _start(self, job: Job) -> None:
        job.state = State.RUNNING
        job.timer.enter("prefill", self._clock())
        self._books.out.started.append(job.key)
        if job.computed:
            self._sender.computed(job.key, job.computed, tuple(job.blocks))

    def _computed(self, share: Share, plan: StepPlan, result: StepResult, at: int) -> None:
        job, token = share.job, result.tokens[at]
        if at in result.faults:
            self._books.totals["row_faults"] += at not in result.ruled_out
            self._end(job, FinishReason.ERROR, row_fault(plan, result, at))
            return
        self._scheduler.advance(share)
        if at in result.prompt_logprobs:
            told = job.rows.tell_prompt(plan.rows[at], result.prompt_logprobs[at])
            if told is not None:
                self._books.out.prompt_logprobs.append(told)
        if token is None:
            self._sender.computed(job.key, job.computed, tuple(job.blocks))
            return
        job.num_generated += 1
        job.state = State.SENDING
        job.timer.enter("transfer", self._clock())
        self._books.out.add(job.key, job.num_generated - 1, token, result.logprobs.get(at))
        reason = finish_reason(
            job.request.sampling,
            token,
            num_generated=job.num_generated,
            num_prompt=len(job.request.prompt),
            max_context_tokens=self._max_context_tokens,
        )
        if reason is None:
            self._sender.computed(job.key, job.computed, tuple(job.blocks))
            self._sender.finish(job.key, token, final=False)
        else:
            # The last chunk is not announced: nobody needs it.
            self._sender.finish(job.key, token, final=True)
            self._finish(job, reason)
            job.state = State.DRAINING

    def _end(self, job: Job, reason: FinishReason, error: DiptychError) -> None:
        """End a job from the outside, in any state. What has ended stays as it ended."""
        if job.state is State.DRAINING:
            return
        self._scheduler.stop(job)
        self._finish(job, reason, error)
        job.state = State.DRAINING
        self._sender.abort(job.key, error)

    def _drained(self, job: Job) -> None:
        """No step writes into the blocks of an ended job any more."""
        if job.released:
            self._forget(job)
        else:
            self._scheduler.stop(job)

    def _forget(self, job: Job) -> None:
        self._scheduler.stop(job)
        self._scheduler.close(job)
        job.state = State.DONE
        del self._jobs[job.key]

    def _finish(
        self, job: Job, reason: FinishReason, error: DiptychError | None = None, released: Released | None = None
    ) -> None:
        self._books.end(
            Finish(
                key=job.key,
                role=self.role,
                reason=reason,
                num_tokens=job.num_generated,
                cached_tokens=job.cached_tokens,
                transfer_bytes=released.size_bytes if released else 0,
                transport=released.transport if released else "",
            ),
            job.timer,
            error,
        )
