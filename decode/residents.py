"""Who is where in a decode engine, and what moving costs: blocks, slots, places in line. Decides nothing.

fetching --> line --> granted ----> ready <--> running   preempted: back to the front of the line
             line ----------------> ready                draining: ended, from granted and running
"""

from __future__ import annotations

from collections.abc import Iterator

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.fair_line import FairLine
from diptych.protos.step import SlotPool
from diptych.protos.types import TransferKey

from .sequence import IN_TRANSFER, Sequence, State


class Residents:
    """Every sequence of a scheduler that has not ended, by what it has. Moves keep state, blocks and slot in step."""

    def __init__(self, *, pool: BlockPool, slots: SlotPool) -> None:
        self.fetching: dict[TransferKey, Sequence] = {}  # no blocks granted yet: FETCHING, and WANTING in line
        self.granted: dict[TransferKey, Sequence] = {}  # the receiver may write
        self.draining: dict[TransferKey, Sequence] = {}  # ended; the receiver or a step may write
        self.line: FairLine[Sequence] = FairLine()  # for blocks: WANTING, WAITING
        self.ready: FairLine[Sequence] = FairLine()  # for a seat
        self.running: dict[TransferKey, Sequence] = {}
        self.prompts: FairLine[Sequence] = FairLine()  # for tokens of a step: running, more than one token missing
        self.num_in_flight = 0  # rows in steps that were not collected yet, those of ended sequences included
        self.pool = pool
        self.slots = slots

    def holders(self) -> Iterator[Sequence]:
        """Who holds all blocks it needs now, or will free what it holds."""
        yield from self.running.values()
        yield from self.ready
        yield from self.granted.values()
        yield from self.draining.values()

    @property
    def num_holders(self) -> int:
        """How many `holders` there are."""
        return len(self.running) + len(self.ready) + len(self.granted) + len(self.draining)

    def victims(self) -> Iterator[Sequence]:
        """Whose blocks can be taken at once, if no row is in flight."""
        yield from self.running.values()
        yield from self.ready

    def admit(self, sequence: Sequence, state: State) -> None:
        """It has its blocks: GRANTED to a receiver, or READY to be computed here."""
        self.line.take(sequence.key)
        if not sequence.charged:
            sequence.charged = True
            self.line.charge(sequence.place, len(sequence.tokens) - (sequence.cached_tokens or 0))
        self._leave(sequence)
        sequence.state = state
        if state is State.GRANTED:
            self.granted[sequence.key] = sequence
        else:
            self.ready.add(sequence.key, sequence, sequence.place)

    def arrive(self, sequence: Sequence) -> None:
        """Its transfer is over and brought the whole prompt."""
        self._leave(sequence)
        sequence.state = State.READY
        self.ready.add(sequence.key, sequence, sequence.place)

    def seat(self, sequence: Sequence, slot: int) -> None:
        """From READY into the steps."""
        self.ready.take(sequence.key)
        self.ready.charge(sequence.place, len(sequence.tokens))
        sequence.slot = slot
        sequence.rows.new_slot()
        sequence.state = State.RUNNING
        self.running[sequence.key] = sequence
        if sequence.missing > 1 and not sequence.is_forced:
            self.prompts.add(sequence.key, sequence, sequence.place)

    def unseat(self, sequence: Sequence) -> None:
        """Out of the steps with all its blocks, to the front of those who are ready."""
        self._leave(sequence)
        self._give_slot(sequence)
        sequence.state = State.READY
        self.ready.add(sequence.key, sequence, sequence.place, front=True)

    def wait(self, sequence: Sequence, *, front: bool = False) -> None:
        """Give up everything but the place in the line; to be computed here."""
        if sequence.state in IN_TRANSFER:
            sequence.cached_tokens = None  # the transfer's prefix; what is found when it starts here counts
        in_line = sequence.key in self.line
        self.close(sequence)
        if not in_line:
            self._leave(sequence)
            self.line.add(sequence.key, sequence, sequence.place, front=front)
        else:
            self.fetching.pop(sequence.key, None)
        sequence.state = State.WAITING

    def drain(self, sequence: Sequence) -> None:
        """It has ended, but somebody may still write into its blocks."""
        self._leave(sequence)
        sequence.state = State.DRAINING
        self.draining[sequence.key] = sequence

    def drop(self, sequence: Sequence) -> None:
        """It has ended, and nobody touches its blocks any more."""
        self.close(sequence)
        self._leave(sequence)
        sequence.state = State.DONE

    def close(self, sequence: Sequence) -> None:
        """Give back blocks and slot."""
        self._give_slot(sequence)
        if sequence.table is not None:
            sequence.table.close()
            sequence.table = None
        sequence.computed = 0
        sequence.is_forced = False

    def _give_slot(self, sequence: Sequence) -> None:
        assert not sequence.in_flight, f"{sequence.key} gives up what a step still uses"
        if sequence.slot is not None:
            self.slots.give(sequence.slot)
            sequence.slot = None

    def _leave(self, sequence: Sequence) -> None:
        key = sequence.key
        for holder in (self.fetching, self.granted, self.draining, self.running):
            holder.pop(key, None)
        self.line.discard(key)
        self.ready.discard(key)
        self.prompts.discard(key)
