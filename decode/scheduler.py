"""Which sequence gets blocks, a seat and tokens of the next step. Called by the worker only.

    FETCHING -> line -> GRANTED -> ready -> running        KV comes from a prefill engine
                line ------------------> running           KV is computed here: local prompts, preempted sequences

One line for all who need blocks, first come, first served; preempted sequences go to its head. A seat is a place in the
steps. Knows nothing of ports, clocks and finishes: it reports what the worker must tell to others.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.lifecycle import next_row
from diptych.protos.step import SlotPool, StepPlan, StepRow
from diptych.protos.types import PoolCounts, TransferKey

from .sequence import IN_TRANSFER, Sequence, State


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step."""

    sequence: Sequence
    num_tokens: int


@dataclass(slots=True)
class Decision:
    """What one round decided. The scheduler has done its part; the worker tells the others."""

    shares: list[Share] = field(default_factory=list)
    granted: list[Sequence] = field(default_factory=list)  # the receiver may write into their blocks
    started: list[Sequence] = field(default_factory=list)  # took a seat, to compute here or to go on
    preempted: list[Sequence] = field(default_factory=list)  # lost their blocks, wait at the head of the line
    # Lost the cached prefix that their transfer builds on; the worker ends those that may not be computed here.
    unpinned: list[Sequence] = field(default_factory=list)
    impossible: list[Sequence] = field(default_factory=list)  # grew beyond the whole pool; the worker ends them


