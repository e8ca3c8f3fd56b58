"""Attention of rows with one new token: a program reads one item's keys for all query heads of one KV head.

Query heads of a group are the rows of a matrix product, so keys and values are read once for all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .tile_kernel import finished, places, renewed, scored


@triton.jit
def _added_up(parts, lse, first, count, heads, given_heads, od, H: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """The result of `heads` over a row's items, in the order of the items, CHUNK of them at once."""
    top = tl.where(given_heads, -1e30, 0.0)
    total = tl.where(given_heads, 0.0, 1.0)
    acc = tl.zeros([heads.shape[0], od.shape[0]], tl.float32)
    for base in range(0, count, CHUNK):
        index = base + tl.arange(0, CHUNK)
        given = (index < count)[:, None] & given_heads[None, :]
        at = (first + index)[:, None] * H + heads[None, :]
        weight = tl.load(lse + at, mask=given, other=-1e30, cache_modifier=".cg")  # another processor wrote them
        read = given[:, :, None] & (od < D)[None, None, :]
        part = tl.load(parts + at[:, :, None] * D + od[None, None, :], mask=read, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(weight, 0))
        fade = tl.exp2(top - new_top)
        weight = tl.where(given, tl.exp2(weight - new_top[None, :]), 0.0)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * part, 0)
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
    slots,
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
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,  # rows of the product: query heads of the program, 16 or more
    SHARE: tl.constexpr,  # programs for one KV head
    REAL: tl.constexpr,  # query heads of the program at most, a power of 2
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Result of an item, or of its row where it is the only one or comes last."""
    item, which = tl.program_id(0), tl.program_id(1)
    if item < tl.load(work):
        lists = work + COUNTS
        row, begin, end = tl.load(lists + item), tl.load(lists + ITEMS + item), tl.load(lists + 2 * ITEMS + item)
        first, count = tl.load(lists + 3 * ITEMS + row), tl.load(lists + 3 * ITEMS + ROWS + row)
        table = blocks + tl.load(slots + row).to(tl.int64) * TABLE
        g, held = which // SHARE, which % SHARE
        om, od = held * HELD + tl.arange(0, HELD), tl.arange(0, WIDE)
        heads = g * GROUP + om
        real = (om < GROUP)[:, None] & (od < D)[None, :]
        qv = tl.load(q + row.to(tl.int64) * Q_ROW + heads[:, None] * Q_HEAD + od[None, :], mask=real, other=0.0)
        top = tl.full([HELD], -1e20, tl.float32)
        total = tl.zeros([HELD], tl.float32)
        if SINKS:
            sink = tl.load(sinks + heads, mask=om < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.where(item == first, sink, top)
            total = tl.where(item == first, total + 1.0, total)
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
                oj = held * HELD + tl.arange(0, REAL)
                summed = _added_up(parts, lse, first, count, g * GROUP + oj, oj < GROUP, od, H, D, CHUNK)
                inside = (oj < GROUP)[:, None] & (od < D)[None, :]
                at_out = here + (g * GROUP + oj)[:, None] * D + od[None, :]
                tl.store(at_out, summed.to(out.dtype.element_ty), mask=inside)
                tl.store(ticket, 0)
