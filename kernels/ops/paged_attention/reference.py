"""Definition of paged attention: one sequence after another, in float32.

T tokens of the row, H query heads, G KV heads, D head size, N blocks, B tokens a block; n new tokens, L context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ragged import RaggedBatch, Segment
from .params import AttentionParams

if TYPE_CHECKING:
    from ...device.step import StepTensors
    from .launch import QkvView


def paged_attention(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch, params: AttentionParams
) -> Tensor:
    """Causal attention of each token over its own sequence up to itself; [T, H, D] in the dtype of the queries."""
    out_THD = torch.empty_like(q_THD)
    for segment in batch.segments:
        _attend_segment(q_THD, k_NGBD, v_NGBD, segment, params, out_THD)
    return out_THD


def attend(
    q_THD: Tensor,
    qkv: QkvView | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    params: AttentionParams,
    out_THD: Tensor,
) -> None:
    """The same for a step as tensors; waits for the device. Keys and values of the step's tokens lie in blocks too."""
    starts = step.query_start_R[: step.num_rows + 1].tolist()
    ends, places = step.seq_len_R.tolist(), step.slot_R.tolist()
    for row in range(step.num_rows):
        num = starts[row + 1] - starts[row]
        blocks = step.blocks_SB[places[row], : -(-ends[row] // step.block_tokens)].tolist()
        _attend_segment(q_THD, k_NGBD, v_NGBD, Segment(starts[row], num, ends[row] - num, blocks), params, out_THD)


def _attend_segment(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, segment: Segment, params: AttentionParams, out_THD: Tensor
) -> None:
    group, block_tokens = q_THD.shape[1] // k_NGBD.shape[1], k_NGBD.shape[2]
    positions_L = torch.arange(segment.end, device=q_THD.device)
    blocks = torch.tensor(list(segment.blocks), dtype=torch.int64, device=q_THD.device)[positions_L // block_tokens]
    k_HLD = k_NGBD[blocks, :, positions_L % block_tokens].float().repeat_interleave(group, 1).transpose(0, 1)
    v_HLD = v_NGBD[blocks, :, positions_L % block_tokens].float().repeat_interleave(group, 1).transpose(0, 1)
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
