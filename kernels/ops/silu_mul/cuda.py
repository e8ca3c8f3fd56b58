"""silu_mul on a card: one launch of kernel.py."""

from __future__ import annotations

from torch import Tensor

from ..compiled import launch
from ..parts import Parts
from .kernel import silu_mul_blocks

_UNIT = 16  # numbers; see add_norm
_FEW = 64  # tokens up to which smaller blocks spread the work over the card


def silu_mul(gate_up: Tensor | Parts, out_TI: Tensor) -> Tensor:
    """See launch.py."""
    tokens, size = out_TI.shape
    count = gate_up.count if isinstance(gate_up, Parts) else 1
    data = gate_up.data if isinstance(gate_up, Parts) else gate_up
    step, row_step = (data.stride(0), data.stride(1)) if isinstance(gate_up, Parts) else (0, data.stride(0))
    unit = _UNIT if step % _UNIT == 0 else 1
    block = 1024 if tokens <= _FEW else 2048
    launch(
        silu_mul_blocks,
        (tokens, -(-size // block), 1),
        (data, out_TI, step // unit),
        num_warps=4 if tokens <= _FEW else 8,
        num_stages=1,
        SIZE=size,
        ROW=row_step,
        UNIT=unit,
        COUNT=count,
        BLOCK=block,
    )
    return out_TI
