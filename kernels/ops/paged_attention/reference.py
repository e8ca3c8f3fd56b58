"""Definition of paged attention: one sequence after another, in float32.

T tokens of the row, H query heads, G KV heads, D head size, N blocks, B tokens a block; n new tokens, L context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import RaggedBatch
from .params import AttentionParams


def paged_attention(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch, params: AttentionParams
) -> Tensor:
    """Causal attention of each token over its own sequence up to itself; [T, H, D] in the dtype of the queries."""
    out_THD = torch.empty_like(q_THD)
    group = q_THD.shape[1] // k_NGBD.shape[1]
    for segment in batch.segments:
        positions_L = torch.arange(segment.end, device=q_THD.device)
        blocks = torch.tensor(list(segment.blocks), device=q_THD.device)[positions_L // batch.block_tokens]
        k_HLD = k_NGBD[blocks, :, positions_L % batch.block_tokens].float().repeat_interleave(group, 1).transpose(0, 1)
        v_HLD = v_NGBD[blocks, :, positions_L % batch.block_tokens].float().repeat_interleave(group, 1).transpose(0, 1)
        here = slice(segment.first, segment.first + segment.num_tokens)
        scores_HnL = q_THD[here].float().transpose(0, 1) @ k_HLD.transpose(1, 2) * params.scaling
        if params.softcap is not None:
            scores_HnL = torch.tanh(scores_HnL / params.softcap) * params.softcap
        distance_nL = positions_L[segment.start :, None] - positions_L[None, :]
        hidden_nL = distance_nL < 0
        if params.window is not None:
            hidden_nL = hidden_nL | (distance_nL >= params.window)
        scores_HnL = scores_HnL.masked_fill(hidden_nL, float("-inf"))
        if params.sinks_H is not None:
            sinks = params.sinks_H.float()[:, None, None].expand(-1, segment.num_tokens, 1)
            scores_HnL = torch.cat((scores_HnL, sinks), dim=-1)
        weights_HnL = torch.softmax(scores_HnL, dim=-1)[..., : segment.end]
        out_THD[here] = (weights_HnL @ v_HLD).transpose(0, 1).to(q_THD.dtype)
    return out_THD
