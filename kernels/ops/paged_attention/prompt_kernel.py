"""Attention of rows with several new tokens: a program has one query head of one tile of them, or a piece of its keys.

keys of a tile    | cached prefix, in blocks | new tokens before the tile | the tile's own: masked along the diagonal |
read from           blocks                     the step's own rows, by TMA where their shape allows, else the blocks too

Keys of one piece are read in this order; where tiles are few, pieces share the prefix and the last has all the rest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .tile_kernel import finished, places, renewed, scored


@triton.jit
def over_blocks(
    state, pages, q, query, table, bounds, g, factors,
    G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's state after keys at positions bounds[0] .. bounds[1] - 1, all in blocks; without MASKED these are
    whole tiles, all before every query.
    """
    top, total, acc = state
    k, v = pages
    scale, factor, window = factors
    begin, end = bounds
    od = tl.arange(0, WIDE)
    for base in range(begin, end, BN):
        position = base + tl.arange(0, BN)
        inside = position < end
        place = places(table, position, inside, g, G, D, PAGE)[:, None] + od[None, :]
        read = inside[:, None] if D == WIDE else inside[:, None] & (od < D)[None, :]
        keys = tl.load(k + place, mask=read, other=0.0)
        values = tl.load(v + place, mask=read, other=0.0)
        scores = scored(q, keys, factor, SOFTCAP, PRECISION)
        if MASKED:
            scores = tl.where((query[:, None] >= position[None, :]) & inside[None, :], scores, -1e30)
        if WINDOWED:
            scores = tl.where(query[:, None] - position[None, :] < window, scores, -1e30)
        top, total, acc = renewed(top, total, acc, scores, values, scale, PRECISION)
    return top, total, acc


