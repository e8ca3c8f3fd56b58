"""Definition of rotary embedding: the two halves of a head are the coordinates of D / 2 points that are turned.

Su et al., "RoFormer" (2021), in the order of halves that transformers' Llama uses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """x becomes x * cos + (-second half, first half) * sin; computed in float32."""
    wide = x_THD.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    x_THD.copy_(wide * cos_TD[:, None].float() + turned * sin_TD[:, None].float())
