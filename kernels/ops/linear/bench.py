"""What is measured and tuned of linear: the shapes of llama-8b and qwen3-30b-a3b, bfloat16, against cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ..cases import Case, Trial
from ..configs import LIBRARY, Config
from ..parts import Parts
from .cuda import OP, WHOLE_OP, DeviceLinear, multiply

_LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # outs, ins
_HEAD = (128256, 4096)
_LAYERS = 32
SHAPES = {f"llama-8b {name}": shape for name, shape in _LAYER.items()} | {
    "llama-8b head": _HEAD,
    "qwen3-30b-a3b qkv": (5120, 2048),
    "qwen3-30b-a3b o": (2048, 4096),
    "qwen3-30b-a3b head": (151936, 2048),
}
_ODD = {  # no launch table has them: vocabularies that no tile divides, a small and a wide hidden size
    "vocabulary 50257 head": (50257, 4096),
    "vocabulary 151669 head": (151669, 1024),
    "smollm2-135m qkv": (960, 576),
    "smollm2-135m head": (49152, 576),
    "llama-70b gate_up": (57344, 8192),
    "qwen2-7b qkv": (4608, 3584),
}
_WHOLE = ("head",)
_ROWS = (1, 16, 64, 512, 8192)
_ODD_ROWS = (1, 3, 61)
_COMPUTED = 256  # rows from which FLOP count, not bytes


def _weight(shape: tuple[int, int], device: torch.device) -> DeviceLinear:
    return DeviceLinear(torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5, None)


def _make(rows: int, shape: tuple[int, int], device: torch.device) -> tuple[DeviceLinear, Tensor]:
    return _weight(shape, device), torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16)


def _ours(layer: DeviceLinear, x: Tensor) -> Tensor | Parts:
    return layer.parts(x) or layer(x)


def _cublas(layer: DeviceLinear, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, layer.weight)


def cases(device: torch.device) -> Iterator[Case]:
    """Each shape at each number of rows, then all linears of a decode step of llama-8b in one graph."""
    for (name, shape), rows in [*product(SHAPES.items(), _ROWS), *product(_ODD.items(), _ODD_ROWS)]:
        outs, ins = shape
        if rows > 512 and name.endswith(_WHOLE):
            continue  # a head computes sampled rows alone
        yield Case(
            name=f"{name} x{rows}",
            make=partial(_make, rows, shape, device),
            run=DeviceLinear.__call__ if name.endswith(_WHOLE) else _ours,
            size_bytes=2 * (outs * ins + rows * (outs + ins)),
            flop=2 * rows * outs * ins if rows >= _COMPUTED else 0,
            peers={"cublas": _cublas},
        )
    for rows in (1, 64):
        yield Case(
            name=f"llama-8b step x{rows}",
            make=partial(_make_step, rows, device),
            run=partial(_step, ours=True),
            size_bytes=2 * (_LAYERS * sum(outs * ins for outs, ins in _LAYER.values()) + _HEAD[0] * _HEAD[1]),
            peers={"cublas": partial(_step, ours=False)},
        )


def _make_step(
    rows: int, device: torch.device
) -> tuple[list[tuple[DeviceLinear, Tensor]], tuple[DeviceLinear, Tensor]]:
    return [_make(rows, shape, device) for shape in _LAYER.values()], _make(rows, _HEAD, device)


def _step(layer: list[tuple[DeviceLinear, Tensor]], head: tuple[DeviceLinear, Tensor], *, ours: bool) -> None:
    """One layer's weights, larger than any cache, stand for those of all layers."""
    for _ in range(_LAYERS):
        for linear, x in layer:
            (_ours if ours else _cublas)(linear, x)
    (DeviceLinear.__call__ if ours else _cublas)(*head)


def trials(device: torch.device) -> Iterator[Trial]:
    """Every shape for the numbers of rows that the launch table distinguishes."""
    for (name, (outs, ins)), rows in product(SHAPES.items(), (1, 16, 32, 64, 128)):
        op = WHOLE_OP if name.endswith(_WHOLE) else OP
        yield Trial(
            op=op,
            shape=(rows, outs, ins),
            make=partial(_make, rows, (outs, ins), device),
            run=_attempt,
            wanted=_wanted,
            size_bytes=2 * outs * ins,
            configs=[LIBRARY, *_candidates(op, rows)],
        )


def _candidates(op: str, rows: int) -> list[Config]:
    tiles = ((64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 8, 4), (128, 128, 4, 3))
    return [
        Config(max(16, rows), block_n, block_k, split, warps, stages)
        for (block_n, block_k, warps, stages), split in product(tiles, (1,) if op == WHOLE_OP else (1, 2, 4, 8))
    ]


def _attempt(config: Config, layer: DeviceLinear, x: Tensor) -> Tensor:
    return _cublas(layer, x) if config == LIBRARY else multiply(x, layer.weight, None, config).data


def _wanted(layer: DeviceLinear, x: Tensor) -> Tensor:
    """In pieces: a head's weight in float64 is 4 GB."""
    return torch.cat([x.double() @ piece.double().T for piece in torch.split(layer.weight, 16_384)], 1)
