"""Kernels that fill a step's work list (split.py): one program a row, which counts what rows before it take.

All that a program of attention must know lies in one record of its own: it has one load to wait for before it reads
block ids, not a chain of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cut(span, tokens, MOST: tl.constexpr, UNIT: tl.constexpr):
    """(tokens of an item, items) of rows with `span` keys: about `tokens` an item, all alike within a row."""
    wanted = tl.minimum(tl.maximum((span + tokens // 2) // tokens, 1), MOST)
    each = tl.maximum((span + wanted * UNIT - 1) // (wanted * UNIT), 1) * UNIT
    return each, (span + each - 1) // each


@triton.jit(do_not_specialize=["num_rows"])
def plan_rows(
    seq_len,
    slots,
    windows,
    work,
    num_rows,
    WORK: tl.constexpr,  # columns of `work`
    COUNTS: tl.constexpr,
    RECORD: tl.constexpr,
    SLOTS: tl.constexpr,  # items that fill the card
    MOST: tl.constexpr,  # items of a row
    LEAST: tl.constexpr,  # tokens of an item: below, adding up costs more than it saves
    LEAST_ALONE: tl.constexpr,  # the same for a short row that is the step's only one
    ENOUGH: tl.constexpr,  # tokens of an item that are worth a program, however few items there are
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
    keys = tl.sum(span, 0)
    once, twice = (keys + SLOTS - 1) // SLOTS, (keys + 2 * SLOTS - 1) // (2 * SLOTS)
    alone = tl.minimum(tl.maximum(keys // 32, LEAST_ALONE), ENOUGH)
    tokens = tl.maximum(tl.maximum(twice, tl.minimum(once, ENOUGH)), tl.where(num_rows == 1, alone, LEAST))
    _, items = _cut(span, tokens, MOST, UNIT)
    first = tl.sum(tl.where(rows < row, items, 0), 0)
    end, slot = tl.load(seq_len + row), tl.load(slots + row)
    own_span = tl.where(window > 0, tl.minimum(end, window), end)
    each, own = _cut(own_span, tokens, MOST, UNIT)
    here = work + which * WORK
    if row == num_rows - 1:
        tl.store(here, first + own)
    for base in range(0, own, STORE):
        item = base + tl.arange(0, STORE)
        inside = item < own
        begin = end - own_span + item * each
        at = here + COUNTS + (first + item) * RECORD
        tl.store(at, tl.zeros([STORE], tl.int32) + row, mask=inside)
        tl.store(at + 1, tl.zeros([STORE], tl.int32) + slot, mask=inside)
        tl.store(at + 2, begin, mask=inside)
        tl.store(at + 3, tl.minimum(begin + each, end), mask=inside)
        tl.store(at + 4, item, mask=inside)
        tl.store(at + 5, tl.zeros([STORE], tl.int32) + own, mask=inside)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def plan_tiles(
    query_start,
    seq_len,
    slots,
    work,
    first_row,  # prompts begin here
    num_rows,  # prompts
    COUNTS: tl.constexpr,
    RECORD: tl.constexpr,
    HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # wanted at once on the card
    MOST: tl.constexpr,  # pieces of a tile's cached prefix
    LEAST: tl.constexpr,  # keys of a piece
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # num_rows or more, a power of 2
    STORE: tl.constexpr,
):
    """Tiles of each prompt's new tokens, one behind another, each in its pieces."""
    prompt = tl.program_id(0)
    rows = tl.arange(0, BLOCK)
    here = rows < num_rows
    begin = tl.load(query_start + first_row + rows, mask=here, other=0)
    end = tl.load(query_start + first_row + rows + 1, mask=here, other=0)
    start = tl.load(seq_len + first_row + rows, mask=here, other=0) - (end - begin)
    tiles = (end - begin + TILE - 1) // TILE
    most = tl.minimum(tl.maximum(PROGRAMS // (tl.maximum(tl.sum(tiles, 0), 1) * HEADS), 1), MOST)
    pieces = tl.minimum(tl.maximum(start // LEAST, 1), most)
    before, mine = rows < prompt, rows == prompt
    first = tl.sum(tl.where(before, tiles * pieces, 0), 0)
    first_tile = tl.sum(tl.where(before, tiles, 0), 0)
    own_tiles, own_pieces = tl.sum(tl.where(mine, tiles, 0), 0), tl.sum(tl.where(mine, pieces, 0), 0)
    token, own_start = tl.sum(tl.where(mine, begin, 0), 0), tl.sum(tl.where(mine, start, 0), 0)
    num, slot = tl.sum(tl.where(mine, end - begin, 0), 0), tl.load(slots + first_row + prompt)
    own = own_tiles * own_pieces
    if prompt == num_rows - 1:
        tl.store(work, first + own)
    for base in range(0, own, STORE):
        item = base + tl.arange(0, STORE)
        inside = item < own
        tile = item // own_pieces
        at = work + COUNTS + (first + item) * RECORD
        tl.store(at, tl.zeros([STORE], tl.int32) + slot, mask=inside)
        tl.store(at + 1, tl.zeros([STORE], tl.int32) + token, mask=inside)
        tl.store(at + 2, tl.zeros([STORE], tl.int32) + num, mask=inside)
        tl.store(at + 3, tl.zeros([STORE], tl.int32) + own_start, mask=inside)
        tl.store(at + 4, (own_tiles - 1 - tile) * TILE, mask=inside)  # the longest first
        tl.store(at + 5, item % own_pieces, mask=inside)
        tl.store(at + 6, tl.zeros([STORE], tl.int32) + own_pieces, mask=inside)
        tl.store(at + 7, first_tile + tile, mask=inside)
