"""Entry of rms_norm: chooses by device type."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x, [rows, ..., N], and scale by `weight` [N]; computed in float32."""
    return implementation("rms_norm", x.device.type).rms_norm(x, weight, eps)  # type: ignore[no-any-return]
