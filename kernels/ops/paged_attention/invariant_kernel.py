"""Attention where no bit of a row may depend on its company: one kernel for decoding rows, prompts and parts of them.

A program has a tile of a row's new tokens, each with the query heads of one KV head. It reads every key from blocks, in
tiles that begin at multiples of BN from position 0, all of them masked and in one loop: how a row is cut into steps,
and what of it was cached, changes neither a sum nor its order. Keys behind a token add exact zeros.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .prompt_kernel import over_blocks
from .tile_kernel import finished


@triton.jit(do_not_specialize=["scale", "factor", "window"])
def attend_tiles(
    q, k, v, out, sinks, blocks, work,
    scale, factor,  # of scores, times log2(e); of scores before tanh
    window,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr,  # D or more, a power of 2
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,  # numbers between tokens of q, and between heads
    TABLE: tl.constexpr,  # columns of `blocks`
    PAGE: tl.constexpr,
    COUNTS: tl.constexpr, RECORD: tl.constexpr,  # how `work` is laid out
    BM: tl.constexpr, BN: tl.constexpr,  # tile of queries and of keys
    HELD: tl.constexpr,  # query heads of a token in the tile, a power of 2
    SHARE: tl.constexpr,  # programs for one KV head
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Results of a tile."""
    item, which = tl.program_id(0), tl.program_id(1)
    record = work + COUNTS + item * RECORD  # there is room for the whole grid: read before it is known to be meant
    slot, first, num, start = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    offset = tl.load(record + 4)
    if item >= tl.load(work):
        return
    g, place = which // SHARE, tl.arange(0, BM)
    token, member = offset + place // HELD, which % SHARE * HELD + place % HELD
    head, od = g * GROUP + member, tl.arange(0, WIDE)
    real = ((token < num) & (member < GROUP))[:, None] & (od < D)[None, :]
    row = (first + token).to(tl.int64)
    qv = tl.load(q + (row * Q_ROW + head * Q_HEAD)[:, None] + od[None, :], mask=real, other=0.0)
    top, total = tl.full([BM], -1e20, tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=member < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    lowest = tl.maximum(start + offset - window + 1, 0) // BN * BN if WINDOWED else start * 0
    end = start + tl.minimum(offset + BM // HELD, num)
    table = blocks + slot.to(tl.int64) * TABLE
    state = (top, total, tl.zeros([BM, WIDE], tl.float32))
    state = over_blocks(
        state, (k, v), qv, start + token, table, (lowest, end), g, (scale, factor, window),
        G, D, WIDE, PAGE, BN, True, WINDOWED, SOFTCAP, PRECISION,
    )  # fmt: skip
    top, total, acc = state
    result, _ = finished(top, total, acc)
    here = out + row[:, None] * (G * GROUP * D) + head[:, None] * D + od[None, :]
    tl.store(here, result.to(out.dtype.element_ty), mask=real)
