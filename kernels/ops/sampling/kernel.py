"""The op's Triton kernels but those of rules and filters: the largest logit, weights, the draw.

Rows A of a piece, V tokens in at most SP segments of SPAN. Sums are taken in float64 and in one order, so that a row's
token depends on its logits and its spec alone. Weights are float32 of exp in float64: what they are does not depend on
the card, and is the definition's to the last bit but one. Their bits order as they do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def best_of_segment(row, V: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr):
    """The largest of this program's segment and its lowest id. +inf where a logit is NaN."""
    first = tl.program_id(1) * SPAN
    lane = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    found = tl.zeros([TILE], tl.int32)
    for begin in range(0, SPAN, TILE):
        at = first + begin + lane
        x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)
        found = tl.where(x > best, at, found)
        best = tl.where(x > best, x, best)
    most = tl.max(best, 0)
    return most, tl.min(tl.where(best == most, found, V), 0)


@triton.jit
def is_last_segment(values, ids, ticket, value, token):
    """Leave this segment's; whether all others of the row have done so."""
    here = tl.program_id(1)
    tl.store(values + here, value)
    tl.store(ids + here, token)
    tl.debug_barrier()
    return tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit
def best_of_row(values, ids, ticket, V: tl.constexpr, SP: tl.constexpr):
    """Of all segments, and whether it is a number; the ticket is 0 again."""
    s = tl.arange(0, SP)
    here = s < tl.num_programs(1)
    value = tl.load(values + s, mask=here, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(ids + s, mask=here, other=V, cache_modifier=".cg")
    most = tl.max(value, 0)
    tl.store(ticket, 0)
    is_sound = (most > float("-inf")) & (most < float("inf"))
    return most, tl.min(tl.where(value == most, token, V), 0), is_sound


@triton.jit
def largest(
    logits,
    values,
    ids,
    tickets,
    tokens,
    flags,
    best,
    UNSOUND: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows, segments): token, flag and value of the largest logit of each row, the lowest id among equals."""
    n = tl.program_id(0)
    value, token = best_of_segment(logits + n.to(tl.int64) * STRIDE, V, SPAN, TILE)
    if is_last_segment(values + n * SP, ids + n * SP, tickets + n, value, token):
        value, token, is_sound = best_of_row(values + n * SP, ids + n * SP, tickets + n, V, SP)
        tl.store(tokens + n, tl.where(is_sound, token, 0).to(tl.int64))
        tl.store(flags + n, tl.where(is_sound, 0, UNSOUND))
        tl.store(best + n, value)


@triton.jit
def largest_ruled(
    wire,
    where,
    scratch,
    kinds,
    values,
    ids,
    tickets,
    tokens,
    flags,
    ruled_best,
    RULED: tl.constexpr,
    RULED_OUT: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A, segments): the same of rows with rules, after these. Rows whose logits were not sound stay so."""
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    place = tl.load(at + 4)
    if ((tl.load(kinds + tl.load(at)) & RULED) != 0) & (tl.load(flags + place) == 0):
        value, token = best_of_segment(scratch + i.to(tl.int64) * STRIDE, V, SPAN, TILE)
        if is_last_segment(values + i * SP, ids + i * SP, tickets + i, value, token):
            value, token, is_sound = best_of_row(values + i * SP, ids + i * SP, tickets + i, V, SP)
            tl.store(tokens + place, tl.where(is_sound, token, 0).to(tl.int64))
            tl.store(flags + place, tl.where(is_sound, 0, RULED_OUT))  # every segment of the row has read it
            tl.store(ruled_best + i, value)


@triton.jit
def weigh(
    logits,
    wire,
    where,
    scratch,
    kinds,
    temperatures,
    flags,
    best,
    ruled_best,
    sums,
    equals,
    pivots,
    extras,
    RULED: tl.constexpr,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A, segments): weights into `scratch`, from there where rules were at work; their sum by segment."""
    i, s = tl.program_id(0), tl.program_id(1)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot, place = tl.load(at), tl.load(at + 4).to(tl.int64)
    temperature = tl.load(temperatures + slot)
    if (temperature != 0) & (tl.load(flags + place) == 0):
        is_ruled = (tl.load(kinds + slot) & RULED) != 0
        most = tl.where(is_ruled, tl.load(ruled_best + i), tl.load(best + place))
        raw_end, ruled_end = tl.where(is_ruled, 0, V), tl.where(is_ruled, V, 0)
        row = scratch + i.to(tl.int64) * STRIDE
        total = tl.zeros([TILE], tl.float64)
        for begin in range(0, SPAN, TILE):
            v = s * SPAN + begin + tl.arange(0, TILE)
            raw = tl.load(logits + place * LOGITS_STRIDE + v, mask=v < raw_end, other=float("-inf"))
            x = tl.load(row + v, mask=v < ruled_end, other=float("-inf"))
            x = tl.where(is_ruled, x, raw.to(tl.float32)) - most
            # A quotient of float32 rounded from float64 is the float32 one. Nothing lighter than exp(-1e4) weighs.
            x = tl.maximum(x.to(tl.float64) / temperature.to(tl.float64), -1e4).to(tl.float32)
            weight = tl.exp(x.to(tl.float64)).to(tl.float32)
            weight = tl.where(v < V, weight, 0.0)
            tl.store(row + v, weight, mask=v < V)
            total += weight.to(tl.float64)
        tl.store(sums + i * SP + s, tl.sum(total, 0))
        tl.store(equals + i * SP + s, 0)
        if s == 0:
            tl.store(pivots + i, 0)
            tl.store(extras + i, V)


@triton.jit
def uniform(seed, position):
    """See philox.py. Scalars in, a float64 scalar out."""
    one = tl.zeros([1], tl.uint32)
    word0, word1, _, _ = tl.philox(seed, one + position.to(tl.uint32), one, one, one)
    number = (word0 >> 5).to(tl.float64) * 67108864.0 + (word1 >> 6).to(tl.float64)
    return tl.sum(number, 0) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["num_parts"])
def draw(
    wire,
    where,
    scratch,
    flags,
    temperatures,
    min_ps,
    seeds,
    pivots,
    extras,
    sums,
    equals,
    tokens,
    num_parts,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    SPAN: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (A): the token where the cumulated kept weight first exceeds the number's share of all.

    Its segment by the segments' sums, itself by a walk through that segment. Where rounding leaves none beyond, it is
    the last token that has any weight.
    """
    i = tl.program_id(0)
    at = wire + HEADER + ROW * tl.load(where + i)
    slot, place = tl.load(at), tl.load(at + 4)
    if (tl.load(temperatures + slot) != 0) & (tl.load(flags + place) == 0):
        pivot, extra, least = tl.load(pivots + i), tl.load(extras + i), tl.load(min_ps + slot)
        pivot_mass = pivot.to(tl.float32, bitcast=True).to(tl.float64)
        extra = tl.where(pivot_mass >= least, extra, 0)
        s = tl.arange(0, SP)
        mass = tl.load(sums + i * SP + s, mask=s < num_parts, other=0.0)
        equal = tl.load(equals + i * SP + s, mask=s < num_parts, other=0)
        equal_before = tl.cumsum(equal, 0) - equal
        mass += tl.minimum(tl.maximum(extra - equal_before, 0), equal).to(tl.float64) * pivot_mass
        cumulated = tl.cumsum(mass, 0)
        total = tl.sum(tl.where(s == SP - 1, cumulated, 0.0), 0)
        position = tl.load(at + 1) + tl.load(at + 2)
        threshold = uniform(tl.load(seeds + slot), position) * total
        segment = tl.min(tl.where((cumulated > threshold) & (mass > 0), s, SP), 0)
        segment = tl.where(segment < SP, segment, tl.max(tl.where(mass > 0, s, 0), 0))
        running = tl.sum(tl.where(s == segment - 1, cumulated, 0.0), 0)
        extra -= tl.sum(tl.where(s == segment, equal_before, 0), 0)
        token, last = place * 0 + V, place * 0
        for begin in range(0, SPAN, TILE):
            v = segment * SPAN + begin + tl.arange(0, TILE)
            weight = tl.load(scratch + i.to(tl.int64) * STRIDE + v, mask=v < V, other=0.0)
            bits, own = weight.to(tl.int32, bitcast=True), weight.to(tl.float64)
            is_equal = ((bits == pivot) & (v < V)).to(tl.int32)
            rank = tl.cumsum(is_equal, 0) - is_equal
            kept = (own > 0) & (own >= least) & ((bits > pivot) | ((is_equal > 0) & (rank < extra)))
            own = tl.where(kept, own, 0.0)
            beyond = kept & (running + tl.cumsum(own, 0) > threshold)
            token = tl.minimum(token, tl.min(tl.where(beyond, v, V), 0))
            last = tl.maximum(last, tl.max(tl.where(kept, v, 0), 0))
            running += tl.sum(own, 0)
            extra -= tl.sum(is_equal, 0)
        tl.store(tokens + place, tl.where(token < V, token, last).to(tl.int64))