class DecodeScheduler:
    """At most `max_running` sequences and `step_tokens` tokens in a step."""

    def __init__(self, *, pool: BlockPool, slots: SlotPool, max_running: int, step_tokens: int) -> None:
        self.fetching: dict[TransferKey, Sequence] = {}  # no blocks granted yet: FETCHING, and WANTING in line
        self.granted: dict[TransferKey, Sequence] = {}  # the receiver may write: GRANTED, DRAINING
        self.line: OrderedDict[TransferKey, Sequence] = OrderedDict()  # WANTING, WAITING
        self.ready: dict[TransferKey, Sequence] = {}
        self.running: dict[TransferKey, Sequence] = {}
        self._pool = pool
        self._slots = slots
        # A decoding sequence takes one token of each step: with no more seats than tokens, all of them run in every
        # step, and a prompt that holds a seat is sure of at least one token.
        self._seats = min(max_running, step_tokens)
        # A few sequences more than seats may hold blocks, so that a seat that becomes free finds a successor.
        self._max_holding = self._seats + max(1, self._seats // 8)
        self._step_tokens = step_tokens
        # New sequences leave this many blocks for the growth of those that run.
        self._watermark = max(1, pool.num_blocks // 100)
        self._next_step = 0
        self._blocked: tuple[Sequence, PoolCounts] | None = None  # the local head that did not fit, and the pool then

    # ---- what the worker reports ------------------------------------------------------------------

    def expect(self, sequence: Sequence) -> int:
        """A transfer will bring its KV. Returns how many tokens of the prompt are cached here, now pinned."""
        request = sequence.request
        sequence.table = self._pool.open(request.prompt, request.salt, max_cached_tokens=len(request.prompt))
        sequence.cached_tokens = sequence.table.cached_tokens
        sequence.state = State.FETCHING
        self.fetching[sequence.key] = sequence
        return sequence.cached_tokens

    def want(self, sequence: Sequence) -> None:
        """Its KV is ready over there: join the line for blocks."""
        assert sequence.state is State.FETCHING
        sequence.state = State.WANTING
        self.line[sequence.key] = sequence

    def arrived(self, sequence: Sequence) -> bool:
        """The prompt's KV is in its blocks. False: it cannot be, for it has no such blocks."""
        assert sequence.table is not None
        if len(sequence.blocks) * self._pool.block_tokens < sequence.num_prompt:
            return False
        self._leave(sequence)
        sequence.table.commit(sequence.request.prompt, sequence.num_prompt)
        sequence.computed = sequence.num_prompt
        sequence.state = State.READY
        self.ready[sequence.key] = sequence
        return True

    def wait(self, sequence: Sequence) -> None:
        """Compute it here, from what the cache still has: keeps its place in the line, else joins its end."""
        if sequence.state in IN_TRANSFER:
            sequence.cached_tokens = None  # the transfer's prefix; what is found now counts
        self._close(sequence)
        for holder in (self.fetching, self.granted, self.ready, self.running):
            holder.pop(sequence.key, None)
        sequence.state = State.WAITING
        self.line.setdefault(sequence.key, sequence)

    def drain(self, sequence: Sequence) -> None:
        """It has ended, but the receiver may still write into its blocks."""
        assert sequence.state is State.GRANTED
        sequence.state = State.DRAINING

    def drop(self, sequence: Sequence) -> None:
        """Nothing computes with or writes into its blocks any more."""
        self._close(sequence)
        self._leave(sequence)
        sequence.state = State.DONE

    def advance(self, share: Share, token: int | None) -> None:
        """The share is computed, and `token` sampled if it reached the last known one."""
        sequence, size = share.sequence, self._pool.block_tokens
        assert sequence.table is not None
        before = sequence.computed // size
        sequence.computed += share.num_tokens
        if sequence.computed // size > before:
            sequence.table.commit(sequence.tokens, sequence.computed)
        if token is not None:
            sequence.tokens.append(token)

    # ---- a round ----------------------------------------------------------------------------------

    def decide(self) -> tuple[StepPlan | None, Decision]:
        """Who runs in the next step, who gets blocks, who gives way."""
        decision = Decision()
        while True:
            changes = len(decision.preempted)
            self._seat_ready(decision)
            self._share_decoding(decision)
            self._admit(decision)
            self._share_prompts(decision)
            # Who lost its blocks without helping anybody may have left its seat to one who is ready: look again.
            if decision.shares or len(decision.preempted) == changes:
                break
        if not decision.shares:
            return None, decision
        self._next_step += 1
        rows = tuple(self._row(share) for share in decision.shares)
        return StepPlan(self._next_step, rows), decision

    def _seat_ready(self, decision: Decision) -> None:
        for sequence in list(self.ready.values()):
            if len(self.running) >= self._seats or (slot := self._slots.try_take()) is None:
                return
            del self.ready[sequence.key]
            self._seat(sequence, slot, decision)

    def _seat(self, sequence: Sequence, slot: int, decision: Decision) -> None:
        sequence.slot = slot
        sequence.state = State.RUNNING
        self.running[sequence.key] = sequence
        decision.started.append(sequence)

    def _share_decoding(self, decision: Decision) -> None:
        # The oldest first: whoever gives way to a sequence is younger and has no share yet.
        for sequence in sorted(self.running.values(), key=lambda one: one.ticket):
            if sequence.state is State.RUNNING and sequence.missing == 1 and self._try_extend(sequence, decision):
                decision.shares.append(Share(sequence, 1))

    def _share_prompts(self, decision: Decision) -> None:
        left = self._step_tokens - len(decision.shares)
        served = {share.sequence.key for share in decision.shares}
        for sequence in sorted(self.running.values(), key=lambda one: one.ticket):
            if left == 0:
                return
            if sequence.key in served:
                continue
            share = Share(sequence, min(left, sequence.missing))
            decision.shares.append(share)
            left -= share.num_tokens

    def _try_extend(self, sequence: Sequence, decision: Decision) -> bool:
        """A block for the sequence's last known token, if need be from the youngest, which may be itself."""
        assert sequence.table is not None
        while not sequence.table.try_grow(len(sequence.tokens)):
            victim = max((*self.running.values(), *self.ready.values()), key=lambda one: one.ticket)
            self._preempt(victim, decision)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, decision: Decision) -> None:
        self.wait(sequence)
        self.line.move_to_end(sequence.key, last=False)
        decision.preempted.append(sequence)

    # ---- admission --------------------------------------------------------------------------------

    def _admit(self, decision: Decision) -> None:
        while self.line:
            head = next(iter(self.line.values()))
            if not self._pool.can_hold(len(head.tokens)):
                del self.line[head.key]
                decision.impossible.append(head)
                continue
            if head.state is State.WANTING:
                if len(self.running) + len(self.ready) + len(self.granted) >= self._max_holding:
                    return
                placed = self._try_grant(head, decision)
            else:
                if len(self.running) >= self._seats or not self._slots.num_free:
                    return
                placed = self._try_start(head, decision)
            if not placed and not self._try_unpin(head, decision):
                return

    def _try_grant(self, sequence: Sequence, decision: Decision) -> bool:
        assert sequence.table is not None
        if not self._fits(sequence, sequence.num_prompt):
            return False
        grown = sequence.table.try_grow(sequence.num_prompt)
        assert grown
        self._leave(sequence)
        sequence.state = State.GRANTED
        self.granted[sequence.key] = sequence
        decision.granted.append(sequence)
        return True

    def _try_start(self, sequence: Sequence, decision: Decision) -> bool:
        if self._blocked == (sequence, self._pool.counts()):
            return False  # naming the blocks costs time; nothing has changed since the last try
        # One token at least is computed, so that there is something to sample from.
        limit = len(sequence.tokens) - 1
        sequence.table = self._pool.open(sequence.tokens, sequence.request.salt, max_cached_tokens=limit)
        if not self._fits(sequence, len(sequence.tokens)):
            self._close(sequence)
            self._blocked = (sequence, self._pool.counts())
            return False
        grown = sequence.table.try_grow(len(sequence.tokens))
        slot = self._slots.try_take()
        assert grown
        assert slot is not None
        self._blocked = None
        self._leave(sequence)
        sequence.computed = sequence.table.cached_tokens
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.table.cached_tokens
        self._seat(sequence, slot, decision)
        return True

    def _fits(self, sequence: Sequence, num_tokens: int) -> bool:
        counts = self._pool.counts()
        needed = -(-num_tokens // self._pool.block_tokens) - len(sequence.blocks)
        # With nobody there who could need the reserve, the whole pool is for the first in line.
        alone = not (self.running or self.ready or self.granted)
        return needed + (0 if alone else self._watermark) <= counts.free + counts.cached

    def _try_unpin(self, head: Sequence, decision: Decision) -> bool:
        """When nobody is left who would free blocks, cached prefixes of the youngest waiting transfer give way.

        Without this the line could stand still forever: prefixes that are pinned by those behind the head are what
        the head lacks. The transfer is given up, for it brings only what follows the prefix.
        """
        if self.running or self.ready or self.granted:
            return False
        pinned = [one for one in self.fetching.values() if one.blocks and one is not head]
        if not pinned:
            return False
        victim = max(pinned, key=lambda one: one.ticket)
        self.wait(victim)
        if not victim.order.allow_local_prefill:
            del self.line[victim.key]
        decision.unpinned.append(victim)
        return True

    # ---- bookkeeping ------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence) -> None:
        for holder in (self.fetching, self.granted, self.line, self.ready, self.running):
            holder.pop(sequence.key, None)

    def _close(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots.give(sequence.slot)
            sequence.slot = None
        if sequence.table is not None:
            sequence.table.close()
            sequence.table = None
        sequence.computed = 0

    def _row(self, share: Share) -> StepRow:
        sequence = share.sequence
        assert sequence.table is not None
        assert sequence.slot is not None
        return next_row(
            sequence.request.sampling,
            sequence.tokens,
            sequence.computed,
            share.num_tokens,
            slot=sequence.slot,
            blocks=sequence.blocks,
        )
