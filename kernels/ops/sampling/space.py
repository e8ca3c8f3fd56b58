"""What choosing tokens on a device needs beside the logits: static memory, and which rows ask for more than their
largest logit. Rows are taken in pieces, whose weights lie in a copy of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...device.wire import Sampling

_ALIGNED = 4  # numbers: parts of static memory begin where vector loads may


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNED) * _ALIGNED


class Tiling(NamedTuple):
    """How a row of logits is shared out. Sizes are powers of two."""

    rows: int = 64  # of a piece: at 128,256 tokens their weights are 33 MB, which an H200's cache holds
    segments: int = 32  # programs of a row at most
    tile: int = 1024  # tokens of a program at once


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """Rows of a step that draw, or have rules."""

    rows: Sequence[Sampling]
    wire_W: Tensor  # the step's wire, on the device
    where_A: Tensor  # int32: which of its rows they are; rows whose rules the device was not told are left out
    masked_A: Tensor  # int32: of these, the number of the mask, -1 where a row has no guide
    masks_MW: Tensor  # int32: what guides allow, in the order of the rows that have one

    def masks_of(self, rows: Sequence[Sampling]) -> dict[int, Tensor]:
        """By number in `rows`, some of these."""
        guided = [one.place for one in self.rows if one.spec.guide is not None]
        return {at: self.masks_MW[guided.index(one.place)] for at, one in enumerate(rows) if one.place in guided}


class SampleSpace:
    """For up to `max_rows` rows of `vocab` tokens. What lies in it between two steps are zeros and leftovers."""

    def __init__(self, *, max_rows: int, vocab: int, device: torch.device, tiling: Tiling | None = None) -> None:
        tiling = tiling or Tiling()
        self.rows = rows = min(tiling.rows, _aligned(max_rows))
        self.tile = tiling.tile
        tiles = -(-vocab // tiling.tile)
        self.span = tiling.tile * -(-tiles // tiling.segments)  # tokens of a segment
        self.num_segments = -(-vocab // self.span)
        self.segments = max(2, 1 << (self.num_segments - 1).bit_length())  # of a power of two
        self.stride = _aligned(vocab)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        parts = self.segments
        self.best_N = zeros(max_rows, dtype=torch.float32)
        self.values_NP = zeros(max_rows, parts, dtype=torch.float32)
        self.ids_NP, self.tickets_N = zeros(max_rows, parts), zeros(max_rows)  # tickets: 0 between launches
        self.weights_AV = zeros(rows, self.stride, dtype=torch.float32)
        self.counts_AV = zeros(rows, self.stride)  # 0 between steps
        self.ruled_best_A = zeros(rows, dtype=torch.float32)
        self.sums_AP, self.equals_AP = zeros(rows, parts, dtype=torch.float64), zeros(rows, parts)
        self.pivots_A, self.extras_A = zeros(rows), zeros(rows)
        # Of two turns of a search, in turn.
        self.parts_2AP8 = zeros(2, rows, parts, 8, dtype=torch.float64)
        self.intervals_2A2 = zeros(2, rows, 2)
        self.masses_2A2 = zeros(2, rows, 2, dtype=torch.float64)

    def clear(self) -> None:
        """After a step that failed: whatever it has left, the next one finds zeros."""
        self.tickets_N.zero_()
        self.counts_AV.zero_()
