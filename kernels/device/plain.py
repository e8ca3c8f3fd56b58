"""The decoder by definition: reads the step back and computes it as a CPU would. For tests of the runner, which need no
kernel then; on a card it asks the device several times a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import LoadedModel
from ..ops.ragged import RaggedBatch, Segment, build_batch
from .step import KV_NOT_FINITE, StepTensors


class PlainDecoder:
    """Implements models.DeviceDecoder by LoadedModel.forward."""

    capturable = False

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        """See models.DeviceDecoder."""
        batch = ragged_batch(step)
        layers = dict(zip(self._model.layer_ids, kv, strict=True))
        logits_NV.copy_(self._model.forward(step.ids_T.long(), batch, layers, step.kept_N))
        broken_T = torch.zeros_like(step.row_T)
        for tensor in kv[-1]:  # where a NaN of any layer before arrives
            written_TGD = tensor[batch.blocks_T, :, batch.offsets_T]
            broken_T |= ~torch.isfinite(written_TGD).flatten(1).all(dim=1)
        broken_R = torch.zeros_like(step.flags_R).index_add_(0, step.row_T, broken_T) > 0
        step.flags_R.bitwise_or_(broken_R.int() * KV_NOT_FINITE)


def ragged_batch(step: StepTensors) -> RaggedBatch:
    """The step as the CPU's ops know it. Asks the device."""
    starts, lengths, slots = step.query_start_R.tolist(), step.seq_len_R.tolist(), step.slot_R.tolist()
    segments = []
    for row, (first, end, slot) in enumerate(zip(starts[:-1], lengths, slots, strict=True)):
        num = starts[row + 1] - first
        if num == 0:  # padding
            continue
        blocks = step.blocks_SB[slot, : -(-end // step.block_tokens)].tolist()
        segments.append(Segment(first, num, end - num, blocks))
    return build_batch(segments, step.block_tokens, step.ids_T.device)
