"""The kernel of add_norm: a program holds whole rows, so that each number is read once.

All arithmetic in float32. Sums over parts are made in their order: the result does not depend on who came first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "part_step", "eps"])
def add_norm_rows(
    residual,  # [rows, N]
    parts,  # [COUNT, rows, N] with its own strides; any pointer where COUNT is 0
    weight,
    out,
    num_rows,
    part_step,  # between parts, in UNIT numbers: the compiler sees that it is a multiple, and reads 16 bytes at once
    eps,
    N: tl.constexpr,
    ROW: tl.constexpr,  # numbers between rows of a part
    UNIT: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of ROWS rows)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (at < N)
    x = tl.load(residual + row * N + at, mask=inside, other=0.0).to(tl.float32)
    if COUNT > 0:
        total = tl.load(parts + row * ROW + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, COUNT):
            step = part_step.to(tl.int64) * (UNIT * part)
            total += tl.load(parts + step + row * ROW + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + total).to(residual.dtype.element_ty)
        tl.store(residual + row * N + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
    y = x * scale * tl.load(weight + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + at, y.to(out.dtype.element_ty), mask=inside)
