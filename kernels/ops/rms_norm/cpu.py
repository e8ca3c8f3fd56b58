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
        return torch.rms_norm(x, (size,), weight, eps)
    return layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size] * weight
