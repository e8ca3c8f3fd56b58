"""Triton: what top_k, top_p and min_p leave of a row's weights, without sorting them; letters as in kernel.py.

Kept is what weighs more than the pivot, and of what weighs just that the `extra` first by id. The pivot is searched
among all weights from 0 to 1, as bits: eight are measured in a turn, and the next turn goes on between two of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def points_of(lo, hi):
    """The eight weights that a turn measures beyond. Ten turns leave one of 2**30."""
    return tl.minimum(lo + tl.arange(0, 8) * ((hi - lo) // 8 + 1), hi)


@triton.jit
def wanted_mass(asked, found, pivot, extra):
    """top_p of what top_k has left: of all beyond its pivot, the first point measured, and of what weighs just that."""
    total = tl.sum(tl.where(tl.arange(0, 8) == 0, found, 0.0), 0)
    total += extra.to(tl.float64) * pivot.to(tl.float32, bitcast=True).to(tl.float64)
    return tl.maximum(asked * total, 1e-300)  # a top_p of 0 keeps the heaviest


@triton.jit
def between(found, limit, lo, hi, beyond):
    """Where the least weight lies beyond which there is less than `limit`, and what is beyond the upper end.

    If just as much as wanted lies beyond a point, it is the pivot, and no token that weighs as much is kept.
    """
    j, points = tl.arange(0, 8), points_of(lo, hi)
    exact = tl.min(tl.where(found == limit, j, 8), 0)
    chosen = tl.where(exact < 8, exact, tl.sum((found >= limit).to(tl.int32), 0))
    point = tl.sum(tl.where(j == chosen, points, 0), 0)
    before = tl.sum(tl.where(j == chosen - 1, points, 0), 0)
    last = tl.sum(tl.where(j == 7, points, 0), 0)
    beyond = tl.where(chosen < 8, tl.sum(tl.where(j == chosen, found, 0.0), 0), beyond)
    hi = tl.where(chosen < 8, point, hi)
    lo = tl.where(chosen == 8, last + 1, tl.where(chosen > 0, before + 1, lo))
    return tl.where(exact < 8, hi, lo), hi, beyond


@triton.jit
def resume(
    i,
    asked,
    pivot,
    extra,
    parts,
    interval,
    masses,
    num_parts,
    turn,
    MASS: tl.constexpr,
    TOP: tl.constexpr,
    SP: tl.constexpr,
):
    """Where the search stands after the turn before: lo, hi, what is beyond hi, and the limit."""
    lo, hi, beyond, limit = pivot, pivot * 0 + TOP, asked.to(tl.float64) * 0.0, asked.to(tl.float64)
    if turn > 0:
        lo, hi = tl.load(interval + 2 * i), tl.load(interval + 2 * i + 1)
        beyond, limit = tl.load(masses + 2 * i), tl.load(masses + 2 * i + 1)
        if (lo < hi) | (turn == 1):
            s, j = tl.arange(0, SP)[:, None], tl.arange(0, 8)[None, :]
            found = tl.sum(tl.load(parts + (i * SP + s) * 8 + j, mask=s < num_parts, other=0.0), 0)
            if MASS:
                limit = tl.where(turn == 1, wanted_mass(asked, found, pivot, extra), limit)
            lo, hi, beyond = between(found, limit, lo, hi, beyond)
    return lo, hi, beyond, limit


@triton.jit(do_not_specialize=["num_parts", "turn"])
def narrow(
    wire,
    where,
    scratch,
    flags,
    temperatures,
    wanted,
    pivots,
    extras,
    parts_before,
    parts,
    interval_before,
    interval,
    masses_before,
    masses,
    num_parts,
    turn,
    MASS: tl.constexpr,
    TURNS: tl.constexpr,
    TOP: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A, segments; one at last): one turn of the search for the pivot, the least weight beyond which there is
    less than wanted: fewer than top_k tokens, or less (MASS) than top_p of the mass that top_k leaves. Turn TURNS
    settles it.
    """
    i, s = tl.program_id(0), tl.program_id(1)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot, place = tl.load(at), tl.load(at + 4)
    asked = tl.load(wanted + slot)
    is_asked = (asked < 1) if MASS else ((asked > 0) & (asked < V))
    if is_asked & (tl.load(temperatures + slot) != 0) & (tl.load(flags + place) == 0):
        pivot, extra = tl.load(pivots + i), tl.load(extras + i)
        lo, hi, beyond, limit = resume(
            i, asked, pivot, extra, parts_before, interval_before, masses_before, num_parts, turn, MASS, TOP, SP
        )
        if turn < TURNS:
            if s == 0:
                tl.store(interval + 2 * i, lo)
                tl.store(interval + 2 * i + 1, hi)
                tl.store(masses + 2 * i, beyond)
                tl.store(masses + 2 * i + 1, limit)
            if (lo < hi) | (turn == 0):
                points = points_of(lo, hi)
                total = tl.zeros([TILE, 8], tl.float64)
                for begin in range(0, SPAN, TILE):
                    v = s * SPAN + begin + tl.arange(0, TILE)
                    weight = tl.load(scratch + i.to(tl.int64) * STRIDE + v, mask=v < V, other=0.0)
                    bits = weight.to(tl.int32, bitcast=True)
                    mass = weight.to(tl.float64) if MASS else tl.full([TILE], 1.0, tl.float64)
                    total += tl.where(bits[:, None] > points[None, :], mass[:, None], 0.0)
                tl.store(parts + (i * SP + s) * 8 + tl.arange(0, 8), tl.sum(total, 0))
        else:
            weight = hi.to(tl.float32, bitcast=True).to(tl.float64) if MASS else 1.0
            kept = tl.minimum(tl.ceil((limit - beyond) / weight), V).to(tl.int32)
            if MASS:
                kept = tl.where(hi == pivot, tl.minimum(kept, extra), kept)
            tl.store(pivots + i, hi)
            tl.store(extras + i, kept)


@triton.jit
def weigh_kept(
    wire,
    where,
    scratch,
    flags,
    temperatures,
    min_ps,
    pivots,
    sums,
    equals,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A, segments): what each segment keeps beyond the pivot, and how many tokens weigh just that."""
    i, s = tl.program_id(0), tl.program_id(1)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot, place = tl.load(at), tl.load(at + 4)
    if (tl.load(temperatures + slot) != 0) & (tl.load(flags + place) == 0):
        pivot, least = tl.load(pivots + i), tl.load(min_ps + slot)
        total, equal = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.int32)
        for begin in range(0, SPAN, TILE):
            v = s * SPAN + begin + tl.arange(0, TILE)
            weight = tl.load(scratch + i.to(tl.int64) * STRIDE + v, mask=v < V, other=0.0)
            bits, mass = weight.to(tl.int32, bitcast=True), weight.to(tl.float64)
            total += tl.where((bits > pivot) & (mass >= least), mass, 0.0)
            equal += ((bits == pivot) & (v < V)).to(tl.int32)
        tl.store(sums + i * SP + s, tl.sum(total, 0))
        tl.store(equals + i * SP + s, tl.sum(equal, 0))
