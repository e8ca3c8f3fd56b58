"""The decode role of an engine: takes prompts over from prefill engines, or computes them itself, and generates.

ports.Worker, driven by the engine's step thread; deliberately ignorant of threads, sockets, torch and of who asks.
The states and who may leave them are drawn in the README.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as AbstractSequence
from functools import partial
from typing import assert_never

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
from diptych.protos.ports import (
    Clock,
    Closed,
    Committed,
    Emit,
    Failed,
    ReceiveEvent,
    ReceivePort,
    Released,
    SendEvent,
    StepCost,
    WantBlocks,
    WorkerLoad,
)
from diptych.protos.settings import DecodeSettings
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

from .arbiter import Goals, StepBudget
from .decision import Decision, Share
from .scheduler import DecodeScheduler
from .sequence import IN_TRANSFER, Sequence, State

log = logging.getLogger(__name__)


class DecodeWorker:
    """See ports.Worker. A sequence that ends while the receiver or a step writes keeps its blocks until that is done.

    With a runner of depth 2 a step is launched before the one before it is collected: its rows take their tokens from
    the slots, and whatever the collected step ends has one row too many under way, which nobody looks at.
    """

    role = Role.DECODE

    def __init__(
        self,
        *,
        settings: DecodeSettings,
        pipeline: StepPipeline,
        pool: BlockPool,
        slots: SlotPool,
        receiver: ReceivePort,
        emit: Emit,
        clock: Clock,
        max_context_tokens: int,
    ) -> None:
        self._pipeline = pipeline
        self._pool = pool
        self._receiver = receiver
        self._clock = clock
        self._max_context_tokens = max_context_tokens
        self._max_sequences = settings.max_running + settings.max_waiting
        step_tokens = min(settings.step_tokens, pipeline.runner.max_step_tokens)
        self._scheduler = DecodeScheduler(
            pool=pool,
            slots=slots,
            max_running=settings.max_running,
            step_tokens=step_tokens,
            watermark=settings.watermark,
            budget=_budget(settings, step_tokens, pipeline.runner.cost),
            max_runs=pipeline.runner.max_runs,
        )
        self._sequences: dict[TransferKey, Sequence] = {}  # every state but DONE
        totals = (
            "steps",
            "step_faults",
            "row_faults",
            "tokens",
            "generated_tokens",
            "forced_tokens",
            "preemptions",
            "local_prefills",
        )
        self._books = Books(self.role, emit, clock, (*totals, "transfer_failures"))

    def submit(self, order: PrefillOrder | DecodeOrder) -> None:
        """Take a decode order. A key that is in work already is ignored: its first order will end."""
        assert isinstance(order, DecodeOrder)
        request, key = order.request, order.request.key
        earlier = self._sequences.get(key)
        if earlier is not None and earlier.state is not State.DRAINING:
            log.warning("%s: a second decode order for a request in work is ignored", key)
            return
        try:
            sequence = Sequence(
                order,
                *self._books.begin(order),
                tokens=list(request.known),
                state=State.WAITING,
                limit=min(len(request.prompt) + request.sampling.max_tokens, self._max_context_tokens),
                since=self._clock(),
            )
        except BaseException as exc:
            self._books.refuse(key, self._books.fault(exc, key, "order"))
        else:
            self._take(sequence, is_again=earlier is not None)
        self._books.flush()

    def _take(self, sequence: Sequence, *, is_again: bool) -> None:
        """Into the line, or wait for its KV; or end it."""
        order, request, key = sequence.order, sequence.request, sequence.key
        try:
            error = InvalidRequest(f"{key} was used before", "key") if is_again else self._refusal(request)
        except BaseException as exc:
            error = self._books.fault(exc, key, "order")
        if error is not None:
            self._finish(sequence, FinishReason.ERROR, error)
            return
        self._sequences[key] = sequence
        try:
            self._books.deadlines.add(key, request.deadline)
            if order.prefill is None:
                self._compute_here(sequence)
            else:
                have_tokens = self._scheduler.expect(sequence)
                self._receiver.expect(key, order.prefill, sequence.num_known, have_tokens)
        except BaseException as exc:
            self._raised(sequence, exc, "order")

    def _raised(self, sequence: Sequence, exc: BaseException, stage: str) -> None:
        """The barrier: what raised in one sequence's work ends that sequence alone."""
        self._end(sequence, FinishReason.ERROR, self._books.fault(exc, sequence.key, stage))

    def cancel(self, key: TransferKey) -> None:
        """End a sequence in any state; its blocks follow when the receiver lets go of them."""
        if (sequence := self._sequences.get(key)) is not None:
            self._end(sequence, FinishReason.CANCELLED, Cancelled("the request was cancelled"))
        self._books.flush()

    def on_transfer(self, event: SendEvent | ReceiveEvent) -> None:
        """The receiver asks for blocks, or a transfer ended."""
        assert not isinstance(event, Released)
        sequence = self._sequences.get(event.key)
        if sequence is None:
            return
        if sequence.state is State.DRAINING and not (isinstance(event, WantBlocks) or sequence.in_flight):
            self._forget(sequence)
        elif sequence.state in IN_TRANSFER:
            try:
                self._on_transfer(sequence, event)
            except BaseException as exc:
                if sequence.state in IN_TRANSFER and not isinstance(event, WantBlocks):
                    # The transfer is over: nobody will say once more that nothing writes into the blocks.
                    self._finish(sequence, FinishReason.ERROR, self._books.fault(exc, sequence.key, "transfer"))
                    self._forget(sequence)
                else:
                    self._raised(sequence, exc, "transfer")
        self._books.flush()

    def step(self) -> bool:
        """See ports.Worker."""
        for key in self._books.deadlines.pop_due(self._clock()):
            error = DeadlineExceeded("the request's deadline passed before its answer was complete")
            self._end(self._sequences[key], FinishReason.ERROR, error)
        plan, decision = self._scheduler.decide(self._clock())
        self._announce(decision)
        collected = False
        if decision.must_settle:
            collected = self._pipeline.settle(leave=0)
            plan, decision = self._scheduler.decide(self._clock())
            assert not decision.must_settle
            self._announce(decision)
        if plan is not None:
            self._launch(plan, decision.shares)
            self._pipeline.settle(leave=self._pipeline.runner.depth - 1)
        elif self._scheduler.num_in_flight:
            collected = self._pipeline.settle(leave=self._pipeline.num_outstanding - 1)
        self._books.flush()
        return plan is not None or collected

    def _launch(self, plan: StepPlan, shares: list[Share]) -> None:
        self._books.totals["steps"] += 1
        self._books.totals["tokens"] += plan.num_tokens
        self._pipeline.launch(plan, partial(self._done, plan, shares, self._clock()))
        for sequence, why in self._scheduler.launched(shares):
            self._raised(sequence, why, "part of a step")

    def _done(self, plan: StepPlan, shares: list[Share], began: float, outcome: StepResult | EngineFault) -> None:
        self._books.totals["step_faults"] += isinstance(outcome, EngineFault)
        for at, share in enumerate(shares):
            sequence = share.sequence
            is_news = self._scheduler.collected(share)
            if sequence.state is State.DRAINING:  # it ended while this was under way
                if not sequence.in_flight:
                    self._forget(sequence)
            elif isinstance(outcome, EngineFault):
                self._end(sequence, FinishReason.ERROR, outcome)
            else:
                try:
                    self._computed(share, plan, outcome, at, is_news=is_news)
                except BaseException as exc:
                    self._raised(sequence, exc, "result")
        self._books.flush()  # now: another worker of the engine may have called
        self._books.step_seconds += self._pipeline.seconds_since(began)

    def next_wake(self) -> float | None:
        """The earliest deadline."""
        return self._books.deadlines.earliest()

    def load(self) -> WorkerLoad:
        """Sequences with a seat, and all others that have not ended."""
        running = self._scheduler.num_running
        return WorkerLoad(running=running, waiting=self._books.num_live - running)

    def counters(self) -> dict[str, float]:
        """Totals since the start, and as of now decode_running, decode_kv_tokens (held by those that run) and
        decode_queued_tokens (of prompts to be computed here). `tokens` are all computed ones, in `step_seconds`.
        """
        counters = self._books.counters()
        counters["decode_running"] = float(self._scheduler.num_running)
        counters["decode_kv_tokens"] = float(self._scheduler.num_kv_tokens)
        counters["decode_queued_tokens"] = float(self._scheduler.num_queued_tokens)
        return counters

    def _refusal(self, request: GenerateRequest) -> DiptychError | None:
        # This one included; of ended ones that drain there are no more than the pool has blocks for.
        if self._books.num_live > self._max_sequences:
            return Overloaded("the decode engine's queue is full")
        if error := refusal(request, self._max_context_tokens, self._pipeline.runner.vocab_size):
            return error
        # Whoever generates more than one token needs KV for that one as well.
        num_tokens = len(request.known) + (request.sampling.max_tokens > len(request.resume) + 1)
        if not self._pool.can_hold(num_tokens):
            return NoBlocks(f"the decode engine's KV pool cannot hold {num_tokens} tokens")
        return None

    def _compute_here(self, sequence: Sequence) -> None:
        self._books.totals["local_prefills"] += 1
        sequence.timer.enter("queue", self._clock())
        self._scheduler.wait(sequence)

    def _on_transfer(self, sequence: Sequence, event: WantBlocks | Committed | Failed | Closed) -> None:
        """An event of a transfer that somebody still waits for."""
        match event:
            case WantBlocks():
                if sequence.state is State.FETCHING:
                    self._scheduler.want(sequence)
            case Committed():
                self._committed(sequence, event)
            case Failed():
                self._failed(sequence, event.error)
            case Closed():
                self._failed(sequence, TransferError("the transfer was closed though nobody asked for it"))
            case _:
                assert_never(event)

    def _committed(self, sequence: Sequence, event: Committed) -> None:
        sequence.transfer_bytes, sequence.transport = event.size_bytes, event.transport
        if event.final:
            # The prefill engine told the client how it ended; this end is for the books only.
            sequence.tokens.append(event.first_token)
            self._finish(sequence, FinishReason.CANCELLED)
            self._forget(sequence)
        elif self._scheduler.arrived(sequence):
            sequence.timer.enter("queue", self._clock())
            sequence.tokens.append(event.first_token)
            if not self._finish_if_complete(sequence, event.first_token) and sequence.rows.guide is not None:
                position = len(sequence.tokens) - 1
                self._take_forced(sequence, sequence.rows.guide.accept(position, event.first_token))
        else:
            self._failed(sequence, TransferError("the transfer ended before its blocks were granted"))

    def _failed(self, sequence: Sequence, error: DiptychError) -> None:
        """The transfer is over and brought nothing."""
        self._books.totals["transfer_failures"] += 1
        log.info("%s: no KV from the prefill engine: %s", sequence.key, error)
        if sequence.order.allow_local_prefill:
            self._compute_here(sequence)
        else:
            self._finish(sequence, FinishReason.ERROR, error)
            self._forget(sequence)

    def _announce(self, decision: Decision) -> None:
        """Tell the receiver, the clocks and the clients what the scheduler decided."""
        now = self._clock()
        for sequence in decision.granted:
            sequence.timer.enter("transfer", now)
            try:
                self._receiver.grant(sequence.key, tuple(sequence.blocks))
            except BaseException as exc:
                self._raised(sequence, exc, "transfer")
        for sequence in decision.unpinned:
            self._unpinned(sequence)
        self._books.totals["preemptions"] += len(decision.preempted)
        for sequence in (*decision.started, *decision.unseated, *decision.preempted):
            if sequence.state is not State.RUNNING:
                sequence.timer.enter("queue", now)
            elif sequence.num_new and (sequence.missing == 1 or sequence.is_forced):
                sequence.timer.enter("decode", now)
            else:
                sequence.timer.enter("prefill", now)
                if not sequence.num_new:
                    self._books.out.started.append(sequence.key)
        for sequence, why in decision.failed:
            self._raised(sequence, why, "part of a step")
        for sequence in decision.impossible:
            error = NoBlocks(f"the decode engine's KV pool cannot hold {len(sequence.tokens)} tokens")
            self._end(sequence, FinishReason.ERROR, error)

    def _unpinned(self, sequence: Sequence) -> None:
        error = NoBlocks("the cached prefix of the prompt had to make room")
        self._books.totals["transfer_failures"] += 1
        self._receiver.abort(sequence.key, error)
        if sequence.order.allow_local_prefill:
            self._books.totals["local_prefills"] += 1
        else:
            self._end(sequence, FinishReason.ERROR, error)

    def _computed(self, share: Share, plan: StepPlan, result: StepResult, at: int, *, is_news: bool) -> None:
        """`is_news`: it sampled a token that was not known before."""
        sequence, token = share.sequence, result.tokens[at] if is_news else None
        if at in result.faults:
            self._books.totals["row_faults"] += at not in result.ruled_out
            self._end(sequence, FinishReason.ERROR, row_fault(plan, result, at))
            return
        self._scheduler.advance(share, token)
        if at in result.prompt_logprobs:
            told = sequence.rows.tell_prompt(plan.rows[at], result.prompt_logprobs[at])
            if told is not None:
                self._books.out.prompt_logprobs.append(told)
        if token is None:
            return
        if share.num_tokens > 1 or sequence.num_new == 1:
            sequence.timer.enter("decode", self._clock())
        self._books.totals["generated_tokens"] += 1
        self._books.out.add(sequence.key, sequence.num_generated - 1, token, result.logprobs.get(at))
        if not self._finish_if_complete(sequence, token):
            self._take_forced(sequence, result.forced.get(at, ()))

    def _take_forced(self, sequence: Sequence, tokens: AbstractSequence[int]) -> None:
        """Tokens that the guide is certain of are the answer's at once; later steps compute their KV."""
        for token in tokens:
            self._scheduler.foretell(sequence, token)
            self._books.totals["generated_tokens"] += 1
            self._books.totals["forced_tokens"] += 1
            self._books.out.add(sequence.key, sequence.num_generated - 1, token)
            if self._finish_if_complete(sequence, token):
                break

    def _finish_if_complete(self, sequence: Sequence, token: int) -> bool:
        reason = finish_reason(
            sequence.request.sampling,
            token,
            num_generated=sequence.num_generated,
            num_prompt=sequence.num_prompt,
            max_context_tokens=self._max_context_tokens,
        )
        if reason is not None:
            self._finish(sequence, reason)
            self._let_go(sequence)
        return reason is not None

    def _end(self, sequence: Sequence, reason: FinishReason, error: DiptychError) -> None:
        """End a sequence from the outside, in any state. What has ended stays as it ended."""
        if sequence.state in {State.DRAINING, State.DONE}:
            return
        self._finish(sequence, reason, error)
        if sequence.state in IN_TRANSFER:
            self._receiver.abort(sequence.key, error)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Of an ended sequence: now, or when nobody writes into its blocks any more."""
        if sequence.state is State.GRANTED or sequence.in_flight:
            self._scheduler.drain(sequence)
        else:
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.drop(sequence)
        del self._sequences[sequence.key]

    def _finish(self, sequence: Sequence, reason: FinishReason, error: DiptychError | None = None) -> None:
        self._books.end(
            Finish(
                key=sequence.key,
                role=self.role,
                reason=reason,
                num_tokens=sequence.num_generated,
                cached_tokens=sequence.cached_tokens or 0,
                transfer_bytes=sequence.transfer_bytes,
                transport=sequence.transport,
                preemptions=sequence.preemptions,
            ),
            sequence.timer,
            error,
        )


def _budget(settings: DecodeSettings, step_tokens: int, cost: StepCost | None) -> StepBudget | None:
    """None: prompts get all that decoding leaves, for a pace of throughput and where nobody knows what steps cost."""
    if cost is None or settings.pace == "throughput":
        return None
    goals = Goals(itl_target_s=settings.itl_target_s, itl_limit_s=settings.itl_limit_s)
    return StepBudget(step_tokens=step_tokens, cost=cost, goals=goals)
