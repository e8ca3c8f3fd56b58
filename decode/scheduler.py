"""Which sequence gets blocks, a seat and tokens of the next step. Called by the worker only.

    FETCHING -> line -> GRANTED -> ready -> running        KV comes from a prefill engine
                line ------------> ready -> running        KV is computed here: local prompts, preempted sequences

The line is for blocks, `ready` for a seat, a place in the steps; both by the rules of FairLine. Knows nothing of ports,
clocks and finishes: it reports what the worker must tell to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.step import MOST_TOLD, SlotPool, StepPlan, StepRow

from .admission import Admission
from .arbiter import Demand, StepBudget
from .decision import Decision, Share
from .preemption import least_urgent
from .residents import Residents
from .sequence import Sequence, State


class DecodeScheduler:
    """At most `max_running` sequences and `step_tokens` tokens in a step."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        slots: SlotPool,
        max_running: int,
        step_tokens: int,
        watermark: float,
        budget: StepBudget | None = None,
        max_runs: Callable[[int], int],
    ) -> None:
        """`budget`: who decides how much of `step_tokens` goes to prompts; None: all that decoding leaves. `max_runs`:
        see ports.Runner.
        """
        self._max_runs = max_runs
        self.all = Residents(pool=pool, slots=slots)
        # A decoding sequence takes one token of each step: with no more seats than tokens, all of them run in every
        # step, and what is left goes to prompts.
        self._seats = min(max_running, step_tokens)
        # A few sequences more than seats may hold blocks, so that a seat that becomes free finds a successor.
        max_holding = self._seats + max(1, self._seats // 8)
        self._admission = Admission(self.all, max_holding=max_holding, watermark=watermark)
        self._step_tokens = step_tokens
        self._budget = budget
        self._next_step = 0

    # ---- what the worker reports ------------------------------------------------------------------

    def expect(self, sequence: Sequence) -> int:
        """A transfer will bring its KV. Returns how many of its tokens are cached here, now pinned."""
        known = sequence.tokens
        sequence.table = self.all.pool.open(known, sequence.request.salt, max_cached_tokens=len(known))
        sequence.cached_tokens = sequence.table.cached_tokens
        sequence.state = State.FETCHING
        self.all.fetching[sequence.key] = sequence
        return sequence.cached_tokens

    def want(self, sequence: Sequence) -> None:
        """Its KV is ready over there: join the line for blocks."""
        assert sequence.state is State.FETCHING
        sequence.state = State.WANTING
        self.all.line.add(sequence.key, sequence, sequence.place)

    def arrived(self, sequence: Sequence) -> bool:
        """The KV of all that the order came with is in its blocks. False: it cannot be, for it has no such blocks."""
        assert sequence.table is not None
        if len(sequence.blocks) * self.all.pool.block_tokens < sequence.num_known:
            return False
        sequence.table.commit(sequence.tokens, sequence.num_known)
        sequence.computed = sequence.num_known
        sequence.rows.prompt_is_told()
        self.all.arrive(sequence)
        return True

    def wait(self, sequence: Sequence) -> None:
        """Compute it here, from what the cache still has: keeps its place in the line, else joins it."""
        self.all.wait(sequence)

    def drain(self, sequence: Sequence) -> None:
        """It has ended, but the receiver or a step under way may still write into its blocks."""
        assert sequence.state is State.GRANTED or sequence.in_flight
        self.all.drain(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Nothing computes with or writes into its blocks any more."""
        self.all.drop(sequence)

    def launched(self, shares: Iterable[Share]) -> list[tuple[Sequence, BaseException]]:
        """A step with these is under way: the next one is decided as if it were done. Returns whose own part raised."""
        failed: list[tuple[Sequence, BaseException]] = []
        for share in shares:
            sequence = share.sequence
            sequence.in_flight += 1
            sequence.under_way += share.num_tokens
            sequence.pending += share.samples
            self.all.num_in_flight += 1
            if sequence.missing <= 1:
                self.all.prompts.discard(sequence.key)
            try:
                if share.num_tokens > 1 and sequence.table is not None:
                    sequence.table.foresee(sequence.tokens, sequence.computed + sequence.under_way)
            except BaseException as exc:
                failed.append((sequence, exc))
        return failed

    def collected(self, share: Share) -> bool:
        """Its step is over, well or not; before `advance`, and also if the sequence has ended meanwhile. Whether it has
        sampled, if all went well, a token that is not known yet.
        """
        sequence = share.sequence
        sequence.in_flight -= 1
        sequence.under_way -= share.num_tokens
        self.all.num_in_flight -= 1
        if share.samples and sequence.foretold:
            sequence.foretold -= 1
            return False
        sequence.pending -= share.samples
        return share.samples

    def advance(self, share: Share, token: int | None) -> None:
        """The share is computed, and `token` sampled if it reached the last one."""
        sequence, size = share.sequence, self.all.pool.block_tokens
        assert sequence.table is not None
        before = sequence.computed // size
        sequence.computed += share.num_tokens
        if sequence.computed // size > before:
            sequence.table.commit(sequence.tokens, sequence.computed)
        if token is not None:
            sequence.tokens.append(token)
            self.all.line.charge(sequence.place, 1)

    def foretell(self, sequence: Sequence, token: int) -> None:
        """`token` follows, whatever a step under way may sample."""
        sequence.tokens.append(token)
        self.all.line.charge(sequence.place, 1)
        if sequence.pending:
            sequence.pending -= 1
            sequence.foretold += 1
        sequence.is_forced = True

    @property
    def num_in_flight(self) -> int:
        """Rows in steps that were not collected yet."""
        return self.all.num_in_flight

    @property
    def num_running(self) -> int:
        """Sequences with a seat."""
        return len(self.all.running)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV the running sequences hold."""
        return sum(one.computed for one in self.all.running.values())

    @property
    def num_queued_tokens(self) -> int:
        """Tokens to be computed here before their sequences decode: waiting, ready or in computation."""
        waiting = (one for one in self.all.line if one.state is State.WAITING)
        holding = (one for one in self.all.victims() if one.missing > 1 and not one.is_forced)
        return sum(one.missing for one in (*waiting, *holding))

    # ---- a round ----------------------------------------------------------------------------------

    def decide(self, now: float) -> tuple[StepPlan | None, Decision]:
        """Who runs in the next step, which begins `now`, who gets blocks, who gives way.

        With `must_settle` there is no plan yet: whoever gives way must have no row in flight, and what comes back may
        end sequences and so make room.
        """
        decision = Decision()
        while True:
            changes = len(decision.preempted)
            self._seat_ready(decision)
            if not decision.must_settle:
                self._extend_decoding(decision)
            # Whoever is ready now may find a seat; so may others where one gave way and left its own.
            goes_on = not decision.must_settle and self._admission.admit(decision)
            if decision.must_settle:
                return None, decision
            if not goes_on and len(decision.preempted) == changes:
                break
        self._share_decoding(decision)
        self._share_prompts(decision, now)
        rows: list[StepRow] = []
        sound: list[Share] = []
        for share in decision.shares:
            try:
                rows.append(self._row(share))
            except BaseException as exc:
                decision.failed.append((share.sequence, exc))
            else:
                sound.append(share)
        decision.shares = sound
        if not sound:
            return None, decision
        self._next_step += 1
        return StepPlan(self._next_step, tuple(rows)), decision

    def _seat_ready(self, decision: Decision) -> None:
        while (sequence := self.all.ready.head()) is not None:
            if len(self.all.running) >= self._seats or not self.all.slots.num_free:
                loser = least_urgent(self.all.running.values())
                if loser is None or loser.place.priority <= sequence.place.priority:
                    return
                if self.all.num_in_flight:
                    decision.must_settle = True
                    return
                self.all.unseat(loser)
                decision.unseated.append(loser)
            slot = self.all.slots.try_take()
            assert slot is not None
            self.all.seat(sequence, slot)
            decision.started.append(sequence)

    def _extend_decoding(self, decision: Decision) -> None:
        """A block for the last token of each decoding sequence, the most urgent first."""
        for sequence in self._by_urgency():
            # A prompt has its blocks; so has not what a guide was certain of, told since or while it had no seat.
            while sequence.state is State.RUNNING and sequence.missing > 0 and not sequence.is_full:
                assert sequence.table is not None
                try:
                    fits = sequence.table.try_grow(sequence.length)
                except BaseException as exc:
                    decision.failed.append((sequence, exc))
                    break
                if fits:
                    break
                if self.all.num_in_flight:
                    decision.must_settle = True
                    return
                victim = least_urgent(self.all.victims())
                assert victim is not None, "it is one itself"
                decision.preempt(self.all, victim)

    def _share_decoding(self, decision: Decision) -> None:
        """A token of each decoding sequence; of those with tokens that nobody samples as many as the step takes."""
        failed = {sequence.key for sequence, _ in decision.failed}
        decoding = [
            (one, missing)
            for one in self._by_urgency()
            if one.key not in failed
            and ((missing := one.missing) == 1 or (missing > 1 and one.is_forced))
            and not one.is_full
        ]
        runs, spare = self._max_runs(len(decoding)), self._step_tokens - len(decoding)
        for sequence, missing in decoding:
            num_tokens = 1 if missing == 1 or runs <= 0 else min(missing, 1 + spare)
            runs -= num_tokens > 1
            spare -= num_tokens - 1
            decision.shares.append(Share(sequence, num_tokens, samples=num_tokens == missing))

    def _share_prompts(self, decision: Decision, now: float) -> None:
        """Prompts by turn, each as much as the budget allows."""
        prompts, left = self.all.prompts, self._step_tokens - sum(share.num_tokens for share in decision.shares)
        if self._budget is not None and decision.shares and len(prompts):
            left = min(left, self._budget.prompt_tokens(self._demand(decision, now)))
        served: list[Sequence] = []
        room = MOST_TOLD
        while left and (sequence := prompts.head()) is not None:
            prompts.take(sequence.key)
            try:
                if not sequence.in_flight:
                    self._extend_prefix(sequence)
            except BaseException as exc:
                decision.failed.append((sequence, exc))
                continue
            served.append(sequence)
            num_tokens = min(left, sequence.missing)
            if sequence.rows.asks_of_prompt:
                if not room:
                    continue
                num_tokens = min(num_tokens, room)
                room -= num_tokens
            share = Share(sequence, num_tokens, samples=num_tokens == sequence.missing)
            prompts.charge(sequence.place, share.num_tokens)
            decision.shares.append(share)
            left -= share.num_tokens
        for sequence in served:
            prompts.add(sequence.key, sequence, sequence.place)  # until it is launched or leaves

    def _demand(self, decision: Decision, now: float) -> Demand:
        prompts = self.all.prompts
        head = prompts.head()
        assert head is not None
        # Who joined first is the oldest, but for those that lost their blocks, who come first anyway.
        waiting = next((one for one in self.all.line if one.state is State.WAITING), head)
        ready = next((one for one in self.all.ready if one.missing > 1), head)
        # Who has tokens of a guide to be computed has not waited for a first one since it came.
        since = [one.since for one in (*prompts, waiting, ready) if not one.is_forced]
        return Demand(
            decode_rows=len(decision.shares),
            kv_tokens=sum(share.sequence.launched for share in decision.shares),
            queued_tokens=self.num_queued_tokens,
            prompt_kv=head.launched,
            oldest_wait_s=now - min(since, default=now),
        )

    def _extend_prefix(self, sequence: Sequence) -> None:
        """What others have computed since this prompt was admitted, need not be computed again."""
        assert sequence.table is not None
        limit = sequence.rows.max_cached_tokens(len(sequence.tokens))
        valid = sequence.table.extend_prefix(sequence.tokens, sequence.computed, max_cached_tokens=limit)
        if not (sequence.num_new or sequence.preemptions):  # its first way through the prompt
            sequence.cached_tokens = (sequence.cached_tokens or 0) + valid - sequence.computed
        sequence.computed = valid

    def _by_urgency(self) -> list[Sequence]:
        return sorted(self.all.running.values(), key=lambda one: one.place.urgency)

    def _row(self, share: Share) -> StepRow:
        sequence = share.sequence
        assert sequence.slot is not None
        return sequence.rows.next_row(
            sequence.tokens,
            sequence.launched,
            share.num_tokens,
            slot=sequence.slot,
            blocks=sequence.blocks,
            pending=sequence.pending,
        )
