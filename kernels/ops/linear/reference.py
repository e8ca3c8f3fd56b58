"""Definition of a linear layer, y = x @ weight.T + bias, and of what may be computed in the same call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import Parts


class Linear:
    """Holds a weight [out, in] and a bias [out] in the device's best form, which never changes their values."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """addend + self(x): [..., in], [..., out] -> [..., out]."""
        return addend + self(x)

    def silu(self, x: Tensor) -> Tensor:
        """silu(self(x)): [..., in] -> [..., out]."""
        return torch.nn.functional.silu(self(x))

    def mul(self, x: Tensor, factor: Tensor) -> Tensor:
        """factor * self(x): [..., in], [..., out] -> [..., out]."""
        return factor * self(x)

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """self(x) into `out`, which is returned."""
        return out.copy_(self(x))

    def into(self, x: Tensor, residual: Tensor) -> None:
        """residual += self(x)."""
        residual.copy_(self.add(x, residual))

    def parts(self, x: Tensor) -> Parts | None:
        """self(x) as addends for the next kernel to add; None where `into` or `write` is better for so many rows."""
        return None

    def rows(self, ids: Tensor) -> Tensor | None:
        """Rows of the weight, [..., in]: what an embedding gives that shares it. None where the weight was not copied
        into another form, so that sharing costs nothing. IndexError: there is no such row.
        """
        return None

    def memory(self) -> dict[int, int]:
        """Where the weight lies: address -> bytes."""
        return {self.weight.data_ptr(): self.weight.nbytes}


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """See launch.py."""
    return Linear(weight, bias)
