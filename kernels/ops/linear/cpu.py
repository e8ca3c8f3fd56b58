"""Linear on a CPU: bfloat16 weights lie in oneDNN's blocked layout, which it else makes anew in every call.

A single row is multiplied by native code over the same memory: oneDNN reads it at half of the speed that is possible.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ...native.build import LinearArguments, has_linear, library
from . import reference

# Rows for which oneDNN chooses the layout. On a Zen 4 (two cores, 576 x 3072) the layout for 64 rows was as good for
# 1 and for 512 rows as their own; against plain weights a call with 1 row took a third to a half of the time.
_ROWS = 64
_WIDTHS = (16, 32, 48, 64)  # outputs side by side, in the layouts that native code knows
_COMPARED_ROWS = 1536  # of a weight at once: a multiple of all widths, small beside the largest weights
_PLAIN, _SILU, _ADD, _MUL = range(4)  # as in native/linear.inc


def pack(weight: Tensor, bias: Tensor | None) -> reference.Linear:
    """See launch.py. For bfloat16 in oneDNN's layout where this build and CPU have it."""
    alike = bias is None or bias.dtype is weight.dtype
    if weight.dtype is torch.bfloat16 and alike and has_blocked_layout():
        return BlockedLinear(weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear(reference.Linear):
    """Over the weight as it is."""

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """See reference.py."""
        return self(x).add_(addend)

    def silu(self, x: Tensor) -> Tensor:
        """See reference.py."""
        return silu(linear(x, self.weight, self.bias), inplace=True)

    def mul(self, x: Tensor, factor: Tensor) -> Tensor:
        """See reference.py."""
        return self(x).mul_(factor)


class BlockedLinear(reference.Linear):
    """Over oneDNN's form of a bfloat16 weight, which is opaque to all but its own operators and, perhaps, ours."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outs, self.ins = weight.shape
        # The bias is copied too: a view of a mapped file would keep all of it in memory.
        super().__init__(
            _ops()._reorder_linear_weight(weight.contiguous(), _ROWS), None if bias is None else bias.clone()
        )
        self._width = _width(self.weight, weight)
        self._native: list[Any] = []
        if self._width and has_linear():
            self._native = [ctypes.byref(self._arguments(operation)) for operation in (_PLAIN, _SILU, _ADD, _MUL)]

    def __call__(self, x: Tensor) -> Tensor:
        """See reference.py."""
        return self._compute(x, _PLAIN, lambda: _pointwise()(x, self.weight, self.bias, "none", [], ""))

    def silu(self, x: Tensor) -> Tensor:
        """See reference.py. oneDNN calls it swish."""
        return self._compute(x, _SILU, lambda: _pointwise()(x, self.weight, self.bias, "swish", [], ""))

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """See reference.py. The sum is rounded once."""
        return self._compute(x, _ADD, lambda: _binary()(x, addend, self.weight, self.bias, "add"), addend)

    def mul(self, x: Tensor, factor: Tensor) -> Tensor:
        """See reference.py. The product is rounded once."""
        return self._compute(x, _MUL, lambda: _binary()(x, factor, self.weight, self.bias, "mul"), factor)

    def rows(self, ids: Tensor) -> Tensor | None:
        """See reference.py."""
        if not self._width:
            return None
        if ids.numel():
            least, most = ids.aminmax()
            if least < 0 or most >= self.outs:
                raise IndexError(f"row {int(least if least < 0 else most)} of a weight with {self.outs}")
        blocks = _blocks(self.weight, self.outs, self._width)
        pairs: Tensor = blocks[ids // self._width, :, ids % self._width]
        return pairs.flatten(-2)[..., : self.ins]

    def memory(self) -> dict[int, int]:
        """See reference.py."""
        return {_ops().data_ptr(self.weight): _ops()._nbytes(self.weight)}

    def _compute(self, x: Tensor, operation: int, onednn: Callable[[], Tensor], other: Tensor | None = None) -> Tensor:
        count = x.numel()
        if not count:
            return x.new_empty((*x.shape[:-1], self.outs))
        fits = count == self.ins == x.shape[-1] and x.dtype is torch.bfloat16
        if other is not None:
            if other.numel() * self.ins != count * self.outs:  # oneDNN would read beyond the end
                raise RuntimeError(f"a linear gives {self.outs} numbers a row, {tuple(other.shape)} does not fit them")
            fits = fits and other.dtype is torch.bfloat16
        if not self._native or not fits:
            return onednn()
        native = library()
        assert native is not None
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.outs))
        beside = None if other is None else other.contiguous()
        native.linear_row(
            self._native[operation],
            x.data_ptr(),
            None if beside is None else beside.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _arguments(self, operation: int) -> LinearArguments:
        padded_outs = -(-self.outs // self._width) * self._width
        return LinearArguments(
            weight=_ops().data_ptr(self.weight),
            bias=None if self.bias is None else self.bias.data_ptr(),
            outs=self.outs,
            ins=self.ins,
            ins_padded=_ops()._nbytes(self.weight) // 2 // padded_outs,
            width=self._width,
            operation=operation,
        )


def _width(packed: Tensor, weight: Tensor) -> int:
    """Outputs side by side in a packed weight whose layout is one that native code knows, found by looking; else 0."""
    outs, ins = weight.shape
    for width in _WIDTHS if ins % 2 == 0 else ():
        blocks = _blocks(packed, outs, width)
        if blocks is not None and all(
            torch.equal(
                blocks[first // width : (first + _COMPARED_ROWS) // width]
                .transpose(1, 2)
                .reshape(-1, blocks.shape[1] * 2)[: min(_COMPARED_ROWS, outs - first), :ins]
                .view(torch.int16),
                weight[first : first + _COMPARED_ROWS].view(torch.int16),
            )
            for first in range(0, outs, _COMPARED_ROWS)
        ):
            return width
    return 0


def _blocks(packed: Tensor, outs: int, width: int) -> Any:
    """The packed weight's memory as [outs / width, ins_padded / 2, width, 2]; None where its size does not fit."""
    num_blocks, numbers = -(-outs // width), _ops()._nbytes(packed) // 2
    if numbers % (num_blocks * width * 2):
        return None
    memory = (ctypes.c_char * (numbers * 2)).from_address(_ops().data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(num_blocks, -1, width, 2)


def _ops() -> Any:
    return torch.ops.mkldnn


def _pointwise() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


def _binary() -> Any:
    return torch.ops.mkldnn._linear_pointwise.binary


@cache
def has_blocked_layout() -> bool:
    """These operators are torch's own, made for its compiler; a build without oneDNN lacks them."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "data_ptr", "_nbytes")
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
