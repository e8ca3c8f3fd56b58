"""Entry of linear: chooses by device type."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation
from .reference import Linear


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """The layer of `weight` [out, in] and `bias` [out] on their device; the given weight is not needed any more.

    Calling it with a shape that does not fit raises torch's own error.
    """
    return implementation("linear", weight.device.type).pack(weight, bias)  # type: ignore[no-any-return]
