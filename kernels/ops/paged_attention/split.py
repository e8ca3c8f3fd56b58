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

from ..configs import MEASURED, Config, choose, nearest

if TYPE_CHECKING:
    from ...device.step import StepTensors

# Programs wanted at once on each multiprocessor. One H200: 2 to 8 are within 3 % from 64 x 256 to 8 x 32,768 tokens;
# 16 cost 20 % at 64 x 1,024, where no row should be cut.
_PROGRAMS_EACH = 4
_ROUNDS = 4  # of programs on the card, that invariant tiles may be cut into; longer steps fill it uncut
_MOST_QUERIES = 64  # query heads of one KV head in one program; more are shared out
RECORD = 8  # int32 numbers of an item or tile: one sector of memory
MOST_ITEMS = 64  # of a row: one program adds them up
COUNTS = 4  # int32 numbers before the records: the count, and what aligns them to 16 bytes


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """W windows, at most R rows. Lists are int32, filled anew each step, records of eight numbers behind a count:

    rows_WX | items (4) | of each: row, slot, first position, position after the last, its number, of how many
    tiles_X | items (4) | of each: slot, first token and tokens of the prompt, tokens before it, the tile's first query,
              the piece, pieces of the tile, the tile (where it is invariant: where the sums of its pieces lie)

    One stream at a time uses it: layers follow each other, and the tickets are zero again after each launch.
    """

    windows: tuple[int, ...]  # of the model's layers, distinct; 0: none
    heads: int  # query heads of a layer at most
    programs: int  # wanted at once on the whole card
    slots: int  # items that fill it, beside one for each row
    prompts: Config  # tile of queries and of keys, for this head size and dtype
    tile_tokens: int  # of a tile of queries
    invariant: bool  # all rows, also those of one token, are in `tiles_X`; see invariant_kernel.py
    room: int  # pieces of tiles whose sums find room, where it is invariant
    windows_W: Tensor
    rows_WX: Tensor
    rows_of: tuple[Tensor, ...]  # its rows, which views made anew would cost each layer
    tiles_X: Tensor
    max_rows: int  # R
    parts: Tensor  # float32: results of items, each divided by its own sum of weights
    lse: Tensor  # float32: log2 of these sums
    tickets: Tensor  # how many items of a row and KV head have arrived; 0 between launches


def group_tile(group: int) -> tuple[int, int]:
    """(query heads a program holds, programs for one KV head) when `group` query heads share a KV head."""
    held = min(max(16, 1 << (group - 1).bit_length()), _MOST_QUERIES)
    return held, -(-group // held)


def most_items(rows: int, slots: int) -> int:
    """Items of so many rows at most, whatever their lengths: rows are cut into twice the slots at the finest."""
    return min(rows * MOST_ITEMS, rows + 2 * slots)


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
    invariant: bool = False,
) -> Splits:
    """The memory for steps of up to `max_rows` rows and `max_tokens` tokens, for a model whose layers have at most
    `heads` query heads and these windows (None: whole context).

    `like`: any tensor with the device and dtype of the keys. The number of programs and the tile of prompts are chosen
    for the card if not given. `invariant`: no bit of a row may depend on what a step has beside it, for which all rows
    go through one kernel (invariant_kernel.py).
    """
    device = like.device
    if programs is None:
        on_card = device.type == "cuda"
        programs = _PROGRAMS_EACH * (torch.cuda.get_device_properties(device).multi_processor_count if on_card else 1)
    if prompts is None:
        shape = (head_dim, like.element_size())
        # What was tuned may change between two starts: bits shall not.
        prompts = nearest(MEASURED["attend_tiles"], shape) if invariant else choose("attend_prompts", shape)
    found = tuple(sorted({window or 0 for window in windows}))
    group = heads // kv_heads
    held = min(1 << (group - 1).bit_length(), prompts.block_m)  # query heads of a token in an invariant tile
    each_row = kv_heads * (-(-group // held) if invariant else group_tile(group)[1])
    slots = max(1, programs // each_row)
    room = _ROUNDS * slots if invariant else 0
    items = 0 if invariant else most_items(max_rows, slots)
    tile_tokens = prompts.block_m // held if invariant else prompts.block_m
    tiles = max(-(-max_tokens // tile_tokens) + max_rows + room, programs // heads)

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    sums = room * each_row * prompts.block_m if invariant else max(items * heads, programs * prompts.block_m)
    rows_WX = ints(len(found), COUNTS + RECORD * items)
    return Splits(
        windows=found,
        heads=heads,
        programs=programs,
        slots=slots,
        prompts=prompts,
        tile_tokens=tile_tokens,
        invariant=invariant,
        room=room,
        windows_W=torch.tensor(found, dtype=torch.int32, device=device),
        rows_WX=rows_WX,
        rows_of=tuple(rows_WX.unbind()),
        tiles_X=ints(COUNTS + RECORD * tiles),
        max_rows=max_rows,
        parts=torch.empty(sums * head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(sums, dtype=torch.float32, device=device),
        tickets=ints(max(max_rows * each_row, room * each_row, programs)),
    )


def is_invariant(step: StepTensors) -> bool:
    """Whether no bit of a row may depend on the step's other rows."""
    return step.splits is not None and step.splits.invariant


def plan_splits(step: StepTensors) -> None:
    """Fill the step's work list from its lengths, on the current stream: after these are there, before any layer."""
    if step.splits is not None:
        from .cuda import plan

        plan(step, step.splits)
