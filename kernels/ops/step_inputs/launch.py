"""Entry of step_inputs: checks, then picks the implementation for the device. A kernel reads what varies from the wire
and the host's counts, so that none of this asks the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...device.state import DeviceState
from ...device.step import StepTensors
from ...device.wire import HEADER, ROW
from ..table import implementation


def apply_updates(wire_W: Tensor, state: DeviceState, count: int) -> None:
    """Set the `count` words of the state that the wire's header tells. No word may be set twice to different values."""
    if not 0 <= HEADER + 2 * count <= wire_W.shape[0]:
        raise ValueError(f"apply_updates: {count} updates in a wire of {wire_W.shape[0]} words")
    if count:
        implementation("step_inputs", wire_W.device.type).apply_updates(wire_W, state, count)


def build_inputs(wire_W: Tensor, state: DeviceState, step: StepTensors) -> None:
    """Fill the step's tensors but `kept_N` and `splits` from the wire's rows, which are as many as the step's.

    A token that was never soundly sampled is id 0, and its row's flag TOKEN_MISSING is set; all other flags become 0.
    """
    rows, tokens = step.num_rows, step.num_tokens
    if rows < 1 or HEADER + ROW * rows > wire_W.shape[0]:
        raise ValueError(f"build_inputs: {rows} rows in a wire of {wire_W.shape[0]} words")
    if step.query_start_R.shape != (rows + 1,) or step.ids_T.shape != (tokens,) or step.flags_R.shape != (rows,):
        shapes = [tuple(t.shape) for t in (step.query_start_R, step.ids_T, step.flags_R)]
        raise ValueError(f"build_inputs: query_start, ids and flags of {shapes} for {rows} rows, {tokens} tokens")
    if step.prompt_rows == 0 and tokens != rows:
        raise ValueError(f"build_inputs: {tokens} tokens in {rows} rows of one token")
    implementation("step_inputs", wire_W.device.type).build_inputs(wire_W, state, step)


def publish(
    wire_W: Tensor, state: DeviceState, flags_R: Tensor, tokens_N: Tensor, flags_N: Tensor, out_R2: Tensor
) -> None:
    """End a step. Row r of the wire samples from place p: its token is tokens_N[p] (int64), unless a bit is set in
    flags_R[r] or flags_N[p] (int32).

    The token, or -1, goes to the slot's next position and to out_R2[r, 0]; all bits of the row go to out_R2[r, 1].
    """
    rows = out_R2.shape[0]
    if out_R2.shape != (rows, 2) or flags_R.shape[0] < rows or tokens_N.shape != flags_N.shape:
        raise ValueError(
            f"publish: out {tuple(out_R2.shape)}, row flags {tuple(flags_R.shape)}, tokens {tuple(tokens_N.shape)}, "
            f"their flags {tuple(flags_N.shape)}"
        )
    if tokens_N.dtype is not torch.int64 or flags_N.dtype is not torch.int32:
        raise ValueError(f"publish: tokens of {tokens_N.dtype}, flags of {flags_N.dtype}")
    implementation("step_inputs", wire_W.device.type).publish(wire_W, state, flags_R, tokens_N, flags_N, out_R2)
