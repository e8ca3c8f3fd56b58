"""add_norm on a card: one launch of kernel.py."""

from __future__ import annotations

from torch import Tensor

from ..compiled import launch
from ..parts import Parts
from . import reference
from .kernel import add_norm_rows

_LONGEST = 32_768  # numbers of a row that a program can hold
_PROGRAM = 2048  # numbers that a program takes at least where rows are shorter
UNIT = 16  # numbers: steps that are multiples of it let the compiler read 16 bytes at once, whatever the dtype


def add_norm(residual_TN: Tensor, parts: Parts | None, weight_N: Tensor, eps: float, out_TN: Tensor) -> Tensor:
    """See launch.py. Rows longer than 32,768 numbers are torch's."""
    rows, size = residual_TN.shape
    if size > _LONGEST:
        return reference.add_norm(residual_TN, parts, weight_N, eps, out_TN)
    block = 1 << (size - 1).bit_length()
    rows_each = max(1, _PROGRAM // block) if rows > 1024 else 1  # few rows are spread over the card
    data = residual_TN if parts is None else parts.data
    step = 0 if parts is None else data.stride(0)
    row_step = size if parts is None else data.stride(1)
    unit = UNIT if step % UNIT == 0 else 1
    launch(
        add_norm_rows,
        (-(-rows // rows_each), 1, 1),
        (residual_TN, data, weight_N, out_TN, rows, step // unit, eps),
        num_warps=_warps(block * rows_each),
        num_stages=1,
        N=size,
        ROW=row_step,
        UNIT=unit,
        COUNT=0 if parts is None else parts.count,
        ROWS=rows_each,
        BLOCK=block,
    )
    return out_TN


def _warps(numbers: int) -> int:
    """16 numbers a thread, so that all loads of a row are in flight at once."""
    return min(max(numbers // 512, 1), 16)
