"""Definition of add_norm: the residual takes the sum of the parts, then its rows are normalised."""

from __future__ import annotations

from torch import Tensor

from ..parts import Parts
from ..rms_norm.reference import rms_norm


def add_norm(
    residual_TN: Tensor, parts: Parts | None, weight_N: Tensor, eps: float, out_TN: Tensor, *, invariant: bool = False
) -> Tensor:
    """See launch.py. Row by row where `invariant`: torch may add up a row in another order when there are more."""
    if parts is not None:
        residual_TN.copy_(residual_TN.float() + parts.total())
    if not invariant:
        return out_TN.copy_(rms_norm(residual_TN, weight_N, eps))
    for row, out in zip(residual_TN, out_TN, strict=True):
        out.copy_(rms_norm(row, weight_N, eps))
    return out_TN
