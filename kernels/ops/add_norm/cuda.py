"""add_norm on a card: one launch of kernel.py."""

from __future__ import annotations

from torch import Tensor

from ..compiled import launch
from ..parts import Parts
from . import reference
from .kernel import add_norm_rows

_LONGEST = 32_768  # numbers of a row that a program can hold
_PROGRAM = 2048  # numbers that a program takes at least where rows are shorter
_FEW = 128  # rows up to which a row is spread over more warps: nobody else would use them
_UNIT = 16  # numbers: steps that are multiples of it let the compiler read 16 bytes at once, whatever the dtype


def add_norm(
    residual_TN: Tensor, parts: Parts | None, weight_N: Tensor, eps: float, out_TN: Tensor, *, invariant: bool = False
) -> Tensor:
    """See launch.py. Rows longer than 32,768 numbers are torch's."""
    rows, size = residual_TN.shape
    if size > _LONGEST:
        return reference.add_norm(residual_TN, parts, weight_N, eps, out_TN, invariant=invariant)
    block = 1 << (size - 1).bit_length()
    is_few = invariant or rows <= _FEW
    rows_each = max(1, _PROGRAM // block) if rows > 1024 and not invariant else 1  # few are spread over the card
    data = residual_TN if parts is None else parts.data
    step = 0 if parts is None else data.stride(0)
    row_step = size if parts is None else data.stride(1)
    unit = _UNIT if step % _UNIT == 0 else 1
    launch(
        add_norm_rows,
        (-(-rows // rows_each), 1, 1),
        (residual_TN, data, weight_N, out_TN, rows, step // unit, eps),
        num_warps=_warps(block * rows_each, 0 if parts is None else parts.count, is_few=is_few),
        num_stages=1,
        N=size,
        ROW=row_step,
        UNIT=unit,
        COUNT=0 if parts is None else parts.count,
        ROWS=rows_each,
        BLOCK=block,
    )
    return out_TN


def _warps(numbers: int, count: int, *, is_few: bool) -> int:
    """Of a program with so many numbers. On an H200, us: 64 rows of 2,048 with 8 parts took 9.0 with 4 warps and 3.1
    with 16; 8,192 rows of 4,096 without parts 35.2 with 8 and 37.7 with 16, with one part 68.8 and 67.7.
    """
    each = 4 if is_few else 8 if count else 16  # numbers of a thread
    return min(max(numbers // (32 * each), 1), 16)
