"""Attention of rows with one new token: a program reads one item's keys for all query heads of one KV head.

Query heads of a group are the rows of a matrix product, so keys and values are read once for all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .tile_kernel import finished, places, renewed, scored


@triton.jit
def _added_up(parts, lse, first, count, heads, real_heads, od, H: tl.constexpr, D: tl.constexpr):
    """The result of `heads` over a row's items, in the order of the items."""
    top = tl.full([heads.shape[0]], -1e20, tl.float32)
    total = tl.zeros([heads.shape[0]], tl.float32)
    acc = tl.zeros([heads.shape[0], od.shape[0]], tl.float32)
    real = real_heads[:, None] & (od < D)[None, :]
    for item in range(count):
        at = (first + item) * H + heads
        weight = tl.load(lse + at, mask=real_heads, other=0.0, cache_modifier=".cg")  # another processor wrote them
        part = tl.load(parts + at[:, None] * D + od[None, :], mask=real, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, weight)
        fade, weight = tl.exp2(top - new_top), tl.exp2(weight - new_top)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * part
        top = new_top
    return acc / total[:, None]


@triton.jit(do_not_specialize=["scale", "factor"])
def attend_rows(
    q,
    k,
    v,
    out,
    sinks,
    blocks,
    work,
    parts,
    lse,
    tickets,
    scale,  # of scores, times log2(e)
    factor,  # before tanh
    GROUP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,  # D or more, a power of 2
    Q_ROW: tl.constexpr,  # numbers between tokens of q, and between heads
    Q_HEAD: tl.constexpr,
    TABLE: tl.constexpr,  # columns of `blocks`
    PAGE: tl.constexpr,
    COUNTS: tl.constexpr,  # how `work` is laid out
    RECORD: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,  # rows of the product: query heads of the program, 16 or more
    SHARE: tl.constexpr,  # programs for one KV head
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Result of an item, or of its row where it is the only one or comes last."""
    item, which = tl.program_id(0), tl.program_id(1)
    record = work + COUNTS + item * RECORD  # there is room for the whole grid: read before it is known to be meant
    row, slot, begin, end = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    index, count = tl.load(record + 4), tl.load(record + 5)
    if item < tl.load(work):
        table = blocks + slot.to(tl.int64) * TABLE
        g, held = which // SHARE, which % SHARE
        om, od = held * HELD + tl.arange(0, HELD), tl.arange(0, WIDE)
        heads = g * GROUP + om
        real = (om < GROUP)[:, None] & (od < D)[None, :]
        qv = tl.load(q + row.to(tl.int64) * Q_ROW + heads[:, None] * Q_HEAD + od[None, :], mask=real, other=0.0)
        top = tl.full([HELD], -1e20, tl.float32)
        total = tl.zeros([HELD], tl.float32)
        if SINKS:
            sink = tl.load(sinks + heads, mask=om < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.where(index == 0, sink, top)
            total = tl.where(index == 0, total + 1.0, total)
        acc = tl.zeros([HELD, WIDE], tl.float32)
        for base in range(begin, end, TILE):
            position = base + tl.arange(0, TILE)
            inside = position < end
            place = places(table, position, inside, g, G, D, PAGE)[:, None] + od[None, :]
            read = inside[:, None] if D == WIDE else inside[:, None] & (od < D)[None, :]
            keys = tl.load(k + place, mask=read, other=0.0)
            values = tl.load(v + place, mask=read, other=0.0)
            scores = tl.where(inside[None, :], scored(qv, keys, factor, SOFTCAP, PRECISION), -1e30)
            top, total, acc = renewed(top, total, acc, scores, values, scale, PRECISION)
        H: tl.constexpr = G * GROUP
        here = out + row.to(tl.int64) * (H * D)
        result, weight = finished(top, total, acc)
        if count == 1:
            tl.store(here + heads[:, None] * D + od[None, :], result.to(out.dtype.element_ty), mask=real)
        else:
            at = item * H + heads
            tl.store(parts + at[:, None] * D + od[None, :], result, mask=real)
            tl.store(lse + at, weight, mask=om < GROUP)
            tl.debug_barrier()  # every thread's part is written before one of them says so
            ticket = tickets + row * (G * SHARE) + which
            if tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1:
                summed = _added_up(parts, lse, item - index, count, heads, om < GROUP, od, H, D)
                tl.store(here + heads[:, None] * D + od[None, :], summed.to(out.dtype.element_ty), mask=real)
                tl.store(ticket, 0)
