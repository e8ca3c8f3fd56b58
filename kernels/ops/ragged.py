"""How the tokens of one step lie in one row, and where their KV goes. Built once a step, read by every layer.

row    | a6 a7 a8 | b3 | c0 c1 |      segments: a (start 6, 3 tokens), b (start 3, 1 token), c (start 0, 2 tokens)
blocks of a (block_tokens 4): | a0 a1 a2 a3 | a4 a5 a6 a7 | a8 .  .  . |     a8 opens a block: its tail is zeroed first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's tokens in the row: row indices first .. first + num_tokens - 1, positions start .. end - 1."""

    first: int
    num_tokens: int
    start: int
    blocks: Sequence[int]  # of positions 0 .. end - 1 at least, in order

    @property
    def end(self) -> int:
        """The position after the last new token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """The batch structure of a step. T is the number of tokens in the row; tensors are int64 on the device."""

    segments: tuple[Segment, ...]
    block_tokens: int
    positions_T: Tensor  # of each token in its sequence
    blocks_T: Tensor  # block that takes the token's keys and values
    offsets_T: Tensor  # place in that block
    opened: Tensor | None  # blocks begun but not filled by this step; they hold another sequence's leftovers
    _memo: dict[object, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, over all segments."""
        return self.positions_T.shape[0]

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """`make()` of the first layer that asks for `key` in this step: indices and masks serve all layers."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]


def build_batch(segments: Sequence[Segment], block_tokens: int, device: torch.device) -> RaggedBatch:
    """Lay out the row. Segments must lie one after another from row index 0; each needs at least one token."""
    positions: list[int] = []
    blocks: list[int] = []
    opened: list[int] = []
    for segment in segments:
        end = segment.end
        assert segment.first == len(positions), "segments must lie one after another"
        assert segment.num_tokens > 0, "a segment is empty"
        assert len(segment.blocks) * block_tokens >= end, "a segment has fewer blocks than tokens"
        if segment.num_tokens == 1:
            positions.append(segment.start)
            blocks.append(segment.blocks[segment.start // block_tokens])
        else:
            span = range(segment.start, end)
            positions.extend(span)
            blocks.extend([segment.blocks[position // block_tokens] for position in span])
        partial = end % block_tokens
        if partial and end - partial >= segment.start:
            opened.append(segment.blocks[end // block_tokens])
    positions_T = torch.tensor(positions, dtype=torch.int64, device=device)
    return RaggedBatch(
        segments=tuple(segments),
        block_tokens=block_tokens,
        positions_T=positions_T,
        blocks_T=torch.tensor(blocks, dtype=torch.int64, device=device),
        offsets_T=positions_T % block_tokens,
        opened=torch.tensor(opened, dtype=torch.int64, device=device) if opened else None,
    )
