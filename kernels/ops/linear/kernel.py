"""The kernel of a linear over few rows: it is done when the weight was read once, so reading is all it is built for.

The weight is the left operand: y.T = W @ x.T in tiles of BLOCK_N outputs. PARTS programs share the K steps of a tile,
so that enough of them read at a time, and each leaves a sum of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def few_rows(
    x,  # [num_rows, K], rows `x_row` numbers apart
    weight,  # [N, K]
    bias,  # [N]; any pointer where HAS_BIAS is False
    out,  # [PARTS, num_rows, N]
    num_rows,
    x_row,
    K: tl.constexpr,
    N: tl.constexpr,
    RUN: tl.constexpr,  # numbers of K that a program sums over, a multiple of BLOCK_K
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of outputs * PARTS, blocks of rows)."""
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    outs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
    at_k = tl.arange(0, BLOCK_K)
    is_row = rows < num_rows
    # Outputs behind the last are computed as the last one again, and never stored.
    at_w = weight + tl.minimum(outs, N - 1).to(tl.int64)[:, None] * K + at_k[None, :]
    at_x = x + rows * x_row + at_k[:, None]
    begin = part * RUN
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(begin, tl.minimum(begin + RUN, K), BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(at_w + k)
            b = tl.load(at_x + k, mask=is_row, other=0.0)
        else:
            w = tl.load(at_w + k, mask=(at_k + k)[None, :] < K, other=0.0)
            b = tl.load(at_x + k, mask=is_row & ((at_k + k)[:, None] < K), other=0.0)
        total = tl.dot(w, b, total, input_precision="ieee")
    if HAS_BIAS:
        # The first program of a tile adds it. Outputs behind the last one's are never stored.
        addend = tl.load(bias + outs, mask=outs < N, other=0.0).to(tl.float32)
        total += tl.where(part == 0, addend, 0.0)[:, None]
    place = out + part.to(tl.int64) * num_rows * N + rows * N + outs[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row & (outs[:, None] < N))
