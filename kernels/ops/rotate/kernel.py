"""The kernel of rotate: a program turns some heads of one token, in float32 between load and store."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    x,  # [T, H, 2 P] with its own strides
    cos,  # [T, 2 P]
    sin,
    ROW: tl.constexpr,  # numbers between tokens of x, and between heads
    HEAD: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    WIDE: tl.constexpr,  # P or more, a power of 2
    HEADS: tl.constexpr,  # of a program
):
    """Grid: (tokens, blocks of HEADS heads)."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDE)
    there = pair < P
    inside = (head < H)[:, None] & there[None, :]
    first = x + token * ROW + head[:, None] * HEAD + pair[None, :]
    one = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(first + P, mask=inside, other=0.0).to(tl.float32)
    angle = token * (2 * P) + pair
    cos_one = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)[None, :]
    cos_two = tl.load(cos + angle + P, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_one = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_two = tl.load(sin + angle + P, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(first, (one * cos_one - two * sin_one).to(x.dtype.element_ty), mask=inside)
    tl.store(first + P, (two * cos_two + one * sin_two).to(x.dtype.element_ty), mask=inside)
