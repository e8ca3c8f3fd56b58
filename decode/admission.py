"""Who of those in line gets blocks: all that its known tokens need, or none. Called by the scheduler in each round.

Strictly in the order of the line: nobody overtakes a head that does not fit. What the head needs comes from those that
end, from running sequences of a lower class, and, when nobody is left who would end, from cached prefixes that waiting
transfers pin.
"""

from __future__ import annotations

import math

from diptych.protos.types import PoolCounts

from .decision import Decision
from .preemption import freed_blocks, least_urgent, less_urgent
from .residents import Residents
from .sequence import Sequence, State


class Admission:
    """At most `max_holding` sequences of a class and those above it hold blocks."""

    def __init__(self, residents: Residents, *, max_holding: int, watermark: float) -> None:
        self._all = residents
        self._max_holding = max_holding
        # Left free for the growth of those that run. Rounded, so that 0.07 of 100 blocks are 7 and not 8.
        self._reserve = math.ceil(round(watermark * residents.pool.num_blocks, 6))
        self._blocked: tuple[Sequence, PoolCounts, int] | None = None  # a head that did not fit, and how things were

    def admit(self, decision: Decision) -> bool:
        """Give blocks to heads of the line while they fit. True: somebody became ready for a seat."""
        before = len(decision.admitted)
        while (head := self._all.line.head()) is not None:
            try:
                if not self._all.pool.can_hold(len(head.tokens)):
                    self._all.line.discard(head.key)
                    decision.impossible.append(head)
                    continue
                if self._is_full(head.place.priority):
                    break
                fits = self._try_admit(head, decision)
            except BaseException as exc:
                self._all.line.discard(head.key)
                decision.failed.append((head, exc))
                continue
            if not fits and (decision.must_settle or not self._try_unpin(head, decision)):
                break
        return len(decision.admitted) > before

    def _is_full(self, priority: int) -> bool:
        if self._all.num_holders < self._max_holding:
            return False
        return sum(one.place.priority <= priority for one in self._all.holders()) >= self._max_holding

    def _try_admit(self, head: Sequence, decision: Decision) -> bool:
        if self._blocked == self._snapshot(head):
            return False  # naming and counting blocks costs time; nothing has changed since the last try
        wanting = head.state is State.WANTING
        if not wanting:
            limit = head.rows.max_cached_tokens(len(head.tokens))
            head.table = self._all.pool.open(head.tokens, head.request.salt, max_cached_tokens=limit)
        if not self._try_grow(head, decision):
            if not wanting:
                self._all.close(head)
            if not decision.must_settle:
                self._blocked = self._snapshot(head)
            return False
        self._blocked = None
        if wanting:
            self._all.admit(head, State.GRANTED)
            decision.granted.append(head)
            return True
        assert head.table is not None
        head.computed = head.table.cached_tokens
        if head.cached_tokens is None:
            head.cached_tokens = head.table.cached_tokens
        self._all.admit(head, State.READY)
        decision.admitted.append(head)
        return True

    def _snapshot(self, head: Sequence) -> tuple[Sequence, PoolCounts, int]:
        return head, self._all.pool.counts(), self._all.num_holders

    def _try_grow(self, head: Sequence, decision: Decision) -> bool:
        """Blocks for all known tokens of the head, if need be those of sequences of a lower class."""
        assert head.table is not None
        victims: list[Sequence] = []
        if self._lacking(head, self._all.num_holders) > 0:
            victims = less_urgent(self._all.victims(), head.place.priority)
            freed = freed_blocks(self._all, victims, head) if victims else 0
            if self._lacking(head, self._all.num_holders - len(victims)) > freed:
                return False  # it would not help: nobody gives way for nothing
            if self._all.num_in_flight:
                decision.must_settle = True
                return False
        for victim in victims:
            if self._lacking(head, self._all.num_holders) <= 0:
                break
            decision.preempt(self._all, victim)
        grown = head.table.try_grow(len(head.tokens))
        assert grown
        return True

    def _lacking(self, head: Sequence, num_holders: int) -> int:
        """Blocks that the head needs and the pool has not; with nobody there to grow, no reserve is left."""
        counts = self._all.pool.counts()
        needed = -(-len(head.tokens) // self._all.pool.block_tokens) - len(head.blocks)
        return needed + (self._reserve if num_holders else 0) - counts.free - counts.cached

    def _try_unpin(self, head: Sequence, decision: Decision) -> bool:
        """When nobody is left who would free blocks, the cached prefix of the least urgent transfer gives way.

        Without this the line could stand still forever: prefixes that are pinned by those behind the head are what
        the head lacks. The transfer is given up, for it brings only what follows the prefix.
        """
        if self._all.num_holders:
            return False
        victim = least_urgent(one for one in self._all.fetching.values() if one.blocks and one is not head)
        if victim is None:
            return False
        self._all.wait(victim)
        if not victim.order.allow_local_prefill:
            self._all.line.discard(victim.key)
        decision.unpinned.append(victim)
        return True
