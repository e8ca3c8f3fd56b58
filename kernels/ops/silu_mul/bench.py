"""What is measured of silu_mul: rows of llama-8b, whole and in parts; the peer is torch's two operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from ..parts import Parts
from .launch import silu_mul


def _make(tokens: int, size: int, count: int, device: torch.device) -> tuple[object, ...]:
    out = torch.empty(tokens, size, device=device, dtype=torch.bfloat16)
    if count:
        return Parts(torch.randn(count, tokens, 2 * size, device=device), count), out
    return torch.randn(tokens, 2 * size, device=device, dtype=torch.bfloat16), out


def _torch(gate_up: Tensor | Parts, out: Tensor) -> Tensor:
    gate, up = (gate_up.total() if isinstance(gate_up, Parts) else gate_up).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def cases(device: torch.device) -> Iterator[Case]:
    """tokens x numbers of each half, addends."""
    for tokens, size, count in ((1, 14336, 0), (64, 14336, 0), (64, 14336, 2), (512, 14336, 0), (8192, 14336, 0)):
        touched = 2 + (8 * count if count else 4)
        yield Case(
            name=f"{tokens}x{size}, {count} float32 parts" if count else f"{tokens}x{size}",
            make=partial(_make, tokens, size, count, device),
            run=silu_mul,
            size_bytes=tokens * size * touched,
            peers={"torch": _torch},
        )
