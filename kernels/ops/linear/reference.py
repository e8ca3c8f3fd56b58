"""Definition of linear: y = x @ weight.T + bias. `pack` may change a weight's form, never its values."""

from __future__ import annotations

import torch.nn.functional
from torch import Tensor


def pack(weight: Tensor) -> Tensor:
    """The form of `weight` [out, in] that `linear` takes."""
    return weight


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """[..., in] -> [..., out]."""
    return torch.nn.functional.linear(x, packed, bias)


def linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """addend + linear(x): [..., in], [..., out] -> [..., out]."""
    return addend + linear(x, packed, bias)


def linear_silu(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """silu(linear(x)): [..., in] -> [..., out]."""
    return torch.nn.functional.silu(linear(x, packed, bias))


def linear_mul(x: Tensor, packed: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """factor * linear(x): [..., in], [..., out] -> [..., out]."""
    return factor * linear(x, packed, bias)
