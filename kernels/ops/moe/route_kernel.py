"""Triton: the experts of each token and their weights, in one launch; and the pairs sorted by expert, in another."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _choose(
    logits,
    rows,
    T,
    ids,
    weights,
    counts,
    E: tl.constexpr,
    BE: tl.constexpr,
    TOP: tl.constexpr,
    KP: tl.constexpr,
    RENORM: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Softmax of [tokens, BE] logits and the TOP largest of each, lowest id first among equals."""
    expert, rank = tl.arange(0, BE), tl.arange(0, KP)
    logits = tl.where(expert[None, :] < E, logits, -1e30)
    left = tl.exp(logits - tl.max(logits, 1)[:, None])
    left = tl.where(expert[None, :] < E, left, 0.0)
    total = tl.sum(left, 1)
    kept = tl.zeros_like(total)
    found = tl.zeros([rows.shape[0], KP], tl.int32)
    weight = tl.zeros([rows.shape[0], KP], tl.float32)
    for k in tl.static_range(TOP):
        most = tl.max(left, 1)
        at = tl.min(tl.where(left == most[:, None], expert[None, :], BE), 1)
        at = tl.where(at < E, at, k)  # all are NaN: any expert will do, the result is NaN, but no id may be wild
        left = tl.where(expert[None, :] == at[:, None], -1.0, left)
        kept += most
        found = tl.where(rank[None, :] == k, at[:, None], found)
        weight = tl.where(rank[None, :] == k, most[:, None], weight)
    if RENORM:
        total = kept
    ok = (rows < T)[:, None] & (rank < TOP)[None, :]
    to = rows[:, None] * TOP + rank[None, :]
    tl.store(ids + to, found, mask=ok)
    tl.store(weights + to, weight / total[:, None], mask=ok)
    if COUNT:
        tl.atomic_add(counts + found, 1, mask=ok, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def route(
    x,
    router,
    partial,
    tickets,
    ids,
    weights,
    counts,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    TOP: tl.constexpr,
    KP: tl.constexpr,
    RENORM: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of BT tokens, SPLIT parts of H, SPAN each). The last part of a block to arrive adds all, in order of
    the parts, and chooses: the result does not depend on who is last.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    rows, expert, k = block * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, BK)
    logits = tl.zeros([BT, BE], tl.float32)
    for begin in range(part * SPAN, part * SPAN + SPAN, BK):
        at = begin + k
        a = tl.load(
            x + rows[:, None].to(tl.int64) * H + at[None, :], mask=(rows < T)[:, None] & (at < H)[None, :], other=0.0
        )
        b = tl.load(
            router + expert[None, :] * H + at[:, None], mask=(expert < E)[None, :] & (at < H)[:, None], other=0.0
        )
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    ok = (rows < T)[:, None] & (expert < E)[None, :]
    place = (block * SPLIT * BT + tl.arange(0, BT))[:, None] * E + expert[None, :]
    tl.store(partial + part * BT * E + place, logits, mask=ok)
    tl.debug_barrier()
    if tl.atomic_add(tickets + block, 1, sem="acq_rel") == SPLIT - 1:
        logits = tl.zeros([BT, BE], tl.float32)
        for other in tl.static_range(SPLIT):  # unrolled: the loads do not wait for each other
            logits += tl.load(partial + other * BT * E + place, mask=ok, other=0.0, cache_modifier=".cg")
        _choose(logits, rows, T, ids, weights, counts, E, BE, TOP, KP, RENORM, COUNT)
        tl.store(tickets + block, 0)


@triton.jit(do_not_specialize=["P"])
def align(
    ids,
    counts,
    ticket,
    pairs,
    expert_of,
    num_blocks,
    P,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (E): program e lists the pairs of expert e, in order, in whole blocks of BM behind those of lower experts.

    The last to arrive clears the counts for the next call.
    """
    e, expert = tl.program_id(0), tl.arange(0, BE)
    count_E = tl.load(counts + expert, mask=expert < E, other=0)
    blocks_E = (count_E + BM - 1) // BM
    first = tl.sum(tl.where(expert < e, blocks_E, 0), 0)
    blocks = tl.sum(tl.where(expert == e, blocks_E, 0), 0)
    if e == E - 1:
        tl.store(num_blocks, first + blocks)
    if blocks > 0:
        at = tl.arange(0, CHUNK)
        for begin in range(0, blocks, CHUNK):
            tl.store(expert_of + first + begin + at, tl.zeros([CHUNK], tl.int32) + e, mask=begin + at < blocks)
        to = first * BM
        for begin in range(0, P, CHUNK):
            mine = (tl.load(ids + begin + at, mask=begin + at < P, other=-1) == e).to(tl.int32)
            tl.store(pairs + to + tl.cumsum(mine, 0) - mine, begin + at, mask=mine > 0)
            to += tl.sum(mine, 0)
        rest = to + tl.arange(0, BM)
        tl.store(pairs + rest, tl.full([BM], -1, tl.int32), mask=rest < (first + blocks) * BM)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == E - 1:
        tl.store(counts + expert, tl.zeros([BE], tl.int32), mask=expert < E)
        tl.store(ticket, 0)
