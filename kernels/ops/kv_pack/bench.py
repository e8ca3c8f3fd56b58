"""What is measured of kv_pack: a chunk of llama-8b's KV between blocks and the wire form on the card."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from .cuda import copier

_LAYERS, _HEADS, _BLOCK, _DIM = 32, 8, 16, 128


def _inputs(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    blocks = tokens // _BLOCK
    arena = torch.randn(_LAYERS, 2, 2 * blocks, _HEADS, _BLOCK, _DIM, device=device, dtype=torch.bfloat16)
    table = torch.randperm(2 * blocks, device=device)[:blocks].int()
    return arena, table, torch.zeros(arena.numel() // 8, dtype=torch.int64, device=device)


def _ours(tokens: int, summed: bool, scatter: bool, arena: Tensor, table: Tensor, wire: Tensor) -> None:
    total = torch.zeros(1, dtype=torch.int64, device=arena.device) if summed else None
    copier(arena, 0, tokens, total, scatter=scatter)(wire, table, 0, 2 * _LAYERS)


def cases(device: torch.device) -> Iterator[Case]:
    """By bandwidth: read and written once."""
    for tokens in (128, 2048):
        for name, summed, scatter in (("gather", False, False), ("gather, sum", True, False), ("scatter", False, True)):
            yield Case(
                name=f"{name} {tokens} tokens",
                make=partial(_inputs, tokens, device),
                run=partial(_ours, tokens, summed, scatter),
                size_bytes=2 * 2 * 2 * _LAYERS * _HEADS * tokens * _DIM,
            )
