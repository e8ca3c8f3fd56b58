"""Entry of add_norm: checks and chooses by device type. T: tokens, N: numbers of a token."""

from __future__ import annotations

from torch import Tensor

from ..parts import Parts
from ..table import implementation


def add_norm(
    residual_TN: Tensor, parts: Parts | None, weight_N: Tensor, eps: float, out_TN: Tensor, *, invariant: bool = False
) -> Tensor:
    """residual += sum of `parts`, in place, rounded once to its dtype; out = residual / sqrt(mean(residual^2) + eps) *
    weight, computed in float32 from the rounded residual. Returns `out_TN`, whose dtype is the residual's.

    Without parts the residual stays as it is. `invariant`: no bit of a row depends on the number of rows beside it, for
    which a card pays 7 % at 8,192 tokens. Any T, 0 too. ValueError: shapes, dtypes or layouts that do not fit.
    """
    tokens, size = residual_TN.shape
    if weight_N.shape != (size,) or out_TN.shape != residual_TN.shape or out_TN.dtype is not residual_TN.dtype:
        raise ValueError(
            f"add_norm: residual {tuple(residual_TN.shape)} {residual_TN.dtype}, weight {tuple(weight_N.shape)} and "
            f"out {tuple(out_TN.shape)} {out_TN.dtype} do not fit"
        )
    if parts is not None and (parts.data.shape[1:] != (tokens, size) or not 1 <= parts.count <= parts.data.shape[0]):
        raise ValueError(f"add_norm: {parts.count} of {tuple(parts.data.shape)} parts for {(tokens, size)}")
    if not (residual_TN.is_contiguous() and out_TN.is_contiguous() and weight_N.is_contiguous()):
        raise ValueError("add_norm: residual, weight and out must be contiguous")
    if parts is not None and parts.data.stride(2) != 1 and size > 1:
        raise ValueError(f"add_norm: the rows of the parts are not contiguous, strides {parts.data.stride()}")
    found: Tensor = implementation("add_norm", residual_TN.device.type).add_norm(
        residual_TN, parts, weight_N, eps, out_TN, invariant=invariant
    )
    return found
