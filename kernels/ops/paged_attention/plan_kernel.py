"""Kernels that fill a step's work list (split.py): one program a row, which counts what rows before it take."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _items(length, window, tokens, UNIT: tl.constexpr):
    """(first position read, tokens of an item, items) of rows: about `tokens` an item, all alike within a row."""
    span = tl.where(window > 0, tl.minimum(length, window), length)
    wanted = tl.maximum((span + tokens - 1) // tokens, 1)
    each = tl.maximum((span + wanted * UNIT - 1) // (wanted * UNIT), 1) * UNIT
    return length - span, each, (span + each - 1) // each


@triton.jit(do_not_specialize=["num_rows"])
def plan_rows(
    seq_len,
    windows,
    work,
    num_rows,
    WORK: tl.constexpr,  # columns of `work`
    COUNTS: tl.constexpr,
    ITEMS: tl.constexpr,  # room for items, and for rows
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,  # items that fill the card
    LEAST: tl.constexpr,  # tokens of an item: below, adding up costs more than it saves
    LEAST_ALONE: tl.constexpr,  # the same for a step of one row
    UNIT: tl.constexpr,  # of an item's tokens
    BLOCK: tl.constexpr,  # num_rows or more, a power of 2
    STORE: tl.constexpr,  # items written at once
):
    """Items of each row and window, one behind another."""
    row, which = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK)
    window = tl.load(windows + which)
    length = tl.load(seq_len + rows, mask=rows < num_rows, other=0)
    span = tl.where(window > 0, tl.minimum(length, window), length)
    tokens = tl.maximum((tl.sum(span, 0) + SLOTS - 1) // SLOTS, tl.where(num_rows == 1, LEAST_ALONE, LEAST))
    _, _, items = _items(length, window, tokens, UNIT)
    first = tl.sum(tl.where(rows < row, items, 0), 0)
    end = tl.load(seq_len + row)
    low, each, own = _items(end, window, tokens, UNIT)
    here = work + which * WORK
    lists = here + COUNTS
    tl.store(lists + 3 * ITEMS + row, first)
    tl.store(lists + 3 * ITEMS + ROWS + row, own)
    if row == num_rows - 1:
        tl.store(here, first + own)
    for base in range(0, own, STORE):
        item = base + tl.arange(0, STORE)
        begin = low + item * each
        at = lists + first + item
        tl.store(at, tl.zeros([STORE], tl.int32) + row, mask=item < own)
        tl.store(at + ITEMS, begin, mask=item < own)
        tl.store(at + 2 * ITEMS, tl.minimum(begin + each, end), mask=item < own)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def plan_tiles(
    query_start,
    work,
    first_row,  # prompts begin here
    num_rows,  # prompts
    COUNTS: tl.constexpr,
    TILES: tl.constexpr,  # room for tiles
    HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # wanted at once on the card
    MOST: tl.constexpr,  # pieces of a tile's cached prefix
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # num_rows or more, a power of 2
    STORE: tl.constexpr,
):
    """Tiles of each prompt's new tokens, one behind another, and in how many pieces their prefix is read."""
    prompt = tl.program_id(0)
    rows = tl.arange(0, BLOCK)
    here = rows < num_rows
    begin = tl.load(query_start + first_row + rows, mask=here, other=0)
    end = tl.load(query_start + first_row + rows + 1, mask=here, other=0)
    tiles = (end - begin + TILE - 1) // TILE
    first = tl.sum(tl.where(rows < prompt, tiles, 0), 0)
    own = tl.sum(tl.where(rows == prompt, tiles, 0), 0)
    if prompt == 0:
        total = tl.sum(tiles, 0)
        tl.store(work, total)
        tl.store(work + 1, tl.minimum(tl.maximum(PROGRAMS // (tl.maximum(total, 1) * HEADS), 1), MOST))
    for base in range(0, own, STORE):
        tile = base + tl.arange(0, STORE)
        at = work + COUNTS + first + tile
        tl.store(at, tl.zeros([STORE], tl.int32) + (first_row + prompt), mask=tile < own)
        tl.store(at + TILES, (own - 1 - tile) * TILE, mask=tile < own)  # the longest first
