"""Entry of linear: chooses by device type."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation


def pack(weight: Tensor) -> Tensor:
    """The form of `weight` [out, in] that `linear` takes on its device; the original is not needed any more."""
    return implementation("linear", weight.device.type).pack(weight)  # type: ignore[no-any-return]


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """[..., in] -> [..., out], with a weight that `pack` gave. A shape that does not fit raises torch's own error."""
    return implementation("linear", x.device.type).linear(x, packed, bias)  # type: ignore[no-any-return]


def linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """addend + linear(x); a residual connection in the same call where the device can."""
    return implementation("linear", x.device.type).linear_add(x, packed, bias, addend)  # type: ignore[no-any-return]


def linear_silu(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """silu(linear(x)): the gate of a gated MLP, in one call where the device can."""
    return implementation("linear", x.device.type).linear_silu(x, packed, bias)  # type: ignore[no-any-return]


def linear_mul(x: Tensor, packed: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """factor * linear(x): what the gate lets through, in one call where the device can."""
    return implementation("linear", x.device.type).linear_mul(x, packed, bias, factor)  # type: ignore[no-any-return]
