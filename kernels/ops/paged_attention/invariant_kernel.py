"""Attention where no bit of a row may depend on its company: one kernel for decoding rows, prompts and parts of them.

A tile has some of a row's new tokens, each with the query heads of one KV head. Every key is read from blocks, in tiles
from position 0, all masked, and SPAN keys at a time make a sum of their own; these are added up in their order. So how
a row is cut into steps, what of it was cached, and whether one program computes all sums of a tile or several one
each, changes no sum and no order. Keys behind a token, or before its window, add exact zeros.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .prompt_kernel import over_blocks
from .tile_kernel import finished


@triton.jit(do_not_specialize=["num_rows"])
def plan_pieces(
    query_start,
    seq_len,
    slots,
    work,
    num_rows,
    COUNTS: tl.constexpr,
    RECORD: tl.constexpr,
    ROOM: tl.constexpr,  # pieces whose sums find room
    SPAN: tl.constexpr,  # keys of a piece
    TILE: tl.constexpr,  # tokens
    BLOCK: tl.constexpr,  # num_rows or more, a power of 2
    STORE: tl.constexpr,  # items written at once
):
    """Tiles of each row's new tokens, one behind another. All that have several pieces are cut into these, or none."""
    row = tl.program_id(0)
    rows = tl.arange(0, BLOCK)
    here = rows < num_rows
    begin = tl.load(query_start + rows, mask=here, other=0)
    num = tl.load(query_start + rows + 1, mask=here, other=0) - begin
    length = tl.load(seq_len + rows, mask=here, other=0)
    tiles, pieces = (num + TILE - 1) // TILE, (length + SPAN - 1) // SPAN
    sums = tl.where(pieces > 1, tiles * pieces, 0)
    pieces = tl.where((pieces > 1) & (tl.sum(sums, 0) <= ROOM), pieces, 1)
    before, mine = rows < row, rows == row
    first = tl.sum(tl.where(before, tiles * pieces, 0))
    place = tl.sum(tl.where(before, sums, 0))
    own_tiles, own_pieces = tl.sum(tl.where(mine, tiles, 0), 0), tl.sum(tl.where(mine, pieces, 0), 0)
    own_num, own_begin = tl.sum(tl.where(mine, num, 0), 0), tl.sum(tl.where(mine, begin, 0), 0)
    start, slot = tl.load(seq_len + row) - own_num, tl.load(slots + row)
    own = own_tiles * own_pieces
    if row == num_rows - 1:
        tl.store(work, first + own)
    for base in range(0, own, STORE):
        item = base + tl.arange(0, STORE)
        inside = item < own
        tile = item // own_pieces
        at = work + COUNTS + (first + item) * RECORD
        tl.store(at, tl.zeros([STORE], tl.int32) + slot, mask=inside)
        tl.store(at + 1, tl.zeros([STORE], tl.int32) + own_begin, mask=inside)
        tl.store(at + 2, tl.zeros([STORE], tl.int32) + own_num, mask=inside)
        tl.store(at + 3, tl.zeros([STORE], tl.int32) + start, mask=inside)
        tl.store(at + 4, (own_tiles - 1 - tile) * TILE, mask=inside)  # the longest first
        tl.store(at + 5, item % own_pieces, mask=inside)
        tl.store(at + 6, tl.zeros([STORE], tl.int32) + own_pieces, mask=inside)
        tl.store(at + 7, place + tile * own_pieces, mask=inside)


