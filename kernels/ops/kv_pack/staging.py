"""Copies between a card and pageable memory at the speed of pinned memory: two buffers, one filled while one is read.

One Staging per thread and card, on a stream of its own: a thread that moves KV must not wait behind the steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_PIECE_BYTES = 4 << 20


class Staging:
    """Buffers of one thread for one card. Pieces are flat runs of words (int64)."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._pinned: list[Tensor] = []
        self._staged: list[Tensor] = []
        self._done = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def grow(self, words: int) -> None:
        """Make room for pieces of `words` words. Waits for the stream where buffers are replaced."""
        if not self._staged or self._staged[0].numel() < words:
            self.stream.synchronize()
            self._pinned = [torch.empty(words, dtype=torch.int64, pin_memory=True) for _ in range(2)]
            self._staged = [torch.empty(words, dtype=torch.int64, device=self._device) for _ in range(2)]

    def fetch(self, out: Tensor, pieces: list[tuple[int, int]], fill: Callable[[int, Tensor], None]) -> None:
        """For each (first word, words) of `out`, which lies in the host's memory: `fill(index, buffer)` launches what
        puts the piece into a buffer on the card, from where it is copied. Returns when `out` is complete.
        """
        for index in range(len(pieces) + 1):
            if index < len(pieces):
                words = pieces[index][1]
                staged, pinned = self._staged[index % 2][:words], self._pinned[index % 2][:words]
                fill(index, staged)
                pinned.copy_(staged, non_blocking=True)
                self._done[index % 2].record(self.stream)
            if index:
                first, words = pieces[index - 1]
                self._done[(index - 1) % 2].synchronize()
                out[first : first + words].copy_(self._pinned[(index - 1) % 2][:words])

    def send(self, data: Tensor, pieces: list[tuple[int, int]], take: Callable[[int, Tensor], None]) -> None:
        """The other way: `take(index, buffer)` launches what uses a piece on the card. Returns when all was used."""
        for index, (first, words) in enumerate(pieces):
            if index >= 2:
                self._done[index % 2].synchronize()
            staged, pinned = self._staged[index % 2][:words], self._pinned[index % 2][:words]
            pinned.copy_(data[first : first + words])
            staged.copy_(pinned, non_blocking=True)
            take(index, staged)
            self._done[index % 2].record(self.stream)
        self.stream.synchronize()


_threads = threading.local()


def staging(device: torch.device, words_at_once: int) -> tuple[Staging, int]:
    """This thread's staging for a card, and how many runs of `words_at_once` words go into a piece: one at least."""
    held: dict[torch.device, Staging] = _threads.__dict__.setdefault("held", {})
    if device not in held:
        held[device] = Staging(device)
    runs = max(1, _PIECE_BYTES // 8 // max(words_at_once, 1))
    held[device].grow(max(runs * words_at_once, 1))
    return held[device], runs
