"""How attention's work of a step is cut into programs, and what the pieces of one row meet in. Made once per engine.

A row whose keys are many becomes several items, each a range of its keys; who arrives last adds them up in their order.
Prompts are cut into tiles of queries, and their cached prefix into pieces where tiles alone would leave the card idle.
The lists are made on the device once a step: nothing here depends on lengths, so a graph may hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..configs import Config, choose

if TYPE_CHECKING:
    from ...device.step import StepTensors

# Programs wanted at once on each multiprocessor. One H200: 2 to 8 are within 3 % from 64 x 256 to 8 x 32,768 tokens;
# 16 cost 20 % at 64 x 1,024, where no row should be cut.
_PROGRAMS_EACH = 4
_MOST_QUERIES = 64  # query heads of one KV head in one program; more are shared out
_ALIGNED = 4  # int32 numbers in 16 bytes


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """W windows, I items at most, R rows at most, P tiles at most. int32 unless said; contents are one step's.

    One stream at a time uses it: layers follow each other, and the tickets are zero again after each launch.
    """

    windows: tuple[int, ...]  # of the model's layers, distinct; 0: none
    kv_heads: int
    programs: int  # wanted at once on the whole card
    slots: int  # items that fill it, beside one for each row
    prompts: Config  # tile of queries and of keys, for this head size and dtype
    windows_W: Tensor
    item_row_WI: Tensor
    item_begin_WI: Tensor  # the first position of the item
    item_end_WI: Tensor  # the position after its last
    item_count_W4: Tensor  # items of the step, then nothing
    first_WR: Tensor  # the first item of each row
    num_WR: Tensor  # its items
    tile_row_P: Tensor
    tile_offset_P: Tensor  # the tile's first query among the row's new tokens
    tile_count_4: Tensor  # tiles of the step, pieces of each, then nothing
    parts: Tensor  # float32: results of items, each divided by its own sum of weights
    lse: Tensor  # float32: log2 of these sums
    tickets: Tensor  # how many items of a row and KV head have arrived; 0 between launches

    @property
    def max_items(self) -> int:
        """I."""
        return self.item_row_WI.shape[1]


def group_tile(group: int) -> tuple[int, int]:
    """(query heads a program holds, programs for one KV head) when `group` query heads share a KV head."""
    held = min(max(16, 1 << (group - 1).bit_length()), _MOST_QUERIES)
    return held, -(-group // held)


def allocate(
    *,
    max_rows: int,
    max_tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windows: Iterable[int | None],
    like: Tensor,
    programs: int | None = None,
    prompts: Config | None = None,
) -> Splits:
    """The memory for steps of up to `max_rows` rows and `max_tokens` tokens, for a model whose layers have at most
    `heads` query heads and these windows (None: whole context).

    `like`: any tensor with the device and dtype of the keys. The last two are chosen for the card if not given.
    """
    device = like.device
    if programs is None:
        on_card = device.type == "cuda"
        programs = _PROGRAMS_EACH * (torch.cuda.get_device_properties(device).multi_processor_count if on_card else 1)
    prompts = prompts or choose("attend_prompts", (head_dim, like.element_size()))
    found = tuple(sorted({window or 0 for window in windows}))
    each_row = kv_heads * group_tile(heads // kv_heads)[1]
    slots = max(1, programs // each_row)
    items = _aligned(max_rows + slots)
    tiles = _aligned(-(-max_tokens // prompts.block_m) + max_rows)
    rows = _aligned(max_rows)

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    sums = max(items * heads, programs * prompts.block_m)
    return Splits(
        windows=found,
        kv_heads=kv_heads,
        programs=programs,
        slots=slots,
        prompts=prompts,
        windows_W=torch.tensor(found, dtype=torch.int32, device=device),
        item_row_WI=ints(len(found), items),
        item_begin_WI=ints(len(found), items),
        item_end_WI=ints(len(found), items),
        item_count_W4=ints(len(found), _ALIGNED),
        first_WR=ints(len(found), rows),
        num_WR=ints(len(found), rows),
        tile_row_P=ints(tiles),
        tile_offset_P=ints(tiles),
        tile_count_4=ints(_ALIGNED),
        parts=torch.empty(sums * head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(sums, dtype=torch.float32, device=device),
        tickets=ints(max(rows * each_row, programs)),
    )


def plan_splits(step: StepTensors) -> None:
    """Fill the step's work list from its lengths, on the current stream: after these are there, before any layer."""
    if step.splits is not None and step.seq_len_R.is_cuda:
        from .cuda import plan

        plan(step, step.splits)


def _aligned(count: int) -> int:
    """So many that every row of a matrix of them begins at 16 bytes."""
    return -(-count // _ALIGNED) * _ALIGNED