@triton.jit
def _begun(sinks, head, real_head, BM: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr):
    """The state before any piece."""
    top, total = tl.full([BM], -1e20, tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=real_head, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    return top, total, tl.zeros([BM, WIDE], tl.float32)


@triton.jit
def _joined(top, total, acc, part, weight):
    """The state after a piece. What is fused is written out: a compiler may choose either product of a sum of two, and
    this is compiled twice.
    """
    new_top = tl.maximum(top, weight)
    fade, share = tl.exp2(top - new_top), tl.exp2(weight - new_top)
    return new_top, tl.fma(total, fade, share), tl.fma(share[:, None], part, acc * fade[:, None])


@triton.jit(do_not_specialize=["scale", "factor", "window"])
def attend_tiles(
    q, k, v, out, sinks, blocks, work, parts, lse, tickets,
    scale, factor,  # of scores, times log2(e); of scores before tanh
    window,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr,  # D or more, a power of 2
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,  # numbers between tokens of q, and between heads
    TABLE: tl.constexpr,  # columns of `blocks`
    PAGE: tl.constexpr,
    COUNTS: tl.constexpr, RECORD: tl.constexpr,  # how `work` is laid out
    BM: tl.constexpr, BN: tl.constexpr,  # tile of queries and of keys, which divides SPAN
    SPAN: tl.constexpr,
    HELD: tl.constexpr,  # query heads of a token in the tile, a power of 2
    SHARE: tl.constexpr,  # programs for one KV head
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Results of a tile; of its pieces, where it is cut, who comes last adds them up."""
    item, which = tl.program_id(0), tl.program_id(1)
    record = work + COUNTS + item * RECORD  # there is room for the whole grid: read before it is known to be meant
    slot, first, num, start = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    offset, piece, count = tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
    room = tl.load(record + 7)
    if item >= tl.load(work):
        return
    g, place = which // SHARE, tl.arange(0, BM)
    token, member = offset + place // HELD, which % SHARE * HELD + place % HELD
    head, od = g * GROUP + member, tl.arange(0, WIDE)
    real = ((token < num) & (member < GROUP))[:, None] & (od < D)[None, :]
    row = (first + token).to(tl.int64)
    qv = tl.load(q + (row * Q_ROW + head * Q_HEAD)[:, None] + od[None, :], mask=real, other=0.0)
    lowest = tl.maximum(start + offset - window + 1, 0) // BN * BN if WINDOWED else start * 0
    end = start + tl.minimum(offset + BM // HELD, num)
    whole = count == 1
    table = blocks + slot.to(tl.int64) * TABLE
    top, total, acc = _begun(sinks, head, member < GROUP, BM, WIDE, SINKS)
    if SINKS:  # a piece alone has none: they are counted where pieces are added up
        top, total = tl.where(whole, top, -1e20), tl.where(whole, total, 0.0)
    for at in range(tl.where(whole, lowest // SPAN, piece), tl.where(whole, (end + SPAN - 1) // SPAN, piece + 1)):
        bounds = (tl.maximum(at * SPAN, lowest), tl.minimum(at * SPAN + SPAN, end))
        empty = (tl.full([BM], -1e20, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, WIDE], tl.float32))
        own_top, own_total, own_acc = over_blocks(
            empty, (k, v), qv, start + token, table, bounds, g, (scale, factor, window),
            G, D, WIDE, PAGE, BN, True, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
        part, weight = finished(own_top, own_total, own_acc)
        top, total, acc = _joined(top, total, acc, part, weight)
    result, weight = finished(top, total, acc)
    here = out + row[:, None] * (G * GROUP * D) + head[:, None] * D + od[None, :]
    if whole:
        tl.store(here, result.to(out.dtype.element_ty), mask=real)
    else:
        # Joined to nothing, a piece is itself, to the last bit.
        mine = ((room + piece) * (G * SHARE) + which) * BM + place
        tl.store(parts + mine.to(tl.int64)[:, None] * D + od[None, :], result, mask=real)
        tl.store(lse + mine, weight)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        ticket = tickets + room * (G * SHARE) + which
        if tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1:
            top, total, acc = _begun(sinks, head, member < GROUP, BM, WIDE, SINKS)
            for other in range(count):
                theirs = ((room + other) * (G * SHARE) + which) * BM + place
                weight = tl.load(lse + theirs, cache_modifier=".cg")  # another processor wrote them
                places_of = parts + theirs.to(tl.int64)[:, None] * D + od[None, :]
                part = tl.load(places_of, mask=real, other=0.0, cache_modifier=".cg")
                top, total, acc = _joined(top, total, acc, part, weight)
            result, _ = finished(top, total, acc)
            tl.store(here, result.to(out.dtype.element_ty), mask=real)
            tl.store(ticket, 0)
