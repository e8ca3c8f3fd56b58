"""The tokens so far of sequences whose rules look at them, by slot, on the device. Called by the runner.

A log of ids, not counts by vocabulary: it serves penalties and bad words, costs memory by length (8 bytes a token)
instead of by vocabulary, and nothing at all where no rule needs it. Lengths are the host's: it knows how many tokens
there are before it knows the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROWTH = 256  # tokens added when a slot's log is full


class TokenLog:
    """Ids of the sequence in each slot that `begin` was called for. One thread uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ids: dict[int, Tensor] = {}  # [capacity]
        self._lengths: dict[int, int] = {}

    def begin(self, slot: int, ids: Sequence[int]) -> None:
        """A sequence starts in `slot`, with these tokens; what was there is forgotten."""
        log = torch.zeros(len(ids) + GROWTH, dtype=torch.int64, device=self._device)
        log[: len(ids)] = torch.tensor(ids, dtype=torch.int64, device=self._device)
        self._ids[slot], self._lengths[slot] = log, len(ids)

    def length(self, slot: int) -> int:
        """Tokens in the slot's log; 0 where none was begun."""
        return self._lengths.get(slot, 0)

    def known(self, slot: int) -> Tensor:
        """The slot's tokens, int64 [length]; a view that later tokens do not change."""
        return self._ids[slot][: self._lengths[slot]]

    def extend(self, slot: int, token: Tensor) -> None:
        """One more token, a tensor without dimensions on the device: it need not have been read."""
        log, length = self._ids[slot], self._lengths[slot]
        if length == len(log):
            log = self._ids[slot] = torch.cat((log, log.new_zeros(GROWTH)))
        log[length] = token
        self._lengths[slot] = length + 1

    def forget(self, slot: int) -> None:
        """The slot belongs to a sequence without a log now."""
        self._ids.pop(slot, None)
        self._lengths.pop(slot, None)

    def __len__(self) -> int:
        return len(self._ids)
