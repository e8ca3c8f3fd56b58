"""Definition of qk_write: RMSNorm of heads, rotation, kv_write, one after the other in float32.

T tokens, H query heads, G KV heads, D head size, N blocks, B tokens a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..parts import Parts
from ..rms_norm.reference import rms_norm
from ..rotate.reference import rotate
from .rope import RopeTable

if TYPE_CHECKING:
    from ...device.step import StepTensors


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
    kv_heads, dim = k_NGBD.shape[1], k_NGBD.shape[3]
    flat = qkv.total() if isinstance(qkv, Parts) else qkv.float()
    tokens, heads = flat.shape[0], flat.shape[1] // dim - 2 * kv_heads
    wide = flat.view(tokens, heads + 2 * kv_heads, dim)
    rotated = wide[:, : heads + kv_heads].clone()
    if norms is not None:
        rotated[:, :heads] = rms_norm(rotated[:, :heads], norms[0], norms[2])
        rotated[:, heads:] = rms_norm(rotated[:, heads:], norms[1], norms[2])
    cos, sin = (torch.cat((table, table), 1)[step.positions_T.long()] for table in (rope.cos_CP, rope.sin_CP))
    rotate(rotated[:, :, : rope.rotated], cos, sin)
    q_THD, k_TGD = rotated[:, :heads].to(k_NGBD.dtype), rotated[:, heads:].to(k_NGBD.dtype)
    kv_store(k_TGD, wide[:, heads + kv_heads :].to(v_NGBD.dtype), k_NGBD, v_NGBD, step, check=check)
    if isinstance(qkv, Parts):
        return q_THD
    in_place = qkv.view(wide.shape)
    in_place[:, :heads] = q_THD
    if step.prompt_rows:
        in_place[:, heads : heads + kv_heads] = k_TGD
    return in_place[:, :heads]


def kv_store(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, step: StepTensors, *, check: bool) -> None:
    """See launch.py."""
    from ...device.step import KV_NOT_FINITE

    slots_T = step.slot_mapping_T[: step.num_tokens]
    blocks_T, offsets_T = slots_T // step.block_tokens, slots_T % step.block_tokens
    k_NGBD[blocks_T, :, offsets_T] = k_TGD
    v_NGBD[blocks_T, :, offsets_T] = v_TGD
    if check:
        sound_T = k_TGD.isfinite().flatten(1).all(1) & v_TGD.isfinite().flatten(1).all(1)
        bad = torch.unique(step.row_T[: step.num_tokens][~sound_T]).long()
        step.flags_R[bad] |= KV_NOT_FINITE
