"""Triton: logprobs, ranks and the most likely tokens of rows of logits, in three passes over their tiles.

R rows asked for, V tokens in tiles of TILE, of which a row has at most SP. Among the most likely each token is one
number: the order of its logprob above, what is left of its id below, so that the larger one comes first, and equal ones
by id.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_tiles(logits, rows, most, sums, STRIDE: tl.constexpr, V: tl.constexpr, SP: tl.constexpr, TILE: tl.constexpr):
    """Grid (R, tiles): the largest logit of the tile, +inf where one is NaN, and the sum of exp below it."""
    r, t = tl.program_id(0), tl.program_id(1)
    v = t * TILE + tl.arange(0, TILE)
    x = tl.load(logits + tl.load(rows + r) * STRIDE + v, mask=v < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    best = tl.max(x, 0)
    is_number = (best > float("-inf")) & (best < float("inf"))
    base = tl.where(is_number, best, 0.0)
    weight = tl.exp(tl.where(x < float("inf"), x - base, 0.0).to(tl.float64))
    tl.store(most + r * SP + t, best)
    tl.store(sums + r * SP + t, tl.sum(weight, 0))


@triton.jit
def normal_of(most, sums, num_tiles, SP: tl.constexpr):
    """A row's largest logit, the logarithm of the sum of exp beside it, and whether these are numbers."""
    t = tl.arange(0, SP)
    best = tl.load(most + t, mask=t < num_tiles, other=float("-inf"))
    total = tl.load(sums + t, mask=t < num_tiles, other=0.0)
    highest = tl.max(best, 0)
    is_number = (highest > float("-inf")) & (highest < float("inf"))
    below = tl.where((best > float("-inf")) & (best < float("inf")), best, -1e30)
    share = tl.exp(tl.minimum(below.to(tl.float64) - tl.where(is_number, highest, 0.0).to(tl.float64), 0.0))
    total = tl.where(is_number, tl.sum(share * total, 0), 1.0)
    return tl.where(is_number, highest, 0.0), tl.log(total).to(tl.float32), is_number


@triton.jit(do_not_specialize=["most_told"])
def rank_tiles(
    logits,
    rows,
    tokens,
    most,
    sums,
    above,
    keys,
    most_told,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SP: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (R, tiles): how many of the tile are likelier than the row's token, and its likeliest ones."""
    r, t = tl.program_id(0), tl.program_id(1)
    row = logits + tl.load(rows + r) * STRIDE
    highest, shift, is_number = normal_of(most + r * SP, sums + r * SP, tl.num_programs(1), SP)
    if is_number:
        v = t * TILE + tl.arange(0, TILE)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        x = (x - highest) - shift
        own = (tl.load(row + tl.load(tokens + r)).to(tl.float32) - highest) - shift
        tl.store(above + r * SP + t, tl.sum(((x > own) & (v < V)).to(tl.int32), 0))
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        order = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
        none = tl.full([TILE], -(2**63), tl.int64)
        key = tl.where(v < V, order * 4294967296 + (0x7FFFFFFF - v).to(tl.int64), none)
        for k in range(most_told):
            best = tl.max(key, 0)
            tl.store(keys + (r * SP + t) * KP + k, best)
            key = tl.where(key == best, none, key)


@triton.jit(do_not_specialize=["num_tiles", "most_told"])
def tell_rows(
    logits,
    rows,
    tokens,
    most,
    sums,
    above,
    keys,
    own,
    ranks,
    ids,
    values,
    num_tiles,
    most_told,
    STRIDE: tl.constexpr,
    SP: tl.constexpr,
    KP: tl.constexpr,
):
    """Grid (R): a row's columns, from its tiles. One that is not a number is NaN throughout, its ids are 0."""
    r = tl.program_id(0)
    highest, shift, is_number = normal_of(most + r * SP, sums + r * SP, num_tiles, SP)
    if is_number:
        t = tl.arange(0, SP)
        x = tl.load(logits + tl.load(rows + r) * STRIDE + tl.load(tokens + r)).to(tl.float32)
        tl.store(own + r, (x - highest) - shift)
        tl.store(ranks + r, tl.sum(tl.load(above + r * SP + t, mask=t < num_tiles, other=0), 0).to(tl.int64) + 1)
        at = tl.arange(0, SP * KP)
        none = tl.full([SP * KP], -(2**63), tl.int64)
        here = (at // KP < num_tiles) & (at % KP < most_told)
        key = tl.where(here, tl.load(keys + r * SP * KP + at, mask=here, other=0), none)
        for k in range(most_told):
            best = tl.max(key, 0)
            key = tl.where(key == best, none, key)
            order = best >> 32
            bits = tl.where(order >= 0, order, order ^ 0x7FFFFFFF).to(tl.int32)
            tl.store(values + r * most_told + k, bits.to(tl.float32, bitcast=True))
            tl.store(ids + r * most_told + k, 0x7FFFFFFF - (best & 0xFFFFFFFF))
    else:
        nan = shift + float("nan")
        tl.store(own + r, nan)
        tl.store(ranks + r, tl.full([], 1, tl.int64))
        for k in range(most_told):
            tl.store(values + r * most_told + k, nan)
            tl.store(ids + r * most_told + k, tl.full([], 0, tl.int64))
