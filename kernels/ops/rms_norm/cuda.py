"""rms_norm on a card: add_norm's kernel without anything to add."""

from __future__ import annotations

import torch
from torch import Tensor

from ..add_norm.cuda import add_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py."""
    rows = x.reshape(-1, weight.shape[0]).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    add_norm(rows, None, weight.contiguous(), eps, out.view(rows.shape))
    return out
