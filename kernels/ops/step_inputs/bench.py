"""What is measured of step_inputs: a decode step and a mixed one, both bound by latency rather than by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec, StepPlan, StepRow

from ...device.buffers import StepBuffers
from ...device.graphs import decode_shape
from ...device.state import DeviceState
from ...device.step import StepTensors
from ...device.wire import Packer, Wire, wire_words
from ..cases import Case
from .launch import build_inputs

_PAGE, _CONTEXT, _ROWS, _TOKENS = 16, 2048, 512, 8192
_SPEC = SampleSpec(0.0, 1.0, 0, 0, 0)


def _make(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, DeviceState, StepTensors]:
    state = DeviceState(max_slots=_ROWS, max_context_tokens=_CONTEXT, block_tokens=_PAGE, spare_block=0, device=device)
    blocks = list(range(_CONTEXT // _PAGE))
    rows = tuple(
        StepRow(slot=slot, num_tokens=num, tokens=(7,) * num, start=100, blocks=blocks, sample=_SPEC)
        for slot, num in enumerate(lengths)
    )
    layout = Packer(state).lay_out(StepPlan(0, rows))
    memory = torch.zeros(wire_words(max_rows=_ROWS, max_step_tokens=_TOKENS), dtype=torch.int32)
    Wire(memory.numpy()).fill(layout)
    buffers = StepBuffers(state, None, max_rows=_ROWS, max_tokens=_TOKENS, vocab_size=1, dtype=torch.float32)
    step = buffers.shaped_step(decode_shape(len(lengths))) if layout.is_decode else buffers.mixed_step(layout)
    return memory.to(device), state, step


def cases(device: torch.device) -> Iterator[Case]:
    """Rows of one token, and prompts beside them."""
    for name, lengths in (("512 rows", (1,) * 512), ("256 rows, 8 prompts of 900", (1,) * 256 + (900,) * 8)):
        # A row's 8 words and 5 results; a token's id, block and 5 words of results.
        size = 4 * (13 * len(lengths) + 7 * sum(lengths))
        yield Case(name=name, make=partial(_make, lengths, device), run=build_inputs, size_bytes=size)
