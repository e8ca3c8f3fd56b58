"""Linear on a card: cuBLAS, but for few rows where the launch table says that our kernel reads the weight faster.

Where the work of one tile of outputs is shared by several programs, the next elementwise kernel adds their sums.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..compiled import launch
from ..configs import LIBRARY, Config, choose
from ..parts import Parts
from . import reference
from .kernel import few_rows

OP = "linear"  # partial sums are allowed; shapes are (rows, outs, ins)
WHOLE_OP = "linear_whole"  # nothing may be left to be added: split is ONE_A_TILE
ONE_A_TILE = 0
MOST_ROWS = 64  # beyond, a weight's tiles are computed on rather than read: cuBLAS
_BUCKETS = (1, 16, 32, 64)
_READ = (torch.bfloat16, torch.float16)  # the types that were measured


def pack(weight: Tensor, bias: Tensor | None) -> reference.Linear:
    """See launch.py."""
    return DeviceLinear(weight, bias)


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
            multiply(x, self.weight, self.bias, out.unsqueeze(0), config, share(config, self.outs, self.ins, 1)[0])
        elif self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)
        return out

    def into(self, x: Tensor, residual: Tensor) -> None:
        """residual += self(x), rounded once. Where a product computes rather than reads, the addition costs nothing."""
        torch.addmm(residual, x, self._transposed, out=residual)
        if self.bias is not None:
            residual.add_(self.bias)

    def parts(self, x: Tensor) -> Parts | None:
        """self(x) as addends: float32, or a single one in the dtype of x. None: `into` or `write` is faster for so
        many rows.
        """
        config = self._config(OP, x)
        if config is LIBRARY:
            return None
        run, slots = share(config, self.outs, self.ins, processors(x.device))
        dtype = torch.float32 if slots > 1 else x.dtype
        out = torch.empty((slots, x.shape[0], self.outs), dtype=dtype, device=x.device)
        multiply(x, self.weight, self.bias, out, config, run)
        return Parts(out, slots)

    def _config(self, op: str, x: Tensor) -> Config:
        rows = x.shape[0]
        if not 0 < rows <= MOST_ROWS or x.dtype not in _READ or x.stride(1) != 1:
            return LIBRARY
        return choose(op, (next(bucket for bucket in _BUCKETS if rows <= bucket), self.outs, self.ins))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, config: Config, run: int) -> None:
    """x @ weight.T + bias as the sum over `out` [slots, rows, outs], contiguous; `run` and slots: see `share`."""
    slots, rows, outs = out.shape
    ins = weight.shape[1]
    units = -(-outs // config.block_n) * -(-ins // config.block_k)
    launch(
        few_rows,
        (-(-units // run), -(-rows // config.block_m), 1),
        (x, weight, weight if bias is None else bias, out, rows, run, x.stride(0)),
        num_warps=config.warps,
        num_stages=config.stages,
        K=ins,
        N=outs,
        SLOTS=slots,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


@cache
def share(config: Config, outs: int, ins: int, num_processors: int) -> tuple[int, int]:
    """(K steps of a program, the most partial sums of a tile) where `config.split` programs run on each processor;
    with ONE_A_TILE each program computes one tile.
    """
    tiles, steps = -(-outs // config.block_n), -(-ins // config.block_k)
    if config.split == ONE_A_TILE:
        return steps, 1
    run = -(-tiles * steps // (config.split * num_processors))
    cuts = {tile * steps % run for tile in range(tiles)}
    return run, max((cut + steps - 1) // run + 1 for cut in cuts)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count
