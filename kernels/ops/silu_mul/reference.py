"""Definition of silu_mul: out = silu(gate) * up, computed in float32. I: numbers of each half."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import Parts


def silu_mul(gate_up: Tensor | Parts, out_TI: Tensor) -> Tensor:
    """See launch.py."""
    wide = gate_up.total() if isinstance(gate_up, Parts) else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return out_TI.copy_(torch.nn.functional.silu(gate) * up)
