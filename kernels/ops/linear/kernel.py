"""The kernel of a linear over few rows: it is done when the weight was read once, so reading is all it is built for.

The weight is the left operand: y.T = W @ x.T, tiles of BLOCK_N outputs. The K steps of all tiles stand in one line,
which is cut into equal runs, one a program: no program ends later than another.

tile      | 0 . . . . . . . | 1 . . . . . . . | 2 . . .       K steps of one tile: KT
program   | 0 . . . . | 1 . . . . | 2 . . . . | 3 . . .       `run` steps each; program 1 leaves two partial sums
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "run"])
def few_rows(
    x,  # [num_rows, K], rows `x_row` numbers apart
    weight,  # [N, K]
    bias,  # [N]; any pointer where HAS_BIAS is False
    out,  # [SLOTS, num_rows, N]: the partial sums of a tile, from its first K step on; unused slots become 0
    num_rows,
    run,
    x_row,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (programs that `run` steps each suffice for, blocks of rows)."""
    KT: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    is_row = rows < num_rows
    at_k = tl.arange(0, BLOCK_K)
    begin = program * run
    end = tl.minimum(begin + run, TILES * KT)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in range(begin, end):
        tile = unit // KT
        step = unit - tile * KT
        k = step * BLOCK_K + at_k
        outs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows behind the last are read again as the last one and never stored.
        at_w = tl.minimum(outs, N - 1).to(tl.int64)[:, None] * K + k[None, :]
        at_x = rows.to(tl.int64) * x_row + k[:, None]
        if K % BLOCK_K == 0:
            w = tl.load(weight + at_w)
            b = tl.load(x + at_x, mask=is_row, other=0.0)
        else:
            w = tl.load(weight + at_w, mask=k[None, :] < K, other=0.0)
            b = tl.load(x + at_x, mask=is_row & (k[:, None] < K), other=0.0)
        total = tl.dot(w, b, total, input_precision="ieee")
        if (step == KT - 1) | (unit == end - 1):
            slot = program - (tile * KT) // run
            kept = is_row & (outs[:, None] < N)
            place = rows.to(tl.int64) * N + outs[:, None]
            part = num_rows.to(tl.int64) * N
            if HAS_BIAS:
                is_last = (outs < N) & (step == KT - 1)
                total += tl.load(bias + outs, mask=is_last, other=0.0).to(tl.float32)[:, None]
            tl.store(out + slot * part + place, total.to(out.dtype.element_ty), mask=kept)
            if step == KT - 1:
                for unused in range(slot + 1, SLOTS):
                    tl.store(out + unused * part + place, tl.zeros([BLOCK_N, BLOCK_M], out.dtype.element_ty), mask=kept)
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
