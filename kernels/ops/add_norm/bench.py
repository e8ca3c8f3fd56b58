"""What is measured of add_norm: rows of llama-8b with and without addends; the peer is torch's own norm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from ..parts import Parts
from .launch import add_norm

_EPS = 1e-5


def _make(tokens: int, size: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    residual, out = (torch.randn(tokens, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    parts = Parts(torch.randn(count, tokens, size, device=device).to(dtype) / 64, count) if count else None
    return residual, parts, torch.randn(size, device=device, dtype=torch.bfloat16), out


def _run(residual: Tensor, parts: Parts | None, weight: Tensor, out: Tensor) -> Tensor:
    return add_norm(residual, parts, weight, _EPS, out)


def _torch(residual: Tensor, parts: Parts | None, weight: Tensor, out: Tensor) -> Tensor:
    for part in parts.data if parts is not None else ():
        residual.add_(part)
    return torch.nn.functional.rms_norm(residual, (residual.shape[1],), weight, _EPS)


def cases(device: torch.device) -> Iterator[Case]:
    """tokens x numbers, addends."""
    bf16, f32 = torch.bfloat16, torch.float32
    shapes = ((1, 4096, 2, f32), (64, 4096, 2, f32), (64, 4096, 1, bf16), (64, 2048, 8, bf16), (512, 4096, 1, bf16))
    for tokens, size, count, dtype in (*shapes, (8192, 4096, 0, bf16), (8192, 4096, 1, bf16), (8192, 2048, 8, bf16)):
        touched = 2 * (2 if count == 0 else 3) + count * dtype.itemsize
        yield Case(
            name=f"{tokens}x{size}, {count} {str(dtype).removeprefix('torch.')} parts",
            make=partial(_make, tokens, size, count, dtype, device),
            run=_run,
            size_bytes=tokens * size * touched,
            peers={"torch": _torch},
        )
