"""Entry of rms_norm: chooses by device type."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x, [rows, ..., N], and scale by `weight` [N]; computed in float32."""
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: rows of {tuple(x.shape)} do not fit a weight {tuple(weight.shape)}")
    return implementation("rms_norm", x.device.type).rms_norm(x, weight, eps)  # type: ignore[no-any-return]
