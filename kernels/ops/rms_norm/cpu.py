"""rms_norm on a CPU: torch computes its own in seven operations, but layer_norm in one.

The mean of x and -x together is 0 and their variance is the mean of squares, so layer_norm over both is rms_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

# Up to here the calls cost more than the doubled work. Measured on one core, 576 numbers a row, bfloat16: 6.4 us
# instead of 11.0 for 1 row, 42 instead of 32 for 64.
_FEW_ROWS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py."""
    size = weight.shape[0]
    if x.shape[0] > _FEW_ROWS:
        wide = x.float()
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        normed = wide.mul_(root) if wide is not x else wide * root
        return normed.to(x.dtype).mul_(weight)
    return layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size] * weight
