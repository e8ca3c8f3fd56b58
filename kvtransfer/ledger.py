"""Who holds which staging slot of a prefill engine. Pure accounting; the memory is in ring.py.

free --try_take--> filling --staged--> staged --retire--> free (generation + 1)
                      |                   '---quarantine--> quarantine --retire--> free (generation + 1)
                      '--retire--> free (generation + 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from diptych.protos.types import EngineId, TransferKey


class SlotState(StrEnum):
    """What a slot is in."""

    FREE = "free"
    FILLING = "filling"
    STAGED = "staged"
    QUARANTINE = "quarantine"


@dataclass(slots=True)
class SlotRecord:
    """One slot. `key` and `pair` are those of the last taker."""

    generation: int = 1
    state: SlotState = SlotState.FREE
    pair: EngineId | None = None
    key: TransferKey | None = None


class SlotLedger:
    """`num_slots` slots; every connected pair is sure of `pair_min_slots` of them, the rest is shared.

    When there are more pairs than the slots can serve, each is sure of an equal share only.
    """

    def __init__(self, num_slots: int, pair_min_slots: int) -> None:
        self.slots = [SlotRecord() for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))
        self._pair_min_slots = pair_min_slots
        self._held: dict[EngineId, int] = {}  # slots of each connected pair

    @property
    def num_busy(self) -> int:
        """Slots that are not free."""
        return len(self.slots) - len(self._free)

    def add_pair(self, pair: EngineId) -> None:
        """A pair is up: reserve its share. Slots that an earlier life of it still holds count."""
        self._held[pair] = sum(slot.pair == pair and slot.state is not SlotState.FREE for slot in self.slots)

    def remove_pair(self, pair: EngineId) -> None:
        """The pair is down: its share is open to others."""
        self._held.pop(pair, None)

    def try_take(self, pair: EngineId, key: TransferKey, *, spare: int | None = 0) -> int | None:
        """A slot in state filling for a connected pair, or None when its share and the shared rest are in use, but for
        `spare` slots that the pair could still take. `spare` None: any free one.
        """
        assert pair in self._held
        sure = min(self._pair_min_slots, len(self.slots) // len(self._held))
        held = self._held[pair]
        reserved = sum(max(0, sure - count) for other, count in self._held.items() if other != pair)
        share = min(len(self._free), max(sure - held, len(self._free) - reserved))
        if not self._free or (spare is not None and share <= spare):
            return None
        index = self._free.pop()
        slot = self.slots[index]
        slot.state, slot.pair, slot.key = SlotState.FILLING, pair, key
        self._held[pair] = held + 1
        return index

    def staged(self, index: int) -> None:
        """The bytes are in place; the peer may read them."""
        assert self.slots[index].state is SlotState.FILLING
        self.slots[index].state = SlotState.STAGED

    def quarantine(self, index: int) -> None:
        """The transfer ended but the peer may still read."""
        assert self.slots[index].state is SlotState.STAGED
        self.slots[index].state = SlotState.QUARANTINE

    def retire(self, index: int) -> int:
        """Free the slot and return its new generation, which must reach the slot's header before its next use."""
        slot = self.slots[index]
        assert slot.state is not SlotState.FREE
        if slot.pair in self._held:
            self._held[slot.pair] -= 1
        slot.state, slot.key = SlotState.FREE, None
        slot.generation = slot.generation % 0xFFFF_FFFF + 1  # u32, never 0
        self._free.append(index)
        return slot.generation

    def check_integrity(self) -> None:
        """Raise AssertionError unless free list, states and the pairs' sums agree."""
        free = {index for index, slot in enumerate(self.slots) if slot.state is SlotState.FREE}
        assert free == set(self._free), f"free slots {sorted(free)}, free list {sorted(self._free)}"
        assert len(free) == len(self._free), "a slot is free twice"
        for pair, count in self._held.items():
            held = sum(slot.pair == pair and slot.state is not SlotState.FREE for slot in self.slots)
            assert held == count, f"pair {pair} holds {held} slots, counted {count}"
