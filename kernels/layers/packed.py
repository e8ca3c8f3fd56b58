"""Linear layers with their weight in the device's best form."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.linear.launch import linear, linear_add, linear_mul, linear_silu, pack


class PackedLinear(nn.Module):
    """Computes what `source` computes. The packed weight is no parameter: it may be opaque to everything but the op."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features = source.in_features
        self.out_features = source.out_features
        self.register_buffer("bias", None if source.bias is None else source.bias.data)
        self.packed = pack(source.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.packed, self._buffers["bias"])

    def add_to(self, addend: Tensor, x: Tensor) -> Tensor:
        """addend + forward(x): [..., out_features]."""
        return linear_add(x, self.packed, self._buffers["bias"], addend)

    def silu(self, x: Tensor) -> Tensor:
        """silu(forward(x)): [..., out_features]."""
        return linear_silu(x, self.packed, self._buffers["bias"])

    def times(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor * forward(x): [..., out_features]."""
        return linear_mul(x, self.packed, self._buffers["bias"], factor)


def pack_linears(model: nn.Module) -> None:
    """Replace every plain nn.Linear in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
