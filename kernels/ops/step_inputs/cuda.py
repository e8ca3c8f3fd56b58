"""The op on a card: one kernel a call, two for a step with prompts. Nothing here asks the device."""

from __future__ import annotations

from torch import Tensor

from ...device.state import DeviceState
from ...device.step import TOKEN_MISSING, StepTensors
from ...device.wire import HEADER, NUM_UPDATES, ROW, UPDATES_AT
from ..compiled import launch
from . import kernel

_UPDATES = 1024  # of a program
_ROWS = 128
_TOKENS = 512


def _pieces(count: int, size: int) -> int:
    return -(-count // size)


def apply_updates(wire_W: Tensor, state: DeviceState, count: int) -> None:
    """See launch.py."""
    grid = (_pieces(count, _UPDATES), 1, 1)
    launch(kernel.apply, grid, (wire_W, state.words), COUNT_AT=NUM_UPDATES, WHERE_AT=UPDATES_AT, BLOCK=_UPDATES)


def build_inputs(wire_W: Tensor, state: DeviceState, step: StepTensors) -> None:
    """See launch.py."""
    sources = (wire_W, state.tokens_SC, state.blocks_SB)
    of_tokens = (step.ids_T, step.positions_T, step.slot_mapping_T, step.row_T)
    of_rows = (step.query_start_R, step.seq_len_R, step.slot_R, step.flags_R)
    strides = (state.tokens_stride, state.blocks_stride)
    launch(
        kernel.build_rows,
        (_pieces(step.num_rows, _ROWS), 1, 1),
        (*sources, *of_tokens, *of_rows, step.num_rows, *strides),
        HEADER=HEADER,
        ROW=ROW,
        MISSING=TOKEN_MISSING,
        PAGE=state.block_tokens,
        BLOCK=_ROWS,
    )
    if step.prompt_rows:
        launch(
            kernel.build_prompts,
            (step.prompt_rows, _pieces(step.most_prompt, _TOKENS), 1),
            (*sources, *of_tokens, step.decode_rows, *strides),
            HEADER=HEADER,
            ROW=ROW,
            PAGE=state.block_tokens,
            BLOCK=_TOKENS,
        )


def publish(
    wire_W: Tensor, state: DeviceState, flags_R: Tensor, tokens_N: Tensor, flags_N: Tensor, out_R2: Tensor
) -> None:
    """See launch.py."""
    rows = out_R2.shape[0]
    launch(
        kernel.publish,
        (_pieces(rows, _ROWS), 1, 1),
        (wire_W, state.tokens_SC, flags_R, tokens_N, flags_N, out_R2, rows, state.tokens_stride),
        HEADER=HEADER,
        ROW=ROW,
        BLOCK=_ROWS,
    )
