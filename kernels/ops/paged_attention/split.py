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
COUNTS = 4  # int32 numbers before the lists: as many as have 16 bytes, to which every list is aligned


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """W windows, at most I items, R rows and P tiles. Lists are int32, one behind another, filled anew each step:

    rows_WX | items (4) | an item's row (I), first position (I), position after its last (I) | a row's first item (R),
              items (R)
    tiles_X | tiles, pieces of each (4) | a tile's row (P), first query among the row's new tokens (P)

    One stream at a time uses it: layers follow each other, and the tickets are zero again after each launch.
    """

    windows: tuple[int, ...]  # of the model's layers, distinct; 0: none
    heads: int  # query heads of a layer at most
    programs: int  # wanted at once on the whole card
    slots: int  # items that fill it, beside one for each row
    prompts: Config  # tile of queries and of keys, for this head size and dtype
    windows_W: Tensor
    rows_WX: Tensor
    tiles_X: Tensor
    max_rows: int  # R
    max_items: int  # I
    max_tiles: int  # P
    parts: Tensor  # float32: results of items, each divided by its own sum of weights
    lse: Tensor  # float32: log2 of these sums
    tickets: Tensor  # how many items of a row and KV head have arrived; 0 between launches


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
        heads=heads,
        programs=programs,
        slots=slots,
        prompts=prompts,
        windows_W=torch.tensor(found, dtype=torch.int32, device=device),
        rows_WX=ints(len(found), COUNTS + 3 * items + 2 * rows),
        tiles_X=ints(COUNTS + 2 * tiles),
        max_rows=rows,
        max_items=items,
        max_tiles=tiles,
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
    return -(-count // COUNTS) * COUNTS
