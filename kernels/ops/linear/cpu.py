"""Linear on a CPU: bfloat16 weights lie in oneDNN's blocked layout, which it else makes anew in every call."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows for which oneDNN chooses the layout. On a Zen 4 (two cores, 576 x 3072) the layout for 64 rows was as good for
# 1 and for 512 rows as their own; against plain weights a call with 1 row took a third to a half of the time.
_ROWS = 64


def pack(weight: Tensor) -> Tensor:
    """See reference.py. An opaque oneDNN tensor for bfloat16 where this build and CPU have it, else the weight."""
    if weight.dtype is not torch.bfloat16 or not has_blocked_layout():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py."""
    if packed.is_mkldnn and x.numel():
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return y
    if packed.is_mkldnn:
        return x.new_empty((*x.shape[:-1], packed.shape[0]))
    return torch.nn.functional.linear(x, packed, bias)


def linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """See reference.py. oneDNN adds before it rounds."""
    if packed.is_mkldnn and x.numel():
        return _with(addend, "add", x, packed, bias)
    return linear(x, packed, bias).add_(addend)


def linear_silu(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py. oneDNN calls it swish."""
    if packed.is_mkldnn and x.numel():
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "swish", [], "")
        return y
    return torch.nn.functional.silu(linear(x, packed, bias), inplace=True)


def linear_mul(x: Tensor, packed: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """See reference.py."""
    if packed.is_mkldnn and x.numel():
        return _with(factor, "mul", x, packed, bias)
    return linear(x, packed, bias).mul_(factor)


def _with(other: Tensor, operation: str, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, operation)
    return y


def has_blocked_layout() -> bool:
    """These operators are torch's own, made for its compiler; a build without oneDNN lacks them."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and bool(ops._is_mkldnn_bf16_supported())
    )
