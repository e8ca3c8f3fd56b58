"""What is measured of qk_write: a layer of llama-8b's and of qwen3-30b-a3b's heads, at decoding and prompt sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from ..paged_attention.testing import PagedStep, paged_step
from .launch import qk_write
from .rope import RopeTable

_HEAD_DIM = 128
_SHAPES = {"32 / 8 heads": ((32, 8), False), "32 / 4 heads, normed": ((32, 4), True)}
_TOKENS = (1, 64, 512, 8192)


def _inputs(tokens: int, heads: tuple[int, int], device: torch.device) -> tuple[PagedStep, RopeTable, Tensor]:
    rows = [(0, tokens)] if tokens > 512 else [(100, 1)] * tokens
    like = torch.empty(0, device=device, dtype=torch.bfloat16)
    angle = torch.rand(8192, _HEAD_DIM // 2, device=device)
    weight = torch.rand(_HEAD_DIM, device=device, dtype=torch.bfloat16)
    made = paged_step(rows, heads=heads, head_dim=_HEAD_DIM, block_tokens=16, like=like)
    return made, RopeTable(angle.cos(), angle.sin()), weight


def _ours(normed: bool, made: PagedStep, rope: RopeTable, weight: Tensor) -> Tensor:
    norms = (weight, weight, 1e-5) if normed else None
    return qk_write(made.qkv_TN, rope, norms, made.k_NGBD, made.v_NGBD, made.step, check=False)


def cases(device: torch.device) -> Iterator[Case]:
    """By bandwidth: rows and their rotation read, queries and keys written back (keys where a prompt needs them), KV
    written.
    """
    for name, (heads, normed) in _SHAPES.items():
        for tokens in _TOKENS:
            kept = heads[0] + (heads[1] if tokens > 512 else 0)
            angles = 1 if tokens > 512 else 0  # cosines and sines in float32 of each position; the others share theirs
            numbers = heads[0] + 2 * heads[1] + kept + 2 * heads[1]
            yield Case(
                name=f"{tokens} tokens, {name}",
                make=partial(_inputs, tokens, heads, device),
                run=partial(_ours, normed),
                size_bytes=tokens * (2 * numbers + 4 * angles) * _HEAD_DIM,
            )
