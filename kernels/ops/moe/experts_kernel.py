"""Triton: one projection of all experts over the pairs that chose them, a grouped matrix product.

FEW (at most BM tokens): a block is a pair, its rows are the step's tokens; the first pair of each expert computes for
all tokens that chose it, the others have nothing to do: no sorting. Otherwise blocks are those of `align`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _few(ids, block, T, TOP: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr):
    """The block's expert, whether it is the first pair of it, and the pair of each token with it (-1: none)."""
    row, rank = tl.arange(0, BM), tl.arange(0, KP)
    pair = row[:, None] * TOP + rank[None, :]
    chosen = tl.load(ids + pair, mask=(row < T)[:, None] & (rank < TOP)[None, :], other=-1)
    e = tl.load(ids + block)
    earlier = tl.sum(tl.sum(((chosen == e) & (pair < block)).to(tl.int32), 1), 0)
    return e, earlier == 0, tl.max(tl.where(chosen == e, pair, -1), 1)


@triton.jit
def _tile(
    x,
    w,
    y,
    weights,
    e,
    p,
    tile,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    UP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BN outputs of expert e for BM pairs."""
    rows: tl.constexpr = 2 * N if UP else N
    ok = p >= 0
    source = tl.where(ok, p // TOP if UP else p, 0)
    n, k = tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + source[:, None].to(tl.int64) * K + k[None, :]
    w_at = w + e.to(tl.int64) * rows * K + n[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for begin in range(0, K, BK):
        x_ok = ok[:, None] if EVEN_K else ok[:, None] & (begin + k < K)[None, :]
        a = tl.load(x_at + begin, mask=x_ok, other=0.0)
        if EVEN_N and EVEN_K:
            acc = tl.dot(a, tl.load(w_at + begin), acc, input_precision=PRECISION)
            if UP:
                up = tl.dot(a, tl.load(w_at + N * K + begin), up, input_precision=PRECISION)
        else:
            w_ok = (n < N)[None, :] & (begin + k < K)[:, None]
            acc = tl.dot(a, tl.load(w_at + begin, mask=w_ok, other=0.0), acc, input_precision=PRECISION)
            if UP:
                b = tl.load(w_at + N * K + begin, mask=w_ok, other=0.0)
                up = tl.dot(a, b, up, input_precision=PRECISION)
    if UP:
        small = tl.exp(-tl.abs(acc))  # never overflows, whatever the gate
        acc = acc * tl.where(acc >= 0, 1.0, small) / (1.0 + small) * up
        to = p
    else:
        acc = acc * tl.load(weights + tl.where(ok, p, 0), mask=ok, other=0.0)[:, None]
        to = p % TOP * T + p // TOP
    out_ok = ok[:, None] & (n < N)[None, :]
    tl.store(y + to[:, None].to(tl.int64) * N + n[None, :], acc.to(y.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["T"])
def experts(
    x,
    w,
    y,
    weights,
    ids,
    pairs,
    expert_of,
    num_blocks,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    KP: tl.constexpr,
    UP: tl.constexpr,
    FEW: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of N, blocks), or the other way round where BLOCKS_FIRST: programs that run at the same time read the
    same weights then, else the same tokens. UP: y[pair] = silu(gate(x[token])) * up(x[token]), w is [E, 2 * N, K]; else
    y[rank, token] = weight * w x[pair], w is [E, N, K].
    """
    if BLOCKS_FIRST:
        block, tile = tl.program_id(0), tl.program_id(1)
    else:
        tile, block = tl.program_id(0), tl.program_id(1)
    if FEW:
        e, busy, p = _few(ids, block, T, TOP, KP, BM)
        if busy:
            _tile(x, w, y, weights, e, p, tile, T, N, K, TOP, UP, BM, BN, BK, EVEN_N, EVEN_K, PRECISION)
    else:
        if block < tl.load(num_blocks):
            e = tl.load(expert_of + block)
            first = pairs + block * BM
            if BM < 128:
                p = tl.load(first + tl.arange(0, BM))
                _tile(x, w, y, weights, e, p, tile, T, N, K, TOP, UP, BM, BN, BK, EVEN_N, EVEN_K, PRECISION)
            else:  # an expert's last block is half empty half of the time: then half of it is computed
                HALF: tl.constexpr = BM // 2
                if tl.load(first + HALF) >= 0:
                    more = tl.load(first + tl.arange(0, BM))
                    _tile(x, w, y, weights, e, more, tile, T, N, K, TOP, UP, BM, BN, BK, EVEN_N, EVEN_K, PRECISION)
                else:
                    less = tl.load(first + tl.arange(0, HALF))
                    _tile(x, w, y, weights, e, less, tile, T, N, K, TOP, UP, HALF, BN, BK, EVEN_N, EVEN_K, PRECISION)
