"""What the op gives: columns on the device, made into protos' TokenLogprobs once the host reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diptych.protos.types import TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """R rows, K the most alternatives that any of them asked for. A row that is not finite is NaN throughout."""

    own_R: Tensor  # float32, of the given tokens
    ranks_R: Tensor  # int64, from 1
    ids_RK: Tensor  # int64, most likely first, lower ids first among equals
    values_RK: Tensor  # float32, of these

    def rows(self, tops: Sequence[int]) -> list[TokenLogprobs]:
        """Row by row, with tops[r] alternatives (or as many as there are tokens). Waits for the device."""
        columns = (self.own_R, self.ranks_R, self.ids_RK, self.values_RK)
        own, ranks, ids, values = (column.tolist() for column in columns)
        return [
            TokenLogprobs(own[r], ranks[r], tuple(zip(ids[r][:top], values[r][:top], strict=True)))
            for r, top in enumerate(tops)
        ]
