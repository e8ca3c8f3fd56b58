"""Triton: the rules of rows that have some, as the definition orders them, on a float32 copy of their logits.

A slot's rules are a record of device/rules.py; its history are its tokens so far, by position. Tokens that occur more
than once are taken once: `counts`, all 0 between steps, tells who of those that found a token may change its logit.
Products are rounded from float64, so that no compiler makes one operation of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_allowed(
    logits,
    wire,
    where,
    masked,
    masks,
    scratch,
    kinds,
    flags,
    rules,
    records,
    RULED: tl.constexpr,
    HEAD: tl.constexpr,
    MASK: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A, segments): the logits, -inf where a token is not allowed, by the record or by a guide's mask."""
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot, place = tl.load(at), tl.load(at + 4).to(tl.int64)
    if ((tl.load(kinds + slot) & RULED) != 0) & (tl.load(flags + place) == 0):
        rule = rules + tl.load(records + slot)
        masked_end = tl.where(tl.load(rule + 5) != 0, V, 0)
        number = tl.load(masked + i).to(tl.int64)
        guided_end = tl.where(number >= 0, V, 0)
        guide = masks + number * MASK
        for begin in range(0, SPAN, TILE):
            v = tl.program_id(1) * SPAN + begin + tl.arange(0, TILE)
            x = tl.load(logits + place * LOGITS_STRIDE + v, mask=v < V, other=0.0).to(tl.float32)
            word = tl.load(rule + HEAD + v // 32, mask=v < masked_end, other=-1)
            word &= tl.load(guide + v // 32, mask=v < guided_end, other=-1)
            x = tl.where(((word >> (v % 32)) & 1) != 0, x, float("-inf"))
            tl.store(scratch + i.to(tl.int64) * STRIDE + v, x, mask=v < V)


@triton.jit(do_not_specialize=["history_stride"])
def change_listed(
    wire,
    where,
    scratch,
    kinds,
    flags,
    rules,
    records,
    histories,
    history_stride,
    RULED: tl.constexpr,
    HEAD: tl.constexpr,
    MASK: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (A): bias; then bad words that the history completes, and the stop tokens of an answer that is too short."""
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot = tl.load(at).to(tl.int64)
    if ((tl.load(kinds + slot) & RULED) != 0) & (tl.load(flags + tl.load(at + 4)) == 0):
        row = scratch + i.to(tl.int64) * STRIDE
        position = tl.load(at + 1) + tl.load(at + 2)
        rule = rules + tl.load(records + slot)
        lane = tl.arange(0, BLOCK)
        ids = rule + HEAD + tl.where(tl.load(rule + 5) != 0, MASK, 0)
        num = tl.load(rule + 6)
        for begin in range(0, num, BLOCK):
            here = begin + lane < num
            token = tl.load(ids + begin + lane, mask=here, other=0)
            bias = tl.load(ids + num + begin + lane, mask=here, other=0).to(tl.float32, bitcast=True)
            x = tl.load(row + token, mask=here, other=0.0)
            tl.store(row + token, x + bias, mask=here)
        tl.debug_barrier()
        ids += 2 * num
        num = tl.load(rule + 7)
        banned = tl.where(position - tl.load(rule) < tl.load(rule + 1), num, 0)
        for begin in range(0, banned, BLOCK):
            here = begin + lane < banned
            token = tl.load(ids + begin + lane, mask=here, other=0)
            tl.store(row + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=here)
        ids += num
        num, longest = tl.load(rule + 8), tl.load(rule + 9)
        history = histories + slot * history_stride
        for begin in range(0, num, BLOCK):
            here = begin + lane < num
            first = tl.load(ids + begin + lane, mask=here, other=0)
            before = tl.load(ids + begin + lane + 1, mask=here, other=1) - first - 1  # tokens but the last
            here = here & (before <= position)
            for j in range(longest):
                known = here & (j < before)
                wanted = tl.load(ids + num + 1 + first + j, mask=known, other=0)
                found = tl.load(history + position - before + j, mask=known, other=0)
                here = here & (wanted == tl.maximum(found, 0))
            token = tl.load(ids + num + 1 + first + before, mask=here, other=0)
            tl.store(row + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=here)


@triton.jit
def _history_of(rule, at, histories, slot, history_stride, generated):
    """Where the tokens begin that this penalty looks at, and their number."""
    first = tl.where(generated != 0, tl.load(rule), 0)
    return histories + slot * history_stride + first, tl.load(at + 1) + tl.load(at + 2) - first


@triton.jit
def _is_penalised(kinds, flags, rule, slot, place, generated, RULED: tl.constexpr):
    is_sound = ((tl.load(kinds + slot) & RULED) != 0) & (tl.load(flags + place) == 0)
    if generated != 0:
        asked = (tl.load(rule + 3) != 0) | (tl.load(rule + 4) != 0)
    else:
        asked = tl.load(rule + 2).to(tl.float32, bitcast=True) != 1
    return is_sound & asked


@triton.jit(do_not_specialize=["history_stride", "generated"])
def count_tokens(
    wire,
    where,
    counts,
    kinds,
    flags,
    rules,
    records,
    histories,
    history_stride,
    generated,
    RULED: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (A, pieces of the longest history): how often each token occurs, in all or in what was `generated`."""
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot = tl.load(at).to(tl.int64)
    rule = rules + tl.load(records + slot)
    if _is_penalised(kinds, flags, rule, slot, tl.load(at + 4), generated, RULED):
        history, num = _history_of(rule, at, histories, slot, history_stride, generated)
        begin = tl.program_id(1) * PIECE
        for offset in range(begin, tl.minimum(begin + PIECE, num), BLOCK):
            j = offset + tl.arange(0, BLOCK)
            token = tl.maximum(tl.load(history + j, mask=j < num, other=0), 0)
            here = (j < num) & (token < V)
            tl.atomic_add(counts + i.to(tl.int64) * STRIDE + token, 1, mask=here, sem="relaxed")


@triton.jit(do_not_specialize=["history_stride", "generated"])
def penalise(
    wire,
    where,
    counts,
    kinds,
    flags,
    rules,
    records,
    histories,
    scratch,
    history_stride,
    generated,
    RULED: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same grid: who takes a token's count leaves 0 and changes its logit."""
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot = tl.load(at).to(tl.int64)
    rule = rules + tl.load(records + slot)
    if _is_penalised(kinds, flags, rule, slot, tl.load(at + 4), generated, RULED):
        history, num = _history_of(rule, at, histories, slot, history_stride, generated)
        begin = tl.program_id(1) * PIECE
        row = i.to(tl.int64) * STRIDE
        for offset in range(begin, tl.minimum(begin + PIECE, num), BLOCK):
            j = offset + tl.arange(0, BLOCK)
            token = tl.maximum(tl.load(history + j, mask=j < num, other=0), 0)
            here = (j < num) & (token < V)
            none = tl.zeros([BLOCK], tl.int32)
            count = tl.atomic_xchg(counts + row + token, none, mask=here, sem="relaxed")
            mine = here & (count > 0)
            x = tl.load(scratch + row + token, mask=mine, other=0.0)
            if generated != 0:
                frequency = tl.load(rule + 3).to(tl.float32, bitcast=True).to(tl.float64)
                x = x - (frequency * count.to(tl.float64)).to(tl.float32)
                x = x - tl.load(rule + 4).to(tl.float32, bitcast=True)
            else:
                penalty = tl.load(rule + 2).to(tl.float32, bitcast=True).to(tl.float64)
                wide = x.to(tl.float64)
                x = tl.where(x > 0, wide / penalty, wide * penalty).to(tl.float32)
            tl.store(scratch + row + token, x, mask=mine)
