"""qk_write and kv_store on a card: one launch each of kernel.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...device.step import KV_NOT_FINITE
from ..compiled import launch
from ..paged_attention.split import is_invariant
from ..parts import Parts
from .kernel import kv_store_heads, qk_write_heads
from .rope import RopeTable

if TYPE_CHECKING:
    from ...device.step import StepTensors

# Of a program. On an H200, us for 64 and 8,192 tokens: llama-8b's heads 2.4 and 60, with 512 numbers 2.8 at 64, with
# 2,048 62.5 at 8,192; qwen3-30b-a3b's, with norms, 2.9 and 55, with 512 numbers 3.5, with 2,048 66.
_NUMBERS = 1024
_UNIT = 16  # numbers


def qk_write(
    qkv: Tensor | Parts,
    rope: RopeTable,
    norms: tuple[Tensor, Tensor, float] | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    *,
    check: bool,
) -> Tensor:
    """See launch.py."""
    _, kv_heads, block_tokens, dim = k_NGBD.shape
    summed = isinstance(qkv, Parts)
    data = qkv.data if isinstance(qkv, Parts) else qkv[None]
    tokens, numbers = data.shape[1:]
    heads = numbers // dim - 2 * kv_heads
    if isinstance(qkv, Parts):
        out_THD = torch.empty((tokens, heads, dim), dtype=k_NGBD.dtype, device=k_NGBD.device)
    else:
        out_THD = qkv[:, : heads * dim].view(tokens, heads, dim)
    pairs = rope.rotated // 2
    rest = dim - rope.rotated
    each = _heads_each(dim, heads + 2 * kv_heads)
    unit = _UNIT if data.stride(0) % _UNIT == 0 else 1
    q_weight, k_weight, eps = norms or (k_NGBD, k_NGBD, 0.0)
    launch(
        qk_write_heads,
        (tokens, -(-(heads + 2 * kv_heads) // each), 1),
        (
            data,
            out_THD,
            k_NGBD,
            v_NGBD,
            rope.cos_CP,
            rope.sin_CP,
            q_weight,
            k_weight,
            step.positions_T,
            step.slot_mapping_T,
            step.row_T,
            step.flags_R,
            data.stride(0) // unit,
            eps,
        ),
        num_warps=_warps(each * dim),
        H=heads,
        G=kv_heads,
        D=dim,
        PAIRS=pairs,
        PAIRS_WIDE=1 << (pairs - 1).bit_length(),
        REST_WIDE=1 << (rest - 1).bit_length() if rest else 0,
        ROW=data.stride(1),
        OUT_ROW=out_THD.stride(0),
        PAGE=block_tokens,
        HEADS=each,
        COUNT=qkv.count if isinstance(qkv, Parts) else 1,
        UNIT=unit,
        NORM=norms is not None,
        KEEP=not summed and step.prompt_rows > 0 and not is_invariant(step),
        CHECK=check,
        FLAG=KV_NOT_FINITE,
    )
    return out_THD


def kv_store(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, step: StepTensors, *, check: bool) -> None:
    """See launch.py."""
    if k_TGD.stride(2) != 1 or v_TGD.stride(2) != 1:
        k_TGD, v_TGD = k_TGD.contiguous(), v_TGD.contiguous()
    tokens, kv_heads, dim = k_TGD.shape
    each = _heads_each(dim, kv_heads)
    launch(
        kv_store_heads,
        (tokens, -(-kv_heads // each), 1),
        (k_TGD, v_TGD, k_NGBD, v_NGBD, step.slot_mapping_T, step.row_T, step.flags_R),
        num_warps=_warps(each * dim),
        K_ROW=k_TGD.stride(0),
        K_HEAD=k_TGD.stride(1),
        V_ROW=v_TGD.stride(0),
        V_HEAD=v_TGD.stride(1),
        G=kv_heads,
        D=dim,
        WIDE=1 << (dim - 1).bit_length(),
        PAGE=step.block_tokens,
        HEADS=each,
        CHECK=check,
        FLAG=KV_NOT_FINITE,
    )


def _heads_each(dim: int, heads: int) -> int:
    """Heads of a program, a power of 2, for any number of tokens: sums of squares follow from the layout."""
    return 1 << (max(1, min(_NUMBERS // dim, heads)) - 1).bit_length()


def _warps(numbers: int) -> int:
    """8 numbers a thread."""
    return min(max(1 << (numbers // 256 - 1).bit_length() if numbers >= 256 else 1, 1), 8)
