"""What a round of the scheduler decided, for the worker to carry out and to tell others."""

from __future__ import annotations

from dataclasses import dataclass, field

from .residents import Residents
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step."""

    sequence: Sequence
    num_tokens: int
    samples: bool  # whether it reaches the last token


@dataclass(slots=True)
class Decision:
    """The scheduler has done its part. A sequence may be in several lists; its state is what became of it."""

    shares: list[Share] = field(default_factory=list)
    # Somebody would have to give way while steps are under way: collect them, then decide again. No shares then.
    must_settle: bool = False
    granted: list[Sequence] = field(default_factory=list)  # the receiver may write into their blocks
    admitted: list[Sequence] = field(default_factory=list)  # have blocks to be computed in here
    started: list[Sequence] = field(default_factory=list)  # took a seat
    unseated: list[Sequence] = field(default_factory=list)  # gave their seat to a higher class, keep their blocks
    preempted: list[Sequence] = field(default_factory=list)  # lost their blocks, wait at the front of the line
    # Lost the cached prefix that their transfer builds on; the worker ends those that may not be computed here.
    unpinned: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, BaseException]] = field(default_factory=list)  # their own part of the round raised
    impossible: list[Sequence] = field(default_factory=list)  # grew beyond the whole pool; the worker ends them

    def preempt(self, residents: Residents, sequence: Sequence) -> None:
        """Take a sequence's blocks; it is computed again later."""
        sequence.preemptions += 1
        residents.wait(sequence, front=True)
        self.preempted.append(sequence)
