"""Twelve bugs of the kind that serving systems have shipped and three of recovery, each as a patch of the present code.

A patch takes a pytest MonkeyPatch and lasts as long as that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import engine
import pytest

from diptych.cluster.router.merge import TokenMerge
from diptych.cluster.router.recovery import Recovery
from diptych.cluster.router.router import Router
from diptych.decode.decision import Decision
from diptych.decode.residents import Residents
from diptych.decode.sequence import IN_TRANSFER, State
from diptych.decode.worker import DecodeWorker
from diptych.kvtransfer import pool as pools
from diptych.kvtransfer.actions import Scatter
from diptych.kvtransfer.messages import ChunkReady, Link, Message
from diptych.kvtransfer.pool import BlockTable
from diptych.kvtransfer.receiver import FetchResult, ReceiverMachine
from diptych.kvtransfer.ring import RingView, SlotRef
from diptych.kvtransfer.sender import SenderMachine
from diptych.prefill.scheduler import Job, PrefillScheduler, Share
from diptych.prefill.worker import PrefillWorker
from diptych.protos.errors import DiptychError, EngineFault
from diptych.protos.ports import Released
from diptych.protos.step import StepPlan
from diptych.protos.types import DecodeOrder, FinishReason, PrefillOrder, Role

Patch = pytest.MonkeyPatch
SMALL_POOL = (8, 4)  # blocks of a prefill engine, tokens of each: one long prompt, or parts of several


def a_reference_is_not_lowered_on_abort(patch: Patch) -> None:
    def drop(self: Residents, sequence: Any) -> None:
        if sequence.state is not State.DRAINING:
            self.close(sequence)
        self._leave(sequence)
        sequence.state = State.DONE

    patch.setattr(Residents, "drop", drop)


def a_block_is_freed_while_a_copy_may_write(patch: Patch) -> None:
    def end(self: DecodeWorker, sequence: Any, reason: FinishReason, error: DiptychError) -> None:
        if sequence.state in {State.DRAINING, State.DONE}:
            return
        self._finish(sequence, reason, error)
        if sequence.state in IN_TRANSFER:
            self._receiver.abort(sequence.key, error)
        if sequence.in_flight:
            self._scheduler.drain(sequence)  # of steps it does think
        else:
            self._forget(sequence)

    patch.setattr(DecodeWorker, "_end", end)


def the_sweep_stops_after_the_first_expiry(patch: Patch) -> None:
    tick = SenderMachine.tick

    def stopping(self: SenderMachine, now: float) -> None:
        if not any(self.counters[name] for name in ("kv_lease_expired_total", "kv_pairs_lost_total")):
            tick(self, now)

    patch.setattr(SenderMachine, "tick", stopping)


def a_second_completion_frees_again(patch: Patch) -> None:
    forget, on_transfer = PrefillWorker._forget, PrefillWorker.on_transfer
    gone: dict[Any, BlockTable] = {}

    def close(self: BlockTable) -> None:
        self._pool._release(self)

    def remembering(self: PrefillWorker, job: Any) -> None:
        if job.table is not None:
            gone[self, job.key] = job.table
        forget(self, job)

    def again(self: PrefillWorker, event: Any) -> None:
        if isinstance(event, Released) and event.key not in self._jobs and (self, event.key) in gone:
            gone[self, event.key].close()
        on_transfer(self, event)

    patch.setattr(BlockTable, "close", close)
    patch.setattr(PrefillWorker, "_forget", remembering)
    patch.setattr(PrefillWorker, "on_transfer", again)


def the_salt_is_missing_from_the_root(patch: Patch) -> None:
    root_name = pools.root_name
    patch.setattr(pools, "root_name", lambda root, salt: root_name(root, b""))


def a_late_completion_is_accepted(patch: Patch) -> None:
    grant, fetched = ReceiverMachine.grant, ReceiverMachine.fetched
    granted: dict[Any, tuple[int, ...]] = {}

    def remembering(self: ReceiverMachine, key: Any, blocks: tuple[int, ...], now: float) -> None:
        granted[key] = blocks
        grant(self, key, blocks, now)

    def late(self: ReceiverMachine, ready: ChunkReady, result: FetchResult, now: float) -> None:
        is_live = self._live(ready.key) is not None
        fetched(self, ready, result, now)
        if not is_live and result is FetchResult.OK and ready.key in granted:
            self._actions.append(Scatter(ready, granted[ready.key], False))

    patch.setattr(ReceiverMachine, "grant", remembering)
    patch.setattr(ReceiverMachine, "fetched", late)


def a_retried_call_allocates_twice(patch: Patch) -> None:
    submit = PrefillWorker.submit

    def forgetful(self: PrefillWorker, order: PrefillOrder | DecodeOrder) -> None:
        if self._jobs.pop(order.request.key, None) is not None:
            self._scheduler.waiting.discard(order.request.key)
            self._scheduler.computing.discard(order.request.key)
        submit(self, order)

    patch.setattr(PrefillWorker, "submit", forgetful)


def a_torn_slot_is_accepted(patch: Patch) -> None:
    def lookup(self: RingView, slot: int) -> None:
        raise AssertionError("nobody looks")

    class Trusting:
        """Equal to whatever is compared with it: the checksum of whatever lies there now."""

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    def read(self: RingView, ref: SlotRef, out: memoryview) -> None:
        start = self._data_at + ref.slot * self._stride
        out[:] = self._map[start : start + ref.size_bytes]

    patch.setattr(RingView, "read", read)
    patch.setattr(RingView, "lookup", lookup)
    patch.setattr("diptych.kvtransfer.fetch.checksum", lambda data: Trusting())


def an_old_epoch_is_accepted(patch: Patch) -> None:
    def accepting(on_message: Callable[..., None]) -> Callable[..., None]:
        def hear(self: Any, link: Link, message: Message, now: float) -> None:
            present = self._pairs.get(link.engine_id, (link, ""))[0]
            on_message(self, present, message, now)

        return hear

    patch.setattr(ReceiverMachine, "on_message", accepting(ReceiverMachine.on_message))
    patch.setattr(SenderMachine, "on_message", accepting(SenderMachine.on_message))


def a_grant_per_chunk_fills_the_pool(patch: Patch) -> None:
    def try_place(self: PrefillScheduler, job: Job) -> bool:
        known = job.known
        job.table = self._pool.open(known, job.request.salt, max_cached_tokens=len(known) - 1)
        job.slot = self._slots.try_take()
        job.computed = job.cached_tokens = job.table.cached_tokens
        return True

    def plan(self: PrefillScheduler) -> tuple[StepPlan, list[Share]] | None:
        shares: list[Share] = []
        for job in list(self.computing):
            assert job.table is not None
            stop = min(job.launched + self._pool.block_tokens, len(job.known))
            if job.table.try_grow(stop):
                shares.append(Share(job, stop - job.launched))
        if not shares:
            return None
        self._next_step += 1
        return StepPlan(self._next_step, tuple(self._row(share) for share in shares)), shares

    patch.setitem(engine.SHAPES, Role.PREFILL, SMALL_POOL)
    patch.setattr(PrefillScheduler, "_try_place", try_place)
    patch.setattr(PrefillScheduler, "plan", plan)


def a_block_is_named_before_its_commit(patch: Patch) -> None:
    announce = DecodeWorker._announce

    def hasty(self: DecodeWorker, decision: Decision) -> None:
        for sequence in decision.granted:
            assert sequence.table is not None
            sequence.table.commit(sequence.tokens, len(sequence.tokens))
        announce(self, decision)

    patch.setattr(DecodeWorker, "_announce", hasty)


def a_moved_request_repeats_a_token(patch: Patch) -> None:
    resumed, merge = Router._resumed, TokenMerge.__init__

    def shorter(self: Router, work: Any) -> Any:
        request = resumed(self, work)
        return replace(request, resume=request.resume[:-1])

    def begin(self: TokenMerge, *, emitted: Sequence[int] = (), **rest: Any) -> None:
        merge(self, emitted=emitted[:-1], **rest)

    patch.setattr(Router, "_resumed", shorter)
    patch.setattr(TokenMerge, "__init__", begin)


def silence_convicts(patch: Patch) -> None:
    async def at_once(self: Recovery, work: Any, incidents: Any) -> None:
        pass

    patch.setattr(Recovery, "_find_out", at_once)
    patch.setattr(Recovery, "_is_strike", lambda self, strike: True)


def silence_uses_up_the_moves(patch: Patch) -> None:
    patch.setattr(Recovery, "_num_counted", lambda self, failures, *, unknown=False: len(failures))


def a_step_that_raises_is_the_answer(patch: Patch) -> None:
    patch.setattr(EngineFault, "retryable", False)
