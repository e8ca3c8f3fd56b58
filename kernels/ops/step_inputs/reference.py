"""Definition of the op: what a wire does to the state, and what a step's rows are made of. Runs on any device, asks it.

Letters as in device/step.py and device/state.py; the wire's layout is told in device/wire.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...device.state import DeviceState
from ...device.step import TOKEN_MISSING, StepTensors
from ...device.wire import HEADER, NUM_UPDATES, ROW, UPDATES_AT


def apply_updates(wire_W: Tensor, state: DeviceState, count: int) -> None:
    """See launch.py."""
    assert int(wire_W[NUM_UPDATES]) == count
    at = int(wire_W[UPDATES_AT])
    state.words[wire_W[at : at + count].long()] = wire_W[at + count : at + 2 * count]


def build_inputs(wire_W: Tensor, state: DeviceState, step: StepTensors) -> None:
    """See launch.py."""
    slot_R, start_R, num_R, first_R = _rows(wire_W, step.num_rows)[:, :4].unbind(1)
    row_T = torch.repeat_interleave(torch.arange(step.num_rows, device=wire_W.device), num_R)
    positions_T = start_R[row_T] + torch.arange(step.num_tokens, device=wire_W.device) - first_R[row_T]
    ids_T = state.tokens_SC[slot_R[row_T], positions_T]
    blocks_T = state.blocks_SB[slot_R[row_T], positions_T // state.block_tokens].long()
    step.ids_T.copy_(ids_T.clamp(min=0))
    step.positions_T.copy_(positions_T)
    step.slot_mapping_T.copy_(blocks_T * state.block_tokens + positions_T % state.block_tokens)
    step.row_T.copy_(row_T)
    step.query_start_R.copy_(torch.cat((first_R, first_R[-1:] + num_R[-1:])))
    step.seq_len_R.copy_(start_R + num_R)
    step.slot_R.copy_(slot_R)
    missing_R = torch.zeros_like(num_R).index_add_(0, row_T, (ids_T < 0).long()) > 0
    step.flags_R.copy_(missing_R * TOKEN_MISSING)


def publish(
    wire_W: Tensor, state: DeviceState, flags_R: Tensor, tokens_N: Tensor, flags_N: Tensor, out_R2: Tensor
) -> None:
    """See launch.py."""
    slot_R, start_R, num_R, _, place_R = _rows(wire_W, out_R2.shape[0])[:, :5].unbind(1)
    samples_R = place_R >= 0
    places_R = place_R.clamp(min=0)
    found_R = flags_R[: len(slot_R)] | torch.where(samples_R, flags_N[places_R], 0)
    token_R = torch.where(samples_R & (found_R == 0), tokens_N[places_R], -1).int()
    state.tokens_SC[slot_R, start_R + num_R] = token_R
    out_R2[:, 0] = token_R
    out_R2[:, 1] = found_R


def _rows(wire_W: Tensor, count: int) -> Tensor:
    return wire_W[HEADER : HEADER + ROW * count].view(count, ROW).long()
