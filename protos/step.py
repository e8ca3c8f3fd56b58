"""A scheduler's order to a runner, in plain integers, and what comes back. No torch: the schedulers import it.

blocks of a row, block_tokens = 4         start = 6, num_tokens = 3: positions 6, 7, 8 are computed
| b7: 0 1 2 3 | b2: 4 5 6 7 | b9: 8 . . . |      (KV of 0..5 lies in the blocks already)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample one token after the row's last position. The random number depends on (seed, position) only."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int  # of the sampled token in the sequence: start + num_tokens of its row


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One sequence's share of a step.

    `tokens` holds the ids of positions start .. start + num_tokens - 1. It is None when num_tokens is 1 and the id is
    the token that the runner sampled last for `slot`: a step may be launched before the host has read the last one.
    """

    slot: int  # the sequence's place in the runner's state, 0 .. max_slots - 1, stable while the sequence runs
    num_tokens: int
    tokens: tuple[int, ...] | None
    start: int
    blocks: Sequence[
        int
    ]  # block ids for positions 0 .. start + num_tokens - 1 at least; must not change until collected
    sample: SampleSpec | None  # None: the prompt goes on in a later step


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a ragged batch."""

    step_id: int
    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        """Over all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """tokens[i] is the token sampled for rows[i] of the plan, None where the row did not sample."""

    step_id: int
    tokens: tuple[int | None, ...]


class SlotPool:
    """The runner's state slots of one engine, shared by its workers. Step thread only."""

    def __init__(self, max_slots: int) -> None:
        self._free = list(range(max_slots - 1, -1, -1))
        self.max_slots = max_slots

    def try_take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return a slot that try_take gave."""
        assert slot not in self._free
        assert 0 <= slot < self.max_slots
        self._free.append(slot)

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)
