"""Entry of linear: chooses by device type."""

from __future__ import annotations

from torch import Tensor

from diptych.protos.errors import StartupError

from ..table import implementation
from .reference import Linear


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """The layer of `weight` [out, in] and `bias` [out] on their device; the given weight is not needed any more.

    Calling it with a shape that does not fit raises torch's own error.
    """
    return implementation("linear", weight.device.type).pack(weight, bias)  # type: ignore[no-any-return]


def pack_invariant(weight: Tensor, bias: Tensor | None) -> Linear:
    """The same, slower, with every bit of a row's result independent of how many other rows are computed beside it.
    StartupError: this device has no such linear.
    """
    found = implementation("linear", weight.device.type)
    if not hasattr(found, "pack_invariant"):
        raise StartupError(f"a linear that no batch changes is there for CUDA, not for {weight.device.type!r}")
    return found.pack_invariant(weight, bias)  # type: ignore[no-any-return]
