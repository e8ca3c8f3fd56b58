"""What both attention kernels do with a tile of keys: read it from blocks, and one step of the softmax over tiles.

Weights are powers of 2. The maximum begins at -1e20 and a hidden score is -1e30, not infinity: a row of a tile may hide
every key, and inf - inf would be NaN. Such a row gathers nothing, since its maximum stays far above what is hidden.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(table, position, inside, g, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """Where the heads `g` of these positions begin in the arena; those not `inside` are looked up nowhere."""
    block = tl.load(table + position // PAGE, mask=inside, other=0).to(tl.int64)
    return ((block * G + g) * PAGE + position % PAGE) * D


@triton.jit
def scored(q, keys, factor, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """q @ keys.T, as tanh(that * factor) where scores are capped. NaN stays; no exponential here overflows."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP:
        x = scores * factor
        small = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
        bent = (1.0 - small) / (1.0 + small)
        scores = tl.where(x < 0, -bent, bent)
    return scores


@triton.jit
def finished(top, total, acc):
    """(result, log2 of the sum of weights) of these keys alone. Rows that saw none: 0 with no weight; NaN stays."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, top + tl.log2(total), -1e30)


@triton.jit
def renewed(top, total, acc, scores, values, scale, PRECISION: tl.constexpr):
    """(top, total, acc) after a tile. The maximum is taken unscaled, so that one FMA precedes each exp2."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total * fade + tl.sum(weights, 1), acc
