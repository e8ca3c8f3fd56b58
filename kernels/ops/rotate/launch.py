"""Entry of rotate: checks shapes, chooses by device type."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotate each of the H heads of each token in place, by the cosines and sines of its position. D is even."""
    if (
        x_THD.dim() != 3
        or x_THD.shape[2] % 2
        or cos_TD.shape != (x_THD.shape[0], x_THD.shape[2])
        or sin_TD.shape != cos_TD.shape
    ):
        raise ValueError(
            f"rotate: {tuple(x_THD.shape)} does not fit cos {tuple(cos_TD.shape)} and sin {tuple(sin_TD.shape)}"
        )
    implementation("rotate", x_THD.device.type).rotate(x_THD, cos_TD, sin_TD)
