"""Linear on a card: cuBLAS, but for few rows where the launch table says that our kernel reads the weight faster.

Where several programs share a tile of outputs, the next elementwise kernel adds their sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiled import launch
from ..configs import LIBRARY, Config, choose
from ..parts import Parts
from . import reference
from .kernel import few_rows

OP = "linear"  # partial sums are allowed; shapes are (rows, outs, ins)
WHOLE_OP = "linear_whole"  # nothing may be left to be added: the split is 1
_BUCKETS = (1, 16, 32, 64, 128)  # rows of the launch table; with more, a weight is computed on rather than read: cuBLAS
# By bytes a number, for any number of rows.
_INVARIANT = {2: Config(128, 128, 64, 1, 8, 4), 4: Config(64, 64, 32, 1, 8, 3)}
_READ = (torch.bfloat16, torch.float16)  # the types that were measured
_ALIGNED = 8  # outputs, in these types: rows of another number begin where the library cannot store 16 bytes at once


def pack(weight: Tensor, bias: Tensor | None) -> reference.Linear:
    """See launch.py."""
    return DeviceLinear(weight, bias)


def pack_invariant(weight: Tensor, bias: Tensor | None) -> reference.Linear:
    """See launch.py."""
    return InvariantLinear(weight, bias)


class DeviceLinear(reference.Linear):
    """Over the weight as it is. x: [rows, in]; fewer than one row: empty results."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.contiguous(), bias)
        self.outs, self.ins = weight.shape
        self._transposed = self.weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """See reference.py. Leading dimensions are rows."""
        out = torch.empty((*x.shape[:-1], self.outs), dtype=x.dtype, device=x.device)
        self.write(x.reshape(-1, self.ins), out.view(-1, self.outs))
        return out

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """See reference.py. The sum is rounded once."""
        if self.bias is not None:
            return super().add(x, addend)
        rows = addend.reshape(-1, self.outs)
        return torch.addmm(rows, x.reshape(-1, self.ins), self._transposed).view(addend.shape)

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """self(x) into `out` [rows, outs], contiguous, which is returned."""
        config = self._config(WHOLE_OP, x)
        if config is not LIBRARY:
            multiply(x, self.weight, self.bias, config, out=out)
        elif self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)
        return out

    def into(self, x: Tensor, residual: Tensor) -> None:
        """residual += self(x), rounded once, or twice with a bias. A product that computes rather than reads adds for
        nothing.
        """
        torch.addmm(residual, x, self._transposed, out=residual)
        if self.bias is not None:
            residual.add_(self.bias)

    def parts(self, x: Tensor) -> Parts | None:
        """self(x) as addends: float32, or a single one in the dtype of x. None: `into` or `write` is faster for so
        many rows.
        """
        config = self._config(OP, x)
        return None if config is LIBRARY else multiply(x, self.weight, self.bias, config)

    def _config(self, op: str, x: Tensor) -> Config:
        rows = x.shape[0]
        if rows == 0 or x.dtype not in _READ or x.stride(1) != 1:
            return LIBRARY
        found = LIBRARY
        if rows <= _BUCKETS[-1]:
            found = choose(op, (next(bucket for bucket in _BUCKETS if rows <= bucket), self.outs, self.ins))
        # A vocabulary of 32,001, say. What the library does then was not measured; ours is known for any rows.
        return _INVARIANT[2] if found is LIBRARY and op == WHOLE_OP and self.outs % _ALIGNED else found


class InvariantLinear(DeviceLinear):
    """One configuration for any number of rows, sums never split: a row's bits depend on that row alone."""

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """See reference.py."""
        return addend + self(x)

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """See DeviceLinear."""
        config = _INVARIANT[x.element_size()]
        multiply(x if x.stride(1) == 1 else x.contiguous(), self.weight, self.bias, config, out=out)
        return out

    def into(self, x: Tensor, residual: Tensor) -> None:
        """residual += self(x), rounded twice."""
        residual.add_(self(x))

    def parts(self, x: Tensor) -> Parts | None:
        """None: `into` or `write`."""
        return None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, *, out: Tensor | None = None) -> Parts:
    """x @ weight.T + bias by our kernel, in at most `config.split` parts; into `out` [rows, outs] if the split is 1.

    x: [rows, ins], at least one row, each contiguous. Parts are float32, a single one has the dtype of x.
    """
    rows, ins = x.shape
    outs = weight.shape[0]
    steps = -(-ins // config.block_k)
    run = -(-steps // config.split)
    count = -(-steps // run)
    if out is None:
        dtype = torch.float32 if count > 1 else x.dtype
        out = torch.empty((count, rows, outs), dtype=dtype, device=x.device)
    assert out.numel() == count * rows * outs
    launch(
        few_rows,
        (-(-outs // config.block_n) * count, -(-rows // config.block_m), 1),
        (x, weight, weight if bias is None else bias, out, rows, x.stride(0)),
        num_warps=config.warps,
        num_stages=config.stages,
        K=ins,
        N=outs,
        RUN=run * config.block_k,
        PARTS=count,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return Parts(out, count)
