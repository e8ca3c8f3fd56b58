"""Entry of silu_mul: checks and chooses by device type. T: tokens, I: numbers of each half."""

from __future__ import annotations

from torch import Tensor

from ..parts import Parts
from ..table import implementation


def silu_mul(gate_up: Tensor | Parts, out_TI: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2I], the gates first, or of the sum of parts [S, T, 2I]; float32, rounded once into
    `out_TI`, which is returned. Any T, 0 too. ValueError: shapes or layouts that do not fit.
    """
    tokens, size = out_TI.shape
    data = gate_up.data if isinstance(gate_up, Parts) else gate_up.unsqueeze(0)
    if data.shape[1:] != (tokens, 2 * size):
        raise ValueError(f"silu_mul: {tuple(data.shape[1:])} numbers do not give {(tokens, size)}")
    if isinstance(gate_up, Parts) and not 1 <= gate_up.count <= data.shape[0]:
        raise ValueError(f"silu_mul: {gate_up.count} of {data.shape[0]} parts")
    if data.stride(2) != 1 or not out_TI.is_contiguous():
        raise ValueError(f"silu_mul: rows must be contiguous, strides {data.stride()} and {out_TI.stride()}")
    found: Tensor = implementation("silu_mul", out_TI.device.type).silu_mul(gate_up, out_TI)
    return found
