"""The kernel of silu_mul: a program takes BLOCK numbers of one token's two halves."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["part_step"])
def silu_mul_blocks(
    gate_up,  # [COUNT, T, 2I] with its own strides
    out,  # [T, I]
    part_step,  # between parts, in UNIT numbers
    SIZE: tl.constexpr,  # I
    ROW: tl.constexpr,  # numbers between tokens of a part
    UNIT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, blocks of BLOCK numbers of a half)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gates = gate_up + token * ROW + at
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + SIZE, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, COUNT):
        step = part_step.to(tl.int64) * (UNIT * part)
        gate += tl.load(gates + step, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(gates + step + SIZE, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never overflows, whatever the gate
    y = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small) * up
    tl.store(out + token * SIZE + at, y.to(out.dtype.element_ty), mask=inside)