@triton.jit
def _over_rows(
    state, rows, tiles, q, query, bounds, where, factors,
    STEP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for new tokens, by their number among the row's; `query` is counted so, too. `where`: (token, number) at
    which the prompt's rows of this KV head begin.
    """
    top, total, acc = state
    k, v = rows
    k_tiles, v_tiles = tiles
    first, column = where
    scale, factor, window = factors
    begin, end = bounds
    od = tl.arange(0, WIDE)
    for base in range(begin, end, BN):
        token = base + tl.arange(0, BN)
        if TMA:
            keys = k_tiles.load([first + base, column])
            values = v_tiles.load([first + base, column])
        else:
            # Never beyond the prompt's end: there are another's rows, whose NaN times a weight of 0 would be NaN.
            at = (first + token).to(tl.int64)[:, None] * STEP + column + od[None, :]
            read = (token < end)[:, None] & (od < D)[None, :]
            keys = tl.load(k + at, mask=read, other=0.0)
            values = tl.load(v + at, mask=read, other=0.0)
        scores = scored(q, keys, factor, SOFTCAP, PRECISION)
        if MASKED:
            scores = tl.where((query[:, None] >= token[None, :]) & (token < end)[None, :], scores, -1e30)
        if WINDOWED:
            scores = tl.where(query[:, None] - token[None, :] < window, scores, -1e30)
        top, total, acc = renewed(top, total, acc, scores, values, scale, PRECISION)
    return top, total, acc


@triton.jit
def _blocks_of(piece, count, prefix, lowest, BN: tl.constexpr):
    """What a piece reads in blocks of positions lowest .. prefix - 1: its begin, the end of its whole tiles, its end.

    Tiles of keys begin at multiples of BN; behind a window there may be nothing left for a piece.
    """
    low = lowest // BN * BN
    limit = tl.maximum(prefix, low)
    each = (limit - low + count * BN - 1) // (count * BN) * BN
    begin = tl.minimum(low + piece * each, limit)
    stop = tl.minimum(begin + each, limit)
    return begin, begin + (stop - begin) // BN * BN, stop


@triton.jit
def _added_up(parts, lse, ticket, item, count, h, od, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """The result over a tile's pieces, the first of which is `item`, in their order."""
    top = tl.full([BM], -1e20, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, od.shape[0]], tl.float32)
    for piece in range(count):
        at = ((item + piece) * H + h) * BM + tl.arange(0, BM)
        weight = tl.load(lse + at, cache_modifier=".cg")  # another processor wrote them
        places_of = parts + at[:, None] * D + od[None, :]
        part = tl.load(places_of, mask=(od < D)[None, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, weight)
        fade, weight = tl.exp2(top - new_top), tl.exp2(weight - new_top)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * part
        top = new_top
    tl.store(ticket, 0)
    return acc / total[:, None]  # the last piece has the tile's own tokens: not 0


@triton.jit(do_not_specialize=["scale", "factor", "window"])
def attend_prompts(
    q, k_new, v_new,
    k_tiles, v_tiles,  # TMA descriptors of k_new and v_new; None without TMA
    k, v, out, sinks, blocks, work, parts, lse, tickets,
    scale, factor,  # of scores, times log2(e); of scores before tanh
    window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr,  # D or more, a power of 2
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,  # numbers between tokens of q, and between heads
    NEW_ROW: tl.constexpr, NEW_HEAD: tl.constexpr,  # the same of k_new and v_new
    TABLE: tl.constexpr,  # columns of `blocks`
    PAGE: tl.constexpr,
    COUNTS: tl.constexpr, RECORD: tl.constexpr,  # how `work` is laid out
    BM: tl.constexpr, BN: tl.constexpr,  # tile of queries and of keys, which divides it
    NEW: tl.constexpr,  # new tokens are read from k_new and v_new
    TMA: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Result of one query head of a tile; of its pieces, who comes last adds them up."""
    item, h = tl.program_id(0), tl.program_id(1)
    record = work + COUNTS + item * RECORD  # there is room for the whole grid: read before it is known to be meant
    slot, first, num, start = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    offset, piece, count = tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
    tile = tl.load(record + 7)
    if item >= tl.load(work):
        return
    last = piece == count - 1
    lowest = tl.maximum(start + offset - window + 1, 0) if WINDOWED else start * 0
    prefix = start if NEW else (start + offset) // BN * BN
    begin, whole, stop = _blocks_of(piece, count, prefix, lowest, BN)
    g = h // (H // G)
    om, od = offset + tl.arange(0, BM), tl.arange(0, WIDE)
    table = blocks + slot.to(tl.int64) * TABLE
    real = (om < num)[:, None] & (od < D)[None, :]
    at_q = (first + om).to(tl.int64)[:, None] * Q_ROW + h * Q_HEAD + od[None, :]
    qv = tl.load(q + at_q, mask=real, other=0.0)
    top, total = tl.full([BM], -1e20, tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:
        top = tl.where(last, tl.load(sinks + h).to(tl.float32) * 1.4426950408889634, top)
        total = tl.where(last, 1.0, total)
    state = (top, total, tl.zeros([BM, WIDE], tl.float32))
    factors = (scale, factor, window)
    state = over_blocks(
        state, (k, v), qv, start + om, table, (begin, whole), g, factors,
        G, D, WIDE, PAGE, BN, False, WINDOWED, SOFTCAP, PRECISION,
    )  # fmt: skip
    # What is left in blocks: the prefix's last tile, or the diagonal where new tokens are read from blocks as well.
    rest = stop if NEW else tl.where(last, start + tl.minimum(offset + BM, num), whole)
    state = over_blocks(
        state, (k, v), qv, start + om, table, (whole, rest), g, factors,
        G, D, WIDE, PAGE, BN, True, WINDOWED, SOFTCAP, PRECISION,
    )  # fmt: skip
    if NEW:
        low_new = tl.maximum(lowest - start, 0) // BN * BN
        rows, tiles, where = (k_new, v_new), (k_tiles, v_tiles), (first, g * NEW_HEAD)
        state = _over_rows(
            state, rows, tiles, qv, om, (low_new, tl.where(last, offset, low_new)), where, factors,
            NEW_ROW, D, WIDE, BN, False, TMA, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
        state = _over_rows(
            state, rows, tiles, qv, om, (offset, tl.where(last, tl.minimum(offset + BM, num), offset)), where, factors,
            NEW_ROW, D, WIDE, BN, True, False, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    top, total, acc = state
    result, weight = finished(top, total, acc)
    here = out + (first + om).to(tl.int64)[:, None] * (H * D) + h * D + od[None, :]
    if count == 1:
        tl.store(here, result.to(out.dtype.element_ty), mask=real)
    else:
        at = (item * H + h) * BM + tl.arange(0, BM)
        tl.store(parts + at[:, None] * D + od[None, :], result, mask=(od < D)[None, :])
        tl.store(lse + at, weight)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        ticket = tickets + tile * H + h
        if tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1:
            result = _added_up(parts, lse, ticket, item - piece, count, h, od, H, D, BM)
            tl.store(here, result.to(out.dtype.element_ty), mask=real)
